"""BatchNorm behind Conv2d and Linear: folded into what is packed, never into the module; whatever changes counts."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    ISAS,
    WINOGRAD_LARGEST,
    assert_same_outcome,
    assert_was_fused,
    kernels_used,
    one_thread,  # noqa: F401
    outcome,
    run_fused,
    settle,
    use_kernels,
)
from torch import Tensor, nn

import fastseq
from fastseq.testing import assert_matches

each_isa = pytest.mark.parametrize("isa", ISAS)


def conv(c_in: int, c_out: int, k: int, *after: nn.Module, padding: int = 0, **options: Any) -> nn.Sequential:
    bias = options.pop("bias", True)
    layers = (nn.Conv2d(c_in, c_out, k, padding=padding, bias=bias), nn.BatchNorm2d(c_out, **options))
    return settle(nn.Sequential(*layers, *after))


def linear(k: int, n: int, *after: nn.Module, bias: bool = True, **options: Any) -> nn.Sequential:
    return settle(nn.Sequential(nn.Linear(k, n, bias=bias), nn.BatchNorm1d(n, **options), *after))


NETS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "conv": (lambda: conv(5, 7, 3), (5, 9, 8)),
    "conv without bias, relu": (lambda: conv(17, 33, 3, nn.ReLU(), padding=1, bias=False), (17, 9, 8)),
    "conv, pool": (lambda: conv(3, 20, 5, nn.MaxPool2d(2)), (3, 13, 12)),
    "conv, relu, pool": (lambda: conv(64, 40, 3, nn.ReLU(), nn.MaxPool2d(2), padding=1), (64, 12, 14)),
    "conv, pool 3/2, relu": (lambda: conv(6, 16, 3, nn.MaxPool2d(3, 2, 1), nn.ReLU(inplace=True)), (6, 13, 14)),
    "1x1": (lambda: conv(30, 70, 1, nn.ReLU()), (30, 6, 5)),
    "one channel": (lambda: conv(1, 6, 5, nn.ReLU(), nn.MaxPool2d(2), padding=2), (1, 28, 28)),
    "not affine": (lambda: conv(4, 8, 3, nn.ReLU(), affine=False, eps=0.1, momentum=None), (4, 8, 8)),
    "linear": (lambda: linear(7, 5), (7,)),
    "linear without bias, relu": (lambda: linear(130, 70, nn.ReLU(), bias=False), (130,)),
    "linear not affine": (lambda: linear(300, 33, nn.ReLU(), affine=False), (300,)),
}
each_net = pytest.mark.parametrize("net", NETS)


@each_isa
@each_net
@pytest.mark.parametrize("kernel", ["", "conv2d_winograd", "linear_in_place"])
def test_numbers(isa: str, net: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa, kernel)
    make, shape = NETS[net]
    model = make()
    fused = fastseq.optimize(model)
    for batch in (1, 2, 7):
        for format in (torch.contiguous_format, torch.channels_last)[: 2 if len(shape) == 3 else 1]:
            x = torch.randn(batch, *shape).to(memory_format=format)
            with torch.no_grad():
                actual = fused(x)
                assert_matches(actual, model, x, largest_factor=WINOGRAD_LARGEST)
                assert actual.stride() == model(x).stride()
    assert_was_fused(fused)
    if kernel == "linear_in_place" and len(shape) == 1:
        assert all(kernel in name for name in kernels_used(fused))


def test_strides_are_eagers() -> None:
    """BatchNorm gives its result new strides where two memory formats coincide, as ReLU out of place does."""
    for c_in, c_out, h, w, nhwc, relu, pool in torch.cartesian_prod(*[torch.tensor(v) for v in (
        (1, 3), (1, 4), (1, 2), (1, 4), (0, 1), (0, 1, 2), (0, 1),
    )]).tolist():  # fmt: skip
        after = [nn.ReLU(inplace=relu == 2)] if relu else []
        after += [nn.MaxPool2d(2, padding=1)] if pool else []
        model = conv(c_in, c_out, 1, *after)
        x = torch.randn(2, c_in, h, w).to(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
        with torch.no_grad():
            assert run_fused(model, x).stride() == model(x).stride(), (c_in, c_out, h, w, nhwc, relu, pool)


def network() -> nn.Sequential:
    return settle(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(),
            nn.Linear(288, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 5),
        )
    )  # fmt: skip


def test_a_network_is_one_native_run() -> None:
    model, x = network(), torch.randn(4, 3, 16, 16)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        assert_matches(fused(x), model, x)
    (segment,) = fastseq.explain(fused).to_dict()["sequentials"][0]["segments"]
    assert [step["name"] for step in segment["steps"]] == [
        "conv2d_batchnorm2d_relu_maxpool2d", "conv2d_batchnorm2d_relu", "linear_batchnorm1d_relu", "linear",
    ]  # fmt: skip
    assert list(fused.state_dict()) == list(model.state_dict())
    again = pickle.loads(pickle.dumps(fused))
    with torch.no_grad():
        assert torch.equal(again(x), fused(x))


# Changes ------------------------------------------------------------------------------------------------------------


def scale_data(norm: nn.Module, name: str) -> None:
    getattr(norm, name).data.mul_(1.5)  # no version counts this


def replace(norm: nn.Module, name: str) -> None:
    value = getattr(norm, name)
    setattr(norm, name, nn.Parameter(value * 0.5) if isinstance(value, nn.Parameter) else value * 0.5)


def in_place(norm: nn.Module, name: str) -> None:
    with torch.no_grad():
        getattr(norm, name).add_(0.25)


@pytest.mark.parametrize("change", [scale_data, replace, in_place])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("layer", [1, 5, 9])
def test_a_change_counts_at_the_next_call(layer: int, name: str, change: Callable[[nn.Module, str], None]) -> None:
    model, x = network(), torch.randn(3, 3, 16, 16)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        before = fused(x)
        change(fused[layer], name)
        change(model[layer], name)
        after = fused(x)
        assert not torch.equal(before, after)
        assert_matches(after, model, x)
    assert fastseq.stats(fused)["fallbacks"] == {}


def test_attributes_and_modes_count() -> None:
    model, x = network(), torch.randn(6, 3, 16, 16)
    fused = fastseq.optimize(model)
    changes: list[Callable[[nn.Sequential], Any]] = [
        lambda m: setattr(m[1], "eps", 0.5),
        lambda m: m[1].train(),
        lambda m: m[1].eval(),
        lambda m: m.train(),
        lambda m: m.eval(),
        lambda m: m.load_state_dict({k: v * 0.5 if v.is_floating_point() else v for k, v in m.state_dict().items()}),
        lambda m: m[5].reset_running_stats(),
        lambda m: m[9].register_buffer("running_mean", torch.full((20,), 2.0)),
        lambda m: m.__setitem__(1, m[1].__class__(16).eval()),
    ]
    with torch.no_grad():
        for change in changes:
            change(model)
            change(fused)
            torch.testing.assert_close(fused(x), model(x))
            torch.testing.assert_close(fused.state_dict(), model.state_dict())
    assert fastseq.stats(fused)["fused_calls"] >= len(changes)


def test_statistics_that_are_taken_away() -> None:
    """Without them eager takes the batch's."""
    model, x = network(), torch.randn(6, 3, 16, 16)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        fused(x)
        for m in (model, fused):
            m[1].running_mean = m[1].running_var = None
        torch.testing.assert_close(fused(x), model(x))


def test_gradients_are_eagers() -> None:
    model = network()
    fused = fastseq.optimize(model)
    for m in (model, fused):
        for p in m.parameters():
            p.requires_grad_(p is m[1].weight)
        m(torch.ones(2, 3, 16, 16)).sum().backward()
    assert torch.equal(fused[1].weight.grad, model[1].weight.grad)


# Values and inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-42, 1e30])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("after", [(), (nn.ReLU(), nn.MaxPool2d(2))], ids=["plain", "pooled"])
def test_special_statistics(name: str, value: float, after: tuple[nn.Module, ...]) -> None:
    model = conv(6, 8, 3, *after, eps=0.0)
    with torch.no_grad():
        getattr(model[1], name)[3] = value
    fused, x = fastseq.optimize(model), torch.randn(2, 6, 9, 9)
    with torch.no_grad():
        assert_matches(fused(x), model, x, largest_factor=WINOGRAD_LARGEST)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("net", ["conv", "conv, relu, pool", "linear"])
def test_special_inputs_keep_their_footprint(net: str, value: float) -> None:
    make, shape = NETS[net]
    model = make()
    x = torch.randn(3, *shape)
    x[1].view(-1)[5] = value
    with torch.no_grad():
        assert_matches(run_fused(model, x), model, x, largest_factor=WINOGRAD_LARGEST)


@pytest.mark.parametrize(
    "net, shape",
    [("conv", (5, 9, 8)), ("linear", (7,)), ("linear", (3, 5, 7)), ("linear", (3, 6, 7)), ("linear", (2, 5, 5, 7)),
     ("conv", (2, 4, 9, 8)), ("linear", (0, 7)), ("conv", (0, 5, 9, 8))],
)  # fmt: skip
def test_other_ranks_and_sizes_are_eagers(net: str, shape: tuple[int, ...]) -> None:
    """No unbatched input; BatchNorm1d takes channels from dimension 1, where Linear gives them in the last."""
    model = NETS[net][0]()
    x = torch.randn(shape)
    assert_same_outcome(outcome(fastseq.optimize(model), x), outcome(model, x))


def test_another_number_of_channels_is_eagers_error() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(9)).eval()
    x = torch.randn(1, 3, 8, 8)
    assert outcome(fastseq.optimize(model), x) == outcome(model, x)
    assert isinstance(outcome(model, x), str)


def test_replaced_methods_and_subclasses_stay_eager() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    own = nn.BatchNorm2d(4)
    own.__dict__["_check_input_dim"] = lambda x: None
    for norm in (Doubled(4), own):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU()).eval()
        fused, x = fastseq.optimize(model), torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), model(x))
        assert "eager" in [s["kind"] for s in fastseq.explain(fused).to_dict()["sequentials"][0]["segments"]]


def test_hooks_on_the_norm_are_called() -> None:
    model, x = network(), torch.randn(2, 3, 16, 16)
    fused, seen = fastseq.optimize(model), []
    with torch.no_grad():
        fused(x)
        fused[1].register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(fused(x), model(x))
    assert seen == [1]
