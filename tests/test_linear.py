"""Linear: every tail of rows, inputs and outputs, and chains of layers, with integers, where the result is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import (
    ISAS,
    assert_exact,
    integer_model,
    integers,
    one_thread,  # noqa: F401
    run_fused,
    use_kernels,
)
from torch import Tensor, nn

import fastseq
from fastseq.testing import assert_matches

ROWS = (1, 2, 3, 4, 5, 6, 7, 12, 13, 31, 32, 33, 47, 48, 49, 97)
FEATURES = (1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 100, 513, 1030)

each_isa = pytest.mark.parametrize("isa", ISAS)


@each_isa
@pytest.mark.parametrize("k", FEATURES, ids="k{}".format)
def test_exact(isa: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    inputs = integers(max(ROWS), k)
    for n in FEATURES:
        model = integer_model(nn.Linear(k, n, bias=n % 2 == 0), *([nn.ReLU()] if n % 3 else []))
        fused = fastseq.optimize(model)
        with torch.no_grad():
            expected = model.double()(inputs.double()).float()
            for m in ROWS:
                actual = fused(inputs[:m])
                assert actual.stride() == (n, 1)
                assert torch.equal(actual, expected[:m]), f"m={m}, n={n}"
        assert fastseq.stats(fused) == {"fused_calls": len(ROWS), "eager_calls": 0, "fallbacks": {}}


@each_isa
@pytest.mark.parametrize("layers", range(2, 7))
@pytest.mark.parametrize("is_relu_last", [False, True], ids=["", "relu last"])
def test_chains(isa: str, layers: int, is_relu_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths rise and fall, so that hidden rows of one layer lie where wider ones of another lay."""
    use_kernels(monkeypatch, isa)
    widths = [5, 17, 3, 33, 1, 65, 8][: layers + 1]
    chain: list[nn.Module] = []
    for k, n in zip(widths, widths[1:], strict=False):
        chain += [nn.Linear(k, n), nn.ReLU()]
    model = integer_model(*(chain if is_relu_last else chain[:-1]), limit=1)
    for m in (*ROWS, 200):
        x = integers(m, 5, limit=2)
        assert_exact(run_fused(model, x), model, x)


@each_isa
@pytest.mark.parametrize("k, n", [(7, 5), (64, 65), (513, 16), (1030, 100), (3000, 40)])
def test_error_is_that_of_float32(isa: str, k: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    model = nn.Sequential(nn.Linear(k, n), nn.ReLU()).eval()
    for m in (1, 3, 4, 33):
        x = torch.randn(m, k)
        assert_matches(run_fused(model, x), model, x)


SHAPES = ((6,), (1, 6), (2, 3, 6), (1, 1, 6), (2, 1, 3, 2, 6), (49, 2, 6))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    for layers in ([nn.Linear(6, 9)], [nn.Linear(6, 9), nn.ReLU()], [nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)]):
        model = integer_model(*layers)
        x = integers(*shape)
        assert_exact(run_fused(model, x), model, x)


@pytest.mark.parametrize("shape", [(5, 1, 28, 28), (1, 784), (3, 28, 28), (50, 4, 14, 14)], ids=str)
def test_flatten_first(shape: tuple[int, ...]) -> None:
    model = integer_model(nn.Flatten(), nn.Linear(784, 30), nn.ReLU(), nn.Linear(30, 10), limit=1)
    x = integers(*shape, limit=2)
    assert_exact(run_fused(model, x), model, x)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
        assert_exact(run_fused(model, x), model, x)


VIEWS = {
    "transposed": lambda x: x.t(),
    "every second column": lambda x: x[:, ::2],
    "every second row": lambda x: x[::2],
    "one row for all": lambda x: x[:1].expand(5, -1),
    "one column for all": lambda x: x[:, :1].expand(-1, 5),
    "one value for all": lambda x: x[:1, :1].expand(3, 7),
    "overlapping windows": lambda x: x.reshape(-1).unfold(0, 9, 2),
    "cropped": lambda x: x[1:-1, 2:-3],
    "a column as a row of one": lambda x: x[:, 3:4],
    "one dimension, strided": lambda x: x[:, 2],
    "three dimensions, transposed": lambda x: x.reshape(3, 4, 12).transpose(0, 1),
    "flattened images, transposed": lambda x: x.reshape(2, 3, 24).transpose(1, 2),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
def test_views(view: Callable[[Tensor], Tensor]) -> None:
    """Fused, or eager as non-contiguous inputs of more than two dimensions: the result and its strides are eager's."""
    x = view(integers(12, 12))
    for layers in ([], [nn.ReLU(), nn.Linear(17, 4)]):
        model = integer_model(nn.Linear(x.shape[-1], 17), *layers)
        fused = fastseq.optimize(model)
        with torch.no_grad():
            assert_exact(fused(x), model, x)
        is_left_to_eager = x.dim() > 2 and not x.is_contiguous()
        assert fastseq.stats(fused)["fused_calls"] == (0 if is_left_to_eager else 1)


@pytest.mark.parametrize(
    "view", [lambda x: x.transpose(2, 3), lambda x: x[..., ::2], lambda x: x[:1].expand(4, -1, -1, -1)]
)
def test_flatten_of_views(view: Callable[[Tensor], Tensor]) -> None:
    x = view(integers(3, 2, 4, 6))
    model = integer_model(nn.Flatten(), nn.Linear(x[0].numel(), 7))
    assert_exact(run_fused(model, x), model, x)


def test_weights_in_other_orders() -> None:
    model = integer_model(nn.Linear(13, 13), nn.ReLU())
    model[0].weight = nn.Parameter(model[0].weight.detach().t())
    x = integers(5, 13)
    assert_exact(run_fused(model, x), model, x)


def test_large_weights() -> None:
    """More than fits a cache: one row streams the weights, many rows share them."""
    model = integer_model(nn.Linear(1500, 1100), nn.ReLU(), nn.Linear(1100, 300), limit=1)
    for m in (1, 2, 5, 60):
        x = integers(m, 1500, limit=1)
        assert_exact(run_fused(model, x), model, x)


REJECTED = {
    "features": (nn.Linear(6, 4), (2, 5)),
    "a scalar": (nn.Linear(1, 4), ()),
    "flattened features": (nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), (2, 3, 3)),
    "flatten of one dimension": (nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), (6,)),
}


@pytest.mark.parametrize("layers, shape", REJECTED.values(), ids=list(REJECTED))
def test_errors_are_eager_s(layers: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(layers, nn.ReLU()).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        with pytest.raises(Exception) as expected:
            model(x)
        with pytest.raises(type(expected.value)) as found:
            fastseq.optimize(model)(x)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("shape", [(0, 6), (0, 2, 6), (2, 0, 6)], ids=str)
def test_empty_input_gives_an_empty_result(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).eval()
    x = torch.empty(shape)
    with torch.no_grad():
        expected, actual = model(x), fastseq.optimize(model)(x)
    assert (actual.shape, actual.stride()) == (expected.shape, expected.stride())


def test_no_features() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(0, 4), nn.ReLU()).eval()
    x = torch.empty(3, 0)
    with torch.no_grad():
        assert torch.equal(fastseq.optimize(model)(x), model(x))
