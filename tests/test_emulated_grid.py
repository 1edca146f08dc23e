"""The emulated grid itself: primitives give what the PTX ISA says, and planted faults are noticed."""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from emulation.build import compile_emulated
from numpy.typing import NDArray

Array = NDArray[Any]

SEEDS = range(5)
SOURCES = ("tests/emulation/fault_kernels.cpp", "tests/emulation/engine_emulated.cpp", "csrc/kernels/cuda/names.cpp")
H200 = (9, 0, 132, 227 * 1024, 60 << 20)


class Grid:
    """The library, and launches on arrays."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(compile_emulated(SOURCES, "fault_kernels")))
        self.library.fastseq_test_launch.restype = ctypes.c_char_p
        self.library.fastseq_test_prepare.restype = ctypes.c_char_p
        self.library.fastseq_emulation_launches.restype = ctypes.c_char_p

    def seed(self, seed: int) -> None:
        self.library.fastseq_emulation_seed(ctypes.c_uint64(seed))

    def device(self, *properties: int) -> None:
        self.library.fastseq_emulation_device(*properties[:4], ctypes.c_int64(properties[4]))

    def reset(self) -> None:
        self.seed(1)
        self.device(*H200)
        self.library.fastseq_emulation_reset()

    def launches(self) -> list[dict[str, Any]]:
        return json.loads(self.library.fastseq_emulation_launches())

    def prepare(self, kernel: str, shared_bytes: int) -> str | None:
        error = self.library.fastseq_test_prepare(kernel.encode(), shared_bytes)
        return error.decode() if error else None

    def error(
        self,
        kernel: str,
        a: Array,
        c: Array,
        b: Array | None = None,
        *,
        blocks: int = 1,
        threads: int = 32,
        shared_bytes: int = 0,
        n: int = 0,
        variant: int = 0,
    ) -> str | None:
        """Launches, writes to `c`, and returns the text of the error if there is one."""
        pointers = [ctypes.c_void_p(x.ctypes.data if x is not None else None) for x in (a, b, c)]
        error = self.library.fastseq_test_launch(kernel.encode(), blocks, threads, shared_bytes, *pointers, n, variant)
        return error.decode() if error else None

    def run(self, kernel: str, a: Array, c: Array, b: Array | None = None, **options: int) -> Array:
        """Launches and returns a copy of `c` after it. There must be no error."""
        c = c.copy()
        assert self.error(kernel, a, c, b, **options) is None
        return c


@pytest.fixture(scope="session")
def compiled() -> Grid:
    return Grid()


@pytest.fixture
def grid(compiled: Grid) -> Iterator[Grid]:
    compiled.reset()
    yield compiled
    compiled.reset()


def words(*shape: int) -> Array:
    return np.random.default_rng(0).integers(0, 1 << 32, shape, dtype=np.uint32)


# Threads -------------------------------------------------------------------------------------------------------------


def test_seeds_permute_blocks_warps_and_lanes(grid: Grid) -> None:
    def order(seed: int) -> Array:
        grid.seed(seed)
        return grid.run("order", words(1), np.zeros(1 + 6 * 64, np.int32), blocks=6, threads=64)[1:]

    assert np.array_equal(order(0), np.arange(6 * 64))
    assert np.array_equal(order(7), order(7))
    several = [order(seed) for seed in range(1, 9)]
    for ranks in several:
        assert np.array_equal(np.sort(ranks), np.arange(6 * 64))
    blocks = [ranks.reshape(6, 64).argsort(0)[:, 0].tolist() for ranks in several]
    assert len({tuple(b) for b in blocks}) > 3
    assert len({bool(ranks[0] < ranks[32]) for ranks in several}) == 2
    assert len({bool(ranks[0] < ranks[1]) for ranks in several}) == 2


REVERSE = {"blocks": 3, "threads": 64, "shared_bytes": 256}


def reverse_problem() -> tuple[Array, Array, Array]:
    """Source, destination, and what is to be in it."""
    a = np.arange(3 * 64, dtype=np.int32)
    return a, np.full_like(a, -7), a.reshape(3, 64)[:, ::-1].reshape(-1)


def test_block_barrier(grid: Grid) -> None:
    a, c, expected = reverse_problem()
    for seed in SEEDS:
        grid.seed(seed)
        assert np.array_equal(grid.run("reverse", a, c, **REVERSE), expected)


def test_missing_block_barrier(grid: Grid) -> None:
    a, c, expected = reverse_problem()
    for seed in SEEDS:
        grid.seed(seed)
        actual = grid.run("reverse", a, c, **REVERSE, variant=1)
        assert (actual == expected).sum() == expected.size // 2
        assert (actual == -1).sum() == expected.size // 2  # poison


@pytest.mark.parametrize(
    ("variant", "parts"),
    [
        (2, ["divergence; thread 0 and 62 more: at block_barrier (fault_kernels.cpp:", "; thread 5: exited"]),
        (3, ["block_barrier (fault_kernels.cpp:", ": divergence, other threads wait at block_barrier ("]),
        (4, ["divergence; thread 0 and 39 more: at block_barrier", "; thread 40 and 23 more: exited"]),
        (5, ["divergence; thread 0 and 62 more: at block_barrier", "; thread 33: at warp_barrier"]),
        (6, ["thread ", "exception: thrown by a kernel"]),
        (7, ["written at offset 256 of 256 bytes of shared memory"]),
        (8, ["written at offset -4 of 256 bytes of shared memory"]),
    ],
    ids=["some", "two", "left", "warp", "exception", "after", "before"],
)
def test_faults_of_a_block(grid: Grid, variant: int, parts: list[str]) -> None:
    a, c, expected = reverse_problem()
    for seed in SEEDS:
        grid.seed(seed)
        error = grid.error("reverse", a, c, **REVERSE, variant=variant)
        assert error is not None and error.startswith("block (")
        assert all(part in error for part in parts), error
    assert np.array_equal(grid.run("reverse", a, c, **REVERSE), expected)  # the next launch is not affected


def test_warp_barrier(grid: Grid) -> None:
    a = np.arange(96, dtype=np.int32)

    def run(n: int, variant: int) -> list[list[int]]:
        results = []
        for seed in SEEDS:
            grid.seed(seed)
            options = {"threads": 96, "shared_bytes": 384, "n": n, "variant": variant}
            results.append(grid.run("exchange", a, np.zeros_like(a), **options).tolist())
        return results

    assert run(5, 0) == [[(i ^ 1) + 5 for i in range(96)]] * len(SEEDS)
    assert len({tuple(result) for result in run(5, 1)}) > 1  # a missing barrier: seeds do not agree


# Warps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 16, 31])
def test_shuffles_and_votes(grid: Grid, n: int) -> None:
    a = np.random.default_rng(n).standard_normal(96).astype(np.float32).view(np.uint32)
    lanes = np.arange(96)
    vote = [sum(1 << i for i in range(32) if value[i] & 1) for value in a.reshape(3, 32)]
    expected = np.stack([a[lanes ^ n], a[lanes ^ n], a[lanes // 32 * 32 + (lanes + n) % 32], np.repeat(vote, 32)], 1)
    for seed in SEEDS:
        grid.seed(seed)
        actual = grid.run("talk", a, np.zeros((96, 4), np.uint32), threads=96, n=n)
        assert np.array_equal(actual, expected)


def test_faults_of_a_warp(grid: Grid) -> None:
    a, c = words(96), np.zeros((96, 4), np.uint32)
    for seed in SEEDS:
        grid.seed(seed)
        error = grid.error("talk", a, c, threads=96, n=1, variant=1) or ""
        assert "divergence, other lanes wait at" in error and "ballot (" in error and "shfl_xor (" in error, error
        error = grid.error("talk", a, c, threads=96, n=1, variant=2) or ""
        assert "thread 0 and 30 more: at shfl_xor" in error and "thread 9" in error, error
        error = grid.error("talk", a, c, threads=48, n=1) or ""
        assert "the warp has 16 lanes" in error, error
        error = grid.error("talk", a, c, n=32) or ""
        assert "there is no lane" in error, error


# Tensor cores --------------------------------------------------------------------------------------------------------
# From "Warp Level Matrix Multiply-Accumulate Instructions" of the PTX ISA: row and column of element i of a lane's
# fragment, with group = lane // 4 and t = lane % 4.

MMA_16 = {
    "a": (8, lambda group, t, i: (group + 8 * (i in (2, 3, 6, 7)), 2 * t + (i & 1) + 8 * (i >= 4))),
    "b": (4, lambda group, t, i: (2 * t + (i & 1) + 8 * (i >= 2), group)),
    "c": (4, lambda group, t, i: (group + 8 * (i >= 2), 2 * t + (i & 1))),
}
MMA_8 = {
    "a": (4, lambda group, t, i: (group + 8 * (i in (1, 3)), t + 4 * (i >= 2))),
    "b": (2, lambda group, t, i: (t + 4 * i, group)),
    "c": MMA_16["c"],
}
FORMATS = {
    "f16": (MMA_16, 16, torch.float16, 2.0**-11),
    "bf16": (MMA_16, 16, torch.bfloat16, 2.0**-8),
    "tf32": (MMA_8, 8, torch.float32, 2.0**-10),
}


def fragments(matrix: Array, fragment: tuple[int, Any]) -> Array:
    """The elements of each lane, (32, elements)."""
    count, place = fragment
    return np.array([[matrix[place(lane // 4, lane % 4, i)] for i in range(count)] for lane in range(32)], matrix.dtype)


def registers(matrix: Array, fragment: tuple[int, Any], dtype: torch.dtype) -> Array:
    """The same in 32-bit registers."""
    elements = torch.from_numpy(fragments(matrix.astype(np.float32), fragment)).to(dtype)
    return elements.view(torch.int32).numpy().view(np.uint32)


def multiply(grid: Grid, name: str, a: Array, b: Array, c: Array, n: int = 1, variant: int = 0) -> Array:
    """a @ b + c, n times, of the elements as they are after conversion."""
    maps, _, dtype, _ = FORMATS[name]
    d = fragments(c.astype(np.float32), maps["c"])
    a, b = registers(a, maps["a"], dtype), registers(b, maps["b"], dtype)
    d = grid.run(f"multiply_{name}", a, d, b, n=n, variant=variant)
    result = np.full((16, 8), np.nan)
    count, place = maps["c"]
    for lane in range(32):
        for i in range(count):
            result[place(lane // 4, lane % 4, i)] = d[lane, i]
    return result


@pytest.mark.parametrize("name", FORMATS)
def test_mma(grid: Grid, name: str) -> None:
    _, k, _, _ = FORMATS[name]
    random = np.random.default_rng(0)
    a, b, c = (random.integers(-8, 9, shape).astype(np.float64) for shape in ((16, k), (k, 8), (16, 8)))
    for seed in SEEDS:
        grid.seed(seed)
        assert np.array_equal(multiply(grid, name, a, b, c), a @ b + c)
        assert np.array_equal(multiply(grid, name, a, b, c, n=3), 3 * (a @ b) + c)
    assert not np.array_equal(multiply(grid, name, a, b, c, variant=1), a @ b + c)  # registers of b swapped
    for row, column in ((0, 0), (15, k - 1), (9, 3)):
        one = np.zeros((16, k))
        one[row, column] = 1
        assert np.array_equal(multiply(grid, name, one, b, c), one @ b + c)


@pytest.mark.parametrize("name", FORMATS)
def test_mma_rounds_sums_only(grid: Grid, name: str) -> None:
    _, k, dtype, _ = FORMATS[name]
    random = np.random.default_rng(1)
    a, b, c = (random.standard_normal(shape).astype(np.float32) for shape in ((16, k), (k, 8), (16, 8)))
    exact = [torch.from_numpy(x).to(dtype).double().numpy() for x in (a, b)]
    if name == "tf32":
        exact = [(x.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32).astype(np.float64) for x in (a, b)]
        assert np.abs(multiply(grid, name, a, b, c) - (a.astype(np.float64) @ b + c)).max() > 1e-3  # bits are ignored
    scale = np.abs(exact[0]) @ np.abs(exact[1]) + np.abs(c)
    assert (np.abs(multiply(grid, name, a, b, c) - (exact[0] @ exact[1] + c)) <= 2.0**-23 * k * scale).all()


@pytest.mark.parametrize("name", FORMATS)
def test_mma_of_special_values(grid: Grid, name: str) -> None:
    _, k, _, _ = FORMATS[name]
    a, b, c = np.ones((16, k)), np.ones((k, 8)), np.zeros((16, 8))
    a[3, 1], a[4, 2], b[5, 6] = np.nan, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        expected = a @ b
    np.testing.assert_array_equal(multiply(grid, name, a, b, c), expected)


# Shared memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4])
def test_ldmatrix(grid: Grid, n: int) -> None:
    matrices = words(4, 8, 4)
    expected = np.zeros((32, 4), np.uint32)
    for lane in range(32):
        expected[lane, :n] = matrices[:n, lane // 4, lane % 4]
    options = {"shared_bytes": 512, "n": n}
    for seed in SEEDS:
        grid.seed(seed)
        assert np.array_equal(grid.run("load_matrices", matrices, np.zeros_like(expected), **options), expected)
    error = grid.error("load_matrices", matrices, np.zeros_like(expected), **options, variant=1) or ""
    assert f"ldmatrix_x{n} (" in error and "offset 104 in shared memory is not aligned to 16 bytes" in error
    error = grid.error("load_matrices", matrices, np.zeros_like(expected), **options, variant=2) or ""
    assert "offset 608 is not in the 512 bytes of shared memory" in error
    error = grid.error("load_matrices", matrices, np.zeros_like(expected), **options, variant=3)
    assert (error is None) == (n == 2)  # x2 does not look at lane 20


WIDTHS = [16, 8, 4]


def pipeline(grid: Grid, width: int, rows: int, fault: int = 0) -> tuple[str | None, Array, Array]:
    """The error, the sums, and what they should be."""
    threads = 64
    a = words(rows, threads, width // 4)
    c = np.zeros((threads, width // 4), np.uint32)
    options = {"threads": threads, "shared_bytes": 3 * threads * width, "n": rows, "variant": fault}
    error = grid.error(f"pipeline_{width}", a, c, **options)
    return error, c, np.roll(a.sum(0, dtype=np.uint32), -1, 0)


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("width", WIDTHS)
def test_cp_async(grid: Grid, width: int, rows: int) -> None:
    for seed in SEEDS:
        grid.seed(seed)
        error, actual, expected = pipeline(grid, width, rows)
        assert error is None and np.array_equal(actual, expected)


@pytest.mark.parametrize("fault", [1, 2, 3, 4, 8], ids=["no wait", "short", "no barrier", "no commit", "early refill"])
@pytest.mark.parametrize("width", WIDTHS)
def test_cp_async_that_is_not_waited_for(grid: Grid, width: int, fault: int) -> None:
    for seed in SEEDS:
        grid.seed(seed)
        error, actual, expected = pipeline(grid, width, 7, fault)
        assert error is None and not np.array_equal(actual, expected)


@pytest.mark.parametrize("width", WIDTHS)
def test_cp_async_addresses(grid: Grid, width: int) -> None:
    def error(fault: int) -> str:
        text = pipeline(grid, width, 7, fault)[0] or ""
        assert f"cp_async_{width} (fault_kernels.cpp:" in text
        return text

    assert f"is not aligned to {width} bytes" in error(5)
    assert f"is not in the {3 * 64 * width} bytes of shared memory" in error(6)
    assert "the source is not global memory" in error(7)


# Memory --------------------------------------------------------------------------------------------------------------


def test_tail(grid: Grid) -> None:
    a = np.arange(128, dtype=np.int32)
    expected = np.where(a < 77, a + 1, -1)
    for variant in range(3):
        actual = grid.run("increment", a, np.full_like(a, -1), blocks=2, threads=64, n=77, variant=variant)
        assert (actual != expected).sum() == (variant != 0)


def test_misaligned_vector(grid: Grid) -> None:
    a, c = np.arange(132, dtype=np.uint32), np.zeros((32, 4), np.uint32)
    assert a.ctypes.data % 16 == 0
    assert np.array_equal(grid.run("load_vector", a, c, n=4).reshape(-1), a[4:])
    assert "misaligned address, only a multiple of 8 bytes" in (grid.error("load_vector", a, c, n=2) or "")


def test_limits(grid: Grid) -> None:
    a, c, _ = reverse_problem()

    def error(shared_bytes: int, threads: int = 64) -> str | None:
        return grid.error("reverse", a, c, threads=threads, shared_bytes=shared_bytes)

    assert error(48 * 1024) is None
    assert error(48 * 1024 + 4) == "launch: 49156 bytes of shared memory, prepared for 0"
    assert grid.prepare("reverse", 64 * 1024) is None
    assert error(64 * 1024) is None
    assert error(64 * 1024 + 4) == "launch: 65540 bytes of shared memory, prepared for 65536"
    assert grid.prepare("reverse", 227 * 1024) is None
    assert error(227 * 1024) is None
    assert error(227 * 1024 + 4) == "launch: 232452 bytes of shared memory, a block has 232448"
    assert grid.prepare("reverse", 227 * 1024 + 4) == "prepare: 232452 bytes of shared memory, a block has 232448"
    assert error(256, threads=1056) == "launch: blocks of 1056 threads"
    assert grid.error("reverse", a, c, blocks=0) == "launch: a grid of 0 x 1 x 1 blocks"

    grid.device(7, 5, 40, 64 * 1024, 4 << 20)
    assert error(100 * 1024) == "launch: 102400 bytes of shared memory, a block has 65536"


def test_log_of_launches(grid: Grid) -> None:
    a, c, _ = reverse_problem()
    grid.run("reverse", a, c, **REVERSE)
    grid.error("reverse", a, c, threads=0)
    (launch,) = grid.launches()
    assert launch.pop("switches") >= 2 * 3 * 64
    launch.pop("prepared")
    kernel = "fastseq::cuda::reverse(fastseq::cuda::TestArgs)"
    assert launch == {"kernel": kernel, "grid": [3, 1, 1], "threads": 64, "shared_bytes": 256}
    grid.run("increment", a, c, threads=64, n=1)  # no other test prepares this one
    assert grid.prepare("increment", 0) is None
    grid.run("increment", a, c, threads=64, n=1)
    assert [launch["prepared"] for launch in grid.launches()[1:]] == [False, True]


# Elements ------------------------------------------------------------------------------------------------------------


def convert(grid: Grid, variant: int, a: Array, dtype: Any, b: Array | None = None) -> Array:
    a = np.ascontiguousarray(a)
    c = np.zeros(a.size, dtype)
    return grid.run("convert", a, c, b, blocks=(a.size + 255) // 256, threads=256, n=a.size, variant=variant)


def assert_same_bits(actual: Array, expected: Array) -> None:
    """NaN is equal to any NaN."""
    both_nan = np.isnan(actual) & np.isnan(expected)
    bits = {2: np.uint16, 4: np.uint32}[actual.itemsize]
    assert ((actual.view(bits) == expected.view(bits)) | both_nan).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_to_float(grid: Grid, dtype: torch.dtype) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(every.view(np.int16)).view(dtype).float().numpy()
    assert_same_bits(convert(grid, int(dtype is torch.bfloat16), every, np.float32), expected)


def interesting_floats(dtype: torch.dtype) -> Array:
    """All of `dtype`, the middle between each two and its neighbours, and any bits."""
    every = torch.from_numpy(np.arange(0x8000, dtype=np.int16)).view(dtype).float().numpy()
    every = every[np.isfinite(every)]
    every = every.astype(np.float64)
    beyond = 2 * every[-1] - every[-2]  # what would come after the largest
    ties = ((every + np.append(every[1:], beyond)) / 2).astype(np.float32)
    with np.errstate(over="ignore"):
        near = [np.nextafter(ties, np.float32(to)) for to in (0, np.inf)]
    positive = np.concatenate([every.astype(np.float32), ties, *near, np.float32([np.inf, np.nan, 3e38, 1e-45])])
    return np.concatenate([positive, -positive, words(200_000).view(np.float32)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_from_float(grid: Grid, dtype: torch.dtype) -> None:
    values = interesting_floats(dtype)
    expected = torch.from_numpy(values).to(dtype)
    actual = convert(grid, 2 + int(dtype is torch.bfloat16), values, np.int16)
    both_nan = torch.from_numpy(actual).view(dtype).isnan() & expected.isnan()
    assert (both_nan | (torch.from_numpy(actual) == expected.view(torch.int16))).all()


def test_to_tf32(grid: Grid) -> None:
    values = np.concatenate([words(200_000).view(np.float32), np.float32([0, np.inf, np.nan, 1e-45, 1, 3.4028235e38])])
    ties = (words(1000) & ~np.uint32(0x1FFF) | np.uint32(0x1000)).view(np.float32)
    with np.errstate(invalid="ignore"):
        near = [np.nextafter(ties, np.float32(to)) for to in (0, np.inf)]
    values = np.concatenate([values, -values, ties, *near])
    actual = convert(grid, 4, values, np.float32)
    assert (np.isnan(actual) == np.isnan(values)).all()
    values, actual = values[~np.isnan(values)], actual[~np.isnan(values)]
    assert (actual.view(np.uint32) & 0x1FFF == 0).all()
    # 11 significant bits, the last of subnormals at 2^-136; halves go away from zero.
    finite = values[np.isfinite(values)].astype(np.float64)
    unit = np.ldexp(1.0, np.maximum(np.frexp(finite)[1] - 11, -136))
    with np.errstate(over="ignore"):
        expected = (np.sign(finite) * np.floor(np.abs(finite) / unit + 0.5) * unit).astype(np.float32)
    assert np.array_equal(actual[np.isfinite(values)], expected)
    assert np.array_equal(actual[np.isinf(values)], values[np.isinf(values)])


def test_max_nan_and_relu(grid: Grid) -> None:
    some = np.float32([0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3])
    a, b = (x.reshape(-1).copy() for x in np.meshgrid(some, some))
    expected = torch.maximum(torch.from_numpy(a), torch.from_numpy(b)).numpy().copy()
    expected[(a == 0) & (b == 0) & (np.signbit(a) != np.signbit(b))] = 0.0
    assert_same_bits(convert(grid, 5, a, np.float32, b), expected)
    assert_same_bits(convert(grid, 6, some, np.float32), np.where(some <= 0, np.float32(0), some))


def test_fused_multiply_add(grid: Grid) -> None:
    a = np.float32([1 + 2**-12, 3, -1])
    b = np.float32([-1 + 2**-12, 5, 1])
    assert np.array_equal(convert(grid, 7, a, np.float32, b), np.float32([2.0**-24, 16, 0]))


# Speed ---------------------------------------------------------------------------------------------------------------


def measure() -> None:
    """What switches and collectives cost: quoted in emulated_grid.h."""
    grid = Grid()
    c = np.zeros(100 * 256, np.float32)
    for variant, name in enumerate(["shfl_xor", "block_barrier", "mma_f16"]):
        grid.reset()
        start = time.perf_counter()
        grid.run("spin", c, c, blocks=100, threads=256, n=100, variant=variant)
        seconds = time.perf_counter() - start
        switches = grid.launches()[0]["switches"]
        collectives = 100 * 100 * (1 if name == "block_barrier" else 8)
        print(f"{name}: {switches / seconds / 1e6:.0f} M switches/s, {seconds / collectives * 1e6:.2f} us each")


if __name__ == "__main__":
    measure()
