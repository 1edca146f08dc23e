"""Walks the table of patterns: each is fused on its own example, and each refusal says why and gives eager's result."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401
    outcome,
    run_fused,
)
from torch import nn

import fastseq
from fastseq import matcher
from fastseq.patterns import PATTERNS, base
from fastseq.patterns.base import REVERSED_PADDING, Pattern
from fastseq.sequential import FusedSequential
from fastseq.testing import assert_matches

CONTAINERS = (nn.Sequential, FusedSequential)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=[pattern.name for pattern in PATTERNS])


def steps_of(model: nn.Sequential) -> list[str]:
    """The patterns that the matcher finds, "eager" for a layer that stays."""
    found: list[str] = []
    for segment in matcher.match(model, CONTAINERS).segments:
        if isinstance(segment, matcher.NativeSegment):
            found += [step.pattern for step in segment.steps]
        else:
            found.append("eager")
    return found


def test_names_are_the_layers_in_order() -> None:
    assert [p.name for p in PATTERNS] == ["_".join(kind.__name__.lower() for kind in p.types) for p in PATTERNS]
    assert len({p.types for p in PATTERNS}) == len(PATTERNS)


def test_no_pattern_hides_a_longer_one() -> None:
    for i, first in enumerate(PATTERNS):
        hidden = [later.name for later in PATTERNS[i + 1 :] if later.types[: len(first.types)] == first.types]
        assert not hidden, f"{first.name} comes before {hidden}"


def company(pattern: Pattern) -> tuple[list[nn.Module], list[str]]:
    """What has to stand before the example for a run to be worth it, and its steps: they take in none of the layers."""
    if not pattern.needs_company:
        return [], []
    if pattern.maps_images:
        return [nn.MaxPool2d(1), nn.ReLU()], ["maxpool2d_relu"]
    return [nn.Linear(7, 7), nn.ReLU()], ["linear_relu"]


@each_pattern
def test_example_matches_its_pattern(pattern: Pattern) -> None:
    layers, _ = pattern.example()
    assert tuple(type(layer) for layer in layers) == pattern.types
    assert pattern.check(layers) is None
    before, steps = company(pattern)
    assert steps_of(nn.Sequential(*before, *layers)) == [*steps, pattern.name]


@each_pattern
def test_what_needs_company_is_eager_alone(pattern: Pattern) -> None:
    layers, _ = pattern.example()
    expected = ["eager"] * len(layers) if pattern.needs_company else [pattern.name]
    assert steps_of(nn.Sequential(*layers)) == expected
    assert steps_of(nn.Sequential(*layers, nn.Tanhshrink())) == [*expected, "eager"]


@each_pattern
@pytest.mark.parametrize("batch", [None, 1, 5], ids=["example", "batch 1", "batch 5"])
def test_example_is_fused_and_equals_eager(pattern: Pattern, batch: int | None) -> None:
    layers, shape = pattern.example()
    before, steps = company(pattern)
    model = nn.Sequential(*before, *layers).eval()
    x = torch.randn(*shape) if batch is None else torch.randn(batch, *shape[1:])
    fused = fastseq.optimize(model)
    assert type(fused) is FusedSequential
    with torch.no_grad():
        actual = fused(x)
    assert_matches(actual, model, x)
    assert fastseq.stats(fused) == {"fused_calls": 1, "eager_calls": 0, "fallbacks": {}}
    (segment,) = fastseq.explain(fused).to_dict()["sequentials"][0]["segments"]
    assert [step["name"] for step in segment["steps"]] == [*steps, pattern.name]
    assert segment["steps"][-1]["output"] == "x".join(map(str, actual.shape[1:]))


@each_pattern
def test_layers_that_do_nothing_may_stand_between(pattern: Pattern) -> None:
    layers, shape = pattern.example()
    before, steps = company(pattern)
    spaced: list[nn.Module] = [nn.Identity()]
    for layer in (*before, *layers):
        spaced += [nn.Sequential(layer, nn.Dropout(0.5)), nn.Identity()]
    model = nn.Sequential(*spaced).eval()
    x = torch.randn(*shape)
    assert steps_of(model) == [*steps, pattern.name]
    assert_matches(run_fused(model, x), model, x)


@each_pattern
def test_a_layer_that_stands_twice_runs_twice(pattern: Pattern) -> None:
    layers, shape = pattern.example()
    square = {nn.Conv2d: lambda: nn.Conv2d(3, 3, 3, padding=1), nn.Linear: lambda: nn.Linear(7, 7)}
    features = 3 if pattern.maps_images else 7
    square |= {nn.BatchNorm2d: lambda: nn.BatchNorm2d(3), nn.BatchNorm1d: lambda: nn.BatchNorm1d(features)}
    square |= {nn.Conv1d: lambda: nn.Conv1d(3, 3, 3, padding=1)}
    layers = [square.get(type(layer), lambda layer=layer: layer)() for layer in layers]
    before, steps = company(pattern)
    model = nn.Sequential(*before, *layers, *layers).eval()
    x = torch.randn(*shape[:2], *(16 for _ in shape[2:]))
    assert steps_of(model) == [*steps, *[pattern.name] * 2]
    assert_matches(run_fused(model, x), model, x)


# Refusals ---------------------------------------------------------------------------------------------------------


class ScaledReLU(nn.ReLU):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class NegatedConv2d(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return -super().forward(input)


def with_attribute(layer: nn.Module, name: str, value: object) -> nn.Module:
    setattr(layer, name, value)
    return layer


def without_parameter(layer: nn.Module, name: str) -> nn.Module:
    """The layer with a plain tensor where its parameter was, as pruning and weight normalisation leave it."""
    value = layer._parameters.pop(name).detach()
    setattr(layer, name, value)
    return layer


def without_buffer(layer: nn.Module, name: str) -> nn.Module:
    """The layer with a plain tensor where its buffer was."""
    setattr(layer, name, layer._buffers.pop(name))
    return layer


def with_own_forward(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x, inner=layer.forward: 2 * inner(x)
    return layer


class Refused(NamedTuple):
    layers: Callable[[], list[nn.Module]]
    shape: tuple[int, ...]
    reason: str
    pattern: str | None = None  # whose check gives the reason; None: the matcher does


IMAGE, ROWS = (2, 4, 9, 8), (3, 6)


def excluded(layer: nn.Module) -> nn.Module:
    """As optimize(exclude=...) marks a layer of its copy."""
    layer.__dict__[matcher.EXCLUDED] = True
    return layer


REFUSED: dict[str, Refused] = {
    "excluded": Refused(
        lambda: [excluded(nn.Conv2d(4, 4, 3))],
        IMAGE,
        "excluded by optimize(exclude=...)",
    ),
    "conv2d padding_mode": Refused(
        lambda: [with_attribute(nn.Conv2d(4, 4, 3, padding=1), "padding_mode", "constant")],
        IMAGE,
        "Conv2d has padding_mode 'constant'; fused kernels take 'zeros', 'reflect', 'replicate' and 'circular'",
        "conv2d",
    ),
    "conv2d reversed padding": Refused(
        lambda: [with_attribute(nn.Conv2d(4, 4, 3, padding_mode="reflect"), REVERSED_PADDING, (1, 0, -1, 0))],
        IMAGE,
        "Conv2d has _reversed_padding_repeated_twice (1, 0, -1, 0); fused kernels take ints from 0 on",
        "conv2d",
    ),
    "conv2d dilation": Refused(
        lambda: [with_attribute(nn.Conv2d(4, 4, 3), "dilation", [1, 1])],
        IMAGE,
        "Conv2d has dilation [1, 1]; fused kernels take one or two ints",
        "conv2d",
    ),
    "conv2d groups": Refused(
        lambda: [with_attribute(nn.Conv2d(4, 4, 3), "groups", True)],
        IMAGE,
        "Conv2d has groups True; fused kernels take a positive int",
        "conv2d",
    ),
    "conv2d stride": Refused(
        lambda: [with_attribute(nn.Conv2d(4, 4, 3), "stride", [2, 1])],
        IMAGE,
        "Conv2d has stride [2, 1]; fused kernels take one or two ints",
        "conv2d",
    ),
    "conv2d no stride": Refused(
        lambda: [with_attribute(nn.Conv2d(4, 4, 3), "stride", None)],
        IMAGE,
        "Conv2d has stride None; fused kernels take one or two ints",
        "conv2d",
    ),
    "conv2d padding": Refused(
        lambda: [with_attribute(nn.Conv2d(4, 4, 3), "padding", [1, 0])],
        IMAGE,
        "Conv2d has padding [1, 0]; fused kernels take 'same', 'valid', or one or two ints",
        "conv2d",
    ),
    "conv2d padding same": Refused(
        lambda: [with_attribute(nn.Conv2d(4, 4, 3, padding="same"), "stride", (2, 2))],
        IMAGE,
        "Conv2d has padding 'same' and stride (2, 2), which eager rejects",
        "conv2d",
    ),
    "conv2d weight": Refused(
        lambda: [without_parameter(nn.Conv2d(4, 4, 3), "weight")],
        IMAGE,
        "weight is not a plain registered parameter (pruned, normalised or replaced); fused kernels read those",
        "conv2d",
    ),
    "maxpool2d return_indices": Refused(
        lambda: [nn.MaxPool2d(2, return_indices=True)],
        IMAGE,
        "MaxPool2d has return_indices=True; fused kernels return values only",
        "maxpool2d",
    ),
    "maxpool2d dilation": Refused(
        lambda: [nn.MaxPool2d(2, dilation=[2, 1])],
        IMAGE,
        "MaxPool2d has dilation [2, 1]; fused kernels take one or two ints",
        "maxpool2d",
    ),
    "maxpool2d kernel_size": Refused(
        lambda: [nn.MaxPool2d([2, 3])],
        IMAGE,
        "MaxPool2d has kernel_size [2, 3]; fused kernels take one or two ints",
        "maxpool2d",
    ),
    "maxpool2d stride": Refused(
        lambda: [nn.MaxPool2d(2, stride=[2, 1])],
        IMAGE,
        "MaxPool2d has stride [2, 1]; fused kernels take one or two ints",
        "maxpool2d",
    ),
    "maxpool2d padding": Refused(
        lambda: [nn.MaxPool2d(2, padding=[1, 0])],
        IMAGE,
        "MaxPool2d has padding [1, 0]; fused kernels take one or two ints",
        "maxpool2d",
    ),
    "maxpool2d ceil_mode": Refused(
        lambda: [nn.MaxPool2d(2, ceil_mode="yes")],
        IMAGE,
        "MaxPool2d has ceil_mode 'yes'; fused kernels take a bool",
        "maxpool2d",
    ),
    "avgpool2d kernel_size": Refused(
        lambda: [nn.AvgPool2d([2, 3])],
        IMAGE,
        "AvgPool2d has kernel_size [2, 3]; fused kernels take one or two ints",
        "avgpool2d",
    ),
    "avgpool2d count_include_pad": Refused(
        lambda: [nn.AvgPool2d(2, count_include_pad=1)],
        IMAGE,
        "AvgPool2d has count_include_pad 1; fused kernels take a bool",
        "avgpool2d",
    ),
    "avgpool2d divisor_override": Refused(
        lambda: [nn.AvgPool2d(2, divisor_override=0)],
        IMAGE,
        "AvgPool2d has divisor_override 0; fused kernels take None or an int other than 0",
        "avgpool2d",
    ),
    "adaptiveavgpool2d output_size": Refused(
        lambda: [nn.AdaptiveAvgPool2d([2, 3])],
        IMAGE,
        "AdaptiveAvgPool2d has output_size [2, 3]; fused kernels take a positive int, or two that may be None",
        "adaptiveavgpool2d",
    ),
    "adaptiveavgpool2d first": Refused(
        lambda: [nn.AdaptiveAvgPool2d(1)],
        IMAGE,
        "AdaptiveAvgPool2d to one pixel begins no fused run: eager is as fast",
    ),
    "adaptivemaxpool2d return_indices": Refused(
        lambda: [nn.AdaptiveMaxPool2d(2, return_indices=True)],
        IMAGE,
        "AdaptiveMaxPool2d has return_indices=True; fused kernels return values only",
        "adaptivemaxpool2d",
    ),
    "zeropad2d padding": Refused(
        lambda: [nn.MaxPool2d(1), nn.ReLU(), nn.ZeroPad2d((1, -1, 0, 0))],
        IMAGE,
        "ZeroPad2d has padding (1, -1, 0, 0); fused kernels take four ints from 0 on, not all of them 0",
    ),
    "upsample mode": Refused(
        lambda: [nn.Upsample(scale_factor=2, mode="bicubic")],
        IMAGE,
        "Upsample has mode 'bicubic'; fused kernels take 'nearest' and 'bilinear'",
        "upsample",
    ),
    "upsample corners": Refused(
        lambda: [nn.Upsample(scale_factor=2, align_corners=True)],
        IMAGE,
        "Upsample has align_corners True in mode 'nearest', which eager rejects",
        "upsample",
    ),
    "upsample recomputed": Refused(
        lambda: [nn.Upsample(4, recompute_scale_factor=True)],
        IMAGE,
        "Upsample has recompute_scale_factor True, which eager rejects with a size",
        "upsample",
    ),
    "upsample size": Refused(
        lambda: [nn.Upsample([4, 4])],
        IMAGE,
        "Upsample has size [4, 4] and scale_factor None; fused kernels take one of them, a positive int or float, "
        "or two in a tuple",
        "upsample",
    ),
    "unflatten size": Refused(
        lambda: [nn.Linear(6, 6), nn.ReLU(), nn.Unflatten(1, [2, 3])],
        ROWS,
        "Unflatten has dim=1, unflattened_size=[2, 3]; fused runs take dimension 1 and a tuple of two or three sizes",
    ),
    "unflatten at the end": Refused(
        lambda: [nn.Linear(6, 6), nn.ReLU(), nn.Unflatten(1, (2, 3))],
        ROWS,
        "Unflatten stands before no fused layer of such maps, or behind maps",
    ),
    "pixelshuffle factor": Refused(
        lambda: [with_attribute(nn.PixelShuffle(2), "upscale_factor", True)],
        IMAGE,
        "PixelShuffle has upscale_factor True; fused kernels take a positive int",
        "pixelshuffle",
    ),
    "constantpad2d value": Refused(
        lambda: [nn.ConstantPad2d(1, True)],
        IMAGE,
        "ConstantPad2d has value True; fused kernels take a float32 number",
        "constantpad2d",
    ),
    "batchnorm in training": Refused(
        lambda: [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4).train()],
        IMAGE,
        "BatchNorm2d is in training mode",
        "conv2d_batchnorm2d",
    ),
    "batchnorm of the batch": Refused(
        lambda: [nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False).eval()],
        ROWS,
        "BatchNorm1d has no running statistics; fused kernels take nothing from the batch",
        "linear_batchnorm1d",
    ),
    "batchnorm eps": Refused(
        lambda: [nn.Conv2d(4, 4, 1), with_attribute(nn.BatchNorm2d(4).eval(), "eps", torch.tensor(0.1))],
        IMAGE,
        "BatchNorm2d has eps tensor(0.1000); fused kernels take a number",
        "conv2d_batchnorm2d",
    ),
    "batchnorm statistics": Refused(
        lambda: [nn.Conv2d(4, 4, 1), without_buffer(nn.BatchNorm2d(4).eval(), "running_var")],
        IMAGE,
        "running_var is not a plain registered buffer; fused kernels read those",
        "conv2d_batchnorm2d",
    ),
    "batchnorm elsewhere": Refused(
        lambda: [nn.BatchNorm2d(4).eval()], IMAGE, "BatchNorm2d stands in no run with a Conv2d, Linear or pool"
    ),
    "softmax over another dimension": Refused(
        lambda: [nn.Softmax(0)], ROWS, "Softmax has dim 0; fused kernels take -1, or 1 of rows", "softmax"
    ),
    "logsoftmax without a dimension": Refused(
        lambda: [with_attribute(nn.LogSoftmax(), "dim", True)],
        ROWS,
        "LogSoftmax has dim True; fused kernels take -1, or 1 of rows",
        "logsoftmax",
    ),
    "layernorm shape": Refused(
        lambda: [nn.LayerNorm((3, 6))],
        ROWS,
        "LayerNorm has normalized_shape (3, 6); fused kernels take a tuple of one, the last dimension",
        "layernorm",
    ),
    "layernorm eps": Refused(
        lambda: [nn.LayerNorm(6, eps=0.0)],
        ROWS,
        "LayerNorm has eps 0.0; fused kernels take a number above 0",
        "layernorm",
    ),
    "layernorm weight": Refused(
        lambda: [without_parameter(nn.LayerNorm(6), "bias")],
        ROWS,
        "bias is not a plain registered parameter (pruned, normalised or replaced); fused kernels read those",
        "layernorm",
    ),
    "groupnorm groups": Refused(
        lambda: [with_attribute(nn.GroupNorm(2, 4), "num_groups", True)],
        IMAGE,
        "GroupNorm has num_groups True; fused kernels take a positive int",
        "groupnorm",
    ),
    "linear weight": Refused(
        lambda: [without_parameter(nn.Linear(6, 4), "weight")],
        ROWS,
        "weight is not a plain registered parameter (pruned, normalised or replaced); fused kernels read those",
        "linear",
    ),
    "linear bias": Refused(
        lambda: [without_parameter(nn.Linear(6, 4), "bias")],
        ROWS,
        "bias is not a plain registered parameter (pruned, normalised or replaced); fused kernels read those",
        "linear",
    ),
    "own forward": Refused(lambda: [with_own_forward(nn.Linear(6, 4))], ROWS, "has a forward of its own"),
    "own forward of a free layer": Refused(
        lambda: [with_own_forward(nn.Identity()), nn.Tanhshrink()], ROWS, "has a forward of its own"
    ),
    "own forward of Flatten": Refused(
        lambda: [with_own_forward(nn.Flatten()), nn.Tanhshrink()], ROWS, "has a forward of its own"
    ),
    "subclass": Refused(
        lambda: [NegatedConv2d(4, 4, 3)],
        IMAGE,
        "NegatedConv2d is a subclass of Conv2d; fused kernels take exactly Conv2d",
    ),
    "subclass of ReLU": Refused(
        lambda: [ScaledReLU()],
        ROWS,
        "ScaledReLU is a subclass of ReLU; fused kernels take exactly ReLU",
    ),
    "relu alone": Refused(lambda: [nn.ReLU()], IMAGE, "ReLU does not follow a layer that is fused"),
    "leakyrelu slope": Refused(
        lambda: [nn.Linear(6, 4), nn.LeakyReLU(torch.tensor(0.5))],
        ROWS,
        "LeakyReLU has negative_slope tensor(0.5000); fused kernels take a number",
        "linear_leakyrelu",
    ),
    "hardtanh limits": Refused(
        lambda: [nn.Linear(6, 4), with_attribute(nn.Hardtanh(), "max_val", -3.0)],
        ROWS,
        "Hardtanh has min_val -1.0 and max_val -3.0, which eager rejects",
        "linear_hardtanh",
    ),
    "gelu approximate": Refused(
        lambda: [nn.Linear(6, 4), nn.GELU("erf")],
        ROWS,
        "GELU has approximate 'erf'; fused kernels take 'none' and 'tanh'",
        "linear_gelu",
    ),
    "prelu weight": Refused(
        lambda: [nn.Linear(6, 4), without_parameter(nn.PReLU(), "weight")],
        ROWS,
        "weight is not a plain registered parameter (pruned, normalised or replaced); fused kernels read those",
        "linear_prelu",
    ),
    "flatten elsewhere": Refused(
        lambda: [nn.Flatten(2)], IMAGE, "Flatten has start_dim=2, end_dim=-1; fused runs take 1 and -1"
    ),
    "flatten alone": Refused(
        lambda: [nn.Flatten(), nn.Tanhshrink()],
        IMAGE,
        "Flatten stands neither behind a fused convolution or pool nor before a fused Linear",
    ),
    "dropout in training": Refused(lambda: [nn.Dropout(0.0).train()], ROWS, "Dropout is in training mode"),
    "alpha dropout in training": Refused(
        lambda: [nn.AlphaDropout(0.0).train()], ROWS, "AlphaDropout is in training mode"
    ),
    "identity alone": Refused(
        lambda: [nn.Identity(), nn.Tanhshrink()], ROWS, "Identity does nothing and stands beside no fused layer"
    ),
    "unknown layer": Refused(lambda: [nn.Tanhshrink()], ROWS, "no fused kernel for Tanhshrink"),
}
each_refusal = pytest.mark.parametrize("refused", REFUSED.values(), ids=list(REFUSED))


def is_same(a: object, b: object, tolerance: float = 0.0) -> bool:
    """Equal tensors, pairs of them (MaxPool2d with its indices), or texts."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    return isinstance(a, str) and a == b


@each_refusal
def test_refusal_says_why_and_runs_eager(refused: Refused) -> None:
    model = nn.Sequential(*refused.layers())
    x = torch.randn(*refused.shape)
    alone = fastseq.optimize(model)
    actual, expected = outcome(alone, x), outcome(model, x)
    was_fused = len(model) > 1 and fastseq.stats(alone)["fused_calls"] > 0  # a layer before the one that is refused
    assert is_same(actual, expected, tolerance=1e-5 if was_fused else 0.0)
    # Also beside a run that is fused: the refusal must hold inside a FusedSequential.
    first = nn.Sequential(nn.Conv2d(4, 4, 1) if len(refused.shape) == 4 else nn.Linear(6, 6), nn.Softsign())
    fused = fastseq.optimize(nn.Sequential(first, model))
    between = outcome(fused[0], x)
    assert isinstance(between, torch.Tensor)
    assert is_same(outcome(fused, x), outcome(model, between), tolerance=1e-5 if was_fused else 0.0)
    assert fastseq.stats(fused)["fused_calls"] > 0
    report = fastseq.explain(fused)
    assert refused.reason in str(report)
    reasons = [s["reason"] for s in report.to_dict()["sequentials"][0]["segments"] if s["kind"] == "eager"]
    assert any(refused.reason in reason for reason in reasons), reasons


@each_refusal
def test_refusal_comes_from_where_the_table_says(refused: Refused) -> None:
    layers = refused.layers()
    refusals = {p.name: p.check(layers) for p in PATTERNS if p.types == tuple(type(layer) for layer in layers)}
    if refused.pattern is None:
        assert not any(refusals.values())
    else:
        assert refused.reason in (refusals[refused.pattern] or "")


@each_pattern
def test_a_longer_pattern_refuses_what_its_layers_refuse(pattern: Pattern) -> None:
    """A layer that a pattern of one layer declines is declined at every place of every pattern."""
    alone = {p.types[0]: p.name for p in PATTERNS if len(p.types) == 1}
    for place, kind in enumerate(pattern.types):
        for refused in REFUSED.values():
            if refused.pattern is None or refused.pattern != alone.get(kind):
                continue
            layers, _ = pattern.example()
            layers[place] = refused.layers()[0]
            assert refused.reason in (pattern.check(layers) or "")


def test_a_refused_pool_leaves_the_convolution_fused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2, dilation=[2, 2])).eval()
    assert steps_of(model) == ["conv2d_relu", "eager"]
    x = torch.randn(IMAGE)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        assert_matches(fused(x), model, x)
    assert fastseq.stats(fused)["fused_calls"] == 1


def test_every_reason_that_can_be_returned_is_in_the_table() -> None:
    """A reason is a text that a function of the matcher or of a pattern file returns; its fixed part must be tested."""
    files = {Path(matcher.__file__)} | set(Path(base.__file__).parent.glob("*.py"))
    returned = [
        node.value
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Return) and isinstance(node.value, (ast.JoinedStr, ast.Constant))
    ]
    pieces = [node.values if isinstance(node, ast.JoinedStr) else [node] for node in returned]
    texts = [[p.value for p in row if isinstance(p, ast.Constant) and isinstance(p.value, str)] for row in pieces]
    fixed = {max(row, key=len).strip() for row in texts if row}
    assert len(fixed) > 10
    untested = [text for text in fixed if not any(text in refused.reason for refused in REFUSED.values())]
    assert not untested
