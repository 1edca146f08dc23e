"""BatchNorm and activations that are steps of their own: behind an activation, behind a pool, first in a run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import (
    ISAS,
    assert_eagers_error,
    assert_same_bits_however_called,
    kernels_used,
    one_thread,  # noqa: F401
    run_fused,
    run_on_threads,
    settle,
    use_kernels,
)
from torch import Tensor, nn

import fastseq
from fastseq.matcher import NativeSegment, match
from fastseq.patterns.activation import ACTIVATIONS
from fastseq.sequential import KINDS
from fastseq.testing import assert_matches

IMAGE, ROWS = (5, 3, 11, 12), (9, 20)


def norm2d(channels: int, **options: bool) -> nn.BatchNorm2d:
    return settle(nn.BatchNorm2d(channels, **options))


def norm1d(features: int) -> nn.BatchNorm1d:
    return settle(nn.BatchNorm1d(features))


# Models whose last step but company is one of its own, each with an input's shape and the steps.
MODELS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...], list[str]]] = {
    "conv relu norm relu": (
        lambda: [nn.Conv2d(3, 17, 3), nn.ReLU(), norm2d(17), nn.ReLU()],
        IMAGE,
        ["conv2d_relu", "batchnorm2d_relu"],
    ),
    "norm first": (
        lambda: [norm2d(3), nn.ReLU(), nn.Conv2d(3, 17, 3, padding=1)],
        IMAGE,
        ["batchnorm2d_relu", "conv2d"],
    ),
    "norm of many channels first, then Winograd": (
        lambda: [norm2d(35), nn.Conv2d(35, 32, 3, padding=1), nn.ReLU()],
        (2, 35, 12, 13),
        ["batchnorm2d", "conv2d_relu"],
    ),
    "norm behind a pool": (
        lambda: [nn.Conv2d(3, 17, 3), nn.MaxPool2d(2), norm2d(17), nn.SiLU(), nn.Flatten(), nn.Linear(17 * 20, 9)],
        IMAGE,
        ["conv2d_maxpool2d", "batchnorm2d_silu", "linear"],
    ),
    "norm without weight": (
        lambda: [nn.AvgPool2d(2), norm2d(3, affine=False)],
        IMAGE,
        ["avgpool2d", "batchnorm2d"],
    ),
    "two norms": (lambda: [nn.Conv2d(3, 8, 1), norm2d(8), norm2d(8)], IMAGE, ["conv2d_batchnorm2d", "batchnorm2d"]),
    "activation behind an activation": (
        lambda: [nn.Conv2d(3, 17, 3), nn.ReLU(inplace=True), nn.Tanh(), nn.ReLU(inplace=True)],
        IMAGE,
        ["conv2d_relu", "tanh", "relu"],
    ),
    "PReLU of channels behind a pool and an activation": (
        lambda: [nn.Conv2d(3, 17, 3), nn.SiLU(), nn.MaxPool2d(2), nn.Sigmoid(), nn.PReLU(17)],
        IMAGE,
        ["conv2d_silu_maxpool2d", "sigmoid", "prelu"],
    ),
    "linear relu norm": (
        lambda: [nn.Linear(20, 33), nn.ReLU(), norm1d(33), nn.Linear(33, 7), nn.Tanh(), norm1d(7), nn.ELU()],
        ROWS,
        ["linear_relu", "batchnorm1d", "linear_tanh", "batchnorm1d_elu"],
    ),
    "norm of rows first": (
        lambda: [norm1d(20), nn.SiLU(), nn.Linear(20, 5)],
        ROWS,
        ["batchnorm1d_silu", "linear"],
    ),
    "norm of a flattened input": (
        lambda: [nn.Flatten(), norm1d(60), nn.Linear(60, 5)],
        (4, 3, 4, 5),
        ["batchnorm1d", "linear"],
    ),
    "activation of rows": (
        lambda: [nn.Linear(20, 33), nn.ReLU(), nn.Mish(), nn.Linear(33, 8), nn.Hardtanh(), nn.PReLU(8), nn.ReLU()],
        ROWS,
        ["linear_relu", "mish", "linear_hardtanh", "prelu", "relu"],
    ),
    "wide rows": (
        lambda: [nn.Linear(20, 700), nn.ReLU(), norm1d(700), nn.ReLU(), nn.Linear(700, 600), nn.ReLU(), norm1d(600)],
        ROWS,
        ["linear_relu", "batchnorm1d_relu", "linear_relu", "batchnorm1d"],
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)
each_isa = pytest.mark.parametrize("isa", ISAS)


def make(name: str) -> tuple[nn.Sequential, Tensor, list[str]]:
    layers, shape, steps = MODELS[name]
    return nn.Sequential(*layers()).eval(), torch.randn(shape), steps


def layouts(x: Tensor) -> list[Tensor]:
    if x.dim() == 2:
        return [x, torch.stack([x, x], 2)[..., 0]]
    return [x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)]


@each_isa
@each_model
def test_as_accurate_as_eager(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    model, x, steps = make(name)
    fused = fastseq.optimize(model)
    for given in layouts(x):
        for batch in (1, 2, len(x)):
            with torch.no_grad():
                assert_matches(fused(given[:batch]), model, given[:batch])
    assert fastseq.stats(fused)["fused_calls"] == 3 * len(layouts(x)) and not fastseq.stats(fused)["fallbacks"]
    (segment,) = match(model, KINDS).segments
    assert isinstance(segment, NativeSegment) and [step.pattern for step in segment.steps] == steps
    assert all(f"__{isa}_" in kernel for kernel in kernels_used(fused))


@each_isa
@each_model
def test_special_values(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time: sums of several meet in an order that is the engine's own."""
    use_kernels(monkeypatch, isa)
    model, x, _ = make(name)
    for value in (float("nan"), float("inf"), -float("inf")):
        special = x.clone()
        special.view(-1)[x.numel() // 2] = value
        if any(isinstance(layer, nn.Conv2d) and layer.padding != (0, 0) for layer in model):
            special = special.nan_to_num(nan=float("nan"), posinf=3e38, neginf=-3e38)
        assert_matches(run_fused(model, special, winograd="off"), model, special)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_each_activation_by_itself(kind: type[nn.Module]) -> None:
    """Values of every size, special ones among them, of images and of rows."""
    values = torch.cat(
        [torch.linspace(-40, 40, 94), torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e-30, -1e30])]
    )
    image = values.view(1, 1, 10, 10).expand(2, 5, 10, 10)
    for first in (nn.MaxPool2d(1), nn.AdaptiveMaxPool2d((None, None))):
        model = nn.Sequential(first, nn.Identity(), nn.Hardtanh(-1e38, 1e38), kind()).eval()
        assert_matches(run_fused(model, image), model, image)
    eye = nn.Linear(9, 9)
    nn.init.eye_(eye.weight)
    nn.init.zeros_(eye.bias)
    model = nn.Sequential(eye, nn.ReLU6(), kind()).eval()
    x = torch.linspace(-3, 9, 63).view(7, 9)
    assert_matches(run_fused(model, x), model, x)


def test_signs_of_zero_pass_through() -> None:
    x = torch.where(torch.rand(2, 19, 9, 8) < 0.5, -0.0, 0.0)
    model = nn.Sequential(nn.MaxPool2d(1), nn.Hardtanh(), nn.ReLU(), nn.LeakyReLU()).eval()
    with torch.no_grad():
        actual, expected = run_fused(model, x), model(x)
    assert torch.equal(actual.signbit(), expected.signbit()) and expected.signbit().any()


@each_isa
@pytest.mark.parametrize("name", [name for name, (_, shape, _) in MODELS.items() if len(shape) == 4])
def test_bits_do_not_depend_on_batch_threads_and_layout(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    model, x, _ = make(name)
    assert_same_bits_however_called(fastseq.optimize(model), torch.cat([x, x.flip(0)])[:7])


@pytest.mark.parametrize("name", [name for name, (_, shape, _) in MODELS.items() if len(shape) == 2])
def test_bits_of_rows_do_not_depend_on_batch_and_threads(name: str) -> None:
    model, _, _ = make(name)
    fused, x = fastseq.optimize(model), torch.randn(150, 20)
    with torch.no_grad():
        alone = torch.cat([fused(row[None]) for row in x])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for batch in (1, 2, 30, 150):
                assert torch.equal(fused(x[:batch]), alone[:batch]), (threads, batch)


def test_large_maps_on_several_threads() -> None:
    model = nn.Sequential(nn.MaxPool2d(2, 1), nn.ReLU(), norm2d(33), nn.SiLU()).eval()
    fused = fastseq.optimize(model)
    for batch in (1, 3):
        x = torch.randn(batch, 33, 113, 112)
        assert_matches(run_on_threads(fused, x), model, x)


@pytest.mark.parametrize("name", ["conv relu norm relu", "norm first", "linear relu norm", "norm of rows first"])
def test_statistics_weights_and_eps_stay_live(name: str) -> None:
    model, x, _ = make(name)
    fused = fastseq.optimize(model)
    changes: list[Callable[[nn.Module], object]] = [
        lambda norm: norm.running_mean.add_(1),
        lambda norm: norm.running_var.data.mul_(2),
        lambda norm: norm.weight.data.neg_(),
        lambda norm: norm.bias.detach().numpy().__iadd__(0.5),
        lambda norm: setattr(norm, "eps", 0.25),
        lambda norm: norm.register_buffer("running_mean", torch.zeros_like(norm.running_mean)),
        lambda norm: norm.load_state_dict({key: value + 1 for key, value in norm.state_dict().items()}),
        lambda norm: setattr(norm, "weight", None),
    ]
    with torch.no_grad():
        for change in changes:
            before = fused(x)
            for changed in (model, fused):
                for layer in changed:
                    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                        change(layer)
            after = fused(x)
            assert_matches(after, model, x)
            assert not torch.equal(after, before)
    assert not fastseq.stats(fused)["fallbacks"]


def test_training_mode_is_eager() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), norm2d(4)).eval()
    fused, x = fastseq.optimize(model), torch.randn(IMAGE)
    with torch.no_grad():
        for changed in (model, fused):
            changed[2].train()
        assert_matches(fused(x), model, x)
        model(x)
        for changed in (model, fused):
            changed[2].eval()
        assert_matches(fused(x), model, x)
    assert torch.equal(fused[2].running_var, model[2].running_var)


def test_a_caller_s_tensor_is_not_written_to() -> None:
    """An activation in place at the beginning is eager's, and one behind a BatchNorm writes to its result."""
    with torch.no_grad():
        for layers, changes in (
            ([nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1)], True),
            ([norm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1)], False),
            ([nn.Identity(), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3 * 132, 4)], True),
        ):
            x = torch.randn(IMAGE)
            kept = x.clone()
            fused = fastseq.optimize(nn.Sequential(*layers).eval())
            fused(x)
            assert fastseq.stats(fused)["fused_calls"] == 1
            assert torch.equal(x, kept.relu() if changes else kept)


EAGER = {
    "norm alone": ([nn.BatchNorm2d(3)], IMAGE, 0),
    "norm and activation alone": ([nn.BatchNorm2d(3), nn.ReLU(), nn.Tanh()], IMAGE, 0),
    "activation before a convolution": ([nn.ReLU(), nn.Conv2d(3, 4, 1)], IMAGE, 1),
    "norm of rows behind images": ([nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4)], IMAGE, 1),
}


@pytest.mark.parametrize("name", EAGER)
def test_what_stays_eager(name: str) -> None:
    layers, shape, runs = EAGER[name]
    model, x = nn.Sequential(*layers).eval(), torch.randn(shape)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        if name == "norm of rows behind images":
            with pytest.raises(ValueError, match="expected 2D or 3D input"):
                fused(x)
        else:
            assert_matches(fused(x), model, x)
    assert fastseq.stats(fused)["fused_calls"] == runs


WRONG: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "other channels": ([nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(5)], IMAGE),
    "other channels first": ([nn.BatchNorm2d(5), nn.Conv2d(3, 4, 1)], IMAGE),
    "other features": ([nn.Linear(20, 4), nn.ReLU(), nn.BatchNorm1d(5)], ROWS),
    "unbatched image": ([nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)], (3, 5, 5)),
    "other slopes": ([nn.Conv2d(3, 4, 1), nn.ReLU(), nn.PReLU(3)], IMAGE),
    "one row": ([nn.Linear(20, 4), nn.ReLU(), nn.BatchNorm1d(4)], (20,)),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_eager_s(name: str) -> None:
    layers, shape = WRONG[name]
    model, x = nn.Sequential(*layers).eval(), torch.randn(shape)
    assert_eagers_error(model, x)


def test_three_dimensions_are_eager_s() -> None:
    """BatchNorm1d takes dimension 1 for the channels there."""
    model = nn.Sequential(nn.Linear(20, 4), nn.ReLU(), norm1d(6)).eval()
    fused, x = fastseq.optimize(model), torch.randn(2, 6, 20)
    with torch.no_grad():
        assert_matches(fused(x), model, x)
    assert fastseq.stats(fused)["fused_calls"] == 0


def test_an_unbatched_image_through_an_activation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Tanh()).eval()
    x = torch.randn(3, 5, 5)
    assert_matches(run_fused(model, x), model, x)
