"""The CUDA conv, pool and pack kernels on the emulated grid, called through ctypes; convolutions in any layout.

All memory is poisoned with NaNs around and between the elements of a tensor, and must still be after a launch.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from emulation.build import compile_emulated
from emulation.finish import Epilogue, Finish
from emulation.regions import Region, strides_of
from torch import Tensor
from torch.nn import functional as F

FAMILY = ("conv_pool_f32", "conv_pool_tf32", "conv_pool_f16", "conv_pool_bf16", "max_pool", "pack")
SOURCES = ("tests/emulation/conv_harness.cpp", *(f"csrc/kernels/cuda/{name}.cu" for name in FAMILY))

# The kinds of arithmetic, in the order of kernels.h.
MATHS = ("f32", "tf32", "f16", "bf16")
DTYPES = {"f32": torch.float32, "tf32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
Row = tuple[str, str, str]  # arithmetic, tile, route
ROWS: tuple[Row, ...] = tuple(itertools.product(MATHS, ("128x64", "128x32", "32x32"), ("vector", "gather")))


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
        ("finish", Finish),
        ("pack", PackArgs),
    ]


class MaxPoolArgs(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "src bias dst"),
        *fields(ctypes.c_int, "batch channels h_in w_in h_out w_out"),
        *fields(ctypes.c_int64, "src_image_stride src_c_stride src_h_stride src_w_stride"),
        *fields(ctypes.c_int64, "dst_image_stride dst_c_stride dst_h_stride dst_w_stride"),
        *fields(
            ctypes.c_int, "pool_h pool_w pool_stride_h pool_stride_w pool_top pool_left has_relu finished_channels"
        ),
        ("finish", Finish),
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
SRC_LAYOUTS = {
    "gather": ("nchw", "nhwc", "cropped", "steps", "columns", "slice"),
    "vector": ("nhwc", "slice", "nhwc columns"),
}


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
    has_norm: bool = False
    kind: str = "none"  # an activation other than ReLU
    is_after_pool: bool = False  # that
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

    def finish(self, sums: Tensor, bias: Tensor | None, epilogue: Epilogue | None = None) -> Tensor:
        x = sums if bias is None else sums + bias[:, None, None]
        if epilogue is None:
            x = torch.relu(x) if self.has_relu else x
            return self.pool(x) if self.pool else x
        x = epilogue.norm(x)
        if self.pool and self.is_after_pool:
            return epilogue.activate(self.pool(x))
        x = epilogue.activate(x)
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
    epilogue: Epilogue | None = None  # where bias and ReLU are not all of it


def make_values(problem: Problem, dtype: torch.dtype, make: Callable[..., Tensor]) -> Values:
    def exact(*shape: int) -> Tensor:
        return make(*shape).to(dtype).double()

    return Values(
        exact(problem.batch, problem.c_in, *problem.size),
        exact(problem.c_out, problem.c_in, *problem.kernel),
        exact(problem.c_out) if problem.has_bias else None,
        make_epilogue(problem),
    )


def make_epilogue(problem: Problem) -> Epilogue | None:
    kind = "relu" if problem.has_relu and problem.kind == "none" else problem.kind
    epilogue = Epilogue.make(problem.c_out, kind, problem.has_norm, is_affine=problem.batch != 3)
    return epilogue if epilogue.is_used else None


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
        has_relu=problem.has_relu and not values.epilogue,
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
    finishing: list[Region] = []
    if values.epilogue:
        args.finish = values.epilogue.struct(placed_in(finishing, dtype, problem.offset), problem.is_after_pool)

    inputs = [region.bits for region in (src_region, weight_region) if region.is_poisoned]
    before = [bits.clone() for bits in inputs]
    kernels.conv(row, args)
    assert all(torch.equal(*bits) for bits in zip(before, inputs, strict=True))
    dst.assert_gaps_are_untouched()
    padding = dst.tensor[:, problem.c_out :]
    assert (padding == 0).all() and not padding.signbit().any()
    return dst.tensor[:, : problem.c_out].clone()


def placed_in(regions: list[Region], dtype: torch.dtype, offset: int) -> Callable[[Tensor], int]:
    """A function that puts tensors into regions, which it appends, and gives their addresses."""

    def place(tensor: Tensor) -> int:
        regions.append(Region.of(tensor, None, dtype, offset))
        return regions[-1].pointer

    return place


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
    expected = problem.finish(problem.sums(values.src, values.weight), values.bias, values.epilogue)
    assert_same(run(kernels, row, problem, values), expected)


def plant(values: Tensor, rng: random.Random, specials: Sequence[float], count: int) -> None:
    for _ in range(count):
        values.view(-1)[rng.randrange(values.numel())] = rng.choice(specials)
