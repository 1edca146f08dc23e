"""Behaviours 33 to 37: special values, 16-bit types, switches, tolerances."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from behaviour import assert_eager_outcome, assert_fast, one_thread, same  # noqa: F401
from dropin import call, conv_net, eager, fused, images
from helpers import ISAS, run_fused, use_kernels
from torch import Tensor, nn

import fastseq
from fastseq import cuda

NAN, INF = float("nan"), float("inf")
each_isa = pytest.mark.parametrize("isa", ISAS)


# 33: special values -------------------------------------------------------------------------------------------------


@each_isa
@pytest.mark.parametrize("kind", ["conv", "conv pool", "pool before relu", "linear"])
def test_33_relu_keeps_nan_and_drops_minus_infinity(kind: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN stays NaN, inf stays inf, -inf becomes 0: the values come in with the bias, one for each output."""
    use_kernels(monkeypatch, isa)
    values, results = [NAN, INF, -INF, -1.0, 2.0], [NAN, INF, 0.0, 0.0, 2.0]
    layers, shape = {
        "conv": (lambda: [nn.Conv2d(2, 5, 3), nn.ReLU()], (2, 2, 5, 5)),
        "conv pool": (lambda: [nn.Conv2d(2, 5, 3), nn.ReLU(), nn.MaxPool2d(3)], (2, 2, 5, 5)),
        "pool before relu": (lambda: [nn.Conv2d(2, 5, 3), nn.MaxPool2d(2, 1), nn.ReLU()], (2, 2, 5, 5)),
        "linear": (lambda: [nn.Linear(5, 5), nn.ReLU()], (2, 5)),
    }[kind]
    model = nn.Sequential(*layers())
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor(values))
    result = run_fused(model, torch.randn(shape))
    wanted = torch.tensor(results).view(1, 5, *[1] * (result.dim() - 2)).expand_as(result)
    assert same(result, wanted.contiguous())


def test_33_relu_alone_keeps_the_sign_of_zero() -> None:
    x = torch.tensor([[NAN, -0.0, 0.0, INF, -INF, -1e-45, 1e-45]])
    fast = fastseq.optimize(nn.Sequential(nn.ReLU(), nn.Sequential(nn.Identity(), nn.ReLU(True))))
    with torch.no_grad():
        assert same(fast(x.clone()), torch.tensor([[NAN, -0.0, 0.0, INF, 0.0, 0.0, 1e-45]]))


@each_isa
@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 1, 1), nn.MaxPool2d((1, 3), 2, ceil_mode=True)])
def test_33_a_pool_keeps_nan_and_the_first_of_two_zeros(
    pool: nn.MaxPool2d, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN anywhere in the window wins; of -0.0 and 0.0 the first in scan order; all -inf give -inf."""
    use_kernels(monkeypatch, isa)
    choices = torch.tensor([NAN, -0.0, 0.0, -INF, -INF, -0.0, 0.0, -1.0, 1.0, INF])
    model = nn.Sequential(pool)
    for channels, most in product((1, 3, 17), (3, 7, 10)):
        x = choices[torch.randint(0, most, (2, channels, 9, 8))]
        with torch.no_grad():
            for form in (x, x.to(memory_format=torch.channels_last), x[0]):
                assert same(run_fused(model, form), model(form))
    x = torch.full((1, 1, 4, 4), -INF)
    assert (run_fused(model, x) == -INF).all()


@each_isa
def test_33_each_place_of_a_nan_in_a_window(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a convolution, where the maximum is taken in registers: found at every place, others stay numbers."""
    use_kernels(monkeypatch, isa)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.MaxPool2d(2))
    for row, column in product(range(4), range(4)):
        x = torch.randn(1, 1, 4, 4)
        x[0, 0, row, column] = NAN
        isnan = run_fused(model, x).isnan()
        assert isnan[:, :, row // 2, column // 2].all() and isnan.sum() == 3


# 34: infinities in sums ---------------------------------------------------------------------------------------------


@each_isa
def test_34_infinities_meet_in_sums_as_in_eager(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """inf - inf and 0 * inf are NaN, a sum that overflows is inf."""
    use_kernels(monkeypatch, isa)
    linear, conv = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU())
    for model in (linear, conv):
        with torch.no_grad():
            model[0].weight.copy_(torch.ones(3, 4).view_as(model[0].weight))
            model[0].bias.zero_()
        for row, result in (
            ([INF, -INF, 0.0, 0.0], NAN),
            ([INF, 1.0, 2.0, 3.0], INF),
            ([-INF, 1.0, 2.0, 3.0], 0.0),
            ([3e38, 3e38, 0.0, 0.0], INF),
            ([-3e38, -3e38, 0.0, 0.0], 0.0),
        ):
            x = torch.tensor(row).view(1, 4, *[1] * (model[0].weight.dim() - 2))
            assert same(run_fused(model, x).flatten(), torch.full((3,), result))
        with torch.no_grad():
            model[0].weight[0] = INF
        assert run_fused(model, torch.zeros_like(x)).flatten()[0].isnan()


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_34_an_infinite_weight_is_compared_inside_of_the_padding(value: float) -> None:
    """At the border it meets zeros of the padding: NaN or not is left to the implementation, in eager as well."""
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)), torch.randn(2, 2, 5, 6)
    with torch.no_grad():
        model[0].weight[1, 1, 0, 2] = value
        actual, expected = run_fused(model, x), model(x)
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(actual[inside], expected[inside], equal_nan=True)
    torch.testing.assert_close(actual[:, ::2], expected[:, ::2])


# 35: 16-bit types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_35_16_bit_models_are_as_near_to_float64_as_eager_on_the_cpu(dtype: torch.dtype) -> None:
    """Eager rounds after each layer, a fused step once."""
    model, x = conv_net().to(dtype), images().to(dtype)
    assert_fast(model, x)
    assert_fast(model[:3], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_35_rounding_commutes_with_relu_and_pool_and_not_with_linear(dtype: torch.dtype) -> None:
    """Why one rounding behind conv, ReLU and pool gives eager's bits, and a chain of Linears has a tolerance."""
    x = torch.randn(3, 4, 8, 8) * 100
    assert torch.equal(x.relu().to(dtype), x.to(dtype).relu())
    pool = nn.MaxPool2d(3, 2, 1)
    assert torch.equal(pool(x).to(dtype), pool(x.to(dtype)))
    weight = torch.randn(64, 8)
    assert not torch.equal((x @ weight.T).to(dtype), (x.to(dtype).float() @ weight.T).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_35_16_bit_models_accumulate_in_float32_on_a_gpu(dtype: torch.dtype) -> None:
    """512 products of 1 and a bit: a 16-bit accumulator would stop counting."""
    model = nn.Sequential(nn.Linear(4096, 8), nn.ReLU(), nn.Linear(8, 8))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 2.0**-6)
    fast, x = fastseq.optimize(model.cuda().to(dtype)), torch.ones(3, 4096, device="cuda", dtype=dtype)
    with torch.no_grad():
        actual, counters = call(fast, x)
        exact = copy.deepcopy(model).double()(x.double())
    assert counters == fused()
    assert ((actual.double() - exact).norm() / exact.norm()).item() <= 2 * torch.finfo(dtype).eps


# 36: switches -------------------------------------------------------------------------------------------------------


@contextmanager
def switched(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def flag(holder: Any, name: str, value: Any) -> AbstractContextManager[None]:
    return switched(lambda: getattr(holder, name), lambda v: setattr(holder, name, v), value)


SWITCHES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "cudnn.allow_tf32 off": lambda: flag(torch.backends.cudnn, "allow_tf32", False),
    "matmul.allow_tf32 on": lambda: flag(torch.backends.cuda.matmul, "allow_tf32", True),
    "precision medium": lambda: switched(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "cudnn.deterministic": lambda: flag(torch.backends.cudnn, "deterministic", True),
    "cudnn.benchmark": lambda: flag(torch.backends.cudnn, "benchmark", True),
    "cudnn off": lambda: torch.backends.cudnn.flags(enabled=False),
    "mkldnn off": lambda: torch.backends.mkldnn.flags(enabled=False),
    "mkldnn deterministic": lambda: torch.backends.mkldnn.flags(enabled=True, deterministic=True),
    "deterministic algorithms": lambda: switched(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "grad anomaly": lambda: torch.autograd.detect_anomaly(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("switch", SWITCHES)
def test_36_switches_change_no_float32_result_on_the_cpu(switch: str) -> None:
    """float32 means float32 on the CPU, whatever is allowed elsewhere; strides are those of that eager."""
    model, x = conv_net(), images()
    before = assert_fast(model, x)
    with SWITCHES[switch]():
        assert torch.equal(assert_fast(model, x), before)
        assert_fast(model[:3].to(memory_format=torch.channels_last), x)
    assert torch.equal(assert_fast(model, x), before)


@each_isa
def test_36_denormals_are_flushed_where_the_user_asked_for_it(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`set_flush_denormal` is a mode of the calling thread, which the kernels neither set nor reset."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot flush denormals")
    use_kernels(monkeypatch, isa)
    linear, conv = nn.Sequential(nn.Linear(3, 4, bias=False)), nn.Sequential(nn.Conv2d(3, 4, 1, bias=False))
    for model, shape in ((linear, (2, 3)), (conv, (1, 3, 2, 2))):
        nn.init.constant_(model[0].weight, 0.5)
        x = torch.full(shape, 1e-40)
        fast = fastseq.optimize(model)
        with torch.no_grad():
            assert (call(fast, x)[0] > 0).all() and (eager(fast, x) > 0).all()
            torch.set_flush_denormal(True)
            try:
                flushed, expected = fast(x), eager(fast, x)
                flushed, expected = flushed.view(torch.int32), expected.view(torch.int32)
                is_still_on = (torch.tensor(1e-40) * 0.5).view(torch.int32).item() == 0
            finally:
                torch.set_flush_denormal(False)
            assert not expected.any() and not flushed.any() and is_still_on
            result, counters = call(fast, x)
            assert counters == fused() and (result > 0).all()


@pytest.mark.skipif(not cuda.kernels(), reason="this build of fastseq has no CUDA kernels")
def test_36_on_cuda_each_tf32_flag_chooses_for_its_own_layers() -> None:
    """Convolutions follow `cudnn.allow_tf32`, Linear `matmul.allow_tf32`; before sm_80 there is no TF32.

    Results under both settings are compared with eager's on the emulated grid: tests/on_emulated_grid/test_cuda_run.py.
    """
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 1024), nn.ReLU())
    x = torch.empty(512, 3, 8, 8, device="meta")

    def uses_tf32(device: str, **options: bool) -> list[bool]:
        plans = cuda.plan(model, x, cuda.DEVICES[device], allows_cublas=False, **options)
        return ["_tf32__" in launch["kernel"] for made in plans for launch in made["launches"]]

    for conv, linear in product((False, True), (False, True)):
        assert uses_tf32("A100", allows_tf32_conv=conv, allows_tf32_linear=linear) == [conv, linear]
    assert not any(uses_tf32("T4", allows_tf32_conv=True, allows_tf32_linear=True))


@pytest.mark.gpu
def test_36_tf32_flags_are_honoured_on_a_gpu() -> None:
    """Without the flags a result has float32's error; eager's flags at the time of the call count."""
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 64), nn.ReLU()).cuda()
    fast, x = fastseq.optimize(model), torch.randn(16, 64, 8, 8, device="cuda")
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        for conv, linear in product((False, True), (False, True)):
            with flag(torch.backends.cudnn, "allow_tf32", conv), flag(torch.backends.cuda.matmul, "allow_tf32", linear):
                error = ((fast(x).double() - exact).norm() / exact.norm()).item()
                own = ((eager(fast, x).double() - exact).norm() / exact.norm()).item()
            assert error <= max(1e-6, 4 * own)
            assert conv or linear or error < 1e-5


# 37: tolerances -----------------------------------------------------------------------------------------------------


@each_isa
@pytest.mark.parametrize("k", [3, 17, 257, 2000])
def test_37_errors_are_bounded_by_the_sum_of_magnitudes(k: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """|error| <= k units of rounding times sum |w x| for every element, in any order of summation."""
    use_kernels(monkeypatch, isa)
    linear, conv = nn.Linear(k, 9), nn.Conv2d(k, 9, 1)
    for layer, x in ((linear, torch.randn(5, k)), (conv, torch.randn(1, k, 2, 3))):
        model = nn.Sequential(layer)
        actual = run_fused(model, x).double()
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            bounding = copy.deepcopy(model).double()
            for parameter in bounding.parameters():
                parameter.abs_()
            magnitudes = bounding(x.double().abs())
        unit = torch.finfo(torch.float32).eps / 2
        assert ((actual - exact).abs() <= min(k + 1, 8 * k**0.5) * unit * magnitudes).all()
        assert_fast(model, x)


@pytest.mark.parametrize("kind", ["conv", "mlp", "all"])
def test_37_a_row_does_not_depend_on_its_batch(kind: str) -> None:
    """The order of summation does not change with the batch: row i has the same bits in every batch that holds it."""
    model = {
        "conv": lambda: nn.Sequential(nn.Conv2d(3, 20, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 70), nn.ReLU(), nn.Linear(70, 33)),
        "all": conv_net,
    }[kind]()
    fast, x = fastseq.optimize(model), torch.randn(67, 3, 12, 12)
    with torch.no_grad():
        whole = fast(x)
        for start, stop in ((0, 1), (66, 67), (5, 7), (3, 36), (1, 66)):
            part, counters = call(fast, x[start:stop])
            assert torch.equal(part, whole[start:stop]) and counters == fused()


def test_37_where_two_right_results_may_differ() -> None:
    """Against eager only rounding: integers, whose sums are exact, give the very same numbers."""
    model, x = nn.Sequential(nn.Linear(300, 20), nn.ReLU(), nn.Linear(20, 5)), torch.randint(-4, 5, (7, 300)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape))
        expected: Tensor = model(x)
    assert torch.equal(run_fused(model, x), expected)
