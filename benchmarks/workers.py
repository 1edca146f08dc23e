"""One process per engine, asked in turn.

Thread pools of different libraries spin in wait of more work, so in one process they take each other's cores. Here each
engine has a process of its own that blocks in a read while another one is being timed, and after each block the parent
waits until that process uses no more CPU time: after a call libgomp spins for up to 10 ms, ONNX Runtime for 40 ms.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from cases import CASES
from limits import measure_fma, measure_limits
from peers import PEERS, Call, Peer, as_tensor
from torch import Tensor, nn

from fastseq.testing import relative_error

LONGEST_SPIN_SECONDS = 0.5
REPLY_TIMEOUT_SECONDS = 1800  # max-autotune of a large network compiles and tries for minutes
FEWEST_ROUNDS = 5

# Far above what the type gives in any summation order or with Winograd, far below what fewer bits give.
WRONG_ABOVE = {"float32": 1e-4, "bfloat16": 0.05}


class WorkerError(Exception):
    """What an engine raised, or how its process ended."""


class _Session:
    """The child's side: the engine, and the call that it is to time next."""

    def __init__(self, peer: Peer, threads: int, dtype: str) -> None:
        self.peer = peer
        self.threads = threads
        self.dtype = dtype
        self.built: tuple[str, nn.Module] | None = None
        self.call: Call | None = None

    def version(self) -> str:
        return self.peer.version()

    def prepare(self, case_name: str, batch: int, exact: Tensor, block_seconds: float) -> dict[str, float]:
        """Makes the call, checks its result, and finds how many calls fill a block."""
        case = CASES[case_name]
        if self.built is None or self.built[0] != case_name:
            self.built = (case_name, case.build())
        x = case.example(batch)
        for package in self.peer.packages:  # so that importing is not counted as preparing
            __import__(package)
        start = time.perf_counter()
        with torch.no_grad():
            self.call = self.peer.prepare[self.dtype](self.built[1], x, self.threads)
        with torch.inference_mode():
            output = self.call()
            first_result = time.perf_counter() - start
            error = relative_error(as_tensor(output, exact.shape), exact)["rel_max"]
            del output
            start, calls = time.perf_counter(), 0
            while calls < 3 or time.perf_counter() - start < block_seconds:
                self.call()
                calls += 1
            per_call = (time.perf_counter() - start) / calls
        return {"error": error, "first_result_s": first_result, "calls": max(1, round(block_seconds / per_call))}

    def time_block(self, calls: int) -> tuple[float, float]:
        """Seconds per call, and CPU seconds per second of all threads.

        The others have had the caches meanwhile, so a fifth of a block comes first, untimed.
        """
        call = self.call
        assert call is not None
        gc.collect()
        gc.disable()
        try:
            with torch.inference_mode():
                for _ in range(1 + calls // 5):
                    call()
                start, cpu_start = time.perf_counter(), time.process_time()
                for _ in range(calls):
                    call()
                elapsed, cpu_elapsed = time.perf_counter() - start, time.process_time() - cpu_start
                return elapsed / calls, cpu_elapsed / elapsed
        finally:
            gc.enable()

    def release(self) -> None:
        """Frees the model, for the next one may need the memory."""
        self.built = self.call = None
        gc.collect()

    def ceiling(self) -> dict[str, Any]:
        """What this machine can do: its limits, and the best of several large matrix products and memory copies."""
        size = 1536
        a, b, c = (torch.ones(size, size) for _ in range(3))
        source, copy = (torch.ones(32 << 20) for _ in range(2))  # 128 MiB each: outside every cache
        mm_seconds = _best_of(12, lambda: torch.mm(a, b, out=c))
        copy_seconds = _best_of(12, lambda: copy.copy_(source))
        return {
            "sgemm_gflops": round(2 * size**3 / mm_seconds / 1e9, 1),
            "copy_gbytes_per_s": round(2 * source.nbytes / copy_seconds / 1e9, 1),
            "fma_gflops_per_core": measure_fma(),
            **measure_limits(self.threads).as_dict(),
        }


def _best_of(repeats: int, function: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def _serve(connection: Connection, peer_name: str, threads: int, dtype: str) -> None:
    torch.set_num_threads(threads)
    session = _Session(PEERS[peer_name], threads, dtype)
    while True:
        try:
            method, arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            connection.send((True, getattr(session, method)(*arguments)))
        except Exception as error:  # whatever an engine raises is its result for this case
            text = " ".join(f"{type(error).__name__}: {error}".split())
            connection.send((False, text if len(text) <= 300 else f"{text[:300]}..."))


class Worker:
    """The parent's side of one process; a process that died is started again when it is next needed."""

    def __init__(self, peer_name: str, threads: int, cores: set[int], dtype: str = "float32") -> None:
        self.peer_name = peer_name
        self.threads = threads
        self.cores = cores
        self.dtype = dtype
        self._process: Any = None
        self._connection: Any = None

    def ask(self, method: str, *arguments: Any) -> Any:
        if self._process is None:
            self._start()
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(REPLY_TIMEOUT_SECONDS):
                self.close()
                raise WorkerError(f"no answer within {REPLY_TIMEOUT_SECONDS} s")
            succeeded, reply = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            status = self._process.exitcode
            self.close()
            raise WorkerError(f"the process ended with exit code {status}") from None
        if not succeeded:
            raise WorkerError(reply)
        return reply

    def wait_until_idle(self) -> None:
        """Returns when all threads of the process sleep."""
        deadline = time.perf_counter() + LONGEST_SPIN_SECONDS
        used = self._cpu_seconds()
        while time.perf_counter() < deadline:
            time.sleep(0.005)
            before, used = used, self._cpu_seconds()
            if used - before < 0.0001:
                return

    def _cpu_seconds(self) -> float:
        # The clock id that clock_getcpuclockid(3) gives for another process, which Python does not wrap.
        try:
            return time.clock_gettime((~self._process.pid << 3) | 2)
        except OSError:  # it has ended; the next question finds out why
            return 0.0

    def close(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.join(5)
            self._process.kill()
            self._process = None

    def _start(self) -> None:
        # Affinity and environment are inherited: every library reads them when it is loaded, none can be told later.
        context = multiprocessing.get_context("spawn")
        self._connection, child_end = context.Pipe()
        arguments = child_end, self.peer_name, self.threads, self.dtype
        self._process = context.Process(target=_serve, args=arguments, name=self.peer_name, daemon=True)
        environment = {"OMP_NUM_THREADS": str(self.threads), "PYTHONWARNINGS": "ignore"}
        with _inherited({**environment, **PEERS[self.peer_name].environment}, self.cores):
            self._process.start()
        child_end.close()


@contextmanager
def _inherited(environment: dict[str, str], cores: set[int]) -> Iterator[None]:
    """Lets processes that are started inside have this environment and these cores."""
    old_environment, old_cores = dict(os.environ), os.sched_getaffinity(0)
    os.environ.update(environment)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, old_cores)
        os.environ.clear()
        os.environ.update(old_environment)


@dataclass
class Measurement:
    """One engine on one case: of each block the seconds per call and the cores in use, or why there are none."""

    samples: list[float] = field(default_factory=list)
    cores_used: list[float] = field(default_factory=list)
    error: float | None = None
    first_result_s: float | None = None
    problem: str | None = None


def measure(
    workers: dict[str, Worker],
    case_name: str,
    batch: int,
    exact: Tensor,
    rounds: int,
    block_seconds: float,
    budget_seconds: float,
) -> dict[str, Measurement]:
    """Checks every engine against the float64 result `exact`, then times them in rounds, in a new order each round."""
    results = {name: Measurement() for name in workers}
    calls: dict[str, int] = {}
    for name, worker in workers.items():
        result = results[name]
        try:
            info = worker.ask("prepare", case_name, batch, exact, block_seconds)
        except WorkerError as error:
            result.problem = f"failed: {error}"
            continue
        worker.wait_until_idle()
        result.error, result.first_result_s = info["error"], info["first_result_s"]
        if info["error"] <= WRONG_ABOVE[worker.dtype]:  # a NaN is not
            calls[name] = info["calls"]
        else:
            result.problem = f"wrong: error {info['error']:.2g} of the output's scale"

    shuffle = random.Random(0).shuffle
    deadline = time.perf_counter() + budget_seconds
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() > deadline:
            break
        order = list(calls)
        shuffle(order)
        for name in order:
            try:
                seconds, cores_used = workers[name].ask("time_block", calls[name])
                results[name].samples.append(seconds)
                results[name].cores_used.append(cores_used)
                workers[name].wait_until_idle()
            except WorkerError as error:
                results[name].problem = f"failed: {error}"
                del calls[name]
    return results
