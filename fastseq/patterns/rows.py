"""Softmax, LogSoftmax, and LayerNorm alone or with an activation behind it: one step of rows each.

Eager is as fast by themselves, so that they are worth their place in a run with other steps only.
"""

from __future__ import annotations

from torch import nn

from fastseq.patterns.activation import ACTIVATIONS
from fastseq.patterns.base import Kinds, Pattern, fused
from fastseq.patterns.row_layers import LAYERS


def example(kinds: Kinds) -> tuple[list[nn.Module], tuple[int, ...]]:
    return [LAYERS[kinds[0]].example(), *(kind() for kind in kinds[1:])], (3, 7)


PATTERNS: tuple[Pattern, ...] = tuple(
    fused(kind.__name__.lower(), (kind, *rest), example, needs_company=True, reads_maps=True)
    for kind, layer in LAYERS.items()
    for rest in (*((kind,) for kind in (ACTIVATIONS if layer.takes_activation else ())), ())
)
