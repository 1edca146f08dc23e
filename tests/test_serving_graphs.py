"""fastseq.serving.graphs: what surrounds a captured graph, on any machine; the graphs themselves on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import in_threads
from torch import Tensor, nn

import fastseq
from fastseq.serving import Runner, graphs
from fastseq.testing import MODELS, assert_matches

SIZES = (1, 4)


class Replayed:
    """Stands for a captured call: one place for inputs, one for results, which each replay overwrites."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...], pool: Any) -> None:
        self.model, self.inputs, self.pool = model, inputs, pool
        self.outputs = model(*inputs)
        self.is_running = False

    def replay(self) -> None:
        assert not self.is_running, "one graph object in two threads"
        self.is_running = True
        new = self.model(*self.inputs)
        for mine, y in zip(*(new, self.outputs) if isinstance(new, tuple) else ([new], [self.outputs]), strict=True):
            y.copy_(mine)
        self.is_running = False


class Event:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record(self, stream: Any) -> None:
        self.log.append("record")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What happened on the streams of a device that is not there."""
    found: list[str] = []
    stream = SimpleNamespace(wait_event=lambda event: found.append("wait"))
    cuda = SimpleNamespace(
        device=lambda device: contextlib.nullcontext(),
        graph_pool_handle=object,
        Event=lambda: Event(found),
        current_stream=lambda device: stream,
        synchronize=lambda device: found.append("synchronize"),
    )
    monkeypatch.setattr(graphs, "Graph", Replayed)
    monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=cuda, no_grad=torch.no_grad))
    yield found


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def test_a_part_of_a_bucket(log: list[str]) -> None:
    model = linear()
    captured = graphs.Graphs(model, (torch.zeros(1, 6),), SIZES)
    assert list(captured.graphs) == [4, 1] and len({graph.pool for graph in captured.graphs.values()}) == 1
    for rows, size in ((4, 4), (3, 4), (1, 1), (2, 4)):
        x = torch.randn(rows, 6)
        assert_matches(captured.run((x,), size), model, x)
    assert log == ["wait", "record"] * 4, "calls on different streams are not in order"


def test_results_are_not_overwritten(log: list[str]) -> None:
    model = linear()
    captured = graphs.Graphs(model, (torch.zeros(1, 6),), SIZES)
    inputs = [torch.randn(4, 6) for _ in range(3)]
    results = [captured.run((x,), 4) for x in inputs]
    for x, y in zip(inputs, results, strict=True):
        assert_matches(y, model, x)


def test_tensors_that_are_replaced_are_captured_anew(log: list[str]) -> None:
    model, x = linear(), torch.randn(3, 6)
    captured = graphs.Graphs(model, (torch.zeros(1, 6),), SIZES)
    with torch.no_grad():
        model[0].weight.mul_(2)
    captured.run((x,), 4)
    assert captured.captures == 1 and "synchronize" not in log
    model[0].weight.data = torch.randn(8, 6)
    assert_matches(captured.run((x,), 4), model, x)
    assert captured.captures == 2 and log.count("synchronize") == 1
    captured.run((x,), 4)
    assert captured.captures == 2


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + y, x - y


def test_several_inputs_and_results(log: list[str]) -> None:
    runner = Runner(Two().eval(), (torch.zeros(1, 3), torch.zeros(1, 3)), buckets=SIZES)
    runner._graphs = graphs.Graphs(runner.model, runner._probe, runner.buckets)
    x, y = torch.randn(9, 3), torch.randn(9, 3)
    total, difference = runner(x, y)
    assert torch.equal(total, x + y) and torch.equal(difference, x - y)
    assert runner.stats()["buckets"] == {1: 1, 4: 2} and runner.stats()["splits"] == 1


def test_threads_take_turns(log: list[str]) -> None:
    model = linear()
    runner = Runner(model, torch.zeros(1, 6), buckets=SIZES)
    runner._graphs = graphs.Graphs(model, runner._probe, runner.buckets)
    failures = []

    def work(seed: int) -> None:
        x = torch.randn(1 + seed % 4, 6, generator=torch.Generator().manual_seed(seed))
        for _ in range(50):
            try:
                assert_matches(runner(x), model, x)
            except BaseException as error:
                failures.append(error)

    in_threads(work, 6)
    assert not failures


def test_there_are_none_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="an example on a GPU for cuda_graphs=True, got cpu"):
        Runner(linear(), torch.zeros(1, 6), cuda_graphs=True)


# On a GPU ------------------------------------------------------------------------------------------------------------

NETWORKS = ("seed1", "seed2", "seed3", "cifar_vgg_bn")


def on_gpu(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    case = MODELS[name]
    plain = case.build().cuda().eval()
    return plain, fastseq.optimize(plain), case.example(7).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_replays_answer_as_calls(name: str) -> None:
    _, model, x = on_gpu(name)
    runner = Runner(model, x[:1], buckets=SIZES, cuda_graphs=True)
    called = Runner(model, x[:1], buckets=SIZES)
    results = [runner(x[:rows]) for rows in (1, 2, 4, 7)]
    for rows, result in zip((1, 2, 4, 7), results, strict=True):
        torch.testing.assert_close(result, called(x[:rows]), rtol=1e-5, atol=1e-6)
    runner.selfcheck()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("is_in_place", [True, False], ids=["in place", "replaced"])
def test_replays_follow_weights(name: str, is_in_place: bool) -> None:
    plain, model, x = on_gpu(name)
    runner = Runner(model, x[:1], buckets=SIZES, cuda_graphs=True)
    runner(x)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        new = theirs.detach() * 0.5
        if is_in_place:
            mine.data.copy_(new)
        else:
            mine.data = new
        theirs.data = new
    with torch.no_grad():
        torch.testing.assert_close(runner(x), plain(x), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_threads_on_streams_of_their_own() -> None:
    _, model, x = on_gpu("seed3")
    runner = Runner(model, x[:1], buckets=SIZES, cuda_graphs=True)
    expected = [runner(x[: 1 + i % 4] + i) for i in range(6)]
    failures: list[int] = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(100):
                if not torch.equal(runner(x[: 1 + i % 4] + i), expected[i]):
                    failures.append(i)

    torch.cuda.synchronize()
    in_threads(work, 6)
    assert not failures
