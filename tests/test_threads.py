"""Threads: any number of them gives the bits of one, calls from many Python threads do not disturb each other, and
torch's number of threads is obeyed."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import run_python
from helpers import assert_was_fused, run_fused
from torch import Tensor, nn

import fastseq
from fastseq.testing import MODELS, assert_matches


def conv(c_in: int, c_out: int, *tail: nn.Module, kernel: int = 3, padding: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, kernel, padding=padding), nn.ReLU(), *tail]


# Enough work that several threads take part: by images where their number divides, by rows of images where it does not.
NETWORKS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "conv": (lambda: conv(16, 64), (16, 56, 56)),
    "conv conv": (lambda: [*conv(8, 24), *conv(24, 17, kernel=5, padding=2)], (8, 40, 40)),
    "pool in registers": (lambda: conv(16, 64, nn.MaxPool2d(2)), (16, 56, 56)),
    "pool 3x3/2": (lambda: conv(16, 64, nn.MaxPool2d(3, 2, 1)), (16, 56, 56)),
    "pool 3x3/1": (lambda: conv(16, 33, nn.MaxPool2d(3, 1, 1)), (16, 40, 41)),
    "pool 2x2/3": (lambda: conv(16, 33, nn.MaxPool2d(2, 3)), (16, 40, 41)),
    "pool with ceil_mode": (lambda: conv(16, 33, nn.MaxPool2d(2, ceil_mode=True)), (16, 41, 41)),
    "large weights": (lambda: conv(96, 96), (96, 14, 14)),
    "large weights, pool 2x2/2": (lambda: conv(96, 96, nn.MaxPool2d(2)), (96, 14, 14)),
    "large weights, pool 3x3/2": (lambda: conv(96, 96, nn.MaxPool2d(3, 2)), (96, 14, 14)),
    "stages": (
        lambda: [*conv(3, 32, nn.MaxPool2d(3, 2)), *conv(32, 48, nn.MaxPool2d(2)), *conv(48, 40, nn.MaxPool2d(3, 1))],
        (3, 45, 45),
    ),
    "few rows": (lambda: [*conv(64, 64), *conv(64, 64, padding=0)], (64, 3, 3)),
    "pool alone between": (lambda: [*conv(16, 33), nn.MaxPool2d(3, 2), nn.MaxPool2d(2), *conv(33, 20)], (16, 40, 40)),
    "small linear behind": (
        lambda: [
            *conv(16, 32, nn.MaxPool2d(2)),
            nn.Flatten(),
            nn.Linear(32 * 18 * 18, 10),
            nn.ReLU(),
            nn.Linear(10, 5),
        ],
        (16, 36, 36),
    ),
    # Linear weights beyond 1 MiB: all images pass the convolutions first.
    "large linear behind": (
        lambda: [
            *conv(8, 16, nn.MaxPool2d(3, 2)),
            nn.Flatten(),
            nn.Linear(16 * 14 * 14, 130),
            nn.ReLU(),
            nn.Linear(130, 33),
        ],
        (8, 30, 30),
    ),
    "linear alone": (
        lambda: [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)],
        (784,),
    ),
    "flatten, linear": (lambda: [nn.Flatten(), nn.Linear(1200, 400), nn.ReLU(), nn.Linear(400, 33)], (3, 20, 20)),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def make(name: str, batch: int) -> tuple[nn.Sequential, Tensor]:
    layers, shape = NETWORKS[name]
    return nn.Sequential(*layers()).eval(), torch.randn(batch, *shape)


def assert_bits_are_those_of_one_thread(model: nn.Module, x: Tensor) -> None:
    fused = fastseq.optimize(model)
    # In turns: what a call leaves in the scratch is wrong for the next, so that reading too early shows.
    inputs = (x, -x)
    with torch.no_grad():
        torch.set_num_threads(1)
        expected = [fused(source) for source in inputs]
        assert_matches(expected[0], model, x)
        for threads in (2, 3, 4, 7):
            torch.set_num_threads(threads)
            for batch in (1, 2, 3, 5, 6, 17):
                for source, result in zip(inputs, expected, strict=True):
                    assert torch.equal(fused(source[:batch]), result[:batch]), f"{threads} threads, batch {batch}"
    assert_was_fused(fused)


@each_network
def test_bits_are_those_of_one_thread(name: str) -> None:
    assert_bits_are_those_of_one_thread(*make(name, 17))


@pytest.mark.parametrize("name", [name for name, (_, shape) in NETWORKS.items() if len(shape) == 3])
def test_bits_are_those_of_one_thread_channels_last(name: str) -> None:
    model, x = make(name, 17)
    assert_bits_are_those_of_one_thread(model, x.to(memory_format=torch.channels_last))


@each_network
def test_repeated_calls_give_the_same_bits(name: str) -> None:
    """A race need not show at once. The calls between leave NaN in the scratch."""
    torch.set_num_threads(4)
    model, x = make(name, 8)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        for batch in (1, 3, 8):
            poison, clean = torch.full_like(x[:batch], float("nan")), x[:batch]
            expected = fused(clean)
            for _ in range(10):
                fused(poison)
                assert torch.equal(fused(clean), expected), f"batch {batch}"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["stages", "large linear behind", "linear alone"])
def test_calls_from_many_python_threads(name: str, threads: int) -> None:
    """Eight callers, one model, batches and image sizes mixed: every result is that of a call by itself."""
    torch.set_num_threads(threads)
    layers, shape = NETWORKS[name]
    model = nn.Sequential(*layers()).eval()
    fused = fastseq.optimize(model)
    batches = (1, 2, 3, 5, 12)
    # A Sequential without Linear takes images of any size, so that plans are made, kept and dropped meanwhile.
    sizes = [(*shape[:-2], 30 + i, 41 - i) for i in range(10)] if name == "stages" else [shape]
    inputs = [torch.randn(batch, *size) for batch in batches for size in sizes]
    with torch.no_grad():
        expected = [run_fused(model, x) for x in inputs]

    def caller(number: int) -> list[int]:
        wrong = []
        with torch.no_grad():  # of this thread
            for i in range(50):
                which = (number * 7 + i) % len(inputs)
                if not torch.equal(fused(inputs[which]), expected[which]):
                    wrong.append(which)
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(caller, range(8))) == [[]] * 8
    assert fastseq.stats(fused) == {"fused_calls": 400, "eager_calls": 0, "fallbacks": {}}


def test_many_models_in_many_python_threads() -> None:
    models = [MODELS[name].build() for name in ("seed1", "seed2", "seed3", "lenet5")] * 2
    inputs = [MODELS[name].example(4) for name in ("seed1", "seed2", "seed3", "lenet5")] * 2
    with torch.no_grad():
        expected = [fastseq.optimize(model)(x) for model, x in zip(models, inputs, strict=True)]

    def caller(number: int) -> bool:
        # Optimised here, so that the first call, which packs the weights, runs beside others.
        fused = fastseq.optimize(models[number])
        with torch.no_grad():
            return all(torch.equal(fused(inputs[number]), expected[number]) for _ in range(10))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(caller, range(8)))


def test_weights_replaced_while_others_call() -> None:
    """Every result is that of one of the weights, never of a mix."""
    fused = fastseq.optimize(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval())
    x = torch.randn(5, 64)
    weights = [nn.Parameter(torch.randn(8, 64)) for _ in range(4)]
    allowed = []
    with torch.no_grad():
        for weight in weights:
            fused[2].weight = weight
            allowed.append(fused(x))

    def caller(number: int) -> bool:
        with torch.no_grad():
            for i in range(100):
                if number == 0:
                    fused[2].weight = weights[i % len(weights)]
                elif not any(torch.equal(fused(x), result) for result in allowed):
                    return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(caller, range(4)))


COUNTS_THREADS = """
import os, torch, fastseq
from torch import nn

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
large = fastseq.optimize(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()).eval())
small = fastseq.optimize(nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval())
x, y = torch.randn(1, 64, 56, 56), torch.randn(1, 16)
with torch.no_grad():
    before = threads()
    large(x), small(y)
    print("one thread allowed:", threads() - before, "more")
    torch.set_num_threads(3)
    before = threads()
    small(y)
    print("three allowed, little work:", threads() - before, "more")
    large(x)
    print("three allowed, much work:", threads() - before, "more")
assert fastseq.stats(large)["fused_calls"] == 2 and fastseq.stats(small)["fused_calls"] == 2
"""


def test_torch_says_how_many_threads_there_are() -> None:
    done = run_python("-c", COUNTS_THREADS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "one thread allowed: 0 more",
        "three allowed, little work: 0 more",
        "three allowed, much work: 2 more",
    ]


def test_a_python_thread_may_have_its_own_number_of_threads() -> None:
    """As a server's workers do, each with torch.set_num_threads(1)."""
    model, x = make("stages", 3)
    fused = fastseq.optimize(model)
    torch.set_num_threads(3)
    with torch.no_grad():
        expected = fused(x)

    def alone() -> Tensor:
        torch.set_num_threads(1)
        with torch.no_grad():
            return fused(x)

    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(alone).result(), expected)


# Everything at once -----------------------------------------------------------------------------------------------


@pytest.fixture
def switch_often() -> Iterator[None]:
    """Python changes threads as often as it can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


SERVED = {"seed1": (1, 3), "seed2": (1, 7, 64), "seed3": (1, 4), "lenet5": (1, 5, 16)}


@pytest.mark.parametrize("threads", [1, 2])
def test_sixteen_threads_four_models(threads: int, switch_often: None) -> None:
    """Batches, memory formats and, where the model takes them, image sizes mixed."""
    torch.set_num_threads(threads)
    fused = {name: fastseq.optimize(MODELS[name].build()) for name in SERVED}
    work: list[tuple[str, Tensor]] = []
    for name, batches in SERVED.items():
        for batch in batches:
            x = MODELS[name].example(batch)
            work += [(name, x), (name, -x.flip(0))]
            if name in ("seed1", "lenet5"):
                work.append((name, x.to(memory_format=torch.channels_last)))
            if name == "seed1":  # more signatures than a run keeps plans for
                work += [(name, torch.randn(batch, 1, 20 + i, 31 - i)) for i in range(5)]
    with torch.no_grad():
        expected = [run_fused(MODELS[name].build(), x) for name, x in work]

    def caller(number: int) -> list[str]:
        wrong = []
        with torch.no_grad():
            for i in range(40):
                which = (number * 11 + i * 7) % len(work)
                name, x = work[which]
                if not torch.equal(fused[name](x), expected[which]):
                    wrong.append(f"{name} {tuple(x.shape)}")
        return wrong

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(caller, range(16))) == [[]] * 16
    for model in fused.values():
        assert_was_fused(model)


def counts(model: nn.Module) -> bool:
    counters = fastseq.stats(model)
    return counters["fused_calls"] >= 0 and not counters["fallbacks"]


def explains(model: nn.Module) -> bool:
    return "linear_relu" in str(fastseq.explain(model)) and "fused" in repr(fastseq.explain(model).to_dict())


# What another thread may do to a model that is being called, none of which changes its answers.
MEANWHILE: dict[str, Callable[[Any, Tensor], bool]] = {
    "optimize": lambda model, x: type(fastseq.optimize(model)(x)) is Tensor,
    "deepcopy": lambda model, x: type(copy.deepcopy(model)(x)) is Tensor,
    "pickle": lambda model, x: type(pickle.loads(pickle.dumps(model))(x)) is Tensor,
    "explain": lambda model, x: explains(model),
    "explain a call": lambda model, x: str(fastseq.explain(model, x)) != "",
    "stats": lambda model, x: counts(model),
    "reset_stats": lambda model, x: fastseq.reset_stats(model) is None,
    "refresh": lambda model, x: fastseq.refresh(model) is None,
    "verify": lambda model, x: fastseq.verify(model, x) is not None,
    "state_dict": lambda model, x: len(model.state_dict()) == 10,
    "eval": lambda model, x: model.eval() is model,
    "collect garbage": lambda model, x: gc.collect() >= 0,
    "replace a layer by its equal": lambda model, x: model.__setitem__(1, nn.ReLU()) is None,
    "zero_grad": lambda model, x: model.zero_grad() is None,
    "set_num_threads": lambda model, x: torch.set_num_threads(2) is None,
}
SLOW = ("optimize", "deepcopy", "pickle", "verify", "collect garbage")


@pytest.mark.parametrize("what", MEANWHILE)
def test_what_else_threads_do_meanwhile(what: str, switch_often: None) -> None:
    torch.set_num_threads(1)
    plain = MODELS["lenet5"].build()
    fused = fastseq.optimize(plain)
    inputs = [MODELS["lenet5"].example(batch) for batch in (1, 4)]
    expected = [run_fused(plain, x) for x in inputs]
    running = threading.Event()
    running.set()

    def caller(number: int) -> int:
        calls = 0
        with torch.no_grad():
            while running.is_set() or calls < 5:
                which = (number + calls) % 2
                result = fused(inputs[which])
                if what == "replace a layer by its equal":  # one after the other: the call may have run eager
                    torch.testing.assert_close(result, expected[which], rtol=1e-4, atol=1e-4)
                else:
                    assert torch.equal(result, expected[which])
                calls += 1
        return calls

    with ThreadPoolExecutor(6) as pool:
        callers = [pool.submit(caller, i) for i in range(4)]

        def meddle() -> bool:
            with torch.no_grad():
                return all(MEANWHILE[what](fused, inputs[i % 2]) for i in range(6 if what in SLOW else 40))

        meddlers = [pool.submit(meddle) for _ in range(2)]
        try:
            assert all(task.result(60) for task in meddlers)
        finally:
            running.clear()
        assert all(task.result(60) >= 5 for task in callers)
    with torch.no_grad():
        assert torch.equal(fused(inputs[0]), expected[0])


def test_training_copies_while_others_call_the_model(switch_often: None) -> None:
    """The models share nothing: one trains, its siblings serve."""
    torch.set_num_threads(1)
    plain = MODELS["seed2"].build()
    served, x = fastseq.optimize(plain), MODELS["seed2"].example(5)
    expected = run_fused(plain, x)

    def caller(_: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(served(x), expected) for _ in range(100))

    def trainer(_: int) -> Tensor:
        model = fastseq.optimize(served)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(20):
            optimiser.zero_grad()
            model(x).square().mean().backward()
            optimiser.step()
        with torch.no_grad():
            result: Tensor = model(x)
        assert fastseq.stats(model)["fused_calls"] == 1
        return result

    with ThreadPoolExecutor(8) as pool:
        trained = [pool.submit(trainer, i) for i in range(4)]
        assert all(pool.map(caller, range(4)))
        results = [task.result(60) for task in trained]
    assert all(torch.equal(result, results[0]) for result in results) and not torch.equal(results[0], expected)


GONE: dict[str, Callable[[list[Any]], Any]] = {
    "the model": lambda holder: holder.clear(),
    "its layers": lambda holder: [holder[0].__delitem__(0) for _ in range(len(holder[0]))],
    "its weights": lambda holder: [setattr(m, "weight", None) for m in holder[0] if hasattr(m, "weight")],
    "its packed weights": lambda holder: fastseq.refresh(holder[0]),
    "its attributes": lambda holder: holder[0].__dict__.clear(),
}


@pytest.mark.parametrize("what", GONE)
def test_what_is_deleted_while_a_call_uses_it(what: str) -> None:
    """The call ends with the result it began. Ten calls, of which some are inside their kernels at that moment."""
    torch.set_num_threads(1)
    plain = MODELS["seed1"].build()
    x = MODELS["seed1"].example(12)
    expected = run_fused(plain, x)
    for i in range(10):
        holder: list[Any] = [fastseq.optimize(plain)]
        gone = weakref.ref(holder[0])
        begins = threading.Event()

        def call(holder: list[Any] = holder, begins: threading.Event = begins) -> Tensor:
            with torch.no_grad():
                holder[0](x)
                begins.set()
                # From here on nothing but this frame may hold the model.
                result: Tensor = holder[0](x)
                return result

        with ThreadPoolExecutor(1) as pool:
            task = pool.submit(call)
            assert begins.wait(60)
            time.sleep(0.0003 * i)
            try:
                GONE[what](holder)
                result = task.result(60)
            except (IndexError, TypeError, AttributeError, RuntimeError):
                # It came before the call, which found no model or a broken one, as eager would.
                assert what != "its packed weights"
                continue
        # A call that began with part of the layers gives what those give.
        assert torch.equal(result, expected) or what == "its layers"
        holder.clear()
        gc.collect()
        del task
        assert gone() is None


ENDS_WITH_THREADS = """
import os, sys, threading, torch, fastseq
from concurrent.futures import ThreadPoolExecutor
from fastseq.testing import MODELS

torch.set_num_threads(2)
sys.setswitchinterval(1e-5)
models = {name: fastseq.optimize(MODELS[name].build()) for name in ("seed1", "seed2", "seed3", "lenet5")}
inputs = {name: MODELS[name].example(8) for name in models}
begun = threading.Barrier(9)
done = []

def serve(name):
    with torch.no_grad():
        models[name](inputs[name])
        begun.wait(60)
        for _ in range(50):
            models[name](inputs[name])
    done.append(name)
    os.write(1, b"done\\n")  # whole, unlike print, which writes a line and its end apart

names = list(models) * 2
if sys.argv[1] == "threads":
    for name in names:
        threading.Thread(target=serve, args=(name,)).start()
else:
    pool = ThreadPoolExecutor(8)
    for name in names:
        pool.submit(serve, name)
begun.wait(60)
# The end of the program: Python waits for its threads, and whatever they use must still be there.
"""


@pytest.mark.parametrize("kind", ["threads", "executor"])
def test_the_program_ends_while_threads_call(kind: str) -> None:
    done = run_python("-c", ENDS_WITH_THREADS, kind)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert len(done.stdout.split()) == 8
