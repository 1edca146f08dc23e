"""The graph pass: a copy of the model in which every nn.Sequential with something to fuse is a FusedSequential."""

from __future__ import annotations

import copy
import logging
from typing import Any, TypeVar

from torch import nn

from fastseq import _env, _native
from fastseq.matcher import is_plain_sequential, match
from fastseq.sequential import FusedSequential, compiled_of

log = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


def optimize(model: ModelT) -> ModelT:
    """A copy of `model` whose `nn.Sequential`s run known layer runs with fused kernels.

    Every `nn.Sequential` (exactly that type, at any depth) that holds Conv2d/ReLU/MaxPool2d or Linear/ReLU runs
    becomes a `FusedSequential` with the same children, names, `state_dict` keys and results. The given model is not
    changed, and the copy shares nothing with it. Nothing is compiled; weights are packed at the first call and follow
    every later change.

    Args:
        model: any `nn.Module`. Fused kernels run outside autograd, for float32 tensors on the CPU and for float32,
            float16 and bfloat16 tensors on CUDA; everything else runs eager.

    Returns:
        The copy. Of a model that is optimised already: a copy that is optimised as well.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        Exception: whatever `copy.deepcopy(model)` raises, for models that cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fastseq.optimize expects a torch.nn.Module, got {type(model).__name__}; pass the model itself, "
            "not its output, its class or its state_dict"
        )
    if _env.verbose():
        enable_verbose_logging()
    _native.warn_once()
    for read in (_env.isa_cap, _env.preferred_kernel, _env.check):
        read()  # a bad FASTSEQ_* value is reported here, not in the middle of a forward pass
    copied = copy.deepcopy(model)
    kinds = (nn.Sequential, FusedSequential)
    for path, module in copied.named_modules():
        if not is_plain_sequential(module):
            continue
        found = match(module, kinds)
        if found.has_native or found.may_become_native:
            # Of the ways to install a forward this one keeps pickle, deepcopy, state_dict and DataParallel working.
            module.__class__ = FusedSequential
            log.debug("fused: %s", path or "the model itself")
    return copied


def refresh(model: nn.Module) -> None:
    """Drop all packed weights of an optimised model, so that the next call packs the weights as they are then.

    Needed only after writes that no check can see cheaply: a few elements of a large weight changed behind autograd's
    back (through `.data`, a NumPy alias or a raw pointer). All ordinary updates are noticed without it.
    """
    for module in model.modules():
        compiled = compiled_of(module)
        if compiled is not None:
            compiled.refresh()


def isa() -> str:
    """The instruction set in use: 'avx512', 'avx2' or 'portable'; 'none' where the native engine is unavailable."""
    return _native.module().isa(_env.isa_cap() or "") if _native.native_available() else "none"


def kernels() -> list[dict[str, Any]]:
    """All compiled kernels, best first: name, op, isa, tile rows and vectors, supported by this CPU, test_only."""
    return _native.module().kernels() if _native.native_available() else []


def enable_verbose_logging() -> None:
    """FASTSEQ_VERBOSE=1: fastseq's own log to stderr. Without it the library sets no handler and no level."""
    root = logging.getLogger("fastseq")
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fastseq: %(message)s"))
        root.addHandler(handler)
    root.setLevel(logging.DEBUG)
