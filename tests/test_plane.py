"""Convolutions of one input channel whose lanes are pixels: exact, with the bits of the other direct kernels."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import ISAS, assert_exact, assert_was_fused, integer_model, integers, kernels_used, one_thread, use_kernels  # noqa: F401
from torch import nn

import fastseq
from fastseq.testing import MODELS, assert_matches

each_isa = pytest.mark.parametrize("isa", ISAS)
POOLS = {
    "plain": (),
    "pool2": (nn.MaxPool2d(2),),
    "pool3s2": (nn.MaxPool2d(3, 2, 1),),
    "ceil": (nn.MaxPool2d(2, ceil_mode=True),),
}


@each_isa
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (2, 7)], ids=str)
def test_exact(isa: str, pool: str, kernel: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa, "conv2d_plane")
    for channels in (1, 2, 3, 6, 7, 13, 20):
        model = integer_model(
            nn.Conv2d(1, channels, kernel, padding=1 if min(kernel) > 1 else 0),
            nn.ReLU(),
            *POOLS[pool],
        )
        fused = fastseq.optimize(model)
        for h, w in ((7, 8), (5, 17), (12, 33), (9, 70)):
            x = integers(3, 1, h, w)
            with torch.no_grad():
                assert_exact(fused(x), model, x)
                assert_exact(fused(x[:1]), model, x[:1])
        assert_was_fused(fused)
        assert kernels_used(fused)[0].startswith("conv2d_plane")


@each_isa
@pytest.mark.parametrize("pool", ["plain", "pool2"])
def test_bits_are_those_of_the_tiles(isa: str, pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), *POOLS[pool]).eval()
    x = torch.randn(3, 1, 28, 30)
    x[1, 0, 3, 4], x[2, 0, 20, 29] = math.nan, -math.inf
    results = []
    for kernel in ("conv2d_plane", "conv2d_maxpool2d" if pool == "pool2" else "conv2d_f32"):
        use_kernels(monkeypatch, isa, kernel)
        fused = fastseq.optimize(model)
        with torch.no_grad():
            results.append(fused(x))
        assert kernels_used(fused)[0].startswith(kernel)
        assert_matches(results[-1], model, x)
    assert torch.equal(results[0].isnan(), results[1].isnan())
    assert torch.equal(results[0].nan_to_num(), results[1].nan_to_num())


@each_isa
@pytest.mark.parametrize("before", [nn.Conv2d(2, 1, 3), nn.MaxPool2d(2)], ids=["convolution", "pool"])
def test_pixels_that_are_not_dense(isa: str, before: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """One channel in the middle of a network lies in whole vectors, which these kernels do not read."""
    use_kernels(monkeypatch, isa, "conv2d_plane")
    model = integer_model(before, nn.Conv2d(1, 3, 5, padding=1), limit=2)
    x = integers(2, before.in_channels if isinstance(before, nn.Conv2d) else 1, 11, 23)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        assert_exact(fused(x), model, x)
    assert_was_fused(fused)
    assert kernels_used(fused)[-1].startswith("conv2d_f32")


def test_lenet_uses_it() -> None:
    fused = fastseq.optimize(MODELS["lenet5"].build())
    x = MODELS["lenet5"].example(5)
    with torch.no_grad():
        one, two = fused(x), torch.cat([fused(image[None]) for image in x])
    assert torch.equal(one, two)
    if fastseq.isa() in ("avx512", "avx2"):
        assert kernels_used(fused)[0].startswith("conv2d_plane")
