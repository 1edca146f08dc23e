"""The activation functions that a step may end with, as the native engine knows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

# The engine's name of the function and its two numbers, or why the layer is declined.
Reading = tuple[str, float, float] | str


def numbers(name: str, *attributes: str) -> Callable[[Any], Reading]:
    """Reads the named attributes, which eager takes as numbers."""

    def read(layer: Any) -> Reading:
        values = [getattr(layer, attribute) for attribute in attributes]
        for attribute, value in zip(attributes, values, strict=True):
            if type(value) not in (int, float):
                return f"{type(layer).__name__} has {attribute} {value!r}; fused kernels take a number"
        a, b = (*map(float, values), 0.0, 0.0)[:2]
        return name, a, b

    return read


def hardtanh(layer: nn.Hardtanh) -> Reading:
    reading = numbers("hardtanh", "min_val", "max_val")(layer)
    if type(reading) is tuple and not reading[1] <= reading[2]:
        return f"{type(layer).__name__} has min_val {layer.min_val} and max_val {layer.max_val}, which eager rejects"
    return reading


def gelu(layer: nn.GELU) -> Reading:
    names = {"none": "gelu", "tanh": "gelu_tanh"}
    if layer.approximate not in names:
        return f"GELU has approximate {layer.approximate!r}; fused kernels take 'none' and 'tanh'"
    return names[layer.approximate], 0.0, 0.0


READERS: dict[type[nn.Module], Callable[[Any], Reading]] = {
    nn.ReLU: numbers("relu"),
    nn.ReLU6: hardtanh,
    nn.LeakyReLU: numbers("leaky_relu", "negative_slope"),
    nn.PReLU: numbers("prelu"),
    nn.ELU: numbers("elu", "alpha"),
    nn.SELU: numbers("selu"),
    nn.CELU: numbers("celu", "alpha"),
    nn.Hardtanh: hardtanh,
    nn.Hardswish: numbers("hardswish"),
    nn.Hardsigmoid: numbers("hardsigmoid"),
    nn.Sigmoid: numbers("sigmoid"),
    nn.Tanh: numbers("tanh"),
    nn.SiLU: numbers("silu"),
    nn.GELU: gelu,
    nn.Softplus: numbers("softplus", "beta", "threshold"),
    nn.Mish: numbers("mish"),
}
ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(READERS)
# What their forwards read from the layer's __dict__.
ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys(ACTIVATIONS, ("inplace",)),
    **dict.fromkeys((nn.ReLU6, nn.Hardtanh), ("min_val", "max_val", "inplace")),
    nn.LeakyReLU: ("negative_slope", "inplace"),
    **dict.fromkeys((nn.ELU, nn.CELU), ("alpha", "inplace")),
    nn.GELU: ("approximate",),
    nn.Softplus: ("beta", "threshold"),
    **dict.fromkeys((nn.PReLU, nn.Sigmoid, nn.Tanh), ()),
}
# What those look up by name: functions of torch.nn.functional and of torch.
FUNCTIONAL = (
    "relu", "hardtanh", "leaky_relu", "prelu", "elu", "selu", "celu", "hardswish", "hardsigmoid", "silu", "gelu",
    "softplus", "mish",
)  # fmt: skip
TORCH = ("relu", "relu_", "sigmoid", "tanh")


def check(layer: nn.Module) -> str | None:
    """Why the layer is declined, or None."""
    reading = READERS[type(layer)](layer)
    return reading if isinstance(reading, str) else None


def build(layer: nn.Module | None) -> dict[str, Any]:
    """The activation in the words of the native engine. "slopes": the PReLU that holds them, or None."""
    reading = ("none", 0.0, 0.0) if layer is None else READERS[type(layer)](layer)
    assert isinstance(reading, tuple)
    return {
        "activation": reading[0],
        "a": reading[1],
        "b": reading[2],
        # Out of place it gives its result new strides where two memory formats coincide; in place it cannot.
        "activation_in_place": bool(getattr(layer, "inplace", False)),
        "slopes": layer if isinstance(layer, nn.PReLU) else None,
    }
