"""The CUDA convolution kernels on the emulated grid: how they round, and what NaN, infinities and zeros become."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from emulation.conv_kernels import (
    DTYPES,
    NO_PADDING,
    REGISTERS,
    ROWS,
    Kernels,
    Pool,
    Problem,
    Row,
    Values,
    assert_same,
    integers,
    make_epilogue,
    make_values,
    plant,
    run,
)
from emulation.finish import ACTIVATIONS
from torch import Tensor

# Of a sum relative to the sum of its products' magnitudes: fp32 sums of exact products, or of factors rounded to 11
# bits each.
SUM_TOLERANCE = {"f32": 1e-6, "tf32": 1e-3, "f16": 1e-6, "bf16": 1e-6}
# Of a result: half a unit in the last place.
ROUNDING = {"f32": 2.0**-24, "tf32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


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


# NaN, infinities, zeros ----------------------------------------------------------------------------------------------


def explicit_products(padded: Tensor, weight: Tensor, stride: tuple[int, int]) -> Tensor:
    """conv2d, each product made and added. With padding zeros among the factors: 0 * inf is NaN.

    So do torch.conv2d on the CPU in float32 and float64 (im2col and a matrix product) and implicit GEMMs on the GPU;
    kernels that leave padding out, such as oneDNN's for float16, do not.
    """
    windows = padded.unfold(2, weight.shape[2], stride[0]).unfold(3, weight.shape[3], stride[1])
    return (windows[:, None] * weight[None, :, :, None, None]).sum((2, 5, 6))


SPECIAL_CASES = {
    "none": Problem(c_in=3, c_out=9, size=(5, 7), dst="nhwc", zeros=3),
    "none, no relu": Problem(c_in=20, c_out=6, size=(5, 5), kernel=(2, 2), stride=(2, 2), has_relu=False),
    "registers": Problem(c_in=4, size=(7, 9), pool=REGISTERS, has_relu=False),
    "registers, relu": Problem(c_in=3, size=(6, 9), pool=REGISTERS),
    "shared": Problem(
        c_in=3, size=(7, 9), pool=Pool((3, 3), (2, 2), (1, 1), is_ceil=True, tile=(2, 2)), has_relu=False
    ),
    "shared, relu": Problem(c_in=4, size=(7, 9), pool=Pool((3, 3), (2, 2), tile=(1, 2))),
    "norm, registers": Problem(c_in=3, size=(6, 9), pool=REGISTERS, has_norm=True),
    "norm, slopes, shared": Problem(
        c_in=4, size=(7, 9), pool=Pool((3, 3), (2, 2), tile=(1, 2)), has_norm=True, has_relu=False, kind="prelu"
    ),
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
        sums = problem.sums(values.src, values.weight, explicit_products)
        expected = problem.finish(sums, values.bias, values.epilogue)
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


# Activations ---------------------------------------------------------------------------------------------------------

# Units in the last place of float32 against float64, with the CPU's functions, which nearly always round correctly.
# What is below TAIL times the argument, or times 1, has an absolute error instead.
MOST_UNITS = {"gelu_tanh": 12}  # 4 for the others
TAIL = 2.0**-20


def arguments(dtype: torch.dtype) -> Tensor:
    """Of every size and both signs, thresholds and what is beside them, NaN and the infinities."""
    powers = torch.cat([2.0 ** torch.arange(-40, 8), 1.37 * 2.0 ** torch.arange(-20, 8)])
    steps = torch.linspace(-12, 12, 481)
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 40.0, 88.0, 89.0, -88.0, -104.0])
    return torch.cat([powers, -powers, steps, special]).to(dtype).double()


@pytest.mark.parametrize("pool", [None, Pool((1, 1), (1, 1), tile=(1, 32))], ids=["plain", "behind a pool"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kernels: Kernels, kind: str, pool: Pool | None) -> None:
    """What an activation makes of single values: the sum of one product by 1."""
    for row in (("f32", "32x32", "gather"), ("f16", "128x32", "gather"), ("bf16", "32x32", "vector")):
        x = arguments(DTYPES[row[0]])
        if kind == "hardswish":  # six times the argument is too large, for torch's kernel too
            x = x[~x.isfinite() | (x.abs() < 5e37)]
        problem = Problem(1, 1, (1, len(x)), 1, (1, 1), padding=NO_PADDING, has_bias=False, has_relu=False, kind=kind)
        problem = replace(problem, pool=pool, is_after_pool=pool is not None)
        values = Values(x.view(1, 1, 1, -1), torch.ones(1, 1, 1, 1).double(), None, make_epilogue(problem))
        actual = run(kernels, row, problem, values)[0, 0, 0]
        expected = problem.finish(values.src, None, values.epilogue)[0, 0, 0]
        rounded = expected.to(actual.dtype)
        assert_same(actual.where(~expected.isfinite(), actual * 0), rounded.where(~expected.isfinite(), actual * 0))
        is_number = expected.isfinite() & rounded.isfinite()
        x, actual, expected = x[is_number], actual[is_number].double(), expected[is_number]
        scale = torch.maximum(expected.abs(), TAIL * torch.minimum(x.abs(), torch.tensor(1.0)))
        allowed = MOST_UNITS.get(kind, 4) * 2.0**-23 * scale + ROUNDING[row[0]] * expected.abs() + tiny(row[0])
        wrong = (actual - expected).abs() > allowed
        assert not wrong.any(), (
            f"{row[0]}: {kind} of {x[wrong][0]:.9g}: {actual[wrong][0]:.9g}, {expected[wrong][0]:.9g}"
        )


def tiny(math: str) -> float:
    """The distance of subnormal numbers."""
    limits = torch.finfo(DTYPES[math])
    return limits.smallest_normal * limits.eps
