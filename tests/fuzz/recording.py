"""Hooks that write down when they fired, on what, and in which order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .case import Hook

# What the side that runs at the moment writes to.
log: list[str] = []
HOOK_DICTS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs"),
    *("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"),
)


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{tuple(value.stride()) if value.layout is torch.strided else ''}"
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(describe, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{describe(item)}" for key, item in value.items()) + "}"
    return type(value).__name__


def add_hook(model: nn.Module, hook: Hook) -> None:
    named = list(model.named_modules())
    path, module = named[hook.target % len(named)]
    recorder = Recorder(f"{hook.kind}@{path}", hook.changes)
    if hook.kind == "forward":
        module.register_forward_hook(recorder.forward)
    elif hook.kind == "forward_kwargs":
        module.register_forward_hook(recorder.forward_kwargs, with_kwargs=True, prepend=True)
    elif hook.kind == "always_call":
        module.register_forward_hook(recorder.forward, always_call=True)
    elif hook.kind == "forward_pre":
        module.register_forward_pre_hook(recorder.forward_pre)
    elif hook.kind == "full_backward":
        module.register_full_backward_hook(recorder.backward)
    elif hook.kind == "full_backward_pre":
        module.register_full_backward_pre_hook(recorder.backward_pre)
    else:
        raise ValueError(hook.kind)


def remove_hooks(model: nn.Module) -> None:
    for module in model.modules():
        for name in HOOK_DICTS:
            module.__dict__[name].clear()


class Recorder:
    """Bound methods of it are the hooks: they can be copied and pickled with the model."""

    def __init__(self, label: str, changes: bool) -> None:
        self.label = label
        self.changes = changes

    def forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        log.append(f"{self.label} {describe(args)} {describe(output)} {module.training}")
        return output * 0.5 if self.changes and isinstance(output, Tensor) else None

    def forward_kwargs(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        log.append(f"{self.label} {describe(args)} {describe(kwargs)} {describe(output)}")
        return output * 0.5 if self.changes and isinstance(output, Tensor) else None

    def forward_pre(self, module: nn.Module, args: Any) -> Any:
        log.append(f"{self.label} {describe(args)}")
        return (args[0] * 0.5,) if self.changes and args and isinstance(args[0], Tensor) else None

    def backward(self, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        log.append(f"{self.label} {describe(grad_input)} {describe(grad_output)}")

    def backward_pre(self, module: nn.Module, grad_output: Any) -> None:
        log.append(f"{self.label} {describe(grad_output)}")


def add_global_hook(kind: str, model: nn.Module) -> torch.utils.hooks.RemovableHandle:
    """A hook for all modules, which names those of `model` by their place."""
    paths = {id(module): path for path, module in model.named_modules()}

    def record(module: nn.Module, *values: Any) -> None:
        log.append(f"global {kind} {paths.get(id(module), '?')} {' '.join(map(describe, values))}")

    register = {
        "forward": torch_module.register_module_forward_hook,
        "forward_pre": torch_module.register_module_forward_pre_hook,
        "full_backward": torch_module.register_module_full_backward_hook,
    }[kind]
    return register(record)
