"""What fastseq is measured against on a GPU, and fastseq itself: how each is called and captured."""

from __future__ import annotations

import copy
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_device import Captured, Device
from torch import Tensor, nn

import fastseq
from fastseq import cuda
from fastseq.testing import TwoStageConvNet

Call = Callable[[int], Any]


class NoKernels(Exception):
    """There is no fastseq to time."""


class TooLong(BaseException):
    """A compilation took longer than it may. Not an Exception: compilers catch those."""


@dataclass
class Contender:
    """One way to run a network, ready to be timed."""

    call: Call  # with the input of that number, as a user would
    result: Callable[[], Tensor]  # of input 0
    capturable: Callable[[Tensor], Tensor] | None = None  # what a graph of many calls is made of, for device time
    nodes: int | None = None  # of a graph with one call
    note: str = ""
    held: list[Any] = field(default_factory=list)


Prepare = Callable[[nn.Module, list[Tensor], Device, float], Contender]


def direct(function: Callable[[Tensor], Tensor], inputs: list[Tensor], note: str = "") -> Contender:
    count = len(inputs)
    return Contender(lambda i: function(inputs[i % count]), lambda: function(inputs[0]), function, note=note)


def graphed(function: Callable[[Tensor], Tensor], inputs: list[Tensor], device: Device, static: Tensor) -> Contender:
    """One call in a graph. It copies its input into the graph's and replays; the result stays in the graph's memory."""
    graph: Captured = device.capture(lambda: function(static))
    count = len(inputs)

    def call(i: int) -> Tensor:
        static.copy_(inputs[i % count])
        graph.replay()
        return graph.output

    def result() -> Tensor:
        static.copy_(inputs[0])
        graph.replay()
        return graph.output.clone()

    return Contender(call, result, nodes=graph.nodes, held=[graph, static])


# PyTorch -------------------------------------------------------------------------------------------------------------


def eager(model: nn.Module, inputs: list[Tensor], device: Device, limit_s: float) -> Contender:
    return direct(copy.deepcopy(model), inputs)


def graph_eager(model: nn.Module, inputs: list[Tensor], device: Device, limit_s: float) -> Contender:
    return graphed(copy.deepcopy(model), inputs, device, inputs[0].clone())


class FusedConv(nn.Module):
    """Convolution, bias and ReLU in one cuDNN call, or separately where cuDNN has none for the shape."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.is_fused: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if self.is_fused is not False:
            try:
                assert not isinstance(layer.padding, str)
                sizes = list(layer.stride), list(layer.padding), list(layer.dilation)
                y = torch.cudnn_convolution_relu(x, layer.weight, layer.bias, *sizes, layer.groups)
                self.is_fused = True
                return y
            except Exception:
                if self.is_fused:
                    raise
                self.is_fused = False
        return torch.relu_(layer(x))


class FusedLinear(nn.Module):
    """Linear and ReLU in one cuBLAS call."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch._addmm_activation(self.layer.bias, x, self.layer.weight.t(), use_gelu=False)


def with_fused_operators(model: nn.Module) -> nn.Module:
    """A copy of `model` that uses ATen's fused operators where there are some."""
    model = copy.deepcopy(model)
    if isinstance(model, TwoStageConvNet):  # its view() does not take channels_last
        model = nn.Sequential(model.layer1, model.layer2, nn.Flatten(), model.layer3).eval()

    def replace(sequential: nn.Sequential) -> None:
        children = list(sequential.named_children())
        for (name, layer), (next_name, following) in zip(children[:-1], children[1:], strict=True):
            if not isinstance(following, nn.ReLU):
                continue
            if isinstance(layer, nn.Conv2d):
                setattr(sequential, name, FusedConv(layer))
            elif isinstance(layer, nn.Linear) and layer.bias is not None:
                setattr(sequential, name, FusedLinear(layer))
            else:
                continue
            setattr(sequential, next_name, nn.Identity())

    for module in list(model.modules()):
        if isinstance(module, nn.Sequential):
            replace(module)
    return model


def graph_aten(model: nn.Module, inputs: list[Tensor], device: Device, limit_s: float) -> Contender:
    """Channels_last, fused operators, one graph: what one can build by hand of torch alone."""
    fused = with_fused_operators(model).to(memory_format=torch.channels_last)
    is_image = inputs[0].dim() == 4
    layout = torch.channels_last if is_image else torch.contiguous_format
    with torch.no_grad():
        fused(inputs[0].contiguous(memory_format=layout))  # finds out what cuDNN takes
    convolutions = [m.is_fused for m in fused.modules() if isinstance(m, FusedConv)]
    static = inputs[0].clone().contiguous(memory_format=layout)
    contender = graphed(fused, inputs, device, static)
    contender.capturable = lambda x: fused(x.contiguous(memory_format=layout))
    if convolutions:
        contender.note = f"{sum(map(bool, convolutions))} of {len(convolutions)} convolutions by cudnn_convolution_relu"
    return contender


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooLong inside after `seconds`; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TooLong(f"no result after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), 5.0)  # again, should something swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compile_max(model: nn.Module, inputs: list[Tensor], device: Device, limit_s: float) -> Contender:
    """torch.compile with max-autotune, which makes its own graphs."""
    if device.is_stand_in:
        raise RuntimeError("torch.compile is left out of dry runs")
    if limit_s < 3:
        raise TooLong("no time left to compile")
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), mode="max-autotune", dynamic=False)
    start = time.perf_counter()
    with time_limit(limit_s):
        for i in range(4):  # compiles, warms up, records
            compiled(inputs[i % len(inputs)])
            device.synchronize()
    seconds = time.perf_counter() - start
    count = len(inputs)
    return Contender(
        lambda i: compiled(inputs[i % count]),
        lambda: compiled(inputs[0]).clone(),
        note=f"compiled in {seconds:.1f} s",
    )


# fastseq -------------------------------------------------------------------------------------------------------------


def optimized(model: nn.Module, x: Tensor, device: Device) -> nn.Module:
    if fastseq.native_error() or not cuda.kernels():
        raise NoKernels(fastseq.native_error() or "this build of fastseq has no CUDA kernels")
    fast = fastseq.optimize(model)
    with torch.no_grad():
        fast(x)
    device.synchronize()
    counters = fastseq.stats(fast)
    if not counters["fused_calls"] or counters["fallbacks"]:  # its time would be eager's under another name
        raise RuntimeError(f"not everything ran fused: {counters['fallbacks'] or fastseq.native_error()}")
    return fast


def fastseq_direct(model: nn.Module, inputs: list[Tensor], device: Device, limit_s: float) -> Contender:
    fast = optimized(model, inputs[0], device)
    segments = [s for sequential in fastseq.explain(fast).to_dict()["sequentials"] for s in sequential["segments"]]
    kernels = [step["kernel"] for s in segments if s["kind"] == "native" for step in s["steps"]]
    return direct(fast, inputs, note=", ".join(dict.fromkeys(kernels)))


def fastseq_graph(model: nn.Module, inputs: list[Tensor], device: Device, limit_s: float) -> Contender:
    return graphed(optimized(model, inputs[0], device), inputs, device, inputs[0].clone())


CONTENDERS: dict[str, Prepare] = {
    "eager": eager,
    "graph_eager": graph_eager,
    "graph_aten": graph_aten,
    "compile_max": compile_max,
    "fastseq": fastseq_direct,
    "fastseq_graph": fastseq_graph,
}
OURS = ("fastseq", "fastseq_graph")
PEERS = tuple(name for name in CONTENDERS if name not in OURS)
