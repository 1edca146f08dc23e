"""The table of patterns, longest first: the first that matches wins."""

from __future__ import annotations

from fastseq.patterns import conv2d, linear, maxpool2d
from fastseq.patterns.base import Pattern

PATTERNS: tuple[Pattern, ...] = tuple(
    sorted((*conv2d.PATTERNS, *linear.PATTERNS, *maxpool2d.PATTERNS), key=lambda pattern: -len(pattern.types))
)
