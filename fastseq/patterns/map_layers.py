"""Layers from images to images that are steps of their own: all that the matcher has to know of each.

A new one is an entry in `LAYERS`, and an operation of the native engine (csrc/plan/maps.h).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fastseq.patterns.arguments import (
    LARGEST,
    ONE,
    TWO,
    Sizes,
    build_window,
    one,
    refuse_eps,
    refuse_indices,
    refuse_non_bools,
    refuse_sizes,
)


@dataclass(frozen=True)
class MapLayer:
    """`attributes`: what its forward reads from its `__dict__`; `functions`: what it looks up in torch.nn.functional.

    `check(layer)` returns why it is declined, or None; `build(layer)` its numbers for the native engine, under the key
    `key` of a step; `example()` a layer that matches, for maps of (3, 9, 8) or (3, 9). `refuses_to_lead(layer)`: why it
    does not begin a native run, or None. `needs_company`: not worth a run by itself; `takes_activation`: in the same
    step. `dimensions`: of its maps, beside batch and channels, 0 for any.
    """

    attributes: tuple[str, ...]
    functions: tuple[str, ...]
    check: Callable[[Any], str | None]
    key: str
    build: Callable[[Any], Any]
    example: Callable[[], nn.Module]
    refuses_to_lead: Callable[[Any], str | None] = lambda _: None
    dimensions: int = 2
    needs_company: bool = False
    takes_activation: bool = True
    op: str = ""  # of the engine, where it is not the layer's name
    op_of: Callable[[Any], str] | None = None  # where it depends on the layer's attributes


def sizes_of(layer: nn.Module) -> Sizes:
    return ONE if LAYERS[type(layer)].dimensions == 1 else TWO


def divisor_of(layer: nn.AvgPool1d | nn.AvgPool2d) -> Any:
    return layer.divisor_override if isinstance(layer, nn.AvgPool2d) else None


def check_average(layer: nn.AvgPool1d | nn.AvgPool2d) -> str | None:
    divisor = divisor_of(layer)
    if divisor is not None and (type(divisor) is not int or not 0 < abs(divisor) <= LARGEST):
        return f"AvgPool2d has divisor_override {divisor!r}; fused kernels take None or an int other than 0"
    return refuse_sizes(layer, sizes_of(layer), "kernel_size", "stride", "padding") or refuse_non_bools(
        layer, "ceil_mode", "count_include_pad"
    )


def build_average(layer: nn.AvgPool1d | nn.AvgPool2d) -> dict[str, Any]:
    return {
        **build_window(layer, sizes_of(layer)),
        "counts_padding": layer.count_include_pad,
        "divisor": divisor_of(layer) or 0,
    }


def output_size(layer: Any) -> tuple[int, int] | None:
    """Of an adaptive pool, 0 for the size of the input; None for what eager may accept or reject."""
    size = layer.output_size
    if sizes_of(layer) is ONE:
        length = one(size)
        return (1, length) if length is not None and length > 0 else None
    sizes = (size, size) if type(size) is int else size
    if type(sizes) is not tuple or len(sizes) != 2:
        return None
    known = all(s is None or (type(s) is int and 0 < s <= LARGEST) for s in sizes)
    return (sizes[0] or 0, sizes[1] or 0) if known else None


def check_adaptive(layer: Any) -> str | None:
    if output_size(layer) is None:
        words = "a positive int" if sizes_of(layer) is ONE else "a positive int, or two that may be None"
        return f"{type(layer).__name__} has output_size {layer.output_size!r}; fused kernels take {words}"
    return None


def refuses_to_lead_global(layer: nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d) -> str | None:
    # Eager then takes the mean of planes as they lie, at the speed of memory.
    if output_size(layer) == (1, 1):
        return f"{type(layer).__name__} to one pixel begins no fused run: eager is as fast"
    return None


def check_adaptive_max(layer: nn.AdaptiveMaxPool1d | nn.AdaptiveMaxPool2d) -> str | None:
    return refuse_indices(layer) or check_adaptive(layer)


def build_adaptive(layer: Any) -> dict[str, Any]:
    return {"output_size": output_size(layer)}


def check_max(layer: nn.MaxPool1d | nn.MaxPool2d) -> str | None:
    return (
        refuse_indices(layer)
        or refuse_non_bools(layer, "ceil_mode")
        or refuse_sizes(layer, sizes_of(layer), "kernel_size", "stride", "padding", "dilation")
    )


def build_max(layer: nn.MaxPool1d | nn.MaxPool2d) -> dict[str, Any]:
    sizes = sizes_of(layer)
    return {**build_window(layer, sizes), "dilation": sizes.read(layer.dilation, 1)}


def check_group_norm(layer: nn.GroupNorm) -> str | None:
    if type(layer.num_groups) is not int or not 0 < layer.num_groups <= LARGEST:
        return f"GroupNorm has num_groups {layer.num_groups!r}; fused kernels take a positive int"
    return refuse_eps(layer)


def build_group_norm(layer: nn.GroupNorm) -> dict[str, Any]:
    return {"groups": layer.num_groups, "eps": float(layer.eps)}


LARGEST_FLOAT = (2 - 2**-23) * 2.0**127
PAD_MODES = ("reflect", "replicate", "circular")  # beside constant values


def is_padding(padding: Any, count: int) -> bool:
    """Whether it is so many ints from 0 on."""
    is_sequence = type(padding) in (tuple, list) and len(padding) == count
    return is_sequence and all(type(p) is int and 0 <= p <= LARGEST for p in padding)


def pad_numbers(mode: str, padding: tuple[int, ...], value: float = 0.0) -> dict[str, Any]:
    return {"mode": mode, "padding": padding, "value": value}


def check_padding(layer: Any) -> str | None:
    name, padding = type(layer).__name__, layer.padding
    # Eager returns a clone where nothing is added, and a view of one where something is cut off.
    if type(padding) is not tuple or not is_padding(padding, 4) or not any(padding):
        return f"{name} has padding {padding!r}; fused kernels take four ints from 0 on, not all of them 0"
    value = getattr(layer, "value", 0.0)
    if type(value) not in (int, float) or (math.isfinite(value) and abs(value) > LARGEST_FLOAT):
        return f"{name} has value {value!r}; fused kernels take a float32 number"
    return None


def padding_layer(mode: str, example: Callable[[], nn.Module], *attributes: str) -> MapLayer:
    def build(layer: Any) -> dict[str, Any]:
        return pad_numbers(mode, layer.padding, float(getattr(layer, "value", 0.0)))

    # By itself it only copies, and does so twice where images have to become pixels first.
    return MapLayer(
        ("padding", *attributes),
        ("pad",),
        check_padding,
        "pad",
        build,
        example,
        needs_company=True,
        takes_activation=False,
        op="pad2d",
    )


def sizes_or_factors(layer: nn.Upsample) -> tuple[tuple[int, int], tuple[float, float]] | None:
    """Of both dimensions, zeros for those that are not given; None for what eager rejects, or reads in another way."""
    if (layer.size is None) == (layer.scale_factor is None):
        return None
    given: Any = layer.scale_factor if layer.size is None else layer.size
    values = tuple(given) if isinstance(given, tuple) else (given, given)  # a torch.Size, too
    kind = float if layer.size is None else int
    if len(values) != 2 or not all(type(value) is kind and 0 < value <= LARGEST for value in values):
        return None
    return ((0, 0), values) if kind is float else (values, (0.0, 0.0))


def check_upsample(layer: nn.Upsample) -> str | None:
    name = type(layer).__name__
    if layer.mode not in ("nearest", "bilinear"):
        return f"{name} has mode {layer.mode!r}; fused kernels take 'nearest' and 'bilinear'"
    if layer.align_corners is not None and (layer.mode == "nearest" or type(layer.align_corners) is not bool):
        return f"{name} has align_corners {layer.align_corners!r} in mode {layer.mode!r}, which eager rejects"
    if layer.recompute_scale_factor not in (None, False) and (
        layer.recompute_scale_factor is not True or layer.size is not None
    ):
        return f"{name} has recompute_scale_factor {layer.recompute_scale_factor!r}, which eager rejects with a size"
    if sizes_or_factors(layer) is None:
        found = f"size {layer.size!r} and scale_factor {layer.scale_factor!r}"
        return f"{name} has {found}; fused kernels take one of them, a positive int or float, or two in a tuple"
    return None


def build_upsample(layer: nn.Upsample) -> dict[str, Any]:
    numbers = sizes_or_factors(layer)
    assert numbers is not None
    return {
        "size": numbers[0],
        "factors": numbers[1],
        "recomputes_factors": bool(layer.recompute_scale_factor),
        "aligns_corners": bool(layer.align_corners),
    }


def check_shuffle(attribute: str) -> Callable[[Any], str | None]:
    def check(layer: Any) -> str | None:
        factor = getattr(layer, attribute)
        if type(factor) is not int or not 0 < factor <= LARGEST:
            return f"{type(layer).__name__} has {attribute} {factor!r}; fused kernels take a positive int"
        return None

    return check


def shuffling_layer(attribute: str, function: str, example: Callable[[], nn.Module]) -> MapLayer:
    def build(layer: Any) -> int:
        return int(getattr(layer, attribute))

    return MapLayer(
        (attribute,),
        (function,),
        check_shuffle(attribute),
        "factor",
        build,
        example,
        needs_company=True,
        takes_activation=False,
    )


def upsampling_layer(example: Callable[[], nn.Upsample]) -> MapLayer:
    return MapLayer(
        ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor"),
        ("interpolate",),
        check_upsample,
        "resize",
        build_upsample,
        example,
        needs_company=True,
        takes_activation=False,
        op_of=lambda layer: f"upsample{layer.mode}2d",
    )


LAYERS: dict[type[nn.Module], MapLayer] = {
    nn.MaxPool2d: MapLayer(
        ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
        ("max_pool2d",),
        check_max,
        "pool",
        build_max,
        lambda: nn.MaxPool2d(3, 2, 1),
    ),
    nn.AvgPool2d: MapLayer(
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
        ("avg_pool2d",),
        check_average,
        "pool",
        build_average,
        lambda: nn.AvgPool2d(3, 2, 1),
    ),
    nn.AdaptiveMaxPool2d: MapLayer(
        ("output_size", "return_indices"),
        ("adaptive_max_pool2d",),
        check_adaptive_max,
        "pool",
        build_adaptive,
        lambda: nn.AdaptiveMaxPool2d((2, 3)),
    ),
    nn.AdaptiveAvgPool2d: MapLayer(
        ("output_size",),
        ("adaptive_avg_pool2d",),
        check_adaptive,
        "pool",
        build_adaptive,
        lambda: nn.AdaptiveAvgPool2d((2, 3)),
        refuses_to_lead_global,
    ),
    nn.GroupNorm: MapLayer(
        ("num_groups", "eps"),
        ("group_norm",),
        check_group_norm,
        "moments",
        build_group_norm,
        lambda: nn.GroupNorm(3, 3),
        dimensions=0,
        needs_company=True,
    ),
    nn.ZeroPad2d: padding_layer("constant", lambda: nn.ZeroPad2d((1, 2, 0, 1)), "value"),
    nn.ConstantPad2d: padding_layer("constant", lambda: nn.ConstantPad2d((1, 2, 0, 1), 0.5), "value"),
    nn.ReflectionPad2d: padding_layer("reflect", lambda: nn.ReflectionPad2d((1, 2, 0, 1))),
    nn.ReplicationPad2d: padding_layer("replicate", lambda: nn.ReplicationPad2d((1, 2, 0, 1))),
    nn.CircularPad2d: padding_layer("circular", lambda: nn.CircularPad2d((1, 2, 0, 1))),
    nn.Upsample: upsampling_layer(lambda: nn.Upsample(scale_factor=(1.5, 2), mode="bilinear")),
    nn.UpsamplingNearest2d: upsampling_layer(lambda: nn.UpsamplingNearest2d(scale_factor=2)),
    nn.UpsamplingBilinear2d: upsampling_layer(lambda: nn.UpsamplingBilinear2d((5, 11))),
    nn.PixelShuffle: shuffling_layer("upscale_factor", "pixel_shuffle", lambda: nn.PixelShuffle(1)),
    nn.PixelUnshuffle: shuffling_layer("downscale_factor", "pixel_unshuffle", lambda: nn.PixelUnshuffle(1)),
}
for _one, _two, _function, _example in (
    (nn.MaxPool1d, nn.MaxPool2d, "max_pool1d", lambda: nn.MaxPool1d(3, 2, 1)),
    (nn.AvgPool1d, nn.AvgPool2d, "avg_pool1d", lambda: nn.AvgPool1d(3, 2, 1)),
    (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, "adaptive_max_pool1d", lambda: nn.AdaptiveMaxPool1d(2)),
    (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, "adaptive_avg_pool1d", lambda: nn.AdaptiveAvgPool1d(2)),
):
    LAYERS[_one] = replace(
        LAYERS[_two],
        attributes=tuple(name for name in LAYERS[_two].attributes if name != "divisor_override"),
        functions=(_function,),
        example=_example,
        dimensions=1,
        op=_two.__name__.lower(),
    )
FUNCTIONAL = tuple(dict.fromkeys(name for layer in LAYERS.values() for name in layer.functions))
