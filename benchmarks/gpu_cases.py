"""Correctness on a GPU, through the public API: every kernel, every layout, and what graphs, streams and threads do.

Each task is one row with the largest errors and everything that was wrong. The same tasks run on the emulated package
with CPU tensors, which is what `gpu_check.py --dry-run` does; those that need real streams or graphs name themselves.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_device import MODES, Captured, Device, Mode, StandIn, arithmetic
from gpu_jobs import LOST_DEVICE, RESTART, Reporter, text_of
from torch import Tensor, nn

import fastseq
from fastseq import cuda
from fastseq.reference import plain_copy
from fastseq.testing import MODELS, count_flops

TASK_SECONDS = 40.0
MOST_PROBLEMS = 6  # of a task in its row
FACTOR = 4.0  # times eager's own error
PEAK_FACTOR = 4.0  # the largest element's error may be so many times the norm's
MODEL_MODES = ("default", "f32", "tf32", "f16", "bf16")


# What is compared ----------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """Norm-wise errors against float64, what is allowed, and whatever is wrong."""

    error: float
    eager_error: float
    limit: float
    problems: list[str]


def norm_error(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """||actual - exact|| / ||exact||, and the same of the largest elements, where both are finite."""
    actual, exact = actual.detach().double(), exact.detach().to(actual.device).double()
    finite = actual.isfinite() & exact.isfinite()
    actual, exact = actual[finite], exact[finite]
    if exact.numel() == 0:
        return 0.0, 0.0
    difference = actual - exact
    scale, peak = exact.norm().item() or 1.0, exact.abs().max().item() or 1.0
    return difference.norm().item() / scale, difference.abs().max().item() / peak


def floor_of(model: nn.Module, mode: Mode) -> float:
    """The error that is always allowed: of IEEE arithmetic where no layer of the model may use TF32."""
    allows = {nn.Conv2d: mode.allows_tf32_conv, nn.Linear: mode.allows_tf32_linear}
    is_ieee = mode.dtype == torch.float32 and not any(allows.get(type(module), False) for module in model.modules())
    return MODES["f32"].floor if is_ieee else mode.floor


def compare(actual: Tensor, eager: Tensor, exact: Tensor, floor: float, signs: bool = False) -> Comparison:
    """`actual` against what eager gives and against float64.

    floor: the norm-wise error that is always allowed.
    signs: those of zeros count too.
    """
    problems = []
    for name, has, should_have in (
        ("device", actual.device, eager.device),
        ("dtype", actual.dtype, eager.dtype),
        ("shape", tuple(actual.shape), tuple(eager.shape)),
        ("strides", actual.stride(), eager.stride()),
    ):
        if has != should_have:
            problems.append(f"{name} {has}, eager has {should_have}")
    if tuple(actual.shape) != tuple(exact.shape):
        return Comparison(math.inf, 0.0, 0.0, problems)
    found, usual, right = actual, eager.to(actual.device), exact.to(actual.device).to(eager.dtype)
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(found) != test(usual)
        # An algorithm of eager's that transforms its input spreads infinities: then float64 decides.
        if wrong.any() and not torch.equal(test(found), test(right)):
            at = wrong.nonzero()[0].tolist()
            count, first = f"{int(wrong.sum())} of {wrong.numel()}", found[tuple(at)].item()
            problems.append(f"{name} in other places than eager's: {count}, the first at {at}: {first}")
    if signs and not torch.equal(torch.signbit(found) & ~found.isnan(), torch.signbit(usual) & ~usual.isnan()):
        problems.append("signs of zeros are not eager's")
    error, peak = norm_error(actual, exact)
    eager_error, eager_peak = norm_error(eager, exact)
    limit = max(floor, FACTOR * eager_error)
    if not error <= limit:
        problems.append(f"error {error:.3g} against float64, allowed {limit:.3g} (eager {eager_error:.3g})")
    peak_limit = PEAK_FACTOR * max(floor, FACTOR * eager_peak)
    if not peak <= peak_limit:
        allowed = f"allowed {peak_limit:.3g} (eager {eager_peak:.3g})"
        problems.append(f"largest error {peak:.3g} of the largest value, {allowed}")
    return Comparison(error, eager_error, limit, problems)


def exact_result(model: nn.Module, x: Tensor) -> Tensor:
    """`model(x)` in float64: on the CPU, or where it was if that would take long."""
    double = copy.deepcopy(model).double()
    x = x.detach().double()
    with torch.no_grad():
        if x.is_cuda and count_flops(copy.deepcopy(model).to("meta"), x.to("meta")) < 5e8:
            return double.cpu()(x.cpu())
        return double(x)


def kernels_used(fast: nn.Module) -> list[str]:
    """The kernel of each step of the last call."""
    segments = [s for sequential in fastseq.explain(fast).to_dict()["sequentials"] for s in sequential["segments"]]
    return [step["kernel"] for segment in segments if segment["kind"] == "native" for step in segment["steps"]]


# A task --------------------------------------------------------------------------------------------------------------


class Skip(Exception):
    """Why a task does not apply here."""


@dataclass
class Check:
    """What a task is given, and where it records what it finds."""

    device: Device
    generator: torch.Generator
    is_small: bool = False
    perturbs: bool = False  # a test of this script: every result is made wrong
    checks: int = 0
    problems: list[str] = field(default_factory=list)
    kernels: set[str] = field(default_factory=set)
    worst: Comparison | None = None
    notes: list[str] = field(default_factory=list)
    bytes_of_last: int = 0

    def needs_gpu(self, what: str) -> None:
        if isinstance(self.device, StandIn):
            raise Skip(f"needs {what}")

    def random(self, *shape: int, mode: Mode) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(mode.dtype).to(self.device.device)

    def model(self, layers: nn.Module | Sequence[nn.Module], mode: Mode) -> nn.Module:
        """In eval mode on the device, with random weights at unit scale."""
        model = layers if isinstance(layers, nn.Module) else nn.Sequential(*layers)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    scale = math.sqrt(2.0 / module.weight[0].numel())
                    module.weight.copy_(torch.randn(module.weight.shape, generator=self.generator) * scale)
                    if module.bias is not None:
                        module.bias.copy_(torch.randn(module.bias.shape, generator=self.generator) * 0.3)
        return model.to(mode.dtype).to(self.device.device).eval()

    def fault(self, problem: str) -> None:
        self.problems.append(problem)

    def tamper(self, actual: Tensor) -> Tensor:
        if self.perturbs and actual.numel():
            actual = actual.clone()
            actual[(-1,) * actual.dim()] += 1 + actual.abs().nan_to_num(0, 0, 0).max()
        return actual

    def same(
        self, actual: Tensor, model: nn.Module, x: Tensor, mode: Mode, label: str = "", signs: bool = False
    ) -> None:
        """Records how `actual` compares with eager and float64."""
        with torch.no_grad(), arithmetic(mode):
            eager = model(x)
        found = compare(self.tamper(actual), eager, exact_result(model, x), floor_of(model, mode), signs)
        self.checks += 1
        self.problems += [f"{label}: {problem}" if label else problem for problem in found.problems]
        if self.worst is None or found.error / (found.limit or 1) > self.worst.error / (self.worst.limit or 1):
            self.worst = found

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        mode: Mode,
        label: str = "",
        fast: nn.Module | None = None,
        signs: bool = False,
        may_run_eager: bool = False,
    ) -> Tensor:
        """One call of `fast` (an optimised `model` if there is none), into poisoned memory, compared."""
        fast = fastseq.optimize(model) if fast is None else fast
        fastseq.reset_stats(fast)
        self.device.poison([self.bytes_of_last])
        with torch.no_grad(), arithmetic(mode):
            actual = fast(x)
        self.bytes_of_last = actual.numel() * actual.element_size()
        self.kernels.update(name for kernel in kernels_used(fast) for name in kernel.split(" + "))
        counters = fastseq.stats(fast)
        if not may_run_eager and (counters["fallbacks"] or not counters["fused_calls"]):
            self.fault(f"{label}: ran eager: {counters['fallbacks'] or 'nothing to fuse'}")
        self.same(actual, model, x, mode, label, signs)
        return actual

    def row(self) -> dict[str, Any]:
        problems = self.problems[:MOST_PROBLEMS]
        if len(self.problems) > MOST_PROBLEMS:
            problems.append(f"and {len(self.problems) - MOST_PROBLEMS} more")
        return {
            "checks": self.checks,
            "problems": problems,
            "error": None if self.worst is None else self.worst.error,
            "eager_error": None if self.worst is None else self.worst.eager_error,
            "limit": None if self.worst is None else self.worst.limit,
            "kernels": sorted(self.kernels),
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Task:
    name: str
    run: Callable[[Check], None]
    needs_new_process: bool = False


# Layouts -------------------------------------------------------------------------------------------------------------


def shifted(x: Tensor, elements: int = 1) -> Tensor:
    """The same values at a storage offset: misaligned by that many elements."""
    base = torch.empty(x.numel() + elements, dtype=x.dtype, device=x.device)
    view = base[elements:].as_strided(x.shape, x.stride(), elements)
    return view.copy_(x)


def image_layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(N, C, H, W) in the ways it may lie in memory."""
    n, c, h, w = x.shape
    last = x.contiguous(memory_format=torch.channels_last)
    yield "NCHW", x
    yield "channels_last", last
    yield "NCHW at offset 1", shifted(x)
    yield "channels_last at offset 1", shifted(last)
    wide = torch.empty(n + 1, c + 2, h + 2, 2 * w, dtype=x.dtype, device=x.device).normal_()
    yield "cropped", wide[1:, 1 : 1 + c, 1 : 1 + h, w : 2 * w].copy_(x)
    yield "every second column", wide[1:, 2:, 2:, ::2].copy_(x)
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    yield "every second image", torch.cat([x, x], 1).view(2 * n, c, h, w)[::2]
    yield "one image, expanded", x[:1].expand(n, c, h, w)
    yield "channels of a channels_last", torch.cat([last, last], 1).contiguous(memory_format=torch.channels_last)[:, :c]


def row_layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(N, K) in the ways it may lie in memory."""
    n, k = x.shape
    yield "contiguous", x
    yield "at offset 1", shifted(x)
    yield "columns of more", torch.cat([x, x[:, :3]], 1)[:, :k]
    yield "transposed", x.t().contiguous().t()
    yield "every second row", torch.cat([x, x], 1).view(2 * n, k)[::2]
    yield "one row, expanded", x[:1].expand(n, k)


# Every kernel --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A model, an input, and how that lies: what brings a kernel to work."""

    label: str
    layers: tuple[Callable[[], nn.Module], ...]
    size: tuple[int, ...]
    layout: str = "NCHW"

    def build(self) -> nn.Sequential:
        return nn.Sequential(*(make() for make in self.layers))


def conv(*arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*arguments, **options)


def linear(*arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(*arguments, **options)


def pool(*arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MaxPool2d(*arguments, **options)


def conv_shapes(is_vector: bool, piece: int) -> list[Shape]:
    """For one tile. `piece` elements are 16 bytes; vector kernels need channels in such pieces, next to each other."""
    last = "channels_last"
    if is_vector:
        return [
            Shape("3x3", (conv(2 * piece, 40, 3, padding=1), nn.ReLU), (3, 2 * piece, 9, 11), last),
            Shape("5x5, 2x2 pool", (conv(3 * piece, 70, 5), nn.ReLU, pool(2)), (3, 3 * piece, 13, 16), last),
            Shape("3x3 pool", (conv(piece, 33, 3), nn.ReLU, pool(3, 2, 1, ceil_mode=True)), (5, piece, 14, 11), last),
            Shape("1x1, stride 2, no bias", (conv(piece, 65, 1, 2, bias=False),), (7, piece, 7, 5), last),
            Shape("behind another", (conv(3, 20, 3), nn.ReLU, conv(20, 9, 3), nn.ReLU, pool(2)), (3, 3, 12, 13)),
            Shape("rows", (linear(600, 520), nn.ReLU), (17, 600)),
        ]
    return [
        Shape("one channel", (conv(1, 20, 5), nn.ReLU), (3, 1, 13, 12)),
        Shape("2x2 pool", (conv(3, 33, 3, padding=1), nn.ReLU, pool(2)), (5, 3, 9, 14)),
        Shape("7x7, 3x3 pool", (conv(5, 70, 7, 2, 3), nn.ReLU, pool(3, 2)), (2, 5, 21, 19), last),
        Shape("3x2, same", (conv(4, 16, (3, 2), padding="same"), nn.ReLU), (3, 4, 8, 7), "every second column"),
        Shape("misaligned", (conv(2 * piece, 40, 3, padding=1),), (3, 2 * piece, 7, 7), "channels_last at offset 1"),
        Shape("11x11, stride 4", (conv(3, 64, 11, 4, 2), nn.ReLU, pool(3, 2)), (2, 3, 47, 43)),
        Shape("rows", (linear(601, 520), nn.ReLU), (17, 601)),
    ]


def chain_shapes(op: str, rows: int, max_width: int) -> list[Shape]:
    def chain(*widths: int) -> tuple[Callable[[], nn.Module], ...]:
        layers: list[Callable[[], nn.Module]] = []
        for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
            layers += [linear(n_in, n_out), nn.ReLU]
        return tuple(layers[:-1])

    if op == "skinny_linear":
        return [
            Shape("wide", (linear(1000, 777), nn.ReLU), (rows, 1000)),
            Shape("odd, no bias", (linear(513, 129, bias=False),), (max(1, rows - 1), 513), "at offset 1"),
        ]
    if op == "tiny_mlp":
        return [
            Shape("odd widths", chain(37, 64, 33, 10), (2 * rows + 3, 37)),
            Shape("eight layers", (*chain(20, 31, 9, 48, 1, 17, 5, 64, 3), nn.ReLU), (rows, 20), "at offset 1"),
            Shape("one row", chain(128, 64, 10), (1, 128), "columns of more"),
        ]
    w = max_width or 64
    return [
        Shape("full width", (*chain(w, w, w, w), nn.ReLU), (2 * rows + 5, w)),
        Shape("odd widths", chain(w - 3, w, w - 1, 10), (rows + 1, w - 3), "at offset 1"),
        Shape("narrow", chain(16, max(16, w // 2), w), (1, 16), "columns of more"),
    ]


def pool_shapes() -> list[Shape]:
    return [
        Shape("2x2", (pool(2),), (3, 5, 9, 8)),
        Shape("3x3, stride 2, padded, ceil", (pool(3, 2, 1, ceil_mode=True),), (2, 16, 12, 9), "channels_last"),
        Shape("5x2", (pool((5, 2), (1, 3)),), (4, 24, 11, 13), "channels_last"),
        Shape("misaligned", (pool(2),), (3, 16, 6, 6), "channels_last at offset 1"),
        Shape("cropped", (pool(3, 1, 1),), (2, 7, 6, 5), "cropped"),
    ]


def shapes_of(kernel: dict[str, Any]) -> list[Shape]:
    if kernel["op"] == "conv2d":
        return conv_shapes(kernel["is_vector"], 4 if kernel["math"] in ("f32", "tf32") else 8)
    if kernel["op"] == "maxpool2d":
        return pool_shapes()
    return chain_shapes(kernel["op"], kernel["rows"], kernel["max_width"])


@contextlib.contextmanager
def preferring(kernel: str) -> Iterator[None]:
    """Plans that are made inside take the kernel where the shape allows."""
    before = os.environ.get("FASTSEQ_KERNEL")
    os.environ["FASTSEQ_KERNEL"] = kernel
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTSEQ_KERNEL"]
        else:
            os.environ["FASTSEQ_KERNEL"] = before


def mode_of(kernel: dict[str, Any]) -> Mode:
    return MODES[kernel["math"]]


def laid_out(x: Tensor, layout: str) -> Tensor:
    layouts = image_layouts if x.dim() == 4 else row_layouts
    if (x.dim() == 4 and layout == "NCHW") or (x.dim() == 2 and layout == "NCHW"):
        return x
    return next(view for name, view in layouts(x) if name == layout)


def kernel_task(kernel: dict[str, Any], most_shapes: int = 99) -> Task:
    """One kernel on the shapes it is for; it must have run in at least one of them."""

    def run(check: Check) -> None:
        mode = mode_of(kernel)
        is_forced = kernel["op"] != "maxpool2d"
        for shape in shapes_of(kernel)[:most_shapes]:
            with preferring(kernel["name"]) if is_forced else contextlib.nullcontext():
                model = check.model(shape.build(), mode)
                x = laid_out(check.random(*shape.size, mode=mode), shape.layout)
                before = set(check.kernels)
                check.kernels.clear()
                check.run(model, x, mode, shape.label, signs=not is_forced)
                if kernel["name"] not in check.kernels:
                    check.notes.append(f"{shape.label}: ran {' '.join(sorted(check.kernels))}")
                check.kernels |= before
        if kernel["name"] not in check.kernels:
            check.fault("the kernel was never chosen: it has not been checked")

    return Task(f"kernel {kernel['name']}", run)


def kernel_tasks(device: Device, is_small: bool) -> Iterator[Task]:
    """For a small run, one kernel of each op and arithmetic."""
    seen = set()
    for kernel in cuda.kernels():
        family = kernel["op"], kernel["math"]
        if kernel["min_arch"] > device.arch or (is_small and family in seen):
            continue
        seen.add(family)
        yield kernel_task(kernel, 2 if is_small else 99)


# Whole models and layouts --------------------------------------------------------------------------------------------


def small_net() -> nn.Sequential:
    """Two convolutions with pools and three Linear layers, all in kernels of our own."""
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 20, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(20 * 3 * 3, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 10)),
    )


SMALL_INPUT = (3, 16, 16)


def library_net() -> nn.Sequential:
    """Deep enough for the convolution to go to cuDNN and a Linear layer to cuBLAS, at 8 images."""
    return nn.Sequential(
        *(nn.Conv2d(3, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(16 * 6 * 6, 512), nn.ReLU(), nn.Linear(512, 10)),
    )


LIBRARY_INPUT = (3, 24, 24)
NETS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "small net": (small_net, SMALL_INPUT),
    "net with library calls": (library_net, LIBRARY_INPUT),
}


def layouts(check: Check) -> None:
    for mode in map(MODES.__getitem__, ("f32", "tf32", "f16", "bf16")):
        for ends, layers in (
            ("images", [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]),
            ("odd images", [nn.Conv2d(5, 7, 3), nn.ReLU(), nn.Conv2d(7, 9, 3)]),
        ):
            model = check.model(layers, mode)
            fast = fastseq.optimize(model)
            first = model[0]
            assert isinstance(first, nn.Conv2d)
            for name, x in image_layouts(check.random(3, first.in_channels, 9, 10, mode=mode)):
                check.run(model, x, mode, f"{mode.name}, {ends}, {name}", fast)
            single, several = (check.random(*n, first.in_channels, 9, 10, mode=mode) for n in ((), (2,)))
            check.run(model, single, mode, f"{mode.name}, {ends}, 3-D", fast)
            late = copy.deepcopy(model).to(memory_format=torch.channels_last)
            check.run(late, several, mode, f"{mode.name}, {ends}, channels_last weights")
        model = check.model([nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 9)], mode)
        fast = fastseq.optimize(model)
        for name, x in row_layouts(check.random(5, 24, mode=mode)):
            check.run(model, x, mode, f"{mode.name}, rows, {name}", fast)
        for size in ((24,), (2, 3, 24), (1, 1, 1, 24)):
            check.run(model, check.random(*size, mode=mode), mode, f"{mode.name}, rows, {len(size)}-D", fast)


def special_inputs(x: Tensor) -> Tensor:
    """Rows or images of which each has a different oddity somewhere, and one has none."""
    x = x.clone()
    inf, nan = math.inf, math.nan
    flat = x.flatten(1)
    middle, end = flat.shape[1] // 2, flat.shape[1] - 1
    for i, values in enumerate(((nan,), (inf,), (-inf,), (inf, -inf), (nan, inf), (-0.0,))):
        for j, value in enumerate(values):
            flat[i, (middle, end)[j]] = value
    flat[6], flat[7] = -0.0, 0.0
    return flat.view_as(x)


def special_values(check: Check) -> None:
    for mode in map(MODES.__getitem__, ("f32", "tf32", "f16", "bf16")):
        for name, layers, size in (
            ("gather, pool", [nn.Conv2d(3, 12, 3), nn.ReLU(), nn.MaxPool2d(2)], (3, 10, 10)),
            ("vector", [nn.Conv2d(16, 9, 3), nn.ReLU()], (16, 7, 7)),
            ("overlapping pool", [nn.Conv2d(8, 8, 3), nn.MaxPool2d(3, 2), nn.ReLU()], (8, 12, 12)),
            ("two convolutions", [nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 6, 3)], (1, 9, 9)),
            ("tiny_mlp", [nn.Linear(33, 20), nn.ReLU(), nn.Linear(20, 7), nn.ReLU()], (33,)),
            ("skinny_linear", [nn.Linear(520, 300), nn.ReLU()], (520,)),
            ("deep", [nn.Conv2d(128, 16, 3), nn.ReLU(), nn.MaxPool2d(2)], (128, 27, 27)),
        ):
            model = check.model(layers, mode)
            x = special_inputs(check.random(9, *size, mode=mode))
            for layout in ("NCHW", "channels_last") if len(size) == 3 else ("contiguous",):
                check.run(model, laid_out(x, layout), mode, f"{mode.name}, {name}, {layout}")
        with preferring("fused_mlp"):
            model = check.model([nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 40), nn.ReLU()], mode)
            check.run(model, special_inputs(check.random(9, 48, mode=mode)), mode, f"{mode.name}, fused_mlp")
        model = check.model([nn.MaxPool2d(3, 2, 1)], mode)
        x = torch.where(check.random(9, 8, 9, 9, mode=mode) < 0, -0.0, 0.0).to(mode.dtype)
        for name, values in (("zeros", x), ("oddities", special_inputs(check.random(9, 8, 9, 9, mode=mode)))):
            for layout in ("NCHW", "channels_last"):
                label = f"{mode.name}, MaxPool2d of {name}, {layout}"
                check.run(model, laid_out(values, layout), mode, label, signs=name == "zeros")
        # An infinite bias and weight reach exactly the outputs they belong to.
        model = check.model([nn.Conv2d(4, 10, 3), nn.ReLU(), nn.MaxPool2d(2)], mode)
        with torch.no_grad():
            model[0].bias[3], model[0].bias[4], model[0].weight[5, 0, 0, 0] = math.inf, -math.inf, math.nan
        check.run(model, check.random(3, 4, 9, 9, mode=mode), mode, f"{mode.name}, odd weights")


def poisoned(check: Check) -> None:
    """Fresh data in memory full of NaN, many times: for unwritten outputs, and libraries that read what they write."""
    for mode in map(MODES.__getitem__, ("default", "f16", "bf16")):
        for name, (make, size) in NETS.items():
            model = check.model(make(), mode)
            fast = fastseq.optimize(model)
            for batch in (8, 1, 3, 8, 8) if not check.is_small else (8, 1):
                check.run(model, check.random(batch, *size, mode=mode), mode, f"{mode.name}, {name}, {batch}", fast)


def zoo_task(name: str, mode: Mode, batches: Sequence[int]) -> Task:
    def run(check: Check) -> None:
        case = MODELS[name]
        model = case.build(seed=int(torch.randint(1 << 30, (1,), generator=check.generator)))
        model = model.to(mode.dtype).to(check.device.device)
        fast = fastseq.optimize(model)
        for batch in batches:
            x = check.random(batch, *case.input_shape, mode=mode)
            check.run(model, x, mode, f"batch {batch}", fast)
            if x.dim() == 4 and batch > 1 and name != "seed3":  # whose view() eager refuses in channels_last
                check.run(model, laid_out(x, "channels_last"), mode, f"batch {batch}, channels_last", fast)

    return Task(f"model {name}, {mode.name}", run)


def zoo_tasks(is_small: bool, is_stand_in: bool) -> Iterator[Task]:
    names: dict[str, Sequence[int]] = {"seed1": (1, 3, 33), "seed2": (1, 7, 300), "seed3": (1, 5)}
    names["lenet5"] = (1, 9, 257)
    if not is_small and not is_stand_in:
        names |= {"mlp": (1, 37, 1500), "cifar_vgg": (1, 5, 32), "alexnet": (1, 9), "vgg11": (1, 3)}
    for name, batches in names.items():
        for mode in ("default",) if is_small else MODEL_MODES:
            yield zoo_task(name, MODES[mode], batches[:2] if is_stand_in else batches)


# Weights that change -------------------------------------------------------------------------------------------------


def new_weights(check: Check, model: nn.Module, mode: Mode) -> dict[str, Tensor]:
    other = check.model(copy.deepcopy(model), mode)
    return {name: value.clone() for name, value in other.state_dict().items()}


def weight_changes() -> dict[str, Callable[[nn.Module, dict[str, Tensor]], None]]:
    """Ways to give a model other weights."""

    def data_writes(model: nn.Module, state: dict[str, Tensor]) -> None:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(state[name])

    def data_scaled(model: nn.Module, state: dict[str, Tensor]) -> None:
        for parameter in model.parameters():
            parameter.data.mul_(-0.75)

    def data_replaced(model: nn.Module, state: dict[str, Tensor]) -> None:
        for name, parameter in model.named_parameters():
            parameter.data = state[name]

    def in_place(model: nn.Module, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.lerp_(state[name], 0.5)

    def new_parameters(model: nn.Module, state: dict[str, Tensor]) -> None:
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight = nn.Parameter(module.weight.detach() * 0.5)

    def one_element(model: nn.Module, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.view(-1)[-1] += 2.0

    return {
        "load_state_dict": lambda model, state: model.load_state_dict(state) and None,
        "load_state_dict(assign=True)": lambda model, state: model.load_state_dict(state, assign=True) and None,
        ".data.copy_": data_writes,
        ".data.mul_": data_scaled,
        ".data =": data_replaced,
        "in place": in_place,
        "new parameters": new_parameters,
        "one element": one_element,
        ".to(channels_last)": lambda model, state: model.to(memory_format=torch.channels_last) and None,
    }


def live_weights(check: Check) -> None:
    for mode in map(MODES.__getitem__, ("default", "bf16")):
        for name, (make, size) in NETS.items():
            fast = fastseq.optimize(check.model(make(), mode))
            check.run(plain_copy(fast), check.random(8, *size, mode=mode), mode, f"{mode.name}, {name}, before", fast)
            for change, apply in weight_changes().items():
                apply(fast, new_weights(check, plain_copy(fast), mode))
                x = check.random(8, *size, mode=mode)
                check.run(plain_copy(fast), x, mode, f"{mode.name}, {name}, after {change}", fast)
            fast = fast.to(torch.float16)
            half = MODES["f16"]
            check.run(plain_copy(fast), check.random(4, *size, mode=half), half, f"{name}, after .to(float16)", fast)


def outputs_are_kept(check: Check) -> None:
    mode = MODES["default"]
    for name, (make, size) in NETS.items():
        model = check.model(make(), mode)
        fast = fastseq.optimize(model)
        with torch.no_grad():
            xs = [check.random(batch, *size, mode=mode) for batch in (4, 4, 1, 8, 4, 4)]
            outputs = [check.tamper(fast(x)) for x in xs]
            saved = [output.clone() for output in outputs]
            addresses = {output.data_ptr() for output in outputs}
            for _ in range(4):
                for x in xs:
                    fast(x)
        check.checks += 1
        if len(addresses) != len(outputs):
            check.fault(f"{name}: two results share memory")
        if not all(torch.equal(a, b) for a, b in zip(outputs, saved, strict=True)):
            check.fault(f"{name}: a later call changed a result")
        for x, output in zip(xs, outputs, strict=True):
            check.same(output, model, x, mode, name)


# Streams, threads, graphs --------------------------------------------------------------------------------------------


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


def tasks_of(device: Device, is_small: bool) -> list[Task]:
    """The fresh processes first, since they must be; then what is most likely to be wrong."""
    tasks = [
        *(Task(f"first call of a process in a capture, {name}", first_call_in_capture(name), True) for name in NETS),
        Task("graph replay, changed inputs and weights", graph_replay),
        Task("special values", special_values),
        Task("layouts and strides", layouts),
        Task("poisoned memory", poisoned),
        Task("live weights", live_weights),
        Task("outputs are kept", outputs_are_kept),
        Task("two streams", two_streams),
        Task("several threads", several_threads),
        Task("many graphs", many_graphs),
        Task("a graph outlives its plans", graph_outlives_plans),
        Task("no synchronisation", no_synchronisation),
        Task("current device", current_device),
    ]
    if is_small:
        left_out = {"special values", "layouts and strides", "live weights"}
        tasks = [task for task in tasks if task.name not in left_out]
    kernels = list(kernel_tasks(device, is_small))
    zoo = list(zoo_tasks(is_small, device.is_stand_in))
    return [*tasks[:2], *kernels, *tasks[2:], *zoo]


def run_task(task: Task, device: Device, is_small: bool, perturbs: str | None) -> dict[str, Any]:
    """The task's row. What it raises is a problem, too."""
    seed = random.SystemRandom().randrange(1 << 31)
    check = Check(device, torch.Generator().manual_seed(seed), is_small, perturbs is not None and perturbs in task.name)
    skipped = None
    try:
        task.run(check)
        device.synchronize()
    except Skip as reason:
        skipped = str(reason)
    except Exception as error:
        check.fault(text_of(error))
    return {"task": task.name, **check.row(), "seed": seed, "skipped": skipped}


def is_device_lost(device: Device) -> bool:
    """Whether a kernel's error has ended the process's use of the GPU."""
    try:
        device.synchronize()
        torch.ones(1, device=device.device).add_(1).item()
    except Exception:
        return True
    return False


def run_correctness(
    reporter: Reporter, device: Device, is_small: bool, perturbs: str | None = None, only: str = ""
) -> int:
    """All tasks, or those whose names contain `only`; the exit code of the process."""
    if not cuda.kernels():
        error = fastseq.native_error() or "this build of fastseq has no CUDA kernels"
        reporter.row(task="kernels", problems=[], checks=0, skipped=None, not_run=error)
        reporter.done()
        return 0
    tasks = [task for task in tasks_of(device, is_small) if only in task.name]
    for task in tasks:
        if not reporter.wants(task.name):
            continue
        if task.needs_new_process and not reporter.is_first:
            return RESTART
        with reporter.task(task.name, TASK_SECONDS * device.patience):
            reporter.row(**run_task(task, device, is_small, perturbs))
        if is_device_lost(device):
            return LOST_DEVICE
        if task.needs_new_process and not device.is_stand_in:
            return RESTART
    for task in tasks:
        if task.name not in reporter.begun:
            reporter.row(task=task.name, problems=[], checks=0, skipped=None, not_run="out of time")
    reporter.done()
    return 0


# For compute-sanitizer -----------------------------------------------------------------------------------------------


def run_sanitized(reporter: Reporter, device: Device, is_small: bool) -> int:
    """Small shapes of every kernel. Data comes from the CPU and goes back there: little else runs on the GPU."""
    kernels = [kernel for kernel in cuda.kernels() if kernel["min_arch"] <= device.arch]
    # One of each family first, so that a time limit leaves the widest view.
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for kernel in kernels:
        families.setdefault((kernel["op"], kernel["math"]), []).append(kernel)
    depth = 1 if is_small else max(map(len, families.values()), default=0)
    for i in range(depth):
        for kernel in (family[i] for family in families.values() if i < len(family)):
            if not reporter.wants(kernel["name"]):
                continue
            with reporter.task(kernel["name"], 3 * TASK_SECONDS * device.patience):
                reporter.row(task=kernel["name"], **sanitized(kernel, device, 1 if is_small else 3))
    for kernel in kernels if not is_small else []:
        if kernel["name"] not in reporter.begun:
            reporter.row(task=kernel["name"], checks=0, problems=[], not_run="out of time")
    reporter.done()
    return 0


def sanitized(kernel: dict[str, Any], device: Device, most_shapes: int) -> dict[str, Any]:
    mode = mode_of(kernel)
    check = Check(device, torch.Generator().manual_seed(7))
    for shape in shapes_of(kernel)[:most_shapes]:
        try:
            with preferring(kernel["name"] if kernel["op"] != "maxpool2d" else ""), torch.no_grad(), arithmetic(mode):
                model = check.model(shape.build(), mode)
                x = laid_out(torch.randn(shape.size).to(mode.dtype), shape.layout)
                storage = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
                fast = fastseq.optimize(model)
                y = fast(storage.to(device.device).as_strided(x.shape, x.stride(), x.storage_offset())).cpu()
                check.kernels.update(name for used in kernels_used(fast) for name in used.split(" + "))
                exact = copy.deepcopy(model).cpu().double()(x.double())
            error, _ = norm_error(y, exact)
            check.checks += 1
            if not error <= 4 * floor_of(model, mode):
                check.fault(f"{shape.label}: error {error:.3g} against float64")
        except Exception as error:
            check.fault(f"{shape.label}: {text_of(error)}")
    if kernel["name"] not in check.kernels:
        check.notes.append("the kernel was not chosen")
    return check.row()
