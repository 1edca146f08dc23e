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


def conv2d(weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any) -> nn.Module:
    sizes = {"stride": stride, "padding": padding, "dilation": dilation}
    sizes = {name: as_layers_have_it(size) for name, size in sizes.items()}
    return without_parameters(nn.Conv2d, **sizes, groups=groups, padding_mode="zeros")


def linear(weight: Any, bias: Any) -> nn.Module:
    return without_parameters(nn.Linear)


def activation(kind: type[nn.Module], **attributes: Any) -> nn.Module:
    if type(attributes.get("inplace", False)) is not bool:
        raise UnknownCall
    return without_parameters(kind, **attributes)


def act(kind: type[nn.Module], fixed: dict[str, Any] | None = None, **arguments: Any) -> Signature:
    """The signature of an activation function; `fixed`: attributes of the layer that are no arguments."""
    return Signature(partial(activation, kind, **(fixed or {})), arguments)


def max_pool2d(
    kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any, return_indices: Any = False
) -> nn.Module:
    sizes = map(as_layers_have_it, (kernel_size, stride, padding, dilation))
    kernel_size, stride, padding, dilation = sizes
    return nn.MaxPool2d(kernel_size, None if stride == () else stride, padding, dilation, return_indices, ceil_mode)


def dropout(p: Any, training: Any, inplace: Any) -> nn.Module:
    # Eager rejects some values of p, and a node of a graph may be any.
    if training is not False or type(p) not in (int, float) or not 0 <= p <= 1:
        raise UnknownCall
    return nn.Dropout(p).eval()


PARAMETERS_OF_CALL = {"weight": REQUIRED, "bias": None}
CONV2D = Signature(conv2d, {**PARAMETERS_OF_CALL, "stride": 1, "padding": 0, "dilation": 1, "groups": 1})
LINEAR = Signature(linear, PARAMETERS_OF_CALL)
RELU = act(nn.ReLU, {"inplace": False})
RELU_IN_PLACE = act(nn.ReLU, {"inplace": True})
SIGMOID, TANH = act(nn.Sigmoid), act(nn.Tanh)
POOL = {"kernel_size": REQUIRED, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
FLATTEN = Signature(nn.Flatten, {"start_dim": 0, "end_dim": -1})
FUNCTIONS: dict[Any, Signature] = {
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
    F.max_pool2d: Signature(max_pool2d, {**POOL, "return_indices": False}),
    torch.max_pool2d: Signature(max_pool2d, POOL),
    torch.flatten: FLATTEN,
    F.dropout: Signature(dropout, {"p": 0.5, "training": True, "inplace": False}),
}
METHODS: dict[Any, Signature] = {
    "relu": RELU,
    "relu_": RELU_IN_PLACE,
    "sigmoid": SIGMOID,
    "tanh": TANH,
    "flatten": FLATTEN,
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
