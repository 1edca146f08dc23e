"""Layers from rows of features to rows that are steps of their own: all that the matcher has to know of each.

A new one is an entry in `LAYERS`, and an operation of the native engine (csrc/plan/rows.h). GroupNorm, which is one of
images, stands in `map_layers.py` and reads its eps as these do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastseq.patterns.arguments import LARGEST, refuse_eps


@dataclass(frozen=True)
class RowLayer:
    """`attributes`: what its forward reads from its `__dict__`; `functions`: what it looks up in torch.nn.functional.

    `check(layer)` returns why it is declined, or None; `build(layer)` what a step for the native engine has of it;
    `example()` a layer that matches, for rows of 7. `takes_activation`: in the same step. `parameters`: that it reads.
    """

    attributes: tuple[str, ...]
    functions: tuple[str, ...]
    check: Callable[[Any], str | None]
    build: Callable[[Any], dict[str, Any]]
    example: Callable[[], nn.Module]
    takes_activation: bool = False
    parameters: tuple[str, ...] = ()


def check_softmax(layer: nn.Softmax | nn.LogSoftmax) -> str | None:
    if type(layer.dim) is not int or layer.dim not in (-1, 1):
        return f"{type(layer).__name__} has dim {layer.dim!r}; fused kernels take -1, or 1 of rows"
    return None


def build_softmax(layer: nn.Softmax | nn.LogSoftmax) -> dict[str, Any]:
    return {"needs_batch": layer.dim == 1}


def check_layer_norm(layer: nn.LayerNorm) -> str | None:
    shape = layer.normalized_shape
    if type(shape) is not tuple or len(shape) != 1 or type(shape[0]) is not int or not 0 < shape[0] <= LARGEST:
        return f"LayerNorm has normalized_shape {shape!r}; fused kernels take a tuple of one, the last dimension"
    return refuse_eps(layer)


def build_layer_norm(layer: nn.LayerNorm) -> dict[str, Any]:
    return {"moments": {"features": layer.normalized_shape[0], "eps": float(layer.eps)}}


LAYERS: dict[type[nn.Module], RowLayer] = {
    nn.Softmax: RowLayer(("dim",), ("softmax",), check_softmax, build_softmax, lambda: nn.Softmax(-1)),
    nn.LogSoftmax: RowLayer(("dim",), ("log_softmax",), check_softmax, build_softmax, lambda: nn.LogSoftmax(1)),
    nn.LayerNorm: RowLayer(
        ("normalized_shape", "eps"),
        ("layer_norm",),
        check_layer_norm,
        build_layer_norm,
        lambda: nn.LayerNorm(7),
        takes_activation=True,
        parameters=("weight", "bias"),
    ),
}
FUNCTIONAL = tuple(name for layer in LAYERS.values() for name in layer.functions)
