"""Behaviours 53 to 56: tracers, exceptions, threads, sizes."""

from __future__ import annotations

import io
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from behaviour import assert_close_to_eager, assert_fast, one_thread, plain  # noqa: F401
from conftest import run_python
from dropin import Holder, as_plain, assert_same_outcome, call, conv_net, eager, fused, images, nested_net, outcome
from helpers import ISAS, check_run, integer_model, integers, use_kernels
from torch import Tensor, nn

import fastseq
from fastseq import FusedSequential

# 53: tracers and compilers ------------------------------------------------------------------------------------------


def exported(model: nn.Module, x: Tensor) -> list[str]:
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    return [str(node.target) for node in program.graph.nodes]


def scripted(model: nn.Module, x: Tensor) -> list[str]:
    made = torch.jit.script(model)
    torch.testing.assert_close(made(x), model(x))
    return [node.kind() for node in made.inlined_graph.nodes()]


def traced(model: nn.Module, x: Tensor) -> list[str]:
    made = torch.jit.trace(model, x)
    torch.testing.assert_close(made(x), model(x))
    return [node.kind() for node in made.inlined_graph.nodes()]


def symbolically(model: nn.Module, x: Tensor) -> list[str]:
    made = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(made(x), model(x))
    return [f"{node.op} {node.target}" for node in made.graph.nodes]


def compiled(model: nn.Module, x: Tensor) -> list[str]:
    torch._dynamo.reset()
    calls: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        calls.extend(["graph", *(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))])
        return graph.forward

    torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), model(x))
    return calls


TRACERS: dict[str, tuple[Callable[[nn.Module, Tensor], list[str]], tuple[str, ...]]] = {
    # and what is in its graph
    "torch.export": (exported, ("aten.conv2d.default", "aten.relu.default", "aten.max_pool2d.default")),
    "jit.script": (scripted, ("aten::conv2d", "aten::relu", "aten::max_pool2d")),
    "jit.trace": (traced, ("aten::_convolution", "aten::relu", "aten::max_pool2d")),
    "torch.fx": (symbolically, ("call_module", "call_module")),
    "torch.compile": (compiled, ("conv2d", "relu", "linear")),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("net", [conv_net, nested_net, Holder])
@pytest.mark.parametrize("name", TRACERS)
def test_53_tracers_and_compilers_see_the_plain_layers(name: str, net: Callable[[], nn.Module], is_warm: bool) -> None:
    """The graph is that of the plain model: convolution, ReLU, pool; never an operator of fastseq's."""
    trace, needles = TRACERS[name]
    model, x = net().eval(), images()
    fast = fastseq.optimize(model)
    with torch.no_grad():
        if is_warm:
            fast(x)
        ours, theirs = trace(fast, x), trace(model, x)
        assert ours == theirs and not any("fastseq" in line for line in ours)
        assert all(any(needle in line for line in ours) for needle in needles), ours
        assert ours.count("graph") <= 1, "torch.compile breaks no graph"
        result, counters = call(fast, x)
        assert counters["fused_calls"] >= 1 and not counters["fallbacks"]
        torch.testing.assert_close(result, model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("net", [conv_net, Holder])
def test_53_onnx_export_sees_the_plain_layers(net: Callable[[], nn.Module]) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    model, x = net().eval(), images()
    fast = fastseq.optimize(model)
    with torch.no_grad():
        fast(x)
        graphs = []
        for exported_model in (fast, model):
            program = torch.onnx.export(exported_model, (x,), dynamo=True, verbose=False)
            assert program is not None
            graphs.append([node.op_type for node in program.model.graph])
    assert graphs[0] == graphs[1] and {"Conv", "Relu", "MaxPool", "Gemm"} <= set(graphs[0])


@pytest.mark.parametrize("net", [conv_net, nested_net])
def test_53_optimising_twice_is_optimising_once(net: Callable[[], nn.Sequential]) -> None:
    """Again a copy; same classes, keys and results; nothing is wrapped twice."""
    fast, x = fastseq.optimize(net()), images()
    before = assert_close_to_eager(fast, x, runs=1)
    again = fastseq.optimize(fast)
    assert again is not fast and repr(again) == repr(fast) and list(again.state_dict()) == list(fast.state_dict())
    assert [type(m) for m in again.modules()] == [type(m) for m in fast.modules()]
    assert torch.equal(assert_close_to_eager(again, x, runs=1), before)


@pytest.mark.parametrize(
    "thing", [None, 3, "model", torch.randn(2), nn.ReLU, lambda x: x, {"0.weight": 1}, [nn.ReLU()]]
)
def test_53_what_is_no_module_raises_clearly(thing: Any) -> None:
    with pytest.raises(TypeError, match="fastseq.optimize expects a torch.nn.Module, got "):
        fastseq.optimize(thing)


@pytest.mark.parametrize("net", [conv_net, nested_net])
def test_53_a_fused_model_is_a_sequential_in_every_use(net: Callable[[], nn.Sequential]) -> None:
    """isinstance, len, iteration, indices, membership and repr, as for the plain model."""
    model = net()
    fast = fastseq.optimize(model)
    assert isinstance(fast, nn.Sequential) and len(fast) == len(model) and bool(fast) == bool(model)
    assert [type(a).__name__.replace("Fused", "") for a in fast] == [type(b).__name__ for b in model]
    assert fast[-1] is fast[len(fast) - 1] and list(fast)[0] is fast[0]
    assert repr(fast).replace("FusedSequential", "Sequential") == repr(model)
    assert set(dir(model)) <= set(dir(fast))
    for index in (99, -99, "0", 1.0):
        a, b = outcome(fast.__getitem__, index), outcome(model.__getitem__, index)
        assert (a.error, a.text) == (b.error, b.text)


# 54: exceptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["in the first run", "in a later run", "in an eager layer"])
def test_54_an_error_comes_after_the_same_side_effects(place: str) -> None:
    """What ran before the failing layer ran once, what comes behind it not at all; hooks that always run hear of it."""
    log: list[str] = []

    class Noted(nn.Module):
        def __init__(self, name: str, fails: bool = False) -> None:
            super().__init__()
            self.name, self.fails = name, fails

        def forward(self, x: Tensor) -> Tensor:
            log.append(self.name)
            if self.fails:
                raise ValueError(f"{self.name} fails")
            return x

    width = {"in the first run": 4, "in a later run": 3, "in an eager layer": 3}[place]
    layers = [
        nn.ReLU(inplace=True), nn.BatchNorm2d(3), nn.Conv2d(width, 4, 3), nn.ReLU(), Noted("middle"), nn.Flatten(),
        nn.Linear(400 if place == "in an eager layer" else 99, 5), Noted("end", fails=True), nn.Linear(5, 5),
    ]  # fmt: skip
    fast = fastseq.optimize(nn.Sequential(*layers))
    fast.register_forward_hook(lambda m, a, out: log.append(f"hook {out}"), always_call=True)
    outcomes = []
    for net in (plain(fast), fast):
        torch.manual_seed(7)
        x, log[:] = images() + 1, []
        with torch.no_grad():
            result = outcome(net, x)
        norm = net[1].running_mean.clone(), net[1].num_batches_tracked.clone()
        outcomes.append((result, list(log), x._version, x.tolist(), [n.tolist() for n in norm]))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0].error is (ValueError if place == "in an eager layer" else RuntimeError)
    assert outcomes[0][1][-1].startswith("hook") and outcomes[0][2] == 1 and outcomes[0][4][1] == 1


# More bytes than there are addresses, so that no system hands them out.
OUT_OF_MEMORY: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...], tuple[int, ...]]] = {
    # the layers, an input that is too large for them, and one that is not, without the padding
    "rows": (lambda: [nn.Linear(1, 2**20), nn.ReLU()], (2**25, 1), (2, 1)),
    "a map": (lambda: [nn.Conv2d(3, 4, 3, padding=2**21)], (1, 3, 12, 12), (1, 3, 12, 12)),
    "a map before its pool": (
        lambda: [nn.Conv2d(3, 4, 3, padding=2**21), nn.MaxPool2d((2**12, 2**11), (2**11, 2**10), (2**11, 2**10))],
        (1, 3, 12, 12),
        (1, 3, 5, 6),
    ),
}


@pytest.mark.parametrize("case", OUT_OF_MEMORY)
def test_54_running_out_of_memory_raises_eagers_error(case: str) -> None:
    """Never answered with other data: eager tries too, and names the bytes it wanted. The next call works."""
    layers, large, small = OUT_OF_MEMORY[case]
    fast = fastseq.optimize(nn.Sequential(*layers()))
    with torch.no_grad():
        for _ in range(2):
            expected = assert_same_outcome(fast, torch.zeros(large))
            assert expected.error is RuntimeError and "can't allocate memory" in expected.text
        assert fastseq.stats(fast)["fallbacks"] == {"not enough memory for a fused run": 2}
        fast[0].padding = (0, 0)  # of which Linear knows nothing
        assert_close_to_eager(fast, torch.randn(small), runs=1)


def test_54_falling_back_warns_of_nothing() -> None:
    """The reason is in `stats` and `explain`; eager would not warn either."""
    fast, x = fastseq.optimize(conv_net()), images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(x)
        fast(x.requires_grad_())
        with torch.no_grad():
            outcome(fast, x.double())
    assert fastseq.stats(fast)["eager_calls"] == 3


def test_54_a_missing_extension_warns_once(shadow_package: Callable[[str | bytes | None], Path]) -> None:
    script = """
import warnings
import torch, fastseq
from torch import nn
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        model = fastseq.optimize(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
        for _ in range(3):
            model(torch.randn(1, 3))
ours = [w for w in caught if "fastseq" in str(w.message)]
assert len(ours) == 1 and ours[0].category is RuntimeWarning, caught
"""
    done = run_python("-c", script, cwd=shadow_package(None))
    assert done.returncode == 0, done.stderr


# 55: threads --------------------------------------------------------------------------------------------------------


def busy_net() -> nn.Sequential:
    """Work enough for several threads."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(24, 24, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(24 * 13 * 13, 64), nn.ReLU(), nn.Linear(64, 10),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("batch", [1, 5])
def test_55_results_do_not_depend_on_the_number_of_threads(batch: int) -> None:
    """`torch.set_num_threads` counts at every call, and changes no bit; the calls leave the number as it was."""
    fast, x = fastseq.optimize(busy_net()), torch.randn(batch, 3, 32, 32)
    with torch.no_grad():
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(call(fast, x))
            assert torch.get_num_threads() == threads
    assert all(torch.equal(result, results[0][0]) and counters == fused() for result, counters in results)


@pytest.mark.parametrize("native_threads", [1, 2])
def test_55_calls_from_many_python_threads(native_threads: int) -> None:
    """At the same time, on one model and on several, with threads that start further threads."""
    torch.set_num_threads(native_threads)
    models = [fastseq.optimize(conv_net()) for _ in range(3)]
    inputs = [images(batch) for batch in (1, 2, 5)]
    with torch.no_grad():
        expected = [[model(x) for x in inputs] for model in models]

    def work(seed: int) -> bool:
        torch.set_num_threads(native_threads)
        with torch.no_grad():
            return all(
                torch.equal(models[(seed + i) % 3](inputs[i % 3]), expected[(seed + i) % 3][i % 3]) for i in range(20)
            )

    def outer(seed: int) -> bool:
        with ThreadPoolExecutor(2) as inner:
            return all(inner.map(work, (seed, seed + 1)))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(outer, range(4)))
    assert all(not fastseq.stats(model)["fallbacks"] for model in models)


def test_55_other_python_threads_run_meanwhile() -> None:
    """The interpreter's lock is released in a native call: another thread counts on meanwhile."""
    fast, x = fastseq.optimize(nn.Sequential(nn.Conv2d(16, 64, 5), nn.ReLU())), torch.randn(16, 16, 60, 60)
    count, stop = [0], threading.Event()

    def counter() -> None:
        while not stop.is_set():
            count[0] += 1
            time.sleep(0)  # gives the lock away of its own accord

    interval, other = sys.getswitchinterval(), threading.Thread(target=counter)
    with torch.no_grad():
        fast(x)
        sys.setswitchinterval(1000)
        try:
            other.start()
            gains = []
            for _ in range(5):
                before = count[0]
                fast(x)
                gains.append(count[0] - before)
        finally:
            sys.setswitchinterval(interval)
            stop.set()
            other.join()
    assert max(gains) > 0, gains


# 56: sizes ----------------------------------------------------------------------------------------------------------

SIZES: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "one number": (lambda: [nn.Linear(1, 1), nn.ReLU()], (1, 1)),
    "one pixel of one channel": (lambda: [nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(1)], (1, 1, 1, 1)),
    "one output pixel": (lambda: [nn.Conv2d(3, 7, (5, 4)), nn.ReLU()], (2, 3, 5, 4)),
    "one pooled pixel": (lambda: [nn.Conv2d(3, 7, 2), nn.ReLU(), nn.MaxPool2d((4, 3))], (2, 3, 5, 4)),
    "prime channels": (lambda: [nn.Conv2d(7, 13, 3), nn.ReLU(), nn.Conv2d(13, 17, 3), nn.MaxPool2d(2)], (1, 7, 11, 9)),
    "one below a vector": (lambda: [nn.Conv2d(15, 31, 3), nn.ReLU(), nn.Conv2d(31, 15, 1)], (1, 15, 7, 7)),
    "one above a vector": (lambda: [nn.Conv2d(17, 33, 3), nn.ReLU(), nn.Conv2d(33, 17, 1)], (1, 17, 7, 7)),
    "huge kernel": (lambda: [nn.Conv2d(2, 3, 27, padding=13), nn.ReLU()], (1, 2, 15, 14)),
    "huge windows": (lambda: [nn.Conv2d(2, 3, 1), nn.ReLU(), nn.MaxPool2d(29, 3, 14)], (1, 2, 31, 30)),
    "long and low": (lambda: [nn.Conv2d(1, 2, (1, 9)), nn.ReLU(), nn.MaxPool2d((1, 2))], (1, 1, 1, 999)),
    "tall and narrow": (lambda: [nn.Conv2d(1, 2, (9, 1)), nn.ReLU(), nn.MaxPool2d((2, 1))], (1, 1, 999, 1)),
    "odd rows": (lambda: [nn.Linear(63, 65), nn.ReLU(), nn.Linear(65, 1)], (13, 63)),
    "many rows": (lambda: [nn.Linear(3, 2), nn.ReLU()], (1001, 3)),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", SIZES)
def test_56_odd_sizes_with_every_instruction_set(size: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen at run time: what this CPU has, the lesser ones, and the portable code that any CPU runs."""
    use_kernels(monkeypatch, isa)
    layers, shape = SIZES[size]
    assert_fast(nn.Sequential(*layers()), torch.randn(shape))
    check_run(integer_model(*layers(), limit=2), integers(*shape, limit=2))


def test_56_files_are_small_and_types_are_kept() -> None:
    """A saved model has no packed copies of its weights."""
    fast, x = fastseq.optimize(busy_net()), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        fast(x)
        with as_plain(fast):
            expected = eager(fast, x)
        torch.testing.assert_close(fast(x), expected)
    sizes = []
    for net in (fast, plain(fast)):
        buffer = io.BytesIO()
        torch.save(net, buffer)
        sizes.append(buffer.tell())
    assert abs(sizes[0] - sizes[1]) < 4096 and type(fast) is FusedSequential
