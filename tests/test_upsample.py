"""Upsample, F.interpolate, PixelShuffle, PixelUnshuffle in runs: eager's pixels, and for bilinear its weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ISAS,
    assert_same_bits_however_called,
    assert_was_fused,
    check_run,
    integer_model,
    integers,
    kernels_used,
    one_thread,  # noqa: F401
    outcome,
    run_fused,
    use_kernels,
)
from torch import Tensor, nn

import fastseq
from fastseq.testing import assert_matches

each_isa = pytest.mark.parametrize("isa", ISAS)

FACTORS = (1, 2, 3, 1.5, 2.1, 1.01, 0.7, 0.5, (2, 1), (1.3, 0.6), 7, 1 / 3)
SIZES = (1, 2, 9, (5, 8), (10, 1), (3, 23), (7, 16))
RESIZED = [*({"scale_factor": factor} for factor in FACTORS), *({"size": size} for size in SIZES)]
RESIZED += [{"scale_factor": factor, "recompute_scale_factor": True} for factor in (2.1, 0.7, (1.3, 0.6))]


def special(*shape: int) -> Tensor:
    x = torch.randn(shape)
    x.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    x.view(-1)[17::7] = float("inf")
    return x


def forms(x: Tensor) -> tuple[Tensor, ...]:
    return x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)


@each_isa
def test_nearest_gives_eagers_bits(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    for options in RESIZED:
        for channels in (1, 3, 17):
            model = nn.Sequential(nn.MaxPool2d(1), nn.Upsample(**options)).eval()
            for x in forms(special(2, channels, 5, 8)):
                with torch.no_grad():
                    expected = model(x)
                actual = run_fused(model, x)
                assert torch.equal(actual.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0)), options
                assert torch.equal(actual.signbit(), expected.signbit())
                assert actual.stride() == expected.stride(), (options, x.stride())


@each_isa
@pytest.mark.parametrize("align_corners", [None, True])
def test_bilinear_weighs_as_eager(isa: str, align_corners: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where infinities have the weight 0 is eager's business too: they make NaN."""
    use_kernels(monkeypatch, isa)
    for options in RESIZED:
        for channels in (3, 67):
            layer = nn.Upsample(**options, mode="bilinear", align_corners=align_corners)
            model = nn.Sequential(nn.MaxPool2d(1), layer).eval()
            for x in (torch.randn(1, channels, 5, 8), *forms(special(1, channels, 5, 8))[:2]):
                assert_matches(run_fused(model, x), model, x)


SHUFFLES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "shuffle by 1": (nn.PixelShuffle(1), (2, 3, 5, 4)),
    "shuffle to one channel": (nn.PixelShuffle(3), (2, 9, 5, 4)),
    "shuffle": (nn.PixelShuffle(2), (2, 68, 3, 5)),
    "shuffle one pixel": (nn.PixelShuffle(4), (1, 48, 1, 1)),
    "unshuffle by 1": (nn.PixelUnshuffle(1), (2, 3, 5, 4)),
    "unshuffle one channel": (nn.PixelUnshuffle(3), (2, 1, 6, 9)),
    "unshuffle": (nn.PixelUnshuffle(2), (2, 17, 4, 10)),
}


@pytest.mark.parametrize("name", SHUFFLES)
def test_shuffles_give_eagers_bits(name: str) -> None:
    layer, shape = SHUFFLES[name]
    model = nn.Sequential(nn.MaxPool2d(1), layer).eval()
    for x in (*forms(special(*shape)), special(*shape)[0]):
        with torch.no_grad():
            expected = model(x)
        actual = run_fused(model, x)
        assert torch.equal(actual.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
        assert actual.stride() == expected.stride() and actual.shape == expected.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models(dtype: torch.dtype) -> None:
    """Copies are exact, and a weighted sum is rounded once."""
    x = torch.randn(3, 36, 6, 7)
    for layer in (nn.Upsample(scale_factor=2), nn.PixelShuffle(3), nn.PixelUnshuffle(1), nn.Upsample((3, 9))):
        model = nn.Sequential(nn.MaxPool2d(1), layer).eval()
        with torch.no_grad():
            assert torch.equal(run_fused(model.to(dtype), x.to(dtype)), model(x.to(dtype)))
    model = nn.Sequential(nn.MaxPool2d(1), nn.UpsamplingBilinear2d((11, 5)), nn.Conv2d(36, 4, 1)).eval().to(dtype)
    assert_matches(run_fused(model, x.to(dtype)), model, x.to(dtype))
    rounded, exact = run_fused(model[:2], x.to(dtype)), model[:2].double()(x.to(dtype).double())
    assert ((rounded.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


def test_between_convolutions() -> None:
    for middle, channels in (
        (nn.Upsample(scale_factor=2), 8),
        (nn.UpsamplingNearest2d(size=(7, 4)), 8),
        (nn.Upsample(scale_factor=(1, 2), mode="bilinear"), 8),
        (nn.PixelShuffle(2), 2),
        (nn.PixelUnshuffle(2), 32),
    ):
        for behind in (
            [nn.Conv2d(channels, 17, 3)],
            [nn.Conv2d(channels, 5, 3, padding=2), nn.ReLU(), nn.MaxPool2d(2)],
        ):
            model = integer_model(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), middle, *behind, limit=2)
            x = 16 * integers(2, 3, 6, 10, limit=1)  # quarters of sixteens are integers
            check_run(model, x)
    model = integer_model(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.Flatten(), nn.Linear(2 * 8 * 12, 5), limit=2)
    check_run(model, integers(2, 3, 6, 8, limit=2))


def test_bits_do_not_depend_on_batch_threads_and_layout() -> None:
    layers = [nn.MaxPool2d(1), nn.Upsample(scale_factor=1.7, mode="bilinear"), nn.Upsample((9, 30)), nn.PixelShuffle(3)]
    assert_same_bits_however_called(fastseq.optimize(nn.Sequential(*layers).eval()), torch.randn(7, 18, 13, 14))


def test_report_names_the_kernels() -> None:
    layers = [
        nn.MaxPool2d(1),
        nn.Upsample((9, 8)),
        nn.UpsamplingBilinear2d(4),
        nn.PixelShuffle(2),
        nn.PixelUnshuffle(4),
    ]
    fused = fastseq.optimize(nn.Sequential(*layers).eval())
    with torch.no_grad():
        fused(torch.randn(1, 4, 6, 6))
    names = [name.partition("__")[0] for name in kernels_used(fused)[1:]]
    assert names == ["upsamplenearest2d_f32", "upsamplebilinear2d_f32", "pixelshuffle_f32", "pixelunshuffle_f32"]


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "of one dimension": lambda: nn.Upsample(scale_factor=2, mode="linear"),
    "bicubic": lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
    "nearest-exact": lambda: nn.Upsample(scale_factor=1.7, mode="nearest-exact"),
    "nothing left": lambda: nn.Upsample(scale_factor=0.01),
    "neither": lambda: nn.Upsample(),
    "both": lambda: nn.Upsample(4, 2.0),
    "three factors": lambda: nn.Upsample(scale_factor=(1.0, 2.0, 2.0)),
    "corners of nearest": lambda: nn.Upsample(4, align_corners=False),
    "recomputed size": lambda: nn.Upsample(4, recompute_scale_factor=True),
    "negative": lambda: nn.Upsample(scale_factor=-1.0),
    "lists": lambda: nn.Upsample([3, 4]),  # type: ignore[arg-type]
    "channels that do not divide": lambda: nn.PixelShuffle(3),
    "rows that do not divide": lambda: nn.PixelUnshuffle(4),
    "factor of 0": lambda: nn.PixelShuffle(0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_else_eager_takes_or_rejects(name: str) -> None:
    """The same result or the same words, whoever computes."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), OTHERS[name](), nn.MaxPool2d(1)).eval()
    fused, x = fastseq.optimize(model), torch.randn(2, 3, 6, 6)
    expected, actual = outcome(model, x), outcome(fused, x)
    if isinstance(expected, str):
        assert actual == expected
    else:
        assert_matches(actual, model, x)


def test_an_unbatched_image_is_three_dimensional_for_eager() -> None:
    """It takes the last dimension alone, or rejects it."""
    for layer in (nn.Upsample(scale_factor=2), nn.Upsample((4, 4)), nn.Upsample(scale_factor=2, mode="bilinear")):
        model, x = nn.Sequential(nn.MaxPool2d(1), layer).eval(), torch.randn(3, 6, 6)
        expected, actual = outcome(model, x), outcome(fastseq.optimize(model), x)
        assert actual == expected if isinstance(expected, str) else torch.equal(actual, expected)


def test_attributes_count_at_the_next_call() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2), nn.PixelShuffle(2), nn.Upsample((5, 6), mode="bilinear")]
    model = nn.Sequential(*layers).eval()
    fused, x = fastseq.optimize(model), torch.randn(2, 3, 8, 8)
    for index, attribute, value in (
        (1, "scale_factor", (1.5, 3.0)),
        (1, "mode", "bilinear"),
        (2, "upscale_factor", 1),
        (3, "size", 7),
        (3, "align_corners", True),
    ):
        with torch.no_grad():
            before = fused(x)
            for changed in (model, fused):
                setattr(changed[index], attribute, value)
            after = fused(x)
        assert_matches(after, model, x)
        assert after.shape != before.shape or not torch.equal(after, before)
    assert_was_fused(fused)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(F.relu(self.conv(x)), scale_factor=2)
        x = F.interpolate(x, (9, 11), mode="bilinear", align_corners=True)
        x = F.interpolate(x, scale_factor=(2, 1.5), mode="bilinear", recompute_scale_factor=True)
        x = F.pixel_unshuffle(F.pixel_shuffle(x, 2), downscale_factor=4)
        return F.max_pool2d(x, 2)


def test_functional_forms() -> None:
    model, x = Functional().eval(), torch.randn(2, 3, 12, 13)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        assert_matches(fused(x), model, x)
    assert fastseq.stats(fused) == {"fused_calls": 1, "eager_calls": 0, "fallbacks": {}}
