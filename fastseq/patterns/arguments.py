"""The arguments of layers, as eager takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LARGEST = 2**31 - 1  # eager converts sizes to C ints and raises beyond this


def pair(value: Any) -> tuple[int, int] | None:
    """An int or a tuple of two ints as a pair; None for anything else, which eager may accept or reject."""
    values = (value, value) if type(value) is int else value
    if type(values) is not tuple or len(values) != 2:
        return None
    return values if all(type(v) is int and abs(v) <= LARGEST for v in values) else None


def one(value: Any) -> int | None:
    """An int, or the one in a tuple; None for anything else."""
    values = (value,) if type(value) is int else value
    return values[0] if type(values) is tuple and len(values) == 1 and pair(values[0]) else None


@dataclass(frozen=True)
class Sizes:
    """How layers of one or two dimensions have their sizes; `read` gives those of both, of one row for the former."""

    dimensions: int
    words: str

    def read(self, value: Any, of_a_row: int) -> tuple[int, int] | None:
        """None for what eager may accept or reject. `of_a_row`: what a layer of one dimension has for the other."""
        if self.dimensions == 2:
            return pair(value)
        size = one(value)
        return None if size is None else (of_a_row, size)


ONE = Sizes(1, "an int or a tuple of one")
TWO = Sizes(2, "one or two ints")


def refuse_sizes(layer: Any, sizes: Sizes, *attributes: str) -> str | None:
    """Why one of these attributes is declined, or None. A stride may be None: then it is the kernel's size."""
    for attribute in attributes:
        value = getattr(layer, attribute)
        if sizes.read(value, 1) is None and not (attribute == "stride" and value is None):
            return f"{type(layer).__name__} has {attribute} {value!r}; fused kernels take {sizes.words}"
    return None


def refuse_non_bools(layer: Any, *attributes: str) -> str | None:
    """Why one of these attributes is declined, or None."""
    for attribute in attributes:
        value = getattr(layer, attribute)
        if type(value) is not bool:
            return f"{type(layer).__name__} has {attribute} {value!r}; fused kernels take a bool"
    return None


def refuse_indices(layer: Any) -> str | None:
    """Why a pool is declined that may return indices too, or None."""
    if layer.return_indices:
        return f"{type(layer).__name__} has return_indices=True; fused kernels return values only"
    return None


LEAST_EPS = 2.0**-126  # the least normal number of float32, in which eager has it


def refuse_eps(layer: Any) -> str | None:
    """Why the layer's eps is declined, or None: without one, rounding decides what becomes of equal numbers."""
    if type(layer.eps) not in (int, float) or not layer.eps >= LEAST_EPS:
        return f"{type(layer).__name__} has eps {layer.eps!r}; fused kernels take a number above 0"
    return None


def build_window(layer: Any, sizes: Sizes = TWO) -> dict[str, Any]:
    """A pool's windows in the words of the native engine."""
    stride = layer.kernel_size if layer.stride is None else layer.stride
    return {
        "kernel_size": sizes.read(layer.kernel_size, 1),
        "stride": sizes.read(stride, 1),
        "padding": sizes.read(layer.padding, 0),
        "ceil_mode": layer.ceil_mode,
    }
