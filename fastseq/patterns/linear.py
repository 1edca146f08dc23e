"""Linear, alone or with BatchNorm1d and an activation behind it: one step."""

from __future__ import annotations

from torch import nn

from fastseq.patterns.activation import ACTIVATIONS
from fastseq.patterns.base import Kinds, Pattern, fused


def example(kinds: Kinds) -> tuple[list[nn.Module], tuple[int, ...]]:
    make = {nn.Linear: lambda: nn.Linear(7, 5), nn.BatchNorm1d: lambda: nn.BatchNorm1d(5)}
    return [make.get(kind, kind)().eval() for kind in kinds], (3, 7)


PATTERNS: tuple[Pattern, ...] = tuple(
    fused("linear", (nn.Linear, *norm, *rest), example, reads_maps=True)
    for rest in (*((kind,) for kind in ACTIVATIONS), ())
    for norm in ((nn.BatchNorm1d,), ())
)
