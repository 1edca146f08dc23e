"""From a match to the native program of one Sequential: watches on its modules, native runs, eager layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastseq import _env, _native
from fastseq.matcher import EagerSegment, Match, NativeSegment
from fastseq.patterns.base import ATTRIBUTES, PARAMETERS


def watch(layer: nn.Module, is_fused: bool = True) -> Any:
    """A watch on a layer: its type, hooks, and the attributes and parameters its forward reads."""
    kind = type(layer)
    parameters = PARAMETERS.get(kind, ()) if is_fused else ()
    return _native.module().ModuleWatch(layer, list(ATTRIBUTES.get(kind, ())), list(parameters))


def native_run(segment: NativeSegment) -> Any:
    """The native run of a segment. It keeps no weights until its first call."""
    watches: list[Any] = []
    index: dict[int, int] = {}
    for leaf in segment.leaves:
        if id(leaf.layer) not in index:
            index[id(leaf.layer)] = len(watches)
            watches.append(watch(leaf.layer))
    steps = []
    for step in segment.steps:
        holder = step.native["layer"]
        steps.append({**step.native, "layer": None if holder is None else index[id(holder)]})
    return _native.module().NativeRun(
        steps,
        watches,
        segment.flattens_input,
        segment.flattens_output,
        isa=_env.isa_cap() or "",
        kernel=_env.preferred_kernel() or "",
    )


ProgramSegment = tuple[Any, list[Any], Any]  # native run or None, the layers, the watch of an eager layer or None
CHANGED = "changed"  # the refusal that asks for a new match


class CompiledMatch:
    """A match with its native runs, and the program that executes both.

    `before`: what the owner ran so far; its counters are carried on.
    """

    def __init__(
        self, owner: nn.Module, match: Match, before: CompiledMatch | None = None, checked: bool = False
    ) -> None:
        self.match = match
        self.past = add_stats([]) if before is None else before.stats()
        self.runs = [native_run(s) if isinstance(s, NativeSegment) else None for s in match.segments]
        module = _native.module()
        containers = [
            module.ModuleWatch(c, [], [], tuple(c._modules.values()), is_owner=c is owner)
            for c in (owner, *match.nested)
        ]
        segments: list[ProgramSegment] = []
        for run, segment in zip(self.runs, match.segments, strict=True):
            if isinstance(segment, EagerSegment):
                layer = segment.leaf.layer
                # Dropout back in eval mode, an attribute set back, a lazy layer materialised: worth a new match.
                watched = watch(layer, is_fused=False) if isinstance(layer, nn.Module) else None
                segments.append((None, [layer], watched))
            else:
                segments.append((run, [leaf.layer for leaf in segment.leaves], None))
        self.program = (CheckedProgram if checked else module.Program)(owner, containers, segments)
        self.call = self.program.call
        self.refused = module.Refused

    def stats(self) -> dict[str, Any]:
        return add_stats([self.past, self.program.stats()])

    def reset_stats(self) -> None:
        self.past = add_stats([])
        self.program.reset_stats()

    def is_current(self, owner: nn.Module) -> bool:
        """Whether the owner's layers are still those that were matched."""
        return bool(self.program.is_current(owner))

    def forget_last_plans(self) -> None:
        for run in self.runs:
            if run is not None:
                run.forget_last_plan()

    def refresh(self) -> None:
        for run in self.runs:
            if run is not None:
                run.refresh()


class CheckedProgram:
    """`_C.Program` for FASTSEQ_CHECK=1: segment by segment, each native result compared with its layers run eager."""

    def __init__(self, owner: nn.Module, containers: list[Any], segments: list[ProgramSegment]) -> None:
        module = _native.module()
        self._refused = module.Refused
        # An eager segment is a program of its own too, so that every refusal is the engine's.
        self._parts = [(module.Program(owner, containers, [s]), s[0], s[1]) for s in segments]

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
                for layer in layers:
                    value = layer(value)
                continue
            if run is not None:
                expected = value
                for layer in layers:
                    expected = layer(expected)
                assert_close_to_eager(output, expected, layers)
            value = output
        return value

    def is_current(self, module: nn.Module) -> bool:
        return all(program.is_current(module) for program, _, _ in self._parts)

    def stats(self) -> dict[str, Any]:
        return add_stats(program.stats() for program, _, _ in self._parts)

    def reset_stats(self) -> None:
        for program, _, _ in self._parts:
            program.reset_stats()


def assert_close_to_eager(actual: torch.Tensor, expected: torch.Tensor, layers: list[Any]) -> None:
    """AssertionError if a fused result is further from eager's than rounding explains: 1e-4 of its largest value."""
    finite = expected[expected.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    names = ", ".join(type(layer).__name__ for layer in layers)
    torch.testing.assert_close(
        actual,
        expected,
        rtol=0.0,
        atol=1e-4 * scale,
        equal_nan=True,
        check_stride=True,
        msg=lambda text: f"FASTSEQ_CHECK: the fused result of [{names}] differs from eager's. {text}",
    )


def add_stats(all_stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sum of several programs' counters."""
    total: dict[str, Any] = {"fused_calls": 0, "eager_calls": 0, "fallbacks": {}}
    for stats in all_stats:
        total["fused_calls"] += stats["fused_calls"]
        total["eager_calls"] += stats["eager_calls"]
        for reason, count in stats["fallbacks"].items():
            total["fallbacks"][reason] = total["fallbacks"].get(reason, 0) + count
    return total
