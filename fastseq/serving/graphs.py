"""A model's calls at a few batch sizes as CUDA graphs: one launch on the host for all of a call's kernels.

After https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. Fused runs compare the weights they packed with
the model's own inside the graph, so that a replay follows weights which are written in place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastseq.serving.structure import mapped

CALLS_BEFORE_CAPTURE = 3  # in which libraries choose kernels and allocate what they keep


class Graph:
    """One captured call: what it reads, and what it leaves behind."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...], pool: Any) -> None:
        self.inputs = inputs
        device = inputs[0].device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(CALLS_BEFORE_CAPTURE):
                model(*inputs)
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads of a server allocate meanwhile, which the default mode takes for an error.
        with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            self.outputs = model(*inputs)

    def replay(self) -> None:
        self.graph.replay()


class Graphs:
    """The graphs of a model, which share memory, so that one runs at a time. Any thread may call, on any stream."""

    def __init__(self, model: nn.Module, example: tuple[Tensor, ...], sizes: Iterable[int]) -> None:
        self.model, self.example = model, example
        self.device = example[0].device
        self.sizes = sorted(sizes, reverse=True)  # the largest first: its memory serves the others
        self.lock = threading.Lock()
        self.captures = 0
        with self.lock, torch.no_grad():
            self._capture()

    def _addresses(self) -> list[int]:
        return [t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers())]

    def _capture(self) -> None:
        self.graphs: dict[int, Graph] = {}
        with torch.cuda.device(self.device):
            pool = torch.cuda.graph_pool_handle()
            for size in self.sizes:
                inputs = tuple(x[:1].expand(size, *x.shape[1:]).contiguous() for x in self.example)
                self.graphs[size] = Graph(self.model, inputs, pool)
            self.last = torch.cuda.Event()
        self.captured_addresses = self._addresses()
        self.captures += 1

    def run(self, batch: tuple[Tensor, ...], size: int) -> Any:
        """The model's result for `batch`, of at most `size` rows, in memory of its own; the rows behind are any."""
        rows = len(batch[0])
        with self.lock, torch.no_grad(), torch.cuda.device(self.device):
            if self._addresses() != self.captured_addresses:  # a graph reads the memory that was there
                torch.cuda.synchronize(self.device)
                self._capture()
            graph = self.graphs[size]
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.last)  # of whoever ran before, on whatever stream
            for mine, x in zip(graph.inputs, batch, strict=True):
                mine[:rows].copy_(x)
            graph.replay()
            result = mapped(lambda y: y[:rows].clone(), graph.outputs)
            self.last.record(stream)
        return result
