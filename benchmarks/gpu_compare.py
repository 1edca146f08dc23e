"""What a result is compared with: eager's of the same precision, and float64."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from gpu_device import MODES, Mode
from torch import Tensor, nn

import fastseq
from fastseq.testing import count_flops

FACTOR = 4.0  # times eager's own error
PEAK_FACTOR = 4.0  # the largest element's error may be so many times the norm's


@dataclass
class Comparison:
    """Norm-wise errors against float64, what is allowed, and whatever is wrong."""

    error: float
    eager_error: float
    limit: float
    problems: list[str]


def norm_error(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """||actual - exact|| / ||exact||, and the same of the largest elements, where both are finite."""
    actual, exact = actual.detach().double(), exact.detach().to(actual.device).double()
    finite = actual.isfinite() & exact.isfinite()
    actual, exact = actual[finite], exact[finite]
    if exact.numel() == 0:
        return 0.0, 0.0
    difference = actual - exact
    scale, peak = exact.norm().item() or 1.0, exact.abs().max().item() or 1.0
    return difference.norm().item() / scale, difference.abs().max().item() / peak


def floor_of(model: nn.Module, mode: Mode) -> float:
    """The error that is always allowed: of IEEE arithmetic where no layer of the model may use TF32."""
    allows = {nn.Conv2d: mode.allows_tf32_conv, nn.Linear: mode.allows_tf32_linear}
    is_ieee = mode.dtype == torch.float32 and not any(allows.get(type(module), False) for module in model.modules())
    return MODES["f32"].floor if is_ieee else mode.floor


def compare(actual: Tensor, eager: Tensor, exact: Tensor, floor: float, signs: bool = False) -> Comparison:
    """`actual` against what eager gives and against float64.

    floor: the norm-wise error that is always allowed.
    signs: those of zeros count too.
    """
    problems = []
    for name, has, should_have in (
        ("device", actual.device, eager.device),
        ("dtype", actual.dtype, eager.dtype),
        ("shape", tuple(actual.shape), tuple(eager.shape)),
        ("strides", actual.stride(), eager.stride()),
    ):
        if has != should_have:
            problems.append(f"{name} {has}, eager has {should_have}")
    if tuple(actual.shape) != tuple(exact.shape):
        return Comparison(math.inf, 0.0, 0.0, problems)
    found, usual, right = actual, eager.to(actual.device), exact.to(actual.device).to(eager.dtype)
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(found) != test(usual)
        # An algorithm of eager's that transforms its input spreads infinities: then float64 decides.
        if wrong.any() and not torch.equal(test(found), test(right)):
            at = wrong.nonzero()[0].tolist()
            count, first = f"{int(wrong.sum())} of {wrong.numel()}", found[tuple(at)].item()
            problems.append(f"{name} in other places than eager's: {count}, the first at {at}: {first}")
    if signs and not torch.equal(torch.signbit(found) & ~found.isnan(), torch.signbit(usual) & ~usual.isnan()):
        problems.append("signs of zeros are not eager's")
    error, peak = norm_error(actual, exact)
    eager_error, eager_peak = norm_error(eager, exact)
    limit = max(floor, FACTOR * eager_error)
    if not error <= limit:
        problems.append(f"error {error:.3g} against float64, allowed {limit:.3g} (eager {eager_error:.3g})")
    peak_limit = PEAK_FACTOR * max(floor, FACTOR * eager_peak)
    if not peak <= peak_limit:
        allowed = f"allowed {peak_limit:.3g} (eager {eager_peak:.3g})"
        problems.append(f"largest error {peak:.3g} of the largest value, {allowed}")
    return Comparison(error, eager_error, limit, problems)


def exact_result(model: nn.Module, x: Tensor) -> Tensor:
    """`model(x)` in float64: on the CPU, or where it was if that would take long."""
    double = copy.deepcopy(model).double()
    x = x.detach().double()
    with torch.no_grad():
        if x.is_cuda and count_flops(copy.deepcopy(model).to("meta"), x.to("meta")) < 5e8:
            return double.cpu()(x.cpu())
        return double(x)


def kernels_used(fast: nn.Module) -> list[str]:
    """The kernel of each step of the last call."""
    segments = [s for sequential in fastseq.explain(fast).to_dict()["sequentials"] for s in sequential["segments"]]
    return [step["kernel"] for segment in segments if segment["kind"] == "native" for step in segment["steps"]]
