"""From a match to the native program of a Sequential or a forward: watches, native runs, eager layers."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import nn

from fastseq import _env, _native
from fastseq.loading import Load
from fastseq.matcher import IN_BFLOAT16, WITHOUT_WINOGRAD, EagerSegment, Match, NativeSegment
from fastseq.patterns.base import ATTRIBUTES, BUFFERS, PARAMETERS
from fastseq.program import (
    CheckedProgram,
    LoggedProgram,
    ProgramSegment,
    Slower,
    TrialProgram,
    add_stats,
    layers_text,
)
from fastseq.straight_line import Container, StraightLine


def watch(layer: nn.Module, is_fused: bool = True) -> Any:
    """A watch on a layer: its type, hooks, and the attributes, parameters and buffers its forward reads."""
    kind = type(layer)
    parameters, buffers = (names.get(kind, ()) if is_fused else () for names in (PARAMETERS, BUFFERS))
    return _native.module().ModuleWatch(layer, list(ATTRIBUTES.get(kind, ())), list(parameters), buffers=list(buffers))


def native_steps(segment: NativeSegment) -> tuple[list[dict[str, Any]], list[nn.Module]]:
    """The steps as the engine takes them, and the modules that "layer", "norm" and "slopes" count."""
    layers: list[Any] = []
    index: dict[int, int] = {}
    for leaf in segment.leaves:
        if id(leaf.layer) not in index:
            index[id(leaf.layer)] = len(layers)
            layers.append(leaf.layer)
    steps = []
    for native in (native for step in segment.steps for native in step.natives):
        holders = {key: native[key] for key in ("layer", "norm", "slopes")}
        steps.append({**native, **{k: None if h is None else index[id(h)] for k, h in holders.items()}})
    return steps, layers


# The keys in a module's __dict__ of what timing has found, which goes with the module, also into copies: the kernels by
# layer, and the runs that are slower than eager. And of whether calls are timed now.
TIMED, SLOWER, TIMING = "_fastseq_timed", "_fastseq_slower", "_fastseq_timing"


def native_run(segment: NativeSegment, owner: nn.Module) -> Any:
    """The native run of a segment. It keeps no weights until its first call."""
    steps, layers = native_steps(segment)
    watches = [watch(layer) for layer in layers]
    return _native.module().NativeRun(
        steps,
        watches,
        segment.flattens_input,
        segment.flattens_output,
        segment.flattens_by_view,
        segment.rows_features,
        isa=_env.isa_cap() or "",
        kernel=_env.preferred_kernel() or "",
        checks=_env.check(),
        winograd=WITHOUT_WINOGRAD not in owner.__dict__,
        bfloat16=IN_BFLOAT16 in owner.__dict__,
        timings=owner.__dict__.get(TIMED, {}),
        times_kernels=TIMING in owner.__dict__,
    )


# By container, its own and those around it, into whose runs its layers were taken; and what loads weights into it.
_of_container: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[CompiledMatch]] = weakref.WeakKeyDictionary()
_loads: weakref.WeakKeyDictionary[nn.Module, Load] = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # of both

# A match that is outdated after fewer calls may well be outdated again as soon.
FEW_CALLS = 2


def hold(container: nn.Module, load: Load | None) -> None:
    """Answer other threads with the weights of now until `load`, which is about to change `container`'s, ends."""
    if load is None:
        return
    with _lock:
        _loads[container] = load
        found = list(_of_container.get(container, ()))
    for compiled in found:
        compiled.hold(load)


class CompiledMatch:
    """A match with its native runs, and the program that executes both.

    `before`: what the owner ran so far; its counters are carried on. `line`: where the match is that of a forward.
    `lane`: the program that a call of the owner may run before any Python, see csrc/bindings/lane.h, or None.
    """

    __slots__ = ("__dict__", "__weakref__", "lane")

    def __init__(
        self, owner: nn.Module, match: Match, before: CompiledMatch | None = None, line: StraightLine | None = None
    ) -> None:
        self.match = match
        self.past = add_stats([]) if before is None else before.stats()
        self.past_declined = {} if before is None else before.declined()
        self.runs = [native_run(s, owner) if isinstance(s, NativeSegment) else None for s in match.segments]
        module = _native.module()
        owners = line.containers if line else list(map(Container, (owner, *match.nested)))
        containers = [
            # A child of the same name in __dict__ would hide the registered one, as for parameters.
            module.ModuleWatch(
                c.module,
                c.attributes,
                c.children,
                children=tuple(c.module._modules.values()),
                names=tuple(c.module._modules) if c.children else None,
                is_owner=c.module is owner,
            )
            for c in owners
        ]
        forwards = [module.ForwardWatch(f.function, f.names) for f in (line.forwards if line else ())]
        segments: list[ProgramSegment] = []
        for run, segment in zip(self.runs, match.segments, strict=True):
            if isinstance(segment, EagerSegment):
                layer = segment.leaf.runs
                # Dropout back in eval mode, an attribute set back, a lazy layer materialised: worth a new match.
                watched = watch(layer, is_fused=False) if isinstance(layer, nn.Module) else None
                segments.append((None, [layer], watched))
            else:
                segments.append((run, [leaf.runs for leaf in segment.leaves], None))
        self.slower: list[Slower | None] = [None] * len(segments)  # by segment, what explain tells of
        for slower in owner.__dict__.get(SLOWER, ()):
            run, layers, _ = segments[slower.segment] if slower.segment < len(segments) else (None, [], None)
            if run is not None and layers_text(layers) == slower.layers:
                self.slower[slower.segment] = slower
                run.leave_to_eager(slower.example())
        self.program: Any
        self.trial: TrialProgram | None = None
        if _env.check():
            self.program = CheckedProgram(owner, containers, segments, forwards)
            self.program.in_bfloat16 = IN_BFLOAT16 in owner.__dict__
        elif TIMING in owner.__dict__:
            self.program = self.trial = TrialProgram(owner, containers, segments, forwards)
        else:
            self.program = module.Program(owner, containers, segments, forwards)
        if _env.verbose():
            self.program = LoggedProgram(self.program, [run for run in self.runs if run is not None])
        self.refused = refused = module.Refused
        with _lock:
            for container in owners:
                _of_container.setdefault(container.module, weakref.WeakSet()).add(self)
            loads = [_loads[container.module] for container in owners if container.module in _loads]
        for load in loads:
            if load() is not False:  # made in the middle of it
                self.hold(load)
        # An instance's own forward runs at each call; it may ask for the class's forward, and gets that one fused.
        has_own_forward = "forward" in owner.__dict__
        self.call = (lambda *_: refused) if has_own_forward else self.program.call
        self.lane = self.program if type(self.program) is module.Program and not has_own_forward else None
        self.attempt = self.program.attempt

    def __deepcopy__(self, memo: Any) -> None:
        """Nothing: it belongs to this process and object. For modules that copy or pickle their `__dict__` by hand."""
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    def hold(self, load: Load) -> None:
        for run in self.runs:
            if run is not None:
                run.hold(load)

    def timed(self) -> tuple[dict[str, str], list[Slower]]:
        """What a trial found: kernels by layer, and runs that are slower than eager."""
        kernels: dict[str, str] = {}
        for run in self.runs:
            if run is not None:
                kernels |= run.timings()
        return kernels, [] if self.trial is None else self.trial.slower

    def stats(self) -> dict[str, Any]:
        return add_stats([self.past, self.program.stats()])

    def reset_stats(self) -> None:
        self.past, self.past_declined = add_stats([]), {}
        self.program.reset_stats()

    def is_current(self, owner: nn.Module) -> bool:
        """Whether the owner's layers are still those that were matched."""
        return bool(self.program.is_current(owner))

    def forget_last_plans(self) -> None:
        for run in self.runs:
            if run is not None:
                run.forget_last_plan()

    def is_short_lived(self) -> bool:
        """Whether hardly a call was made with it."""
        return bool(self.program.stats()["fused_calls"] < FEW_CALLS)

    def declined(self) -> dict[str, int]:
        """Why and how often the whole forward was left to Python."""
        now = self.program.stats().get("declined", {})
        return {r: self.past_declined.get(r, 0) + now.get(r, 0) for r in {**self.past_declined, **now}}

    def refresh(self) -> None:
        for run in self.runs:
            if run is not None:
                run.refresh()
