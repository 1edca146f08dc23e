"""What the machine can do at best: multiply-adds, and reading from memory and from the last cache.

`measure_limits` measures it on the calling process's cores; `Limits.floor` says how long a network takes by it.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastseq import _native
from fastseq.testing import LayerCost

# Where the system does not say, what most cores of the last ten years have at least.
DEFAULT_L2_BYTES, DEFAULT_L3_BYTES = 256 << 10, 8 << 20
DRAM_PROBE_FACTOR = 8  # a buffer of so many last-level caches comes from memory
HUGE_PAGE_BYTES = 2 << 20


@dataclass(frozen=True)
class Limits:
    """The machine's rates with `threads` threads; `fma_gflops` is None where fastseq's extension is not built."""

    threads: int
    fma_gflops: float | None
    l3_read_gbytes_per_s: float
    dram_read_gbytes_per_s: float
    l2_bytes: int
    l3_bytes: int

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Limits | None:
        """What `as_dict` gave, with whatever stands beside it; None for a file from before these were measured."""
        names = cls.__dataclass_fields__
        return cls(**{name: data[name] for name in names}) if all(name in data for name in names) else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def read_gbytes_per_s(self, total_bytes: int) -> float | None:
        """The rate at which `total_bytes` of weights can be read again and again; None: from L2, without limit."""
        if total_bytes > self.l3_bytes:
            return self.dram_read_gbytes_per_s
        return self.l3_read_gbytes_per_s if total_bytes > self.l2_bytes else None

    def floor(self, costs: Iterable[LayerCost], batch: int) -> tuple[float, str] | None:
        """Seconds that the layers take at least, one after the other, and what limits most of that time.

        A layer takes as long as its multiply-adds at the peak, or as reading its weights once from where all the
        network's weights fit: the longer of the two. Winograd has fewer multiply-adds and may be faster.
        """
        if self.fma_gflops is None:
            return None
        costs = list(costs)
        rate = self.read_gbytes_per_s(sum(cost.weight_bytes for cost in costs))
        where = "DRAM" if rate == self.dram_read_gbytes_per_s else "L3"
        seconds = {"FMA": 0.0, where: 0.0}
        for cost in costs:
            computing = cost.flops * batch / self.fma_gflops / 1e9
            reading = cost.weight_bytes / rate / 1e9 if rate else 0.0
            seconds["FMA" if computing >= reading else where] += max(computing, reading)
        return sum(seconds.values()), max(seconds, key=lambda name: seconds[name])


def measure_limits(threads: int, dram_bytes: int = 0) -> Limits:
    """Measures with `threads` threads of torch, which must have that many. `dram_bytes`: of the buffer in memory."""
    l2_bytes = cache_bytes(2) or DEFAULT_L2_BYTES
    l3_bytes = max(cache_bytes(3) or DEFAULT_L3_BYTES, l2_bytes)
    # In the middle between the caches of all threads and the last level, which others may use too.
    in_l3 = max(2 * l2_bytes * threads, l3_bytes // 4)
    return Limits(
        threads=threads,
        fma_gflops=measure_fma(threads),
        l3_read_gbytes_per_s=round(measure_read(in_l3), 1),
        dram_read_gbytes_per_s=round(measure_read(dram_bytes or DRAM_PROBE_FACTOR * l3_bytes), 1),
        l2_bytes=l2_bytes,
        l3_bytes=l3_bytes,
    )


def cache_bytes(level: int) -> int | None:
    """The size of the first core's cache, as Linux has it."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if int((index / "level").read_text()) == level:
                return int((index / "size").read_text().strip().removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return None


def measure_fma(threads: int = 1) -> float | None:
    """GFLOP/s of multiply-adds alone, with the best instruction set, on so many cores at once."""
    if not _native.native_available():
        return None
    with ThreadPoolExecutor(threads) as pool:
        rates = list(pool.map(lambda _: _native.module().fma_peak(), range(threads)))
    return round(sum(rates), 1)


def measure_read(size_bytes: int, seconds: float = 0.5) -> float:
    """GB/s of reading so many bytes, in huge pages where there are any: the best of several reductions over them."""
    buffer = _huge_buffer(size_bytes)
    probes: tuple[Callable[[], Tensor], ...] = (buffer.sum, buffer.amax, lambda: torch.dot(buffer, buffer))
    best = float("inf")
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < deadline:
        for probe in probes:
            start = time.perf_counter()
            probe()
            best = min(best, time.perf_counter() - start)
        rounds += 1
    return buffer.nbytes / best / 1e9


def _huge_buffer(size_bytes: int) -> Tensor:
    memory = mmap.mmap(-1, size_bytes + HUGE_PAGE_BYTES)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.float32)
    skipped = -whole.data_ptr() % HUGE_PAGE_BYTES // whole.element_size()
    return whole[skipped : skipped + size_bytes // whole.element_size()].fill_(1.0)
