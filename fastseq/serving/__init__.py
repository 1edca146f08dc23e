"""fastseq inside a server: warm-up, a runner for batches of any size, and an HTTP server on LitServe.

`fastseq.serving.server` needs the extra `fastseq[serve]` and is imported by nobody else.
"""

from fastseq.serving.runner import BUCKETS, LATENCY_BOUNDS, Runner, SelfCheckError, warmup

__all__ = ["BUCKETS", "LATENCY_BOUNDS", "Runner", "SelfCheckError", "warmup"]
