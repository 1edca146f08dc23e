"""Behaviours 61 to 64: found by fuzzing eager itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from behaviour import assert_close_to_eager, assert_fast, one_thread, plain  # noqa: F401
from dropin import assert_same_outcome, call, conv_net, eager, fused, images, outcome, split_net
from helpers import ISAS, check_run, integer_model, integers, run_fused, use_kernels
from torch import nn

import fastseq

# 61: windows that lie wholly in the padding -------------------------------------------------------------------------


def test_61_a_window_of_nothing_but_padding_is_never_fused() -> None:
    """A dilated, padded pool over one row: eager's indices are out of range and its backward pass writes astray.

    Only values are compared here, and no gradient is asked for.
    """
    pool = nn.MaxPool2d(2, 2, padding=1, dilation=2)
    refused = {"fused_calls": 0, "eager_calls": 1, "fallbacks": {"a window of a pool lies wholly in the padding": 1}}
    for layers, shape in (([nn.Conv2d(2, 3, 1), nn.ReLU()], (1, 2, 1, 5)), ([], (1, 2, 5, 1))):
        fast = fastseq.optimize(nn.Sequential(*layers, pool))
        with torch.no_grad():
            assert_same_outcome(fast, torch.randn(shape))
            assert call(fast, torch.randn(shape))[1] == refused
            for size in ((3, 4), (2, 2), (4, 5)):
                assert_same_outcome(fast, torch.randn(1, 2, *size))
                assert call(fast, torch.randn(1, 2, *size))[1] == fused()
    # The attributes may come later.
    late = fastseq.optimize(nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.MaxPool2d(2, 2, padding=1)))
    with torch.no_grad():
        assert call(late, torch.randn(1, 2, 1, 5))[1] == fused()
        late[2].dilation = 2
        assert_same_outcome(late, torch.randn(1, 2, 1, 5))
        assert call(late, torch.randn(1, 2, 1, 5))[1] == refused


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 1), (3, 2)])
def test_61_without_dilation_every_window_holds_an_element(size: tuple[int, int], ceil_mode: bool) -> None:
    """Padding of at most half a window and no start in the right padding: fused for any size."""
    for kernel in range(1, 5):
        for stride in range(1, 5):
            for padding in range(kernel // 2 + 1):
                pool = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil_mode)
                x = integers(2, 3, *size) - 5
                fast = fastseq.optimize(nn.Sequential(pool))
                with torch.no_grad():
                    expected = assert_same_outcome(fast, x)
                    if expected.error is None:
                        result, counters = call(fast, x)
                        assert torch.equal(result, expected.value) and counters == fused()
                        assert result.isfinite().all()


# 62: exact where arithmetic is exact --------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [1, 3, 16, 129])
def test_62_integers_are_exact_in_every_order_of_summation(k: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear and convolutions over integers: tolerance 0. Winograd's transforms are no order of summation."""
    use_kernels(monkeypatch, isa)
    for layers, shape in (
        ([nn.Linear(k, 7), nn.ReLU(), nn.Linear(7, 3)], (5, k)),
        ([nn.Conv2d(k, 7, 1), nn.ReLU(), nn.Conv2d(7, 2, 1), nn.MaxPool2d(2)], (2, k, 5, 4)),
        ([nn.Conv2d(k, 5, 3, padding=1), nn.MaxPool2d(3, 2, 1), nn.ReLU()], (2, k, 5, 4)),
    ):
        check_run(integer_model(*layers), integers(*shape))


@pytest.mark.parametrize("isa", ISAS)
def test_62_a_pool_is_exact(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never "close": the result is one of the inputs, bit by bit."""
    use_kernels(monkeypatch, isa)
    for pool in (nn.MaxPool2d(2), nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d((1, 4), 3)):
        x = torch.randn(2, 5, 13, 11) * torch.logspace(-40, 38, 11)
        for form in (x, x.to(memory_format=torch.channels_last), x[1]):
            with torch.no_grad():
                assert torch.equal(run_fused(nn.Sequential(pool), form), pool(form))


# 63: parameters of another size -------------------------------------------------------------------------------------


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def put(layer: nn.Module, **parameters: Any) -> None:
    for name, value in parameters.items():
        setattr(layer, name, value)


# name: (which layer, the change, whether eager accepts it)
SIZES: dict[str, tuple[int, Callable[[nn.Module], Any], bool]] = {
    "conv bias too long": (0, lambda m: put(m, bias=parameter(9)), False),
    "conv bias too short": (0, lambda m: put(m, bias=parameter(7)), False),
    "conv bias of one": (0, lambda m: put(m, bias=parameter(1)), False),
    "conv bias of two dimensions": (0, lambda m: put(m, bias=parameter(8, 1)), False),
    "conv weight of other channels in": (0, lambda m: put(m, weight=parameter(8, 4, 3, 3)), False),
    "conv weight of more channels out": (0, lambda m: put(m, weight=parameter(9, 3, 3, 3)), False),
    "conv weight of another kernel": (0, lambda m: put(m, weight=parameter(8, 3, 2, 2)), True),
    "conv weight and bias": (0, lambda m: put(m, weight=parameter(8, 3, 2, 3), bias=parameter(8)), True),
    "conv weight of three dimensions": (0, lambda m: put(m, weight=parameter(8, 3, 3)), False),
    "linear bias too long": (5, lambda m: put(m, bias=parameter(11)), False),
    "linear bias of one": (5, lambda m: put(m, bias=parameter(1)), True),
    "linear bias of two dimensions": (5, lambda m: put(m, bias=parameter(2, 10)), True),
    "linear bias without dimension": (5, lambda m: put(m, bias=nn.Parameter(torch.tensor(2.0))), True),
    "linear weight of other features": (5, lambda m: put(m, weight=parameter(10, 150)), False),
    "linear weight of more outputs": (5, lambda m: put(m, weight=parameter(12, 200)), False),
    "linear weight and bias": (5, lambda m: put(m, weight=parameter(12, 200), bias=parameter(12)), True),
    "linear weight a vector": (5, lambda m: put(m, weight=parameter(200), bias=None), True),
    "linear weight of three dimensions": (5, lambda m: put(m, weight=parameter(2, 10, 200)), False),
    "data of another size": (0, lambda m: setattr(m.bias, "data", torch.randn(5)), False),
}


@pytest.mark.parametrize("when", ["before optimize", "after a call"])
@pytest.mark.parametrize("name", SIZES)
def test_63_sizes_are_those_of_the_tensors_at_the_call(name: str, when: str) -> None:
    """Never `in_channels` or `out_features`, which are notes; what does not fit raises eager's words."""
    index, change, is_accepted = SIZES[name]
    model, x = conv_net(), images()
    if when == "before optimize":
        change(model[index])
        fast = fastseq.optimize(model)
    else:
        fast = fastseq.optimize(model)
        assert_close_to_eager(fast, x, runs=1)
        change(fast[index])
    with torch.no_grad():
        expected = assert_same_outcome(fast, x)
        assert_same_outcome(fast, x)
    assert (expected.error is None) == is_accepted
    if name == "conv bias too long":
        assert "expected bias to be 1-dimensional with 8 elements, but got bias of size [9]" in expected.text
    for key, value in conv_net()[index]._parameters.items():
        setattr(fast[index], key, value)
    assert_close_to_eager(fast, x, runs=1)


# 64: what calls leave alone -----------------------------------------------------------------------------------------


def flushes_denormals() -> bool:
    return bool((torch.tensor(1e-40) * 0.5).view(torch.int32) == 0)


def state() -> dict[str, Any]:
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "denormals": flushes_denormals(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "random numbers": torch.get_rng_state().tolist(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ),
        "TF32": (
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32,
            torch.get_float32_matmul_precision(),
        ),
        "mkldnn": (torch.backends.mkldnn.enabled, torch.backends.mkldnn.deterministic),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
    }


@pytest.mark.parametrize("flush", [False, True], ids=["denormals", "flushed denormals"])
@pytest.mark.parametrize("kind", ["fused", "eager", "error", "optimize", "explain", "refresh"])
def test_64_calls_leave_global_state_alone(kind: str, flush: bool) -> None:
    """Threads, the processor's modes, default dtype, random numbers, deterministic and TF32 switches."""
    fast, x = fastseq.optimize(split_net()), images()
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            before = state()
            with torch.no_grad():
                actions: dict[str, Callable[[], Any]] = {
                    "fused": lambda: fast(x),
                    "eager": lambda: fast(x[:0]),
                    "error": lambda: outcome(fast, x.double()),
                    "optimize": lambda: fastseq.optimize(fast),
                    "explain": lambda: fastseq.explain(fast, x),
                    "refresh": lambda: (fastseq.refresh(fast), fast(x)),
                }
                actions[kind]()
            assert state() == before and before["denormals"] == flush
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_64_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    model, x = conv_net(), images()
    before = assert_fast(model, x)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(assert_fast(model, x), before)
        assert torch.get_default_dtype() is dtype
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("net", [conv_net, split_net])
def test_64_what_was_packed_in_inference_mode_does_not_reach_autograd(net: Callable[[], nn.Sequential]) -> None:
    """A first call in inference mode, then training, then a fused call with the new weights."""
    fast, x, runs = fastseq.optimize(net()), images(), 2 if net is split_net else 1
    with torch.inference_mode():
        first = fast(x)
        assert first.is_inference()
    with torch.no_grad():
        second, counters = call(fast, x)
        assert torch.equal(first, second) and not second.is_inference() and counters["fused_calls"] == runs
    twin = plain(fast)
    for model in (fast, twin):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(x).square().sum().backward()
        optimizer.step()
    for a, b in zip(fast.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
        assert not a.is_inference() and a._version == b._version
    with torch.no_grad():
        third = assert_close_to_eager(fast, x, runs)
        assert not torch.equal(third, second)
        torch.testing.assert_close(third, eager(twin, x))
    scaled = (third.requires_grad_() * 2).sum()
    scaled.backward()
    assert (third.grad == 2).all()
