"""The graph pass: a copy of the model in which every nn.Sequential with something to fuse is a FusedSequential."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from fastseq import _env, _native
from fastseq.controls import restore
from fastseq.matcher import EXCLUDED, IN_BFLOAT16, WITHOUT_WINOGRAD, is_excluded, is_plain_sequential, match
from fastseq.module import FusedModule, fuse
from fastseq.plan import SLOWER, TIMED
from fastseq.sequential import COMPILED, KINDS, FusedSequential
from fastseq.timing import time_kernels

log = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


def optimize(
    model: ModelT,
    *,
    exclude: Iterable[str] = (),
    inplace: bool = False,
    winograd: Literal["auto", "off"] = "auto",
    example_input: Any = None,
    compute_dtype: torch.dtype | None = None,
) -> ModelT:
    """A copy of `model` whose `nn.Sequential`s run known layer runs with fused kernels.

    Every `nn.Sequential` (exactly that type, at any depth) that holds Conv2d/ReLU/MaxPool2d or Linear/ReLU runs
    becomes a `FusedSequential` with the same children, names, `state_dict` keys and results. A module whose own
    `forward` is a straight line through such layers and functional calls runs as one plan (`FusedModule`). The given
    model is not changed, and the copy shares nothing with it. Nothing is compiled; weights are packed at the first call
    and follow every later change.

    Args:
        model: any `nn.Module`. Fused kernels run outside autograd, for float32, float16 and bfloat16 tensors on the CPU
            and on CUDA; everything else runs eager.
        exclude: names of modules inside, as `model.named_modules()` gives them (`"features.0"`), that stay eager with
            all that is in them; `""` is the model itself. Modules excluded before stay so until `restore`.
        inplace: change the given model itself instead of a copy.
        winograd: on the CPU, "auto" computes 3x3 and 5x5 convolutions of stride 1 by Winograd's minimal filtering
            where that is estimated to be faster: two to three times fewer multiplications, and an error of up to four
            times that of eager's direct sums, relative to the largest values within a few pixels (`verify` shows it).
            "off" keeps to direct sums.
        example_input: a tensor, or a tuple of all positional arguments. If given, the result is called with it, in eval
            mode and without gradients, and each fused layer on the CPU runs on whichever of its kernels is the fastest
            then, at this batch size and thread count, instead of on the one that a cost model chooses; runs that are
            slower than eager even so are left to it for inputs of this shape, batch included (`explain` says so). It
            takes between a fraction of a second and some seconds. What was found goes with the module, also into
            copies and pickles; layers of other sizes keep to the cost model.
        compute_dtype: `torch.bfloat16` lets float32 models on the CPU multiply in bfloat16 where a kernel does (direct
            convolutions of 8 channels or more, Linear): inputs and weights of such a step are rounded to 8 bits, sums
            and results stay float32. Up to twice as fast, and an error of about 0.3 % of a step's result (`verify`
            shows it). Without AVX-512 BF16 it changes nothing (`explain` says so). None or `torch.float32`: never.

    Returns:
        The copy, or the model itself with `inplace`. Of a model that is optimised already: optimised as well.

    Raises:
        TypeError: `model` is not an `nn.Module`, or `exclude` is one string or holds something else than strings.
        ValueError: a name in `exclude` is no module's, `winograd` is neither "auto" nor "off", or
            `compute_dtype` something else than None, `torch.float32` and `torch.bfloat16`.
        Exception: whatever `copy.deepcopy(model)` raises, for models that cannot be copied, and `model(example_input)`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fastseq.optimize expects a torch.nn.Module, got {type(model).__name__}; pass the model itself, "
            "not its output, its class or its state_dict"
        )
    if winograd not in ("auto", "off"):
        raise ValueError(f'winograd expects "auto" or "off", got {winograd!r}')
    if compute_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"compute_dtype expects torch.bfloat16, torch.float32 or None, got {compute_dtype!r}")
    if _env.verbose():
        enable_verbose_logging()
    _native.warn_once()
    for read in (_env.isa_cap, _env.preferred_kernel, _env.check):
        read()  # a bad FASTSEQ_* value is reported here, not in the middle of a forward pass
    excluded = _excluded(model, exclude)
    result = model if inplace else copy.deepcopy(model)
    for path in excluded:
        # Also what is optimised already becomes plain, and then is marked.
        for module in restore(result.get_submodule(path)).modules():
            module.__dict__[EXCLUDED] = True
    for path, module in result.named_modules():
        module.__dict__.pop(COMPILED, None)  # plans from before may hold what is excluded now
        module.__dict__.pop(WITHOUT_WINOGRAD, None)
        module.__dict__.pop(IN_BFLOAT16, None)
        module.__dict__.pop(TIMED, None)
        module.__dict__.pop(SLOWER, None)
        if winograd == "off":
            module.__dict__[WITHOUT_WINOGRAD] = True
        if compute_dtype is torch.bfloat16:
            module.__dict__[IN_BFLOAT16] = True
        if is_excluded(module):
            continue
        if is_plain_sequential(module):
            found = match(module, KINDS)
            if found.has_native or found.may_become_native:
                # Of the ways to install a forward this one keeps pickle, deepcopy, state_dict and DataParallel working.
                module.__class__ = FusedSequential
                log.debug("fused: %s", path or "the model itself")
        elif not isinstance(module, nn.Sequential):
            fuse(module)
            if isinstance(module, FusedModule):
                log.debug("forward as one plan: %s", path or "the model itself")
    if example_input is not None:
        time_kernels(result, example_input)
    return result


def _excluded(model: nn.Module, exclude: Iterable[str]) -> list[str]:
    """The names in `exclude`, once it is sure that they are modules'."""
    if isinstance(exclude, str):
        raise TypeError(f"exclude expects a collection of module names, got one string; did you mean [{exclude!r}]?")
    names = list(exclude)
    known = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"exclude expects names of modules, got {type(name).__name__}")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see model.named_modules()"
            raise ValueError(f"exclude names {name!r}, which is no module of this model; {hint}")
    return names


def isa() -> str:
    """The instruction set in use: 'avx512', 'avx2' or 'portable'; 'none' where the native engine is unavailable."""
    return _native.module().isa(_env.isa_cap() or "") if _native.native_available() else "none"


def has_bf16_kernels() -> bool:
    """Whether runs may use kernels that multiply bfloat16 numbers, on this CPU and below FASTSEQ_ISA."""
    return _native.native_available() and bool(_native.module().bf16_isa(_env.isa_cap() or ""))


def kernels() -> list[dict[str, Any]]:
    """All compiled kernels, best first: name, op, isa, dtype, tile rows, vectors, supported by this CPU, test_only."""
    return _native.module().kernels() if _native.native_available() else []


def enable_verbose_logging() -> None:
    """FASTSEQ_VERBOSE=1: fastseq's own log to stderr. Without it the library sets no handler and no level."""
    root = logging.getLogger("fastseq")
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fastseq: %(message)s"))
        root.addHandler(handler)
    root.setLevel(logging.DEBUG)
