"""Softmax and LogSoftmax as steps of rows: behind Linear, behind a flattened map, anywhere in a run of rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ISAS,
    assert_eagers_error,
    assert_rounds_as_eager,
    kernels_used,
    one_thread,  # noqa: F401
    run_fused,
    runs_of_graph,
    use_kernels,
)
from torch import Tensor, nn

import fastseq
from fastseq.testing import assert_matches

NAN, INF = float("nan"), float("inf")
# Models, an input's shape without the batch, and how many steps there are.
MODELS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...], int]] = {
    "behind linear": (lambda: [nn.Linear(20, 10), nn.Softmax(dim=1)], (20,), 2),
    "log behind linear": (lambda: [nn.Linear(20, 37), nn.LogSoftmax(dim=-1)], (20,), 2),
    "behind an activation": (lambda: [nn.Linear(20, 33), nn.Tanh(), nn.LogSoftmax(1)], (20,), 2),
    "between": (
        lambda: [nn.Linear(20, 17), nn.Softmax(-1), nn.Linear(17, 8), nn.ReLU(), nn.Softmax(-1), nn.PReLU(8)],
        (20,),
        5,
    ),
    "first": (lambda: [nn.Softmax(-1), nn.Linear(20, 3)], (20,), 2),
    "twice": (lambda: [nn.Linear(20, 9), nn.Softmax(1), nn.LogSoftmax(1)], (20,), 3),
    "of a map": (lambda: [nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Softmax(1)], (3, 6, 7), 2),
    "of a map of one pixel, then linear": (
        lambda: [nn.Conv2d(3, 18, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LogSoftmax(-1), nn.Linear(18, 4)],
        (3, 6, 7),
        4,
    ),
    "of a flattened input": (lambda: [nn.Flatten(), nn.Softmax(1), nn.Linear(24, 5)], (2, 3, 4), 2),
    "of one feature": (lambda: [nn.Linear(20, 1), nn.LogSoftmax(1)], (20,), 2),
    "wide": (lambda: [nn.Linear(20, 1201), nn.Softmax(1)], (20,), 2),
}
each_model = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> tuple[nn.Sequential, Tensor]:
    layers, shape, _ = MODELS[name]
    return nn.Sequential(*layers()).eval(), torch.randn(70, *shape)


@pytest.mark.parametrize("isa", ISAS)
@each_model
def test_as_accurate_as_eager(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    model, x = make(name)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        whole = fused(x)
        assert_matches(whole, model, x)
        for threads, batch in ((1, 1), (1, 5), (2, 3), (2, 70)):
            torch.set_num_threads(threads)
            assert torch.equal(fused(x[:batch]), whole[:batch])
        for given in (x[::2], x[:8].to(memory_format=torch.channels_last) if x.dim() == 4 else x.t().contiguous().t()):
            assert_matches(fused(given), model, given)
    assert not fastseq.stats(fused)["fallbacks"] and fastseq.stats(fused)["eager_calls"] == 0
    assert len(kernels_used(fused)) == MODELS[name][2] and any("softmax_f32__" in k for k in kernels_used(fused))


@pytest.mark.parametrize("kind", [nn.Softmax, nn.LogSoftmax])
@pytest.mark.parametrize("features", [1, 3, 8, 29])
def test_special_values_and_sizes(kind: type[nn.Module], features: int) -> None:
    """Rows of every kind through a Linear that changes nothing."""
    eye = nn.Linear(features, features, bias=False)
    nn.init.eye_(eye.weight)
    model = nn.Sequential(eye, kind(-1)).eval()
    rows = [torch.randn(features) * size + offset for size in (1e-6, 1, 30, 1e4) for offset in (0, -700, 1e5)]
    rows += [torch.full((features,), value) for value in (0.0, -0.0, 3e38, -3e38, 1e-45)]
    # One of each kind; a product of 0 and infinity would be NaN.
    special = torch.randn(8, features)
    for row, value in enumerate((NAN, 3e38, -3e38, 90.0, -110.0)):
        special[row, features // 2] = value
    x = torch.stack([*rows, *special])
    assert_matches(run_fused(model, x), model, x)
    first = nn.Sequential(kind(-1), nn.Linear(features, features)).eval()  # which sees the caller's values
    values = torch.stack([torch.full((features,), INF), torch.full((features,), -INF), torch.randn(features)])
    for value in (INF, -INF, NAN):
        values = torch.cat([values, torch.randn(1, features).index_fill(1, torch.tensor(features - 1), value)])
    assert_matches(run_fused(first, values), first, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["behind linear", "between", "of a map", "first", "wide"])
def test_16_bit_models(name: str, dtype: torch.dtype) -> None:
    assert_rounds_as_eager(*make(name), dtype)


@pytest.mark.parametrize("shape", [(20,), (2, 5, 20), (2, 3, 4, 20), (0, 20)], ids=str)
def test_of_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    model = nn.Sequential(nn.Linear(20, 7), nn.Softmax(-1)).eval()
    fused = fastseq.optimize(model)
    with torch.no_grad():
        assert_matches(fused(x), model, x)
    assert fastseq.stats(fused)["fused_calls"] == (0 not in shape)


def test_dimension_1_is_that_of_rows_only() -> None:
    model = nn.Sequential(nn.Linear(20, 7), nn.Softmax(1)).eval()
    fused = fastseq.optimize(model)
    with torch.no_grad():
        for shape in ((2, 5, 20), (2, 3, 4, 20)):
            x = torch.randn(shape)
            assert torch.equal(fused(x), model(x))
    (reason,) = fastseq.stats(fused)["fallbacks"]
    assert reason.endswith("a softmax over dimension 1 that does not have 2 dimensions")
    assert_eagers_error(model, torch.randn(20))
    image = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Softmax(1)).eval()
    x = torch.randn(3, 5, 5)
    with torch.no_grad():
        assert torch.equal(fastseq.optimize(image)(x), image(x))


def test_what_stays_eager() -> None:
    for layers, shape, runs in (
        ([nn.Softmax(-1)], (3, 4), 0),
        ([nn.Linear(4, 4), nn.Softmax(0)], (3, 4), 1),
        ([nn.Conv2d(3, 4, 1), nn.Softmax(1)], (2, 3, 5, 5), 1),
        ([nn.Conv2d(3, 4, 1), nn.Softmax(-1), nn.Linear(5, 5)], (2, 3, 5, 5), 2),
        ([nn.Conv2d(3, 4, 1), nn.Softmax2d()], (2, 3, 5, 5), 1),
    ):
        model, x = nn.Sequential(*layers).eval(), torch.randn(shape)
        fused = fastseq.optimize(model)
        with torch.no_grad():
            assert_matches(fused(x), model, x)
        assert fastseq.stats(fused)["fused_calls"] == runs, layers


def test_another_dimension_counts_at_the_next_call() -> None:
    model = nn.Sequential(nn.Linear(20, 7), nn.Softmax(1)).eval()
    fused, x = fastseq.optimize(model), torch.randn(6, 20)
    with torch.no_grad():
        for dim in (1, 0, -1, None):
            model[1].dim = fused[1].dim = dim
            with pytest.warns(UserWarning, match="Implicit dimension") if dim is None else torch.no_grad():
                assert_matches(fused(x), model, x)


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(20, 7)


class FSoftmax(Functions):
    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.fc(x), dim=1)


class Method(Functions):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).softmax(-1)


class TorchSoftmax(Functions):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.fc(x), -1)


class FLogSoftmax(Functions):
    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.fc(x), 1)


class LogMethod(Functions):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).log_softmax(dim=-1)


class OtherType(Functions):
    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.fc(x), dim=1, dtype=torch.float64)


@pytest.mark.parametrize("kind", [FSoftmax, Method, TorchSoftmax, FLogSoftmax, LogMethod, OtherType])
def test_functional_forms(kind: type[Functions]) -> None:
    model, x = kind().eval(), torch.randn(6, 20)
    fused = fastseq.optimize(model)
    compiled = torch.compile(model, backend="fastseq")
    with torch.no_grad():
        for call in (fused, compiled):
            actual, expected = call(x), model(x)
            assert actual.dtype is expected.dtype
            torch.testing.assert_close(actual, expected)
    if kind is not OtherType:
        assert runs_of_graph(model, x) == [["Linear", "LogSoftmax" if "Log" in kind.__name__ else "Softmax"]]
        assert [name.split("_f32")[0] for name in kernels_used(fused)][1] in ("softmax", "logsoftmax")


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_a_replaced_function_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = {"softmax": nn.Softmax, "log_softmax": nn.LogSoftmax}[name](1)
    model = nn.Sequential(nn.Linear(20, 7), layer).eval()
    fused, x = fastseq.optimize(model), torch.randn(6, 20)
    monkeypatch.setattr(F, name, lambda x, *_, **__: x + 1)
    with torch.no_grad():
        assert torch.equal(fused(x), model(x))
    assert fastseq.stats(fused)["fused_calls"] == 0
