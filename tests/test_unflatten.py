"""Rows that become maps (Unflatten, view), maps flattened by other dimensions, and layers behind a flattened map."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ISAS,
    assert_same_bits_however_called,
    assert_same_outcome,
    assert_was_fused,
    check_run,
    integer_model,
    integers,
    one_thread,  # noqa: F401
    outcome,
    run_fused,
    settle,
    use_kernels,
)
from torch import Tensor, nn

import fastseq
from fastseq.patterns.activation import ACTIVATIONS
from fastseq.testing import assert_matches

ONE_CALL = {"fused_calls": 1, "eager_calls": 0, "fallbacks": {}}

# Layers and the input without its batch; each is one native call.
RUNS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "decoder": (
        lambda: [
            nn.Linear(7, 36),
            nn.ReLU(),
            nn.Unflatten(1, (4, 3, 3)),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(4, 17, 3),
        ],
        (7,),
    ),
    "convolution with a border": (
        lambda: [
            nn.Linear(5, 40),
            nn.Unflatten(-1, (2, 4, 5)),
            nn.Conv2d(2, 3, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ],
        (5,),
    ),
    "activation of maps": (
        lambda: [
            nn.Linear(5, 18),
            nn.Dropout(),
            nn.Unflatten(1, (2, -1, 3)),
            nn.ReLU(inplace=True),
            nn.Conv2d(2, 9, 2),
        ],
        (5,),
    ),
    "one channel": (lambda: [nn.Linear(3, 30), nn.ReLU(), nn.Unflatten(1, (1, 5, 6)), nn.Conv2d(1, 4, 3)], (3,)),
    "one pixel": (lambda: [nn.Linear(3, 6), nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 4, 1), nn.ReLU()], (3,)),
    "padding": (
        lambda: [nn.Linear(3, 30), nn.Unflatten(1, (2, 3, 5)), nn.ZeroPad2d((2, 0, 1, 1)), nn.Conv2d(2, 4, 3)],
        (3,),
    ),
    "padding mode": (
        lambda: [nn.Linear(3, 30), nn.Unflatten(1, (2, 3, 5)), nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")],
        (3,),
    ),
    "one dimension": (
        lambda: [
            nn.Linear(4, 24),
            nn.Unflatten(1, (3, 8)),
            nn.Conv1d(3, 5, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(30, 4),
        ],
        (4,),
    ),
    "autoencoder": (
        lambda: [
            *(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(1, 3), nn.Linear(54, 9), nn.ReLU()),
            *(
                nn.Linear(9, 54),
                nn.ReLU(),
                nn.Unflatten(1, (6, 3, 3)),
                nn.Conv2d(6, 3, 3, padding=1),
                nn.PixelShuffle(1),
            ),
            *(nn.Flatten(-3), nn.Linear(27, 8), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 2)),
        ],
        (2, 8, 9),
    ),
    "maps first": (lambda: [nn.Identity(), nn.Unflatten(1, (3, 4, 6)), nn.Conv2d(3, 5, 3), nn.ReLU()], (72,)),
    "flattened input": (
        lambda: [nn.Flatten(), nn.Linear(24, 12), nn.Flatten(1, 1), nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 5, 2)],
        (2, 3, 4),
    ),
    "activations of features": (
        lambda: [nn.Conv2d(2, 5, 3), nn.Flatten(), nn.ReLU(), nn.Flatten(), nn.Hardtanh(-2, 3), nn.Linear(60, 7)],
        (2, 5, 6),
    ),
    "features at the end": (lambda: [nn.Conv2d(2, 17, 3), nn.Flatten(), nn.ReLU(inplace=True)], (2, 5, 6)),
    "features of one dimension": (lambda: [nn.Conv1d(2, 5, 3), nn.Flatten(-2), nn.ReLU(), nn.Linear(20, 3)], (2, 6)),
}


@pytest.mark.parametrize("name", RUNS)
def test_one_exact_call(name: str) -> None:
    make, shape = RUNS[name]
    model = integer_model(*make(), limit=1)
    for batch in (3, 1):
        check_run(model, integers(batch, *shape, limit=2))
    fused = fastseq.optimize(model)
    with torch.no_grad():
        fused(integers(2, *shape))
    assert fastseq.stats(fused) == ONE_CALL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", ISAS)
def test_numbers_on_every_instruction_set(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    for name in ("decoder", "autoencoder", "activations of features", "convolution with a border"):
        make, shape = RUNS[name]
        model, x = nn.Sequential(*make()).eval().to(dtype), torch.randn(5, *shape).to(dtype)
        assert_matches(run_fused(model, x), model, x)


def test_bits_do_not_depend_on_batch_threads_and_layout() -> None:
    make, shape = RUNS["autoencoder"]
    assert_same_bits_however_called(fastseq.optimize(nn.Sequential(*make()).eval()), torch.randn(7, *shape))


def test_special_values_reach_the_maps() -> None:
    for name in ("decoder", "autoencoder", "features at the end", "maps first"):
        make, shape = RUNS[name]
        model, x = nn.Sequential(*make()).eval(), torch.randn(4, *shape)
        x.view(-1)[::11] = float("inf")
        x.view(-1)[1] = float("nan")
        assert_matches(run_fused(model, x), model, x)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_each_activation_of_features(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 18, 3), nn.ReLU(), nn.Flatten(), kind(), nn.Linear(18 * 12, 4)).eval()
    x = torch.randn(2, 3, 5, 6)
    assert_matches(run_fused(model, x), model, x)
    assert_matches(run_fused(model[:4], x.to(memory_format=torch.channels_last)), model[:4], x)


@pytest.mark.parametrize("tail", [[], [nn.ReLU()], [nn.ReLU(), nn.Linear(18 * 12, 4)]], ids=["end", "relu", "linear"])
def test_batchnorm_of_features(tail: list[nn.Module]) -> None:
    """A number for each feature, in eager's order; live, and in every type."""
    model = settle(nn.Sequential(nn.Conv2d(3, 18, 3), nn.Flatten(), nn.BatchNorm1d(18 * 12), *tail))
    fused, x = fastseq.optimize(model), torch.randn(4, 3, 5, 6)
    with torch.no_grad():
        for given in (x, x.to(memory_format=torch.channels_last)):
            assert_matches(fused(given), model, given)
        other = settle(nn.Sequential(*(type(layer)(*arguments(layer)) for layer in model)))
        fused.load_state_dict(other.state_dict())
        assert_matches(fused(x), other, x)
    assert fastseq.stats(fused) == {"fused_calls": 3, "eager_calls": 0, "fallbacks": {}}
    for dtype in (torch.bfloat16, torch.float16):
        assert_matches(run_fused(other.to(dtype), x.to(dtype)), other, x.to(dtype))


def arguments(layer: nn.Module) -> tuple[int, ...]:
    names = ("in_channels", "out_channels", "kernel_size", "num_features", "in_features", "out_features")
    return tuple(layer.__dict__[name] for name in names if name in layer.__dict__)


def test_weights_stay_live_behind_an_unflatten() -> None:
    make, shape = RUNS["autoencoder"]
    model, other = nn.Sequential(*make()).eval(), nn.Sequential(*make()).eval()
    fused, x = fastseq.optimize(model), torch.randn(3, *shape)
    with torch.no_grad():
        fused(x)
        fused.load_state_dict(other.state_dict())
        assert_matches(fused(x), other, x)
        fused[-1].weight.mul_(2)
        other[-1].weight.mul_(2)
        assert_matches(fused(x), other, x)
    assert_was_fused(fused)


def test_attributes_count_at_the_next_call() -> None:
    make, shape = RUNS["decoder"]
    model = nn.Sequential(*make()).eval()
    fused, x = fastseq.optimize(model), torch.randn(3, *shape)
    for attribute, value in (("unflattened_size", (4, 1, 9)), ("unflattened_size", (4, -1, 1)), ("dim", -1)):
        for changed in (model, fused):
            setattr(changed[2], attribute, value)
        model[4].kernel_size = (1, 1)
        for changed in (model, fused):
            changed[4].weight = nn.Parameter(model[4].weight[:, :, :1, :1].detach().clone())
        with torch.no_grad():
            assert_matches(fused(x), model, x)
    assert_was_fused(fused)


def test_what_eager_rejects_or_reads_in_another_way() -> None:
    """The same result or the same words: other numbers of features, inputs of other ranks, slopes for features."""
    cases: list[tuple[list[nn.Module], tuple[int, ...]]] = [
        ([nn.Linear(4, 9), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 1)], (3, 4)),
        ([nn.Linear(4, 9), nn.Unflatten(1, (2, -1, 2)), nn.Conv2d(2, 3, 1)], (3, 4)),
        ([nn.Linear(4, 8), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 1)], (4,)),
        ([nn.Linear(4, 8), nn.Unflatten(-1, (2, 4)), nn.Conv1d(5, 3, 1)], (3, 5, 4)),
        ([nn.Linear(4, 8), nn.Unflatten(1, (1, 2, 4)), nn.MaxPool2d(1)], (3, 8, 4)),
        ([nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 1)], (3, 9)),
        ([nn.Unflatten(1, (2, 2, 2)), nn.MaxPool2d(1)], (3, 8, 2)),
        ([nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(8, 8), nn.Unflatten(1, (2, 2, 2)), nn.MaxPool2d(1)], (3, 2, 4)),
        ([nn.Conv2d(3, 2, 1), nn.Flatten(-3, -1), nn.ReLU()], (3, 2, 4)),
        ([nn.Conv2d(3, 2, 1), nn.Flatten(), nn.PReLU(16)], (2, 3, 2, 4)),
        ([nn.Conv2d(3, 2, 1), nn.Flatten(), nn.PReLU(2)], (2, 3, 2, 4)),
        ([nn.Conv2d(3, 2, 1), nn.Flatten(), nn.BatchNorm1d(2).eval()], (2, 3, 2, 4)),
        ([nn.Conv2d(3, 2, 1), nn.Flatten(), nn.BatchNorm1d(8).eval()], (3, 2, 4)),
        ([nn.Conv2d(3, 2, 1), nn.Flatten(0, 2), nn.Linear(4, 2)], (2, 3, 2, 4)),
        ([nn.Conv2d(3, 2, 1), nn.Flatten(2), nn.Flatten(), nn.Linear(8, 2)], (2, 3, 2, 4)),
        ([nn.Conv2d(3, 2, 1), nn.Flatten(3, 3), nn.ReLU()], (3, 2, 4)),
        ([nn.Conv2d(3, 2, 1), nn.Flatten(1, 4), nn.Linear(8, 2)], (2, 3, 2, 4)),
    ]
    for layers, shape in cases:
        model, x = nn.Sequential(*layers).eval(), torch.randn(shape)
        expected, actual = outcome(model, x), outcome(fastseq.optimize(model), x)
        if isinstance(expected, str):
            assert actual == expected
        else:
            assert actual.shape == expected.shape and actual.stride() == expected.stride()
            torch.testing.assert_close(actual, expected)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(6, 2 * 3 * 4), nn.Conv2d(2, 5, 3, padding=1)


class View(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.relu(self.linear(x)).view(-1, 2, 3, 4)))


class ViewOfBatch(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.linear(x))
        return self.conv(x.view(x.shape[0], 2, 3, 4))


class ViewOfInputsBatch(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.linear(x).reshape((x.size(0), 2, 3, 4)))


class Method(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.conv(self.linear(x).unflatten(1, (2, 3, 4))).relu(), scale_factor=2)


class OtherBatch(Decoder):
    """Two maps of each row."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(self.linear(x).view(-1, 2, 3, 2)))


@pytest.mark.parametrize("kind", [View, ViewOfBatch, ViewOfInputsBatch, Method, OtherBatch])
def test_functional_forms(kind: type[Decoder]) -> None:
    model = kind().eval()
    fused, x = fastseq.optimize(model), torch.randn(3, 6)
    with torch.no_grad():
        assert_matches(fused(x), model, x)
        if kind is not OtherBatch:
            assert fastseq.stats(fused) == ONE_CALL
        for other in (torch.randn(6), torch.randn(2, 3, 6)):
            assert_same_outcome(outcome(fused, other), outcome(model, other))
