"""Functional forms of layers: what `F.relu(x)` or `x.flatten(1)` is as a layer, traced in a forward or by dynamo.

One table says it for both. The layer is for matching: where such a call runs eager, it is the call itself that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastseq.patterns.base import PARAMETERS


class UnknownCall(Exception):
    """The call is none of the layers that the patterns know."""


REQUIRED = object()


@dataclass(frozen=True)
class Signature:
    """A function of torch as a layer. `arguments`: those behind the input with their defaults; `make` takes them."""

    make: Callable[..., nn.Module]
    arguments: dict[str, Any]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, without the input."""
        names = ("input", *self.arguments)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        values = {"input": REQUIRED, **self.arguments, **given}
        is_complete = len(given) == len(args) + len(kwargs) and REQUIRED not in values.values()
        if not is_complete or len(values) != len(names):
            raise UnknownCall
        del values["input"]
        return values


def as_layers_have_it(value: Any) -> Any:
    """Sizes as the layers hold them, tuples for lists. What only a call knows, a node, stays one and is declined."""
    return tuple(value) if isinstance(value, list | tuple) else value


def without_parameters(kind: type[nn.Module], **attributes: Any) -> nn.Module:
    """A layer with all that its forward and the matcher read but the parameters, which its constructor would make."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.__dict__.update(attributes)
    layer._parameters.update(dict.fromkeys(PARAMETERS.get(kind, ())))
    return layer


def conv(
    kind: type[nn.Module], weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> nn.Module:
    sizes = {"stride": stride, "padding": padding, "dilation": dilation}
    sizes = {name: as_layers_have_it(size) for name, size in sizes.items()}
    return without_parameters(kind, **sizes, groups=groups, padding_mode="zeros")


def linear(weight: Any, bias: Any) -> nn.Module:
    return without_parameters(nn.Linear)


def activation(kind: type[nn.Module], **attributes: Any) -> nn.Module:
    if type(attributes.get("inplace", False)) is not bool:
        raise UnknownCall
    return without_parameters(kind, **attributes)


def act(kind: type[nn.Module], fixed: dict[str, Any] | None = None, **arguments: Any) -> Signature:
    """The signature of an activation function; `fixed`: attributes of the layer that are no arguments."""
    return Signature(partial(activation, kind, **(fixed or {})), arguments)


def softmax(kind: type[nn.Module], dim: Any, dtype: Any, _stacklevel: Any = 3) -> nn.Module:
    if dtype is not None:
        raise UnknownCall
    return without_parameters(kind, dim=dim)


def layer_norm(normalized_shape: Any, weight: Any, bias: Any, eps: Any, cudnn_enable: Any = True) -> nn.Module:
    return without_parameters(nn.LayerNorm, normalized_shape=as_layers_have_it(normalized_shape), eps=eps)


def group_norm(num_groups: Any, weight: Any, bias: Any, eps: Any, cudnn_enabled: Any = True) -> nn.Module:
    return without_parameters(nn.GroupNorm, num_groups=num_groups, eps=eps)


def max_pool(
    kind: type[nn.MaxPool1d] | type[nn.MaxPool2d],
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: Any,
    return_indices: Any = False,
) -> nn.Module:
    sizes = map(as_layers_have_it, (kernel_size, stride, padding, dilation))
    kernel_size, stride, padding, dilation = sizes
    return kind(kernel_size, None if stride == () else stride, padding, dilation, return_indices, ceil_mode)


def avg_pool2d(
    kernel_size: Any, stride: Any, padding: Any, ceil_mode: Any, count_include_pad: Any, divisor_override: Any
) -> nn.Module:
    kernel_size, stride, padding = map(as_layers_have_it, (kernel_size, stride, padding))
    stride = None if stride == () else stride
    return nn.AvgPool2d(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def avg_pool1d(kernel_size: Any, stride: Any, padding: Any, ceil_mode: Any, count_include_pad: Any) -> nn.Module:
    sizes = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    sizes = {name: as_layers_have_it(size) for name, size in sizes.items()}
    if sizes["stride"] == ():
        sizes["stride"] = None
    return without_parameters(nn.AvgPool1d, **sizes, ceil_mode=ceil_mode, count_include_pad=count_include_pad)


def adaptive_pool(kind: type[nn.Module], output_size: Any, return_indices: Any = False) -> nn.Module:
    return without_parameters(kind, output_size=as_layers_have_it(output_size), return_indices=return_indices)


PADDINGS = {"reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d, "circular": nn.CircularPad2d}


def pad(pad: Any, mode: Any, value: Any) -> nn.Module:
    padding = as_layers_have_it(pad)
    # Two numbers are of rows alone, and more are of channels too.
    if type(padding) is not tuple or len(padding) != 4 or type(mode) is not str:
        raise UnknownCall
    if mode == "constant":
        return without_parameters(nn.ConstantPad2d, padding=padding, value=0.0 if value is None else value)
    if mode not in PADDINGS or value not in (None, 0):
        raise UnknownCall
    return without_parameters(PADDINGS[mode], padding=padding)


def interpolate(
    size: Any, scale_factor: Any, mode: Any, align_corners: Any, recompute_scale_factor: Any, antialias: Any
) -> nn.Module:
    if antialias is not False or type(mode) is not str:
        raise UnknownCall
    # A layer has its factors as floats; those of a call are numbers, or the list or tuple of them.
    factors = as_layers_have_it(scale_factor)
    if type(factors) is tuple and all(type(factor) in (int, float) for factor in factors):
        factors = tuple(map(float, factors))
    elif type(factors) in (int, float):
        factors = float(factors)
    return without_parameters(
        nn.Upsample,
        size=as_layers_have_it(size),
        scale_factor=factors,
        mode=mode,
        align_corners=align_corners,
        recompute_scale_factor=recompute_scale_factor,
    )


def pixel_shuffle(upscale_factor: Any) -> nn.Module:
    return without_parameters(nn.PixelShuffle, upscale_factor=upscale_factor)


def pixel_unshuffle(downscale_factor: Any) -> nn.Module:
    return without_parameters(nn.PixelUnshuffle, downscale_factor=downscale_factor)


def unflatten(dim: Any, sizes: Any) -> nn.Module:
    return without_parameters(nn.Unflatten, dim=dim, unflattened_size=as_layers_have_it(sizes))


def dropout(p: Any, training: Any, inplace: Any) -> nn.Module:
    # Eager rejects some values of p, and a node of a graph may be any.
    if training is not False or type(p) not in (int, float) or not 0 <= p <= 1:
        raise UnknownCall
    return nn.Dropout(p).eval()


PARAMETERS_OF_CALL = {"weight": REQUIRED, "bias": None}
CONV = {**PARAMETERS_OF_CALL, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
CONV1D, CONV2D = Signature(partial(conv, nn.Conv1d), CONV), Signature(partial(conv, nn.Conv2d), CONV)
LINEAR = Signature(linear, PARAMETERS_OF_CALL)
RELU = act(nn.ReLU, {"inplace": False})
RELU_IN_PLACE = act(nn.ReLU, {"inplace": True})
SIGMOID, TANH = act(nn.Sigmoid), act(nn.Tanh)
POOL = {"kernel_size": REQUIRED, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
AVERAGE = {
    "kernel_size": REQUIRED,
    "stride": None,
    "padding": 0,
    "ceil_mode": False,
    "count_include_pad": True,
}
SOFTMAX, LOG_SOFTMAX = (
    Signature(partial(softmax, kind), {"dim": REQUIRED, "dtype": None}) for kind in (nn.Softmax, nn.LogSoftmax)
)
F_SOFTMAX = {"dim": None, "_stacklevel": 3, "dtype": None}
NORM = {"weight": None, "bias": None, "eps": 1e-5}
ADAPTIVE_MAX = {"output_size": REQUIRED, "return_indices": False}
PAD = Signature(pad, {"pad": REQUIRED, "mode": "constant", "value": None})
INTERPOLATE = {
    "size": None,
    "scale_factor": None,
    "mode": "nearest",
    "align_corners": None,
    "recompute_scale_factor": None,
    "antialias": False,
}
FLATTEN = Signature(nn.Flatten, {"start_dim": 0, "end_dim": -1})
UNFLATTEN = Signature(unflatten, {"dim": REQUIRED, "sizes": REQUIRED})
FUNCTIONS: dict[Any, Signature] = {
    F.conv1d: CONV1D,
    torch.conv1d: CONV1D,
    F.conv2d: CONV2D,
    torch.conv2d: CONV2D,
    F.linear: LINEAR,
    torch._C._nn.linear: LINEAR,
    F.relu: act(nn.ReLU, inplace=False),
    F.relu_: RELU_IN_PLACE,
    torch.relu: RELU,
    torch.relu_: RELU_IN_PLACE,
    F.relu6: act(nn.ReLU6, {"min_val": 0.0, "max_val": 6.0}, inplace=False),
    F.leaky_relu: act(nn.LeakyReLU, negative_slope=0.01, inplace=False),
    F.elu: act(nn.ELU, alpha=1.0, inplace=False),
    F.selu: act(nn.SELU, inplace=False),
    F.celu: act(nn.CELU, alpha=1.0, inplace=False),
    F.hardtanh: act(nn.Hardtanh, min_val=-1.0, max_val=1.0, inplace=False),
    F.hardswish: act(nn.Hardswish, inplace=False),
    F.hardsigmoid: act(nn.Hardsigmoid, inplace=False),
    torch.sigmoid: SIGMOID,
    F.sigmoid: SIGMOID,
    torch.tanh: TANH,
    F.tanh: TANH,
    F.silu: act(nn.SiLU, inplace=False),
    F.gelu: act(nn.GELU, approximate="none"),
    F.softplus: act(nn.Softplus, beta=1.0, threshold=20.0),
    F.mish: act(nn.Mish, inplace=False),
    F.softmax: Signature(partial(softmax, nn.Softmax), F_SOFTMAX),
    torch.softmax: SOFTMAX,
    F.log_softmax: Signature(partial(softmax, nn.LogSoftmax), F_SOFTMAX),
    torch.log_softmax: LOG_SOFTMAX,
    F.layer_norm: Signature(layer_norm, {"normalized_shape": REQUIRED, **NORM}),
    torch.layer_norm: Signature(layer_norm, {"normalized_shape": REQUIRED, **NORM, "cudnn_enable": True}),
    F.group_norm: Signature(group_norm, {"num_groups": REQUIRED, **NORM}),
    torch.group_norm: Signature(group_norm, {"num_groups": REQUIRED, **NORM, "cudnn_enabled": True}),
    F.max_pool1d: Signature(partial(max_pool, nn.MaxPool1d), {**POOL, "return_indices": False}),
    torch.max_pool1d: Signature(partial(max_pool, nn.MaxPool1d), POOL),
    F.max_pool2d: Signature(partial(max_pool, nn.MaxPool2d), {**POOL, "return_indices": False}),
    torch.max_pool2d: Signature(partial(max_pool, nn.MaxPool2d), POOL),
    F.avg_pool1d: Signature(avg_pool1d, AVERAGE),
    F.avg_pool2d: Signature(avg_pool2d, {**AVERAGE, "divisor_override": None}),
    F.adaptive_avg_pool1d: Signature(partial(adaptive_pool, nn.AdaptiveAvgPool1d), {"output_size": REQUIRED}),
    F.adaptive_avg_pool2d: Signature(partial(adaptive_pool, nn.AdaptiveAvgPool2d), {"output_size": REQUIRED}),
    F.adaptive_max_pool1d: Signature(partial(adaptive_pool, nn.AdaptiveMaxPool1d), ADAPTIVE_MAX),
    F.adaptive_max_pool2d: Signature(partial(adaptive_pool, nn.AdaptiveMaxPool2d), ADAPTIVE_MAX),
    F.pad: PAD,
    torch._C._nn.pad: PAD,
    F.interpolate: Signature(interpolate, INTERPOLATE),
    torch.pixel_shuffle: Signature(pixel_shuffle, {"upscale_factor": REQUIRED}),
    torch.pixel_unshuffle: Signature(pixel_unshuffle, {"downscale_factor": REQUIRED}),
    torch.flatten: FLATTEN,
    torch.unflatten: UNFLATTEN,
    F.dropout: Signature(dropout, {"p": 0.5, "training": True, "inplace": False}),
}
METHODS: dict[Any, Signature] = {
    "relu": RELU,
    "relu_": RELU_IN_PLACE,
    "sigmoid": SIGMOID,
    "tanh": TANH,
    "softmax": SOFTMAX,
    "log_softmax": LOG_SOFTMAX,
    "flatten": FLATTEN,
    "unflatten": UNFLATTEN,
}
TORCHS_METHODS = {name: getattr(torch.Tensor, name) for name in METHODS}  # as nobody has replaced them


def read_call(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]] | None:
    """A call as a layer, and its arguments by name; None if no layer of the table stands for it.

    target: a function, or the name of a method; args, kwargs: as it is called, the tensor among them.
    """
    signature = (METHODS if isinstance(target, str) else FUNCTIONS).get(target)
    if signature is None or (isinstance(target, str) and getattr(torch.Tensor, target) is not TORCHS_METHODS[target]):
        return None
    try:
        arguments = signature.bind(args, kwargs)
        return signature.make(**arguments), arguments
    except UnknownCall:
        return None
