"""Conv2d with groups, with a filter for each channel (depthwise), and with dilation: one step each, like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    ISAS,
    assert_same_bits_however_called,
    assert_same_outcome,
    assert_was_fused,
    integers,
    kernels_used,
    one_thread,
    outcome,
    run_fused,
    settle,
    use_kernels,
)
from torch import nn

import fastseq
from fastseq.testing import assert_matches

__all__ = ["one_thread"]


def depthwise(channels: int, kernel: Any = 3, factor: int = 1, **options: Any) -> nn.Conv2d:
    """A convolution with `factor` filters for each channel."""
    return nn.Conv2d(channels, factor * channels, kernel, groups=channels, **options)


# Layers, and an input's channels, height and width.
CASES: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, int, int]]] = {
    "depthwise": (lambda: [depthwise(20, padding=1), nn.ReLU()], (20, 9, 11)),
    "depthwise of 2 channels": (lambda: [depthwise(2, padding=1)], (2, 7, 5)),
    "depthwise of 16": (lambda: [depthwise(16, padding=1, bias=False)], (16, 8, 8)),
    "depthwise of 37, stride 2": (lambda: [depthwise(37, stride=2, padding=1), nn.ReLU6()], (37, 13, 12)),
    "depthwise, stride of two kinds": (lambda: [depthwise(18, (3, 5), stride=(2, 1), padding=(1, 2))], (18, 9, 10)),
    "depthwise, dilation": (lambda: [depthwise(17, dilation=2, padding=2), nn.SiLU()], (17, 11, 10)),
    "depthwise, dilation of two kinds": (lambda: [depthwise(17, dilation=(1, 3))], (17, 9, 13)),
    "depthwise 1x1": (lambda: [depthwise(33, 1)], (33, 5, 4)),
    "depthwise 5x5, one pixel": (lambda: [depthwise(12, 5)], (12, 5, 5)),
    "depthwise, same": (lambda: [depthwise(9, (4, 2), padding="same")], (9, 7, 6)),
    "depthwise, same, dilation": (lambda: [depthwise(9, (4, 3), padding="same", dilation=(2, 3))], (9, 9, 8)),
    "depthwise, sum in parts": (lambda: [depthwise(19, 13, padding=6)], (19, 15, 14)),
    "depthwise, BatchNorm": (
        lambda: [depthwise(24, padding=1), nn.BatchNorm2d(24), nn.Hardswish()],
        (24, 10, 9),
    ),
    "depthwise, pools": (
        lambda: [depthwise(20, padding=1), nn.ReLU(), nn.MaxPool2d(2), depthwise(20), nn.GELU(), nn.MaxPool2d(3, 2, 1)],
        (20, 14, 13),
    ),
    "depthwise, PReLU, 2x2 pool": (lambda: [depthwise(21), nn.PReLU(21), nn.MaxPool2d(2)], (21, 12, 9)),
    "separable": (
        lambda: [
            nn.Conv2d(3, 20, 3, 2, 1),
            nn.ReLU6(),
            depthwise(20, padding=1),
            nn.ReLU6(),
            nn.Conv2d(20, 33, 1),
            nn.ReLU6(),
            depthwise(33, stride=2, padding=1),
            nn.ReLU6(),
            nn.Conv2d(33, 40, 1),
            nn.Flatten(),
            nn.Linear(40 * 16, 10),
        ],
        (3, 16, 16),
    ),
    "two filters a channel": (lambda: [depthwise(10, factor=2, padding=1), nn.ReLU()], (10, 9, 8)),
    "many filters a channel": (lambda: [depthwise(3, factor=30), nn.PReLU(90)], (3, 9, 8)),
    "groups of 2": (lambda: [nn.Conv2d(24, 24, 3, 1, 1, groups=12), nn.ReLU()], (24, 9, 8)),
    "groups of 4, BatchNorm, pool": (
        lambda: [nn.Conv2d(32, 32, 3, 1, 1, groups=8), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)],
        (32, 9, 8),
    ),
    "groups of 3 and 5": (lambda: [nn.Conv2d(21, 35, 3, 2, groups=7)], (21, 9, 8)),
    "groups of 17 and 20": (lambda: [nn.Conv2d(34, 40, 3, padding=1, groups=2), nn.PReLU(40)], (34, 9, 8)),
    "groups of 8, dilation": (lambda: [nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=2)], (16, 9, 8)),
    "groups of 6 and 2": (lambda: [nn.Conv2d(24, 8, 3, groups=4), nn.Tanh()], (24, 6, 6)),
    "groups, 2x2 pool": (lambda: [nn.Conv2d(40, 66, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(2)], (40, 8, 9)),
    "1x1 in groups": (lambda: [nn.Conv2d(60, 60, 1, groups=3), nn.ReLU()], (60, 5, 7)),
    "groups, sum in parts": (lambda: [nn.Conv2d(128, 130, 3, padding=1, groups=2), nn.ReLU()], (128, 6, 6)),
    "groups of 4, sum in parts": (lambda: [nn.Conv2d(16, 16, 9, padding=4, groups=4), nn.ReLU()], (16, 10, 9)),
    "dilation": (lambda: [nn.Conv2d(5, 20, 3, padding=2, dilation=2), nn.ReLU()], (5, 11, 10)),
    "dilation one way": (lambda: [nn.Conv2d(5, 20, 3, dilation=(3, 1)), nn.ReLU(), nn.MaxPool2d(2)], (5, 11, 10)),
    "dilation of one channel": (lambda: [nn.Conv2d(1, 6, 5, dilation=2), nn.ReLU(), nn.MaxPool2d(2)], (1, 16, 15)),
    "dilation and stride": (lambda: [nn.Conv2d(8, 17, 3, 2, 2, 2)], (8, 12, 13)),
    "dilation, same": (lambda: [nn.Conv2d(8, 17, (2, 4), padding="same", dilation=(3, 2)), nn.ReLU()], (8, 9, 10)),
}


def build(name: str) -> tuple[nn.Sequential, tuple[int, int, int]]:
    make, shape = CASES[name]
    torch.manual_seed(0)
    return settle(nn.Sequential(*make())), shape


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_values(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    model, shape = build(name)
    for batch in (1, 3):
        for channels_last in (False, True):
            x = torch.randn(batch, *shape)
            if channels_last:
                x = x.to(memory_format=torch.channels_last)
            actual = run_fused(model, x)
            assert_matches(actual, model, x)
            assert actual.stride() == model(x).stride()
    strided = torch.randn(2, *shape[:2], 2 * shape[2])[..., ::2]
    assert_matches(run_fused(model, strided), model, strided)


@pytest.mark.parametrize("name", CASES)
def test_bits_are_the_same_however_it_is_called(name: str) -> None:
    model, shape = build(name)
    assert_same_bits_however_called(fastseq.optimize(model), torch.randn(5, *shape))


@pytest.mark.parametrize("name", CASES)
def test_special_values(name: str) -> None:
    """NaN and infinities go where eager's go: to the outputs of their group whose window they are in, no further."""
    model, shape = build(name)
    fast = fastseq.optimize(model)
    for value in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(2, *shape)
        x[1, shape[0] // 2, shape[1] // 2, shape[2] // 3] = value
        with torch.no_grad():
            actual, expected = fast(x), model(x)
        torch.testing.assert_close(actual, expected, equal_nan=True)
    assert_was_fused(fast)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "layer",
    [
        lambda: depthwise(21, 3, padding=1),
        lambda: depthwise(5, (2, 4), factor=3),
        lambda: nn.Conv2d(12, 24, 3, padding=1, groups=3),
    ],
    ids=["depthwise", "multiplied", "grouped"],
)
def test_all_kernels_give_the_same(isa: str, layer: Callable[[], nn.Conv2d], monkeypatch: pytest.MonkeyPatch) -> None:
    """Register tiles, a group at a time, take any groups; the others give the same bits."""
    model = nn.Sequential(layer(), nn.ReLU()).eval()
    x = torch.randn(2, model[0].in_channels, 9, 10)
    results = {}
    for kernel in ("conv2d_depthwise", "conv2d_grouped", "conv2d_f32"):
        use_kernels(monkeypatch, isa, kernel)
        fast = fastseq.optimize(model)
        with torch.no_grad():
            result = fast(x)
        assert_was_fused(fast)
        results[kernels_used(fast)[0].partition("_f32__")[0]] = result
    assert "conv2d" in results and (len(results) == 2 or isa == "portable")
    assert all(torch.equal(result, results["conv2d"]) for result in results.values())


@pytest.mark.parametrize(
    ("layer", "kernel"),
    [
        (lambda: depthwise(64), "conv2d_depthwise"),
        (lambda: depthwise(16, factor=2), "conv2d_grouped"),
        (lambda: nn.Conv2d(64, 64, 3, groups=16), "conv2d_grouped"),
        (lambda: nn.Conv2d(64, 64, 3, groups=2), "conv2d_winograd"),
        (lambda: nn.Conv2d(64, 64, 3, 2, groups=2), "conv2d"),
        (lambda: nn.Conv2d(64, 64, 3, padding=2, dilation=2), "conv2d_winograd"),
        (lambda: nn.Conv2d(64, 64, 3, dilation=2), "conv2d"),
    ],
    ids=["depthwise", "multiplied", "small groups", "large groups", "with stride", "dilation", "no tile of it"],
)
def test_kernel_that_is_chosen(layer: Callable[[], nn.Conv2d], kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, "emulated512")
    fast = fastseq.optimize(nn.Sequential(layer()).eval())
    with torch.no_grad():
        fast(torch.randn(1, fast[0].in_channels, 9, 9))
    assert kernels_used(fast)[0].startswith(f"{kernel}_f32__emulated512_")


def test_weights_are_live() -> None:
    model = nn.Sequential(depthwise(20, padding=1), nn.ReLU(), nn.Conv2d(20, 40, 3, groups=4)).eval()
    fast, x = fastseq.optimize(model), torch.randn(2, 20, 8, 8)
    with torch.no_grad():
        assert_matches(fast(x), model, x)
        for layer in (fast[0], fast[2]):
            layer.weight.mul_(-1.5)
            layer.bias.add_(1)
        model.load_state_dict(fast.state_dict())
        assert_matches(fast(x), model, x)
    assert_was_fused(fast)


@pytest.mark.parametrize(
    ("change", "channels"),
    [
        ({}, 24),
        ({}, 13),
        ({"groups": 5}, 12),
        ({"groups": 12}, 12),
        ({"groups": 2}, 12),
        ({"dilation": (4, 1)}, 12),
        ({"dilation": (0, 1)}, 12),
        ({"dilation": (-1, 1)}, 12),
        ({"dilation": (2**31 - 1, 1)}, 12),
        ({"dilation": (2**40, 1)}, 12),
    ],
    ids=str,
)
def test_what_does_not_fit_gets_eagers_answer(change: dict[str, Any], channels: int) -> None:
    """Another number of channels or groups than the weight has, or a window beyond the image: eager's exception."""
    model = nn.Sequential(nn.Conv2d(12, 24, 3, groups=4), nn.ReLU()).eval()
    fast = fastseq.optimize(model)
    for each in (model, fast):
        each[0].__dict__.update(change)
    x = torch.randn(2, channels, 7, 8)
    assert_same_outcome(outcome(fast, x), outcome(model, x))


def test_maps_that_lie_in_each_others_places() -> None:
    """Networks whose maps exceed the cache reuse their memory: each border is what the next convolution pads with."""
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 20, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(20, 33, 1),
        depthwise(33, padding=1),
        nn.SiLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(33, 24, 3, stride=2, padding=(2, 1)),
        nn.ReLU(),
        nn.Conv2d(24, 7, 3, padding=1),
    ).eval()
    fast, x = fastseq.optimize(model), torch.randn(3, 3, 60, 52)
    with torch.no_grad():
        first = fast(x)
        assert_matches(first, model, x)
        fast(torch.full_like(x, float("nan")))
        assert torch.equal(fast(x), first), "nothing is left of the call before"
    assert_same_bits_however_called(fast, x)


def test_integers_are_exact() -> None:
    for layer in (depthwise(19, 3, padding=1), depthwise(7, 5, factor=3), nn.Conv2d(24, 48, 3, groups=6)):
        model = nn.Sequential(layer).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(integers(*parameter.shape))
        x = integers(2, layer.in_channels, 8, 9)
        assert torch.equal(run_fused(model, x), model(x))
