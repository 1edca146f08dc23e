"""Conv2d, alone or with BatchNorm2d, an activation and MaxPool2d behind it: one step."""

from __future__ import annotations

from torch import nn

from fastseq.patterns.activation import ACTIVATIONS
from fastseq.patterns.base import Kinds, Pattern, fused


def example(kinds: Kinds) -> tuple[list[nn.Module], tuple[int, ...]]:
    make = {nn.Conv2d: lambda: nn.Conv2d(3, 5, 3), nn.BatchNorm2d: lambda: nn.BatchNorm2d(5)}
    make |= {nn.MaxPool2d: lambda: nn.MaxPool2d(2)}
    return [make.get(kind, kind)().eval() for kind in kinds], (2, 3, 9, 8)


# What may follow the convolution, beside BatchNorm2d; the pool before or behind the activation.
FOLLOWERS: tuple[Kinds, ...] = (
    *((kind, nn.MaxPool2d) for kind in ACTIVATIONS),
    *((nn.MaxPool2d, kind) for kind in ACTIVATIONS),
    *((kind,) for kind in ACTIVATIONS),
    (nn.MaxPool2d,),
    (),
)
PATTERNS: tuple[Pattern, ...] = tuple(
    fused("conv2d", (nn.Conv2d, *norm, *rest), example, maps_images=True)
    for rest in FOLLOWERS
    for norm in ((nn.BatchNorm2d,), ())
)
