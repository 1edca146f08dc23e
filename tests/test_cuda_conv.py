"""The CUDA convolution kernels on the emulated grid: every row of their tables, against torch in float64.

Here with integers, whose sums are exact: shapes, windows, layouts, orders of threads. Other values are in
test_cuda_conv_values.py, copies of weights in test_cuda_pack.py, pools alone in test_cuda_pool.py.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import random

import pytest
import torch
from emulation.conv_kernels import (
    DTYPES,
    MATHS,
    NO_PADDING,
    REGISTERS,
    ROWS,
    ConvPoolArgs,
    Kernels,
    MaxPoolArgs,
    PackArgs,
    PackJob,
    Pool,
    Problem,
    Row,
    check_integers,
    make_values,
    run,
)

DST_LAYOUTS = ("nchw", "nhwc", "cropped", "slice", "even slice", "steps", "columns")


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_structs_are_as_in_kernels_h(kernels: Kernels) -> None:
    layout = (ctypes.c_int64 * 8)()
    kernels.library.fastseq_conv_layout(layout)
    structs = (PackJob, "samples"), (PackArgs, "element_bytes"), (ConvPoolArgs, "pack"), (MaxPoolArgs, "finish")
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
    "norm": Problem(c_in=20, c_out=33, has_norm=True, dst="nhwc", zeros=3),
    "norm, no bias, no relu": Problem(c_in=4, c_out=65, has_bias=False, has_relu=False, has_norm=True, offset=1),
    "norm without weights": Problem(batch=3, c_in=3, c_out=7, size=(5, 5), has_norm=True),
    "norm, registers": Problem(size=(9, 12), c_in=4, c_out=33, has_norm=True, pool=REGISTERS, dst="nhwc", zeros=2),
    "norm, shared": Problem(
        c_in=4, size=(8, 9), has_norm=True, pool=Pool((3, 2), (2, 2), (1, 1), True, tile=(1, 3)), dst="columns"
    ),
    "norm, slopes behind registers": Problem(
        size=(8, 12), c_out=30, has_relu=False, has_norm=True, kind="prelu", pool=REGISTERS, is_after_pool=True
    ),
    "slope in front of registers": Problem(c_in=4, size=(8, 9), c_out=7, kind="leaky_relu", pool=REGISTERS, dst="nhwc"),
    "clamp behind shared": Problem(
        size=(11, 9), c_out=33, kind="hardtanh", is_after_pool=True, pool=Pool((3, 3), (2, 2), tile=(2, 2))
    ),
    "norm, slopes in front of shared": Problem(
        c_in=4, c_out=6, has_norm=True, kind="prelu", pool=Pool((3, 3), (1, 1), (1, 1), tile=(1, 4)), dst="slice"
    ),
    "norm, clamp, linear": Problem(
        batch=130, c_in=30, c_out=65, size=(1, 1), kernel=(1, 1), padding=NO_PADDING, has_norm=True, kind="hardtanh"
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
        has_norm=rng.random() < 0.3,
        kind=rng.choice(["none", "none", "leaky_relu", "prelu", "hardtanh"]),
        is_after_pool=rng.random() < 0.5,
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
