"""Strides of results are eager's, whatever the strides of inputs and weights: user code calls .view() on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from dropin import (
    as_plain,
    assert_fused,
    assert_identical,
    call,
    conv_net,
    eager,
    fused,
    images,
    one_thread,  # noqa: F401
    outcome,
    split_net,
)
from torch import Tensor, nn

import fastseq

LAST, FIRST = torch.channels_last, torch.contiguous_format


def conv(c_in: int, c_out: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, **options)


# Models for images of `c` channels; the last layer decides about the strides.
TAILS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "conv": lambda c, n: [conv(c, n)],
    "conv relu": lambda c, n: [conv(c, n), nn.ReLU()],
    "conv in-place relu": lambda c, n: [conv(c, n), nn.ReLU(inplace=True)],
    "conv pool": lambda c, n: [conv(c, n), nn.MaxPool2d(2)],
    "conv relu pool": lambda c, n: [conv(c, n), nn.ReLU(), nn.MaxPool2d(2)],
    "conv pool relu": lambda c, n: [conv(c, n), nn.MaxPool2d(2), nn.ReLU()],
    "pool": lambda c, n: [nn.MaxPool2d(2)],
    "pool pool": lambda c, n: [nn.MaxPool2d(2, 1), nn.MaxPool2d(2)],
    "pool conv": lambda c, n: [nn.MaxPool2d(2), conv(c, n)],
    "conv conv": lambda c, n: [conv(c, 4), nn.ReLU(), conv(4, n, 1)],
    "conv of one pixel": lambda c, n: [conv(c, n, 8)],
    "conv relu of one pixel": lambda c, n: [conv(c, n, 8), nn.ReLU()],
    "pool to one pixel": lambda c, n: [conv(c, n), nn.ReLU(), nn.MaxPool2d(6)],
    "pool to one pixel, then conv": lambda c, n: [nn.MaxPool2d(8), conv(c, n, 1), nn.ReLU()],
    "one pixel of one channel": lambda c, n: [conv(c, 1), nn.MaxPool2d(6), conv(1, n, 1)],
    "conv to one pixel of one channel": lambda c, n: [conv(c, 1, 8), conv(1, n, 1), nn.MaxPool2d(1)],
    "one channel": lambda c, n: [conv(c, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2), conv(1, n, 1)],
    "average": lambda c, n: [nn.AvgPool2d(3, 2, 1)],
    "conv average relu": lambda c, n: [conv(c, n), nn.AvgPool2d(2), nn.ReLU()],
    "average to one pixel, then conv": lambda c, n: [nn.AvgPool2d(8), conv(c, n, 1)],
    "global average": lambda c, n: [nn.MaxPool2d(1), nn.AdaptiveAvgPool2d(1)],
    "global average relu": lambda c, n: [nn.MaxPool2d(1), nn.AdaptiveAvgPool2d(1), nn.ReLU()],
    "conv, global average, conv": lambda c, n: [conv(c, n), nn.AdaptiveAvgPool2d((1, 1)), conv(n, 2, 1)],
    "adaptive average": lambda c, n: [nn.AdaptiveAvgPool2d((None, 3))],
    "adaptive average of one row": lambda c, n: [conv(c, n), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 4))],
    "adaptive average flatten linear": lambda c, n: [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(c * 4, 5)],
    "adaptive maximum": lambda c, n: [conv(c, n), nn.AdaptiveMaxPool2d((2, 3)), nn.SiLU()],
    "adaptive maximum of one pixel": lambda c, n: [nn.AdaptiveMaxPool2d(1), conv(c, n, 1)],
    "conv relu norm": lambda c, n: [conv(c, n), nn.ReLU(), nn.BatchNorm2d(n)],
    "norm relu pool": lambda c, n: [nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.MaxPool2d(8)],
    "pool relu norm tanh": lambda c, n: [nn.MaxPool2d(8), nn.ReLU(), nn.BatchNorm2d(c), nn.Tanh(), nn.Hardtanh()],
    "zeropad2d": lambda c, n: [nn.MaxPool2d(2), nn.ZeroPad2d((1, 0, 2, 0))],
    "constantpad2d relu": lambda c, n: [conv(c, n), nn.ConstantPad2d((0, 1, 0, 0), 1.5), nn.ReLU()],
    "constantpad2d of one pixel": lambda c, n: [nn.MaxPool2d(8), nn.ConstantPad2d((0, 0, 0, 1), 1.5)],
    "zeropad2d conv": lambda c, n: [nn.ZeroPad2d(1), conv(c, n)],
    "reflectionpad2d": lambda c, n: [conv(c, n), nn.ReflectionPad2d((1, 0, 2, 0))],
    "replicationpad2d": lambda c, n: [nn.MaxPool2d(8), nn.ReplicationPad2d((1, 0, 2, 0))],
    "circularpad2d": lambda c, n: [conv(c, n), nn.CircularPad2d((1, 0, 2, 0))],
    "padding mode": lambda c, n: [nn.Conv2d(c, n, 3, padding=1, padding_mode="reflect")],
    "padding mode circular": lambda c, n: [nn.Conv2d(c, n, 3, padding=1, padding_mode="circular"), nn.ReLU()],
    "padding mode of no pixels": lambda c, n: [nn.Conv2d(c, n, 1, padding_mode="circular"), nn.MaxPool2d(1)],
    "upsample nearest": lambda c, n: [conv(c, n), nn.Upsample(scale_factor=2)],
    "upsample bilinear": lambda c, n: [nn.MaxPool2d(8), nn.Upsample((3, 4), mode="bilinear")],
    "upsample to one pixel": lambda c, n: [conv(c, n), nn.Upsample(1), nn.ReLU()],
    "pixelshuffle": lambda c, n: [conv(c, 4 * n), nn.PixelShuffle(2)],
    "pixelshuffle of one pixel": lambda c, n: [nn.MaxPool2d(8), conv(c, 4 * n, 1), nn.PixelShuffle(2)],
    "pixelunshuffle": lambda c, n: [nn.MaxPool2d(2), nn.PixelUnshuffle(4)],
    "flatten norm": lambda c, n: [conv(c, n), nn.Flatten(), nn.ReLU(), nn.BatchNorm1d(n * 36)],
    "flatten linear unflatten": lambda c, n: [
        nn.Flatten(),
        nn.Linear(c * 64, 8),
        nn.Unflatten(1, (2, 2, 2)),
        conv(2, n, 1),
    ],
    "unflatten upsample": lambda c, n: [
        *(conv(c, 2), nn.Flatten(), nn.Linear(72, 4 * n), nn.Unflatten(1, (n, 2, 2)), nn.Upsample(scale_factor=2)),
    ],
    "circularpad2d pool": lambda c, n: [nn.CircularPad2d((1, 0, 2, 0)), nn.MaxPool2d(1), nn.ReLU()],
    "free layers": lambda c, n: [nn.Identity(), conv(c, n), nn.Dropout(), nn.ReLU(), nn.Identity()],
    "flatten": lambda c, n: [conv(c, n), nn.ReLU(), nn.Flatten()],
    "pool flatten": lambda c, n: [nn.MaxPool2d(2), nn.Flatten()],
    "flatten linear": lambda c, n: [nn.Flatten(), nn.Linear(c * 64, 5)],
    "conv flatten linear": lambda c, n: [conv(c, n), nn.ReLU(), nn.Flatten(), nn.Linear(n * 36, 5)],
    "linear": lambda c, n: [nn.Linear(8, 5), nn.ReLU()],
    "conv linear": lambda c, n: [conv(c, n), nn.Linear(6, 5), nn.ReLU()],
}

FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=LAST),
    "from NHWC": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "transposed": lambda x: x.transpose(2, 3),
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "sliced rows": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "sliced columns": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "sliced channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "sliced channels_last": lambda x: torch.cat([x, x], 1).contiguous(memory_format=LAST)[:, : x.shape[1]],
    "every other": lambda x: torch.stack([x, x], 4)[..., 0],
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "expanded channels": lambda x: x[:, :1].expand(x.shape),
    "expanded pixel": lambda x: x[:, :, :1, :1].expand(x.shape),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "unaligned": lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape),
    "odd strides of ones": lambda x: x.as_strided(
        x.shape, [s if n > 1 else 3 for n, s in zip(x.shape, x.stride(), strict=True)]
    ),
    "channels_last strides of ones": lambda x: x.as_strided(
        x.shape,
        [
            x.stride(i) if n > 1 or not x.is_contiguous() else s
            for i, (n, s) in enumerate(zip(x.shape, torch.empty(x.shape).to(memory_format=LAST).stride(), strict=True))
        ],
    ),
}


# With channels_last weights the input's format matters less.
FORMS_AND_WEIGHTS = [
    *(pytest.param(form, FIRST, id=form) for form in FORMATS),
    *(
        pytest.param(form, LAST, id=f"{form}, channels_last weights")
        for form in ("contiguous", "channels_last", "transposed", "expanded pixel", "odd strides of ones")
    ),
]


@pytest.mark.parametrize(("form", "weights"), FORMS_AND_WEIGHTS)
@pytest.mark.parametrize("tail", TAILS)
def test_strides_are_eagers(tail: str, form: str, weights: torch.memory_format) -> None:
    """Also for the sizes at which a tensor is contiguous and channels_last at once."""
    fused_calls = 0
    for batch, channels, outputs in ((1, 1, 1), (3, 1, 5), (1, 3, 1), (3, 3, 1), (3, 3, 5)):
        model = nn.Sequential(*TAILS[tail](channels, outputs)).eval().to(memory_format=weights)
        fast, x = fastseq.optimize(model), FORMATS[form](torch.randn(batch, channels, 8, 8))
        with torch.no_grad():
            expected = outcome(model, x)
            actual, counters = call(fast, x)
        fused_calls += counters["fused_calls"]
        assert expected.error is None
        describe = f"batch {batch}, {channels} to {outputs} channels, input strides {x.stride()}"
        assert actual.stride() == expected.value.stride(), describe
        torch.testing.assert_close(actual, expected.value)
        for memory_format in (FIRST, LAST):
            if actual.dim() == 4:
                assert actual.is_contiguous(memory_format=memory_format) == expected.value.is_contiguous(
                    memory_format=memory_format
                )
    # A Linear takes inputs of more than two dimensions only if they are contiguous.
    assert fused_calls >= 3 or tail == "linear", "most of these are fused"


@pytest.mark.parametrize("weights", [FIRST, LAST], ids=["contiguous weights", "channels_last weights"])
@pytest.mark.parametrize(
    "tail", [name for name in TAILS if not any(word in name for word in ("flatten", "linear", "norm", "upsample"))]
)
@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        lambda x: x.transpose(1, 2),
        lambda x: torch.cat([x, x], 2)[:, :, :8],
        lambda x: x[:1].expand(x.shape),
    ],
    ids=["contiguous", "HWC", "transposed", "sliced", "expanded"],
)
def test_unbatched(tail: str, weights: torch.memory_format, form: Callable[[Tensor], Tensor]) -> None:
    for channels, outputs in itertools.product((1, 3), (1, 5)):
        model = nn.Sequential(*TAILS[tail](channels, outputs)).eval().to(memory_format=weights)
        fast, x = fastseq.optimize(model), form(torch.randn(channels, 8, 8))
        with torch.no_grad():
            expected = model(x)
            actual, counters = call(fast, x)
        assert actual.shape == expected.shape and actual.stride() == expected.stride()
        torch.testing.assert_close(actual, expected)
        if weights is FIRST:
            assert counters == fused()


def test_unbatched_and_batched_calls_in_turn() -> None:
    fast, x = fastseq.optimize(conv_net()[:3]), images()
    for _ in range(2):
        both = assert_fused(fast, x)
        assert torch.equal(assert_fused(fast, x[0]), both[0])
        assert torch.equal(assert_fused(fast, x[1:]), both[1:])


def test_formats_in_turn_give_the_same_bits() -> None:
    """One model, all formats: a plan per format, and the sum of a pixel does not depend on the layout."""
    fast, x = fastseq.optimize(conv_net()), images()
    before = assert_fused(fast, x)
    for _ in range(2):
        for form in ("channels_last", "transposed", "sliced channels", "every other", "unaligned", "contiguous"):
            formed = FORMATS[form](x.transpose(2, 3) if form == "transposed" else x)
            assert torch.equal(formed, x)
            assert torch.equal(assert_fused(fast, formed), before)


def test_view_of_the_result_works_where_eagers_does() -> None:
    fast = fastseq.optimize(conv_net()[:3])
    results = set()
    with torch.no_grad():
        for form in FORMATS:
            x = FORMATS[form](images())
            theirs = outcome(lambda x: eager(fast, x).view(x.shape[0], -1), x)
            ours = outcome(lambda x: fast(x).view(x.shape[0], -1), x)
            assert (ours.error, ours.text) == (theirs.error, theirs.text), form
            results.add(ours.error)
    assert results == {None, RuntimeError}


def test_formats_through_an_eager_layer() -> None:
    fast = fastseq.optimize(split_net()[:3])
    for memory_format in (LAST, FIRST):
        x = images().to(memory_format=memory_format)
        assert assert_fused(fast, x).is_contiguous(memory_format=memory_format)


def test_weights_of_one_layer_in_channels_last() -> None:
    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 5), nn.ReLU(), conv(5, 6)).eval()
    for layer in (0, 2, 4):
        fast = fastseq.optimize(model)
        fast[layer].to(memory_format=LAST)
        assert assert_fused(fast, images()).is_contiguous(memory_format=LAST)
    # What the last layer's input looks like does not depend on where the format came from.
    assert assert_fused(fastseq.optimize(model), images()).is_contiguous()


@pytest.mark.parametrize(
    "shape",
    [(12,), (1, 12), (5, 12), (2, 3, 12), (1, 1, 12), (2, 1, 3, 12), (2, 3, 1, 2, 12), (1, 1, 1, 1, 1, 12)],
    ids=str,
)
@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: torch.cat([x, x], -1)[..., :12],
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        lambda x: x[..., :1].expand(x.shape),
        lambda x: x.flip(-1),
    ],
    ids=["contiguous", "sliced", "strided", "transposed", "expanded", "flipped"],
)
def test_linear(shape: tuple[int, ...], form: Callable[[Tensor], Tensor]) -> None:
    fast, x = (
        fastseq.optimize(nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 4)).eval()),
        form(torch.randn(shape)),
    )
    with torch.no_grad():
        actual, counters = call(fast, x)
        torch.testing.assert_close(actual, eager(fast, x), check_stride=True)
    assert actual.shape == (*shape[:-1], 4)
    assert counters["fused_calls"] == 1 or not x.is_contiguous() and len(shape) > 2


def test_mkldnn_switched_off_gives_the_strides_of_that_eager() -> None:
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        for tail, form in itertools.product(("conv", "conv relu", "conv relu pool"), ("contiguous", "channels_last")):
            fast, x = fastseq.optimize(nn.Sequential(*TAILS[tail](3, 5)).eval()), FORMATS[form](images())
            actual = fast(x)
            with as_plain(fast):
                torch.testing.assert_close(actual, fast(x), check_stride=True)


def test_the_input_is_not_written_to_and_not_restrided() -> None:
    for form in FORMATS:
        fast, x = fastseq.optimize(conv_net()), FORMATS[form](images())
        kept, strides = x.clone(), x.stride()
        assert_fused(fast, x)
        assert x.stride() == strides and torch.equal(x, kept) and x._version == 0
        assert_identical(x.clone(), kept)
