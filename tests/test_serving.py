"""fastseq.serving: warm-up, batches of any size, counters, the self-check. A model answers as by itself."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq import _native
from fastseq.sequential import compiled_of
from fastseq.serving import LATENCY_BOUNDS, Runner, SelfCheckError, warmup
from fastseq.testing import MODELS, assert_matches

SEEDS = [MODELS[name] for name in ("seed1", "seed2", "seed3")]


def runs_of(model: nn.Module) -> list[Any]:
    found = [compiled for module in model.modules() if (compiled := compiled_of(module)) is not None]
    return [run for compiled in found for run in compiled.runs if run is not None]


def linear() -> nn.Module:
    return fastseq.optimize(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval())


# Warm-up -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SEEDS, ids=lambda case: case.name)
def test_nothing_is_left_to_be_made(case: Any) -> None:
    model = fastseq.optimize(case.build().eval())
    seconds = fastseq.warmup(model, (1, 2, 7, 32), case.example(3))
    assert sorted(seconds) == [1, 2, 7, 32] and all(value > 0 for value in seconds.values())
    plans = [run.plans_made() for run in runs_of(model)]
    packed = [run.packed_bytes() for run in runs_of(model)]
    buffers = _native.module().buffers_made()
    for size in (32, 1, 7, 2, 1, 32, 5):
        with torch.no_grad():
            assert_matches(model(case.example(size)), case.build(), case.example(size))
    assert [run.plans_made() for run in runs_of(model)] == plans, "a call made a plan"
    assert [run.packed_bytes() for run in runs_of(model)] == packed, "a call packed weights"
    assert _native.module().buffers_made() == buffers, "a call allocated scratch memory"


@pytest.mark.parametrize("name", ["seed1", "seed3", "mlp"])
def test_calls_at_once_find_scratch(name: str) -> None:
    """Also where a second warm-up asks for more calls than the first, for the same, or for fewer."""
    case = MODELS[name]
    model = fastseq.optimize(case.build().eval())
    torch.set_num_threads(1)
    scratch = []
    for calls in (1, 2, 4, 4, 3):
        fastseq.warmup(model, (1, 8), case.example(1), calls_at_once=calls)
        scratch.append(sum(run.idle_scratch_bytes() for run in runs_of(model)))
    assert scratch == [calls * scratch[0] for calls in (1, 2, 4, 4, 4)] and scratch[0] > 0
    buffers, ready = _native.module().buffers_made(), threading.Barrier(4)

    def work() -> None:
        ready.wait()
        with torch.no_grad():
            for _ in range(20):
                model(case.example(8))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _native.module().buffers_made() == buffers, "a call allocated scratch memory"


def test_without_warm_up_the_first_call_makes_something() -> None:
    model, buffers = linear(), _native.module().buffers_made()
    with torch.no_grad():
        model(torch.randn(2, 6))
    assert _native.module().buffers_made() > buffers


def test_warm_up_leaves_statistics_and_gradients_alone() -> None:
    plain = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU()).eval()
    model = fastseq.optimize(plain)
    warmup(model, [2], torch.randn(1, 6, requires_grad=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    assert all(p.grad is None for p in model.parameters()) and not model.training


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("model", [1], torch.ones(1, 6)), TypeError, "expects a torch.nn.Module, got str"),
        ((nn.Linear(6, 2), [1], torch.ones(1, 6)), ValueError, r"call model.eval\(\) first"),
        ((nn.Linear(6, 2).eval(), [], torch.ones(1, 6)), ValueError, "at least one batch size"),
        ((nn.Linear(6, 2).eval(), [0], torch.ones(1, 6)), ValueError, "at least 1, got 0"),
        ((nn.Linear(6, 2).eval(), ["4"], torch.ones(1, 6)), TypeError, "an int, got str"),
        ((nn.Linear(6, 2).eval(), [1], [1.0, 2.0]), TypeError, "a tensor or a tuple of tensors, got list"),
        ((nn.Linear(6, 2).eval(), [1], torch.ones(0, 6)), ValueError, r"batch in dimension 0, got shape \(0, 6\)"),
        ((nn.Linear(6, 2).eval(), [1], torch.ones(1, 5)), RuntimeError, "shapes cannot be multiplied"),
    ],
)
def test_what_warm_up_rejects(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        warmup(*arguments)


def test_calls_at_once_are_at_least_one() -> None:
    for calls in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"calls_at_once to be a positive int, got {calls!r}"):
            warmup(linear(), [1], torch.ones(1, 6), calls_at_once=calls)  # type: ignore[arg-type]


def test_a_fork_from_a_process_that_used_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    runner = Runner(linear(), torch.ones(1, 6))  # on the CPU that is no matter
    assert runner(torch.ones(2, 6)).shape == (2, 3)

    class OnGpu(Tensor):
        is_cuda = True

    with pytest.raises(RuntimeError, match='forked from one that had used CUDA.*"spawn"'):
        Runner(linear(), torch.ones(1, 6).as_subclass(OnGpu))


# The process around it -----------------------------------------------------------------------------------------------


def global_state() -> dict[str, Any]:
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "default dtype and device": (torch.get_default_dtype(), torch.get_default_device()),
        "random numbers": torch.get_rng_state().tolist(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "benchmark": torch.backends.cudnn.benchmark,
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32),
        "mkldnn": (torch.backends.mkldnn.enabled, torch.backends.mkldnn.deterministic),
        "denormals": (torch.tensor(1e-40) * 1).item(),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)],
        "environment": dict(os.environ),
    }


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_global_state_is_left_alone(grad: bool) -> None:
    case = MODELS["seed3"]
    plain, x = case.build().eval(), case.example(5)
    with torch.set_grad_enabled(grad):
        before = global_state()
        runner = Runner(fastseq.optimize(plain), case.example(1), buckets=(1, 4), calls_at_once=2)
        runner(x)
        runner.selfcheck()
        runner.stats(), runner.memory_report()
        assert global_state() == before


def test_other_threads_run_python_meanwhile() -> None:
    """The interpreter is free while kernels work: another thread counts during a call, as it could not otherwise."""
    case = MODELS["cifar_vgg_bn"]
    model, x = fastseq.optimize(case.build().eval()), case.example(64)
    torch.set_num_threads(1)
    stop, count = threading.Event(), 0

    def work() -> None:
        nonlocal count
        while not stop.is_set():
            count += 1
            time.sleep(0)  # lets go of the interpreter

    thread, interval = threading.Thread(target=work), sys.getswitchinterval()
    with torch.no_grad():
        model(x)
        thread.start()
        sys.setswitchinterval(1000.0)  # nobody is made to let go of it
        try:
            before = count
            model(x)
            counted = count - before
        finally:
            sys.setswitchinterval(interval)
            stop.set()
            thread.join()
    assert counted > 100


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SEEDS, ids=lambda case: case.name)
@pytest.mark.parametrize("buckets", [None, (1, 2, 4, 8), (3,)], ids=str)
def test_any_batch_size(case: Any, buckets: tuple[int, ...] | None) -> None:
    runner = Runner(fastseq.optimize(case.build().eval()), case.example(1), buckets=buckets, max_batch_size=8)
    for size in (1, 2, 3, 5, 8, 9, 21):
        x = case.example(size)
        result = runner(x)
        assert_matches(result, case.build(), x)
        assert result.is_contiguous() and not result.requires_grad
        assert result.untyped_storage().nbytes() == result.nbytes, "padding is left in the result"


def test_what_is_counted() -> None:
    runner = Runner(linear(), torch.randn(1, 6), buckets=(2, 4))
    for size in (1, 2, 3, 4, 9):  # the last one as 4, 4, 1
        runner(torch.randn(size, 6))
    found = runner.stats()
    assert (found["calls"], found["errors"], found["rows"], found["splits"]) == (5, 0, 19, 1)
    assert found["buckets"] == {2: 3, 4: 4} and found["padded_rows"] == 3
    assert found["padding_waste"] == pytest.approx(3 / 22)
    latency = found["latency"]
    assert sum(latency["counts"]) == 5 and len(latency["counts"]) == len(LATENCY_BOUNDS) + 1 and latency["sum"] > 0
    assert found["model"]["fused_calls"] >= 7 and not found["model"]["fallbacks"]
    runner.reset_stats()
    assert runner.stats()["calls"] == 0 and runner.stats()["padding_waste"] == 0.0


def test_without_buckets_nothing_is_padded_on_a_cpu() -> None:
    runner = Runner(linear(), torch.randn(1, 6), max_batch_size=4)
    for size in (1, 3, 4, 6):
        runner(torch.randn(size, 6))
    found = runner.stats()
    assert found["buckets"] == {1: 1, 2: 1, 3: 1, 4: 2} and found["padded_rows"] == 0


def test_results_do_not_share_memory() -> None:
    runner = Runner(linear(), torch.randn(1, 6), buckets=(4,))
    first = runner(torch.randn(3, 6))
    kept = first.clone()
    runner(torch.randn(3, 6))
    assert torch.equal(first, kept)


Pair = namedtuple("Pair", "total parts")


class TwoIn(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return {"pair": Pair(x + y, [x * 2, (y,)])}


def test_several_inputs_and_results() -> None:
    runner = Runner(TwoIn().eval(), (torch.ones(1, 2), torch.ones(1, 2)), buckets=(4,))
    for size in (3, 10):
        x, y = torch.randn(size, 2), torch.randn(size, 2)
        pair = runner(x, y)["pair"]
        assert type(pair) is Pair and torch.equal(pair.total, x + y)
        assert torch.equal(pair.parts[0], x * 2) and torch.equal(pair.parts[1][0], y)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


@pytest.mark.parametrize(
    ("model", "batch", "reason"),
    [
        (Mean(), (torch.arange(10.0).view(5, 2),), "a result without a batch in dimension 0"),
        (Mean(), (torch.arange(6.0).view(3, 2),), "a result without a batch in dimension 0"),
        (nn.ReLU(), (torch.ones(2, 3),), "another shape than the example"),
        (nn.ReLU(), (torch.ones(2, 2).double(),), "another dtype or device than the example"),
        (nn.ReLU(), (torch.ones(0, 2),), "an empty batch"),
        (TwoIn(), (torch.ones(2, 2), torch.ones(1, 2)), "inputs of different batch sizes"),
    ],
)
def test_what_cannot_be_batched_goes_to_the_model_as_it_is(model: nn.Module, batch: Any, reason: str) -> None:
    example = tuple(torch.ones(1, 2) for _ in batch)
    runner = Runner(model.eval(), example, buckets=(4,), warm=False)
    result, expected = runner(*batch), model(*batch)
    if isinstance(result, Tensor):
        assert torch.equal(result, expected)
    assert runner.stats()["as_they_are"] == {reason: 1} and runner.stats()["errors"] == 0


def test_errors_are_the_models_and_are_counted() -> None:
    runner = Runner(linear(), torch.randn(1, 6))
    for batch in ((torch.randn(2, 5),), (torch.randn(2, 6), 1), ("text",)):
        with pytest.raises((RuntimeError, TypeError)):
            runner(*batch)
    found = runner.stats()
    assert found["errors"] == 3 and found["calls"] == 0


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"buckets": ()}, ValueError, "at least one batch size"),
        ({"buckets": (0, 2)}, ValueError, "at least 1"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size to be a positive int, got 0"),
    ],
)
def test_what_a_runner_rejects(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Runner(linear(), torch.randn(1, 6), **options)


def test_threads_get_their_own_answers() -> None:
    case = MODELS["seed3"]
    runner = Runner(fastseq.optimize(case.build().eval()), case.example(1), buckets=(1, 4))
    inputs = [case.example(1 + i % 5) + i for i in range(8)]
    expected = [runner(x) for x in inputs]
    failures: list[str] = []

    def work(i: int) -> None:
        for _ in range(30):
            if not torch.equal(runner(inputs[i]), expected[i]):
                failures.append(f"thread {i} got another answer")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert runner.stats()["errors"] == 0
    assert not failures and runner.stats()["calls"] == 8 * 31


def test_new_weights_count_at_once() -> None:
    model = linear()
    runner = Runner(model, torch.randn(1, 6))
    x, new = torch.randn(3, 6), {name: torch.randn_like(p) for name, p in model.state_dict().items()}
    model.load_state_dict(new)
    assert_matches(runner(x), model, x)
    runner.selfcheck()


# The self-check ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SEEDS, ids=lambda case: case.name)
def test_a_sound_model_passes(case: Any, dtype: torch.dtype) -> None:
    runner = Runner(fastseq.optimize(case.build().eval().to(dtype)), case.example(2).to(dtype))
    assert 0 <= runner.selfcheck() < 0.02


def test_a_model_in_bfloat16_passes() -> None:
    case = MODELS["mlp"]
    model = fastseq.optimize(case.build().eval(), compute_dtype=torch.bfloat16)
    Runner(model, case.example(1)).selfcheck()


class Unsound(nn.Module):
    """Answers otherwise where fastseq is at work."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        is_eager = _native.module().set_disabled(False)
        _native.module().set_disabled(is_eager)
        return x if is_eager else self.change(x)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: x * 1.01, "a difference of 0.01, 0.0001 allowed"),
        (lambda x: x.clone().fill_(float("nan")), "NaN or an infinity"),
        (lambda x: x[:, :1], "shape or dtype"),
        (lambda x: (x, x), "2 results, eager 1"),
    ],
)
def test_an_unsound_one_does_not(change: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastseq.serving.runner.RETRY_SECONDS", 0.0)
    runner = Runner(Unsound(change).eval(), torch.ones(1, 3))
    with pytest.raises(SelfCheckError, match=text):
        runner.selfcheck()


def test_a_load_in_between_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastseq.serving.runner.RETRY_SECONDS", 0.0)
    left = [2]

    def change(x: Tensor) -> Tensor:
        left[0] -= 1
        return x if left[0] < 0 else x + 1

    Runner(Unsound(change).eval(), torch.ones(1, 3), warm=False).selfcheck()
    assert left == [-1]


# Memory --------------------------------------------------------------------------------------------------------------


def test_memory() -> None:
    case = MODELS["seed3"]
    model = fastseq.optimize(case.build().eval())
    runner = Runner(model, case.example(1))
    found = runner.memory_report()
    assert found["weights"] == sum(p.nbytes for p in model.parameters())
    assert found["packed"] == sum(run.packed_bytes() for run in runs_of(model)) > 0
    assert found["scratch"] > 0 and found["total"] == found["weights"] + found["packed"] + found["scratch"]
    fastseq.restore(model)
    released = runner.memory_report()
    assert released["packed"] == released["scratch"] == 0 and released["weights"] == found["weights"]
