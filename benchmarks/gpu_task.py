"""A task of the GPU's checks: one row with the largest errors and everything that was wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_compare import Comparison, compare, exact_result, floor_of, kernels_used
from gpu_device import Device, Mode, StandIn, arithmetic
from torch import Tensor, nn

import fastseq

TASK_SECONDS = 40.0
MOST_PROBLEMS = 6  # of a task in its row


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
                elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    for tensor, middle in ((module.running_mean, 0.0), (module.weight, 1.0), (module.bias, 0.0)):
                        tensor.copy_(torch.randn(tensor.shape, generator=self.generator) * 0.3 + middle)
                    module.running_var.copy_(torch.rand(module.running_var.shape, generator=self.generator) * 2 + 0.5)
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
