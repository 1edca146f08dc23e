"""Behaviours 29 to 32: strides, memory formats, views, lazy tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from behaviour import assert_eager_outcome, assert_fast, one_thread  # noqa: F401
from dropin import as_plain, assert_identical, call, eager, fused, outcome
from torch import Tensor, nn

import fastseq

FIRST, LAST = torch.contiguous_format, torch.channels_last

# 29: memory formats -------------------------------------------------------------------------------------------------

NETS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "conv": lambda c, n: [nn.Conv2d(c, n, 3, padding=1)],
    "conv relu": lambda c, n: [nn.Conv2d(c, n, 3), nn.ReLU()],
    "conv in-place relu pool": lambda c, n: [nn.Conv2d(c, n, 3), nn.ReLU(True), nn.MaxPool2d(2)],
    "two": lambda c, n: [nn.Conv2d(c, 4, 3), nn.ReLU(), nn.Conv2d(4, n, 1), nn.MaxPool2d(2, 1)],
    "to one pixel": lambda c, n: [nn.Conv2d(c, n, (6, 5)), nn.ReLU()],
}


@pytest.mark.parametrize("weights", [FIRST, LAST], ids=["weights NCHW", "weights NHWC"])
@pytest.mark.parametrize("order", [FIRST, LAST], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize(("c", "n"), [(3, 5), (1, 5), (3, 1), (1, 1)])
@pytest.mark.parametrize("net", NETS)
def test_29_the_memory_format_is_eagers(
    net: str, c: int, n: int, order: torch.memory_format, weights: torch.memory_format
) -> None:
    """Contiguous stays so; channels_last input or weights give channels_last; one channel or pixel is both at once."""
    for size in ((6, 5), (7, 8)):
        model = nn.Sequential(*NETS[net](c, n)).to(memory_format=weights)
        result = assert_fast(model, torch.randn(2, c, *size).to(memory_format=order))
        if c > 1 and n > 1 and result[0, 0].numel() > 1:
            expected = LAST if LAST in (order, weights) else FIRST
            assert result.is_contiguous(memory_format=expected)


def test_29_view_of_the_result_works_exactly_where_it_does_in_eager() -> None:
    """`x.view(n, -1)` behind the model: fine for a contiguous result, an error for channels_last."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2))
    x = torch.randn(2, 3, 8, 8)
    for weights, order in ((FIRST, FIRST), (FIRST, LAST), (LAST, FIRST), (LAST, LAST)):
        fast, image = fastseq.optimize(model.to(memory_format=weights)), x.to(memory_format=order)
        with torch.no_grad():
            expected = outcome(lambda net, image: eager(net, image).view(2, -1), fast, image)
            result, counters = call(fast, image)
            actual = outcome(result.view, 2, -1)
        assert counters == fused()
        assert (actual.error, actual.text) == (expected.error, expected.text)
        assert (actual.error is None) == (weights is FIRST and order is FIRST)


# 30: what ReLU and Flatten do with strides --------------------------------------------------------------------------


@pytest.mark.parametrize("neighbour", ["fused", "none"])
def test_30_relu_alone_keeps_dense_strides_and_packs_others(neighbour: str) -> None:
    """A permuted dense input keeps its strides; one with holes becomes contiguous."""
    head = [nn.MaxPool2d(1)] if neighbour == "fused" else []
    fast = fastseq.optimize(nn.Sequential(nn.ReLU(), nn.Sequential(*head)))
    base = torch.randn(4, 5, 6)
    for x, strides in (
        (base.permute(1, 2, 0), (6, 1, 30)),
        (base.transpose(0, 1), (6, 30, 1)),
        (base[:, :, ::2], (15, 3, 1)),
        (base[:, :3], (18, 6, 1)),
        (base.expand(4, 5, 6), (30, 6, 1)),
    ):
        with torch.no_grad():
            assert fast[0](x).stride() == strides
            result, expected = call(fast, x)[0], eager(fast, x)
        assert result.stride() == expected.stride() and torch.equal(result, expected)
        if not head:
            assert result.stride() == strides


def test_30_relu_between_permuted_layers() -> None:
    """ReLU behind an eager layer that permutes: not fused with the convolution before it, strides and all."""

    class Permute(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 3, 1, 2)

    fast = fastseq.optimize(nn.Sequential(nn.Conv2d(3, 5, 3), Permute(), nn.ReLU()))
    x = torch.randn(2, 3, 6, 7)
    with torch.no_grad():
        result, counters = call(fast, x)
        expected = eager(fast, x)
    assert counters["fused_calls"] == 1 and result.stride() == expected.stride()
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.Flatten(), nn.Linear(3 * 8 * 7, 4)],
        lambda: [nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten()],
        lambda: [nn.Conv2d(3, 5, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(30, 4)],
        lambda: [nn.MaxPool2d(3), nn.Flatten()],
    ],
)
def test_30_flatten_of_channels_last_is_in_the_order_of_channels(layers: Callable[[], list[nn.Module]]) -> None:
    """Channel after channel, whatever the strides; the result is contiguous."""
    model, x = nn.Sequential(*layers()), torch.randn(2, 3, 8, 7)
    results = [assert_fast(model, x.to(memory_format=order)) for order in (FIRST, LAST)]
    assert torch.equal(*results) and results[1].is_contiguous()


# 31: views as inputs ------------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda x: x[:1].expand(x.shape),
    "expanded inside": lambda x: x[..., :1].expand(x.shape),
    "expanded everywhere": lambda x: x.flatten()[0].expand(x.shape),
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every other": lambda x: torch.stack([x, x], -1)[..., 1],
    "sliced batch": lambda x: torch.cat([x, x])[::2],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed at the end": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "unaligned": lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape),
    "flipped": lambda x: x.flip(-1),
    "overlapping": lambda x: torch.randn(x.numel()).as_strided(x.shape, [1] * x.dim()),
    "from bytes": lambda x: torch.frombuffer(bytearray(x.numpy().tobytes()), dtype=torch.float32).view(x.shape),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["conv", "pool", "linear", "flatten"])
@pytest.mark.parametrize("view", VIEWS)
def test_31_views_of_any_strides_are_fused(view: str, kind: str) -> None:
    """Stride 0, holes, transpositions, offsets, addresses that no vector load is aligned to."""
    layers, shape = {
        "conv": ([nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2)], (3, 3, 8, 7)),
        "pool": ([nn.MaxPool2d(3, 2, 1)], (3, 3, 8, 7)),
        "linear": ([nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2)], (4, 7)),
        "flatten": ([nn.Flatten(), nn.Linear(21, 5)], (4, 3, 7)),
    }[kind]
    assert_fast(nn.Sequential(*layers), VIEWS[view](torch.randn(shape)))


def test_31_an_in_place_relu_on_an_expanded_input_raises() -> None:
    fast = fastseq.optimize(nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Linear(7, 3)))
    for make in (lambda: torch.randn(1, 7).expand(4, 7), lambda: torch.randn(4, 1).expand(4, 7)):
        with torch.no_grad(), as_plain(fast):
            expected = outcome(fast, make())
        with torch.no_grad():
            actual = outcome(fast, make())
        assert actual == expected and actual.error is RuntimeError
        assert "more than one element of the written-to tensor" in actual.text


# 32: lazy tensors ---------------------------------------------------------------------------------------------------

LAZY: dict[str, Callable[[Tensor], Any]] = {
    "negative": torch._neg_view,
    "imaginary part of a conjugate": lambda x: torch.complex(x, x).conj().imag,
    "conjugate": lambda x: torch.complex(x, x).conj(),
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape),
}
MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)),
    "linear": lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU()),
    "pool": lambda: nn.Sequential(nn.MaxPool2d(2)),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", LAZY)
def test_32_lazy_inputs_are_eagers(kind: str, model: str) -> None:
    """Their memory does not hold their values, or there is none: told by dispatch keys, not by the dtype."""
    fast, x = fastseq.optimize(MODELS[model]()), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        lazy = LAZY[kind](x)
        expected = assert_eager_outcome(fast, lazy, "the input is not")
        if kind == "negative":
            assert lazy.data_ptr() == x.data_ptr()
            assert_identical(expected.value, eager(fast, -x))
            # The same values in memory of their own are fused.
            assert call(fast, lazy.resolve_neg())[1] == fused()


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("model", ["conv", "linear"])
@pytest.mark.parametrize("kind", ["negative", "imaginary part of a conjugate"])
def test_32_lazy_weights_are_eagers(kind: str, model: str, part: str) -> None:
    fast, x = fastseq.optimize(MODELS[model]()), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        call(fast, x)
        made = nn.Parameter(LAZY[kind](getattr(fast[0], part).detach()))
        assert made.is_neg()
        setattr(fast[0], part, made)
        assert_eager_outcome(fast, x, "a parameter is not a plain dense tensor")
        setattr(fast[0], part, nn.Parameter(made.detach().resolve_neg()))
        assert call(fast, x)[1] == fused()
        torch.testing.assert_close(fast(x), eager(fast, x))
