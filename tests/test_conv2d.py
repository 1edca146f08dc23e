"""Conv2d: a pseudo-random sweep over its parameters with integers, where the result is exact; formats; errors."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from helpers import (
    ISAS,
    assert_eagers_error,
    check_run,
    integer_model,
    integers,
    one_thread,  # noqa: F401
    run_fused,
    use_kernels,
)
from torch import Tensor, nn

import fastseq
from fastseq.testing import assert_matches

# Eager's own, about its copy of the input for an even kernel.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

IN_CHANNELS = (1, 2, 3, 4, 7, 8, 16, 17, 20, 33)
OUT_CHANNELS = (1, 7, 8, 9, 15, 16, 17, 24, 30, 33, 64, 65)
KERNELS = (1, 2, 3, 5, 7, 11, (3, 5))
STRIDES = (1, 2, 3, (2, 1))
PADDINGS = (0, 1, 2, "same", "valid", (1, 0))
EXTRA = (0, 0, 1, 2, 4, 6, 10, 12)  # beyond the smallest legal height or width


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def smallest(kernel: int | tuple[int, int], padding: int | str | tuple[int, int]) -> tuple[int, int]:
    """The smallest image that the kernel fits into."""
    if padding == "same":
        return 1, 1
    pads = (0, 0) if isinstance(padding, str) else pair(padding)
    h, w = (max(1, k - 2 * p) for k, p in zip(pair(kernel), pads, strict=True))
    return h, w


@dataclass(frozen=True)
class Case:
    c_in: int
    c_out: int
    kernel: int | tuple[int, int]
    stride: int | tuple[int, int]
    padding: int | str | tuple[int, int]
    size: tuple[int, int]
    batch: int
    has_bias: bool
    has_relu: bool
    is_channels_last: bool
    isa: str

    def __str__(self) -> str:
        flags = [("bias", self.has_bias), ("relu", self.has_relu), ("nhwc", self.is_channels_last)]
        return (
            f"{self.batch}x{self.c_in}x{self.size[0]}x{self.size[1]} to {self.c_out} k{self.kernel} s{self.stride} "
            f"p{self.padding} {self.isa} " + " ".join(name for name, is_on in flags if is_on)
        ).replace(", ", ",")

    def layers(self) -> list[nn.Module]:
        conv = nn.Conv2d(self.c_in, self.c_out, self.kernel, self.stride, self.padding, bias=self.has_bias)
        return [conv, nn.ReLU()] if self.has_relu else [conv]

    def input(self) -> Tensor:
        x = integers(self.batch, self.c_in, *self.size)
        return x.to(memory_format=torch.channels_last) if self.is_channels_last else x


def sample(count: int, seed: int) -> list[Case]:
    """Every parameter takes each of its values about equally often, in combinations that are new for each case."""
    choose = random.Random(seed)
    cases = []
    for i in range(count):
        kernel, padding = choose.choice(KERNELS), choose.choice(PADDINGS)
        h, w = smallest(kernel, padding)
        cases.append(
            Case(
                c_in=choose.choice(IN_CHANNELS),
                c_out=choose.choice(OUT_CHANNELS),
                kernel=kernel,
                stride=1 if padding == "same" else choose.choice(STRIDES),
                padding=padding,
                size=(h + choose.choice(EXTRA), w + choose.choice(EXTRA)),
                batch=choose.choice((1, 1, 2, 3)),
                has_bias=choose.random() < 0.7,
                has_relu=choose.random() < 0.5,
                is_channels_last=choose.random() < 0.3,
                isa=ISAS[i % len(ISAS)],
            )
        )
    return cases


@pytest.mark.parametrize("case", sample(400, seed=1), ids=str)
def test_exact(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, case.isa)
    model, x = integer_model(*case.layers()), case.input()
    check_run(model, x)


@pytest.mark.parametrize("case", sample(60, seed=2), ids=str)
def test_flatten_and_linear_behind(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Linear reads the convolution's pixels channel by channel, though they lie pixel by pixel."""
    use_kernels(monkeypatch, case.isa)
    x = case.input().clamp(-1, 1)
    with torch.no_grad():
        features = nn.Sequential(*case.layers(), nn.Flatten())(x).shape[1]
    for free in ([], [nn.Dropout(), nn.Identity()]):
        layers = [*case.layers(), nn.Flatten(), *free, nn.Linear(features, 11), nn.ReLU()]
        model = integer_model(*layers, limit=2)
        check_run(model, x)


@pytest.mark.parametrize("first, second", list(zip(sample(60, seed=3), sample(60, seed=4), strict=True)), ids=str)
def test_two_convolutions(first: Case, second: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first writes into the middle of a map whose border the second reads as zeros."""
    use_kernels(monkeypatch, first.isa)
    h, w = smallest(second.kernel, second.padding)
    middle = nn.Conv2d(first.c_in, second.c_in, 3, padding=(1 + h // 2, 1 + w // 2))
    relu = [nn.ReLU()] if first.has_relu else []
    model = integer_model(middle, *relu, *second.layers(), limit=2)
    x = first.input().clamp(-1, 1)
    check_run(model, x)


@pytest.mark.parametrize("case", sample(60, seed=5), ids=str)
def test_error_is_that_of_float32(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, case.isa)
    model = nn.Sequential(*case.layers()).eval()
    x = torch.randn_like(case.input())
    assert_matches(run_fused(model, x), model, x)


def test_the_samples_cover_every_value() -> None:
    cases = sample(400, seed=1)
    for name, values in [
        ("c_in", IN_CHANNELS),
        ("c_out", OUT_CHANNELS),
        ("kernel", KERNELS),
        ("stride", STRIDES),
        ("padding", PADDINGS),
        ("isa", ISAS),
    ]:
        assert {getattr(case, name) for case in cases} == set(values), name
    assert any(case.size == smallest(case.kernel, case.padding) for case in cases)


@pytest.mark.parametrize("c_in", [33, 60, 130])
def test_weights_larger_than_the_cache(c_in: int) -> None:
    """More than 256 KiB of weights are walked panel by panel, not block by block; long sums are taken in parts."""
    model = integer_model(nn.Conv2d(c_in, 130, 5, padding=2), nn.ReLU(), limit=2)
    x = integers(2, c_in, 15, 11, limit=2)
    check_run(model, x)


@pytest.mark.parametrize("width", [14, 16, 18])
@pytest.mark.parametrize("pool", [[], [nn.MaxPool2d(2)], [nn.MaxPool2d(3, 2)]], ids=["", "2x2/2", "3x3/2"])
def test_rows_of_a_page(width: int, pool: list[nn.Module]) -> None:
    """Maps whose rows take 4 KiB, with and without the border, keep them a little further apart."""
    model = integer_model(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), *pool, limit=1)
    x = integers(2, 3, 7, width, limit=1)
    check_run(model, x)


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (97, 2), (2, 97), (64, 66)])
def test_long_and_narrow_images(size: tuple[int, int]) -> None:
    """Rows longer than a block of pixels, and rows so short that many share one."""
    model = integer_model(nn.Conv2d(3, 17, 3, padding=1), nn.ReLU())
    x = integers(2, 3, *size)
    check_run(model, x)


# Memory formats ---------------------------------------------------------------------------------------------------

IMAGES = {"many": (2, 5, 9, 7), "one channel": (2, 1, 9, 7), "one image": (1, 5, 9, 7), "one pixel": (3, 5, 1, 1)}


@pytest.mark.parametrize("shape", IMAGES.values(), ids=list(IMAGES))
@pytest.mark.parametrize("c_out", [1, 6, 16])
@pytest.mark.parametrize("x_format, weight_format", list(product(["nchw", "nhwc"], repeat=2)))
def test_result_has_eager_strides(shape: tuple[int, ...], c_out: int, x_format: str, weight_format: str) -> None:
    formats = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
    behind = ([], [nn.ReLU()], [nn.ReLU(inplace=True)], [nn.MaxPool2d(1)], [nn.ReLU(), nn.MaxPool2d(1)], [nn.Flatten()])
    for kernel, layers in product((1, 3), behind):
        conv = nn.Conv2d(shape[1], c_out, kernel, padding=kernel // 2)
        model = integer_model(conv, *layers).to(memory_format=formats[weight_format])
        x = integers(*shape).to(memory_format=formats[x_format])
        check_run(model, x)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("c_in", [1, 3, 60, 600])
def test_bits_do_not_depend_on_the_format(c_in: int, padding: int) -> None:
    """Long sums are taken in parts that end at the same places however the input lies in memory."""
    model = nn.Sequential(nn.Conv2d(c_in, 9, 3, padding=padding), nn.ReLU()).eval()
    x = torch.randn(2, c_in, 7, 8)
    assert torch.equal(run_fused(model, x.to(memory_format=torch.channels_last)), run_fused(model, x))


VIEWS = {
    "cropped": lambda x: x[:, :, 1:-2, 2:-1],
    "every second pixel": lambda x: x[:, :, ::2, ::2],
    "every second image": lambda x: x[::2],
    "channels reversed in memory": lambda x: x.flip(1)[:, 1:],
    "height and width exchanged": lambda x: x.transpose(2, 3),
    "one image for all": lambda x: x[:1].expand(4, -1, -1, -1),
    "one value for all": lambda x: x[:1, :1, :1, :1].expand(2, 4, 5, 6),
    "image dimension last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("is_channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
def test_views(view: Callable[[Tensor], Tensor], is_channels_last: bool) -> None:
    x = integers(4, 4, 11, 13)
    x = view(x.to(memory_format=torch.channels_last) if is_channels_last else x)
    model = integer_model(nn.Conv2d(x.shape[1], 9, 3, padding=1), nn.ReLU())
    check_run(model, x)


@pytest.mark.parametrize("weight", [lambda w: w.flip(0), lambda w: w.transpose(2, 3), lambda w: w.permute(1, 0, 2, 3)])
def test_weights_in_other_orders(weight: Callable[[Tensor], Tensor]) -> None:
    """A parameter that is dense in some order of its dimensions is read as what it means."""
    model = integer_model(nn.Conv2d(6, 6, 3), nn.ReLU())
    model[0].weight = nn.Parameter(weight(model[0].weight.detach().clone()))
    x = integers(2, 6, 8, 9)
    check_run(model, x)


def test_unbatched() -> None:
    model = integer_model(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2))
    x = integers(3, 9, 9)
    check_run(model, x)


# What eager rejects ------------------------------------------------------------------------------------------------

REJECTED = {
    "channels": (lambda: nn.Conv2d(3, 4, 3), (2, 4, 8, 8)),
    "kernel larger than the image": (lambda: nn.Conv2d(3, 4, 5), (2, 3, 4, 9)),
    "rank 2": (lambda: nn.Conv2d(3, 4, 3), (3, 8)),
    "rank 5": (lambda: nn.Conv2d(3, 4, 3), (1, 2, 3, 8, 8)),
}


@pytest.mark.parametrize("layer, shape", REJECTED.values(), ids=list(REJECTED))
def test_errors_are_eager_s(layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = nn.Sequential(layer(), nn.ReLU()).eval()
    assert_eagers_error(model, torch.randn(shape))


@pytest.mark.parametrize("name, value", [("stride", (0, 1)), ("stride", (-1, 1)), ("padding", (-1, 0))])
def test_attributes_that_eager_rejects(name: str, value: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    setattr(model[0], name, value)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        with pytest.raises(RuntimeError) as expected:
            model(x)
        with pytest.raises(RuntimeError) as found:
            fastseq.optimize(model)(x)
    assert str(found.value) == str(expected.value)


def test_empty_batch_gives_an_empty_result() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    x = torch.empty(0, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        actual = fastseq.optimize(model)(x)
    assert (actual.shape, actual.stride()) == (expected.shape, expected.stride())
