"""FusedSequential: an nn.Sequential that runs fused where it can and eager where it must."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from fastseq import _native
from fastseq.loading import current_load
from fastseq.matcher import match
from fastseq.plan import CompiledMatch, hold
from fastseq.program import CHANGED

# The key in __dict__ of what belongs to this process and object: never copied or pickled.
COMPILED = "_fastseq_compiled"


class FusedSequential(nn.Sequential):
    """`nn.Sequential` with the same children, names and `state_dict`, whose known runs execute as fused native kernels.

    Made by `fastseq.optimize`. A call returns what `nn.Sequential` returns and raises what it raises: whatever the
    native kernels do not cover (gradients, hooks, other dtypes or devices, transforms, odd arguments) runs eager.

    Args:
        input: whatever the first layer takes; float32, float16 and bfloat16 tensors run fused.

    Raises:
        whatever the layers raise in eager mode.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # nn.Module.__call__ alone takes longer than a small network. In calls of an instance the fast lane comes even
        # before this: see csrc/bindings/lane.h.
        if not is_compiling() and len(args) == 1 and not kwargs:
            compiled = self.__dict__.get(COMPILED)
            if compiled is not None:
                output = compiled.call(self, args[0])
                if output is not compiled.refused:
                    return output
        return super().__call__(*args, **kwargs)

    # No annotations, as nn.Sequential has none: torch.jit.script would hold every Sequential to them.
    def forward(self, input):
        """Run the layers in order. input: as the first layer takes it; returns what the last layer returns."""
        if torch.jit.is_scripting():
            for module in self:
                input = module(input)
            return input
        return self._fastseq_forward(input)

    # Python names a function's qualified name in argument errors, and those are to read as eager's.
    forward.__qualname__ = "Sequential.forward"

    @torch.jit.unused
    def _fastseq_forward(self, input: Any) -> Any:
        if is_compiling():
            return super().forward(input)
        compiled = self.__dict__.get(COMPILED)
        if compiled is None:
            compiled = self._fastseq_compile()
        if compiled is None:
            return super().forward(input)
        output = compiled.program.forward(self, input)
        if output.__class__ is compiled.refused and output == CHANGED:
            compiled = self._fastseq_compile()
            if compiled is None:
                return super().forward(input)
            output = compiled.program.forward(self, input)
        return super().forward(input) if output.__class__ is compiled.refused else output

    def _fastseq_compile(self) -> CompiledMatch | None:
        """Match the layers as they are now. None if the native engine is unavailable or switched off."""
        before = self.__dict__.pop(COMPILED, None)
        if not _native.native_available():
            return None
        compiled = CompiledMatch(self, match(self, KINDS), before)
        self.__dict__[COMPILED] = compiled
        _install_lane()
        return compiled

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        hold(self, current_load())
        super()._load_from_state_dict(*args, **kwargs)

    def _get_name(self) -> str:
        return "FusedSequential"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != COMPILED}


def _install_lane() -> None:
    """Whoever assigns to `FusedSequential.__call__` takes the lane out; with the original it comes back at a match."""
    if FusedSequential.__dict__["__call__"] is _CALL:
        install_lane(FusedSequential)


def install_lane(kind: type) -> None:
    """Calls of instances of `kind` begin in native code."""
    _native.module().install_lane(kind, COMPILED, CompiledMatch)


_CALL = FusedSequential.__dict__["__call__"]

# What is flattened for execution.
KINDS = (nn.Sequential, FusedSequential)


def compiled_of(module: nn.Module) -> CompiledMatch | None:
    """The compiled match that `module` used last, None before its first call and for modules that have none."""
    return module.__dict__.get(COMPILED)
