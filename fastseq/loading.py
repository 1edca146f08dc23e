"""Which `load_state_dict` is running: while one is, other threads' calls are answered with the weights from before."""

from __future__ import annotations

import sys
import threading
import weakref
from types import FrameType

from torch import nn

LOAD_CODE = nn.Module.load_state_dict.__code__


class Load:
    """A running `load_state_dict`, however deep in modules. Called: whether it still runs, in another thread than this.

    torch copies the dictionary at the start of the call into a local variable that nothing else holds; a weak reference
    to it and the thread's stack tell the end of the call, also one by an exception, and keep nothing alive.
    """

    def __init__(self, frame: FrameType) -> None:
        self._thread = threading.get_ident()
        self._state_dict = weakref.ref(frame.f_locals["state_dict"])

    def __call__(self) -> bool:
        if self._thread == threading.get_ident():
            return False
        state_dict = self._state_dict()
        if state_dict is None:
            return False
        frame = sys._current_frames().get(self._thread)
        while frame is not None:
            if frame.f_code is LOAD_CODE and frame.f_locals.get("state_dict") is state_dict:
                return True
            frame = frame.f_back
        return False


def current_load() -> Load | None:
    """The outermost `load_state_dict` that this thread is in, None if it is in none."""
    found = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is LOAD_CODE:
            found = frame
        frame = frame.f_back
    try:
        return None if found is None else Load(found)
    except (KeyError, TypeError):  # another torch, whose local variable is not this one: no promise then
        return None
