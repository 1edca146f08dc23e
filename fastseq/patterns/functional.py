"""Functional forms of layers: what `F.relu(x)` or `x.flatten(1)` in a module's forward is as a layer.

`layer_of` gives the layer that the patterns know, or None for a call that no layer of the table stands for. The layer
is for matching only: where such a call runs eager, it is the call itself that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def _relu(inplace: Any = False) -> nn.Module:
    return nn.ReLU(inplace)


def _relu_out_of_place() -> nn.Module:
    return nn.ReLU()


def _relu_() -> nn.Module:
    return nn.ReLU(inplace=True)


def _max_pool2d(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: Any = False,
    return_indices: Any = False,
) -> nn.Module:
    return nn.MaxPool2d(kernel_size, stride, padding, dilation, return_indices, ceil_mode)


def _max_pool2d_of_torch(
    kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: Any = False
) -> nn.Module:
    return nn.MaxPool2d(kernel_size, None if stride == () else stride, padding, dilation, ceil_mode=ceil_mode)


def _flatten(start_dim: Any = 0, end_dim: Any = -1) -> nn.Module:
    return nn.Flatten(start_dim, end_dim)


def _dropout(p: Any = 0.5, training: Any = True, inplace: Any = False) -> nn.Module | None:
    return nn.Dropout(p, inplace).eval() if training is False else None


def _dropout_of_torch(p: Any, train: Any) -> nn.Module | None:
    return _dropout(p, train)


Builder = Callable[..., nn.Module | None]

# By function, or by name for methods of torch.Tensor. Builders take the call's arguments without the tensor, by the
# function's own names and defaults.
FUNCTIONS: dict[Any, Builder] = {
    F.relu: _relu,
    torch.relu: _relu_out_of_place,
    torch.relu_: _relu_,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d_of_torch,
    torch.flatten: _flatten,
    F.dropout: _dropout,
    torch.dropout: _dropout_of_torch,
}
METHODS: dict[str, Builder] = {"relu": _relu_out_of_place, "relu_": _relu_, "flatten": _flatten}


def layer_of(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module | None:
    """target: a function, or the name of a method; args, kwargs: constants, the tensor left out."""
    builder = METHODS.get(target) if isinstance(target, str) else FUNCTIONS.get(target)
    if builder is None:
        return None
    try:
        return builder(*args, **kwargs)
    except (TypeError, ValueError):  # arguments that the function itself may take, or raise for when it runs
        return None
