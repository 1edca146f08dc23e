"""Switching fused execution off and back: for a block of code, or for a model."""

from __future__ import annotations

import threading
from contextlib import ContextDecorator
from types import TracebackType
from typing import TypeVar

from torch import nn

from fastseq import _native
from fastseq.matcher import EXCLUDED, IN_BFLOAT16, WITHOUT_WINOGRAD
from fastseq.module import PAUSE, is_fused_class, plain_class
from fastseq.plan import SLOWER, TIMED
from fastseq.sequential import COMPILED, FusedSequential, compiled_of

# The key in a parameter's __dict__ of what the torch.compile backend made for it.
BINDINGS = "_fastseq_bindings"

ModelT = TypeVar("ModelT", bound=nn.Module)


class disabled(ContextDecorator):
    """`with fastseq.disabled():` every optimised model that this thread calls inside runs eager. Also a decorator.

    Like `torch.no_grad()` it counts for the calling thread only and nests. Plans and packed weights stay.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def _recreate_cm(self) -> disabled:
        return disabled()  # for each call of a decorated function

    def __enter__(self) -> None:
        if _native.is_loaded():
            self._local.__dict__.setdefault("before", []).append(_native.module().set_disabled(True))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._local.__dict__.get("before"):
            _native.module().set_disabled(self._local.before.pop())


def restore(model: ModelT) -> ModelT:
    """Make an optimised model plain again, in place: its own classes, no plans, packed weights released.

    Args:
        model: an optimised model, or any other module, which stays as it is.

    Returns:
        The model itself, with the same children and parameters as objects.

    Raises:
        TypeError: `model` is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastseq.restore expects a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        for key in (COMPILED, PAUSE, EXCLUDED, WITHOUT_WINOGRAD, IN_BFLOAT16, TIMED, SLOWER):
            module.__dict__.pop(key, None)
        if type(module) is FusedSequential:
            object.__setattr__(module, "__class__", nn.Sequential)
        elif is_fused_class(type(module)):
            object.__setattr__(module, "__class__", plain_class(type(module)))
    for parameter in model.parameters():
        parameter.__dict__.pop(BINDINGS, None)
    return model


def refresh(model: nn.Module) -> None:
    """Drop all packed weights of a model, so that the next call packs the weights as they are then.

    For optimised models, and for those compiled with `backend="fastseq"`.

    Needed only after writes that no check can see cheaply: a few elements of a large weight changed behind autograd's
    back (through `.data`, a NumPy alias or a raw pointer). All ordinary updates are noticed without it.

    Raises:
        TypeError: `model` is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastseq.refresh expects a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        compiled = compiled_of(module)
        if compiled is not None:
            compiled.refresh()
    for parameter in model.parameters():
        parameter.__dict__.pop(BINDINGS, None)
