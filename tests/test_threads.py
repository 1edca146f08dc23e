"""Threads: any number of them gives the bits of one, calls from many Python threads do not disturb each other, and
torch's number of threads is obeyed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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
