"""Activation functions behind Conv2d, Linear and MaxPool2d: numbers, special values, changes, functional forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    ISAS,
    WINOGRAD_LARGEST,
    assert_same_bits_however_called,
    assert_same_outcome,
    assert_was_fused,
    one_thread,  # noqa: F401
    outcome,
    run_fused,
    use_kernels,
)
from torch import nn

import fastseq
from fastseq.patterns.activation import ACTIVATIONS
from fastseq.testing import assert_matches

each_isa = pytest.mark.parametrize("isa", ISAS)


def prelu(slopes: list[float]) -> nn.PReLU:
    layer = nn.PReLU(len(slopes))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(slopes))
    return layer


# Defaults and other values, also those with which the function falls somewhere: then a pool may not come first.
MADE: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU6": nn.ReLU6,
    "LeakyReLU": nn.LeakyReLU,
    "LeakyReLU -0.5": lambda: nn.LeakyReLU(-0.5),
    "LeakyReLU 3": lambda: nn.LeakyReLU(3),
    "PReLU": nn.PReLU,
    "PReLU 20": lambda: prelu([0.1 * i - 0.7 for i in range(20)]),
    "PReLU 20 rising": lambda: prelu([0.1 * i + 0.1 for i in range(20)]),
    "ELU": nn.ELU,
    "ELU 2.5": lambda: nn.ELU(2.5),
    "ELU -1": lambda: nn.ELU(-1),
    "SELU": nn.SELU,
    "CELU": nn.CELU,
    "CELU 0.3": lambda: nn.CELU(0.3),
    "Hardtanh": nn.Hardtanh,
    "Hardtanh -0.2 1.5": lambda: nn.Hardtanh(-0.2, 1.5),
    "Hardswish": nn.Hardswish,
    "Hardsigmoid": nn.Hardsigmoid,
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "GELU tanh": lambda: nn.GELU(approximate="tanh"),
    "Softplus": nn.Softplus,
    "Softplus 3, 1": lambda: nn.Softplus(3, 1),
    "Mish": nn.Mish,
}
each_activation = pytest.mark.parametrize("name", MADE)


def test_all_are_here() -> None:
    assert {type(make()) for make in MADE.values()} == set(ACTIVATIONS)


def with_bias(layer: nn.Module) -> nn.Module:
    """Sums of all signs and sizes."""
    with torch.no_grad():
        nn.init.normal_(layer.bias, std=2.0)
    return layer


BEFORE: dict[str, tuple[Callable[[nn.Module], list[nn.Module]], tuple[int, ...]]] = {
    "conv": (lambda a: [with_bias(nn.Conv2d(3, 20, 3)), a], (3, 9, 8)),
    "conv, then pool": (lambda a: [with_bias(nn.Conv2d(18, 20, 3, padding=1)), a, nn.MaxPool2d(2)], (18, 10, 13)),
    "conv, then pool 3/2": (lambda a: [with_bias(nn.Conv2d(5, 20, 5)), a, nn.MaxPool2d(3, 2, 1)], (5, 12, 11)),
    "conv behind pool": (lambda a: [with_bias(nn.Conv2d(5, 20, 1)), nn.MaxPool2d(2), a], (5, 8, 7)),
    "one channel": (lambda a: [with_bias(nn.Conv2d(1, 20, 5)), a, nn.MaxPool2d(2)], (1, 20, 20)),
    "norm": (lambda a: [nn.Conv2d(9, 20, 3), nn.BatchNorm2d(20), a, nn.MaxPool2d(2)], (9, 9, 8)),
    "pool": (lambda a: [nn.MaxPool2d(3, 2), a], (20, 9, 8)),
    "linear": (lambda a: [with_bias(nn.Linear(70, 20)), a], (70,)),
    "between": (lambda a: [with_bias(nn.Linear(7, 20)), a, nn.Linear(20, 5)], (7,)),
}


@each_isa
@each_activation
@pytest.mark.parametrize("before", BEFORE)
def test_numbers(isa: str, name: str, before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    make, shape = BEFORE[before]
    model = nn.Sequential(*make(MADE[name]())).eval()
    fused = fastseq.optimize(model)
    for batch in (1, 3):
        for format in (torch.contiguous_format, torch.channels_last)[: 2 if len(shape) == 3 else 1]:
            x = torch.randn(batch, *shape).to(memory_format=format)
            with torch.no_grad():
                actual, expected = fused(x), model(x)
                assert_matches(actual, model, x, largest_factor=WINOGRAD_LARGEST)
                assert actual.stride() == expected.stride()
    assert_was_fused(fused)
    (segment,) = fastseq.explain(fused).to_dict()["sequentials"][0]["segments"]
    assert segment["kind"] == "native"


@each_isa
@each_activation
def test_special_values(isa: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An identity in front: the function alone, at values where formulas overflow, cancel or change."""
    use_kernels(monkeypatch, isa)
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-30, -1e-30, 1e-44, 88.0, -88.0, 104.0, -104.0]
    values += [-3.0, 3.0, 6.0, -6.0, 20.0, 20.5, -20.0, 5.5, -5.5, 1.0, -1.0, 9.0, -9.0, 0.3, -0.7, 1e-4]
    x = torch.tensor(values)[:, None].repeat(1, 20)
    layer = MADE[name]()
    eye = nn.Linear(1, 20, bias=False)
    nn.init.ones_(eye.weight)
    model = nn.Sequential(eye, layer).eval()
    with torch.no_grad():
        actual, expected = run_fused(model, x[:, :1]), layer(x)
        exact = layer.double()(x.double())
    # Eager's float32 and float64 kernels are not of one mind: GELU of inf is NaN for the one and inf for the other.
    is_as = [
        torch.isclose(actual.double(), other.double(), rtol=0, atol=0, equal_nan=True) for other in (expected, exact)
    ]
    special = ~exact.isfinite() | ~expected.isfinite()
    assert (is_as[0] | is_as[1] | torch.isclose(actual.double(), exact, rtol=1e-6))[special].all()
    # In float64 1 + tanh(x) and 1 + erf(x) are 0 where the function is not yet.
    torch.testing.assert_close(
        actual[~special], exact[~special].float(), rtol=2e-6, atol=1e-15 if "GELU" in name else 1e-38
    )


# Changes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, name, value",
    [
        (nn.LeakyReLU, "negative_slope", 0.7), (nn.ELU, "alpha", 0.2), (nn.CELU, "alpha", 2.0),
        (nn.Hardtanh, "max_val", 0.25), (nn.ReLU6, "max_val", 0.25), (nn.Softplus, "beta", 4),
        (nn.GELU, "approximate", "tanh"), (nn.Softplus, "threshold", 0.1),
    ],
)  # fmt: skip
def test_an_attribute_counts_at_the_next_call(make: Callable[[], nn.Module], name: str, value: Any) -> None:
    model = nn.Sequential(nn.Linear(9, 30), make(), nn.Linear(30, 5)).eval()
    fused, x = fastseq.optimize(model), torch.randn(4, 9)
    with torch.no_grad():
        before = fused(x)
        for m in (model, fused):
            setattr(m[1], name, value)
        assert not torch.equal(fused(x), before)
        assert_matches(fused(x), model, x)


@pytest.mark.parametrize("count", [1, 30])
def test_slopes_are_parameters(count: int) -> None:
    model = nn.Sequential(nn.Linear(9, 30), nn.PReLU(count), nn.Linear(30, 5)).eval()
    fused, x = fastseq.optimize(model), torch.randn(4, 9)
    with torch.no_grad():
        fused(x)
        for m in (model, fused):
            m[1].weight.mul_(3)
        assert_matches(fused(x), model, x)
        for m in (model, fused):
            m[1].weight.data = torch.linspace(-1, 2, count)
        assert_matches(fused(x), model, x)
    fused(x).sum().backward()
    assert fused[1].weight.grad is not None
    assert fastseq.stats(fused)["fused_calls"] == 3


@pytest.mark.parametrize("slopes", [1, 3, 4])
@pytest.mark.parametrize("shape", [(9,), (2, 9), (2, 3, 9), (2, 4, 9), (2, 4, 5, 9)])
def test_prelu_takes_channels_from_dimension_1(slopes: int, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(9, 4), nn.PReLU(slopes)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(0.1, 0.9, slopes))
    x = torch.randn(shape)
    assert_same_outcome(outcome(fastseq.optimize(model), x), outcome(model, x))


@pytest.mark.parametrize("name", [name for name in MADE if not name.startswith("PReLU 20")])  # of 20 channels
def test_strides_are_eagers_where_formats_coincide(name: str) -> None:
    for c, h, w, pool in ((1, 3, 4, 0), (4, 1, 1, 0), (1, 1, 4, 0), (1, 4, 4, 1), (4, 2, 2, 1), (4, 2, 2, 2)):
        for inplace in (False, True):
            layer = MADE[name]()
            if "inplace" in layer.__dict__:
                layer.inplace = inplace
            pooled = [nn.MaxPool2d(2)] if pool else []
            layers = [*pooled, layer] if pool == 2 else [layer, *pooled]
            model = nn.Sequential(nn.Conv2d(3, c, 1), *layers).eval()
            x = torch.randn(2, 3, h, w).to(memory_format=torch.channels_last)
            with torch.no_grad():
                assert run_fused(model, x).stride() == model(x).stride(), (c, h, w, pool, inplace)


@pytest.mark.parametrize("name", ["GELU", "Tanh", "LeakyReLU", "PReLU 20"])
def test_bits_do_not_depend_on_batch_threads_or_layout(name: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(6, 20, 3, padding=1), MADE[name](), nn.MaxPool2d(2), nn.Conv2d(20, 20, 3), MADE[name](), nn.Flatten(),
        nn.Linear(20 * 9 * 12, 20), MADE[name](),
    ).eval()  # fmt: skip
    fused, x = fastseq.optimize(model), torch.randn(13, 6, 22, 28)
    alone = assert_same_bits_however_called(fused, x)
    assert_matches(alone, model, x, largest_factor=WINOGRAD_LARGEST)


# Functional forms ---------------------------------------------------------------------------------------------------

FORWARDS = {
    "relu6": "F.relu6(x)",
    "leaky_relu": "F.leaky_relu(x, 0.2)",
    "leaky_relu in place": "F.leaky_relu(x, negative_slope=0.2, inplace=True)",
    "elu": "F.elu(x, alpha=0.5)",
    "selu": "F.selu(x)",
    "celu": "F.celu(x, 2.0)",
    "hardtanh": "F.hardtanh(x, -0.5, 0.5)",
    "hardswish": "F.hardswish(x)",
    "hardsigmoid": "F.hardsigmoid(x)",
    "sigmoid": "torch.sigmoid(x)",
    "x.sigmoid()": "x.sigmoid()",
    "tanh": "torch.tanh(x)",
    "x.tanh()": "x.tanh()",
    "silu": "F.silu(x)",
    "gelu": "F.gelu(x)",
    "gelu tanh": "F.gelu(x, approximate='tanh')",
    "softplus": "F.softplus(x, 2, 10)",
    "mish": "F.mish(x)",
}


@pytest.mark.parametrize("name", FORWARDS)
def test_functional_forms_in_a_straight_forward(name: str, tmp_path: Any) -> None:
    source = (
        "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 5)\n\n"
        f"    def forward(self, x):\n        x = self.conv(x)\n        x = {FORWARDS[name]}\n"
        "        return self.head(torch.flatten(x, 1))\n"
    )
    path = tmp_path / "net.py"
    path.write_text(source)
    space: dict[str, Any] = {"__name__": "net"}
    exec(compile(source, str(path), "exec"), space)
    model = space["Net"]().eval()
    fused, x = fastseq.optimize(model), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
    assert fastseq.stats(fused) == {"fused_calls": 1, "eager_calls": 0, "fallbacks": {}}
