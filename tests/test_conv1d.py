"""Conv1d and the pools of one dimension: Conv2d's steps on images of one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ISAS,
    assert_same_outcome,
    assert_was_fused,
    one_thread,
    outcome,
    run_fused,
    settle,
    use_kernels,
)
from torch import Tensor, nn

import fastseq
from fastseq.testing import assert_matches

__all__ = ["one_thread"]

# Layers, and an input's channels and length.
CASES: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, int]]] = {
    "convolution": (lambda: [nn.Conv1d(3, 20, 3)], (3, 17)),
    "convolution, ReLU": (lambda: [nn.Conv1d(5, 17, 4, 2, 3), nn.ReLU()], (5, 23)),
    "one channel": (lambda: [nn.Conv1d(1, 6, 5), nn.ReLU(), nn.MaxPool1d(2)], (1, 40)),
    "one channel of many filters": (lambda: [nn.Conv1d(1, 40, 9, padding=4, bias=False), nn.Tanh()], (1, 33)),
    "no padding, one pixel": (lambda: [nn.Conv1d(7, 9, 6)], (7, 6)),
    "same": (lambda: [nn.Conv1d(4, 8, 4, padding="same", dilation=3), nn.ReLU()], (4, 15)),
    "valid": (lambda: [nn.Conv1d(4, 8, 2, padding="valid"), nn.SiLU()], (4, 15)),
    "dilation, groups": (lambda: [nn.Conv1d(12, 24, 3, padding=2, dilation=2, groups=3), nn.ReLU()], (12, 14)),
    "depthwise": (lambda: [nn.Conv1d(20, 20, 7, padding=3, groups=20), nn.SiLU()], (20, 19)),
    "BatchNorm": (lambda: [nn.Conv1d(6, 18, 3), nn.BatchNorm1d(18), nn.ReLU()], (6, 12)),
    "BatchNorm behind ReLU": (lambda: [nn.Conv1d(6, 18, 3), nn.ReLU(), nn.BatchNorm1d(18), nn.Tanh()], (6, 12)),
    "two BatchNorms, pool, linear": (
        lambda: [
            *(nn.Conv1d(6, 18, 3), nn.BatchNorm1d(18), nn.BatchNorm1d(18, affine=False), nn.MaxPool1d(2)),
            *(nn.BatchNorm1d(18), nn.ReLU(), nn.Flatten(), nn.Linear(90, 7), nn.ReLU(), nn.BatchNorm1d(7)),
        ],
        (6, 12),
    ),
    "PReLU": (lambda: [nn.Conv1d(6, 18, 3), nn.PReLU(18), nn.MaxPool1d(3, 2, 1)], (6, 12)),
    "pool, ReLU": (lambda: [nn.Conv1d(6, 18, 3), nn.MaxPool1d(2), nn.ReLU()], (6, 13)),
    "SiLU, pool in ceil mode": (lambda: [nn.Conv1d(6, 18, 3), nn.SiLU(), nn.MaxPool1d(3, 2, ceil_mode=True)], (6, 14)),
    "maximum": (lambda: [nn.MaxPool1d(3, 2, 1)], (19, 21)),
    "maximum, dilation": (lambda: [nn.MaxPool1d(3, 1, 1, 2), nn.ReLU()], (4, 21)),
    "average": (lambda: [nn.AvgPool1d(3, 2, 1)], (19, 21)),
    "average without padding": (lambda: [nn.AvgPool1d(4, ceil_mode=True, padding=1, count_include_pad=False)], (5, 22)),
    "adaptive average": (lambda: [nn.AdaptiveAvgPool1d(5)], (18, 23)),
    "adaptive maximum": (lambda: [nn.AdaptiveMaxPool1d(4), nn.ReLU()], (18, 23)),
    "network": (
        lambda: [
            *(nn.Conv1d(2, 16, 5, padding=2), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2)),
            *(nn.Conv1d(16, 33, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Dropout(0.1)),
            *(nn.Conv1d(33, 40, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
            *(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)),
        ],
        (2, 64),
    ),
    "temporal convolutions": (
        lambda: [
            layer
            for dilation in (1, 2, 4, 8)
            for layer in (nn.Conv1d(24, 24, 3, padding=dilation, dilation=dilation), nn.ReLU())
        ],
        (24, 50),
    ),
}


def build(name: str) -> tuple[nn.Sequential, tuple[int, int]]:
    make, shape = CASES[name]
    torch.manual_seed(0)
    return settle(nn.Sequential(*make())), shape


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_values(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    model, (channels, length) = build(name)
    for x in (
        torch.randn(1, channels, length),
        torch.randn(4, channels, length),
        torch.randn(2, channels, 2 * length)[..., ::2],
    ):
        actual = run_fused(model, x)
        assert_matches(actual, model, x)
        assert actual.stride() == model(x).stride()
    # As an embedding gives it: left to eager where it has unusual strides, those of its maps of one row.
    x = torch.randn(4, length, channels).transpose(1, 2)
    fast = fastseq.optimize(model)
    with torch.no_grad():
        actual = fast(x)
        expected = model(x)
    assert_matches(actual, model, x)
    assert actual.stride() == expected.stride()
    is_usual = channels > 1 and isinstance(model[0], nn.Conv1d)
    assert bool(fastseq.stats(fast)["fused_calls"]) == is_usual


def test_a_weight_in_channels_last_order_gets_eagers_strides() -> None:
    model = nn.Sequential(nn.Conv1d(3, 6, 5), nn.ReLU()).eval()
    model[0].weight.data = torch.randn(6, 5, 3).transpose(1, 2)
    fast, x = fastseq.optimize(model), torch.randn(4, 3, 40)
    with torch.no_grad():
        assert_matches(fast(x), model, x)
        assert fast(x).stride() == model(x).stride()


@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_batch_and_threads(name: str) -> None:
    model, shape = build(name)
    fast, x = fastseq.optimize(model), torch.randn(5, *shape)
    with torch.no_grad():
        alone = torch.cat([fast(row[None]) for row in x])
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for batch in (1, 2, 5):
                assert torch.equal(fast(x[:batch]), alone[:batch]), (threads, batch)
    assert_was_fused(fast)


@pytest.mark.parametrize("name", CASES)
def test_unbatched_and_empty(name: str) -> None:
    model, shape = build(name)
    fast = fastseq.optimize(model)
    for x in (
        torch.randn(shape),
        torch.randn(0, *shape),
        torch.randn(2, shape[0] + 1, shape[1]),
        torch.randn(shape[0]),
    ):
        assert_same_outcome(outcome(fast, x), outcome(model, x))
    assert_same_outcome(outcome(fast, torch.randn(2, *shape, 3)), outcome(model, torch.randn(2, *shape, 3)))


@pytest.mark.parametrize("name", CASES)
def test_special_values(name: str) -> None:
    model, shape = build(name)
    fast = fastseq.optimize(model)
    for value in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(2, *shape)
        x[1, shape[0] // 2, shape[1] // 2] = value
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), equal_nan=True)
    assert_was_fused(fast)


def test_one_and_two_dimensions_do_not_mix() -> None:
    """A layer of the other kind ends the run; that eager raises is eager's affair."""
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    fast, x = fastseq.optimize(model), torch.randn(2, 3, 10)
    expected = outcome(model, x)
    assert isinstance(expected, Tensor) and expected.shape == (2, 2, 4)  # images without a batch, for MaxPool2d
    assert_same_outcome(outcome(fast, x), expected)
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)).eval()
    assert_same_outcome(outcome(fastseq.optimize(model), x), outcome(model, x))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (nn.Conv1d, {"stride": (2,)}),
        (nn.Conv1d, {"stride": 3}),
        (nn.Conv1d, {"padding": (4,)}),
        (nn.Conv1d, {"padding": 2}),
        (nn.Conv1d, {"dilation": (2,)}),
        (nn.Conv1d, {"stride": (0,)}),
        (nn.Conv1d, {"dilation": (0,)}),
        (nn.Conv1d, {"stride": (1, 1)}),
        (nn.Conv1d, {"stride": [2]}),
        (nn.Conv1d, {"groups": 2}),
        (nn.Conv1d, {"padding_mode": "circular", "_reversed_padding_repeated_twice": [1, 1]}),
        (nn.MaxPool1d, {"kernel_size": 3}),
        (nn.MaxPool1d, {"kernel_size": (3,), "stride": (1,)}),
        (nn.MaxPool1d, {"padding": 1}),
        (nn.MaxPool1d, {"padding": 2}),
        (nn.MaxPool1d, {"dilation": 2}),
        (nn.MaxPool1d, {"ceil_mode": True}),
        (nn.MaxPool1d, {"kernel_size": 30}),
        (nn.MaxPool1d, {"kernel_size": (2, 2)}),
        (nn.MaxPool1d, {"return_indices": True}),
    ],
    ids=str,
)
def test_edited_attributes(kind: type[nn.Module], change: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2)).eval()
    fast, x = fastseq.optimize(model), torch.randn(2, 3, 12)
    with torch.no_grad():
        fast(x)
    for each in (model, fast):
        next(layer for layer in each if type(layer) is kind).__dict__.update(change)
    actual, expected = outcome(fast, x), outcome(model, x)
    if isinstance(expected, tuple):
        assert torch.equal(actual[1], expected[1])
        actual, expected = actual[0], expected[0]
    assert_same_outcome(actual, expected)


def test_weights_are_live() -> None:
    model, shape = build("network")
    fast, x = fastseq.optimize(model), torch.randn(3, *shape)
    with torch.no_grad():
        fast(x)
        for parameter in fast.parameters():
            parameter.mul_(1.5)
        fast[1].running_mean.add_(1)
        model.load_state_dict(fast.state_dict())
        assert_matches(fast(x), model, x)
    assert_was_fused(fast)


class Straight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3)
        self.head = nn.Linear(8 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.relu(self.conv(x)), 2)
        x = F.adaptive_avg_pool1d(F.avg_pool1d(x, 2), 3)
        y: Tensor = self.head(x.flatten(1))
        return y


def test_functional_forms_in_a_forward() -> None:
    model = Straight().eval()
    fast, x = fastseq.optimize(model), torch.randn(4, 3, 30)
    with torch.no_grad():
        assert_matches(fast(x), model, x)
    assert fastseq.stats(fast) == {"fused_calls": 1, "eager_calls": 0, "fallbacks": {}}
