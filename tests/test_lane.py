"""The fast lane of calls: that it is taken, and everything that must leave it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dropin import (
    NETS,
    RUNS,
    assert_identical,
    call,
    eager,
    first,
    fused,
    images,
    one_thread,  # noqa: F401
    outcome,
)
from helpers import ISAS, use_kernels
from torch import Tensor, nn

import fastseq
from fastseq import FusedSequential
from fastseq.sequential import COMPILED


class Net(nn.Module):
    """A forward that is a straight line."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(F.relu(self.first(x)))
        return result


def small() -> nn.Module:
    return fastseq.optimize(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))


MODELS: dict[str, Callable[[], nn.Module]] = {"sequential": small, "module": lambda: fastseq.optimize(Net())}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def frames_of(function: Callable[[], object]) -> list[str]:
    """The Python functions that `function` enters."""
    names: list[str] = []

    def profile(frame: Any, event: str, argument: object) -> None:
        if event == "call":
            names.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return names[1:]


def rows() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def assert_follows(model: nn.Module, x: Tensor | None = None) -> None:
    """The next call is eager's on the model as it is."""
    x = rows() if x is None else x
    with torch.no_grad():
        torch.testing.assert_close(model(x), eager(model, x))


@each_model
def test_a_fused_call_enters_no_python_function(make: Callable[[], nn.Module]) -> None:
    model, x = make(), rows()
    with torch.no_grad():
        model(x)
        fastseq.reset_stats(model)
        assert frames_of(lambda: model(x)) == []
    assert fastseq.stats(model) == fused()
    assert "__call__" in frames_of(lambda: model(x))  # gradients


@each_model
@pytest.mark.parametrize(
    "arguments",
    [
        ((), {}),
        ((rows(), rows()), {}),
        ((), {"x": rows()}),
        ((rows(),), {"more": 1}),
        ((None,), {}),
        ((rows()[0, 0],), {}),
    ],
    ids=["none", "two", "keyword", "both", "None", "scalar"],
)
def test_odd_arguments(make: Callable[[], nn.Module], arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    model = make()
    args, kwargs = arguments
    with torch.no_grad():
        model(rows())
        expected = outcome(eager, model, *args, **kwargs)
        actual = outcome(model, *args, **kwargs)
    assert type(actual) is type(expected)
    if isinstance(expected, Exception):
        assert str(actual) == str(expected)


@each_model
def test_empty_keywords(make: Callable[[], nn.Module]) -> None:
    model, x = make(), rows()
    with torch.no_grad():
        assert_identical(model(x), model(*(x,), **{}))


def test_a_call_assigned_to_the_class_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = fastseq.optimize(Net()), rows()
    with torch.no_grad():
        model(x)
        original = type(model).__call__
        monkeypatch.setattr(type(model), "__call__", lambda self, *_: "assigned")
        assert model(x) == "assigned"
        other: Any = fastseq.optimize(Net())  # of the same class
        assert other(x) == "assigned"
        monkeypatch.setattr(type(model), "__call__", original)
        assert_follows(model)
        assert fastseq.stats(model)["fused_calls"] > 0


def test_the_lane_comes_back_with_the_call() -> None:
    original = FusedSequential.__call__
    with torch.no_grad():
        FusedSequential.__call__ = lambda self, *_: "assigned"  # type: ignore[method-assign]
        try:
            assert small()(rows()) == "assigned"
        finally:
            FusedSequential.__call__ = original  # type: ignore[method-assign]
        model, x = small(), rows()
        model(x)
        assert frames_of(lambda: model(x)) == []


def test_a_subclass_has_its_own_call() -> None:
    class Loud(FusedSequential):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return "loud", super().__call__(*args, **kwargs)

    model, x = small(), rows()
    with torch.no_grad():
        expected = model(x)
        object.__setattr__(model, "__class__", Loud)
        word, actual = model(x)
        assert word == "loud"
        torch.testing.assert_close(actual, expected)


@each_model
def test_a_forward_of_the_instance_counts(make: Callable[[], nn.Module]) -> None:
    model: Any = make()
    with torch.no_grad():
        model(rows())
        model.forward = lambda x: "own"
        assert model(rows()) == "own"
        assert model(rows()) == "own"
        del model.forward
        assert_follows(model)


@each_model
def test_compiling(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make(), rows()
    with torch.no_grad():
        model(x)
        fastseq.reset_stats(model)
        for _ in range(2):  # and back
            with monkeypatch.context() as m:
                m.setattr(torch.compiler, "_is_compiling_flag", True)
                assert_identical(model(x), eager(model, x))
                assert fastseq.stats(model)["fused_calls"] == 0
        model(x)
        assert fastseq.stats(model) == fused()


@each_model
def test_another_models_match_or_none_in_the_place_of_its_own(make: Callable[[], nn.Module]) -> None:
    model, donor = make(), make()
    with torch.no_grad():
        model(rows()), donor(rows())
        model.__dict__[COMPILED] = donor.__dict__[COMPILED]
        assert_follows(model)
        del model.__dict__[COMPILED]
        assert_follows(model)


def test_stand_ins_for_debugging_are_no_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FASTSEQ_CHECK", "FASTSEQ_VERBOSE"):
        with monkeypatch.context() as m:
            m.setenv(name, "1")
            model = small()
            with torch.no_grad():
                model(rows())
                assert model.__dict__[COMPILED].lane is None
                assert "__call__" in frames_of(lambda model=model: model(rows()))  # type: ignore[misc]


# Each change after a call, and back again: whatever is stamped must be looked at again when it differs --------------


def changed_bias(model: Any) -> Callable[[], None]:
    layer = first(model, nn.Linear)
    before = layer.bias
    layer.bias = nn.Parameter(before.detach() + 1)
    return lambda: setattr(layer, "bias", before)


def no_bias(model: Any) -> Callable[[], None]:
    layer = first(model, nn.Linear)
    before = layer.bias
    layer.bias = None
    return lambda: setattr(layer, "bias", before)


def new_parameters_dict(model: Any) -> Callable[[], None]:
    layer = first(model, nn.Linear)
    before = layer.__dict__["_parameters"]
    layer.__dict__["_parameters"] = {name: nn.Parameter(p.detach() * 2) for name, p in before.items()}
    return lambda: layer.__dict__.update(_parameters=before)


def new_dict(model: Any) -> Callable[[], None]:
    layer = first(model, nn.Linear)
    before = layer.__dict__
    layer.__dict__ = {**before, "_parameters": {n: nn.Parameter(p.detach() * 2) for n, p in layer._parameters.items()}}
    return lambda: setattr(layer, "__dict__", before)


def hook(model: Any) -> Callable[[], None]:
    return first(model, nn.Linear).register_forward_hook(lambda module, args, output: output + 1).remove


def hook_of_all(model: Any) -> Callable[[], None]:
    return torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: output + 1).remove


def own_hook(model: Any) -> Callable[[], None]:
    return model.register_forward_hook(lambda module, args, output: output + 1).remove


def replaced_function(model: Any) -> Callable[[], None]:
    before = F.linear
    module: Any = F
    module.linear = lambda x, weight, bias=None: before(x, weight, bias) + 1
    return lambda: setattr(F, "linear", before)


def replaced_class_forward(model: Any) -> Callable[[], None]:
    before = nn.Linear.forward
    kind: Any = nn.Linear
    kind.forward = lambda self, x: before(self, x) + 1
    return lambda: setattr(nn.Linear, "forward", before)


def hidden_weight(model: Any) -> Callable[[], None]:
    layer = first(model, nn.Linear)
    layer.__dict__["weight"] = layer.weight.detach() * 3
    return lambda: layer.__dict__.pop("weight")


def other_child(model: Any) -> Callable[[], None]:
    name, before = next((n, c) for n, c in model._modules.items() if isinstance(c, nn.Linear))
    model._modules[name] = nn.Linear(before.in_features, before.out_features)
    return lambda: model._modules.update({name: before})


CHANGES = [
    changed_bias,
    no_bias,
    new_parameters_dict,
    new_dict,
    hook,
    hook_of_all,
    own_hook,
    replaced_function,
    replaced_class_forward,
    hidden_weight,
    other_child,
]


@each_model
@pytest.mark.parametrize("change", CHANGES)
def test_each_change_counts_at_the_next_call(
    make: Callable[[], nn.Module], change: Callable[[Any], Callable[[], object]]
) -> None:
    model, x = make(), rows()
    with torch.no_grad():
        before = model(x)
        for _ in range(3):
            undo = change(model)
            try:
                expected = eager(model, x)
                assert not torch.allclose(expected, before)
                torch.testing.assert_close(model(x), expected)
                torch.testing.assert_close(model(x), expected)
            finally:
                undo()
            torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(3, 5), (1, 16), (8, 17), (33, 31), (64, 128), (128, 128), (160, 129)])
def test_every_element_and_place_of_a_weight_counts(
    shape: tuple[int, int], isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no version tells: signs, exchanged elements, all elements moved; in weights read whole and sampled."""
    use_kernels(monkeypatch, isa)
    torch.manual_seed(0)
    model = fastseq.optimize(nn.Sequential(nn.Linear(shape[1], shape[0]), nn.ReLU(), nn.Linear(shape[0], 2)))
    layer: Any = model[0]
    x = torch.rand(2, shape[1]) + 0.5
    values = layer.weight.detach().numpy().reshape(-1)
    is_sampled = values.size > 16 * 1024
    places = [0, values.size - 1] if is_sampled else [*range(0, values.size, max(1, values.size // 7)), values.size - 1]

    def negate(i: int) -> None:
        values[i] = -values[i]

    def double(i: int) -> None:
        values[i] *= 2

    def exchange(i: int) -> None:
        values[i], values[i - 1] = float(values[i - 1]), float(values[i])

    def negate_all(i: int) -> None:
        values[...] = -values

    def reverse(i: int) -> None:
        values[...] = values[::-1].copy()

    def roll(i: int) -> None:
        values[...] = values[[*range(64, values.size), *range(min(64, values.size))]].copy()

    run = None
    with torch.no_grad():
        model(x)
        run = model.__dict__[COMPILED].runs[0]
        for change in (negate, double, exchange, negate_all, reverse, roll):
            for place in places if change in (negate, double, exchange) else places[:1]:
                made, before = run.plans_made(), values.copy()
                change(place)
                torch.testing.assert_close(model(x), eager(model, x))
                assert run.plans_made() == made + int((before != values).any())


def test_a_layer_that_restores_the_model_meanwhile() -> None:
    class Restoring(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            fastseq.restore(holder[0])
            return x

    model = fastseq.optimize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Restoring(), nn.Linear(8, 8)))
    holder: list[Any] = [fastseq.optimize(nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))]
    with torch.no_grad():
        expected = eager(model, rows())
        holder[0] = model
        torch.testing.assert_close(model(rows()), expected)
    assert type(model) is nn.Sequential


def test_errors_of_layers_pass_through() -> None:
    class Raising(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("from the layer")

    model = fastseq.optimize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Raising()))
    for _ in range(3):
        with torch.no_grad(), pytest.raises(KeyError, match="from the layer"):
            model(rows())


@pytest.mark.parametrize("net", NETS)
def test_whole_networks(net: str) -> None:
    model, x = fastseq.optimize(NETS[net]()), images()
    with torch.no_grad():
        for _ in range(3):
            actual, counters = call(model, x)
            torch.testing.assert_close(actual, eager(model, x))
            assert counters == fused(RUNS[net])
