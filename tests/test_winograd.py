"""Convolutions by Winograd's minimal filtering: numbers, special values, bits, choice, and the option."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from helpers import (
    ISAS,
    WINOGRAD_LARGEST,
    assert_same_bits_however_called,
    assert_was_fused,
    kernels_used,
    one_thread,  # noqa: F401
    run_fused,
    use_kernels,
)
from torch import Tensor, nn

import fastseq
from fastseq.testing import MODELS, assert_matches

each_isa = pytest.mark.parametrize("isa", ISAS)
POOLS: dict[str, tuple[nn.Module, ...]] = {
    "plain": (),
    "pool2": (nn.MaxPool2d(2),),
    "pool3s2": (nn.MaxPool2d(3, 2),),
    "pool3s1p1": (nn.MaxPool2d(3, 1, 1),),
    "pool2ceil": (nn.MaxPool2d(2, ceil_mode=True),),
}
# c_in, c_out, kernel, padding, h, w: whole and moved-back tiles, one tile, few channels, tails of vectors, long sums.
SHAPES = [
    (3, 16, 3, 1, 8, 8),
    (2, 5, 3, 0, 9, 6),
    (4, 33, 3, 1, 7, 13),
    (5, 7, 3, 2, 5, 11),
    (16, 16, 3, 0, 6, 6),
    (17, 40, 3, 1, 13, 10),
    (33, 64, 3, 1, 12, 9),
    (70, 65, 3, 1, 5, 6),
    (1, 6, 5, 2, 12, 12),
    (6, 16, 5, 0, 14, 13),
    (20, 64, 5, 0, 10, 9),
    (64, 30, 5, 2, 7, 8),
]

SPECIAL = [math.nan, math.inf, -math.inf, 3e38, -3.4e38, 1e-45]


def uses_winograd(model: nn.Module) -> bool:
    used = kernels_used(model)
    assert used
    return any(name.startswith("conv2d_winograd") for name in used)


@pytest.fixture
def forced(isa: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Winograd wherever it is possible, also where the direct kernels would be faster."""
    use_kernels(monkeypatch, isa, "conv2d_winograd")
    return isa


def conv(
    c_in: int, c_out: int, k: int, padding: int, *after: nn.Module, bias: bool = True, relu: bool = True
) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(c_in, c_out, k, padding=padding, bias=bias)]
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []), *after).eval()


@each_isa
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers(forced: str, shape: tuple[int, ...], pool: str) -> None:
    c_in, c_out, k, padding, h, w = shape
    for relu, bias, nhwc in ((True, True, False), (False, False, True)):
        model = conv(c_in, c_out, k, padding, *POOLS[pool], bias=bias, relu=relu)
        fused = fastseq.optimize(model)
        for batch in (1, 3):
            x = torch.randn(batch, c_in, h, w)
            if nhwc:
                x = x.to(memory_format=torch.channels_last)
            with torch.no_grad():
                assert_matches(fused(x), model, x, largest_factor=WINOGRAD_LARGEST)
        assert_was_fused(fused)
        sizes = [size + 2 * padding - k + 1 for size in (h, w)]
        if pool == "pool3s2":
            sizes = [size - (size - 3) % 2 for size in sizes]  # what no window covers is not computed
        assert uses_winograd(fused) == (min(sizes) >= 7 - k)


@each_isa
@pytest.mark.parametrize("k", [3, 5])
def test_all_sizes_of_maps(forced: str, k: int) -> None:
    """Every remainder of the tiling, up to three tiles a side; below one tile the direct kernels remain."""
    model = conv(6, 9, k, 0)
    pooled = conv(6, 9, k, 0, nn.MaxPool2d(2))
    out = 7 - k
    for h in range(1, 3 * out + 2):
        for w in (1, out, 2 * out + 1, 3 * out - 1):
            x = torch.randn(1, 6, h + k - 1, w + k - 1)
            fused = fastseq.optimize(model)
            with torch.no_grad():
                assert_matches(fused(x), model, x, largest_factor=WINOGRAD_LARGEST)
            assert uses_winograd(fused) == (h >= out and w >= out)
            if h >= 2 and w >= 2:
                assert_matches(run_fused(pooled, x), pooled, x, largest_factor=WINOGRAD_LARGEST)


# c_in, c_out, kernel, groups: whole vectors, tails of them, panels that end inside a vector, other numbers of inputs.
GROUPED = [(32, 32, 3, 2), (48, 72, 3, 4), (40, 66, 3, 2), (34, 34, 5, 2), (60, 100, 3, 5), (99, 51, 3, 3)]


def grouped(shape: tuple[int, int, int, int], *after: nn.Module, relu: bool = True, **options: Any) -> nn.Sequential:
    c_in, c_out, k, groups = shape
    layer = nn.Conv2d(c_in, c_out, k, padding=k // 2, groups=groups, **options)
    return nn.Sequential(layer, *([nn.ReLU()] if relu else []), *after).eval()


@each_isa
@pytest.mark.parametrize("pool", [*POOLS, "act"])
@pytest.mark.parametrize("shape", GROUPED, ids=str)
def test_groups(forced: str, shape: tuple[int, int, int, int], pool: str) -> None:
    model = grouped(
        shape, *(POOLS[pool] if pool != "act" else (nn.Conv2d(shape[1], 5, 1), nn.SiLU())), relu=pool != "act"
    )
    if pool == "act":
        model.insert(1, nn.PReLU(shape[1]))
    fused = fastseq.optimize(model)
    for batch, memory_format in ((1, torch.contiguous_format), (3, torch.channels_last)):
        x = torch.randn(batch, shape[0], 11, 9).to(memory_format=memory_format)
        with torch.no_grad():
            assert_matches(fused(x), model, x, largest_factor=WINOGRAD_LARGEST)
    assert_was_fused(fused)
    assert uses_winograd(fused)


@each_isa
@pytest.mark.parametrize("shape", GROUPED, ids=str)
def test_groups_bits_and_special_values(forced: str, shape: tuple[int, int, int, int]) -> None:
    behind = fastseq.optimize(grouped(shape, nn.MaxPool2d(3, 2), nn.Conv2d(shape[1], 64, 1)))
    assert_same_bits_however_called(behind, torch.randn(9, shape[0], 10, 12))
    model = grouped(shape, relu=False, dilation=2)
    fused = fastseq.optimize(model)
    for value in SPECIAL:
        x = torch.randn(3, shape[0], 13, 12)
        x[0, 0, 0, 0], x[1, -1, -1, -1], x[2, shape[0] // 2, 6, 5] = value, value, value
        with torch.no_grad():
            assert_matches(fused(x), model, x, largest_factor=WINOGRAD_LARGEST)
    assert uses_winograd(behind) and uses_winograd(fused)


# c_in, c_out, kernel, padding, dilation, h, w: rows and columns of each phase that fill tiles, share one, or leave it
# to others.
DILATED = [
    (16, 20, 3, 2, 2, 13, 12),
    (17, 33, 3, 3, 3, 17, 19),
    (3, 16, 3, 2, 2, 9, 10),
    (4, 9, 3, (0, 2), (1, 2), 11, 9),
    (70, 40, 3, (5, 1), (5, 1), 23, 7),
    (8, 24, 5, 4, 2, 9, 11),
]


def dilated(shape: tuple[Any, ...], *after: nn.Module, relu: bool = True) -> nn.Sequential:
    c_in, c_out, k, padding, dilation, _, _ = shape
    layers: list[nn.Module] = [nn.Conv2d(c_in, c_out, k, padding=padding, dilation=dilation)]
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []), *after).eval()


@each_isa
@pytest.mark.parametrize("pool", [*POOLS, "act"])
@pytest.mark.parametrize("shape", DILATED, ids=str)
def test_dilation(forced: str, shape: tuple[Any, ...], pool: str) -> None:
    behind: tuple[nn.Module, ...] = (nn.Conv2d(shape[1], 5, 1), nn.SiLU()) if pool == "act" else POOLS[pool]
    model = dilated(shape, *behind, relu=pool != "act")
    if pool == "act":
        model.insert(1, nn.ELU())
    fused = fastseq.optimize(model)
    for batch, memory_format in ((1, torch.contiguous_format), (3, torch.channels_last)):
        x = torch.randn(batch, shape[0], *shape[-2:]).to(memory_format=memory_format)
        with torch.no_grad():
            assert_matches(fused(x), model, x, largest_factor=WINOGRAD_LARGEST)
    assert_was_fused(fused)
    assert uses_winograd(fused) or pool in ("pool2", "pool2ceil")  # where tiles hold no neighbours


@each_isa
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("dilation", [2, 3])
def test_dilation_of_all_sizes_of_maps(forced: str, k: int, dilation: int) -> None:
    model = nn.Sequential(nn.Conv2d(6, 9, k, dilation=dilation), nn.ReLU()).eval()
    out, reach = 7 - k, dilation * (k - 1)
    for h in range(dilation * out - 1, dilation * (2 * out + 1) + 2):
        for w in (dilation * out, dilation * 2 * out + 1):
            # Several images: eager's worst error of one small tensor may be near nothing by luck.
            x = torch.randn(4, 6, h + reach, w + reach)
            fused = fastseq.optimize(model)
            with torch.no_grad():
                assert_matches(fused(x), model, x, largest_factor=WINOGRAD_LARGEST)
            assert uses_winograd(fused) == (h >= dilation * out)


@each_isa
@pytest.mark.parametrize("shape", DILATED, ids=str)
@pytest.mark.parametrize("pool", ["plain", "pool3s2"])
def test_dilation_bits_do_not_depend_on_batch_threads_or_layout(forced: str, shape: tuple[Any, ...], pool: str) -> None:
    fused = fastseq.optimize(nn.Sequential(*dilated(shape, *POOLS[pool]), nn.Conv2d(shape[1], 64, 1)).eval())
    assert_same_bits_however_called(fused, torch.randn(9, shape[0], *shape[-2:]))
    assert uses_winograd(fused)


@each_isa
@pytest.mark.parametrize("shape", DILATED, ids=str)
def test_special_values_keep_their_footprint_through_dilation(forced: str, shape: tuple[Any, ...]) -> None:
    model = dilated(shape, relu=False)
    fused = fastseq.optimize(model)
    c_in, h, w = shape[0], *shape[-2:]
    for value in SPECIAL:
        inputs = torch.randn(4, 2, c_in, h, w)
        for x, (row, column) in zip(inputs, ((0, 0), (h - 1, w - 1), (h // 2, 3), (4, w - 1)), strict=True):
            x[1, c_in // 2, row, column] = value
        with torch.no_grad():
            actual = torch.cat([fused(x) for x in inputs])
        assert_matches(actual, model, inputs.flatten(0, 1), largest_factor=WINOGRAD_LARGEST)
    assert uses_winograd(fused)


@each_isa
def test_long_sums_and_groups_of_many_tiles(forced: str) -> None:
    model = conv(200, 24, 3, 1)
    x = torch.randn(2, 200, 19, 23)
    assert_matches(run_fused(model, x), model, x, largest_factor=WINOGRAD_LARGEST)


@each_isa
@pytest.mark.parametrize("shape", [(3, 20, 3, 1, 14, 11), (24, 20, 3, 1, 14, 11), (20, 40, 5, 2, 9, 12)], ids=str)
@pytest.mark.parametrize("pool", ["plain", "pool2", "pool3s2"])
def test_bits_do_not_depend_on_batch_threads_or_layout(forced: str, shape: tuple[int, ...], pool: str) -> None:
    c_in, c_out, k, padding, h, w = shape
    model = nn.Sequential(*conv(c_in, c_out, k, padding, *POOLS[pool]), *conv(c_out, 32, 3, 1)).eval()
    fused = fastseq.optimize(model)
    x = torch.randn(13, c_in, h, w)
    assert_same_bits_however_called(fused, x)
    assert uses_winograd(fused)


@each_isa
@pytest.mark.parametrize("layer", ["3x3", "5x5", "pooled", "1x1", "stride 2", "first panel"])
def test_threads_that_share_output_channels(isa: str, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights so large that threads share panels and not rows: the same bits, also where tiles are computed again."""
    use_kernels(monkeypatch, isa)
    model = {
        "3x3": lambda: conv(72, 100, 3, 1),
        "5x5": lambda: conv(40, 152, 5, 2),
        "pooled": lambda: conv(72, 100, 3, 1, nn.MaxPool2d(2)),
        "1x1": lambda: conv(500, 500, 1, 0),
        "stride 2": lambda: nn.Sequential(nn.Conv2d(72, 330, 3, 2, 1), nn.ReLU()),
        "first panel": lambda: conv(72, 100, 3, 1),
    }[layer]()
    if layer == "first panel":
        with torch.no_grad():  # sums beyond the largest float in a few channels only
            model[0].weight[:3] *= 1e30
    # The last step's pixels would be turned into planes, which wants whole ones.
    model = nn.Sequential(*model, nn.Conv2d(model[0].out_channels, 6, 1)).eval()
    fused = fastseq.optimize(model)
    x = torch.randn(3, model[0].in_channels, 8, 8)
    x[1, 5, 2, 2], x[2, 0, 7, 7] = math.nan, math.inf
    if layer == "first panel":
        x[0, :, 2:5, :] *= 1e8
    with torch.no_grad():
        torch.set_num_threads(1)
        alone = torch.cat([fused(image[None]) for image in x])
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for batch in (1, 3):
                got = fused(x[:batch])
                assert torch.equal(got.nan_to_num(nan=7.0), alone[:batch].nan_to_num(nan=7.0)), (threads, batch)
                assert torch.equal(got.isnan(), alone[:batch].isnan()), (threads, batch)
    assert_was_fused(fused)
    if layer != "first panel":  # where an order of adding decides what overflows
        assert_matches(alone, model, x, largest_factor=WINOGRAD_LARGEST)


@each_isa
@pytest.mark.parametrize("pool", ["plain", "pool2", "pool3s2"])
@pytest.mark.parametrize("shape", [(3, 16, 3, 1, 11, 10), (16, 20, 3, 1, 11, 10), (8, 16, 5, 2, 9, 7)], ids=str)
def test_special_values_keep_their_footprint(forced: str, shape: tuple[int, ...], pool: str) -> None:
    """One special value, at corners, edges and inside: the transforms alone would spread it over its tiles."""
    c_in, c_out, k, padding, h, w = shape
    for relu in (True, False):
        model = conv(c_in, c_out, k, padding, *POOLS[pool], relu=relu)
        fused = fastseq.optimize(model)
        for value in SPECIAL:
            inputs = torch.randn(5, 2, c_in, h, w)
            for x, (row, column) in zip(inputs, ((0, 0), (h - 1, w - 1), (h // 2, 3), (4, w - 1), (5, 5)), strict=True):
                x[1, c_in // 2, row, column] = value
            with torch.no_grad():
                actual = torch.cat([fused(x) for x in inputs])
            # Together: eager's worst error of one small tensor may be near nothing by luck.
            assert_matches(actual, model, inputs.flatten(0, 1), largest_factor=WINOGRAD_LARGEST)
        assert_was_fused(fused)
        assert uses_winograd(fused)


@each_isa
def test_a_tile_that_is_computed_again_has_the_bits_of_the_direct_kernels(forced: str) -> None:
    model = conv(16, 20, 3, 1)
    x = torch.randn(1, 16, 8, 8)
    x[0, 3, 1, 1] = math.inf  # in the first of four tiles
    with torch.no_grad():
        actual = fastseq.optimize(model)(x)
        direct = fastseq.optimize(model, winograd="off")(x)
    tile = (..., slice(0, 4), slice(0, 4))
    assert torch.equal(actual[tile].nan_to_num(nan=7.0), direct[tile].nan_to_num(nan=7.0))
    assert not torch.equal(actual, direct)


@each_isa
def test_sums_beyond_the_largest_float_are_infinite_as_eagers(forced: str) -> None:
    model = conv(16, 16, 3, 1, relu=False, bias=False)
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.abs())
    x = torch.full((1, 16, 9, 9), 2e38)
    x[..., :5] *= -1
    with torch.no_grad():
        # Where a window holds both signs, how far the sum gets before it turns depends on the order.
        actual = fastseq.optimize(model)(x)[..., [0, 1, 2, 3, 6, 7, 8]]
        eager = model(x)[..., [0, 1, 2, 3, 6, 7, 8]]
    assert torch.equal(actual.isinf(), eager.isinf()) and eager.isinf().any()
    assert torch.equal(actual.signbit(), eager.signbit())


@each_isa
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_for_the_direct_kernels(forced: str, value: float) -> None:
    model = conv(16, 16, 3, 1)
    with torch.no_grad():
        model[0].weight[3, 2, 1, 1] = value
    fused = fastseq.optimize(model)
    x = torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        assert_matches(fused(x), model, x)
    assert not uses_winograd(fused)


@each_isa
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pool", ["plain", "pool2"])
def test_special_biases(forced: str, value: float, pool: str) -> None:
    model = conv(16, 16, 3, 1, *POOLS[pool])
    with torch.no_grad():
        model[0].bias[5] = value
    x = torch.randn(2, 16, 8, 8)
    assert_matches(run_fused(model, x), model, x)


@each_isa
def test_changed_weights_are_transformed_again(forced: str) -> None:
    model = conv(8, 16, 3, 1)
    fused = fastseq.optimize(model)
    x = torch.randn(1, 8, 12, 12)
    with torch.no_grad():
        fused(x)
        fused[0].weight.mul_(-0.5)
        model[0].weight.mul_(-0.5)
        assert_matches(fused(x), model, x)
    assert uses_winograd(fused)


# The choice and the option ------------------------------------------------------------------------------------------


def chosen(model: nn.Module, x: Tensor, **options: Any) -> list[str]:
    fused = fastseq.optimize(model.eval(), **options)
    with torch.no_grad():
        fused(x)
    return kernels_used(fused)


@pytest.mark.parametrize("name", ["seed1", "seed1_named", "seed3", "cifar_vgg"])
def test_networks_use_it(name: str) -> None:
    model, x = MODELS[name].build(), MODELS[name].example(2)
    assert any(kernel.startswith("conv2d_winograd") for kernel in chosen(model, x))
    assert not any(kernel.startswith("conv2d_winograd") for kernel in chosen(model, x, winograd="off"))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(64, 64, 1),
        nn.Conv2d(64, 64, 3, stride=2),
        nn.Conv2d(64, 64, (3, 1)),
        nn.Conv2d(64, 64, 7),
        nn.Conv2d(64, 64, (5, 3)),
    ],
    ids=str,
)
def test_other_convolutions_stay_direct(layer: nn.Module) -> None:
    (kernel,) = chosen(nn.Sequential(layer), torch.randn(1, 64, 20, 20))
    assert not kernel.startswith("conv2d_winograd")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_maps_below_a_tile_stay_direct(size: int) -> None:
    (kernel,) = chosen(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)), torch.randn(1, 64, size, size))
    assert not kernel.startswith("conv2d_winograd")


def test_off_goes_with_the_model_until_it_is_optimised_again() -> None:
    model, x = MODELS["seed3"].build(), MODELS["seed3"].example(1)
    off = fastseq.optimize(model, winograd="off")
    for other in (off, copy.deepcopy(off), pickle.loads(pickle.dumps(off)), fastseq.optimize(off, winograd="off")):
        with torch.no_grad():
            other(x)
        assert not uses_winograd(other)
    again = fastseq.optimize(off)
    with torch.no_grad():
        again(x)
        assert uses_winograd(again)
    plain = fastseq.restore(off)
    assert not [key for module in plain.modules() for key in module.__dict__ if "winograd" in key]


@pytest.mark.parametrize("value", ["on", "fast", "", None, True])
def test_other_values_of_the_option(value: Any) -> None:
    with pytest.raises(ValueError, match=r'winograd expects "auto" or "off", got '):
        fastseq.optimize(MODELS["seed1"].build(), winograd=value)


def test_verify_reports_its_error() -> None:
    model, x = MODELS["seed1"].build(), MODELS["seed1"].example(2)
    report = fastseq.verify(fastseq.optimize(model), x).to_dict()
    assert report["ok"]
    steps = [step for step in report["steps"] if step["kernel"].startswith("conv2d_winograd")]
    assert steps and all(0 < step["error"] <= step["allowed"] for step in steps)
