"""MaxPool2d by itself."""

from __future__ import annotations

from torch import nn

from fastseq.patterns.base import Kinds, Pattern, fused


def example(kinds: Kinds) -> tuple[list[nn.Module], tuple[int, ...]]:
    return [nn.MaxPool2d(3, 2, 1)], (2, 3, 9, 8)


PATTERNS: tuple[Pattern, ...] = (fused("maxpool2d", (nn.MaxPool2d,), example, maps_images=True),)
