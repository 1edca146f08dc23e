"""The cases of the GPU benchmark, what they cost at least, and the interleaved timing of all contenders."""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gpu_cases import is_device_lost
from gpu_compare import compare, exact_result, floor_of
from gpu_device import (
    MODES,
    Device,
    Mode,
    arithmetic,
    back_to_back_seconds,
    host_seconds,
    latency_seconds,
    percentiles,
)
from gpu_jobs import LOST_DEVICE, Reporter, Row, read_events, text_of
from gpu_peers import CONTENDERS, OURS, Contender, NoKernels, TooLong
from torch import Tensor, nn

import fastseq
from fastseq import _native, cuda
from fastseq.testing import MODELS, ModelCase

# For the parent: the preparation of one contender without a compilation, or all timing, end long before.
STAGE_SECONDS = 45.0
WITHOUT_COMPILER = " (again, without torch.compile)"
MOST_ROUNDS, FEWEST_ROUNDS = 15, 3
METRICS = ("host", "back_to_back", "latency", "graph")


# The cases -----------------------------------------------------------------------------------------------------------


def mlp(width: int, layers: int, activation: type[nn.Module] = nn.ReLU) -> Callable[[], nn.Module]:
    """Linear and an activation, `layers` times."""
    return lambda: nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(width, width), activation())))


NETWORKS: dict[str, ModelCase] = {
    **{name: MODELS[name] for name in ("seed1", "seed2", "seed3", "lenet5", "alexnet", "vgg16")},
    **{f"mlp{w}": ModelCase(f"mlp{w}", mlp(w, 5), (w,), (4096, 65536)) for w in (64, 128, 256, 512)},
    "cifar_vgg_bn": MODELS["cifar_vgg_bn"],
    "mlp256_gelu": ModelCase("mlp256_gelu", mlp(256, 5, nn.GELU), (256,), (1, 4096)),
    "mlp1024": ModelCase("mlp1024", mlp(1024, 4), (1024,), (1, 256, 4096)),
    "mlp4096": ModelCase("mlp4096", mlp(4096, 3), (4096,), (1, 16, 1024)),
}


@dataclass(frozen=True)
class Case:
    network: str
    batch: int
    dtype: str  # float32 or bfloat16

    @property
    def name(self) -> str:
        return f"{self.network}, batch {self.batch}, {self.dtype}"

    @property
    def mode(self) -> Mode:
        return MODES["default" if self.dtype == "float32" else "bf16"]


def cases(is_quick: bool = False) -> list[Case]:
    """The most important first, for the deadline cuts the tail: what the bars name, then bfloat16, then between."""
    seeds = ("seed2", "seed1", "seed3", "lenet5")
    first = [(name, batch) for batch in (1, 32) for name in seeds]
    first += [(f"mlp{width}", 4096) for width in (64, 128, 256)]
    first += [("mlp4096", 1), ("alexnet", 32), ("vgg16", 32), ("cifar_vgg_bn", 32), ("mlp256_gelu", 4096)]
    second = [(name, 256) for name in seeds] + [(f"mlp{width}", 65536) for width in (64, 128, 256)]
    second += [("mlp4096", 1024), ("alexnet", 1), ("vgg16", 1), ("mlp512", 4096), ("mlp512", 65536)]
    rest = [(name, batch) for batch in (8, 128) for name in seeds]
    rest += [(f"mlp{width}", batch) for batch in (1, 256) for width in (64, 256, 1024)]
    rest += [("mlp4096", 16), ("mlp1024", 4096), ("cifar_vgg_bn", 1), ("mlp256_gelu", 1)]
    if is_quick:
        return [Case(name, batch, "float32") for name, batch in [("seed2", 1), ("lenet5", 1), ("mlp64", 4096)]]
    table = [(first, "float32"), (second, "float32"), (first, "bfloat16"), (second, "bfloat16")]
    table += [(rest, "float32"), (rest, "bfloat16")]
    return [Case(name, batch, dtype) for group, dtype in table for name, batch in group]


# What they cost at least ---------------------------------------------------------------------------------------------

# Vendors' data sheets, dense, at boost clocks: leads for dry runs, never measurements. GB/s and TFLOP/s.
NOMINAL: dict[str, dict[str, float]] = {
    "H200": {"copy_gbytes_per_s": 4800, "bf16_tflops": 989, "f16_tflops": 989, "tf32_tflops": 494, "f32_tflops": 67},
    "A100": {"copy_gbytes_per_s": 1555, "bf16_tflops": 312, "f16_tflops": 312, "tf32_tflops": 156, "f32_tflops": 19.5},
    "RTX 4090": {"copy_gbytes_per_s": 1008, "bf16_tflops": 165, "f16_tflops": 165, "tf32_tflops": 83, "f32_tflops": 83},
}


@dataclass(frozen=True)
class Work:
    """What any implementation has to do: operations by kind, and each input, weight and output moved once."""

    conv_flops: int
    linear_flops: int
    bytes_moved: int

    @classmethod
    def of(cls, case: Case) -> Work:
        with torch.device("meta"):
            model = NETWORKS[case.network].make().eval()
            x = torch.empty(case.batch, *NETWORKS[case.network].input_shape)
        flops = {nn.Conv2d: 0, nn.Linear: 0}

        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            flops[type(module)] += 2 * output.numel() * module.weight[0].numel()  # type: ignore

        handles = [m.register_forward_hook(count) for m in model.modules() if type(m) in flops]
        with torch.no_grad():
            y = model(x)
        for handle in handles:
            handle.remove()
        elements = x.numel() + y.numel() + sum(p.numel() for p in model.parameters())
        return cls(flops[nn.Conv2d], flops[nn.Linear], elements * case.mode.dtype.itemsize)

    def floor(self, rates: Mapping[str, float], mode: Mode) -> dict[str, Any]:
        """The larger one of arithmetic and memory, in microseconds: max(FLOP / rate, bytes / bandwidth)."""
        if mode.dtype == torch.float32:
            conv, linear = (
                "tf32_tflops" if allows else "f32_tflops" for allows in (mode.allows_tf32_conv, mode.allows_tf32_linear)
            )
        else:
            conv = linear = f"{mode.name}_tflops"
        arithmetic_us = (self.conv_flops / rates[conv] + self.linear_flops / rates[linear]) / 1e6
        memory_us = self.bytes_moved / rates["copy_gbytes_per_s"] / 1e3
        bound = "arithmetic" if arithmetic_us > memory_us else "memory"
        flops = self.conv_flops + self.linear_flops
        return {"floor_us": max(arithmetic_us, memory_us), "bound_by": bound, "flops": flops}


# Timing --------------------------------------------------------------------------------------------------------------


@dataclass
class Timed:
    """A contender and the samples of it, in seconds."""

    contender: Contender
    calls: dict[str, int]
    samples: dict[str, list[float]]
    many: Callable[[], None] | None = None  # a graph of calls["graph"] calls
    held: Any = None


def input_sets(case: Case, device: Device) -> list[Tensor]:
    """Random inputs, more of them than the L2 holds, up to 256."""
    shape = NETWORKS[case.network].input_shape
    x = torch.randn(case.batch, *shape, device=device.device).to(case.mode.dtype)
    count = min(256, max(4, -(-3 * device.l2_bytes // (2 * x.nbytes))))
    count = 4 if device.is_stand_in else count
    return [x] + [torch.randn(case.batch, *shape, device=device.device).to(case.mode.dtype) for _ in range(count - 1)]


def within(low: int, value: float, high: int) -> int:
    return int(min(max(low, value), high))


def prepare_timing(contender: Contender, inputs: list[Tensor], device: Device) -> Timed:
    """Finds out how many calls make a block, from a few."""
    for i in range(2):
        contender.call(i)
    seconds = back_to_back_seconds(device, contender.call, 3)
    if seconds < 1e-3 and not device.is_stand_in:
        seconds = max(back_to_back_seconds(device, contender.call, within(5, 1e-3 / max(seconds, 1e-7), 200)), 1e-7)
    calls = {
        "host": within(5, 2e-2 / seconds, 20),
        "back_to_back": within(5, 4e-3 / seconds, 500),
        "latency": within(5, 4e-3 / seconds, 50),
    }
    if device.is_stand_in:
        calls = dict.fromkeys(calls, 2)
    timed = Timed(contender, calls, {name: [] for name in calls})
    function = contender.capturable
    if function is not None:
        calls["graph"] = 2 if device.is_stand_in else within(3, 4e-3 / seconds, 100)
        chosen = [inputs[i % len(inputs)] for i in range(calls["graph"])]

        def many() -> None:
            for x in chosen:
                function(x)

        graph = device.capture(many, warm_ups=1)
        timed.many, timed.held, timed.samples["graph"] = graph.replay, graph, []
        if contender.nodes is None and graph.nodes is not None:
            contender.nodes = graph.nodes // calls["graph"]
    return timed


def time_round(timed: Timed, device: Device, round_number: int) -> None:
    """One block of each kind."""
    call, offset = timed.contender.call, 7 * round_number
    for name, measure in (("host", host_seconds), ("back_to_back", back_to_back_seconds), ("latency", latency_seconds)):
        for i in range(2):
            call(i)
        timed.samples[name].append(measure(device, lambda i: call(i + offset), timed.calls[name]))
    if timed.many is not None:
        timed.many()
        device.synchronize()
        timed.samples["graph"].append(device.seconds(timed.many) / timed.calls["graph"])


def time_case(
    case: Case, device: Device, reporter: Reporter, seconds: float, compile_limit_s: float, perturbs: bool = False
) -> list[Row]:
    """All contenders on one case: each checked against float64, then timed in rounds, in a new order each round."""
    mode = case.mode
    rows: dict[str, Row] = {}
    timed: dict[str, Timed] = {}
    with arithmetic(mode), torch.no_grad():
        model = NETWORKS[case.network].build().to(mode.dtype).to(device.device)
        inputs = input_sets(case, device)
        expected, exact = model(inputs[0]), exact_result(model, inputs[0])
        for name, prepare in CONTENDERS.items():
            row: Row = {"network": case.network, "batch": case.batch, "dtype": case.dtype, "contender": name}
            rows[name] = {**row, "problem": None, "is_wrong": False}
            limit = min(compile_limit_s, reporter.seconds_left() - 2 * seconds)
            reporter.stage(name, STAGE_SECONDS * device.patience + (max(limit, 0) if name == "compile_max" else 0))
            try:
                contender = prepare(model, inputs, device, limit)
                result = contender.result()
                if perturbs and name in OURS:
                    result = result * 1.5
                found = compare(result, expected, exact, floor_of(model, mode))
                wrong = [problem for problem in found.problems if name in OURS or "error" in problem]
                rows[name].update(error=found.error, eager_error=found.eager_error, error_limit=found.limit)
                if wrong:
                    rows[name].update(problem=f"wrong: {'; '.join(wrong)}", is_wrong=True)
                    continue
                timed[name] = prepare_timing(contender, inputs, device)
                rows[name].update(nodes=contender.nodes, note=contender.note)
            except TooLong as error:
                rows[name]["problem"] = f"too long: {error}"
            except NoKernels as error:
                rows[name]["problem"] = f"not run: {error}"
            except Exception as error:
                rows[name]["problem"] = f"failed: {text_of(error)}"
                if is_device_lost(device):
                    for other in CONTENDERS:
                        rows.setdefault(other, {**row, "contender": other, "is_wrong": False, "problem": None})
                        rows[other]["problem"] = rows[other]["problem"] or f"not run: {name} has lost the GPU"
                    return list(rows.values())
        del expected, exact
        reporter.stage("timing", STAGE_SECONDS * device.patience)
        device.warm_up(0.1)
        order, shuffle = list(timed), random.Random(0).shuffle
        end = min(time.time() + seconds, reporter.deadline)
        gc.collect()
        gc.disable()
        try:
            for number in range(1 if device.is_stand_in else MOST_ROUNDS):
                if number >= FEWEST_ROUNDS and time.time() > end:
                    break
                shuffle(order)
                for name in list(order):
                    try:
                        time_round(timed[name], device, number)
                    except Exception as error:
                        rows[name]["problem"] = f"failed: {text_of(error)}"
                        order.remove(name)
        finally:
            gc.enable()
        clock = device.clock_mhz()
    for name, row in rows.items():
        row["clock_mhz"] = clock
        if name in timed and row["problem"] is None:
            describe_samples(row, timed[name].samples)
    return list(rows.values())


def describe_samples(row: Row, samples: Mapping[str, list[float]]) -> None:
    """Medians, p20 and p80 in microseconds; device_us is the shorter one of the two ways to see the device's time."""
    for name, values in samples.items():
        p20, median, p80 = (1e6 * value for value in percentiles(values))
        row.update({f"{name}_us": median, f"{name}_p20_us": p20, f"{name}_p80_us": p80})
    row["device_us"] = min(row[f"{name}_us"] for name in ("graph", "back_to_back") if name in samples)
    row["rounds"] = len(samples["host"])


def run_bench(
    reporter: Reporter,
    device: Device,
    chosen: list[Case],
    seconds: float,
    compile_limit_s: float,
    compile_budget_s: float,
    perturbs: str | None = None,
) -> int:
    """The cases in their order, until the deadline."""
    spent = sum(event_seconds(row) for row in reported_rows(reporter))
    lost = reporter.lost()
    for case in chosen:
        is_again = case.name in lost
        task = case.name + WITHOUT_COMPILER * is_again
        if not reporter.wants(task):
            continue
        if reporter.seconds_left() < 3 * seconds and not device.is_stand_in:
            break
        with reporter.task(task, STAGE_SECONDS * device.patience):
            limit = 0.0 if is_again else min(compile_limit_s, compile_budget_s - spent)
            try:
                is_tampered = perturbs is not None and perturbs in case.name
                rows = time_case(case, device, reporter, seconds, limit, is_tampered)
            except Exception as error:
                problem = f"failed: {text_of(error)}"
                names = {"network": case.network, "batch": case.batch, "dtype": case.dtype}
                rows = [{**names, "contender": name, "problem": problem, "is_wrong": False} for name in CONTENDERS]
            for row in rows:
                spent += event_seconds(row)
                reporter.row(**row)
        if is_device_lost(device):
            return LOST_DEVICE
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        device.release()
    reporter.done()
    return 0


def reported_rows(reporter: Reporter) -> list[Row]:
    return [event["row"] for event in read_events(reporter.path) if event["event"] == "row"]


def event_seconds(row: Row) -> float:
    """What a row's compilation took, or at least."""
    text = row.get("note") or row.get("problem") or ""
    for before in ("compiled in ", "no result after "):
        if row.get("contender") == "compile_max" and before in text:
            return float(text.split(before)[1].split(" s")[0])
    return 0.0


# Plans ---------------------------------------------------------------------------------------------------------------


def plan_rows(chosen: list[Case], device_names: list[str]) -> list[Row]:
    """What fastseq would launch for each case on devices that need not be there."""
    rows = []
    for case in chosen:
        with torch.device("meta"):
            model = NETWORKS[case.network].make().eval().to(case.mode.dtype)
            x = torch.empty(case.batch, *NETWORKS[case.network].input_shape, dtype=case.mode.dtype)
        for name in device_names:
            row: Row = {"network": case.network, "batch": case.batch, "dtype": case.dtype, "device": name}
            try:
                runs = cuda.plan(model, x, cuda.DEVICES[name], allows_tf32_conv=case.mode.allows_tf32_conv)
                row["refused"] = [run["refused"] for run in runs if "refused" in run]
                made = [run for run in runs if "refused" not in run]
                row["kernels"] = [launch["kernel"] for run in made for launch in run["launches"]]
                row["launches"] = sum(len(run["launches"]) + (run["packs_before"] > 0) for run in made)
                row["outputs"] = [run["output"] for run in made]
                row["arena_bytes"] = max((run["arena_bytes"] for run in made), default=0)
                row["packed_elements"] = sum(pack["elements"] for run in made for pack in run["packs"])
                row["problem"] = None
            except Exception as error:
                row["problem"] = text_of(error)
            if name in NOMINAL:
                row.update(Work.of(case).floor(NOMINAL[name], case.mode))
            rows.append(row)
    return rows


def engine_description() -> dict[str, Any]:
    """Where the kernels come from and how many there are."""
    error = fastseq.native_error()
    return {
        "package": fastseq.__file__,
        "native_error": error,
        "kernels": 0 if error else len(cuda.kernels()),
        "architectures": None if error else cuda_architectures(),
    }


def cuda_architectures() -> str:
    info: dict[str, Any] = _native.module().build_info()
    return info.get("cuda_architectures", "")
