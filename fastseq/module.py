"""FusedModule: a user's module whose own forward is a straight line, run as one plan while that is what it is."""

from __future__ import annotations

import copyreg
import weakref
from types import FunctionType
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from fastseq import _native
from fastseq.loading import current_load
from fastseq.matcher import EagerSegment, Match, cut
from fastseq.plan import CompiledMatch, hold
from fastseq.program import CHANGED
from fastseq.sequential import COMPILED, KINDS, install_lane
from fastseq.straight_line import StraightLine, straight_line, user_class

# The key in __dict__ of the pause between two attempts to trace a forward.
PAUSE = "_fastseq_pause"


class Pause:
    """Calls to let pass before the next attempt, twice as many each time: for a forward that is no straight line any
    more, where nothing tells when one may succeed, and for one that depends on what changes with each call.

    `before`: what ran before the pause, whose counters go on afterwards.
    """

    LONGEST = 1024

    def __init__(self) -> None:
        self._left, self._length, self._short_lived = 0, 1, 0
        self.before: CompiledMatch | None = None

    def note_end(self, was_short_lived: bool) -> None:
        """Of a match. Some changes right after each other are a user's edits; more are a habit."""
        self._short_lived = self._short_lived + 1 if was_short_lived else 0
        if self._short_lived > 3:
            self.begin()

    def __deepcopy__(self, memo: Any) -> None:
        return None  # as a CompiledMatch

    def __reduce__(self) -> Any:
        return type(None), ()

    def is_over(self) -> bool:
        self._left -= 1
        return self._left < 0

    def begin(self) -> None:
        self._left = self._length
        self._length = min(2 * self._length, self.LONGEST)


def pause_of(module: nn.Module) -> Pause:
    pause: Pause | None = module.__dict__.get(PAUSE)
    if pause is None:
        pause = module.__dict__[PAUSE] = Pause()
    return pause


class FusedModule(nn.Module):
    """Mixed into the class of a module by `fastseq.optimize`: the same module, whose calls may run as one native plan.

    A call returns what the module's own `forward` returns and raises what it raises. The forward itself runs whenever
    it is not provably what was traced (other code, children, attributes or globals), with hooks, and outside of what
    the native kernels cover; its Sequentials are then fused each by itself.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_compiling() and len(args) == 1 and not kwargs:
            compiled = self.__dict__.get(COMPILED)
            if compiled is None:
                compiled = self._fastseq_compile()
            if compiled is not None:
                output = compiled.attempt(self, args[0])
                if output.__class__ is compiled.refused and output == CHANGED:
                    pause_of(self).note_end(compiled.is_short_lived())
                    compiled = self._fastseq_compile()
                    output = CHANGED if compiled is None else compiled.attempt(self, args[0])
                if compiled is not None and output.__class__ is not compiled.refused:
                    return output
        return super().__call__(*args, **kwargs)

    def _fastseq_compile(self) -> CompiledMatch | None:
        """Trace and match the forward as it is now. None if that is impossible."""
        before = self.__dict__.pop(COMPILED, None)
        if not _native.native_available() or "_is_replica" in self.__dict__:
            return None
        pause = pause_of(self)
        pause.before = pause.before if before is None else before
        if not pause.is_over():
            return None
        line = straight_line(self, KINDS)
        if isinstance(line, str):
            pause.begin()
            return None
        compiled = CompiledMatch(self, match_line(line), pause.before, line)
        pause.before = None
        self.__dict__[COMPILED] = compiled
        return compiled

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        hold(self, current_load())
        super()._load_from_state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made anew where the module is, from the user's own: no dynamic class needs to be importable.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        function, arguments, state, *rest = reduced
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if key not in (COMPILED, PAUSE)}
        if not is_fused_class(type(self)):  # somebody else's subclass of it, which is theirs to find again
            return (function, arguments, state, *rest)
        return (new_fused, (plain_class(type(self)), *arguments[1:]), state, *rest)


# By the user's class, as long as there is a module of the fused one.
_classes: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()


def fused_class(kind: type) -> type:
    """The subclass of `kind` that is a FusedModule, with the name of `kind`; the same one while it is in use."""
    made = _classes.get(kind)
    if made is None:
        call = FusedModule.__call__
        # A code object for each class: torch.compile counts its recompilations by code object, and gives up on one with
        # eight, which as many classes are.
        code = call.__code__.replace(co_name="__call__")
        names = {
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
            "__call__": FunctionType(code, call.__globals__, call.__name__, call.__defaults__, call.__closure__),
        }
        made = _classes[kind] = type(kind.__name__, (FusedModule, kind), names)
        if _native.is_loaded():
            install_lane(made)
    return made


def plain_class(kind: type) -> type:
    """The user's class behind one that `fused_class` made; any other class itself."""
    return user_class(kind) if is_fused_class(kind) else kind


def is_fused_class(kind: type) -> bool:
    """Whether `fused_class` made it. Classes derived from such a one, as fully_shard makes, are somebody else's."""
    return kind.__mro__[1] is FusedModule


def new_fused(kind: type, *arguments: Any) -> Any:
    """For pickle and copy: an empty module of the fused class of `kind`."""
    made: Any = fused_class(kind)
    return made.__new__(made, *arguments)


def match_forward(module: nn.Module) -> tuple[Match, StraightLine] | str:
    """What `module.forward` runs as, or why it is not run as one plan."""
    line = straight_line(module, KINDS)
    if isinstance(line, str):
        return line
    found = Match(cut(line.leaves))
    if not found.has_native and not found.may_become_native:
        return "nothing to fuse"
    return match_line(line), line


def match_line(line: StraightLine) -> Match:
    """The segments of a forward. All eager, with that reason, where some must be but what is between needs a native
    run: then the forward itself runs, and the watches of the layers tell when that may change."""
    match = Match(cut(line.leaves), [container.module for container in line.containers[1:]])
    if len(match.segments) > 1 and any(leaf.needs_native for leaf in line.leaves):
        reason = "it takes the batch size from another value than it reshapes, and not all of it is fused"
        return Match([EagerSegment(leaf, reason) for leaf in line.leaves], match.nested)
    return match


PICKLING = ("__reduce__", "__reduce_ex__", "__getnewargs_ex__")


def refuse_class(module: nn.Module) -> str | None:
    """Why the module's class cannot be extended, or None."""
    kind = user_class(type(module))
    if type(kind) is not type or isinstance(kind.__dict__.get("__slots__"), (tuple, list, str)):
        return "its class has a metaclass or __slots__"
    if any("__init_subclass__" in base.__dict__ for base in kind.__mro__[:-1]):
        return "its class wants to know of subclasses"
    if any(name in base.__dict__ for base in kind.__mro__[:-1] for name in PICKLING):
        return "its class has its own way of pickling"
    if kind in copyreg.dispatch_table:
        return "its class has a pickling function in copyreg"
    return None


def fuse(module: nn.Module) -> str | None:
    """Makes `module` a FusedModule if its forward is a straight line with something to fuse; else gives the reason."""
    if isinstance(module, (nn.Sequential, FusedModule)):
        return None
    found = match_forward(module)
    if isinstance(found, str):
        return found
    reason = refuse_class(module)
    if reason is None:
        object.__setattr__(module, "__class__", fused_class(type(module)))
    return reason
