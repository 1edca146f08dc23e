"""MaxPool2d by itself and behind a convolution: every way a window can lie, with integers: the result is exact."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, product
from typing import NamedTuple

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
from torch import nn


class Pool(NamedTuple):
    kernel: int | tuple[int, int]
    stride: int | tuple[int, int]
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1


POOLS = {
    "2x2/2": Pool(2, 2),  # inside the register tile where its windows tile the image
    "2x2/2 padded": Pool(2, 2, 1),
    "2x2/1": Pool(2, 1),
    "2x2/3, gaps between the windows": Pool(2, 3),
    "3x3/2": Pool(3, 2),
    "3x3/2 padded": Pool(3, 2, 1),
    "3x3/1 padded": Pool(3, 1, 1),
    "3x2/3x2": Pool((3, 2), (3, 2)),
    "2x3/1x2 padded": Pool((2, 3), (1, 2), (1, 0)),
    "5x5/3 padded": Pool(5, 3, 2),
    "1x1/1": Pool(1, 1),
    "1x1/2": Pool(1, 2),
    "4x1/2x5": Pool((4, 1), (2, 5)),
    "2x2/2 dilated": Pool(2, 2, 0, 2),
    "3x3/2 padded and dilated": Pool(3, 2, 1, (2, 1)),
    "2x3/1 padded and dilated": Pool((2, 3), 1, (0, 1), (3, 2)),
}
# What is before the pool: the smallest sizes, odd ones whose last window hangs over with ceil_mode, a prime.
SIZES = ((1, 1), (2, 3), (4, 4), (5, 6), (7, 7), (8, 9), (13, 11))
ORDERS: dict[str, Callable[[nn.Module, nn.Module], list[nn.Module]]] = {
    "alone": lambda conv, pool: [pool],
    "conv": lambda conv, pool: [conv, pool],
    "conv, relu": lambda conv, pool: [conv, nn.ReLU(), pool],
    "conv, pool, relu": lambda conv, pool: [conv, pool, nn.ReLU()],
}

each_pool = pytest.mark.parametrize("pool", POOLS.values(), ids=list(POOLS))
each_order = pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
each_isa = pytest.mark.parametrize("isa", ISAS)
ceil_or_floor = pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])


def fits(pool: Pool, size: tuple[int, int], ceil_mode: bool) -> bool:
    """Whether eager accepts an image of this size."""
    with torch.device("meta"):
        try:
            nn.MaxPool2d(*pool, ceil_mode=ceil_mode)(torch.empty(1, 1, *size))
        except RuntimeError:
            return False
    return True


@each_isa
@each_order
@ceil_or_floor
@each_pool
def test_exact(pool: Pool, ceil_mode: bool, order: Callable, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    sizes = [size for size in SIZES if fits(pool, size, ceil_mode)]
    assert len(sizes) >= (4 if pool.dilation == 1 else 3)
    if isa != ISAS[0]:
        sizes = sizes[-3:]  # where the windows lie is decided above the kernels
    for size, channels in zip(sizes, cycle((3, 17)), strict=False):
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        model = integer_model(*order(conv, nn.MaxPool2d(*pool, ceil_mode=ceil_mode)))
        x = integers(2, channels, *size)
        check_run(model, x)


@each_order
@ceil_or_floor
@each_pool
def test_channels_last(pool: Pool, ceil_mode: bool, order: Callable) -> None:
    conv = nn.Conv2d(5, 9, 2)
    model = integer_model(*order(conv, nn.MaxPool2d(*pool, ceil_mode=ceil_mode)))
    for size in ((9, 8), (6, 13)):
        x = integers(2, 5, *size).to(memory_format=torch.channels_last)
        check_run(model, x)


@ceil_or_floor
@each_pool
def test_flatten_and_linear_behind(pool: Pool, ceil_mode: bool) -> None:
    conv, last = nn.Conv2d(3, 9, 3), nn.MaxPool2d(*pool, ceil_mode=ceil_mode)
    x = integers(3, 3, 10, 13, limit=2)
    with torch.no_grad():
        features = nn.Sequential(conv, last, nn.Flatten())(x).shape[1]
    for first in ([conv, last], [conv, nn.ReLU(), last], [nn.MaxPool2d(1), conv, last]):
        model = integer_model(*first, nn.Flatten(), nn.Linear(features, 13), nn.ReLU(), limit=2)
        check_run(model, x)
    pooled = nn.Sequential(last, nn.Flatten())(x)
    model = integer_model(last, nn.Flatten(), nn.Linear(pooled.shape[1], 13))
    check_run(model, x)


@each_isa
@pytest.mark.parametrize("first, second", list(product(["2x2/2", "3x3/2 padded", "2x2/1"], repeat=2)))
def test_pooled_stages_in_a_row(first: str, second: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool writes into the middle of the map whose border the next convolution reads as zeros."""
    use_kernels(monkeypatch, isa)
    model = integer_model(
        nn.Conv2d(2, 9, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(*POOLS[first]),
        nn.Conv2d(9, 17, (3, 5), padding=(2, 1)),
        nn.MaxPool2d(*POOLS[second]),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        limit=2,
    )
    for size in ((12, 13), (9, 17)):
        x = integers(2, 2, *size, limit=2)
        check_run(model, x)


@each_order
@pytest.mark.parametrize("pool", [POOLS["2x2/2"], POOLS["3x3/2"], POOLS["3x3/1 padded"]], ids=str)
def test_weights_larger_than_the_cache(pool: Pool, order: Callable) -> None:
    """With more than 256 KiB of weights all rows of the convolution are made before the pool reads them."""
    model = integer_model(*order(nn.Conv2d(70, 130, 3, padding=1), nn.MaxPool2d(*pool)), limit=2)
    x = integers(2, 70, 11, 14, limit=2)
    check_run(model, x)


@each_order
def test_wide_rows(order: Callable) -> None:
    """More pixels in a row than a block holds."""
    for size in ((3, 250), (250, 3)):
        model = integer_model(*order(nn.Conv2d(3, 9, 3, padding=1), nn.MaxPool2d(2)))
        x = integers(1, 3, *size)
        check_run(model, x)


@each_pool
def test_alone_is_bitwise_eager(pool: Pool) -> None:
    """A maximum rounds nothing: random floats come back as they are."""
    model = nn.Sequential(nn.MaxPool2d(*pool)).eval()
    for x in (torch.randn(2, 19, 9, 10), torch.randn(3, 9, 10)):
        with torch.no_grad():
            assert torch.equal(run_fused(model, x), model(x))


REJECTED = {
    "window larger than the image": (nn.MaxPool2d(5), (1, 2, 4, 9)),
    "padding more than half the window": (nn.MaxPool2d(2, padding=2), (1, 2, 8, 8)),
    "stride 0": (nn.MaxPool2d(2, stride=(0, 1)), (1, 2, 8, 8)),
    "rank 2": (nn.MaxPool2d(2), (8, 8)),
    "rank 5": (nn.MaxPool2d(2), (1, 1, 2, 8, 8)),
}


@pytest.mark.parametrize("behind_conv", [False, True], ids=["alone", "behind a convolution"])
@pytest.mark.parametrize("pool, shape", REJECTED.values(), ids=list(REJECTED))
def test_errors_are_eager_s(pool: nn.MaxPool2d, shape: tuple[int, ...], behind_conv: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), pool) if behind_conv else nn.Sequential(pool)
    assert_eagers_error(model, torch.randn(shape))
