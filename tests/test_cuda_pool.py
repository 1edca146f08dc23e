"""The CUDA max-pool kernels on the emulated grid, by themselves: every row of their table, against torch."""

from __future__ import annotations

import random

import pytest
import torch
from emulation.conv_kernels import DTYPES, Kernels, MaxPoolArgs, Pool, assert_same, integers, placed_in, plant
from emulation.finish import Epilogue
from emulation.regions import Region, strides_of
from torch import Tensor

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


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


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
    epilogue: Epilogue | None = None,
    is_after_pool: bool = False,
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
    regions: list[Region] = []
    if epilogue:
        args.finish = epilogue.struct(placed_in(regions, dtype, offset), is_after_pool)
        args.finished_channels = len(epilogue.mean) if epilogue.mean is not None else x.shape[1]
    for name, region in (("src", src), ("dst", dst)):
        for axis, stride in zip(("image", "c", "h", "w"), region.strides, strict=True):
            setattr(args, f"{name}_{axis}_stride", stride)
    kernels.pool(math, args)
    dst.assert_gaps_are_untouched()
    return dst.tensor.clone()


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
@pytest.mark.parametrize("route", ["vector", "nchw", "odd channels", "nchw to nhwc"])
def test_max_pool_of_finished_values(kernels: Kernels, math: str, route: str) -> None:
    """A BatchNorm in front of the pool, an activation there or behind it, and channels that stay zero."""
    src_layout, dst_layout, is_aligned, _ = POOL_ROUTES[route]
    unit = 16 // DTYPES[math].itemsize if is_aligned else 1
    channels = 2 * unit if is_aligned else 11
    for i, pool in enumerate(POOL_WINDOWS):
        x = integers(2, channels, 7, 9)
        plant(x, random.Random(i), (float("nan"), float("inf"), -float("inf"), -0.0), 9)
        kind = ("prelu", "hardtanh", "leaky_relu", "relu", "none")[i % 5]
        count = channels - i % 3
        epilogue = Epilogue.make(count, kind, has_norm=i % 5 != 2 or count < channels, is_affine=i != 3, seed=i)
        bias = integers(channels) if i % 2 else None
        shifted = x[:, :count] if bias is None else (x + bias[:, None, None])[:, :count]
        for is_after_pool in (False, True):
            values = epilogue.norm(shifted)
            expected = torch.zeros(pool(x).shape).double()
            expected[:, :count] = epilogue.activate(pool(values)) if is_after_pool else pool(epilogue.activate(values))
            actual = run_pool(
                kernels,
                math,
                x,
                pool,
                src_layout,
                dst_layout,
                bias=bias,
                epilogue=epilogue,
                is_after_pool=is_after_pool,
                unit=unit,
            )
            assert_same(actual, expected)


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
