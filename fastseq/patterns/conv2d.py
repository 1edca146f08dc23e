"""Conv2d, alone or with BatchNorm2d, ReLU and MaxPool2d behind it: one step, all that follows in its epilogue."""

from __future__ import annotations

from torch import nn

from fastseq.patterns.base import Kinds, Pattern, fused


def example(kinds: Kinds) -> tuple[list[nn.Module], tuple[int, ...]]:
    make = {nn.Conv2d: lambda: nn.Conv2d(3, 5, 3), nn.BatchNorm2d: lambda: nn.BatchNorm2d(5)}
    make |= {nn.ReLU: nn.ReLU, nn.MaxPool2d: lambda: nn.MaxPool2d(2)}
    return [make[kind]().eval() for kind in kinds], (2, 3, 9, 8)


# ReLU and maximum commute, so either may come first.
PATTERNS: tuple[Pattern, ...] = tuple(
    fused("conv2d", (nn.Conv2d, *norm, *rest), example, maps_images=True)
    for rest in ((nn.ReLU, nn.MaxPool2d), (nn.MaxPool2d, nn.ReLU), (nn.MaxPool2d,), (nn.ReLU,), ())
    for norm in ((nn.BatchNorm2d,), ())
)
