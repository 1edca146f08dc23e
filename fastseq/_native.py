"""Loads the compiled extension `fastseq._C` on first use, or says why it cannot.

Nothing here raises on a missing or broken extension: models then run eager, and `warn_once` says so.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from importlib.machinery import PathFinder
from types import ModuleType

import torch

from fastseq import _env

REBUILD = "in fastseq's source tree run: pip install --no-build-isolation --no-deps --force-reinstall ."


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The extension and "", or None and the reason."""
    # Only beside this file: the finder of an editable install would offer another tree's extension.
    if PathFinder.find_spec("fastseq._C", [os.path.dirname(__file__)]) is None:
        return None, f"the extension fastseq._C is not built; {REBUILD}"
    running = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    try:
        extension = importlib.import_module("fastseq._C")
        built_with = extension.TORCH_VERSION
    except Exception as error:  # an undefined symbol is an ImportError, but a broken file may raise anything
        return None, f"the extension fastseq._C does not load ({type(error).__name__}: {error}); {REBUILD}"
    if built_with != running:
        return None, f"the extension was built with torch {built_with}, this is torch {running}; {REBUILD}"
    return extension, ""


def native_available() -> bool:
    """Whether fused kernels can run: the extension loads and FASTSEQ_DISABLE is not set."""
    return native_error() is None


def native_error() -> str | None:
    """Why fused kernels cannot run and what to do about it, or None when they can."""
    if _env.disabled():
        return "FASTSEQ_DISABLE=1"
    return _load()[1] or None


def is_loaded() -> bool:
    """Whether the extension loads, switched off or not."""
    return _load()[0] is not None


def module() -> ModuleType:
    """The extension; ask `native_available` first."""
    extension, reason = _load()
    if extension is None:
        raise RuntimeError(reason)
    return extension


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"fastseq runs every model eager: {reason}", RuntimeWarning, stacklevel=4)


def warn_once() -> None:
    """One RuntimeWarning per process if the extension is unusable; none if that was asked for by FASTSEQ_DISABLE."""
    reason = native_error()
    if reason is not None and not _env.disabled():
        _warn(reason)
