"""torch.compile(backend="fastseq"): what is fused in a graph of torch calls, what is left alone, what comes out."""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_python
from dropin import Holder, Outcome, conv_net, images, one_thread, outcome, split_net  # noqa: F401
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import fastseq
from fastseq import dynamo
from fastseq.testing import MODELS, assert_matches


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Backend:
    """fastseq's backend, with the number of graphs that it was asked for."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return dynamo.backend(graph_module, example_inputs)


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend=dynamo.backend, fullgraph=True, **options)


def native_runs(function: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """The result of a call, and how often the native engine ran in it, as the profiler saw it."""
    with torch.profiler.profile() as profile:
        result = function(*args)
    return result, sum(event.name == "fastseq::run" for event in profile.events())


def assert_runs(function: Callable[..., Any], model: nn.Module, x: Tensor, runs: int) -> Tensor:
    """`function(x)` makes `runs` native runs and is what `model`, the plain one, gives."""
    __tracebackhide__ = True
    with torch.no_grad():
        actual, found = native_runs(function, x)
    assert found == runs
    assert_matches(actual, model, x)
    return actual


# Whole networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, True], ids=["default", "dynamic"])
@pytest.mark.parametrize("name", ["seed1", "seed2", "seed3", "lenet5", "mlp"])
def test_networks_are_one_native_run(name: str, dynamic: bool | None) -> None:
    case, backend = MODELS[name], Backend()
    model = case.build()
    function = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3, 5, 3):
        assert_runs(function, model, case.example(batch), runs=1)
    assert backend.graphs == (1 if dynamic else 2), "automatic dynamic shapes begin at the second size"


def test_sizes_and_layouts_of_one_graph() -> None:
    model = conv_net()[:3]
    function = compiled(model, dynamic=True)
    for shape in [(2, 3, 12, 12), (5, 3, 9, 14), (3, 3, 31, 7)]:
        x = torch.randn(shape)
        assert_runs(function, model, x, runs=1)
        assert_runs(function, model, x.contiguous(memory_format=torch.channels_last), runs=1)


def test_an_optimised_model_is_fused_by_the_backend_too() -> None:
    model, x = Holder().eval(), images()
    fast = fastseq.optimize(model)
    assert_runs(compiled(fast), model, x, runs=1)
    assert_runs(fast, model, x, runs=1)


def test_layers_between_runs_stay_as_they_are() -> None:
    model, x = split_net(), images()
    function = compiled(model)
    assert_runs(function, model, x, runs=2)
    model.train()
    with torch.no_grad():
        before = model[2].running_mean.clone()
        _, runs = native_runs(function, x)
    assert runs == 2 and not torch.equal(model[2].running_mean, before)


# Every way to write a layer ---------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolution, ReLU, max-pool, flatten, dropout and Linear, written as `body` has it."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.body = body
        self.conv, self.linear, self.pool, self.dropout = (
            nn.Conv2d(3, 8, 3),
            nn.Linear(200, 7),
            nn.MaxPool2d(2),
            nn.Dropout(),
        )
        self.act, self.table = nn.ReLU(), nn.Buffer(torch.randn(7, 200))
        self.second = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


WRITTEN: dict[str, Callable[[Any, Tensor], Any]] = {
    "modules": lambda m, x: m.act(m.linear(m.dropout(m.pool(m.act(m.conv(x))).flatten(1)))),
    "F.conv2d": lambda m, x: F.relu(F.conv2d(x, m.conv.weight, m.conv.bias)),
    "torch.conv2d": lambda m, x: torch.conv2d(x, m.conv.weight, m.conv.bias, (2, 1), [1, 0], 1, 1).relu(),
    "conv2d by name": lambda m, x: F.conv2d(input=x, weight=m.conv.weight, padding="same").relu(),
    "conv2d valid": lambda m, x: F.conv2d(x, m.conv.weight, bias=m.conv.bias, padding="valid").relu(),
    "conv2d without bias": lambda m, x: F.relu(m.second(x)),
    "F.linear": lambda m, x: F.linear(x.flatten(1)[:, :200], m.linear.weight, m.linear.bias).relu(),
    "linear without bias": lambda m, x: F.linear(x.flatten(1)[:, :200], m.linear.weight).relu(),
    "linear by name": lambda m, x: F.linear(x.flatten(1)[:, :200], bias=m.linear.bias, weight=m.linear.weight),
    "F.relu": lambda m, x: F.relu(m.conv(x)),
    "F.relu in place": lambda m, x: F.relu(m.conv(x), inplace=True),
    "F.relu_": lambda m, x: F.relu_(m.conv(x)),
    "torch.relu": lambda m, x: torch.relu(m.conv(x)),
    "torch.relu_": lambda m, x: torch.relu_(m.conv(x)),
    "Tensor.relu": lambda m, x: m.conv(x).relu(),
    "Tensor.relu_": lambda m, x: m.conv(x).relu_(),
    "F.max_pool2d": lambda m, x: F.max_pool2d(m.conv(x), 3, stride=2, padding=1, ceil_mode=True).relu(),
    "torch.max_pool2d": lambda m, x: torch.max_pool2d(m.conv(x).relu(), (3, 2), padding=(1, 0)),
    "torch.max_pool2d by name": lambda m, x: torch.max_pool2d(m.conv(x), kernel_size=2, stride=[1, 2]),
    "torch.flatten": lambda m, x: m.linear(torch.flatten(m.pool(m.conv(x)), 1)),
    "flatten by name": lambda m, x: m.linear(torch.flatten(m.pool(m.conv(x)), start_dim=1, end_dim=-1)),
    "Tensor.flatten": lambda m, x: m.linear(m.pool(m.conv(x)).flatten(start_dim=1)),
    "view of shape": lambda m, x: m.linear(m.pool(m.conv(x)).view(x.shape[0], -1)),
    "view of size": lambda m, x: m.linear(m.pool(m.conv(x)).view(x.size(0), 200)),
    "view of rows": lambda m, x: m.linear(m.pool(m.conv(x)).view(-1, 200)),
    "view of len": lambda m, x: m.linear(m.pool(m.conv(x)).view((len(x), -1))),
    "reshape": lambda m, x: m.linear(m.pool(m.conv(x)).reshape(x.shape[0], -1)),
    "torch.reshape": lambda m, x: m.linear(torch.reshape(m.pool(m.conv(x)), (x.shape[0], -1))),
    "F.dropout": lambda m, x: m.linear(F.dropout(m.pool(m.conv(x)), 0.5, m.training).flatten(1)),
    "F.dropout in place": lambda m, x: m.linear(F.dropout(m.pool(m.conv(x)), training=False, inplace=True).flatten(1)),
    "a loop": lambda m, x: in_turn(x, m.conv, m.pool, m.act, lambda y: y.flatten(1), m.linear),
}


def in_turn(x: Tensor, *layers: Callable[[Tensor], Tensor]) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


@pytest.mark.parametrize("form", WRITTEN)
def test_written_in_any_way_it_is_fused(form: str) -> None:
    model = Net(WRITTEN[form]).eval()
    function = compiled(model)
    for batch in (2, 3):  # the second graph has a symbol for the batch size
        assert_runs(function, model, images(batch), runs=1)


@pytest.mark.parametrize("form", [form for form in WRITTEN if "view" in form])
def test_views_are_flattens_whatever_the_size(form: str) -> None:
    model = Net(WRITTEN[form]).eval()
    assert_runs(compiled(model, dynamic=True), model, images(), runs=1)


def test_dropout_with_a_dynamic_p_stays() -> None:
    model, x = Net(WRITTEN["modules"]).eval(), images()
    function = compiled(model, dynamic=True)
    assert_runs(function, model, x, runs=2)
    model.dropout.p = 1.5
    with torch.no_grad():
        assert outcome(function, x)[1:] == outcome(torch.compile(model, backend="eager", dynamic=True), x)[1:]
        assert outcome(function, x).error is not None


# What is left alone -----------------------------------------------------------------------------------------------


def written_between(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    x.add_(1)
    return y.relu()


def weight_written_between(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    m.conv.weight.mul_(2)
    return m.pool(y) + m.conv.weight.sum()


def in_place_for_all(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y.relu_()
    return m.pool(y), y


def in_place_on_a_view(m: Any, x: Tensor) -> Any:
    y = m.pool(m.conv(x))
    return m.linear(y.flatten(1).relu_()), y


def branches(m: Any, x: Tensor) -> Tensor:
    a, b = m.conv(x), F.conv2d(x, m.conv.weight, padding=1)
    a, b = a.relu(), b.relu()
    return torch.cat([m.pool(a).flatten(1), m.pool(b).flatten(1)], 1)


def mode_between(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.linear(m.pool(y).flatten(1)).float()


def grad_between(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    with torch.enable_grad():
        return y.relu()


# The body and the native runs that are right to make.
LEFT: dict[str, tuple[Callable[[Any, Tensor], Any], int]] = {
    "the convolution is returned": (lambda m, x: (y := m.conv(x), y.relu()), 1),
    "the ReLU is returned": (lambda m, x: (y := m.conv(x).relu(), m.pool(y)), 2),
    "a sum of both": (lambda m, x: (y := m.conv(x)) + y.relu(), 1),
    "a flattened view is returned": (lambda m, x: (y := m.pool(m.conv(x)), m.linear(y.flatten(1))), 2),
    "the input is written between": (written_between, 1),
    "a weight is written between": (weight_written_between, 2),
    "in place for all": (in_place_for_all, 2),
    "in place on a view": (in_place_on_a_view, 2),
    "in place on the input": (lambda m, x: m.conv(x.relu_()), 1),
    "the result is written": (lambda m, x: m.conv(x).relu().add_(1), 1),
    "two branches": (branches, 2),
    "autocast between": (mode_between, 1),
    "grad mode between": (grad_between, 1),
    "a weight that is computed": (lambda m, x: F.conv2d(x, m.conv.weight * 2, m.conv.bias).relu(), 0),
    "a bias that is computed": (lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias + 1).relu(), 0),
    "a weight that is no parameter": (lambda m, x: F.linear(x.flatten(1)[:, :200], m.table), 0),
    "a weight that is the input": (lambda m, x: F.linear(x.flatten(1), x.flatten(1)), 0),
    "a value that is its own weight": (lambda m, x: F.conv2d(y := m.linear.weight[:, :192].view(7, 3, 8, 8), y), 0),
    "dilation": (lambda m, x: F.conv2d(x, m.conv.weight, dilation=2).relu(), 1),
    "groups": (lambda m, x: F.conv2d(x, m.conv.weight[:6, :1].contiguous(), groups=3).relu(), 0),
    "conv1d": (lambda m, x: F.conv1d(x[..., 0], m.conv.weight[..., 0]).relu(), 0),
    "indices": (lambda m, x: F.max_pool2d(m.conv(x), 2, return_indices=True), 1),
    "dilated pool": (lambda m, x: F.max_pool2d(x, 2, dilation=2), 1),
    "average pool": (lambda m, x: F.avg_pool2d(m.conv(x), 2, 2, 1, count_include_pad=False), 1),
    "global average": (lambda m, x: torch.flatten(F.adaptive_avg_pool2d(m.conv(x), (1, 1)), 1), 1),
    "relu6": (lambda m, x: F.relu6(m.conv(x)), 1),
    "ReLU alone": (lambda m, x: x.relu(), 0),
    "flatten alone": (lambda m, x: x.flatten(1), 0),
    "flatten of all": (lambda m, x: m.pool(m.conv(x)).flatten(), 1),
    "flatten of some": (lambda m, x: m.pool(m.conv(x)).flatten(1, 2), 1),
    "a view that is no flatten": (lambda m, x: m.linear(m.pool(m.conv(x)).view(2 * len(x), -1).repeat(1, 2)), 2),
    "a view of another dtype": (lambda m, x: m.pool(m.conv(x)).flatten(1).view(torch.int32).view(torch.float32), 1),
    "a view of three dimensions": (lambda m, x: m.pool(m.conv(x)).view(len(x), 8, -1), 1),
    "rows of a product": (lambda m, x: m.linear(m.pool(m.conv(x)).flatten(1) * 2), 2),
    "linear of an image": (lambda m, x: F.linear(m.conv(x), m.linear.weight[:, :10].contiguous()), 1),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_in_doubt_is_left_alone(case: str) -> None:
    body, runs = LEFT[case]
    model = Net(body).eval()
    function, plain = compiled(model), copy.deepcopy(model)
    with torch.no_grad():
        for batch in (images(2), images(3)):  # the second graph has a symbol for the batch size
            given, written = batch.clone(), batch.clone()
            expected = plain(given)
            actual, found = native_runs(function, written)
            assert found == runs
            assert torch.equal(written, given), "what it does to its input"
            # Bit for bit where nothing is fused; otherwise eager's own error is the measure.
            exact = {"rtol": 0, "atol": 0} if runs == 0 else {}
            torch.testing.assert_close(actual, expected, check_stride=True, **exact)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_training_dropout_draws_as_in_eager() -> None:
    model, x = Net(lambda m, x: m.linear(F.dropout(m.pool(m.conv(x)), 0.5, m.training).flatten(1))), images()
    function = compiled(model)
    with torch.no_grad():
        torch.manual_seed(5)
        actual, runs = native_runs(function, x)
        torch.manual_seed(5)
        torch.testing.assert_close(actual, model(x))
    assert runs == 2


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(6, 24), nn.Conv2d(2, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x).relu().view(x.shape[0], 2, 3, 4)
        x = self.conv(F.interpolate(x, scale_factor=2))
        return F.pixel_shuffle(F.interpolate(x, size=(5, 7), mode="bilinear"), 2).flatten(1).relu()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_rows_become_maps_and_maps_grow(dynamic: bool) -> None:
    model = Decoder().eval()
    function = compiled(model, dynamic=dynamic)
    for batch in (3, 5):
        assert_runs(function, model, torch.randn(batch, 6), runs=1)


def test_padding_modes_are_a_pad_and_a_convolution() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 5, 3, padding=2, padding_mode="circular"), nn.ReLU()).eval(), images()
    assert_runs(compiled(model), model, x, runs=1)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_weights_are_computed_in_the_graph(norm: str) -> None:
    model, x = nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU()).eval(), torch.randn(4, 9)
    getattr(parametrizations, norm)(model[0])
    model.eval()
    assert_runs(torch.compile(model, backend=dynamo.backend), model, x, runs=1)


def test_the_engine_is_asked_at_each_call() -> None:
    """One graph, and inputs that its guards let through but the engine does not."""
    model, x = conv_net()[:3], images()
    function, plain = compiled(model, dynamic=True), torch.compile(model, backend="eager", dynamic=True)
    assert_runs(function, model, x, runs=1)
    with torch.no_grad():
        for other in (
            images(0),
            torch.randn(2, 3, 3, 3),
            torch.randn(3, 12, 12),
            images().double(),
            torch.randn(2, 4, 9, 9),
        ):
            ours, theirs = outcome(function, other), outcome(plain, other)
            assert_same(ours, theirs)
    assert_runs(function, model, x, runs=1)


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    __tracebackhide__ = True
    assert (ours.error, ours.text.replace("fastseq", "eager")) == (theirs.error, theirs.text)
    if theirs.error is None:
        torch.testing.assert_close(ours.value, theirs.value, check_stride=True, equal_nan=True)


@pytest.mark.parametrize("form", ["view of shape", "reshape"])
def test_a_view_that_raises_when_it_runs(form: str) -> None:
    """With dynamic shapes dynamo passes a view of a channels_last image, which then raises."""
    model, x = Net(WRITTEN[form]).eval(), images()
    function, plain = compiled(model, dynamic=True), torch.compile(model, backend="eager", dynamic=True)
    assert_runs(function, model, x, runs=1)
    other = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_same(outcome(function, other), outcome(plain, other))
        assert (outcome(model, other).error is None) == (form == "reshape")


def test_special_values() -> None:
    model, x = nn.Sequential(nn.Linear(7, 5), nn.ReLU()).eval(), torch.randn(6, 7)
    x[0, 0], x[1, 1], x[2, 2] = torch.nan, torch.inf, -torch.inf
    assert_runs(compiled(model), model, x, runs=1)


# Autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, True], ids=["default", "dynamic"])
def test_gradients_are_eagers_and_training_goes_on(dynamic: bool | None) -> None:
    model, x = Net(WRITTEN["F.dropout"]).eval(), images()
    plain = copy.deepcopy(model)
    function = compiled(model, dynamic=dynamic)
    optimisers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, plain)]
    for _ in range(3):
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        result, runs = native_runs(function, ours)
        expected = plain(theirs)
        assert runs == 0 and result.requires_grad and torch.equal(result, expected)
        result.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(ours.grad, theirs.grad)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        assert_runs(function, plain, x, runs=1)


def test_frozen_models_are_fused_with_grad_mode_on() -> None:
    model, x = conv_net().requires_grad_(False), images()
    function = compiled(model)
    assert native_runs(function, x)[1] == 1
    wanted = x.clone().requires_grad_()
    result, runs = native_runs(function, wanted)
    assert runs == 0 and result.requires_grad


def test_inference_mode() -> None:
    model, x = conv_net(), images()
    function = compiled(model)
    with torch.inference_mode():
        result, runs = native_runs(function, x)
        torch.testing.assert_close(result, model(x))
    assert runs == 1 and result.is_inference()


def test_transforms_inside_and_outside() -> None:
    model, x = conv_net().requires_grad_(False), torch.stack([images(), images()])
    with torch.no_grad():
        inside, runs = native_runs(torch.compile(lambda x: torch.vmap(model)(x), backend=dynamo.backend), x)
        torch.testing.assert_close(inside, torch.vmap(model)(x))
    assert runs == 0
    loss = lambda x: model(x).square().sum()  # noqa: E731
    gradient = torch.compile(torch.func.grad(loss), backend=dynamo.backend)(x[0])
    torch.testing.assert_close(gradient, torch.func.grad(loss)(x[0]))


def test_autocast_around() -> None:
    model, x = conv_net(), images()
    function = compiled(model)
    assert_runs(function, model, x, runs=1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        actual, runs = native_runs(function, x)
        assert actual.dtype is torch.bfloat16 and torch.equal(actual, model(x)) and runs == 0
    assert_runs(function, model, x, runs=1)


# Weights ----------------------------------------------------------------------------------------------------------


def assign(model: nn.Module) -> None:
    model.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()}, assign=True)


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "in place": lambda model: model[0].weight.mul_(2),
    "through data": lambda model: model[0].weight.data.mul_(2),
    "other data": lambda model: setattr(model[5].weight, "data", torch.randn(10, 200)),
    "load_state_dict": lambda model: model.load_state_dict(conv_net().state_dict()),
    "load_state_dict, assign": assign,
    "other parameter": lambda model: setattr(model[0], "weight", nn.Parameter(torch.randn(8, 3, 3, 3))),
    "other bias": lambda model: setattr(model[5], "bias", nn.Parameter(torch.randn(10))),
}


@pytest.mark.parametrize("write", WRITES)
def test_written_weights_count_at_the_next_call(write: str) -> None:
    model, x, backend = conv_net(), images(), Backend()
    function = torch.compile(model, backend=backend)
    before = assert_runs(function, model, x, runs=1)
    for _ in range(3):
        with torch.no_grad():
            WRITES[write](model)
        after = assert_runs(function, model, x, runs=1)
        assert not torch.equal(after, before)
    assert backend.graphs == 1


def test_models_that_share_a_graph_keep_their_weights_apart() -> None:
    backend, x = Backend(), images()
    models = [conv_net() for _ in range(5)]
    functions = [torch.compile(model, backend=backend) for model in models]
    for _ in range(3):
        for model, function in zip(models, functions, strict=True):
            assert_runs(function, model, x, runs=1)
    assert backend.graphs == 1, "the premise of this test"


def test_models_that_share_a_graph_in_threads() -> None:
    models, inputs = [conv_net() for _ in range(4)], [images() for _ in range(4)]
    functions = [compiled(model) for model in models]
    with torch.no_grad():
        expected = [model(x) for model, x in zip(models, inputs, strict=True)]
        functions[0](inputs[0])
    wrong: list[str] = []

    def work(first: int) -> None:
        with torch.no_grad():
            for i in range(200):
                which = (first + i) % len(models)
                actual = functions[which](inputs[which])
                if not torch.allclose(actual, expected[which], atol=1e-5):
                    wrong.append(f"thread {first}, call {i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_tied_weights() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, m.square.weight).relu(), m.square.weight).relu()

    model, x = Net(body).eval(), torch.randn(3, 6)
    model.square = nn.Linear(6, 6)
    assert_runs(compiled(model), model, x, runs=1)


def test_packed_weights_repeat_for_a_model_only_when_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(dynamo.Binding, "__init__", counting(made, dynamo.Binding.__init__))
    models, x = [conv_net() for _ in range(3)], images()
    functions = [compiled(model) for model in models]
    for _ in range(4):
        for model, function in zip(models, functions, strict=True):
            assert_runs(function, model, x, runs=1)
    assert len(made) == 3


def counting(made: list[Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any) -> Any:
        made.append(args)
        return function(*args)

    return counted


@pytest.mark.parametrize("make", [conv_net, lambda: Net(WRITTEN["modules"]).eval()], ids=["Sequential", "Module"])
def test_a_model_that_is_gone_is_freed_though_its_graph_stays(make: Callable[[], nn.Module]) -> None:
    model, x = make(), images()
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    function = compiled(model)
    assert_runs(function, model, x, runs=1)
    del model, function
    gc.collect()
    assert not [weight for weight in weights if weight() is not None]
    other = make()
    assert_runs(compiled(other), other, x, runs=1)


def test_graphs_of_one_model_share_its_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(dynamo.Binding, "__init__", counting(made, dynamo.Binding.__init__))
    model, backend = Holder().eval(), Backend()
    for dynamic in (None, True):
        function = torch.compile(model, backend=backend, dynamic=dynamic)
        for batch in (2, 3):
            assert_runs(function, model, images(batch), runs=1)
            function(images(batch))  # with gradients
    assert backend.graphs >= 4 and len(made) == 1


def test_chains_that_differ_in_an_attribute_share_nothing() -> None:
    """The same parameters in two chains of one graph."""

    def body(m: Any, x: Tensor) -> Any:
        strides = [F.conv2d(x, m.conv.weight, m.conv.bias, stride=stride).relu() for stride in (1, 2, (1, 2))]
        pools = [F.max_pool2d(F.conv2d(x, m.conv.weight), 2, ceil_mode=ceil_mode) for ceil_mode in (False, True)]
        return torch.cat([y.flatten(1) for y in (*strides, *pools, F.conv2d(x, m.conv.weight, m.conv.bias))], 1)

    model, x = Net(body).eval(), torch.randn(2, 3, 11, 11)
    for _ in range(2):
        assert_runs(compiled(model), model, x, runs=6)


def test_refresh_sees_what_the_sample_misses() -> None:
    model, x = nn.Sequential(nn.Linear(512, 512), nn.ReLU()).eval(), torch.randn(3, 512)
    function = compiled(model)
    before = assert_runs(function, model, x, runs=1)
    model[0].weight.data.view(-1).numpy()[7001:7009] = 50.0
    fastseq.refresh(model)
    after = assert_runs(function, model, x, runs=1)
    assert not torch.equal(after, before)


def test_copies_and_files_of_the_model() -> None:
    model, x = conv_net(), images()
    function = compiled(model)
    expected = assert_runs(function, model, x, runs=1)
    buffer = io.BytesIO()
    torch.save(dict(model.named_parameters()), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert b"fastseq.dynamo" not in buffer.getvalue() + pickle.dumps(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), conv_net()]
    copies[2].load_state_dict(loaded, assign=True)
    for copied in copies:
        with torch.no_grad():
            copied[0].weight.add_(0)
        assert torch.equal(assert_runs(compiled(copied), copied, x, runs=1), expected)
        copied[0].weight.data.mul_(2)
        assert not torch.equal(assert_runs(compiled(copied), copied, x, runs=1), expected)
    assert torch.equal(assert_runs(function, model, x, runs=1), expected)


# Graphs that others made ------------------------------------------------------------------------------------------


def test_graphs_that_call_modules() -> None:
    """What torch.fx makes, and dynamo where it does not look into modules."""
    model, x = conv_net(), images()
    graph_module = fx.symbolic_trace(model)
    text = str(graph_module.graph)
    function = dynamo.backend(graph_module, [x])
    before = assert_runs(function, model, x, runs=1)
    assert str(graph_module.graph) == text, "the graph it was given is as it was"
    assert not torch.equal(before, assert_runs(after_write(function, model), model, x, runs=1))
    fired = []
    handle = model[1].register_forward_hook(lambda *_: fired.append(1))
    with torch.no_grad():
        result, runs = native_runs(function, x)
        torch.testing.assert_close(result, model(x))
    assert runs == 0 and len(fired) == 2
    handle.remove()
    assert_runs(function, model, x, runs=1)


def after_write(function: Callable[..., Any], model: Any) -> Callable[..., Any]:
    model[0].weight.data.mul_(2)
    return function


def test_graphs_with_parameters_of_their_own() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(F.relu(F.conv2d(x, self.weight, self.bias)), 2).view(x.shape[0], -1)

    model, x = Written(), images()
    graph_module = fx.symbolic_trace(model)
    assert [node.op for node in graph_module.graph.nodes].count("get_attr") == 2
    assert_runs(dynamo.backend(graph_module, [x]), model, x, runs=1)  # nothing proves that the view is a flatten


def test_a_layer_called_twice() -> None:
    conv = nn.Conv2d(3, 3, 3)
    model, x = nn.Sequential(conv, nn.ReLU(), conv, nn.ReLU()).eval(), images()
    assert_runs(dynamo.backend(fx.symbolic_trace(model), [x]), model, x, runs=1)
    assert_runs(compiled(model), model, x, runs=1)


def test_regions_and_graph_breaks() -> None:
    class Broken(Net):
        # In forward itself: behind a break in a function that it calls, older torch compiles nothing.
        def forward(self, x: Tensor) -> Tensor:
            y = self.pool(self.conv(x).relu())
            torch._dynamo.graph_break()
            return self.linear(y.flatten(1))

    model, x = Broken(None).eval(), images()
    assert_runs(torch.compile(model, backend=dynamo.backend), model, x, runs=2)


# Its place in torch -----------------------------------------------------------------------------------------------


def test_hooks_for_all_modules_hear_what_they_hear_under_eager() -> None:
    heard: list[list[str]] = []
    for backend in ("eager", dynamo.backend):
        torch._dynamo.reset()
        model, x, names = Net(WRITTEN["modules"]).eval(), images(), []
        function = torch.compile(model, backend=backend)
        with torch.no_grad():
            function(x)
            handle = nn.modules.module.register_module_forward_hook(
                lambda m, *_, names=names: names.append(type(m).__name__)
            )
            try:
                function(x)
            finally:
                handle.remove()
        heard.append([name for name in names if "Graph" not in name])
    assert heard[0] == heard[1]


@pytest.mark.parametrize("variable", ["FASTSEQ_CHECK", "FASTSEQ_VERBOSE"])
def test_variables(variable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(variable, "1")
    model, x = conv_net(), images()
    with caplog.at_level("DEBUG", "fastseq"):
        assert_runs(compiled(model), model, x, runs=1)
    assert "torch.compile: fused: input_1, input_2" in caplog.text


def test_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_DISABLE", "1")
    model, x = conv_net(), images()
    assert_runs(compiled(model), model, x, runs=0)


def test_reasons_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Net(lambda m, x: F.max_pool2d(m.conv(x), 2, return_indices=True)[0]).eval(), images()
    with caplog.at_level("DEBUG", "fastseq"):
        assert_runs(compiled(model), model, x, runs=1)
    reason = "MaxPool2d has return_indices=True; fused kernels return values only"
    assert f"torch.compile: eager: max_pool2d: {reason}" in caplog.text


def entry_points() -> dict[str, str]:
    """Those of pyproject.toml, read as text: Python 3.10 has no tomllib."""
    section = (ROOT / "pyproject.toml").read_text().split("[project.entry-points.torch_dynamo_backends]\n")[1]
    lines = section.split("\n[")[0].strip().splitlines()
    return {name.strip(): value.strip().strip('"') for name, value in (line.split("=") for line in lines)}


def test_entry_point_leads_to_the_backend() -> None:
    assert list(entry_points()) == ["fastseq"]
    entry = EntryPoint("fastseq", entry_points()["fastseq"], "torch_dynamo_backends")
    assert entry.load() is dynamo.backend
    installed = [e for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "fastseq"]
    assert all(e.value == entry.value for e in installed)


def test_backend_by_name(tmp_path: Path) -> None:
    """In a process that finds the metadata as an installation would leave it, and another package's beside it."""
    info = tmp_path / "fastseq_of_the_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastseq-of-the-test\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entry_points().items()]
    (info / "entry_points.txt").write_text("\n".join(["[torch_dynamo_backends]", *lines, ""]))
    script = """
import torch
from torch import nn

model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU()).eval(), torch.randn(3, 5)
assert "fastseq" in torch._dynamo.list_backends()
fast = torch.compile(model, backend="fastseq")
with torch.no_grad():
    fast(x)
    with torch.profiler.profile() as profile:
        result = fast(x)
    torch.testing.assert_close(result, model(x))
assert [event.name for event in profile.events()].count("fastseq::run") == 1
"""
    result = run_python("-c", script, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert result.returncode == 0, result.stderr


def test_without_the_extension_the_graph_runs_as_it_is(shadow_package: Callable[[str | bytes | None], Path]) -> None:
    script = """
import torch
from torch import nn
from fastseq import dynamo

model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU()).eval(), torch.randn(3, 5)
with torch.no_grad():
    assert torch.equal(torch.compile(model, backend=dynamo.backend)(x), model(x))
"""
    result = run_python("-c", script, cwd=shadow_package(None))
    assert result.returncode == 0 and "fastseq runs every model eager" in result.stderr, result.stderr
