"""The table of patterns, longest first: the first that matches wins."""

from __future__ import annotations

from fastseq.patterns import (
    conv2d,
    conv2d_maxpool2d,
    conv2d_maxpool2d_relu,
    conv2d_relu,
    conv2d_relu_maxpool2d,
    linear,
    linear_relu,
    maxpool2d,
)
from fastseq.patterns.base import Pattern

PATTERNS: tuple[Pattern, ...] = (
    conv2d_relu_maxpool2d.PATTERN,
    conv2d_maxpool2d_relu.PATTERN,
    conv2d_maxpool2d.PATTERN,
    conv2d_relu.PATTERN,
    linear_relu.PATTERN,
    conv2d.PATTERN,
    linear.PATTERN,
    maxpool2d.PATTERN,
)
