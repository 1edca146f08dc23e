"""What test_fork.py runs in other processes: `python tests/fork_scenarios.py NAME...` fails or returns 0.

GNU's OpenMP, which torch and fastseq share, keeps its threads by the thread that opens a region. In a forked child they
are gone, and a region opened by the thread that forked waits for them for ever.
"""

from __future__ import annotations

import concurrent.futures
import faulthandler
import multiprocessing
import os
import pickle
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastseq
from fastseq.testing import MODELS

THREADS = 3
SECONDS = 60  # more than any answer takes; a child that needs longer hangs
CASES = (("seed2", 1), ("seed2", 33), ("seed1", 5), ("seed3", 7), ("lenet5", 32), ("mlp", 64))

Answers = list[bytes]
models: dict[str, nn.Module] = {}
users: set[tuple[int, int]] = set()  # processes and threads
SCENARIOS: dict[str, Callable[[], None]] = {}
FIRST: list[str] = []  # those that need a process that did nothing before


def scenario(function: Callable[[], None]) -> Callable[[], None]:
    SCENARIOS[function.__name__] = function
    return function


def first_scenario(function: Callable[[], None]) -> Callable[[], None]:
    FIRST.append(function.__name__)
    return scenario(function)


def optimise(names: Iterable[str] = tuple(name for name, _ in CASES)) -> None:
    """Without a call. Not for large weights in a child of a process that used torch's threads: torch copies those with
    them, and hangs."""
    models.update({name: fastseq.optimize(MODELS[name].build()) for name in dict.fromkeys(names)})


def answer(name: str, batch: int) -> bytes:
    """The bits of a fused call."""
    if name not in models:
        optimise([name])
    before = fastseq.stats(models[name])["fused_calls"]
    with torch.no_grad():
        result: Tensor = models[name](MODELS[name].example(batch))
    after = fastseq.stats(models[name])
    assert after["fused_calls"] > before and not after["fallbacks"], after
    return result.numpy().tobytes()


def answers() -> Answers:
    return [answer(*case) for case in CASES]


def thread_count() -> int:
    return len(os.listdir("/proc/self/task"))


def in_child(function: Callable[[], Any], returns: bool = True) -> Any:
    """What `function` gives in a forked child. Fails if that takes too long: the child says where it hangs."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            result = pickle.dumps(function())
            with open(writer, "wb") as stream:
                stream.write(result)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as stream:
        if not select.select([stream], [], [], SECONDS)[0]:
            os.kill(pid, signal.SIGABRT)
            os.waitpid(pid, 0)
            raise AssertionError("the child hangs")
        data = stream.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with status {status}"
    return pickle.loads(data)


def in_thread(function: Callable[[], Any]) -> Any:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(SECONDS)


def use() -> Answers:
    """The answers, of a thread that has OpenMP threads from now on."""
    before = thread_count()
    result = answers()
    caller = (os.getpid(), threading.get_ident())
    grown = thread_count() - before
    assert caller in users or grown >= THREADS - 1, "no second thread took part: the scenario shows nothing"
    users.add(caller)
    return result


# After what -------------------------------------------------------------------------------------------------------


@first_scenario
def before_any_use() -> None:
    found = in_child(answers)
    assert found == use()


@scenario
def after_use() -> None:
    expected = use()
    for _ in range(3):
        assert in_child(answers) == expected
    assert answers() == expected


@first_scenario
def after_torch_used_its_threads() -> None:
    before = thread_count()
    torch.randn(3000, 1000).add_(1).sigmoid_()
    assert thread_count() > before
    optimise()
    found = in_child(answers)  # the first fused calls of all
    assert found == answers()


@first_scenario
def after_use_in_another_thread() -> None:
    """The thread that forks has no OpenMP threads, another one has."""
    expected = in_thread(use)
    assert in_child(answers) == expected
    assert in_thread(lambda: in_child(answers)) == expected


@first_scenario
def after_use_by_one_thread() -> None:
    torch.set_num_threads(1)
    expected = answers()

    def with_more() -> Answers:
        torch.set_num_threads(THREADS)
        return answers()

    assert in_child(answers) == expected and in_child(with_more) == expected


# Then what in the child -------------------------------------------------------------------------------------------


@scenario
def new_threads_of_the_child() -> None:
    """They start with nothing lost, and use OpenMP as ever."""
    expected = use()

    def child() -> Answers:
        assert answers() == expected
        in_thread(torch.get_num_threads)  # torch makes a pool anew here, and raises if two threads make it at once
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            first, second = pool.submit(use), pool.submit(answers)
            assert second.result(SECONDS) == expected
            return first.result(SECONDS)

    assert in_child(child) == expected


@scenario
def children_of_children() -> None:
    expected = use()

    def child() -> Answers:
        assert in_child(answers) == expected
        assert in_child(lambda: in_child(answers)) == expected
        # From a thread that has OpenMP threads in the child, which the grandchild does not inherit.
        assert in_thread(lambda: (use(), in_child(answers))[1]) == expected
        return answers()

    assert in_child(child) == expected


@scenario
def other_weights_in_the_child() -> None:
    expected = use()
    negative = {name: {k: -v for k, v in model.state_dict().items()} for name, model in models.items()}

    def child() -> tuple[Answers, Answers]:
        for name, model in models.items():
            model.load_state_dict(negative[name], assign=True)
        changed = answers()
        optimise(["seed1", "seed2"])  # again, here
        return changed, answers()

    changed, again = in_child(child)
    assert all(a != b for a, b in zip(changed, expected, strict=True))
    for (name, _), now, first, then in zip(CASES, again, expected, changed, strict=True):
        assert now == (first if name in ("seed1", "seed2") else then), name
    assert answers() == expected


@scenario
def much_work_in_the_child() -> None:
    """More than one thread computes it, started for the call and gone after it."""
    use()

    def child() -> bool:
        stop, seen = threading.Event(), [0]

        def watch() -> None:
            while not stop.wait(0.0005):
                seen[0] = max(seen[0], thread_count())

        watcher = threading.Thread(target=watch)
        watcher.start()
        for _ in range(200):
            answer("seed1", 200)
            if seen[0] >= 2 + THREADS - 1:
                break
        stop.set()
        watcher.join()
        # A thread that was joined stays in /proc for a moment.
        for _ in range(5000):
            if thread_count() == 1:
                break
            time.sleep(0.001)
        return seen[0] >= 2 + THREADS - 1 and thread_count() == 1

    assert in_child(child)
    expected = answer("seed1", 200)
    assert in_child(lambda: answer("seed1", 200)) == expected


@scenario
def no_more_threads_for_the_child() -> None:
    """The system refuses to start any: the caller computes alone."""
    expected = [use(), answer("seed1", 50)]

    def child() -> list[Any]:
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        threading.stack_size(64 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), resource.RLIM_INFINITY))
        try:
            threading.Thread(target=answers).start()
        except RuntimeError as error:
            assert "can't start new thread" in str(error)
        else:
            raise AssertionError("a thread was started: the scenario shows nothing")
        return [answers(), answer("seed1", 50)]

    assert in_child(child) == expected


# While other threads are at work ----------------------------------------------------------------------------------


@scenario
def while_other_threads_call() -> None:
    """The child inherits their plans and what they hold: scratch that is out, and perhaps a lock."""
    torch.set_num_threads(2)
    small = [("seed2", 1), ("seed2", 3), ("lenet5", 1)]  # short calls, which take and give back all the time
    expected = [answer(*case) for case in small]
    everything = answers()
    stop = threading.Event()

    def caller() -> None:
        while not stop.is_set():
            assert [answer(*case) for case in small] == expected

    callers = [threading.Thread(target=caller, daemon=True) for _ in range(3)]
    for thread in callers:
        thread.start()
    try:
        for i in range(60):
            assert in_child(lambda: [answer(*case) for case in small]) == expected
            if i % 10 == 0:
                assert in_child(answers) == everything
    finally:
        stop.set()
    for thread in callers:
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert answers() == everything


@scenario
def from_several_threads_at_once() -> None:
    expected = use()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        tasks = [pool.submit(in_child, answers) for _ in range(8)] + [pool.submit(answers) for _ in range(8)]
        assert all(task.result(SECONDS) == expected for task in tasks)


# Through libraries ------------------------------------------------------------------------------------------------


def answer_case(case: tuple[str, int]) -> bytes:
    return answer(*case)


@scenario
def multiprocessing_pool() -> None:
    expected = use()
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map_async(answer_case, CASES * 4).get(SECONDS) == expected * 4
        assert answers() == expected
        assert pool.map_async(answer_case, CASES * 2).get(SECONDS) == expected * 2


@scenario
def process_pool_executor() -> None:
    expected = use()
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        assert list(pool.map(answer_case, CASES * 2, timeout=SECONDS)) == expected * 2


class Answering(Dataset[bytes]):
    """Calls the models in the loader's workers."""

    def __len__(self) -> int:
        return 2 * len(CASES)

    def __getitem__(self, index: int) -> bytes:
        return answer(*CASES[index % len(CASES)])


@scenario
def data_loader_workers() -> None:
    expected = use()
    for persistent in (False, True):
        loader = DataLoader(
            Answering(),
            batch_size=2,
            num_workers=2,
            collate_fn=list,
            multiprocessing_context="fork",
            persistent_workers=persistent,
            timeout=SECONDS,
        )
        for _ in range(2):
            found: Answers = []
            for batch in loader:
                found += batch
                assert answer(*CASES[3]) == expected[3]
            assert found == expected * 2
            assert answers() == expected
            assert in_child(answers) == expected


if __name__ == "__main__":
    faulthandler.enable()
    for name in sys.argv[1:]:
        print(name, flush=True)
        torch.set_num_threads(THREADS)
        SCENARIOS[name]()
