"""Conv1d, alone or with BatchNorm1d, an activation and MaxPool1d behind it: Conv2d's step on images of one row."""

from __future__ import annotations

from torch import nn

from fastseq.patterns import conv2d
from fastseq.patterns.base import Kinds, Pattern, fused

ONE_DIMENSIONAL: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: nn.Conv1d,
    nn.BatchNorm2d: nn.BatchNorm1d,
    nn.MaxPool2d: nn.MaxPool1d,
}


def example(kinds: Kinds) -> tuple[list[nn.Module], tuple[int, ...]]:
    make = {nn.Conv1d: lambda: nn.Conv1d(3, 5, 3), nn.BatchNorm1d: lambda: nn.BatchNorm1d(5)}
    make |= {nn.MaxPool1d: lambda: nn.MaxPool1d(2)}
    return [make.get(kind, kind)().eval() for kind in kinds], (2, 3, 9)


PATTERNS: tuple[Pattern, ...] = tuple(
    fused("conv2d", tuple(ONE_DIMENSIONAL.get(kind, kind) for kind in pattern.types), example, maps_images=True)
    for pattern in conv2d.PATTERNS
)
