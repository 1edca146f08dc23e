"""Pools and other layers from images to images, alone or with an activation behind them: one step each."""

from __future__ import annotations

from torch import nn

from fastseq.patterns.activation import ACTIVATIONS
from fastseq.patterns.base import Kinds, Pattern, fused
from fastseq.patterns.map_layers import LAYERS


def example(kinds: Kinds) -> tuple[list[nn.Module], tuple[int, ...]]:
    shape = (2, 3, 9, 8)[: 2 + (LAYERS[kinds[0]].dimensions or 2)]
    return [LAYERS[kinds[0]].example(), *(kind() for kind in kinds[1:])], shape


PATTERNS: tuple[Pattern, ...] = tuple(
    fused(
        layer.op or kind.__name__.lower(),
        (kind, *rest),
        example,
        True,
        layer.refuses_to_lead,
        needs_company=layer.needs_company,
    )
    for kind, layer in LAYERS.items()
    for rest in (*((kind,) for kind in (ACTIVATIONS if layer.takes_activation else ())), ())
)
