"""What a server needs beside a model, whatever the server: warm-up, batches of any size, counters, a self-check.

No server is written here; `docs/serving.md` shows how this fits into those that exist.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastseq.controls import disabled
from fastseq.matcher import IN_BFLOAT16
from fastseq.report import stats
from fastseq.sequential import compiled_of
from fastseq.serving.graphs import Graphs
from fastseq.serving.structure import is_batched, joined, leaves, mapped

# What CUDA graphs and kernels are commonly chosen for: powers of two, then every eighth. Finer steps pad less.
BUCKETS = (1, 2, 4, *range(8, 257, 8))
# Upper bounds of the latency histogram, in seconds; what is longer is counted behind the last.
LATENCY_BOUNDS = tuple(digit * 10.0**power for power in range(-5, 1) for digit in (1, 2, 5)) + (10.0,)
# How often a self-check that failed is made again, and after how many seconds: weights may be loaded meanwhile.
RETRIES, RETRY_SECONDS = 2, 0.2


HALF = (torch.float16, torch.bfloat16)


class SelfCheckError(RuntimeError):
    """The optimised model and eager disagree about the stored example."""


def warmup(
    model: nn.Module,
    batch_sizes: Iterable[int],
    example: Tensor | Sequence[Tensor],
    *,
    calls_at_once: int = 1,
) -> dict[int, float]:
    """Call a model at each of these batch sizes, so that later calls find everything made.

    Afterwards calls at these sizes make no plan, pack no weights and allocate nothing but their result, in whatever
    thread.

    Args:
        model: an optimised model, or any other, in eval mode.
        batch_sizes: such as `(1, 2, 4, 8)`.
        example: an input, or a tuple of all positional inputs, with a batch of any size in dimension 0; its first
            element is repeated.
        calls_at_once: threads that will be inside the model at the same time. Each has scratch memory of its own, which
            would otherwise be allocated when so many are there for the first time.

    Returns:
        Seconds that the first call at each size took.

    Raises:
        TypeError: `model` is no `nn.Module`, `example` holds something else than tensors, or a size is no int.
        ValueError: the model is in training mode, the example is empty, or a size or `calls_at_once` is below 1.
        RuntimeError: the example is on a GPU, and this process was forked from one that had used CUDA.
        Exception: whatever the model raises.
    """
    inputs = _checked(model, example, "warmup")
    if type(calls_at_once) is not int or calls_at_once < 1:
        raise ValueError(f"warmup expects calls_at_once to be a positive int, got {calls_at_once!r}")
    seconds = {}
    for size in sorted(_checked_sizes(batch_sizes), reverse=True):  # the largest first: its scratch serves the others
        batch = tuple(_repeated(x, size) for x in inputs)
        start = time.perf_counter()
        with torch.no_grad():
            model(*batch)
            _synchronize(batch)
            seconds[size] = time.perf_counter() - start
            model(*batch)  # what the first call leaves for the second: blocks of the allocator, timed kernels
            _synchronize(batch)
    for run in _native_runs(model):
        run.reserve_scratch(calls_at_once)
    return seconds


class Runner:
    """Runs batches of any size through a model, and counts.

    `runner(batch)` is `model(batch)` without gradients. A batch above the largest bucket is split, one between two
    buckets is padded with copies of its last element, and the result is cut to its size. So rows must not depend on
    each other, as is so in eval mode. Inputs that are not like the example go to the model as they are.

    Any number of threads may call. Counters can be read at any time without waiting for calls.

    Args:
        model: an optimised model, or a plain one for comparison, in eval mode. It is not copied: weights that are
            loaded into it count at once.
        example: an input, or a tuple of all positional inputs, with a batch in dimension 0: its first element is what
            `selfcheck` runs, and what warm-up repeats.
        buckets: the batch sizes to run, such as `(1, 2, 4, 8)`. Without it a model on the CPU takes each size as it
            is, since padding would be work for nothing, and one on a GPU those of `fastseq.serving.BUCKETS`.
        max_batch_size: where batches are split if there are no buckets, and which of the usual buckets there are.
        warm: call the model at each bucket now, or at 1 and `max_batch_size` without buckets.
        calls_at_once: of `warmup`.
        cuda_graphs: capture the model at each bucket into a CUDA graph, and replay it: one call at a time, without the
            host's part of each launch. Weights may be written in place, or replaced, which captures anew; a call
            during `load_state_dict` may see some weights old and some new. On a GPU only.

    Raises:
        TypeError, ValueError, RuntimeError: as `warmup`; also for buckets that are empty or not positive, and for
            `cuda_graphs` on a CPU or of a model whose result is no tensor with a batch in dimension 0.
        Exception: whatever the model raises during warm-up.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor | Sequence[Tensor],
        *,
        buckets: Iterable[int] | None = None,
        max_batch_size: int = 64,
        warm: bool = True,
        calls_at_once: int = 1,
        cuda_graphs: bool = False,
    ) -> None:
        inputs = _checked(model, example, "Runner")
        if cuda_graphs and not all(x.is_cuda for x in inputs):
            raise ValueError(f"Runner expects an example on a GPU for cuda_graphs=True, got {inputs[0].device}")
        if type(max_batch_size) is not int or max_batch_size < 1:
            raise ValueError(f"Runner expects max_batch_size to be a positive int, got {max_batch_size!r}")
        if buckets is None and any(x.is_cuda for x in inputs):
            buckets = [size for size in BUCKETS if size < max_batch_size] + [max_batch_size]
        self.model = model
        self.buckets: tuple[int, ...] = () if buckets is None else tuple(sorted(set(_checked_sizes(buckets))))
        self.max_batch_size = self.buckets[-1] if self.buckets else max_batch_size
        self._probe = tuple(x[:1].detach().clone() for x in inputs)
        self._is_single = isinstance(example, Tensor)
        self._lock = threading.Lock()
        self.reset_stats()
        self._graphs: Graphs | None = None
        self.warmup_seconds: dict[int, float] = {}
        if warm:
            sizes = self.buckets or (1, self.max_batch_size)
            self.warmup_seconds = warmup(model, sizes, example, calls_at_once=calls_at_once)
        if cuda_graphs:
            with torch.no_grad():
                if not is_batched(model(*self._probe), 1):
                    raise ValueError("cuda_graphs=True needs a model that returns tensors with a batch in dimension 0")
            self._graphs = Graphs(model, self._probe, self.buckets)

    def __call__(self, *batch: Tensor) -> Any:
        """What `model(*batch)` returns: a tensor, or tuples, lists and dicts of tensors with a batch in dimension 0.

        Raises:
            Exception: whatever the model raises.
        """
        start = time.perf_counter()
        try:
            with torch.no_grad():
                result = self._run(batch)
        except BaseException:
            with self._lock:
                self._errors += 1
            raise
        seconds = time.perf_counter() - start
        with self._lock:
            self._calls += 1
            self._seconds += seconds
            self._latency[bisect_left(LATENCY_BOUNDS, seconds)] += 1
        return result

    def _run(self, batch: tuple[Any, ...]) -> Any:
        reason = self._refuse(batch)
        if reason is None:
            rows, most = len(batch[0]), self.max_batch_size
            starts = range(0, rows, most) if rows > most else ()
            pieces = [tuple(x[start : start + most] for x in batch) for start in starts] or [batch]
            parts = [self._run_bucket(piece) for piece in pieces]
            if all(part is not None for part in parts):
                if len(parts) > 1:
                    with self._lock:
                        self._splits += 1
                return parts[0] if len(parts) == 1 else joined(parts)
            reason = "a result without a batch in dimension 0"
        with self._lock:
            self._as_they_are[reason] += 1
        return self.model(*batch)

    def _run_bucket(self, batch: tuple[Tensor, ...]) -> Any:
        """The model's result for at most `max_batch_size` rows; None if it would have to be cut and cannot be."""
        rows = len(batch[0])
        size = self.buckets[bisect_left(self.buckets, rows)] if self.buckets else rows
        if self._graphs is not None:
            result = self._graphs.run(batch, size)
        else:
            if size > rows:
                batch = tuple(torch.cat([x, x[-1:].expand(size - rows, *x.shape[1:])]) for x in batch)
            result = self.model(*batch)
            if not is_batched(result, size):
                return None
            if size > rows:
                result = mapped(lambda y: y[:rows].clone(), result)
        with self._lock:
            self._buckets[size] += 1
            self._rows += rows
            self._padded += size - rows
        return result

    def _refuse(self, batch: tuple[Any, ...]) -> str | None:
        """Why a batch goes to the model as it is."""
        if len(batch) != len(self._probe):
            return "another number of inputs than the example"
        for x, like in zip(batch, self._probe, strict=True):
            if not isinstance(x, Tensor):
                return "an input is no tensor"
            if x.dim() != like.dim() or x.shape[1:] != like.shape[1:]:
                return "another shape than the example"
            if x.dtype != like.dtype or x.device != like.device:
                return "another dtype or device than the example"
        rows = {len(x) for x in batch}
        if len(rows) > 1:
            return "inputs of different batch sizes"
        return None if rows != {0} else "an empty batch"

    def selfcheck(self, tolerance: float | None = None) -> float:
        """Run the stored example through the optimised model and through eager: for a server's health check.

        Args:
            tolerance: the largest difference, norm by norm of eager's result. Without it 1e-4 in float32, and eight
                roundings in float16 and bfloat16 (of bfloat16 also for `compute_dtype=torch.bfloat16`).

        Returns:
            The largest difference.

        Raises:
            SelfCheckError: the results differ by more, or in the places of NaN and infinities.
            Exception: whatever the model raises.
        """
        in_bfloat16 = any(IN_BFLOAT16 in module.__dict__ for module in self.model.modules())

        def allowed(dtype: torch.dtype) -> float:
            if tolerance is not None:
                return tolerance
            half = torch.bfloat16 if in_bfloat16 else dtype
            return 8 * torch.finfo(half).eps if half in HALF else 1e-4

        for attempt in range(RETRIES + 1):
            with torch.no_grad():
                fused = self.model(*(x.clone() for x in self._probe))
                with disabled():
                    eager = self.model(*(x.clone() for x in self._probe))
            difference, reason = _difference(fused, eager, allowed)
            if reason is None:
                return difference
            if attempt < RETRIES:
                time.sleep(RETRY_SECONDS)
        raise SelfCheckError(
            f"the optimised model and eager disagree about the example: {reason}; "
            "fastseq.verify(model, example) shows which step is to blame"
        )

    def stats(self) -> dict[str, Any]:
        """Counters since the last `reset_stats`, as plain data.

        Returns:
            "calls", "errors": calls that returned and that raised; "rows": elements of batches; "splits": calls that
            were split; "buckets": {size: times the model ran it}; "padded_rows", "padding_waste": rows that were
            added, and their share of all; "as_they_are": {reason: calls that went to the model as they were};
            "latency": {"bounds": upper bounds in seconds, "counts": calls up to each bound and one more for longer
            ones, "sum": seconds}; "model": what `fastseq.stats` says, of all callers of the model.
        """
        with self._lock:
            run = self._rows + self._padded
            counters = {
                "calls": self._calls,
                "errors": self._errors,
                "rows": self._rows,
                "splits": self._splits,
                "buckets": dict(sorted(self._buckets.items())),
                "padded_rows": self._padded,
                "padding_waste": self._padded / run if run else 0.0,
                "as_they_are": dict(self._as_they_are),
                "latency": {"bounds": list(LATENCY_BOUNDS), "counts": list(self._latency), "sum": self._seconds},
            }
        return {**counters, "model": stats(self.model)}

    def reset_stats(self) -> None:
        """Set the runner's own counters to zero; those of the model are `fastseq.reset_stats`'s."""
        with self._lock:
            self._calls = self._errors = self._rows = self._splits = self._padded = 0
            self._seconds = 0.0
            self._buckets: Counter[int] = Counter()
            self._as_they_are: Counter[str] = Counter()
            self._latency = [0] * (len(LATENCY_BOUNDS) + 1)

    def memory_report(self) -> dict[str, int]:
        """Bytes that the model holds: "weights" (parameters and buffers), "packed" (copies of weights that fused
        kernels read), "scratch" (kept for the next calls; on CUDA torch's allocator has it), "total".

        `fastseq.restore(model)` releases what is packed.
        """
        held = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        runs = list(_native_runs(self.model))
        report = {
            "weights": sum(t.nbytes for t in held.values()),
            "packed": sum(run.packed_bytes() for run in runs),
            "scratch": sum(run.idle_scratch_bytes() for run in runs),
        }
        return {**report, "total": sum(report.values())}


def _native_runs(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        compiled = compiled_of(module)
        if compiled is not None:
            yield from (run for run in compiled.runs if run is not None)


def _checked(model: Any, example: Any, caller: str) -> tuple[Tensor, ...]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastseq.serving.{caller} expects a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError(f"fastseq.serving.{caller} expects a model in eval mode; call model.eval() first")
    inputs = (example,) if isinstance(example, Tensor) else tuple(example) if isinstance(example, (tuple, list)) else ()
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(
            f"{caller} expects an example that is a tensor or a tuple of tensors, got {type(example).__name__}"
        )
    for x in inputs:
        if x.dim() == 0 or len(x) == 0:
            raise ValueError(f"{caller} expects an example with a batch in dimension 0, got shape {tuple(x.shape)}")
    if any(x.is_cuda for x in inputs) and torch.cuda._is_in_bad_fork():
        raise RuntimeError(
            f"fastseq.serving.{caller}: this process was forked from one that had used CUDA, and cannot use it; "
            'start workers with the "spawn" method, or use no GPU before the fork'
        )
    return inputs


def _checked_sizes(sizes: Iterable[int]) -> list[int]:
    found = list(sizes)
    for size in found:
        if type(size) is not int:
            raise TypeError(f"a batch size is an int, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"a batch size is at least 1, got {size}")
    if not found:
        raise ValueError("at least one batch size is needed, got none")
    return found


def _repeated(x: Tensor, size: int) -> Tensor:
    return x[:1].detach().expand(size, *x.shape[1:]).contiguous()


def _synchronize(tensors: Iterable[Tensor]) -> None:
    for device in {x.device for x in tensors if x.is_cuda}:
        torch.cuda.synchronize(device)


def _difference(fused: Any, eager: Any, allowed: Callable[[torch.dtype], float]) -> tuple[float, str | None]:
    """The largest difference of tensors, by the norm of eager's, and what is wrong about it."""
    largest = 0.0
    mine, theirs = list(leaves(fused)), list(leaves(eager))
    if len(mine) != len(theirs):
        return 0.0, f"{len(mine)} results, eager {len(theirs)}"
    for actual, expected in zip(mine, theirs, strict=True):
        if not isinstance(expected, Tensor):
            continue
        if not isinstance(actual, Tensor) or actual.shape != expected.shape or actual.dtype != expected.dtype:
            return largest, f"shape or dtype, eager {tuple(expected.shape)} {expected.dtype}"
        a, b = actual.detach().double(), expected.detach().double()
        if any(not torch.equal(test(a), test(b)) for test in (torch.isnan, torch.isposinf, torch.isneginf)):
            return largest, "NaN or an infinity where the other has none"
        a, b = a[a.isfinite()], b[b.isfinite()]
        if a.numel() == 0:
            continue
        difference = ((a - b).norm() / (b.norm() if b.any() else 1.0)).item()
        largest = max(largest, difference)
        limit = allowed(expected.dtype)
        if not difference <= limit:
            return largest, f"a difference of {difference:.2g}, {limit:.2g} allowed"
    return largest, None
