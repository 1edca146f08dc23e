"""fastseq: drop-in fused kernels for `torch.nn.Sequential`. `fast = fastseq.optimize(model)`."""

from fastseq._native import native_available, native_error
from fastseq.optimize import isa, kernels, optimize, refresh
from fastseq.report import Report, explain, reset_stats, stats, verify
from fastseq.sequential import FusedSequential

__version__ = "0.1.0"

__all__ = [
    "FusedSequential",
    "Report",
    "explain",
    "isa",
    "kernels",
    "native_available",
    "native_error",
    "optimize",
    "refresh",
    "reset_stats",
    "stats",
    "verify",
]
