"""The CUDA pack kernel on the emulated grid: copies of weights, made and compared, alone and beside a convolution."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence

import pytest
import torch
from emulation.conv_kernels import (
    DTYPES,
    REGISTERS,
    ROWS,
    Kernels,
    PackArgs,
    PackJob,
    Problem,
    Row,
    assert_same,
    integers,
    make_values,
    run,
)
from emulation.regions import BITS, FAR, Region, address_space
from torch import Tensor
from torch.nn import functional as F

SLICE = 2048
MAGIC = 0x123456789ABCDEF1


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


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
