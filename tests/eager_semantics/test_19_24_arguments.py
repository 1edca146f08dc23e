"""Behaviours 19 to 24: arguments of convolutions and pools, dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from behaviour import assert_declined, assert_eager_outcome, assert_fast, one_thread, reasons  # noqa: F401
from dropin import as_plain, assert_same_outcome, call, eager, fused, images
from helpers import assert_exact, check_run, integer_model, integers, run_fused
from torch import nn

import fastseq

NAN, INF = float("nan"), float("inf")
LAST = torch.channels_last


# 19: padding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [1, (2, 1), "same"])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_19_other_padding_modes_pad_before_the_convolution(mode: str, padding: Any) -> None:
    """`F.pad` first, then a convolution without padding; 'same' pads one more behind than before an even kernel."""
    for kernel in (3, (4, 1), (2, 4)):
        model, x = integer_model(nn.Conv2d(3, 4, kernel, padding=padding, padding_mode=mode)), integers(2, 3, 9, 8)
        check_run(model, x)
    assert fastseq.optimize(model)[0].padding == model[0].padding


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, (4, 1), (2, 5), (6, 4)])
@pytest.mark.parametrize("behind", [[], [nn.ReLU()], [nn.ReLU(), nn.MaxPool2d(2)]], ids=["conv", "relu", "pool"])
def test_19_same_padding_is_asymmetric_for_even_kernels(kernel: Any, behind: list[nn.Module]) -> None:
    """A kernel of 4 is given one zero before and two behind; `conv.padding` stays the string."""
    model, x = integer_model(nn.Conv2d(2, 3, kernel, padding="same"), *behind), integers(2, 2, 7, 6)
    assert_exact(run_fused(model, x), model, x)
    assert fastseq.optimize(model)[0].padding == "same"


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_19_where_the_zeros_of_same_go() -> None:
    """A kernel of 4 ones over ones counts the pixels that are no padding: 3 at the front, 2 at the back."""
    model = nn.Sequential(nn.Conv2d(1, 1, (1, 4), padding="same", bias=False))
    nn.init.ones_(model[0].weight)
    assert run_fused(model, torch.ones(1, 1, 1, 6)).flatten().tolist() == [3, 4, 4, 4, 3, 2]


def test_19_valid_and_impossible_strings() -> None:
    model, x = integer_model(nn.Conv2d(2, 3, 3, padding="valid", stride=2), nn.ReLU()), integers(2, 2, 9, 8)
    assert_exact(run_fused(model, x), model, x)
    assert fastseq.optimize(model)[0].padding == "valid"
    for arguments in ({"padding": "same", "stride": 2}, {"padding": "full"}):
        with pytest.raises(ValueError):
            nn.Conv2d(2, 3, 3, **arguments)  # type: ignore[arg-type]
    # Given later, the call raises eager's error.
    fast = fastseq.optimize(nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.ReLU()))
    with torch.no_grad():
        fast(images())
        fast[0].stride = (2, 2)
        assert assert_same_outcome(fast, images()).error is RuntimeError
        fast[0].stride, fast[0].padding = (1, 1), "full"
        assert assert_same_outcome(fast, images()).error is not None


# 20: arguments of convolutions, and its errors ----------------------------------------------------------------------

CONVOLUTIONS: dict[str, tuple[Any, ...]] = {
    # arguments of Conv2d, size of the image
    "stride": ((3, 5, 3), {"stride": 2}, (9, 8)),
    "strides": ((3, 5, 3), {"stride": (1, 3)}, (9, 8)),
    "stride beyond the kernel": ((3, 5, 2), {"stride": 4}, (9, 8)),
    "rectangular": ((3, 5, (1, 4)), {}, (9, 8)),
    "tall": ((3, 5, (5, 1)), {"padding": (2, 0)}, (9, 8)),
    "no bias": ((3, 5, 3), {"bias": False}, (9, 8)),
    "1x1": ((3, 5, 1), {}, (9, 8)),
    "1x1 padded": ((3, 5, 1), {"padding": 2, "stride": 2}, (9, 8)),
    "kernel is the image": ((3, 5, (9, 8)), {}, (9, 8)),
    "kernel is the padded image": ((3, 5, (11, 12)), {"padding": (1, 2)}, (9, 8)),
    "padding beyond the kernel": ((3, 5, 3), {"padding": 5}, (9, 8)),
    "one pixel": ((3, 5, 3), {"padding": 1}, (1, 1)),
    "one channel": ((1, 1, 3), {}, (9, 8)),
    "groups": ((3, 6, 3), {"groups": 3}, (12, 12)),
    "depthwise": ((3, 3, 3), {"groups": 3, "padding": 1, "bias": False}, (12, 12)),
    "dilation": ((3, 4, 3), {"dilation": 2}, (12, 12)),
    "dilation of two kinds": ((3, 4, (3, 1)), {"dilation": (1, 3), "padding": 2}, (12, 12)),
}


@pytest.mark.parametrize("tail", [[], [nn.ReLU()], [nn.ReLU(inplace=True), nn.MaxPool2d(1)]], ids=["", "relu", "pool"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_20_convolutions_that_are_fused(name: str, tail: list[nn.Module]) -> None:
    arguments, options, size = CONVOLUTIONS[name]
    model, x = integer_model(nn.Conv2d(*arguments, **options), *tail), integers(2, arguments[0], *size)
    for order in (x, x.to(memory_format=LAST)):
        check_run(model, order)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.ConvTranspose2d(3, 4, 3), "no fused kernel for ConvTranspose2d"),
    ],
)
def test_20_convolutions_that_stay_eager(layer: Callable[[], nn.Module], reason: str) -> None:
    assert_declined(layer(), images(), reason)


WRONG: dict[str, tuple[tuple[int, ...], str]] = {
    "kernel larger than the image": ((2, 3, 2, 12), "Kernel size can't be greater than actual input size"),
    "wrong channels": ((2, 4, 12, 12), "to have 3 channels, but got 4 channels instead"),
    "wrong channels of one image": ((2, 12, 12), "expected input"),
    "2-D": ((12, 12), "Expected 3D (unbatched) or 4D (batched) input"),
    "5-D": ((1, 2, 3, 12, 12), "Expected 3D (unbatched) or 4D (batched) input"),
    "0-D": ((), "Expected 3D (unbatched) or 4D (batched) input"),
}


@pytest.mark.parametrize("tail", [[], [nn.ReLU(), nn.MaxPool2d(2)]], ids=["conv", "conv relu pool"])
@pytest.mark.parametrize("name", WRONG)
def test_20_what_eager_rejects_raises_eagers_words(name: str, tail: list[nn.Module]) -> None:
    shape, words = WRONG[name]
    fast = fastseq.optimize(nn.Sequential(nn.Conv2d(3, 4, 3), *tail))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = assert_same_outcome(fast, torch.randn(shape))
            assert expected.error is RuntimeError and words in expected.text
    # and is of no consequence
    with torch.no_grad():
        assert call(fast, images())[1] == fused()


# 21: pools ----------------------------------------------------------------------------------------------------------

POOLS: dict[str, tuple[nn.MaxPool2d, tuple[int, int], tuple[int, int]]] = {
    # the pool, the image's size, the result's
    "stride is the kernel": (nn.MaxPool2d(3), (10, 9), (3, 3)),
    "tuples": (nn.MaxPool2d((2, 3), (1, 2), (1, 0)), (7, 8), (8, 3)),
    "2x2 of 7": (nn.MaxPool2d(2), (7, 7), (3, 3)),
    "2x2 of 7, ceil": (nn.MaxPool2d(2, ceil_mode=True), (7, 7), (4, 4)),
    "k2 s3 p1 of 7": (nn.MaxPool2d(2, 3, 1), (7, 7), (3, 3)),
    "k2 s3 p1 of 7, ceil": (nn.MaxPool2d(2, 3, 1, ceil_mode=True), (7, 7), (3, 3)),
    "k3 s2 p1, ceil": (nn.MaxPool2d(3, 2, 1, ceil_mode=True), (8, 9), (5, 5)),
    "gaps": (nn.MaxPool2d(2, 4), (11, 10), (3, 3)),
    "overlaps": (nn.MaxPool2d(5, 1, 2), (7, 6), (7, 6)),
    "window is the image": (nn.MaxPool2d((7, 6)), (7, 6), (1, 1)),
    "window beyond the image, padded": (nn.MaxPool2d(9, 1, 4), (3, 3), (3, 3)),
}


@pytest.mark.parametrize("place", ["alone", "behind conv relu", "behind conv", "before relu"])
@pytest.mark.parametrize("name", POOLS)
def test_21_pools_of_all_kinds(name: str, place: str) -> None:
    """No stride means the kernel's size; in ceil mode no window begins in the padding on the right."""
    pool, size, result = POOLS[name]
    heads = {"alone": [], "behind conv relu": [nn.Conv2d(2, 3, 1), nn.ReLU()]}
    layers = [*heads.get(place, [nn.Conv2d(2, 3, 1)]), pool, *([nn.ReLU()] if place == "before relu" else [])]
    model, x = integer_model(*layers), integers(2, 2, *size)
    actual = run_fused(model, x)
    assert_exact(actual, model, x)
    assert actual.shape[2:] == result


@pytest.mark.parametrize("head", [[], [nn.Conv2d(1, 1, 1)], [nn.Conv2d(1, 1, 1), nn.ReLU()]])
def test_21_padding_of_a_pool_is_minus_infinity(head: list[nn.Module]) -> None:
    """The maximum of -5 and padding is -5, not 0."""
    model, x = nn.Sequential(*head, nn.MaxPool2d(3, 2, 1)), torch.full((1, 1, 4, 4), -5.0)
    for layer in head[:1]:
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert (run_fused(model, x) == (-5 if len(head) < 2 else 0)).all()
    x[:] = -INF
    if not head:
        assert (run_fused(model, x) == -INF).all()


def test_21_dilated_pools() -> None:
    for pool in (nn.MaxPool2d(2, dilation=2), nn.MaxPool2d(3, 1, 1, dilation=(2, 1)), nn.MaxPool2d(2, 1, 1, 3)):
        assert_fast(nn.Sequential(pool), images())
        assert_fast(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pool), images())


WRONG_POOLS: dict[str, tuple[Callable[[], nn.MaxPool2d], tuple[int, ...], str]] = {
    "padding": (lambda: nn.MaxPool2d(2, 2, 2), (1, 2, 8, 8), "pad should be at most half of effective kernel size"),
    "padding of 3": (
        lambda: nn.MaxPool2d(3, 2, 2),
        (1, 2, 8, 8),
        "pad should be at most half of effective kernel size",
    ),
    "no output": (lambda: nn.MaxPool2d(3), (1, 2, 2, 8), "Output size is too small"),
    "window": (lambda: nn.MaxPool2d(9, 1, 0), (1, 2, 8, 8), "Output size is too small"),
    "2-D": (lambda: nn.MaxPool2d(2), (8, 8), "3D or 4D"),
    "stride": (lambda: nn.MaxPool2d(2, 0), (1, 2, 8, 8), "stride should not be zero"),
    "kernel": (lambda: nn.MaxPool2d(0, 1), (1, 2, 8, 8), "kernel size should be greater than zero"),
}


@pytest.mark.parametrize("head", ["alone", "behind a convolution"])
@pytest.mark.parametrize("name", WRONG_POOLS)
def test_21_pools_that_eager_rejects(name: str, head: str) -> None:
    make, shape, words = WRONG_POOLS[name]
    fast = fastseq.optimize(nn.Sequential(*([nn.Conv2d(2, 2, 1)] if head != "alone" and name != "2-D" else []), make()))
    with torch.no_grad():
        expected = assert_same_outcome(fast, torch.randn(shape))
    assert expected.error is not None and (words in expected.text or head != "alone")


# 22: indices --------------------------------------------------------------------------------------------------------


def test_22_indices_make_a_tuple_and_the_next_layer_raises() -> None:
    fast, x = (
        fastseq.optimize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2, return_indices=True))),
        images(),
    )
    with torch.no_grad():
        expected = eager(fast, x)
        actual, counters = call(fast, x)
        assert type(actual) is tuple and len(actual) == 2 and counters["fused_calls"] == 1
        assert "return_indices" in reasons(fast)
        torch.testing.assert_close(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1]) and actual[1].dtype is torch.int64
        for tail in (nn.ReLU(), nn.Linear(5, 2), nn.Conv2d(4, 2, 1)):
            fast.append(tail)
            result = assert_same_outcome(fast, x)
            assert result.error is TypeError and "tuple" in result.text
            del fast[-1]


def test_22_which_index_wins() -> None:
    """The first of equal values; the last NaN; 0 where all are -inf."""
    fast = fastseq.optimize(nn.Sequential(nn.MaxPool2d(1), nn.MaxPool2d(2, return_indices=True)))
    for window, index in (
        ([1.0, 3.0, 3.0, 2.0], 1),
        ([NAN, 5.0, NAN, 1.0], 2),
        ([1.0, NAN, 2.0, NAN], 3),
        ([-INF, -INF, -INF, -INF], 0),
        ([-0.0, 0.0, 0.0, -0.0], 0),
    ):
        with torch.no_grad():
            values, indices = fast(torch.tensor(window).view(1, 1, 2, 2))
            assert indices.item() == index
            with as_plain(fast):
                torch.testing.assert_close(
                    (values, indices), fast(torch.tensor(window).view(1, 1, 2, 2)), equal_nan=True
                )


# 23, 24: dtypes -----------------------------------------------------------------------------------------------------

DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layers", ["pool", "pool relu", "conv", "conv of the dtype", "linear", "linear of the dtype"])
@pytest.mark.filterwarnings("ignore")
def test_23_each_layer_takes_the_dtypes_that_eagers_takes(layers: str, dtype: torch.dtype) -> None:
    """Pools take integers, ReLU too; ReLU rejects bool and complex; a complex convolution works. No silent cast."""
    model = {
        "pool": lambda: [nn.MaxPool2d(2)],
        "pool relu": lambda: [nn.MaxPool2d(2), nn.ReLU()],
        "conv": lambda: [nn.Conv2d(3, 4, 3)],
        "linear": lambda: [nn.Linear(12, 4), nn.ReLU()],
        "conv of the dtype": lambda: [nn.Conv2d(3, 4, 3)],
        "linear of the dtype": lambda: [nn.Linear(12, 4)],
    }[layers]()
    fast, x = fastseq.optimize(nn.Sequential(*model)), (images() * 3).to(dtype)
    if "of the dtype" in layers:
        if not (dtype.is_floating_point or dtype.is_complex):
            for parameter in fast.parameters():
                parameter.requires_grad_(False)
                parameter.data = parameter.data.to(dtype)
        else:
            fast.to(dtype)
    with torch.no_grad():
        takes = torch.float32, torch.bfloat16, torch.float16
        if dtype is torch.float32 or (dtype in takes and ("pool" in layers or "of the dtype" in layers)):
            assert_fast(fast, x, runs=1)
            assert call(fast, x)[1]["fused_calls"] == 1
        else:
            reason = (
                "a parameter has another dtype" if dtype in takes else "the input is not float32, float16 or bfloat16"
            )
            expected = assert_eager_outcome(fast, x, reason)
            works = {"pool": not dtype.is_complex and dtype is not torch.bool, "conv": False, "linear": False}
            if layers in works and "8" not in str(dtype):
                assert (expected.error is None) == works[layers]


MIXED: dict[str, tuple[Callable[[nn.Sequential], Any], torch.dtype]] = {
    "double input": (lambda m: m, torch.float64),
    "half input": (lambda m: m, torch.float16),
    "bfloat16 input": (lambda m: m, torch.bfloat16),
    "double model": (lambda m: m.double(), torch.float32),
    "bfloat16 model": (lambda m: m.bfloat16(), torch.float32),
    "half model": (lambda m: m.half(), torch.float32),
    "double bias": (lambda m: setattr(m[0], "bias", nn.Parameter(m[0].bias.detach().double())), torch.float32),
    "double weight": (lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().double())), torch.float32),
    "half bias": (lambda m: setattr(m[0], "bias", nn.Parameter(m[0].bias.detach().half())), torch.float32),
    "double second layer": (lambda m: m[2].double(), torch.float32),
}


@pytest.mark.parametrize("when", ["before optimize", "after a call"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("name", MIXED)
def test_24_mixed_dtypes_raise_eagers_words(name: str, kind: str, when: str) -> None:
    """Nothing is cast silently: input, weight and bias are of one dtype, or the call raises as eager does."""
    change, dtype = MIXED[name]
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)]
    model = nn.Sequential(*(layers if kind == "conv" else [nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)]))
    x = images()
    if when == "before optimize":
        change(model)
        fast = fastseq.optimize(model)
    else:
        fast = fastseq.optimize(model)
        with torch.no_grad():
            assert call(fast, x)[1] == fused()
        change(fast)
    with torch.no_grad():
        expected = assert_same_outcome(fast, x.to(dtype))
        assert expected.error is RuntimeError and expected.text
        fast.float()
        assert call(fast, x)[1]["fused_calls"] == 1
