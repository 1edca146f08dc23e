"""load_state_dict while other threads call the model: every answer is that of the old weights or of the new ones."""

from __future__ import annotations

import copy
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq import FusedSequential
from fastseq.testing import MODELS

NAMES = ("seed1", "seed2", "seed3", "lenet5")
CALLERS = 16
BATCHES = {"seed1": (1, 2), "seed2": (1, 7, 50), "seed3": (1, 3), "lenet5": (1, 5, 16)}

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)


def load_slowly(model: nn.Module) -> None:
    """A pause before each layer is loaded, so that others call the model when it has part of the new weights."""
    for module in model.modules():
        if not list(module.children()):
            module.register_load_state_dict_pre_hook(lambda *_: time.sleep(0.0005))


class Served:
    """An optimised model, two state dicts for it, and the results that its inputs may have."""

    def __init__(self, name: str, is_slow: bool) -> None:
        self.model = fastseq.optimize(MODELS[name].build(seed=1))
        self.states: list[State] = [MODELS[name].build(seed=seed).state_dict() for seed in (1, 2)]
        self.inputs = [MODELS[name].example(batch) for batch in BATCHES[name]]
        with torch.no_grad():
            self.model(self.inputs[0])
            calls = fastseq.stats(self.model)["fused_calls"]
            # Each native run switches as a whole. Where a forward makes several, they may switch between two of them.
            parts = [path for path, m in self.model.named_modules() if type(m) is FusedSequential]
            parts = parts if calls > 1 else [""]
            assert calls == len(parts)
            self.whole = [self.results_of([state] * len(parts), parts) for state in self.states]
            mixed = itertools.product(self.states, repeat=len(parts))
            self.allowed = [self.results_of(list(choice), parts) for choice in mixed]
            self.model.load_state_dict(self.states[0])
        if is_slow:
            load_slowly(self.model)

    def results_of(self, states: list[State], parts: list[str]) -> list[Tensor]:
        """One part of the model from each state dict."""
        chosen = {}
        for part, state in zip(parts, states, strict=True):
            chosen.update({key: value for key, value in state.items() if key.startswith(part)})
        self.model.load_state_dict(chosen)
        return [self.model(x) for x in self.inputs]

    def is_right(self, which: int) -> bool:
        """Whether a call made now gives a result that some moment of the loading allows."""
        result = self.model(self.inputs[which])
        return any(torch.equal(result, results[which]) for results in self.allowed)


def load(served: Served, number: int, assign: bool) -> None:
    state = served.states[number % 2]
    if assign:  # the tensors become the parameters: each time others, so that none is written to
        state = {key: value.clone() for key, value in state.items()}
    served.model.load_state_dict(state, assign=assign)


WAYS: dict[str, Callable[[int], bool]] = {
    "copied": lambda _: False,
    "assigned": lambda _: True,
    "either": lambda i: i % 3 == 0,
}


@pytest.mark.parametrize(
    ("way", "loads", "is_slow"),
    [("copied", 16, False), ("assigned", 16, False), ("either", 16, False), ("either", 5, True)],
    ids=["copied", "assigned", "either", "either, slow"],
)
def test_answers_are_of_the_old_weights_or_of_the_new(way: str, loads: int, is_slow: bool) -> None:
    """16 callers of 4 models, and one thread that loads one state dict after the other into each."""
    all_served = [Served(name, is_slow) for name in NAMES]
    loading, ready = threading.Event(), threading.Barrier(CALLERS + 1)
    loading.set()

    def caller(number: int) -> tuple[int, list[str]]:
        calls, wrong = 0, []
        served, name = all_served[number % 4], NAMES[number % 4]
        with torch.no_grad():
            ready.wait(60)
            while loading.is_set():
                which = (number + calls) % len(served.inputs)
                if not served.is_right(which):
                    wrong.append(f"{name}, batch {len(served.inputs[which])}, call {calls}")
                calls += 1
        return calls, wrong

    def loader() -> list[str]:
        stale = []
        ready.wait(60)
        try:
            with torch.no_grad():
                for i in range(1, loads + 1):
                    for served, name in zip(all_served, NAMES, strict=True):
                        load(served, i, WAYS[way](i))
                        # Once loaded, loaded.
                        for which, x in enumerate(served.inputs):
                            if not torch.equal(served.model(x), served.whole[i % 2][which]):
                                stale.append(f"{name}, batch {len(x)}, load {i}")
        finally:
            loading.clear()
        return stale

    with ThreadPoolExecutor(CALLERS + 1) as pool:
        stale = pool.submit(loader)
        done = list(pool.map(caller, range(CALLERS)))
    assert not stale.result(), "what load_state_dict loaded did not count after it"
    assert all(calls > 0 for calls, _ in done)
    wrong = list(itertools.chain.from_iterable(texts for _, texts in done))
    assert not wrong, f"{len(wrong)} of {sum(calls for calls, _ in done)} answers mix weights, the first: {wrong[0]}"
    for served in all_served:
        assert not fastseq.stats(served.model)["fallbacks"]


def test_weights_in_place_are_read_before_a_load_or_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not packed cannot answer from before: calls wait for the load, and the load for calls that have begun."""
    monkeypatch.setenv("FASTSEQ_KERNEL", "linear_in_place")
    served = Served("seed2", is_slow=True)
    loading = threading.Event()
    loading.set()

    def caller(number: int) -> tuple[int, int]:
        calls = wrong = 0
        with torch.no_grad():
            while loading.is_set() or not calls:
                wrong += not served.is_right((number + calls) % len(served.inputs))
                calls += 1
        return calls, wrong

    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(caller, number) for number in range(4)]
        try:
            for i in range(1, 13):
                load(served, i, WAYS["either"](i))
        finally:
            loading.clear()
        done = [one.result() for one in callers]
    assert all(calls > 0 and not wrong for calls, wrong in done), done
    assert not fastseq.stats(served.model)["fallbacks"]


def test_a_call_during_a_load_does_not_wait_for_it() -> None:
    """The callers go on with the old weights: a load may take as long as it likes."""
    served = Served("lenet5", is_slow=False)
    inside, go_on = threading.Event(), threading.Event()

    def pause(*_: Any) -> None:
        inside.set()
        assert go_on.wait(60)

    served.model[7].register_load_state_dict_pre_hook(pause)  # the first Linear; the convolutions are loaded by then
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        task = pool.submit(load, served, 1, False)
        assert inside.wait(60)
        try:
            during = [served.model(x) for x in served.inputs]
        finally:
            go_on.set()
        task.result(60)
        after = [served.model(x) for x in served.inputs]
    for found, old, new, behind in zip(during, *served.whole, after, strict=True):
        assert torch.equal(found, old) and torch.equal(behind, new)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_after_a_load_that_failed_the_weights_are_eagers(change: str) -> None:
    """Eager loads what fits before it raises. The model is not left waiting for the end of that load."""
    served = Served("lenet5", is_slow=False)
    plain = MODELS["lenet5"].build(seed=1)
    state = copy.deepcopy(served.states[1])
    if change == "missing":
        del state["7.bias"]
    elif change == "unexpected":
        state["13.weight"] = torch.zeros(3)
    else:
        state["7.weight"] = torch.zeros(3, 5)
    errors = []
    for model in (served.model, plain):
        with pytest.raises(RuntimeError, match="Error") as caught:
            model.load_state_dict(state)
        errors.append(str(caught.value).partition("\n")[2])
    assert errors[0] == errors[1]
    with torch.no_grad():
        for x, old in zip(served.inputs, served.whole[0], strict=True):
            found = served.model(x)
            torch.testing.assert_close(found, plain(x))
            assert not torch.equal(found, old)
        served.model.load_state_dict(served.states[1])
        assert torch.equal(served.model(served.inputs[0]), served.whole[1][0])
    assert not fastseq.stats(served.model)["fallbacks"]


def test_part_of_a_model_may_be_loaded_while_others_call() -> None:
    """load_state_dict of a Sequential inside: of its run, again the old weights or the new."""
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(40, 30), nn.ReLU()), nn.Linear(30, 9)).eval()
    fused, x = fastseq.optimize(model), torch.randn(3, 40)
    states = [{key: torch.randn_like(value) for key, value in model[1].state_dict().items()} for _ in range(2)]
    allowed = []
    with torch.no_grad():
        for state in states:
            fused[1].load_state_dict(state)
            allowed.append(fused(x))
    load_slowly(fused)
    loading = threading.Event()
    loading.set()

    def caller(_: int) -> bool:
        with torch.no_grad():
            while loading.is_set():
                found = fused(x)
                if not any(torch.equal(found, result) for result in allowed):
                    return False
        return True

    with ThreadPoolExecutor(4) as pool:
        tasks = [pool.submit(caller, i) for i in range(4)]
        try:
            for i in range(100):
                fused[1].load_state_dict(states[i % 2])
        finally:
            loading.clear()
        assert all(task.result(60) for task in tasks)


class During:
    """Runs something in the middle of a load of `model`, just before `layer`, in that or another thread."""

    def __init__(self, layer: nn.Module, work: Callable[[], Any], in_other_thread: bool) -> None:
        self.results: list[Any] = []
        self.work, self.in_other_thread = work, in_other_thread
        layer.register_load_state_dict_pre_hook(self.hook)

    def hook(self, *_: Any) -> None:
        def run() -> None:
            with torch.no_grad():
                self.results.append(self.work())

        if not self.in_other_thread:
            run()
            return
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(60)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 9)).eval()


def test_a_call_of_the_loading_thread_leaves_the_old_weights_to_the_others() -> None:
    fast, x, other = fastseq.optimize(mlp()), torch.randn(3, 40), mlp()
    with torch.no_grad():
        old = fast(x)
        inside = During(fast[2], lambda: fast(x), in_other_thread=False)
        outside = During(fast[2], lambda: fast(x), in_other_thread=True)
        fast.load_state_dict(other.state_dict())
        assert torch.equal(outside.results[0], old)
        assert not torch.equal(inside.results[0], old)  # eager, on what is there
        torch.testing.assert_close(fast(x), other(x))


def test_a_first_call_in_the_middle_of_a_load_waits_for_its_end() -> None:
    fast, x, other = fastseq.optimize(mlp()), torch.randn(3, 40), mlp()
    results: list[Tensor] = []

    def first_call() -> None:
        with torch.no_grad():
            results.append(fast(x))

    thread = threading.Thread(target=first_call)
    fast[2].register_load_state_dict_pre_hook(lambda *_: (thread.start(), time.sleep(0.2)))
    fast.load_state_dict(other.state_dict())
    thread.join(60)
    with torch.no_grad():
        torch.testing.assert_close(results[0], other(x))
        assert torch.equal(results[0], fast(x))


def test_inputs_that_eager_alone_takes_while_weights_are_loaded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()).eval()
    fast, image = fastseq.optimize(model), torch.randn(3, 8, 8)
    with torch.no_grad():
        fast(image[None])
        results: list[Tensor] = []

        def unbatched() -> None:
            with torch.no_grad():
                results.append(fast(image))

        thread = threading.Thread(target=unbatched)
        fast[2].register_load_state_dict_pre_hook(lambda *_: (thread.start(), time.sleep(0.1)))
        fast.load_state_dict(model.state_dict())
        thread.join(60)
        assert torch.equal(results[0], model(image))
