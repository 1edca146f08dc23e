"""Checks of streams, threads, graphs and devices. Most need a real GPU, and say so."""

from __future__ import annotations

import contextlib
import copy
import random
import threading
from collections.abc import Callable, Iterable

import torch
from gpu_compare import norm_error
from gpu_device import MODES, Captured, Device, Mode, arithmetic
from gpu_jobs import text_of
from gpu_models import NETS, SMALL_INPUT, small_net
from gpu_task import Check, Skip
from gpu_weights import new_weights, weight_changes
from torch import Tensor, nn

import fastseq
from fastseq.reference import plain_copy


def agree(check: Check, results: Iterable[tuple[Tensor, Tensor]], label: str, is_exact: bool, mode: Mode) -> None:
    """Results of concurrent calls are those of a call alone: to the bit, or where libraries choose, up to rounding."""
    for actual, alone in results:
        check.checks += 1
        if is_exact and not torch.equal(check.tamper(actual), alone):
            check.fault(f"{label}: other bits than alone, {norm_error(actual, alone)[0]:.3g} off")
            return
        if not is_exact and not norm_error(check.tamper(actual), alone)[0] <= 2 * mode.floor:
            check.fault(f"{label}: {norm_error(actual, alone)[0]:.3g} off from the result alone")
            return


def two_streams(check: Check) -> None:
    check.needs_gpu("streams")
    mode = MODES["default"]
    for name, (make, size) in NETS.items():
        for _ in range(3):  # a new model each time: both streams are the first to need packed weights
            model = check.model(make(), mode)
            fast = fastseq.optimize(model)
            xs = [[check.random(8, *size, mode=mode) for _ in range(12)] for _ in range(2)]
            streams = [torch.cuda.Stream() for _ in range(2)]
            check.device.poison()
            check.device.synchronize()
            outputs: list[list[Tensor]] = [[], []]
            with torch.no_grad():
                for i in range(12):
                    for lane in range(2):
                        with torch.cuda.stream(streams[lane]):
                            outputs[lane].append(fast(xs[lane][i]))
                check.device.synchronize()
                pairs = [(o, fast(x)) for lane in range(2) for o, x in zip(outputs[lane], xs[lane], strict=True)]
            agree(check, pairs, name, "library" not in name, mode)
            check.same(outputs[1][0], model, xs[1][0], mode, name)


def call_in_thread(
    device: Device, fast: nn.Module, inputs: list[Tensor], outputs: list[Tensor], errors: list[str]
) -> None:
    """All inputs, one after another, on a stream of the thread's own."""
    try:
        stream = contextlib.nullcontext() if device.is_stand_in else torch.cuda.stream(torch.cuda.Stream())
        with torch.no_grad(), stream:
            outputs += [fast(x) for x in inputs]
            if not device.is_stand_in:
                torch.cuda.current_stream().synchronize()
    except Exception as error:
        errors.append(text_of(error))


def several_threads(check: Check) -> None:
    mode = MODES["default"]
    calls = 2 if check.device.is_stand_in else 25
    for name, (make, size) in NETS.items():
        if check.is_small and "library" in name:
            continue
        model = check.model(make(), mode)
        fast = fastseq.optimize(model)
        inputs = [[check.random(1 + (i + lane) % 8, *size, mode=mode) for i in range(calls)] for lane in range(4)]
        outputs: list[list[Tensor]] = [[] for _ in range(4)]
        errors: list[str] = []
        check.device.synchronize()

        threads = [
            threading.Thread(target=call_in_thread, args=(check.device, fast, inputs[lane], outputs[lane], errors))
            for lane in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        check.problems += [f"{name}: {error}" for error in errors]
        with torch.no_grad():
            pairs = [(o, fast(x)) for lane in range(4) for o, x in zip(outputs[lane], inputs[lane], strict=False)]
        agree(check, pairs, name, "library" not in name, mode)
        if outputs[3]:
            check.same(outputs[3][-1], model, inputs[3][-1], mode, name)


def capture(check: Check, fast: nn.Module, static: Tensor, warm_ups: int) -> Captured:
    with torch.no_grad():
        return check.device.capture(lambda: fast(static), warm_ups)


def graph_replay(check: Check) -> None:
    """Replays with other inputs, and with weights that were changed in place after the capture."""
    check.needs_gpu("graphs")
    for mode in map(MODES.__getitem__, ("default", "f16", "bf16")):
        for name, (make, size) in NETS.items():
            with arithmetic(mode):
                fast = fastseq.optimize(check.model(make(), mode))
                static = check.random(8, *size, mode=mode)
                graph = capture(check, fast, static, 2)
                check.notes.append(f"{mode.name}, {name}: {graph.nodes} nodes")
                for i in range(3):
                    check.device.poison()
                    static.copy_(check.random(8, *size, mode=mode))
                    graph.replay()
                    check.same(graph.output, plain_copy(fast), static, mode, f"{mode.name}, {name}, replay {i}")
                for change in ("load_state_dict", ".data.copy_", "in place", "one element"):
                    weight_changes()[change](fast, new_weights(check, plain_copy(fast), mode))
                    static.copy_(check.random(8, *size, mode=mode))
                    graph.replay()
                    label = f"{mode.name}, {name}, replay after {change}"
                    check.same(graph.output, plain_copy(fast), static, mode, label)
                with torch.no_grad():
                    direct = fast(static)
                check.same(direct, plain_copy(fast), static, mode, f"{mode.name}, {name}, call beside the graph")


def graph_outlives_plans(check: Check) -> None:
    """A graph keeps what it reads: other shapes, other weights and refresh() do not take it away."""
    check.needs_gpu("graphs")
    mode = MODES["default"]
    fast = fastseq.optimize(check.model(small_net(), mode))
    static = check.random(8, *SMALL_INPUT, mode=mode)
    graph = capture(check, fast, static, 1)
    with torch.no_grad():
        for batch in range(1, 80):
            fast(check.random(batch, *SMALL_INPUT, mode=mode))
    fastseq.refresh(fast)
    check.device.poison([256 << 10, 128 << 10, 32 << 10, 8 << 10])
    static.copy_(check.random(8, *SMALL_INPUT, mode=mode))
    graph.replay()
    check.same(graph.output, plain_copy(fast), static, mode, "replay after refresh()")


def many_graphs(check: Check) -> None:
    check.needs_gpu("graphs")
    mode = MODES["default"]
    fast = fastseq.optimize(check.model(small_net(), mode))
    graphs = []
    for batch in [1, 2, 3, 8, 33] * 8:
        static = check.random(batch, *SMALL_INPUT, mode=mode)
        graphs.append((static, capture(check, fast, static, 0)))
    order = list(range(len(graphs)))
    random.Random(1).shuffle(order)
    for i in order:
        graphs[i][0].copy_(check.random(*graphs[i][0].shape, mode=mode))
        graphs[i][1].replay()
    check.device.synchronize()
    for static, graph in graphs[::3]:
        check.same(graph.output, plain_copy(fast), static, mode, f"batch {len(static)}")


def first_call_in_capture(name: str) -> Callable[[Check], None]:
    """In a process that has run nothing before: plans, kernels and packed weights are made inside the capture."""

    def run(check: Check) -> None:
        check.needs_gpu("graphs")
        make, size = NETS[name]
        mode = MODES["default"]
        fast = fastseq.optimize(check.model(make(), mode))
        static = check.random(8, *size, mode=mode)
        graph = capture(check, fast, static, 0)
        check.notes.append(f"{graph.nodes} nodes")
        for i in range(2):
            static.copy_(check.random(8, *size, mode=mode))
            graph.replay()
            check.same(graph.output, plain_copy(fast), static, mode, f"replay {i}")
        check.run(plain_copy(fast), static, mode, "call after the capture", fast)

    return run


def no_synchronisation(check: Check) -> None:
    check.needs_gpu("a GPU to wait for")
    mode = MODES["default"]
    for name, (make, size) in NETS.items():
        model = check.model(make(), mode)
        fast = fastseq.optimize(model)
        xs = [check.random(batch, *size, mode=mode) for batch in (8, 3, 5)]
        with torch.no_grad():
            fast(xs[0])  # asks the libraries, once in a process
        check.device.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.no_grad():
                outputs = [fast(x) for x in xs]  # the second and third of a new shape
                weight_changes()["in place"](fast, dict(plain_copy(fast).state_dict()))
                outputs.append(fast(xs[0]))
        except RuntimeError as error:
            check.fault(f"{name}: {text_of(error)}")
            outputs = []
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for x, output in zip(xs, outputs, strict=False):
            check.same(output, model, x, mode, name)


def current_device(check: Check) -> None:
    check.needs_gpu("several GPUs")
    if torch.cuda.device_count() < 2:
        raise Skip("needs several GPUs")
    mode = MODES["default"]
    model = check.model(small_net(), mode)
    other = copy.deepcopy(model).to("cuda:1")
    fast = fastseq.optimize(other)
    x = check.random(4, *SMALL_INPUT, mode=mode).to("cuda:1")
    before = torch.cuda.current_device()
    with torch.no_grad():
        y = fast(x)
    if torch.cuda.current_device() != before:
        check.fault("the current device was changed")
    check.same(y, other, x, mode, "cuda:1 while cuda:0 is current")
