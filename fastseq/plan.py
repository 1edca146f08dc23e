"""From a match to the native program of one Sequential: watches on its modules, native runs, eager layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastseq import _env, _native
from fastseq.matcher import EagerSegment, Match, NativeSegment
from fastseq.patterns.base import ATTRIBUTES, PARAMETERS
from fastseq.program import CheckedProgram, LoggedProgram, ProgramSegment, add_stats


def watch(layer: nn.Module, is_fused: bool = True) -> Any:
    """A watch on a layer: its type, hooks, and the attributes and parameters its forward reads."""
    kind = type(layer)
    parameters = PARAMETERS.get(kind, ()) if is_fused else ()
    return _native.module().ModuleWatch(layer, list(ATTRIBUTES.get(kind, ())), list(parameters))


def native_steps(segment: NativeSegment) -> tuple[list[dict[str, Any]], list[nn.Module]]:
    """The steps as the engine takes them, and the modules that their "layer" counts."""
    layers: list[Any] = []
    index: dict[int, int] = {}
    for leaf in segment.leaves:
        if id(leaf.layer) not in index:
            index[id(leaf.layer)] = len(layers)
            layers.append(leaf.layer)
    steps = []
    for step in segment.steps:
        holder = step.native["layer"]
        steps.append({**step.native, "layer": None if holder is None else index[id(holder)]})
    return steps, layers


def native_run(segment: NativeSegment) -> Any:
    """The native run of a segment. It keeps no weights until its first call."""
    steps, layers = native_steps(segment)
    watches = [watch(layer) for layer in layers]
    return _native.module().NativeRun(
        steps,
        watches,
        segment.flattens_input,
        segment.flattens_output,
        isa=_env.isa_cap() or "",
        kernel=_env.preferred_kernel() or "",
        checks=_env.check(),
    )


class CompiledMatch:
    """A match with its native runs, and the program that executes both.

    `before`: what the owner ran so far; its counters are carried on.
    """

    def __init__(self, owner: nn.Module, match: Match, before: CompiledMatch | None = None) -> None:
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
        make = CheckedProgram if _env.check() else module.Program
        self.program: Any = make(owner, containers, segments)
        if _env.verbose():
            self.program = LoggedProgram(self.program, [run for run in self.runs if run is not None])
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
