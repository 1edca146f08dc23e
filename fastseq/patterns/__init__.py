"""The table of patterns, longest first: the first that matches wins."""

from __future__ import annotations

from fastseq.patterns import conv1d, conv2d, elementwise, linear, maps, rows
from fastseq.patterns.base import Pattern

PATTERNS: tuple[Pattern, ...] = tuple(
    sorted(
        (*conv1d.PATTERNS, *conv2d.PATTERNS, *linear.PATTERNS, *maps.PATTERNS, *rows.PATTERNS, *elementwise.PATTERNS),
        key=lambda pattern: -len(pattern.types),
    )
)
