"""Which `load_state_dict` is running: while one is, other threads' calls are answered with the weights from before."""

from __future__ import annotations

import sys
import threading
import weakref
from types import FrameType
from typing import Any

from torch import nn

from fastseq import _native

LOAD_CODE = getattr(nn.Module.load_state_dict, "__code__", None)


class Load:
    """A running `load_state_dict`, however deep in modules. Called: where it runs.

    torch copies the dictionary at the start of the call into a local variable that nothing else holds; a weak reference
    to it and the thread's stack tell the end of the call, also one by an exception, and keep nothing alive.
    """

    def __init__(self, state_dict: Any) -> None:
        self._thread = threading.get_ident()
        self._state_dict = weakref.ref(state_dict)

    def is_of(self, state_dict: Any) -> bool:
        return self._state_dict() is state_dict

    def __call__(self) -> bool | None:
        """True while it runs in another thread, None while in this one, False when it has ended."""
        state_dict = self._state_dict()
        if state_dict is None:
            return False
        if not _native.module().is_calling(self._thread, LOAD_CODE, "state_dict", state_dict):
            return False
        return None if self._thread == threading.get_ident() else True


_latest = threading.local()


def current_load() -> Load | None:
    """The outermost `load_state_dict` that this thread is in, the same object until it ends; None if it is in none."""
    found = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is LOAD_CODE:
            found = frame
        frame = frame.f_back
    if found is None:
        return None
    state_dict = found.f_locals.get("state_dict")
    load: Load | None = getattr(_latest, "load", None)
    if load is None or not load.is_of(state_dict):
        try:
            load = _latest.load = Load(state_dict)
        except TypeError:  # another torch, whose local variable is not this one: no promise then
            return None
    return load
