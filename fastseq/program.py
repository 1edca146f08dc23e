"""Around `_C.Program`, which runs the segments of a Sequential or a forward: counters, and stand-ins that look on.

A program has `call(module, input)` for the fast lane of FusedSequential, `forward(module, input)`,
`attempt(module, input)` for a FusedModule, `is_current(module)`, `stats()` and `reset_stats()`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from fastseq import _native

log = logging.getLogger(__name__)

ProgramSegment = tuple[Any, list[Any], Any]  # native run or None, the layers, the watch of an eager layer or None
CHANGED = "changed"  # the refusal that asks for a new match


def add_stats(all_stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sum of several programs' counters."""
    total: dict[str, Any] = {"fused_calls": 0, "eager_calls": 0, "fallbacks": {}}
    for stats in all_stats:
        total["fused_calls"] += stats["fused_calls"]
        total["eager_calls"] += stats["eager_calls"]
        for reason, count in stats["fallbacks"].items():
            total["fallbacks"][reason] = total["fallbacks"].get(reason, 0) + count
    return total


class StepwiseProgram:
    """`_C.Program` segment by segment: `see` is told of each native result before the next segment runs."""

    def __init__(
        self, owner: nn.Module, containers: list[Any], segments: list[ProgramSegment], forwards: list[Any]
    ) -> None:
        module = _native.module()
        self._refused = module.Refused
        # An eager segment is a program of its own too, so that every refusal is the engine's.
        # Of what they share, the whole alone tells the garbage collector.
        self._parts = [(module.Program(owner, containers, [s], forwards, shares=True), s[0], s[1]) for s in segments]
        self._whole = module.Program(owner, containers, segments, forwards)  # never run

    def see(self, index: int, module: nn.Module, input: Any, output: Any) -> Any:
        """What goes on to the next segment: the native result of segment `index`, or `Refused` for eager's instead."""
        raise NotImplementedError

    def call(self, module: nn.Module, input: Any) -> Any:
        """Always refuses: each call goes through `forward`."""
        return self._refused

    def forward(self, module: nn.Module, input: Any) -> Any:
        value = input
        for i, (program, run, layers) in enumerate(self._parts):
            output = program.forward(module, value)
            if output.__class__ is self._refused:
                if i == 0:
                    return output
            elif run is not None:
                output = self.see(i, module, value, output)
                if output.__class__ is self._refused and len(self._parts) == 1:
                    return output
            value = run_eager(layers, value) if output.__class__ is self._refused else output
        return value

    def attempt(self, module: nn.Module, input: Any) -> Any:
        reason = self._whole.refuses(module, input)
        return self.forward(module, input) if reason is None else reason

    def is_current(self, module: nn.Module) -> bool:
        return all(program.is_current(module) for program, _, _ in self._parts)

    def stats(self) -> dict[str, Any]:
        return add_stats(program.stats() for program, _, _ in self._parts)

    def reset_stats(self) -> None:
        for program, _, _ in self._parts:
            program.reset_stats()


def run_eager(layers: list[Any], input: Any) -> Any:
    for layer in layers:
        input = layer(input)
    return input


class CheckedProgram(StepwiseProgram):
    """For FASTSEQ_CHECK=1: each native result is compared with its layers run eager."""

    in_bfloat16 = False  # whether runs of a float32 model may multiply in bfloat16

    def see(self, index: int, module: nn.Module, input: Any, output: Any) -> Any:
        _, _, layers = self._parts[index]
        assert_close_to_eager(output, run_eager(layers, input), layers, self.in_bfloat16)
        return output


class Slower(NamedTuple):
    """A native run that took longer than its layers in eager mode, for inputs of one shape, dtype and memory format."""

    segment: int
    layers: str  # what was timed: with other layers in their place nothing is known
    sizes: tuple[int, ...]
    dtype: torch.dtype
    is_channels_last: bool
    seconds: float
    eager_seconds: float

    def example(self) -> torch.Tensor:
        """An input, without data."""
        example = torch.empty(self.sizes, dtype=self.dtype, device="meta")
        return example.contiguous(memory_format=torch.channels_last) if self.is_channels_last else example

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.sizes))
        eager_us, us = 1e6 * self.eager_seconds, 1e6 * self.seconds
        return f"left to eager for {sizes}: {eager_us:.1f} us there, {us:.1f} us here"


def layers_text(layers: Iterable[Any]) -> str:
    """Layers and calls with their settings; no addresses, which would be others in a copy."""
    return ", ".join(repr(layer) if isinstance(layer, nn.Module) else type(layer).__name__ for layer in layers)


class TrialProgram(StepwiseProgram):
    """For `optimize(example_input=...)`: each native run against its layers in eager mode."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.slower: list[Slower] = []

    def see(self, index: int, module: nn.Module, input: Any, output: Any) -> Any:
        program, run, layers = self._parts[index]
        if input.device.type != "cpu":
            return output
        seconds, eager_seconds = race(lambda: program.forward(module, input), lambda: run_eager(layers, input))
        if eager_seconds > (1 - WORTHWHILE) * seconds:
            return output
        is_channels_last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
        is_channels_last &= not input.is_contiguous()
        text, sizes = layers_text(layers), tuple(input.shape)
        slower = Slower(index, text, sizes, input.dtype, is_channels_last, seconds, eager_seconds)
        self.slower.append(slower)
        run.leave_to_eager(slower.example())
        return self._refused(str(slower))


# Eager must save this share of a run's time: less may be noise.
WORTHWHILE = 0.03
# The two take turns, with so many seconds each. The shortest time of each counts, to which what else the machine does
# adds nothing. The race is over when the first is this much faster.
ROUNDS, LONGEST_ROUNDS, MIN_ROUNDS, BLOCK_SECONDS, LONG_SECONDS, CLEARLY = 15, 5, 3, 2e-4, 1e-2, 0.8


def race(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of one call of each, taken in turns."""
    both = (first, second)

    def seconds_of(function: Callable[[], Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    once = [min(seconds_of(function, 1) for _ in range(2)) for function in both]
    calls = [max(1, int(BLOCK_SECONDS / max(seconds, 1e-9))) for seconds in once]
    rounds: list[list[float]] = [[], []]
    for done in range(LONGEST_ROUNDS if min(once) > LONG_SECONDS else ROUNDS):
        if done >= MIN_ROUNDS and min(rounds[0]) < CLEARLY * min(rounds[1]):
            break
        for i, function in enumerate(both):
            rounds[i].append(seconds_of(function, calls[i]))
    return min(rounds[0]), min(rounds[1])


# How far two right results may be apart, as a share of the largest value: eager rounds 16-bit types after each layer.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
TF32_TOLERANCE = 5e-3


def tolerance(result: torch.Tensor, in_bfloat16: bool = False) -> float:
    if in_bfloat16 and result.dtype is torch.float32:
        return TOLERANCES[torch.bfloat16]
    # By their newer names: the older ones raise where the newer were set.
    cudnn: Any = torch.backends.cudnn
    flags = cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    uses_tf32 = "tf32" in flags
    if result.dtype is torch.float32 and result.is_cuda and uses_tf32:
        return TF32_TOLERANCE
    return TOLERANCES.get(result.dtype, TOLERANCES[torch.float32])


def assert_close_to_eager(
    actual: torch.Tensor, expected: torch.Tensor, layers: list[Any], in_bfloat16: bool = False
) -> None:
    """AssertionError if a fused result is further from eager's than rounding explains: see TOLERANCES."""
    finite = expected[expected.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    names = ", ".join(type(layer).__name__ for layer in layers)
    torch.testing.assert_close(
        actual,
        expected,
        rtol=0.0,
        atol=tolerance(expected, in_bfloat16) * scale,
        equal_nan=True,
        check_stride=True,
        msg=lambda text: f"FASTSEQ_CHECK: the fused result of [{names}] differs from eager's. {text}",
    )


class LoggedProgram:
    """A program for FASTSEQ_VERBOSE=1: logs each new plan and each fallback."""

    def __init__(self, program: Any, runs: list[Any]) -> None:
        self._program = program
        self._runs = runs
        self._plans_made = [run.plans_made() for run in runs]
        self._refused = _native.module().Refused

    def call(self, module: nn.Module, input: Any) -> Any:
        """Always refuses: each call goes through `forward`."""
        return self._refused

    def forward(self, module: nn.Module, input: Any) -> Any:
        return self._logged(self._program.forward, module, input)

    def attempt(self, module: nn.Module, input: Any) -> Any:
        return self._logged(self._program.attempt, module, input)

    def _logged(self, method: Any, module: nn.Module, input: Any) -> Any:
        before = self._program.stats()["fallbacks"]
        try:
            return method(module, input)
        finally:
            self._log_news(before)

    def _log_news(self, before: dict[str, int]) -> None:
        for reason, count in self._program.stats()["fallbacks"].items():
            if count > before.get(reason, 0):
                log.debug("eager: %s", reason)
        for i, run in enumerate(self._runs):
            if run.plans_made() == self._plans_made[i]:
                continue
            self._plans_made[i] = run.plans_made()
            plan = run.describe()
            for step in plan["steps"] if plan is not None else ():
                log.debug("plan: %s, %s, gives %s", step["name"], step["kernel"], step["output"])

    def is_current(self, module: nn.Module) -> bool:
        return bool(self._program.is_current(module))

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self._program.stats()
        return stats

    def reset_stats(self) -> None:
        self._program.reset_stats()
