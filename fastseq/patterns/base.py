"""What a pattern is, and the checks that several patterns share. No tensors are touched here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from fastseq.patterns import activation

Layers = Sequence[Any]  # of exactly the pattern's types, in its order
Kinds = tuple[type[nn.Module], ...]


@dataclass(frozen=True)
class Pattern:
    """A row of the table: consecutive layers, exact types, that run as one fused step.

    `check(layers)` returns why these layers are declined, or None. `build(layers)` returns the step for the native
    engine; weights are read at call time. `example()` is a tiny (layers, input shape) that matches.
    """

    name: str
    types: Kinds
    check: Callable[[Layers], str | None]
    build: Callable[[Layers], dict[str, Any]]
    example: Callable[[], tuple[list[nn.Module], tuple[int, ...]]]
    maps_images: bool = field(default=False)  # (N, C, H, W) in and out; otherwise rows of features


# The attributes that a layer's forward reads from its __dict__, and the parameters it reads. A change of any of them
# between two calls means a new match.
ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode", "_conv_forward"),
    **activation.ATTRIBUTES,
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d), ("training", "track_running_stats", "eps", "_check_input_dim")),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Dropout: ("p", "training"),
}
PARAMETERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("weight", "bias"),
    nn.Linear: ("weight", "bias"),
    nn.BatchNorm1d: ("weight", "bias"),
    nn.BatchNorm2d: ("weight", "bias"),
    nn.PReLU: ("weight",),
}
BUFFERS: dict[type[nn.Module], tuple[str, ...]] = dict.fromkeys(
    (nn.BatchNorm1d, nn.BatchNorm2d), ("running_mean", "running_var")
)
# Inner methods that a forward calls on the instance: where one is replaced, the forward is another.
INNER_METHODS = ("_conv_forward", "_check_input_dim")


LARGEST = 2**31 - 1  # eager converts sizes to C ints and raises beyond this


def pair(value: Any) -> tuple[int, int] | None:
    """An int or a tuple of two ints as a pair; None for anything else, which eager may accept or reject."""
    values = (value, value) if type(value) is int else value
    if type(values) is not tuple or len(values) != 2:
        return None
    return values if all(type(v) is int and abs(v) <= LARGEST for v in values) else None


def has_parameters(layer: nn.Module) -> str | None:
    """Why what the layer's forward reads is not in `_parameters` and `_buffers`, or None."""
    for name in PARAMETERS.get(type(layer), ()):
        if name not in layer._parameters or name in layer.__dict__:
            return (
                f"{name} is not a plain registered parameter (pruned, normalised or replaced); fused kernels read those"
            )
    for name in BUFFERS.get(type(layer), ()):
        if name not in layer._buffers or name in layer.__dict__:
            return f"{name} is not a plain registered buffer; fused kernels read those"
    return None


def check_conv2d(layer: nn.Conv2d) -> str | None:
    name = "Conv2d"
    if layer.padding_mode != "zeros":
        return f"{name} has padding_mode {layer.padding_mode!r}; fused kernels take 'zeros'"
    if pair(layer.dilation) != (1, 1):
        return f"{name} has dilation {layer.dilation}; fused kernels take 1"
    if type(layer.groups) is not int or layer.groups != 1:
        return f"{name} has groups {layer.groups}; fused kernels take 1"
    if pair(layer.stride) is None:
        return f"{name} has stride {layer.stride!r}; fused kernels take one or two ints"
    if layer.padding == "same" and pair(layer.stride) != (1, 1):
        return f"{name} has padding 'same' and stride {layer.stride}, which eager rejects"
    if layer.padding not in ("same", "valid") and pair(layer.padding) is None:
        return f"{name} has padding {layer.padding!r}; fused kernels take 'same', 'valid', or one or two ints"
    return has_parameters(layer)


def check_maxpool2d(layer: nn.MaxPool2d) -> str | None:
    name = "MaxPool2d"
    if layer.return_indices:
        return f"{name} has return_indices=True; fused kernels return values only"
    if pair(layer.dilation) != (1, 1):
        return f"{name} has dilation {layer.dilation}; fused kernels take 1"
    if type(layer.ceil_mode) is not bool:
        return f"{name} has ceil_mode {layer.ceil_mode!r}; fused kernels take a bool"
    for attribute in ("kernel_size", "stride", "padding"):
        value = getattr(layer, attribute)
        if pair(value) is None and not (attribute == "stride" and value is None):
            return f"{name} has {attribute} {value!r}; fused kernels take one or two ints"
    return None


def check_batchnorm(layer: nn.BatchNorm1d | nn.BatchNorm2d) -> str | None:
    name = type(layer).__name__
    if layer.training is not False:
        return f"{name} is in training mode"
    if reason := has_parameters(layer):
        return reason
    # Without running statistics eager takes those of the batch.
    if layer._buffers["running_mean"] is None or layer._buffers["running_var"] is None:
        return f"{name} has no running statistics; fused kernels take nothing from the batch"
    if type(layer.eps) not in (int, float):
        return f"{name} has eps {layer.eps!r}; fused kernels take a number"
    return None


def build_conv2d(layer: nn.Conv2d) -> dict[str, Any]:
    same = layer.padding == "same"
    padding = (0, 0) if layer.padding in ("same", "valid") else pair(layer.padding)
    return {"stride": pair(layer.stride), "padding": padding, "same": same}


def build_maxpool2d(layer: nn.MaxPool2d) -> dict[str, Any]:
    stride = layer.kernel_size if layer.stride is None else layer.stride
    return {
        "kernel_size": pair(layer.kernel_size),
        "stride": pair(stride),
        "padding": pair(layer.padding),
        "ceil_mode": layer.ceil_mode,
    }


def check_prelu(layer: nn.PReLU) -> str | None:
    return has_parameters(layer) or activation.check(layer)


CHECKS: dict[type[nn.Module], Callable[[Any], str | None]] = {
    **dict.fromkeys(activation.ACTIVATIONS, activation.check),
    nn.PReLU: check_prelu,
    nn.Conv2d: check_conv2d,
    nn.Linear: has_parameters,
    nn.BatchNorm1d: check_batchnorm,
    nn.BatchNorm2d: check_batchnorm,
    nn.MaxPool2d: check_maxpool2d,
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def check(layers: Layers) -> str | None:
    """The first objection to any of the layers, or None."""
    return next(filter(None, (CHECKS[type(layer)](layer) for layer in layers)), None)


def build(op: str, name: str, layers: Layers) -> dict[str, Any]:
    """The step for the native engine. "layer": what holds weight and bias, or None; "norm": the BatchNorm behind."""
    kinds = [type(layer) for layer in layers]
    by_kind = dict(zip(kinds, layers, strict=True))
    pool = by_kind.get(nn.MaxPool2d)
    norm = next((layer for layer in layers if type(layer) in NORMS), None)
    last = next((layer for layer in layers if type(layer) in activation.ACTIVATIONS), None)
    return {
        "op": op,
        "name": name,
        **activation.build(last),
        "activation_after_pool": last is not None
        and pool is not None
        and kinds.index(nn.MaxPool2d) < kinds.index(type(last)),
        "conv": build_conv2d(layers[0]) if kinds[0] is nn.Conv2d else None,
        "pool": None if pool is None else build_maxpool2d(pool),
        "layer": layers[0] if kinds[0] in PARAMETERS else None,
        "norm": norm,
        "eps": 0.0 if norm is None else float(norm.eps),
    }


def fused(
    op: str,
    types: Kinds,
    example: Callable[[Kinds], tuple[list[nn.Module], tuple[int, ...]]],
    maps_images: bool = False,
) -> Pattern:
    """The pattern of layers of these types, named after them, as one step `op` of the native engine."""
    name = "_".join(kind.__name__.lower() for kind in types)
    return Pattern(name, types, check, partial(build, op, name), partial(example, types), maps_images)
