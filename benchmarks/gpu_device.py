"""The GPU as checks and timings use it, and the CPU in its place where there is none."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

POISON_BYTE = 0xFF  # all bits set: a NaN in every floating-point type


@dataclass(frozen=True)
class Mode:
    """A kind of arithmetic: what tensors hold, the TF32 flags, and the norm-wise error that is always allowed."""

    name: str
    dtype: torch.dtype
    allows_tf32_conv: bool
    allows_tf32_linear: bool
    floor: float


MODES = {
    mode.name: mode
    for mode in (
        Mode("f32", torch.float32, False, False, 1e-6),
        Mode("tf32", torch.float32, True, True, 1.5e-3),
        Mode("f16", torch.float16, False, False, 2e-3),
        Mode("bf16", torch.bfloat16, False, False, 1.5e-2),
        Mode("default", torch.float32, True, False, 1.5e-3),  # torch's flags as they are: convolutions in TF32
    )
}


@contextmanager
def arithmetic(mode: Mode) -> Iterator[None]:
    """The TF32 flags of a mode. Only the older pair of flags: torch refuses a mixture with the newer names."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = mode.allows_tf32_linear, mode.allows_tf32_conv
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@dataclass
class Captured:
    """A graph that can be replayed, what it writes, and how many nodes it has (None if torch does not tell)."""

    replay: Callable[[], None]
    output: Any
    nodes: int | None
    graph: Any = None


class Gpu:
    """The current CUDA device."""

    is_stand_in = False
    patience = 1.0  # times the seconds that anything may take

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.name: str = properties.name
        self.arch: int = 10 * properties.major + properties.minor
        self.multiprocessors: int = properties.multi_processor_count
        self.l2_bytes: int = getattr(properties, "L2_cache_size", 0) or 64 << 20
        self.memory_bytes: int = properties.total_memory

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any]) -> float:
        """Between two events around what `work` enqueues."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def capture(self, work: Callable[[], Any], warm_ups: int = 3) -> Captured:
        """`work` as a graph, after some calls on a side stream as torch's manual asks."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(warm_ups):
                work()
        current.wait_stream(side)
        self.synchronize()
        try:
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            is_kept = True
        except TypeError:
            graph, is_kept = torch.cuda.CUDAGraph(), False
        with torch.cuda.graph(graph):
            output = work()
        nodes = None
        if is_kept:
            with suppress(Exception):
                nodes = count_nodes(graph.raw_cuda_graph())
            graph.instantiate()
        return Captured(graph.replay, output, nodes, graph)

    def poison(self, sizes: Sequence[int] = ()) -> None:
        """Fills the caching allocator's free memory with NaN, so that the next tensors are made of it.

        sizes: bytes of tensors that are about to be made; blocks of these sizes exist afterwards.
        """
        usual = [512, 4 << 10, 64 << 10, 768 << 10, 3 << 20, 40 << 20]
        held = [self._poisoned(size) for size in [*usual, *usual, *sizes, *sizes] if size]
        stream = torch.cuda.current_stream().cuda_stream
        free: list[int] = []
        with suppress(Exception):  # the layout of a snapshot is torch's own business
            for segment in torch.cuda.memory_snapshot():
                is_ours = segment["device"] == self.device.index and segment["stream"] == stream
                if is_ours and tuple(segment.get("segment_pool_id", (0, 0))) == (0, 0):
                    free += [b["size"] for b in segment["blocks"] if b["state"] == "inactive" and b["size"] < 1 << 30]
        held += [self._poisoned(size) for size in sorted(free, reverse=True)[:2000]]
        del held

    def _poisoned(self, size: int) -> Tensor:
        return torch.full((size,), POISON_BYTE, dtype=torch.uint8, device=self.device)

    def clock_mhz(self) -> int | None:
        with suppress(Exception):
            return int(torch.cuda.clock_rate(self.device))
        return None

    def warm_up(self, seconds: float = 0.2) -> None:
        """Work that lifts the clocks from their idle state."""
        a = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            for _ in range(5):
                a @ a
            self.synchronize()

    def release(self) -> None:
        """Gives memory back. What lives now is old: a capture collects garbage, and need not look at it each time."""
        gc.collect()
        gc.freeze()
        torch.cuda.empty_cache()


class StandIn:
    """The CPU in the place of a GPU, for dry runs: the same calls, no meaning in the times."""

    is_stand_in = True
    patience = 10.0  # a dry run times nothing, and may have a slow machine
    name = "CPU in the place of a GPU"
    arch = 90
    multiprocessors = 132
    l2_bytes = 1 << 20
    memory_bytes = 4 << 30

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def seconds(self, work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def capture(self, work: Callable[[], Any], warm_ups: int = 3) -> Captured:
        def replay() -> None:
            work()

        return Captured(replay, work(), None)

    def poison(self, sizes: Sequence[int] = ()) -> None:
        held = [torch.full((size,), POISON_BYTE, dtype=torch.uint8) for size in [*sizes, *sizes] if size]
        del held

    def clock_mhz(self) -> int | None:
        return None

    def warm_up(self, seconds: float = 0.2) -> None:
        pass

    def release(self) -> None:
        gc.collect()


Device = Gpu | StandIn


def count_nodes(raw_graph: int) -> int:
    """Nodes of a cudaGraph_t."""
    count = ctypes.c_size_t()
    function = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)]
    if function(raw_graph, None, ctypes.byref(count)):
        raise RuntimeError("cuGraphGetNodes failed")
    return count.value


# Times ---------------------------------------------------------------------------------------------------------------


def host_seconds(device: Device, call: Callable[[int], Any], calls: int) -> float:
    """Per call, on the host alone: enqueued without waiting, and few enough that the queue does not fill up."""
    device.synchronize()
    start = time.perf_counter()
    for i in range(calls):
        call(i)
    elapsed = time.perf_counter() - start
    device.synchronize()
    return elapsed / calls


def back_to_back_seconds(device: Device, call: Callable[[int], Any], calls: int) -> float:
    """Per call, by events around many: the slower one of host and device."""

    def work() -> None:
        for i in range(calls):
            call(i)

    call(0)
    return device.seconds(work) / calls


def latency_seconds(device: Device, call: Callable[[int], Any], calls: int) -> float:
    """From the call to the result on an idle GPU; the median of `calls`."""
    samples = []
    device.synchronize()
    for i in range(calls):
        start = time.perf_counter()
        call(i)
        device.synchronize()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, median and p80."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return p20, statistics.median(samples), p80


# What the machine can do ---------------------------------------------------------------------------------------------


def measure_ceilings(gpu: Gpu, copied_bytes: int = 4 << 30, size: int = 8192) -> Iterator[tuple[str, float]]:
    """Name and value, one by one: rates in GB/s and TFLOP/s, times in microseconds.

    size: rows and columns of the matrices that are multiplied.
    """
    gpu.warm_up(0.5)
    source = torch.empty(copied_bytes // 4, dtype=torch.float32, device=gpu.device).uniform_()
    copied = torch.empty_like(source)
    copied.copy_(source)
    seconds = statistics.median(gpu.seconds(partial(copied.copy_, source)) for _ in range(15))
    yield "copy_gbytes_per_s", 2 * source.nbytes / seconds / 1e9
    del source, copied
    gpu.release()

    for name in ("bf16", "f16", "tf32", "f32"):
        mode = MODES[name]
        a, b = (torch.randn(size, size, device=gpu.device).to(mode.dtype) for _ in range(2))
        with arithmetic(mode):
            for _ in range(3):
                a @ b
            seconds = statistics.median(gpu.seconds(partial(torch.mm, a, b)) for _ in range(9))
        yield f"{name}_tflops", 2 * size**3 / seconds / 1e12
        del a, b
    gpu.release()

    launch = empty_launch()
    launch()
    yield "launch_host_us", 1e6 * min(host_seconds(gpu, lambda _: launch(), 200) for _ in range(20))
    yield "launch_back_to_back_us", 1e6 * min(back_to_back_seconds(gpu, lambda _: launch(), 500) for _ in range(10))
    yield "launch_and_sync_us", 1e6 * latency_seconds(gpu, lambda _: launch(), 500)
    yield "sync_alone_us", 1e6 * latency_seconds(gpu, lambda _: None, 500)

    def many() -> None:
        for _ in range(500):
            launch()

    chain = gpu.capture(many)
    chain.replay()
    yield "launch_in_graph_us", 1e6 * min(gpu.seconds(chain.replay) for _ in range(10)) / 500
    single = gpu.capture(launch)
    yield "graph_replay_host_us", 1e6 * min(host_seconds(gpu, lambda _: single.replay(), 100) for _ in range(20))
    yield "graph_replay_and_sync_us", 1e6 * latency_seconds(gpu, lambda _: single.replay(), 500)


def empty_launch() -> Callable[[], None]:
    """A kernel that does nothing: torch's own wait of no cycles."""
    return lambda: torch.cuda._sleep(0)
