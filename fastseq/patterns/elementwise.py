"""BatchNorm and activations that are steps of their own, because no step before them takes them in.

They are worth their place in a run with other steps only: by themselves eager is as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastseq.patterns.activation import ACTIVATIONS
from fastseq.patterns.base import Kinds, Pattern, fused


def example(kinds: Kinds) -> tuple[list[nn.Module], tuple[int, ...]]:
    make: dict[type[nn.Module], Callable[[], nn.Module]] = {
        nn.BatchNorm2d: lambda: nn.BatchNorm2d(3),
        nn.BatchNorm1d: lambda: nn.BatchNorm1d(7),
    }
    return [make.get(kind, kind)().eval() for kind in kinds], (3, 7) if nn.BatchNorm1d in kinds else (2, 3, 9, 8)


def refuses_to_lead(layer: Any) -> str | None:
    # What comes in may be images or rows, and is the caller's, whom an activation in place would surprise.
    return f"{type(layer).__name__} does not follow a layer that is fused"


PATTERNS: tuple[Pattern, ...] = (
    *(
        fused("scale2d", (nn.BatchNorm2d, *rest), example, maps_images=True, needs_company=True)
        for rest in (*((kind,) for kind in ACTIVATIONS), ())
    ),
    *(
        fused("scale", (nn.BatchNorm1d, *rest), example, needs_company=True, line_op="scale2d", maps_features=True)
        for rest in (*((kind,) for kind in ACTIVATIONS), ())
    ),
    *(
        fused(
            "scale2d", (kind,), example, True, refuses_to_lead, needs_company=True, rows_op="scale", maps_features=True
        )
        for kind in ACTIVATIONS
    ),
)
