"""Tensors of any strides in poisoned memory, so that a kernel that writes or reads outside of them is found out."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

BITS = {4: torch.int32, 2: torch.int16}
POISON = {4: 0x7FDEADBE, 2: 0x7FBE}  # NaNs that nothing computes
GUARD = 64  # poisoned elements on either side
FAR = (1 << 31) + 24  # elements


def address_space(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    return torch.frombuffer(memory, dtype=dtype)


class Region:
    """A tensor of any strides in poisoned memory, `offset` elements from an address that is aligned to 64 bytes.

    Where it is larger than memory there is no poison.
    """

    def __init__(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, offset: int = 0) -> None:
        self.strides = tuple(strides)
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        self.is_poisoned = extent < FAR
        if self.is_poisoned:
            self.bits = torch.full((2 * GUARD + offset + extent,), POISON[dtype.itemsize], dtype=BITS[dtype.itemsize])
        else:
            self.bits = address_space(2 * GUARD + offset + extent, BITS[dtype.itemsize])
        assert self.bits.data_ptr() % 64 == 0
        self.tensor = self.bits.view(dtype).as_strided(tuple(shape), self.strides, GUARD + offset)
        self.pointer = self.tensor.data_ptr()

    @classmethod
    def of(cls, values: Tensor, strides: Sequence[int] | None, dtype: torch.dtype, offset: int = 0) -> Region:
        """Contiguous where there are no strides."""
        region = cls(values.shape, strides or values.contiguous().stride(), dtype, offset)
        region.tensor.copy_(values)
        return region

    def assert_gaps_are_untouched(self) -> None:
        __tracebackhide__ = True
        if not self.is_poisoned:
            return
        is_gap = torch.ones_like(self.bits, dtype=torch.bool)
        is_gap.as_strided(self.tensor.shape, self.strides, self.tensor.storage_offset())[:] = False
        changed = is_gap & (self.bits != POISON[self.bits.element_size()])
        assert not changed.any(), f"written outside, at {changed.nonzero().flatten().tolist()} of {self.bits.numel()}"


def strides_of(layout: str, shape: Sequence[int], unit: int = 1) -> tuple[int, ...]:
    """(image, channel, row, pixel). Gaps are multiples of `unit`."""
    _, c, h, w = shape
    if layout == "nchw":
        return c * h * w, h * w, w, 1
    if layout == "cropped":  # from larger NCHW maps
        return (c + 1) * (h + 2) * (w + 3) * unit, (h + 2) * (w + 3), w + 3, 1
    if layout == "steps":  # x[:, :, ::3, ::2]
        return c * h * w * 6, h * w * 6, w * 6, 2
    if layout == "columns":  # transposed maps
        return c * h * w, h * w, 1, h
    if layout == "nhwc":
        return h * w * c, 1, w * c, c
    if layout == "slice":  # channels of more, pixels of longer rows
        pixel = c + unit
        row = w * pixel + 2 * unit
        return h * row + unit, 1, row, pixel
    if layout == "pitched":  # to 16 bytes of any element
        pixel = -(-c // 8) * 8
        return h * w * pixel, 1, w * pixel, pixel
    if layout == "even slice":
        pixel = c + c % 2 + 2
        return h * w * pixel, 1, w * pixel, pixel
    if layout == "nhwc columns":
        return h * w * c, 1, c, h * c
    if layout == "far images":
        return FAR, 1, w * c, c
    assert layout == "far channels", layout
    return 64, FAR // 2, FAR // 16, 1
