"""Epilogues of the CUDA kernels through ctypes: Finish of kernels.h, and what it should do, in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# In the order of kernels/activation.h; what torch calls each, given its numbers.
ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "none": lambda x, a, b: x,
    "relu": lambda x, a, b: torch.relu(x),
    "leaky_relu": lambda x, a, b: F.leaky_relu(x, a),
    "prelu": lambda x, a, b: x,  # see Epilogue.activate
    "elu": lambda x, a, b: F.elu(x, a),
    "selu": lambda x, a, b: F.selu(x),
    "celu": lambda x, a, b: F.celu(x, a),
    "hardtanh": lambda x, a, b: F.hardtanh(x, a, b),
    "hardswish": lambda x, a, b: F.hardswish(x),
    "hardsigmoid": lambda x, a, b: F.hardsigmoid(x),
    "sigmoid": lambda x, a, b: torch.sigmoid(x),
    "tanh": lambda x, a, b: torch.tanh(x),
    "silu": lambda x, a, b: F.silu(x),
    "gelu": lambda x, a, b: F.gelu(x),
    "gelu_tanh": lambda x, a, b: F.gelu(x, approximate="tanh"),
    "softplus": lambda x, a, b: F.softplus(x, a, b),
    "mish": lambda x, a, b: F.mish(x),
}
# The numbers of those that take some.
NUMBERS = {
    "leaky_relu": (0.25, 0.0),
    "elu": (1.5, 0.0),
    "celu": (0.75, 0.0),
    "hardtanh": (-2.5, 3.0),
    "softplus": (0.5, 20.0),
}


class Finish(ctypes.Structure):
    _fields_ = [
        ("is_used", ctypes.c_int),
        ("has_norm", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("gain", "shift", "mean", "variance")),
        ("eps", ctypes.c_float),
        ("kind", ctypes.c_int),
        ("a", ctypes.c_float),
        ("b", ctypes.c_float),
        ("slopes", ctypes.c_void_p),
        ("slope_step", ctypes.c_int),
        ("is_after_pool", ctypes.c_int),
    ]


@dataclass(frozen=True)
class Epilogue:
    """Of `channels`; tensors in float64, but exact in the kernel's elements."""

    kind: str = "none"
    a: float = 0.0
    b: float = 0.0
    mean: Tensor | None = None
    variance: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    slopes: Tensor | None = None
    eps: float = 0.0

    @staticmethod
    def make(
        channels: int, kind: str = "none", has_norm: bool = True, is_affine: bool = True, seed: int = 0
    ) -> Epilogue:
        """Scales are powers of two and the rest small integers: exact in every kind of arithmetic, if the kind is."""
        generator = torch.Generator().manual_seed(seed)

        def chosen(*values: float) -> Tensor:
            return torch.tensor(values).double()[torch.randint(len(values), (channels,), generator=generator)]

        norm: dict[str, Any] = {}
        if has_norm:
            norm = {"mean": chosen(-3, 0, 1, 2), "variance": chosen(0.5, 3.5, 15.5), "eps": 0.5}
            if is_affine:
                norm |= {"gain": chosen(-2, -1, 1, 4, 0), "shift": chosen(-2, 0, 1, 5)}
        slopes = chosen(0.25, -0.5, 1, 0) if kind == "prelu" else None
        a, b = NUMBERS.get(kind, (0.0, 0.0))
        return Epilogue(kind, a, b, slopes=slopes, **norm)

    @property
    def is_used(self) -> bool:
        return self.mean is not None or self.kind not in ("none", "relu")

    def norm(self, x: Tensor) -> Tensor:
        """`x` (rows, channels, ...), the bias added."""
        if self.mean is None:
            return x
        return F.batch_norm(x, self.mean, self.variance, self.gain, self.shift, eps=self.eps)

    def activate(self, x: Tensor) -> Tensor:
        if self.slopes is not None:
            return F.prelu(x, self.slopes)
        return ACTIVATIONS[self.kind](x, self.a, self.b)

    def struct(self, place: Callable[[Tensor], int], is_after_pool: bool = False) -> Finish:
        """`place`: puts a tensor where the kernel finds it, and tells the address."""
        tensors = {name: getattr(self, name) for name in ("gain", "shift", "mean", "variance", "slopes")}
        return Finish(
            is_used=self.is_used,
            has_norm=self.mean is not None,
            eps=self.eps,
            kind=list(ACTIVATIONS).index(self.kind),
            a=self.a,
            b=self.b,
            slope_step=self.slopes is not None and len(self.slopes) > 1,
            is_after_pool=is_after_pool,
            **{name: place(tensor) for name, tensor in tensors.items() if tensor is not None},
        )
