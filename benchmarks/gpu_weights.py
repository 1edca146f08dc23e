"""Checks of what outlives a call: weights that change between calls, and results that later calls leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from gpu_device import MODES, Mode
from gpu_models import NETS
from gpu_task import Check
from torch import Tensor, nn

import fastseq
from fastseq.reference import plain_copy


def new_weights(check: Check, model: nn.Module, mode: Mode) -> dict[str, Tensor]:
    other = check.model(copy.deepcopy(model), mode)
    return {name: value.clone() for name, value in other.state_dict().items()}


def weight_changes() -> dict[str, Callable[[nn.Module, dict[str, Tensor]], None]]:
    """Ways to give a model other weights."""

    def data_writes(model: nn.Module, state: dict[str, Tensor]) -> None:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(state[name])

    def data_scaled(model: nn.Module, state: dict[str, Tensor]) -> None:
        for parameter in model.parameters():
            parameter.data.mul_(-0.75)

    def data_replaced(model: nn.Module, state: dict[str, Tensor]) -> None:
        for name, parameter in model.named_parameters():
            parameter.data = state[name]

    def in_place(model: nn.Module, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.lerp_(state[name], 0.5)

    def new_parameters(model: nn.Module, state: dict[str, Tensor]) -> None:
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight = nn.Parameter(module.weight.detach() * 0.5)

    def one_element(model: nn.Module, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.view(-1)[-1] += 2.0

    return {
        "load_state_dict": lambda model, state: model.load_state_dict(state) and None,
        "load_state_dict(assign=True)": lambda model, state: model.load_state_dict(state, assign=True) and None,
        ".data.copy_": data_writes,
        ".data.mul_": data_scaled,
        ".data =": data_replaced,
        "in place": in_place,
        "new parameters": new_parameters,
        "one element": one_element,
        ".to(channels_last)": lambda model, state: model.to(memory_format=torch.channels_last) and None,
    }


def live_weights(check: Check) -> None:
    for mode in map(MODES.__getitem__, ("default", "bf16")):
        for name, (make, size) in NETS.items():
            fast = fastseq.optimize(check.model(make(), mode))
            check.run(plain_copy(fast), check.random(8, *size, mode=mode), mode, f"{mode.name}, {name}, before", fast)
            for change, apply in weight_changes().items():
                apply(fast, new_weights(check, plain_copy(fast), mode))
                x = check.random(8, *size, mode=mode)
                check.run(plain_copy(fast), x, mode, f"{mode.name}, {name}, after {change}", fast)
            fast = fast.to(torch.float16)
            half = MODES["f16"]
            check.run(plain_copy(fast), check.random(4, *size, mode=half), half, f"{name}, after .to(float16)", fast)


def outputs_are_kept(check: Check) -> None:
    mode = MODES["default"]
    for name, (make, size) in NETS.items():
        model = check.model(make(), mode)
        fast = fastseq.optimize(model)
        with torch.no_grad():
            xs = [check.random(batch, *size, mode=mode) for batch in (4, 4, 1, 8, 4, 4)]
            outputs = [check.tamper(fast(x)) for x in xs]
            saved = [output.clone() for output in outputs]
            addresses = {output.data_ptr() for output in outputs}
            for _ in range(4):
                for x in xs:
                    fast(x)
        check.checks += 1
        if len(addresses) != len(outputs):
            check.fault(f"{name}: two results share memory")
        if not all(torch.equal(a, b) for a, b in zip(outputs, saved, strict=True)):
            check.fault(f"{name}: a later call changed a result")
        for x, output in zip(xs, outputs, strict=True):
            check.same(output, model, x, mode, name)
