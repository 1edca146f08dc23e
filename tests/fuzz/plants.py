"""Defects to plant in fastseq, each of a kind that the fuzzer exists to find."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fastseq import matcher, sequential
from fastseq.sequential import FusedSequential

# What changes a fused call's result: (module, input, output) -> output.
Change = Callable[[FusedSequential, Any, Tensor], Tensor]
Plant = Callable[[], AbstractContextManager[Any]]


def around_call(planted: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Inside, `planted(the call it replaces, module, *args)` is what calls a FusedSequential."""
    plain = FusedSequential.__call__

    def call(self: FusedSequential, *args: Any, **kwargs: Any) -> Any:
        return planted(plain, self, *args, **kwargs)

    return patch.object(FusedSequential, "__call__", call)


def after_fused_calls(change: Change) -> Plant:
    def planted(call: Any, module: FusedSequential, *args: Any, **kwargs: Any) -> Any:
        compiled = sequential.compiled_of(module)
        before = compiled.stats()["fused_calls"] if compiled is not None else 0
        output = call(module, *args, **kwargs)
        compiled = sequential.compiled_of(module)
        if compiled is None or compiled.stats()["fused_calls"] == before or not isinstance(output, Tensor):
            return output
        return change(module, args[0] if args else None, output)

    return lambda: around_call(planted)


def wrong_element(module: FusedSequential, x: Any, output: Tensor) -> Tensor:
    """One element of each result is off by one part in ten thousand of the largest."""
    if output.numel() and not output.requires_grad:
        output[(-1,) * output.dim()] += output.abs().max() * 1e-4
    return output


def wrong_bit(module: FusedSequential, x: Any, output: Tensor) -> Tensor:
    """One element is the next larger number: seen where results are exact."""
    if output.numel() and not output.requires_grad:
        last = (-1,) * output.dim()
        output[last] = torch.nextafter(output[last], torch.tensor(torch.inf))
    return output


def written_input(module: FusedSequential, x: Any, output: Tensor) -> Tensor:
    if isinstance(x, Tensor) and x.numel():
        x.data.select(0, 0).fill_(0.125)
    return output


def random_numbers_drawn(module: FusedSequential, x: Any, output: Tensor) -> Tensor:
    torch.rand(1)
    return output


def threads_changed(module: FusedSequential, x: Any, output: Tensor) -> Tensor:
    torch.set_num_threads(4)
    return output


def other_strides(module: FusedSequential, x: Any, output: Tensor) -> Tensor:
    return output.to(memory_format=torch.channels_last) if output.dim() == 4 else output


def lost_nan(module: FusedSequential, x: Any, output: Tensor) -> Tensor:
    return torch.where(output.isnan(), 0.0, output)


def reused_output(module: FusedSequential, x: Any, output: Tensor) -> Tensor:
    """Results of one shape share their memory."""
    buffers: dict[Any, Tensor] = module.__dict__.setdefault("_planted_buffers", {})
    if output.requires_grad:
        return output
    key = (output.shape, output.stride(), output.is_inference())
    if key not in buffers:
        buffers[key] = output
    with torch.inference_mode(output.is_inference()):
        return buffers[key].copy_(output).view(output.shape)


def killed_process(module: FusedSequential, x: Any, output: Tensor) -> Tensor:
    if isinstance(x, Tensor) and x.dim() == 4 and x.shape[0] == 7:
        os.abort()
    return output


def dropped_relu() -> AbstractContextManager[Any]:
    """No step of a plan has a ReLU."""
    table = tuple(
        dataclasses.replace(p, build=lambda layers, build=p.build: {**build(layers), "activation": "none"})
        for p in matcher.PATTERNS
    )
    return patch.object(matcher.match, "__defaults__", (table,))


def stale_weights() -> AbstractContextManager[Any]:
    """Fused calls run for ever the weights of the first one."""

    def planted(call: Any, module: FusedSequential, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or nn.modules.module._global_forward_hooks:
            return call(module, *args, **kwargs)
        if "_planted" not in module.__dict__:
            module.__dict__["_planted"] = copy.deepcopy(module)
        return call(module.__dict__["_planted"], *args, **kwargs)

    return around_call(planted)


def lost_hooks() -> AbstractContextManager[Any]:
    """Hooks of a Sequential itself do not fire."""

    def planted(call: Any, module: FusedSequential, *args: Any, **kwargs: Any) -> Any:
        hooks = dict(module._forward_hooks)
        module._forward_hooks.clear()
        try:
            return call(module, *args, **kwargs)
        finally:
            module._forward_hooks.update(hooks)

    return around_call(planted)


PLANTS: dict[str, Plant] = {
    **{
        change.__name__: after_fused_calls(change)
        for change in (
            *(wrong_element, wrong_bit, written_input, random_numbers_drawn, threads_changed, other_strides),
            *(lost_nan, reused_output, killed_process),
        )
    },
    **{plant.__name__: plant for plant in (dropped_relu, stale_weights, lost_hooks)},
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Inside, fastseq has the defect of that name; none for ""."""
    with PLANTS[name]() if name else nullcontext():
        yield
