"""MaxPool2d, alone or with an activation behind it."""

from __future__ import annotations

from torch import nn

from fastseq.patterns.activation import ACTIVATIONS
from fastseq.patterns.base import Kinds, Pattern, fused


def example(kinds: Kinds) -> tuple[list[nn.Module], tuple[int, ...]]:
    return [nn.MaxPool2d(3, 2, 1), *(kind() for kind in kinds[1:])], (2, 3, 9, 8)


PATTERNS: tuple[Pattern, ...] = tuple(
    fused("maxpool2d", (nn.MaxPool2d, *rest), example, maps_images=True)
    for rest in (*((kind,) for kind in ACTIVATIONS), ())
)
