"""What a pattern is, and the checks that several patterns share. No tensors are touched here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from fastseq.patterns import activation, map_layers, row_layers
from fastseq.patterns.arguments import LARGEST, ONE, TWO, refuse_sizes

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
    maps_images: bool = field(default=False)  # (N, C, H, W) or (N, C, L) in and out; otherwise rows of features
    refuses_to_lead: Callable[[Any], str | None] = lambda _: None  # why its first layer does not begin a native run
    needs_company: bool = False  # not worth a run by itself
    rows_op: str = ""  # maps images, or with this operation of the engine rows, whichever there are
    line_op: str = ""  # of rows, or with this operation of maps of one dimension, whichever there are
    reads_maps: bool = False  # also as rows of their features, in the order of the engine's
    maps_features: bool = False  # or behind a Flatten of maps, as a step of those

    @property
    def dimensions(self) -> int:
        """Of the maps, beside batch and channels; 0 for any."""
        return dimensions(self.types[0])


# What a convolution with a padding mode hands to F.pad, of both sides of each dimension, the last one's first.
REVERSED_PADDING = "_reversed_padding_repeated_twice"
# The attributes that a layer's forward reads from its __dict__, and the parameters it reads. A change of any of them
# between two calls means a new match.
ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys(
        (nn.Conv1d, nn.Conv2d),
        ("stride", "padding", "dilation", "groups", "padding_mode", REVERSED_PADDING, "_conv_forward"),
    ),
    **activation.ATTRIBUTES,
    **{kind: layer.attributes for kind, layer in map_layers.LAYERS.items()},
    **{kind: row_layer.attributes for kind, row_layer in row_layers.LAYERS.items()},
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d), ("training", "track_running_stats", "eps", "_check_input_dim")),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Unflatten: ("dim", "unflattened_size"),
    **dict.fromkeys((nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout), ("p", "training")),
}
PARAMETERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv1d: ("weight", "bias"),
    nn.Conv2d: ("weight", "bias"),
    nn.Linear: ("weight", "bias"),
    nn.BatchNorm1d: ("weight", "bias"),
    nn.BatchNorm2d: ("weight", "bias"),
    nn.PReLU: ("weight",),
    nn.GroupNorm: ("weight", "bias"),
    **{kind: layer.parameters for kind, layer in row_layers.LAYERS.items() if layer.parameters},
}
BUFFERS: dict[type[nn.Module], tuple[str, ...]] = dict.fromkeys(
    (nn.BatchNorm1d, nn.BatchNorm2d), ("running_mean", "running_var")
)
# Inner methods that a forward calls on the instance: where one is replaced, the forward is another.
INNER_METHODS = ("_conv_forward", "_check_input_dim")


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


def dimensions(kind: type[nn.Module]) -> int:
    """Of the maps of a layer of this type, beside batch and channels; 0 for any."""
    if kind in map_layers.LAYERS:
        return map_layers.LAYERS[kind].dimensions
    return 1 if kind is nn.Conv1d else 2


def check_conv(layer: nn.Conv1d | nn.Conv2d) -> str | None:
    name, sizes = type(layer).__name__, ONE if type(layer) is nn.Conv1d else TWO
    if layer.padding_mode not in ("zeros", *map_layers.PAD_MODES):
        modes = "'zeros', 'reflect', 'replicate' and 'circular'"
        return f"{name} has padding_mode {layer.padding_mode!r}; fused kernels take {modes}"
    if type(layer.groups) is not int or not 1 <= layer.groups <= LARGEST:
        return f"{name} has groups {layer.groups!r}; fused kernels take a positive int"
    if layer.stride is None:  # which pools may have
        return f"{name} has stride None; fused kernels take {sizes.words}"
    if reason := refuse_sizes(layer, sizes, "stride", "dilation"):
        return reason
    if layer.padding_mode != "zeros":
        # Eager reads no other padding then.
        padding = layer.__dict__.get(REVERSED_PADDING)
        if not map_layers.is_padding(padding, 2 * sizes.dimensions):
            return f"{name} has {REVERSED_PADDING} {padding!r}; fused kernels take ints from 0 on"
        return has_parameters(layer)
    if layer.padding == "same" and sizes.read(layer.stride, 1) != (1, 1):
        return f"{name} has padding 'same' and stride {layer.stride}, which eager rejects"
    if layer.padding not in ("same", "valid") and sizes.read(layer.padding, 0) is None:
        return f"{name} has padding {layer.padding!r}; fused kernels take 'same', 'valid', or {sizes.words}"
    return has_parameters(layer)


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


def build_conv(layer: nn.Conv1d | nn.Conv2d) -> dict[str, Any]:
    sizes = ONE if type(layer) is nn.Conv1d else TWO
    is_padded = layer.padding_mode != "zeros"  # by a step before it
    return {
        "stride": sizes.read(layer.stride, 1),
        "padding": (0, 0) if is_padded or layer.padding in ("same", "valid") else sizes.read(layer.padding, 0),
        "same": not is_padded and layer.padding == "same",
        "dilation": sizes.read(layer.dilation, 1),
        "groups": layer.groups,
    }


def with_parameters(check: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    """The check of a layer, and of what it holds."""
    return lambda layer: has_parameters(layer) or check(layer)


CHECKS: dict[type[nn.Module], Callable[[Any], str | None]] = {
    **dict.fromkeys(activation.ACTIVATIONS, activation.check),
    nn.PReLU: with_parameters(activation.check),
    nn.Conv1d: check_conv,
    nn.Conv2d: check_conv,
    nn.Linear: has_parameters,
    nn.BatchNorm1d: check_batchnorm,
    nn.BatchNorm2d: check_batchnorm,
    **{kind: with_parameters(layer.check) for kind, layer in map_layers.LAYERS.items()},
    **{kind: with_parameters(row_layer.check) for kind, row_layer in row_layers.LAYERS.items()},
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def holds_weight(layer: nn.Module) -> bool:
    """Whether its weight and bias, where it has them, are the step's own."""
    kind = type(layer)
    return kind in PARAMETERS and kind not in NORMS and kind not in activation.ACTIVATIONS


def check(layers: Layers) -> str | None:
    """The first objection to any of the layers, or None."""
    return next(filter(None, (CHECKS[type(layer)](layer) for layer in layers)), None)


def build(op: str, name: str, layers: Layers) -> dict[str, Any]:
    """The step for the native engine. "layer": what holds weight and bias, or None; "norm": the BatchNorm behind."""
    first = type(layers[0]) if layers else None
    maps = [layer for layer in layers if type(layer) in map_layers.LAYERS]
    op_of = map_layers.LAYERS[type(layers[0])].op_of if maps and layers[0] is maps[0] else None
    norm = next((layer for layer in layers if type(layer) in NORMS), None)
    last = next((layer for layer in layers if type(layer) in activation.ACTIVATIONS), None)
    return {
        "op": op if op_of is None else op_of(layers[0]),
        "name": name,
        **activation.build(last),
        "activation_after_pool": last is not None and bool(maps) and last is layers[-1],
        "dimensions": 2 if first is None else dimensions(first),
        "conv": build_conv(layers[0]) if op == "conv2d" else None,
        "pool": None,
        "needs_batch": first is nn.GroupNorm,
        **(row_layers.LAYERS[first].build(layers[0]) if first in row_layers.LAYERS else {}),
        **{map_layers.LAYERS[type(layer)].key: map_layers.LAYERS[type(layer)].build(layer) for layer in maps},
        "layer": next((layer for layer in layers[:1] if holds_weight(layer)), None),
        "norm": norm,
        "eps": 0.0 if norm is None else float(norm.eps),
    }


def padding_step(native: dict[str, Any]) -> dict[str, Any] | None:
    """The step of its own that pads the map of a convolution as its padding mode says; None where there is none."""
    layer = native["layer"]
    if native["op"] != "conv2d" or layer.padding_mode == "zeros":
        return None
    # Of maps of one row nothing is added above and below.
    padding = (*getattr(layer, REVERSED_PADDING), 0, 0)[:4]
    pad = map_layers.pad_numbers(layer.padding_mode, padding)
    return {**build("pad2d", f"padding_mode {layer.padding_mode!r}", ()), "pad": pad}


def with_zeros_before(native: dict[str, Any], before: dict[str, Any]) -> dict[str, Any] | None:
    """A convolution with the zeros that the step before adds to its map as its own padding; None for other steps."""
    adds_zeros = before["op"] == "pad2d" and before["pad"]["mode"] == "constant" and before["pad"]["value"] == 0
    if not adds_zeros or native["op"] != "conv2d" or padding_step(native):
        return None
    carried: dict[str, Any] = {key: before[key] for key in ("pad", "unflattened") if key in before}
    return {**native, "name": f"{before['name']}_{native['name']}", **carried}


def fused(
    op: str,
    types: Kinds,
    example: Callable[[Kinds], tuple[list[nn.Module], tuple[int, ...]]],
    maps_images: bool = False,
    refuses_to_lead: Callable[[Any], str | None] = lambda _: None,
    **more: Any,
) -> Pattern:
    """The pattern of layers of these types, named after them, as one step `op` of the native engine."""
    name = "_".join(kind.__name__.lower() for kind in types)
    return Pattern(
        name, types, check, partial(build, op, name), partial(example, types), maps_images, refuses_to_lead, **more
    )
