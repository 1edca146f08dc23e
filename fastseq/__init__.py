"""fastseq: drop-in fused kernels for `torch.nn.Sequential`. `fast = fastseq.optimize(model)`."""

from fastseq._native import native_available, native_error
from fastseq.controls import disabled, refresh, restore
from fastseq.module import FusedModule
from fastseq.optimize import isa, kernels, optimize
from fastseq.report import Report, explain, reset_stats, stats
from fastseq.sequential import FusedSequential
from fastseq.serving import warmup
from fastseq.verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "FusedModule",
    "FusedSequential",
    "Report",
    "Verification",
    "disabled",
    "explain",
    "isa",
    "kernels",
    "native_available",
    "native_error",
    "optimize",
    "refresh",
    "reset_stats",
    "restore",
    "stats",
    "verify",
    "warmup",
]
