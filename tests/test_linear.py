"""Linear: every tail of rows, inputs and outputs, and chains of layers, with integers, where the result is exact."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import (
    ISAS,
    assert_eagers_error,
    assert_exact,
    integer_model,
    integers,
    kernels_used,
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


@each_isa
@pytest.mark.parametrize("k, n", [(2300, 70), (9100, 37)])
def test_long_sums_in_stretches(isa: str, k: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panel beyond L2 is read in pieces where there are several tiles of rows: the bits are those of one row."""
    use_kernels(monkeypatch, isa, "linear_f32")
    model = nn.Sequential(nn.Linear(k, n), nn.ReLU(), nn.Linear(n, 3)).eval()
    x = torch.randn(max(ROWS), k)
    x[3, 17], x[5, k - 1], x[12, 0] = math.nan, math.inf, -math.inf
    fused = fastseq.optimize(model)
    with torch.no_grad():
        single = torch.cat([fused(row[None]) for row in x])
        for m in ROWS:
            assert torch.equal(fused(x[:m]).nan_to_num(7e7), single[:m].nan_to_num(7e7)), m
        assert_matches(fused(x), model, x)


IN_PLACE = "linear_in_place"


@each_isa
@pytest.mark.parametrize("k, n", [(1, 1), (15, 17), (64, 5), (128, 64), (700, 33), (2200, 130), (5000, 19)])
def test_weights_in_place_give_the_bits_of_packed_ones(
    isa: str, k: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights transposed in registers, packed rows, and both. k: several stretches, the last one odd."""
    model = nn.Sequential(nn.Linear(k, n, bias=n % 2 == 0), *([nn.ReLU()] if n % 3 else [])).eval()
    x = torch.randn(max(ROWS), k)
    results = []
    for kernel in ("linear_f32", IN_PLACE):
        use_kernels(monkeypatch, isa, kernel)
        fused = fastseq.optimize(model)
        with torch.no_grad():
            results.append([fused(x[:m]) for m in ROWS])
        assert all(used.startswith(kernel) for used in kernels_used(fused))
    assert all(map(torch.equal, *results))


@each_isa
def test_weights_in_place_behind_maps_and_in_chains(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features lie pixel by pixel, the weight's columns channel by channel."""
    use_kernels(monkeypatch, isa, IN_PLACE)
    layers = [nn.Conv2d(3, 17, 3), nn.ReLU(), nn.Flatten(), nn.Linear(17 * 20, 70), nn.ReLU(), nn.Linear(70, 9)]
    model = integer_model(*layers, limit=1)
    for batch in (1, 2, 13, 40):
        x = integers(batch, 3, 6, 7, limit=1)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_exact(run_fused(model, x), model, x)


def test_special_values_with_weights_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, ISAS[0], IN_PLACE)
    model = nn.Sequential(nn.Linear(40, 20), nn.ReLU()).eval()
    x = torch.randn(70, 40)
    x[3, 5], x[17, 0], x[69, 39] = math.nan, math.inf, -math.inf
    with torch.no_grad():
        model[0].weight[7, 3] = math.nan
        expected = model(x)
    torch.testing.assert_close(run_fused(model, x), expected, equal_nan=True)


def test_weights_in_place_take_no_memory_and_are_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a write that nothing tells of, and whose place no sample of a large tensor looks at."""
    use_kernels(monkeypatch, ISAS[0], IN_PLACE)
    model = integer_model(nn.Linear(300, 200))
    fused = fastseq.optimize(model)
    x = integers(3, 300)
    with torch.no_grad():
        fused(x)
        weight = fused[0].weight
        (segment,) = fastseq.explain(fused).to_dict()["sequentials"][0]["segments"]
        assert sum(step["packed_bytes"] for step in segment["steps"]) < weight.nbytes / 10
        weight.detach().numpy()[123, 45] += 1
        model[0].weight[123, 45] += 1
        assert_exact(fused(x), model, x)
        for replace in (lambda w: w * 2, lambda w: w.clone(), lambda w: (w + 1).t().contiguous().t()):
            fused[0].weight.data = replace(fused[0].weight.data)
            model[0].weight.data = fused[0].weight.data.clone()
            assert_exact(fused(x), model, x)
    assert not fastseq.stats(fused)["fallbacks"]


REJECTED = {
    "features": (nn.Linear(6, 4), (2, 5)),
    "a scalar": (nn.Linear(1, 4), ()),
    "flattened features": (nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), (2, 3, 3)),
    "flatten of one dimension": (nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), (6,)),
}


@pytest.mark.parametrize("layers, shape", REJECTED.values(), ids=list(REJECTED))
def test_errors_are_eager_s(layers: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(layers, nn.ReLU()).eval()
    assert_eagers_error(model, torch.randn(shape))


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
