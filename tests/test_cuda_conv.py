"""The CUDA conv, pool and pack kernels on the emulated grid: every row of their tables, against torch in float64.

All memory is poisoned with NaNs around and between the elements of a tensor, and must still be after a launch.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import mmap
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulation.build import compile_emulated
from torch import Tensor
from torch.nn import functional as F

FAMILY = ("conv_pool_f32", "conv_pool_tf32", "conv_pool_f16", "conv_pool_bf16", "max_pool", "pack")
SOURCES = ("tests/emulation/conv_harness.cpp", *(f"csrc/kernels/cuda/{name}.cu" for name in FAMILY))

# The kinds of arithmetic, in the order of kernels.h.
MATHS = ("f32", "tf32", "f16", "bf16")
DTYPES = {"f32": torch.float32, "tf32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BITS = {4: torch.int32, 2: torch.int16}
# Of a sum relative to the sum of its products' magnitudes: fp32 sums of exact products, or of factors rounded to 11
# bits each.
SUM_TOLERANCE = {"f32": 1e-6, "tf32": 1e-3, "f16": 1e-6, "bf16": 1e-6}
# Of a result: half a unit in the last place.
ROUNDING = {"f32": 2.0**-24, "tf32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
Row = tuple[str, str, str]  # arithmetic, tile, route
ROWS: tuple[Row, ...] = tuple(itertools.product(MATHS, ("128x64", "128x32", "32x32"), ("vector", "gather")))

POISON = {4: 0x7FDEADBE, 2: 0x7FBE}  # NaNs that nothing computes
GUARD = 64  # poisoned elements on either side
FAR = (1 << 31) + 24  # elements


# The structs of kernels.h --------------------------------------------------------------------------------------------


class PackJob(ctypes.Structure):
    _fields_ = [
        ("src", ctypes.c_void_p),
        ("dst", ctypes.c_void_p),
        ("stamps", ctypes.c_void_p),
        ("magic", ctypes.c_uint64),
        ("sizes", ctypes.c_int * 4),
        ("valid", ctypes.c_int),
        ("strides", ctypes.c_int64 * 4),
        ("is_forced", ctypes.c_int),
        ("samples", ctypes.c_int),
    ]


class PackArgs(ctypes.Structure):
    _fields_ = [("jobs", PackJob * 12), ("count", ctypes.c_int), ("element_bytes", ctypes.c_int)]


def fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class ConvPoolArgs(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "src weight bias dst"),
        *fields(ctypes.c_int, "batch c_in h_in w_in c_pitch"),
        *fields(ctypes.c_int64, "src_image_stride src_c_stride src_h_stride src_w_stride"),
        *fields(ctypes.c_int, "k_h k_w stride_h stride_w pad_top pad_left conv_h conv_w c_out has_relu pool_mode"),
        *fields(ctypes.c_int, "pool_h pool_w pool_stride_h pool_stride_w pool_top pool_left tile_h tile_w h_out w_out"),
        *fields(ctypes.c_int64, "dst_image_stride dst_c_stride dst_h_stride dst_w_stride"),
        ("dst_channels", ctypes.c_int),
        ("pack", PackArgs),
    ]


class MaxPoolArgs(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "src bias dst"),
        *fields(ctypes.c_int, "batch channels h_in w_in h_out w_out"),
        *fields(ctypes.c_int64, "src_image_stride src_c_stride src_h_stride src_w_stride"),
        *fields(ctypes.c_int64, "dst_image_stride dst_c_stride dst_h_stride dst_w_stride"),
        *fields(ctypes.c_int, "pool_h pool_w pool_stride_h pool_stride_w pool_top pool_left has_relu"),
    ]


class Kernels:
    """The library and its tables."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(compile_emulated(SOURCES, "conv_kernels")))
        self.library.fastseq_conv_rows.restype = ctypes.c_char_p
        for name in ("fastseq_conv_launch", "fastseq_conv_pool_launch", "fastseq_conv_pack"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.tables = json.loads(self.library.fastseq_conv_rows())

    def seed(self, seed: int) -> None:
        self.library.fastseq_conv_seed(ctypes.c_uint64(seed))

    def row(self, math: str, tile: str, route: str) -> tuple[int, int, dict[str, Any]]:
        """Where the row is, and what the table says of it."""
        table = self.tables["conv"][MATHS.index(math)]
        (found,) = (i for i, row in enumerate(table) if row["name"].endswith(f"_{tile}_{route}"))
        return MATHS.index(math), found, table[found]

    def conv(self, row: tuple[int, int, dict[str, Any]], args: ConvPoolArgs) -> None:
        assert self.library.fastseq_conv_launch(row[0], row[1], ctypes.byref(args)) is None

    def pool(self, math: str, args: MaxPoolArgs) -> None:
        names = [row["name"] for row in self.tables["pool"]]
        index = names.index(f"maxpool2d_{math}__cuda")
        assert self.library.fastseq_conv_pool_launch(index, ctypes.byref(args)) is None

    def pack(self, args: PackArgs) -> None:
        assert self.library.fastseq_conv_pack(ctypes.byref(args)) is None


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_structs_are_as_in_kernels_h(kernels: Kernels) -> None:
    layout = (ctypes.c_int64 * 8)()
    kernels.library.fastseq_conv_layout(layout)
    structs = (PackJob, "samples"), (PackArgs, "element_bytes"), (ConvPoolArgs, "pack"), (MaxPoolArgs, "has_relu")
    assert list(layout) == [n for kind, last in structs for n in (ctypes.sizeof(kind), getattr(kind, last).offset)]


def test_every_row_is_tested(kernels: Kernels) -> None:
    for math, table in zip(MATHS, kernels.tables["conv"], strict=True):
        how = "ffma" if math == "f32" else "mma"
        expected = {f"conv2d_{math}__{how}_{tile}_{route}" for m, tile, route in ROWS if m == math}
        assert sorted(row["name"] for row in table) == sorted(expected)
        for row in table:
            assert row["name"].endswith(
                f"_{row['tile_m']}x{row['tile_n']}_{'vector' if row['is_vector'] else 'gather'}"
            )
            assert MATHS[row["math"]] == math
            assert row["shared_bytes"] <= 64 << 10 and row["min_arch"] == (80 if math in ("tf32", "bf16") else 75)
    assert [MATHS[row["math"]] for row in kernels.tables["pool"]] == ["f32", "f16", "bf16"]


# Memory --------------------------------------------------------------------------------------------------------------


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


SRC_LAYOUTS = {
    "gather": ("nchw", "nhwc", "cropped", "steps", "columns", "slice"),
    "vector": ("nhwc", "slice", "nhwc columns"),
}
DST_LAYOUTS = ("nchw", "nhwc", "cropped", "slice", "even slice", "steps", "columns")


# Convolutions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    kernel: tuple[int, int] = (2, 2)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (0, 0)
    is_ceil: bool = False
    tile: tuple[int, int] | None = (1, 1)  # None: in registers

    def __call__(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.kernel, self.stride, self.padding, ceil_mode=self.is_ceil)

    def sums(self) -> int:
        assert self.tile is not None
        return ((self.tile[0] - 1) * self.stride[0] + self.kernel[0]) * (
            (self.tile[1] - 1) * self.stride[1] + self.kernel[1]
        )


REGISTERS = Pool(tile=None)
NO_PADDING = (0, 0, 0, 0)


@dataclass(frozen=True)
class Problem:
    batch: int = 2
    c_in: int = 3
    size: tuple[int, int] = (9, 11)
    c_out: int = 6
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)  # top, left, bottom, right
    pool: Pool | None = None
    has_bias: bool = True
    has_relu: bool = True
    src: int | str = 0  # a layout, or which of SRC_LAYOUTS
    dst: str = "nchw"
    zeros: int = 0  # channels after c_out
    room: int = 0  # more of the source's pixels than asked for, in 16 bytes: vector kernels multiply zeros
    offset: int = 0  # of each pointer, in elements, or in 16 bytes where alignment is asked for
    dst_offset: int = 0

    @property
    def conv_size(self) -> tuple[int, int]:
        (h, w), (top, left, bottom, right) = self.size, self.padding
        return (h + top + bottom - self.kernel[0]) // self.stride[0] + 1, (
            w + left + right - self.kernel[1]
        ) // self.stride[1] + 1

    def sums(self, src: Tensor, weight: Tensor, multiply: Callable[..., Tensor] = F.conv2d) -> Tensor:
        (h, w), (top, left, _, _), (conv_h, conv_w) = self.size, self.padding, self.conv_size
        bottom = (conv_h - 1) * self.stride[0] + self.kernel[0] - h - top
        right = (conv_w - 1) * self.stride[1] + self.kernel[1] - w - left
        return multiply(F.pad(src, (left, right, top, bottom)), weight, stride=self.stride)

    def finish(self, sums: Tensor, bias: Tensor | None) -> Tensor:
        x = sums if bias is None else sums + bias[:, None, None]
        x = torch.relu(x) if self.has_relu else x
        return self.pool(x) if self.pool else x

    def products(self) -> int:
        return (
            self.batch
            * self.c_in
            * self.c_out
            * self.kernel[0]
            * self.kernel[1]
            * self.conv_size[0]
            * self.conv_size[1]
        )


@dataclass
class Values:
    """In float64, but exact in the kernel's elements."""

    src: Tensor
    weight: Tensor
    bias: Tensor | None


def make_values(problem: Problem, dtype: torch.dtype, make: Callable[..., Tensor]) -> Values:
    def exact(*shape: int) -> Tensor:
        return make(*shape).to(dtype).double()

    return Values(
        exact(problem.batch, problem.c_in, *problem.size),
        exact(problem.c_out, problem.c_in, *problem.kernel),
        exact(problem.c_out) if problem.has_bias else None,
    )


def integers(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape).double()


def run(
    kernels: Kernels, row_name: tuple[str, str, str], problem: Problem, values: Values, pack: PackArgs | None = None
) -> Tensor:
    """What the row makes of the problem. It must write all of dst, and nothing else."""
    __tracebackhide__ = True
    math, _, route = row_name
    row = kernels.row(*row_name)
    dtype = DTYPES[math]
    src, weight = values.src, values.weight
    unit = 16 // dtype.itemsize if route == "vector" else 1
    c_pitch = (-(-problem.c_in // unit) + problem.room) * unit
    if route == "vector":  # the contract: zeros behind the channels of both
        src = F.pad(src, (0, 0, 0, 0, 0, c_pitch - problem.c_in))
        weight = F.pad(weight.permute(0, 2, 3, 1), (0, c_pitch - problem.c_in))
    layouts = SRC_LAYOUTS[route]
    layout = problem.src if isinstance(problem.src, str) else layouts[problem.src % len(layouts)]
    src_region = Region.of(src, strides_of(layout, src.shape, unit), dtype, problem.offset * unit)
    weight_region = Region.of(weight, None, dtype, problem.offset * unit)
    bias_region = Region.of(values.bias, None, dtype, problem.offset) if values.bias is not None else None

    pool = problem.pool
    conv_h, conv_w = problem.conv_size
    h_out, w_out = (pool(torch.zeros(1, 1, conv_h, conv_w)) if pool else torch.zeros(1, 1, conv_h, conv_w)).shape[2:]
    dst_channels = problem.c_out + problem.zeros
    shape = (problem.batch, dst_channels, h_out, w_out)
    dst = Region(shape, strides_of(problem.dst, shape), dtype, problem.dst_offset)

    args = ConvPoolArgs(
        src=src_region.pointer,
        weight=weight_region.pointer,
        bias=bias_region.pointer if bias_region else None,
        dst=dst.pointer,
        batch=problem.batch,
        c_in=problem.c_in,
        h_in=problem.size[0],
        w_in=problem.size[1],
        c_pitch=c_pitch,
        k_h=problem.kernel[0],
        k_w=problem.kernel[1],
        stride_h=problem.stride[0],
        stride_w=problem.stride[1],
        pad_top=problem.padding[0],
        pad_left=problem.padding[1],
        conv_h=conv_h,
        conv_w=conv_w,
        c_out=problem.c_out,
        has_relu=problem.has_relu,
        h_out=h_out,
        w_out=w_out,
        dst_channels=dst_channels,
    )
    for name, region in (("src", src_region), ("dst", dst)):
        for axis, stride in zip(("image", "c", "h", "w"), region.strides, strict=True):
            setattr(args, f"{name}_{axis}_stride", stride)
    if pool:
        args.pool_mode = 1 if pool.tile is None else 2
        args.pool_h, args.pool_w = pool.kernel
        args.pool_stride_h, args.pool_stride_w = pool.stride
        args.pool_top, args.pool_left = pool.padding
    if pool and pool.tile:
        args.tile_h, args.tile_w = pool.tile
        assert pool.sums() <= row[2]["tile_m"], "the test's own tile is too large"
    if pack:
        args.pack = pack

    inputs = [region.bits for region in (src_region, weight_region) if region.is_poisoned]
    before = [bits.clone() for bits in inputs]
    kernels.conv(row, args)
    assert all(torch.equal(*bits) for bits in zip(before, inputs, strict=True))
    dst.assert_gaps_are_untouched()
    padding = dst.tensor[:, problem.c_out :]
    assert (padding == 0).all() and not padding.signbit().any()
    return dst.tensor[:, : problem.c_out].clone()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """NaN in the same places, and the same numbers elsewhere."""
    __tracebackhide__ = True
    expected = expected.to(actual.dtype)
    wrong = ~((actual == expected) | (actual.isnan() & expected.isnan()))
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} differ, the first at {wrong.nonzero()[0].tolist()} "
        f"of {list(wrong.shape)}: expected {expected[wrong][0].item()}, found {actual[wrong][0].item()}"
    )


def check_integers(kernels: Kernels, row: Row, problem: Problem) -> None:
    """Sums of products of small integers are exact in every kind of arithmetic and order; one rounding is left."""
    __tracebackhide__ = True
    values = make_values(problem, DTYPES[row[0]], integers)
    expected = problem.finish(problem.sums(values.src, values.weight), values.bias)
    assert_same(run(kernels, row, problem, values), expected)


CASES = {
    "1x1 image": Problem(batch=1, c_in=1, size=(1, 1), c_out=1, kernel=(1, 1), padding=NO_PADDING),
    "1x1 kernel": Problem(c_in=30, c_out=33, kernel=(1, 1), padding=NO_PADDING),
    "no bias, no relu": Problem(has_bias=False, has_relu=False),
    "no relu": Problem(c_in=4, has_relu=False, padding=(1, 1, 0, 0)),
    "asymmetric padding": Problem(c_in=4, kernel=(5, 5), padding=(2, 0, 0, 1), stride=(2, 1)),
    "padding below only": Problem(c_in=4, kernel=(3, 5), padding=(0, 0, 3, 4), has_relu=False),
    "kernel of 3x5": Problem(c_in=20, kernel=(3, 5), padding=(1, 2, 1, 2), c_out=30),
    "kernel of 11, stride 4": Problem(
        batch=1, size=(23, 27), kernel=(11, 11), stride=(4, 4), padding=(2, 2, 2, 2), c_out=64
    ),
    "kernel of 7 on 3": Problem(size=(3, 3), kernel=(7, 7), padding=(3, 3, 3, 3), c_in=1),
    "stride 3 between taps": Problem(c_in=20, kernel=(2, 2), stride=(3, 3), padding=(0, 1, 0, 0)),
    "65 channels": Problem(c_in=64, c_out=65, size=(5, 5)),
    "64 channels of 20": Problem(c_in=20, c_out=64, size=(7, 7), dst="nhwc"),
    "128 sums": Problem(batch=1, c_in=4, size=(8, 16)),
    "129 sums": Problem(batch=3, c_in=4, size=(1, 43), kernel=(1, 3), padding=(0, 1, 0, 1), dst="nhwc"),
    "nhwc to padded nhwc": Problem(c_in=20, c_out=30, src=1, dst="nhwc", zeros=2),
    "more zeros than a tile": Problem(c_in=4, c_out=6, dst="nhwc", zeros=67, pool=REGISTERS),
    "wide pixels": Problem(c_in=5, c_out=6, room=5),
    "odd pairs": Problem(c_in=4, c_out=33, dst="nhwc", dst_offset=1),
    "odd channels of even pixels": Problem(c_in=4, c_out=33, dst="even slice"),
    "odd channels of even pixels, pooled": Problem(c_in=4, c_out=5, dst="even slice", pool=REGISTERS, zeros=2),
    "odd pitch": Problem(c_in=4, c_out=6, dst="slice"),
    "pairs on odd elements": Problem(c_in=4, c_out=32, dst="nhwc", dst_offset=3),
    "odd images": Problem(batch=3, c_in=4, c_out=7, size=(3, 3), dst="nhwc"),
    "cropped to steps": Problem(c_in=4, src=2, dst="steps", offset=1),
    "columns": Problem(c_in=4, src=4, dst="columns", pool=REGISTERS, offset=3),
    "every alignment, nhwc": Problem(c_in=5, src=1, offset=1, dst_offset=1, dst="cropped"),
    "odd weights": Problem(c_in=3, c_out=9, kernel=(3, 3), offset=1),
    "even weights at odd addresses": Problem(c_in=4, c_out=9, offset=3),
    "even weights at even addresses": Problem(c_in=4, c_out=9, offset=2),
    "registers": Problem(size=(8, 12), pool=REGISTERS),
    "registers, dropped row": Problem(size=(9, 12), c_in=4, c_out=33, pool=REGISTERS),
    "registers, dropped column": Problem(size=(8, 11), c_in=4, pool=REGISTERS, dst="nhwc", zeros=2),
    "registers, dropped both": Problem(batch=3, size=(7, 7), c_in=20, c_out=65, pool=REGISTERS),
    "registers, one window": Problem(batch=1, size=(3, 3), pool=REGISTERS),
    "registers, many windows": Problem(size=(16, 22), c_out=1, pool=REGISTERS, has_bias=False, has_relu=False),
    "shared 2x2/2": Problem(pool=Pool(tile=(2, 3)), has_relu=False),
    "shared 3x3/2": Problem(c_in=20, c_out=33, pool=Pool((3, 3), (2, 2), tile=(2, 2)), dst="nhwc", zeros=3),
    "shared 3x3/2, 1x1": Problem(c_in=4, pool=Pool((3, 3), (2, 2), tile=(1, 1))),
    "shared 3x3/1": Problem(c_in=4, c_out=65, pool=Pool((3, 3), (1, 1), tile=(3, 2)), dst="nhwc"),
    "shared 3x3/1, padding": Problem(pool=Pool((3, 3), (1, 1), (1, 1), tile=(1, 4)), has_relu=False),
    "shared 2x2/1": Problem(pool=Pool((2, 2), (1, 1), tile=(4, 4)), dst="columns"),
    "shared 5x3/2": Problem(c_in=30, pool=Pool((5, 3), (2, 2), (2, 1), tile=(1, 2)), has_relu=False),
    "shared 5x3/1x2": Problem(size=(13, 9), pool=Pool((5, 3), (1, 2), (1, 0), tile=(2, 2)), has_bias=False),
    "shared 2x3/3x2, gaps": Problem(size=(13, 13), pool=Pool((2, 3), (3, 2), tile=(2, 2)), dst="slice"),
    "shared, ceil": Problem(size=(8, 10), pool=Pool((3, 3), (2, 2), is_ceil=True, tile=(2, 2)), has_relu=False),
    "shared, ceil and padding": Problem(size=(8, 9), pool=Pool((3, 2), (2, 2), (1, 1), True, tile=(1, 3)), dst="nhwc"),
    "shared, last tiles in part": Problem(batch=3, size=(11, 9), pool=Pool((3, 3), (2, 2), tile=(2, 2))),
    "shared, all negative": Problem(c_in=1, c_out=1, pool=Pool((3, 3), (3, 3), (1, 1), tile=(1, 2)), has_relu=False),
    "shared, strided conv": Problem(
        size=(21, 19),
        kernel=(5, 5),
        stride=(2, 2),
        padding=(2, 2, 2, 2),
        pool=Pool((3, 3), (2, 2), tile=(2, 2)),
        c_out=64,
    ),
    "linear": Problem(batch=300, c_in=30, c_out=65, size=(1, 1), kernel=(1, 1), padding=NO_PADDING),
    "linear, one row": Problem(batch=1, c_in=333, c_out=30, size=(1, 1), kernel=(1, 1), padding=NO_PADDING),
    "linear, rows apart": Problem(
        batch=33,
        c_in=129,
        c_out=33,
        size=(1, 1),
        kernel=(1, 1),
        padding=NO_PADDING,
        src=5,
        dst="slice",
        has_relu=False,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_cases(kernels: Kernels, row: Row, case: str) -> None:
    kernels.seed(len(case))
    check_integers(kernels, row, CASES[case])


# Windows that fit 32 sums in some tile.
POOLS = (
    ((2, 2), (2, 2), (0, 0)),
    ((2, 2), (1, 1), (0, 0)),
    ((2, 2), (1, 2), (1, 1)),
    ((3, 3), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (0, 0)),
    ((3, 3), (2, 2), (1, 1)),
    ((3, 2), (3, 1), (1, 0)),
    ((5, 3), (2, 2), (0, 0)),
    ((5, 3), (2, 1), (2, 1)),
    ((1, 1), (2, 2), (0, 0)),
)


def random_problem(rng: random.Random, tile_m: int) -> Problem:
    kernel = rng.choice([(1, 1), (2, 2), (3, 3), (3, 3), (5, 5), (7, 7), (11, 11), (3, 5)])
    pool = None
    mode = rng.choice(["none", "registers", "shared", "shared"])
    if mode == "registers":
        pool = REGISTERS
    elif mode == "shared":
        pool = Pool(*rng.choice(POOLS), is_ceil=rng.random() < 0.5)
        tiles = (dataclasses.replace(pool, tile=tile) for tile in itertools.product(range(1, 9), repeat=2))
        pool = rng.choice([tiled for tiled in tiles if tiled.sums() <= tile_m])
    return Problem(
        batch=rng.choice([1, 2, 3]),
        c_in=rng.choice([1, 3, 4, 20, 30, 64]),
        size=(rng.randrange(1, 24), rng.randrange(1, 24)),
        c_out=rng.choice([1, 6, 20, 30, 33, 64, 65]),
        kernel=kernel,
        stride=rng.choice([(1, 1), (1, 1), (2, 2), (2, 1), (4, 4)]),
        padding=tuple(rng.randint(0, kernel[i % 2] // 2) for i in range(4)),  # type: ignore[arg-type]
        pool=pool,
        has_bias=rng.random() < 0.8,
        has_relu=rng.random() < 0.6,
        src=rng.randrange(6),
        dst=rng.choice(DST_LAYOUTS),
        zeros=rng.choice([0, 0, 0, 1, 2, 7]),
        offset=rng.choice([0, 0, 1, 2, 3]),
        dst_offset=rng.choice([0, 0, 0, 1, 2]),
        room=rng.choice([0, 0, 0, 1, 3]),
    )


def is_possible(problem: Problem) -> bool:
    h, w = problem.conv_size
    smallest = (1, 1)
    if problem.pool:
        padding = problem.pool.padding
        smallest = (problem.pool.kernel[0] - 2 * padding[0], problem.pool.kernel[1] - 2 * padding[1])
    return h >= max(1, smallest[0]) and w >= max(1, smallest[1])


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_random_problems(kernels: Kernels, row: Row) -> None:
    rng = random.Random("-".join(row))
    tile_m = kernels.row(*row)[2]["tile_m"]
    count = 0
    while count < 30:
        problem = random_problem(rng, tile_m)
        if not is_possible(problem) or problem.products() > 1_500_000:
            continue
        count += 1
        kernels.seed(rng.randrange(1 << 32))
        try:
            check_integers(kernels, row, problem)
        except AssertionError as error:
            raise AssertionError(f"{problem}: {error}") from None


@pytest.mark.parametrize("row", [row for row in ROWS if row[0] in ("f16", "bf16")], ids="-".join)
def test_far_apart(kernels: Kernels, row: Row) -> None:
    """Offsets of images, and of channels and rows of dst, take 64 bits. Shown with 16-bit elements: that is 4 GiB."""
    problem = Problem(c_in=4, c_out=3, size=(4, 5), src="far images", dst="far images")
    for pool in (None, REGISTERS, Pool((3, 3), (1, 1), tile=(1, 2))):
        check_integers(kernels, row, dataclasses.replace(problem, pool=pool))
        check_integers(kernels, row, dataclasses.replace(problem, pool=pool, dst="far channels"))


# Rounding ------------------------------------------------------------------------------------------------------------

REAL_CASES = {
    "long sums": Problem(c_in=64, c_out=33, size=(6, 5), dst="nhwc"),
    "registers": Problem(c_in=20, c_out=6, kernel=(5, 5), padding=(2, 2, 2, 2), size=(8, 9), pool=REGISTERS),
    "shared": Problem(c_in=20, c_out=6, pool=Pool((3, 3), (2, 2), tile=(2, 2)), has_relu=False),
}


@pytest.mark.parametrize("case", REAL_CASES)
@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_rounding(kernels: Kernels, row: Row, case: str) -> None:
    """One rounding at the end, after a sum in fp32; tf32 rounds what it multiplies, and only tf32."""
    math, problem = row[0], REAL_CASES[case]
    values = make_values(problem, DTYPES[math], torch.randn)
    kernels.seed(3)
    actual = run(kernels, row, problem, values).double()
    expected = problem.finish(problem.sums(values.src, values.weight), values.bias)
    # A maximum is off by no more than the sum that is off most.
    magnitudes = problem.sums(values.src.abs(), values.weight.abs()) + values.bias.abs()[:, None, None]
    magnitudes = problem.pool(magnitudes) if problem.pool else magnitudes
    error = (actual - expected).abs()
    assert (error <= SUM_TOLERANCE[math] * magnitudes + 1.001 * ROUNDING[math] * expected.abs()).all()
    relative = (error.norm() / expected.norm()).item()
    low, high = {"f32": (1e-9, 1e-6), "tf32": (1e-5, 1e-3), "f16": (1e-5, 5e-4), "bf16": (1e-4, 4e-3)}[math]
    assert low < relative < high


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_tf32_rounds_to_nearest(kernels: Kernels, row: Row) -> None:
    """Ties away from zero, as cuBLAS and cuDNN: the low bits are not cut off."""
    problem = Problem(
        batch=1, c_in=1, size=(2, 4), c_out=2, kernel=(1, 1), padding=NO_PADDING, has_bias=False, has_relu=False
    )
    ulp = 2.0**-10
    src = torch.tensor(
        [1 + ulp / 4, 1 + ulp / 2, 1 + 3 * ulp / 4, 1 + 3 * ulp / 2, -1 - ulp / 2, 2 - ulp / 2, 3.0, 1 + 5 * ulp / 4]
    )
    rounded = torch.tensor([1, 1 + ulp, 1 + ulp, 1 + 2 * ulp, -1 - ulp, 2, 3, 1 + ulp])
    weight = torch.tensor([1.0, 1 + ulp / 2])
    if row[0] != "tf32":
        src, weight = src.to(DTYPES[row[0]]), weight.to(DTYPES[row[0]])
    factors = (rounded, torch.tensor([1.0, 1 + ulp])) if row[0] == "tf32" else (src, weight)
    values = Values(src.double().view(1, 1, 2, 4), weight.double().view(2, 1, 1, 1), None)
    expected = factors[0].double().view(1, 1, 2, 4) * factors[1].double().view(1, 2, 1, 1)
    assert_same(run(kernels, row, problem, values), expected.float())


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_any_order_of_threads_gives_the_same_bits(kernels: Kernels, row: Row) -> None:
    """Seed 0 runs threads in order; rows whose warps split k add in the order of warps."""
    for problem in (
        Problem(c_in=30, c_out=33, size=(5, 6), kernel=(5, 5), padding=(2, 2, 2, 2), dst="nhwc", zeros=1),
        Problem(c_in=30, c_out=20, size=(5, 6), pool=Pool((3, 3), (2, 2), (1, 1), tile=(2, 2))),
    ):
        values = make_values(problem, DTYPES[row[0]], torch.randn)
        results = []
        for seed in (0, 1, 2, 3):
            kernels.seed(seed)
            results.append(run(kernels, row, problem, values))
        for result in results[1:]:
            assert torch.equal(results[0], result)


# NaN, infinities, zeros ----------------------------------------------------------------------------------------------


def explicit_products(padded: Tensor, weight: Tensor, stride: tuple[int, int]) -> Tensor:
    """conv2d, each product made and added. With padding zeros among the factors: 0 * inf is NaN.

    So do torch.conv2d on the CPU in float32 and float64 (im2col and a matrix product) and implicit GEMMs on the GPU;
    kernels that leave padding out, such as oneDNN's for float16, do not.
    """
    windows = padded.unfold(2, weight.shape[2], stride[0]).unfold(3, weight.shape[3], stride[1])
    return (windows[:, None] * weight[None, :, :, None, None]).sum((2, 5, 6))


def plant(values: Tensor, rng: random.Random, specials: Sequence[float], count: int) -> None:
    for _ in range(count):
        values.view(-1)[rng.randrange(values.numel())] = rng.choice(specials)


SPECIAL_CASES = {
    "none": Problem(c_in=3, c_out=9, size=(5, 7), dst="nhwc", zeros=3),
    "none, no relu": Problem(c_in=20, c_out=6, size=(5, 5), kernel=(2, 2), stride=(2, 2), has_relu=False),
    "registers": Problem(c_in=4, size=(7, 9), pool=REGISTERS, has_relu=False),
    "registers, relu": Problem(c_in=3, size=(6, 9), pool=REGISTERS),
    "shared": Problem(
        c_in=3, size=(7, 9), pool=Pool((3, 3), (2, 2), (1, 1), is_ceil=True, tile=(2, 2)), has_relu=False
    ),
    "shared, relu": Problem(c_in=4, size=(7, 9), pool=Pool((3, 3), (2, 2), tile=(1, 2))),
    "linear": Problem(batch=20, c_in=30, c_out=33, size=(1, 1), kernel=(1, 1), padding=NO_PADDING),
}


@pytest.mark.parametrize("case", SPECIAL_CASES)
@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_special_values(kernels: Kernels, row: Row, case: str) -> None:
    problem = SPECIAL_CASES[case]
    nan, inf = float("nan"), float("inf")
    rng = random.Random(case)
    seen = set()
    for specials, counts in (
        ((nan, inf, -inf, -0.0), (4, 1, 1)),
        ((inf, -inf), (4, 0, 2)),  # sums and biases that cancel
        ((inf,), (0, 1, 0)),  # times the padding
        ((-inf, -0.0), (6, 1, 3)),
        ((-0.0, 0.0), (999, 99, 3)),
    ):
        values = make_values(problem, DTYPES[row[0]], integers)
        assert values.bias is not None
        for tensor, count in zip((values.src, values.weight, values.bias), counts, strict=True):
            plant(tensor, rng, specials, count)
        expected = problem.finish(problem.sums(values.src, values.weight, explicit_products), values.bias)
        kernels.seed(rng.randrange(1 << 32))
        actual = run(kernels, row, problem, values)
        assert_same(actual, expected)
        if problem.has_relu:
            assert not actual[actual == 0].signbit().any(), "relu(-0) is +0 on CUDA"
        seen |= {str(x) for x in expected.flatten().tolist() if x != x or abs(x) == inf}
    assert {"nan", "inf"} <= seen


@pytest.mark.parametrize("pool", [REGISTERS, Pool((2, 2), (2, 2), tile=(1, 2))], ids=["registers", "shared"])
@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_infinite_bias_meets_sums_that_lose(kernels: Kernels, row: Row, pool: Pool) -> None:
    """-inf + inf is NaN, also where another sum of the window is larger than -inf."""
    inf = float("inf")
    problem = Problem(
        batch=1, c_in=1, size=(2, 8), c_out=3, kernel=(1, 1), padding=NO_PADDING, pool=pool, has_relu=False
    )
    src = torch.ones(1, 1, 2, 8, dtype=torch.float64)
    src[0, 0, [0, 0, 1, 1], [0, 3, 4, 7]] = -inf  # one place of each window
    values = Values(src, torch.ones(3, 1, 1, 1).double(), torch.tensor([inf, -inf, 2.0]).double())
    actual = run(kernels, row, problem, values)
    assert actual[0, 0].isnan().all() and (actual[0, 1] == -inf).all() and (actual[0, 2] == 3).all()


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_nothing_outside_is_multiplied(kernels: Kernels, row: Row) -> None:
    """The zeros that fill a step of k and the rows and columns of a tile make no NaN of infinities."""
    problem = Problem(batch=1, c_in=5, size=(3, 3), c_out=3, padding=NO_PADDING, has_bias=False)
    values = make_values(problem, DTYPES[row[0]], lambda *shape: torch.ones(shape))
    values.weight.fill_(float("inf"))
    assert (run(kernels, row, problem, values) == float("inf")).all()
    values.weight.fill_(1)
    values.src.fill_(float("inf"))
    assert (run(kernels, row, problem, values) == float("inf")).all()


# Copies of weights ---------------------------------------------------------------------------------------------------

SLICE = 2048
MAGIC = 0x123456789ABCDEF1


class Packing:
    """A job, its memory, and what its copy should be."""

    def __init__(
        self, src: Tensor, valid: int, l_size: int, *, samples: int = 0, is_forced: bool = False, offset: int = 0
    ) -> None:
        """`src` (i, j, k, at least valid) of any strides; its copy is (i, j, k, l_size)."""
        self.src = src
        self.shape = (*src.shape[:3], l_size)
        self.valid = valid
        self.dst = Region(self.shape, torch.empty(self.shape).stride(), src.dtype, offset)
        self.flat = self.dst.tensor.view(-1)
        self.count = self.flat.numel()
        self.slices = -(-self.count // SLICE)
        self.stamps = torch.zeros(self.slices + 2, dtype=torch.int64)
        self.job = PackJob(
            src=src.data_ptr(),
            dst=self.dst.pointer,
            stamps=self.stamps.data_ptr() + 8,
            magic=MAGIC,
            sizes=(ctypes.c_int * 4)(*self.shape),
            valid=valid,
            strides=(ctypes.c_int64 * 4)(*src.stride()),
            samples=samples,
        )

    def expected(self) -> Tensor:
        return F.pad(self.src[..., : self.valid], (0, self.shape[3] - self.valid))

    def assert_done(self) -> None:
        __tracebackhide__ = True
        self.dst.assert_gaps_are_untouched()
        assert torch.equal(self.dst.tensor, self.expected())
        assert self.stamps.tolist() == [0, *[MAGIC] * self.slices, 0]

    def elements(self, part: int) -> range:
        """Of a slice."""
        return range(part * SLICE, min((part + 1) * SLICE, self.count))

    def sample(self, part: int) -> set[int]:
        """What is compared of a slice: from its first to its last element, evenly."""
        elements, samples = self.elements(part), self.job.samples
        if samples <= 1 or samples >= len(elements):
            return set(elements)
        return {elements[i * (len(elements) - 1) // (samples - 1)] for i in range(samples)}


def pack_args(*packings: Packing) -> PackArgs:
    args = PackArgs(count=len(packings), element_bytes=packings[0].src.element_size())
    for i, packing in enumerate(packings):
        args.jobs[i] = packing.job
    return args


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """No two are equal in bits, none is zero."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, dtype=BITS[dtype.itemsize]).view(dtype).view(shape)


def channels_last(weight: Tensor) -> Tensor:
    """(n, c, y, x) as (n, y, x, c)."""
    return weight.permute(0, 2, 3, 1)


packed_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"]
)


@packed_dtypes
@pytest.mark.parametrize("samples", [0, 1, 2, 64, SLICE, 5000])
def test_pack_fresh(kernels: Kernels, dtype: torch.dtype, samples: int) -> None:
    for src, valid, l_size in (
        (channels_last(weights(33, 20, 3, 3, dtype=dtype)), 20, 24),
        (channels_last(weights(7, 3, 5, 5, dtype=dtype)), 3, 8),
        (channels_last(weights(32, 8, 4, 4, dtype=dtype)), 8, 8),  # two whole slices
        (weights(1, 1, 1, 1, dtype=dtype), 1, 1),
        (weights(1, 1, 5, SLICE + 1, dtype=dtype), SLICE + 1, SLICE + 8),
        (weights(50, 60, dtype=dtype).t()[None, None], 50, 52),
        (weights(4, 6, 5, 8, dtype=dtype)[::2, ::3, 1::2], 7, 16),
        (weights(1, 9, dtype=dtype).expand(4, 3, 2, 9), 9, 16),
    ):
        packing = Packing(src, valid, l_size, samples=samples, offset=samples % 2)
        kernels.seed(samples + l_size)
        kernels.pack(pack_args(packing))
        packing.assert_done()


def test_pack_of_strides_that_need_64_bits(kernels: Kernels) -> None:
    src = address_space(FAR + 8, torch.float16).as_strided((2, 1, 1, 4), (FAR, 1, 1, 1))
    src.copy_(weights(2, 1, 1, 4, dtype=torch.float16))
    packing = Packing(src, 4, 8)
    kernels.pack(pack_args(packing))
    packing.assert_done()


def fresh(kernels: Kernels, dtype: torch.dtype, samples: int = 0) -> Packing:
    """A copy that is done, of three slices and a part."""
    packing = Packing(channels_last(weights(33, 20, 3, 3, dtype=dtype)), 20, 24, samples=samples)
    assert packing.slices == 4 and packing.count % SLICE != 0
    kernels.pack(pack_args(packing))
    packing.assert_done()
    return packing


def plant_differences(packing: Packing, at: Sequence[int]) -> None:
    bits = packing.flat.view(BITS[packing.flat.element_size()])
    bits[list(at)] ^= 1


@packed_dtypes
def test_unchanged_copies_are_left_alone(kernels: Kernels, dtype: torch.dtype) -> None:
    """Outside the sample a difference is not seen, so it shows that nothing was written."""
    packing = fresh(kernels, dtype, samples=64)
    outside = [i for part in range(4) for i in packing.elements(part) if i not in packing.sample(part)]
    assert len(outside) == packing.count - 4 * 64
    plant_differences(packing, outside)
    before = packing.flat.clone()
    kernels.pack(pack_args(packing))
    assert torch.equal(packing.flat, before)


@packed_dtypes
def test_a_difference_in_the_sample_repairs_its_slice(kernels: Kernels, dtype: torch.dtype) -> None:
    packing = fresh(kernels, dtype, samples=64)
    rng = random.Random(0)
    for part in range(4):
        sample = sorted(packing.sample(part))
        for inside in (sample[0], sample[-1], rng.choice(sample[1:-1])):
            outside = [rng.choice(sorted(set(packing.elements(p)) - packing.sample(p))) for p in range(4)]
            plant_differences(packing, [inside, *outside])
            before = packing.flat.clone()
            kernels.seed(inside)
            kernels.pack(pack_args(packing))
            repaired = packing.elements(part)
            assert torch.equal(packing.flat[repaired], packing.expected().reshape(-1)[repaired])
            before[repaired] = packing.flat[repaired]
            assert torch.equal(packing.flat, before), "another slice was written"
            plant_differences(packing, [i for i in outside if i not in repaired])
            packing.assert_done()


@packed_dtypes
@pytest.mark.parametrize("samples", [0, 1, SLICE])
def test_exact_comparison_repairs_any_element(kernels: Kernels, dtype: torch.dtype, samples: int) -> None:
    packing = fresh(kernels, dtype, samples=samples)
    rng = random.Random(0)
    for i in (0, 255, 256, SLICE - 1, SLICE, packing.count - 1, *(rng.randrange(packing.count) for _ in range(10))):
        plant_differences(packing, [i])
        kernels.pack(pack_args(packing))
        packing.assert_done()


@packed_dtypes
def test_copies_follow_their_weights(kernels: Kernels, dtype: torch.dtype) -> None:
    packing = fresh(kernels, dtype)
    for i in (0, 1, 1000, 33 * 20 * 9 - 1):
        packing.src.permute(0, 3, 1, 2).reshape(-1)[i].zero_()  # a view: the copy below sees it
        packing.src.as_strided((33 * 20 * 9,), (1,))[i] = -1.0
        kernels.pack(pack_args(packing))
        packing.assert_done()
    sampled = fresh(kernels, dtype, samples=32)
    sampled.src.mul_(-1)
    kernels.pack(pack_args(sampled))
    sampled.assert_done()


@packed_dtypes
def test_forced_and_stale_copies(kernels: Kernels, dtype: torch.dtype) -> None:
    packing = fresh(kernels, dtype, samples=64)
    outside = [sorted(set(packing.elements(part)) - packing.sample(part))[5] for part in range(4)]
    plant_differences(packing, outside)
    packing.stamps[2] ^= 1 << 40  # of slice 1
    kernels.pack(pack_args(packing))
    plant_differences(packing, [outside[0], *outside[2:]])  # away again
    packing.assert_done()

    plant_differences(packing, outside)
    packing.job.is_forced = 1
    kernels.pack(pack_args(packing))
    packing.assert_done()


def several(dtype: torch.dtype) -> list[Packing]:
    """As many jobs as there can be, of one to five slices."""
    packings = [
        Packing(
            channels_last(weights(3 * n + 1, 4 * n, 3, 3, dtype=dtype)),
            4 * n - n % 3,
            4 * n + n % 5,
            samples=64 * (n % 2),
        )
        for n in range(1, 13)
    ]
    assert len({packing.slices for packing in packings}) > 3
    return packings


@packed_dtypes
def test_several_packs(kernels: Kernels, dtype: torch.dtype) -> None:
    packings = several(dtype)
    kernels.seed(1)
    for _ in range(2):
        kernels.pack(pack_args(*packings))
        for packing in packings:
            packing.assert_done()
            plant_differences(packing, [packing.elements(packing.slices - 1)[0]])


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_packs_beside_a_convolution(kernels: Kernels, row: Row) -> None:
    problem = Problem(c_in=4, c_out=33, size=(7, 7), pool=REGISTERS)
    values = make_values(problem, DTYPES[row[0]], integers)
    expected = problem.finish(problem.sums(values.src, values.weight), values.bias)
    for seed, dtype in enumerate((torch.float32, torch.float16)):
        packings = several(dtype)
        kernels.seed(seed)
        assert_same(run(kernels, row, problem, values, pack_args(*packings)), expected)
        for packing in packings:
            packing.assert_done()


# Max-pool ------------------------------------------------------------------------------------------------------------


def run_pool(
    kernels: Kernels,
    math: str,
    x: Tensor,
    pool: Pool,
    src_layout: str,
    dst_layout: str,
    *,
    bias: Tensor | None = None,
    has_relu: bool = False,
    unit: int = 1,
    offset: int = 0,
) -> Tensor:
    """float64 in, the kernel's elements out."""
    __tracebackhide__ = True
    dtype = DTYPES[math]
    src = Region.of(x, strides_of(src_layout, x.shape, unit), dtype, offset)
    shape = (*x.shape[:2], *pool(torch.zeros(1, 1, *x.shape[2:])).shape[2:])
    dst = Region(shape, strides_of(dst_layout, shape, unit), dtype, offset)
    bias_region = Region.of(bias, None, dtype, offset) if bias is not None else None
    args = MaxPoolArgs(
        src=src.pointer,
        bias=bias_region.pointer if bias_region else None,
        dst=dst.pointer,
        batch=x.shape[0],
        channels=x.shape[1],
        h_in=x.shape[2],
        w_in=x.shape[3],
        h_out=shape[2],
        w_out=shape[3],
        pool_h=pool.kernel[0],
        pool_w=pool.kernel[1],
        pool_stride_h=pool.stride[0],
        pool_stride_w=pool.stride[1],
        pool_top=pool.padding[0],
        pool_left=pool.padding[1],
        has_relu=has_relu,
    )
    for name, region in (("src", src), ("dst", dst)):
        for axis, stride in zip(("image", "c", "h", "w"), region.strides, strict=True):
            setattr(args, f"{name}_{axis}_stride", stride)
    kernels.pool(math, args)
    dst.assert_gaps_are_untouched()
    return dst.tensor.clone()


POOL_WINDOWS = (
    Pool((2, 2), (2, 2)),
    Pool((3, 3), (2, 2), (1, 1)),
    Pool((3, 3), (2, 2), is_ceil=True),
    Pool((3, 2), (2, 3), (1, 1), is_ceil=True),
    Pool((5, 3), (1, 2), (2, 0)),
    Pool((1, 3), (1, 1), (0, 1)),
    Pool((1, 1), (1, 1)),
    Pool((1, 1), (2, 3)),
)
# Layouts of src and dst; whether channels and gaps come in 16 bytes or in elements; the offset in those, or None: one
# element.
POOL_ROUTES = {
    "vector": ("nhwc", "nhwc", True, 0),
    "vector slices": ("slice", "slice", True, 1),
    "odd channels": ("nhwc", "nhwc", False, 0),
    "odd channels of aligned pixels": ("pitched", "pitched", False, 0),
    "misaligned": ("nhwc", "nhwc", True, None),
    "slices": ("slice", "slice", False, 1),
    "nchw": ("nchw", "nchw", False, 3),
    "nchw to nhwc": ("cropped", "nhwc", False, 0),
    "nhwc to nchw": ("nhwc", "cropped", True, 0),
    "steps to columns": ("steps", "columns", False, 1),
}
pool_maths = pytest.mark.parametrize("math", ["f32", "f16", "bf16"])


@pool_maths
@pytest.mark.parametrize("route", POOL_ROUTES)
def test_max_pool(kernels: Kernels, math: str, route: str) -> None:
    src_layout, dst_layout, is_aligned, offset = POOL_ROUTES[route]
    count = 16 // DTYPES[math].itemsize
    unit = count if is_aligned else 1
    channels = 3 * count if is_aligned else 2 * count + 3
    options = {"unit": unit, "offset": 1 if offset is None else offset * unit}
    for i, pool in enumerate(POOL_WINDOWS):
        x = torch.randn(2, channels, 7, 9).to(DTYPES[math]).double()
        kernels.seed(i)
        assert_same(run_pool(kernels, math, x, pool, src_layout, dst_layout, **options), pool(x))

        bias = integers(channels) / 2
        for has_bias, has_relu in ((True, True), (True, False), (False, True)):
            x = integers(2, channels, 7, 9) - 2
            expected = x + bias[:, None, None] if has_bias else x
            expected = pool(torch.relu(expected) if has_relu else expected)
            actual = run_pool(
                kernels,
                math,
                x,
                pool,
                src_layout,
                dst_layout,
                bias=bias if has_bias else None,
                has_relu=has_relu,
                **options,
            )
            assert_same(actual, expected)
            assert not (has_relu and actual.signbit().any())


@pool_maths
@pytest.mark.parametrize("route", ["vector", "nchw", "odd channels"])
def test_max_pool_special_values(kernels: Kernels, math: str, route: str) -> None:
    """NaN wins and stays, of equals the first: compared in bits, but for those of a NaN."""
    src_layout, dst_layout, is_aligned, _ = POOL_ROUTES[route]
    unit = 16 // DTYPES[math].itemsize if is_aligned else 1
    channels = 2 * unit if is_aligned else 3
    nan, inf = float("nan"), float("inf")
    rng = random.Random(route)
    for pool in POOL_WINDOWS:
        for specials, count in (
            ((nan, inf, -inf, -0.0), 40),
            ((0.0, -0.0), 2000),
            ((-inf,), 2000),
            ((nan,), 9),
            ((-inf, nan), 2000),
        ):
            x = integers(2, channels, 7, 9)
            plant(x, rng, specials, count)
            expected = pool(x).to(DTYPES[math])
            actual = run_pool(kernels, math, x, pool, src_layout, dst_layout, unit=unit)
            assert_same(actual, expected)
            is_number = ~expected.isnan()
            assert torch.equal(actual.signbit()[is_number], expected.signbit()[is_number])

            bias = integers(channels)
            bias[:2] = torch.tensor([inf, -0.0])
            expected = pool(torch.relu(x + bias[:, None, None]))
            actual = run_pool(kernels, math, x, pool, src_layout, dst_layout, unit=unit, bias=bias, has_relu=True)
            assert_same(actual, expected)
            assert not actual[actual == 0].signbit().any()


@pool_maths
def test_max_pool_of_many_elements(kernels: Kernels, math: str) -> None:
    """More than one block, with a tail."""
    x = torch.randn(3, 24, 11, 13).to(DTYPES[math]).double()
    pool = Pool((3, 3), (1, 1), (1, 1))
    for layouts, unit in ((("nhwc", "nhwc"), 8), (("nchw", "nchw"), 1)):
        kernels.seed(unit)
        assert_same(run_pool(kernels, math, x, pool, *layouts, unit=unit), pool(x))


@pytest.mark.parametrize("math", ["f16", "bf16"])
def test_max_pool_far_apart(kernels: Kernels, math: str) -> None:
    for layout, channels in (("far images", 8), ("far channels", 3)):
        x = integers(2, channels, 4, 5)
        assert_same(run_pool(kernels, math, x, Pool(), layout, layout), Pool()(x))


def test_max_pool_with_more_elements_than_threads(kernels: Kernels) -> None:
    """65536 blocks of 256 threads, and then some."""
    x = torch.randint(-100, 101, (1, 1, 4097, 4097), dtype=torch.int8).double()
    kernels.seed(0)
    assert torch.equal(run_pool(kernels, "f16", x, Pool((1, 1), (1, 1)), "nchw", "nchw").double(), x)
