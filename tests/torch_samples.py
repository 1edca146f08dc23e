"""The cases PyTorch tests its own modules with, as pairs of a module and an input.

They come from `torch.testing._internal`: `module_db` lists modules, `op_db` functions, each with samples by dtype and
with inputs that are errors. That is no public interface: where it has another form than in torch 2.11 to 2.13, this
fails, it leaves nothing out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn


@contextmanager
def _without_traces() -> Iterator[None]:
    """Keeps importing PyTorch's test suite from changing the process: other test files run in it."""
    calls = {kind: vars(kind)["__call__"] for kind in (torch._C.ScriptFunction, torch._C.ScriptMethod)}
    environment = set(os.environ)
    try:
        # Afterwards no test could set flags such as allow_tf32.
        with mock.patch.object(torch.backends, "disable_global_flags"):
            yield
    finally:
        for kind, call in calls.items():
            kind.__call__ = call
        for name in set(os.environ) - environment:
            del os.environ[name]


with _without_traces():
    # They need expecttest, and numpy.
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, module_db

MODULES: dict[str, ModuleInfo] = {info.name: info for info in module_db}


class Case(NamedTuple):
    """One sample: `make()` gives a new module, `x` is what it is called with.

    `error`: what PyTorch says this raises. `more`: the module takes further arguments, which no Sequential passes on.
    """

    name: str
    make: Callable[[], nn.Module]
    x: Any
    error: type[Exception] | None = None
    more: bool = False


def dtypes_of(info: Any) -> list[torch.dtype]:
    """The dtypes that a module or function is tested with on the CPU, in an order that does not change."""
    return sorted(info.supported_dtypes("cpu"), key=str)


def module_cases(info: ModuleInfo, dtype: torch.dtype, training: bool) -> list[Case]:
    """The samples of one module. Making them draws random numbers."""
    samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training)
    return [_module_case(info, i, sample, dtype, training) for i, sample in enumerate(samples)]


def module_error_cases(info: ModuleInfo, training: bool) -> list[Case]:
    """What this module can be made for, but raises on. (Errors of construction are nobody's but the module's own.)"""
    if info.module_error_inputs_func is None:
        return []
    samples = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
    )
    return [
        _module_case(info, i, sample.module_error_input, torch.float32, training)._replace(error=sample.error_type)
        for i, sample in enumerate(samples)
        if sample.error_on is ModuleErrorEnum.FORWARD_ERROR
    ]


def _module_case(info: ModuleInfo, index: int, sample: Any, dtype: torch.dtype, training: bool) -> Case:
    constructor, forward = sample.constructor_input, sample.forward_input

    def make() -> nn.Module:
        module: nn.Module = info.module_cls(*constructor.args, **constructor.kwargs)
        return module.to(dtype).train(training)

    arguments = [a for a in (*forward.args, *forward.kwargs.values()) if a is not None]
    mode = "train" if training else "eval"
    name = f"{info.name} sample {index} {sample.desc} {str(dtype)[6:]} {mode}"
    return Case(name, make, arguments[0], more=len(arguments) > 1)


# Functions as modules ---------------------------------------------------------------------------------------------


def _conv2d(
    weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> nn.Module:
    layer = nn.Conv2d(1, 1, 1)
    _set_parameters(layer, weight, bias)
    # As the constructor stores them, which would refuse what the errors are about.
    for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        setattr(layer, name, (value, value) if isinstance(value, int) else value)
    layer.groups = groups
    return layer


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    layer = nn.Linear(1, 1)
    _set_parameters(layer, weight, bias)
    return layer


def _set_parameters(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            trains = value.is_floating_point() or value.is_complex()
            value = nn.Parameter(value.detach().clone(), requires_grad=trains)
        setattr(layer, name, value)


# Each takes what the function takes behind its input.
FUNCTIONS: dict[str, Callable[..., nn.Module]] = {
    "nn.functional.conv2d": _conv2d,
    "nn.functional.max_pool2d": nn.MaxPool2d,
    "nn.functional.linear": _linear,
    "nn.functional.relu": nn.ReLU,
    "nn.functional.upsample_nearest": nn.UpsamplingNearest2d,
    "nn.functional.upsample_bilinear": nn.UpsamplingBilinear2d,
    "nn.functional.pixel_shuffle": nn.PixelShuffle,
    "nn.functional.pixel_unshuffle": nn.PixelUnshuffle,
}
OPS: dict[str, Any] = {op.name: op for op in op_db if op.name in FUNCTIONS and not op.variant_test_name}


def op_cases(name: str, dtype: torch.dtype) -> list[Case]:
    """The samples of one function, each as a module that holds the function's weights and settings."""
    op = OPS[name]
    # For an elementwise function the latter are more: views, sizes, special values. The largest are left out. (The
    # methods of these names set the seed of every device for each sample, which takes longer than the tests.)
    make = op.reference_inputs_func or op.sample_inputs_func
    samples = [sample for sample in make(op, "cpu", dtype, requires_grad=False) if sample.input.numel() <= 1000]
    return [_op_case(name, i, sample, dtype) for i, sample in enumerate(samples)]


def op_error_cases(name: str) -> list[Case]:
    op = OPS[name]
    if op.error_inputs_func is None:
        return []
    return [
        _op_case(name, i, error.sample_input, torch.float64)._replace(error=error.error_type)
        for i, error in enumerate(op.error_inputs("cpu"))
    ]


def _op_case(name: str, index: int, sample: Any, dtype: torch.dtype) -> Case:
    settings = ", ".join(f"{key}={value}" for key, value in sample.kwargs.items())
    shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in (sample.input, *sample.args)]
    return Case(
        f"{name} sample {index} {str(dtype)[6:]} {shapes} {settings}",
        lambda: FUNCTIONS[name](*sample.args, **sample.kwargs).eval(),
        sample.input,
    )
