"""AvgPool2d, AdaptiveAvgPool2d and AdaptiveMaxPool2d: every way a window can lie.

Sums of integers are exact, and each is divided once: so is the result.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ISAS,
    assert_eagers_error,
    assert_exact,
    assert_same_bits_however_called,
    check_run,
    integer_model,
    integers,
    kernels_used,
    one_thread,  # noqa: F401
    run_fused,
    run_on_threads,
    use_kernels,
)
from torch import Tensor, nn

import fastseq
from fastseq.testing import assert_matches

POOLS: dict[str, dict[str, Any]] = {
    "2x2/2": {"kernel_size": 2},
    "2x2/1 padded": {"kernel_size": 2, "stride": 1, "padding": 1},
    "3x3/2 padded": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3x3/2 padded, padding not counted": {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
    "2x3/1x2 padded": {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0)},
    "5x5/3 padded, padding not counted": {"kernel_size": 5, "stride": 3, "padding": 2, "count_include_pad": False},
    "2x2/3": {"kernel_size": 2, "stride": 3},
    "1x1/1": {"kernel_size": 1},
    "4x1/2x5": {"kernel_size": (4, 1), "stride": (2, 5)},
    "3x3/2 with a divisor": {"kernel_size": 3, "stride": 2, "padding": 1, "divisor_override": 7},
    "2x2/1 with a negative divisor": {"kernel_size": 2, "stride": 1, "divisor_override": -3},
}
OUTPUTS: dict[str, Any] = {
    "1": 1,
    "1x1": (1, 1),
    "3": 3,
    "2x5": (2, 5),
    "as it is": (None, None),
    "as it is x 2": (None, 2),
    "4 x as it is": (4, None),
    "more than there are": (9, 17),
}
SIZES = ((1, 1), (2, 3), (4, 4), (5, 6), (7, 7), (8, 9), (13, 11))

each_pool = pytest.mark.parametrize("pool", POOLS.values(), ids=list(POOLS))
each_output = pytest.mark.parametrize("size", OUTPUTS.values(), ids=list(OUTPUTS))
each_adaptive = pytest.mark.parametrize("kind", [nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d])
each_isa = pytest.mark.parametrize("isa", ISAS)
ceil_or_floor = pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])


def fits(pool: nn.Module, size: tuple[int, int]) -> bool:
    """Whether eager accepts an image of this size."""
    with torch.device("meta"):
        try:
            pool(torch.empty(1, 1, *size))
        except RuntimeError:
            return False
    return True


def may_lead(layer: nn.Module) -> bool:
    return not (isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1)))


def check_exact(*layers: nn.Module, x: Tensor) -> None:
    """Alone, or behind a pool that changes nothing, for both memory formats."""
    model = integer_model(*([] if may_lead(layers[0]) else [nn.MaxPool2d(1)]), *layers)
    for given in (x, x.to(memory_format=torch.channels_last)):
        assert_exact(run_fused(model, given), model, given)


@each_isa
@ceil_or_floor
@each_pool
def test_average_is_exact(pool: dict[str, Any], ceil_mode: bool, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    layer = nn.AvgPool2d(**pool, ceil_mode=ceil_mode)
    sizes = [size for size in SIZES if fits(layer, size)]
    assert len(sizes) >= 4
    for size, channels in zip(sizes, cycle((3, 17, 70)), strict=False):
        x = integers(2, channels, *size)
        check_exact(layer, x=x)
        check_exact(layer, nn.ReLU(), x=x)


@each_isa
@each_adaptive
@each_output
def test_adaptive_is_exact(size: Any, kind: type[nn.Module], isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    for image, channels in zip(SIZES, cycle((3, 17, 70)), strict=False):
        x = integers(2, channels, *image)
        check_exact(kind(size), x=x)
        check_exact(kind(size), nn.ReLU(), x=x)


def test_global_average_begins_no_run() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)).eval()
    fused, x = fastseq.optimize(model), torch.randn(2, 5, 4, 4)
    with torch.no_grad():
        assert_matches(fused(x), model, x)
    first, second = fastseq.explain(fused).to_dict()["sequentials"][0]["segments"]
    assert first["reason"] == "AdaptiveAvgPool2d to one pixel begins no fused run: eager is as fast"
    assert [step["name"] for step in second["steps"]] == ["linear"]


@each_output
def test_adaptive_maximum_is_bitwise_eager(size: Any) -> None:
    model = nn.Sequential(nn.AdaptiveMaxPool2d(size)).eval()
    for x in (torch.randn(2, 19, 9, 10), torch.randn(3, 9, 10)):
        with torch.no_grad():
            assert torch.equal(run_fused(model, x), model(x))


@pytest.mark.parametrize(
    "last",
    [nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d((3, 2)), nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d((2, 4))],
    ids=str,
)
def test_in_a_run(last: nn.Module) -> None:
    """Behind a convolution, whose integers stay, before another one and its border, before Flatten and Linear."""
    x = integers(3, 3, 10, 13, limit=2)
    for first in (
        [nn.Conv2d(3, 9, 3)],
        [nn.Conv2d(3, 17, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(3, 5, 3), nn.MaxPool2d(2)],
    ):
        model = integer_model(*first, last, limit=2)
        check_run(model, x)
        with torch.no_grad():
            _, channels, h, w = model(x).shape
        padded = nn.Sequential(*model, nn.Conv2d(channels, 9, 3, padding=1), nn.ReLU()).eval()
        assert_matches(run_fused(padded, x), padded, x)
        head = nn.Sequential(*model, nn.Flatten(), nn.Linear(channels * h * w, 13), nn.ReLU()).eval()
        assert_matches(run_fused(head, x), head, x)


@each_isa
@pytest.mark.parametrize(
    "shape, pool",
    [
        ((2, 20, 56, 56), nn.AdaptiveAvgPool2d(1)),
        ((1, 3, 1, 4000), nn.AdaptiveAvgPool2d(1)),
        ((1, 3, 4000, 1), nn.AdaptiveAvgPool2d((2, 1))),
        ((1, 2, 300, 300), nn.AvgPool2d(299, 1)),
        ((2, 5, 40, 40), nn.AvgPool2d(9, 1, 4)),
    ],
    ids=str,
)
def test_long_sums_keep_their_digits(
    shape: tuple[int, ...], pool: nn.Module, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of numbers of one sign, where what is lost at each addition adds up."""
    use_kernels(monkeypatch, isa)
    model = nn.Sequential(nn.MaxPool2d(1), pool).eval()
    for x in (torch.rand(shape), torch.randn(shape) + 10):
        for given in (x, x.to(memory_format=torch.channels_last)):
            assert_matches(run_fused(model, given), model, given)
            exact = model(given.double())
            assert ((run_fused(model, given).double() - exact) / exact).abs().max() < 8 * torch.finfo(torch.float32).eps


@each_isa
@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((5, 4))], ids=str
)
def test_bits_do_not_depend_on_batch_threads_and_layout(
    pool: nn.Module, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernels(monkeypatch, isa)
    for layers in ([nn.MaxPool2d(1), pool], [nn.Conv2d(18, 35, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(35, 4, 1)]):
        assert_same_bits_however_called(fastseq.optimize(nn.Sequential(*layers).eval()), torch.randn(7, 18, 13, 14))


def test_large_maps_run_on_several_threads() -> None:
    """As much memory as is worth a second thread, few images and many."""
    model = nn.Sequential(nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(20)).eval()
    fused = fastseq.optimize(model)
    for batch in (1, 2, 9):
        x = torch.randn(batch, 33, 112, 113)
        assert_matches(run_on_threads(fused, x), model, x)


@pytest.mark.parametrize("name", ["avgpool2d", "maxpool2d"])
def test_report_names_the_kernels(name: str) -> None:
    layers = {"avgpool2d": [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)], "maxpool2d": [nn.AdaptiveMaxPool2d(2)]}[name]
    fused = fastseq.optimize(nn.Sequential(*layers).eval())
    with torch.no_grad():
        fused(torch.randn(1, 3, 8, 8))
    assert all(kernel.startswith(f"{name}_f32__") for kernel in kernels_used(fused))


def test_attributes_count_at_the_next_call() -> None:
    model = nn.Sequential(nn.AvgPool2d(2, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(3)).eval()
    fused, x = fastseq.optimize(model), torch.randn(2, 5, 12, 13)
    changes = [
        (0, "kernel_size", 3),
        (0, "stride", 1),
        (0, "padding", 0),
        (0, "ceil_mode", True),
        (0, "padding", 1),
        (0, "count_include_pad", False),
        (0, "divisor_override", 5),
        (0, "stride", None),
        (2, "output_size", (2, None)),
        (3, "output_size", 1),
    ]
    for index, name, value in changes:
        for changed in (model, fused):
            setattr(changed[index], name, value)
        with torch.no_grad():
            actual = fused(x)
        assert_matches(actual, model, x)
    assert not fastseq.stats(fused)["fallbacks"]


REJECTED = {
    "window larger than the image": (nn.AvgPool2d(5), (1, 2, 4, 9)),
    "padding more than half the window": (nn.AvgPool2d(2, padding=2), (1, 2, 8, 8)),
    "stride 0": (nn.AvgPool2d(2, stride=(0, 1)), (1, 2, 8, 8)),
    "divisor 0": (nn.AvgPool2d(2, divisor_override=0), (1, 2, 8, 8)),
    "rank 2": (nn.AvgPool2d(2), (8, 8)),
    "rank 5": (nn.AvgPool2d(2), (1, 1, 2, 8, 8)),
    "adaptive, negative size": (nn.AdaptiveAvgPool2d(-1), (1, 2, 8, 8)),
    "adaptive, three sizes": (nn.AdaptiveAvgPool2d((1, 2, 3)), (1, 2, 8, 8)),
    "adaptive, rank 2": (nn.AdaptiveAvgPool2d(2), (8, 8)),
    "adaptive maximum, rank 5": (nn.AdaptiveMaxPool2d(2), (1, 1, 2, 8, 8)),
}


@pytest.mark.parametrize("behind_conv", [False, True], ids=["alone", "behind a convolution"])
@pytest.mark.parametrize("pool, shape", REJECTED.values(), ids=list(REJECTED))
def test_errors_are_eager_s(pool: nn.Module, shape: tuple[int, ...], behind_conv: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), pool) if behind_conv else nn.Sequential(pool)
    assert_eagers_error(model, torch.randn(shape))


@each_adaptive
def test_an_empty_output_is_eager_s(kind: type[nn.Module]) -> None:
    fused, x = fastseq.optimize(nn.Sequential(nn.Conv2d(2, 3, 1), kind((0, 2))).eval()), torch.randn(2, 2, 5, 5)
    with torch.no_grad():
        assert fused(x).shape == (2, 3, 0, 2)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.relu(self.conv(x)), 2)
        x = F.avg_pool2d(x, kernel_size=3, stride=2, padding=1, count_include_pad=False)
        x = F.adaptive_max_pool2d(x, (None, 3))
        x = F.adaptive_avg_pool2d(x, (2, 2))
        return self.head(torch.flatten(x, 1))


def test_functional_forms() -> None:
    model = Functional().eval()
    x = torch.randn(2, 3, 24, 25)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        assert_matches(fused(x), model, x)
    assert fastseq.stats(fused) == {"fused_calls": 1, "eager_calls": 0, "fallbacks": {}}
