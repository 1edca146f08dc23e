"""Behaviours 1 to 10: the structure of a Sequential."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from behaviour import assert_close_to_eager, assert_declined, one_thread, plain, reasons  # noqa: F401
from dropin import assert_same_outcome, call, conv_net, eager, first, fused, images, nested_net, outcome
from torch import Tensor, nn

import fastseq
from fastseq import FusedSequential

SQUARE = (3, 6)


def twice_the_same() -> nn.Sequential:
    linear, relu = nn.Linear(6, 6), nn.ReLU()
    return nn.Sequential(linear, relu, linear, relu)


# 1, 2: layers that stand twice --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_conv", [False, True], ids=["linear", "conv"])
def test_01_every_entry_runs_even_if_it_stands_twice(is_conv: bool) -> None:
    """Sequential(a, r, b, r) runs four layers, and lists three in `named_children`."""
    a, b = (nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3)) if is_conv else (nn.Linear(12, 5), nn.Linear(5, 4))
    relu = nn.ReLU()
    model = nn.Sequential(a, relu, b, relu)
    fast = fastseq.optimize(model)
    assert (len(fast), len(list(fast.named_children())), list(fast._modules)) == (4, 3, ["0", "1", "2", "3"])
    assert fast[1] is fast[3]
    assert (assert_close_to_eager(fast, images(), runs=1) >= 0).all()
    (entry,) = fastseq.explain(fast).to_dict()["sequentials"]
    assert [step["layers"] for step in entry["segments"][0]["steps"]] == [["0", "1"], ["2", "3"]]


def test_01_an_eager_layer_that_stands_twice_runs_twice() -> None:
    """Counted by what it leaves behind: a BatchNorm in training mode."""
    norm = nn.BatchNorm2d(3)
    fast = fastseq.optimize(nn.Sequential(norm, nn.Conv2d(3, 3, 1), norm, nn.ReLU(), norm))
    expected = plain(fast)
    with torch.no_grad():
        x = images()
        torch.testing.assert_close(fast(x), expected(x))
    assert fast[0].num_batches_tracked == 3
    torch.testing.assert_close(fast.state_dict(), expected.state_dict())


def test_02_a_shared_layer_has_both_keys_and_one_copy_of_its_parameters() -> None:
    """A layer that stands twice: `state_dict` has it twice, `parameters()` once, one write counts in both places."""
    fast = fastseq.optimize(twice_the_same())
    x = torch.randn(SQUARE)
    assert list(fast.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [name for name, _ in fast.named_parameters()] == ["0.weight", "0.bias"]
    before = assert_close_to_eager(fast, x, runs=1)
    with torch.no_grad():
        fast[2].bias.add_(1)
    assert not torch.equal(assert_close_to_eager(fast, x, runs=1), before)
    fast.load_state_dict(twice_the_same().state_dict(), strict=True)
    assert_close_to_eager(fast, x, runs=1)


def test_02_a_hook_on_a_shared_layer_fires_for_each_place() -> None:
    fast, x, seen = fastseq.optimize(twice_the_same()), torch.randn(SQUARE), []
    handle = fast[1].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    with torch.no_grad():
        expected = eager(fast, x)
        actual, counters = call(fast, x)
        assert torch.equal(actual, expected) and counters["fused_calls"] == 0
        assert len(seen) == 4 and all(torch.equal(a, b) for a, b in zip(seen[:2], seen[2:], strict=True))
        handle.remove()
    assert_close_to_eager(fast, x, runs=1)


# 3, 4: subclasses, forwards of one's own ----------------------------------------------------------------------------


class Doubled(nn.Sequential):
    def forward(self, input: Any) -> Any:
        return super().forward(input) * 2


class Called(nn.Sequential):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 3


class Renamed(nn.Sequential):
    pass


@pytest.mark.parametrize("kind", [Doubled, Called, Renamed])
@pytest.mark.parametrize("place", ["root", "child"])
def test_03_a_subclass_of_sequential_runs_its_own_code(kind: type[nn.Sequential], place: str) -> None:
    """A class with a `forward` or `__call__` of its own is never replaced, as the model or inside one."""
    inner, x = kind(nn.Linear(6, 6), nn.ReLU()), torch.randn(SQUARE)
    model = inner if place == "root" else nn.Sequential(nn.Linear(6, 6), inner, nn.Linear(6, 2))
    fast = fastseq.optimize(model)
    assert type(fast if place == "root" else fast[1]) is kind
    if place == "root":
        with torch.no_grad():
            assert torch.equal(fast(x), model(x))
    else:
        assert_close_to_eager(fast, x, runs=2)
        assert kind.__name__ in reasons(fast)


@pytest.mark.parametrize("when", ["before optimize", "after a call"])
def test_03_a_forward_on_the_instance_counts_and_a_call_on_the_instance_does_not(when: str) -> None:
    """`m.forward = f` is honoured by `m(x)`; `m.__call__ = f` is not, for Python looks at the class."""
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU()), torch.randn(SQUARE)
    fast = model if when == "before optimize" else fastseq.optimize(model)
    with torch.no_grad():
        fast(x)
    fast.forward = lambda input: input - 1  # type: ignore[method-assign]
    fast = fastseq.optimize(fast) if when == "before optimize" else fast
    assert torch.equal(fast(x), x - 1)
    del fast.forward
    fast = fastseq.optimize(fast)
    fast.__call__ = lambda input: input - 1  # type: ignore[method-assign]
    assert_close_to_eager(fast, x, runs=1)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (nn.Module, "__call__"),
        (nn.Module, "_call_impl"),
        *((kind, "__call__") for kind in (nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten, nn.Dropout, nn.Sequential)),
    ],
)
def test_03_a_call_replaced_on_a_class_counts(
    kind: type[nn.Module], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tracers and profilers do it: the replacement is called for every layer and container that it concerns."""
    fast, x, log = fastseq.optimize(nested_net()), images(), list[str]()
    before = assert_close_to_eager(fast, x, runs=1)
    own = getattr(kind, name)

    def call_and_log(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        log.append(type(self).__name__.replace("FusedSequential", "Sequential"))
        return own(self, *args, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(kind, name, call_and_log)
        expected = plain(fast)(x)
        seen, log[:] = log[:], []
        assert torch.equal(fast(x), expected) and log == seen
        assert len(log) == (11 if kind is nn.Module else log.count(kind.__name__)) > 0
    assert torch.equal(assert_close_to_eager(fast, x, runs=1), before)


class LoRA(nn.Linear):
    """A low-rank update beside the weight."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.a, self.b = nn.Parameter(torch.randn(2, n_in)), nn.Parameter(torch.randn(n_out, 2))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.a.T @ self.b.T


class WeightStandardized(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


class Shifted(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) - 1


class NegativePool(nn.MaxPool2d):
    def forward(self, input: Tensor) -> Tensor:
        return -super().forward(-input)


class SilentLinear(nn.Linear):
    """A subclass that changes nothing is a subclass too."""


SUBCLASSES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LoRA": (lambda: LoRA(12, 12), "LoRA is a subclass of Linear"),
    "standardized": (lambda: WeightStandardized(3, 3, 3), "WeightStandardized is a subclass of Conv2d"),
    "shifted": (Shifted, "Shifted is a subclass of ReLU"),
    "negative pool": (lambda: NegativePool(2), "NegativePool is a subclass of MaxPool2d"),
    "silent": (lambda: SilentLinear(12, 12), "SilentLinear is a subclass of Linear"),
    "NonDynamicallyQuantizableLinear": (
        lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(12, 12),
        "is a subclass of Linear",
    ),
    "quantisation-aware": (
        lambda: torch.ao.nn.qat.Linear(12, 12, qconfig=torch.ao.quantization.get_default_qat_qconfig()),
        "Linear",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SUBCLASSES)
def test_04_a_subclass_of_a_layer_is_another_layer(name: str) -> None:
    """Only the exact classes are fused: a subclass (LoRA, quantisation-aware, a user's) has its own forward."""
    make, reason = SUBCLASSES[name]
    layer = make().eval()
    if hasattr(layer, "weight_fake_quant"):
        layer.apply(torch.ao.quantization.disable_observer)  # an observer would see the second of two calls
    assert_declined(layer, images(), reason)


@pytest.mark.parametrize("when", ["before optimize", "after a call"])
@pytest.mark.parametrize("place", ["instance", "class"])
def test_04_a_convolution_may_be_given_another_inner_forward(
    place: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`conv._conv_forward = f`, by which programs make padding circular in one direction alone."""

    def wrap_around(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = nn.functional.pad(x, (1, 1, 0, 0), mode="circular")
        return nn.functional.conv2d(x, weight, bias, self.stride, (1, 0))

    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3)), images()
    fast = fastseq.optimize(model)
    before = assert_close_to_eager(fast, x, runs=1)
    with monkeypatch.context() as patch, torch.no_grad():
        if place == "class":
            patch.setattr(nn.Conv2d, "_conv_forward", wrap_around)
        else:
            patch.setattr(fast[0], "_conv_forward", wrap_around.__get__(fast[0]), raising=False)
        fast = fastseq.optimize(fast) if when == "before optimize" else fast
        for _ in range(2):
            expected, (result, counters) = plain(fast)(x), call(fast, x)
            torch.testing.assert_close(result, expected)
            assert result.shape != before.shape or not torch.allclose(result, before)
            assert counters["fused_calls"] == (0 if place == "class" else 1)
    if when == "after a call":
        assert torch.equal(assert_close_to_eager(fast, x, runs=1), before)


def test_04_a_relu6_behind_a_convolution_is_no_relu() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        model[0].weight.mul_(100)
    fast, x = fastseq.optimize(model), images()
    assert_close_to_eager(fast, x, runs=1)
    with torch.no_grad():
        assert fast[:2](x).max() == 6


# 5: a Sequential is a list ------------------------------------------------------------------------------------------


def named() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(a=nn.Linear(6, 8), b=nn.ReLU(), c=nn.Linear(8, 8), d=nn.ReLU(), e=nn.Linear(8, 6), f=nn.ReLU())
    )


def put(model: nn.Sequential, index: Any, layer: nn.Module) -> None:
    model[index] = layer


EDITS: dict[str, Callable[[nn.Sequential], Any]] = {
    "append": lambda m: m.append(nn.Linear(6, 3)),
    "insert": lambda m: m.insert(1, nn.Linear(8, 8)),
    "insert at the end": lambda m: m.insert(len(m), nn.Tanhshrink()),
    "extend": lambda m: m.extend([nn.Linear(6, 2), nn.ReLU()]),
    "+=": lambda m: m.__iadd__(nn.Sequential(nn.Linear(6, 2))),
    "*=": lambda m: m.__imul__(2),
    "pop": lambda m: m.pop(-1),
    "del": lambda m: m.__delitem__(1),
    "del slice": lambda m: m.__delitem__(slice(2, 4)),
    "del first": lambda m: m.__delitem__(slice(0, 2)),
    "set": lambda m: put(m, 3, nn.Tanhshrink()),
    "set last": lambda m: put(m, -1, nn.Softsign()),
    "identity": lambda m: put(m, 1, nn.Identity()),
    "setattr": lambda m: setattr(m, next(iter(m._modules)), nn.Linear(6, 8)),
    "add_module": lambda m: m.add_module("more", nn.Linear(6, 4)),
    "register_module": lambda m: m.register_module("more", nn.ReLU()),
    "_modules": lambda m: m._modules.update({"more": m._modules.pop(next(iter(m._modules)))}),
    "dropout": lambda m: m.append(nn.Dropout(0.5)).eval(),
    "None": lambda m: m.add_module("none", None),
}


@pytest.mark.parametrize("place", ["outer", "inner"])
@pytest.mark.parametrize("names", ["numbered", "named"])
@pytest.mark.parametrize("edit", EDITS)
def test_05_an_edit_counts_at_the_next_call(edit: str, names: str, place: str) -> None:
    """Edited like a list, before or after calls; keys are renumbered as eager does, even those with names."""
    model = named() if names == "named" else nn.Sequential(*named())
    model = model if place == "outer" else nn.Sequential(model)
    torch.manual_seed(1)
    fast, x = fastseq.optimize(model), torch.randn(SQUARE)
    assert_close_to_eager(fast, x, runs=1)
    errors = []
    for edited in (model, fast):
        torch.manual_seed(2)
        edited = edited if place == "outer" else edited[0]
        errors.append(outcome(EDITS[edit], edited)[1:])
    assert errors[0] == errors[1], "eager itself cannot do every edit of named children"
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in model.named_modules()]
    expected, result = outcome(model, x), assert_same_outcome(fast, x)
    assert (result.error, result.text) == (expected.error, expected.text)
    if expected.error is None:
        with torch.no_grad():
            actual, counters = call(fast, x)
        torch.testing.assert_close(actual, expected.value.detach())
        assert counters["fused_calls"] >= 1 and not set(counters["fallbacks"]) - {"an eager layer"}


@pytest.mark.parametrize(
    "cut", [slice(2), slice(1, None), slice(0, 4), slice(2, 4), slice(None, None, -1), slice(3, 3)]
)
def test_05_a_slice_shares_its_layers(cut: slice) -> None:
    """`m[1:]` keeps the class, the layers and their keys."""
    model = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.ReLU())])
    fast, x = fastseq.optimize(model), torch.randn(SQUARE)
    assert_close_to_eager(fast, x, runs=1)
    part = fast[cut]
    assert type(part) is type(fast) and isinstance(part, nn.Sequential)
    assert list(part._modules) == list(model[cut]._modules)
    assert all(a is b for a, b in zip(part, list(fast)[cut], strict=True))
    assert list(part.state_dict()) == list(model[cut].state_dict())
    with torch.no_grad():
        torch.testing.assert_close(part(x), model[cut](x))
        fast[0].weight.mul_(2)
        torch.testing.assert_close(part(x), eager(part, x))
    assert fast[:2][0] is fast[0]


# 6: empty, None, arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [None, 3, "text", [1], (), {"a": 1}, object(), torch.randn(2), torch.tensor(1j)])
def test_06_an_empty_sequential_returns_its_argument_itself(thing: Any) -> None:
    emptied = fastseq.optimize(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with torch.no_grad():
        emptied(torch.randn(1, 2))
    del emptied[:]
    assert type(emptied) is FusedSequential and len(emptied) == 0
    inside = fastseq.optimize(nn.Sequential(nn.Sequential(), nn.Sequential(nn.Sequential())))
    for empty in (fastseq.optimize(nn.Sequential()), emptied, inside, FusedSequential()):
        assert empty(thing) is thing and empty.forward(thing) is thing


def test_06_none_raises_only_when_called() -> None:
    fast = fastseq.optimize(nn.Sequential(nn.Linear(12, 12), None, nn.Linear(12, 2)))  # type: ignore[arg-type]
    expected = assert_same_outcome(fast, images())
    assert expected.error is TypeError and "NoneType" in expected.text
    fast[1] = nn.ReLU()
    assert_close_to_eager(fast, images(), runs=1)


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
def test_06_arguments_of_the_call_and_of_the_constructor(is_warm: bool) -> None:
    """The keyword is `input`; two positional arguments, none, or another keyword raise eager's TypeError."""
    fast, x = fastseq.optimize(conv_net()), images()
    if is_warm:
        assert_close_to_eager(fast, x, runs=1)
    with torch.no_grad():
        result, counters = call(fast, input=x)
        assert counters == fused() and torch.equal(result, fast(x))
    for args, kwargs in (((x, x), {}), ((), {}), ((), {"x": x}), ((x,), {"input": x}), ((x,), {"y": 1})):
        assert assert_same_outcome(fast, *args, **kwargs).error is TypeError
    for cls in (nn.Sequential, FusedSequential):
        with pytest.raises(TypeError):
            cls(x=nn.ReLU())  # type: ignore[call-overload]


# 7, 8: nesting and names --------------------------------------------------------------------------------------------


def test_07_nested_sequentials_keep_keys_and_hooks() -> None:
    """Flattened for execution only: module tree and keys such as '0.0.weight' stay, hooks on the inner one fire."""
    model, x = nested_net(), images()
    fast, log = fastseq.optimize(model), list[Tensor]()
    assert list(fast.state_dict()) == list(model.state_dict()) and "0.0.weight" in fast.state_dict()
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in model.named_modules()]
    before = assert_close_to_eager(fast, x, runs=1)
    for inner in (fast[0], fast[1], fast[1][1]):
        handles = [
            inner.register_forward_pre_hook(lambda m, args: log.append(args[0].clone())),
            inner.register_forward_hook(lambda m, args, output: log.append(output.clone())),
        ]
        with torch.no_grad():
            eager(fast, x)
            torch.testing.assert_close(fast(x), before)
        assert len(log) == 4
        torch.testing.assert_close(log[2:], log[:2])
        log.clear()
        for handle in handles:
            handle.remove()
    assert torch.equal(assert_close_to_eager(fast, x, runs=1), before)


def test_07_a_hook_on_a_nested_sequential_may_replace_what_flows() -> None:
    fast, x = fastseq.optimize(nested_net()), images()
    assert_close_to_eager(fast, x, runs=1)
    fast[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    fast[0].register_forward_hook(lambda m, args, output: output + 1)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(fast)(x))


def test_08_names_of_an_ordered_dict_stay_attributes() -> None:
    layers = OrderedDict(conv1=nn.Conv2d(3, 4, 3), act=nn.ReLU(), pool=nn.MaxPool2d(2), conv2=nn.Conv2d(4, 2, 3))
    fast, x = fastseq.optimize(nn.Sequential(layers)), images()
    assert list(fast._modules) == list(layers)
    for i, (name, layer) in enumerate(layers.items()):
        assert getattr(fast, name) is fast[i] and type(fast[i]) is type(layer)
    before = assert_close_to_eager(fast, x, runs=1)
    fast.conv1 = nn.Conv2d(3, 4, 3)
    assert not torch.equal(assert_close_to_eager(fast, x, runs=1), before)
    del fast.act
    assert_close_to_eager(fast, x, runs=1)
    texts = [outcome(cls, {"a": nn.ReLU()}) for cls in (nn.Sequential, FusedSequential)]
    assert texts[0].error is TypeError and texts[0] == texts[1], "a plain dict is no OrderedDict"


# 9: attributes are read at call time --------------------------------------------------------------------------------

CHANGES: dict[str, tuple[type[nn.Module], Callable[[Any], Any]]] = {
    "stride": (nn.Conv2d, lambda m: setattr(m, "stride", (2, 1))),
    "stride int": (nn.Conv2d, lambda m: setattr(m, "stride", 2)),
    "stride list": (nn.Conv2d, lambda m: setattr(m, "stride", [2, 2])),
    "padding": (nn.Conv2d, lambda m: setattr(m, "padding", (2, 0))),
    "padding same": (nn.Conv2d, lambda m: setattr(m, "padding", "same")),
    "dilation": (nn.Conv2d, lambda m: setattr(m, "dilation", (2, 2))),
    "groups": (nn.Conv2d, lambda m: setattr(m, "groups", 3)),
    "padding_mode": (nn.Conv2d, lambda m: setattr(m, "padding_mode", "reflect")),
    "conv bias None": (nn.Conv2d, lambda m: setattr(m, "bias", None)),
    "conv weight of more channels": (nn.Conv2d, lambda m: setattr(m, "weight", nn.Parameter(torch.randn(8, 3, 5, 5)))),
    "linear bias None": (nn.Linear, lambda m: setattr(m, "bias", None)),
    "linear of fewer features": (
        nn.Linear,
        lambda m: (setattr(m, "weight", nn.Parameter(torch.randn(4, 200))), setattr(m, "bias", None)),
    ),
    "out_features is only a note": (nn.Linear, lambda m: setattr(m, "out_features", 77)),
    "in_channels is only a note": (nn.Conv2d, lambda m: setattr(m, "in_channels", 77)),
    "kernel_size is only a note": (nn.Conv2d, lambda m: setattr(m, "kernel_size", (9, 9))),
    "inplace": (nn.ReLU, lambda m: setattr(m, "inplace", True)),
    "inplace truthy": (nn.ReLU, lambda m: setattr(m, "inplace", "yes")),
    "inplace 1": (nn.ReLU, lambda m: setattr(m, "inplace", 1)),
    "inplace empty": (nn.ReLU, lambda m: setattr(m, "inplace", [])),
    "pool kernel_size": (nn.MaxPool2d, lambda m: (setattr(m, "kernel_size", 3), setattr(m, "padding", 1))),
    "pool stride": (nn.MaxPool2d, lambda m: setattr(m, "stride", (3, 2))),
    "pool padding": (nn.MaxPool2d, lambda m: setattr(m, "padding", 1)),
    "pool ceil_mode": (nn.MaxPool2d, lambda m: (setattr(m, "ceil_mode", True), setattr(m, "stride", 3))),
    "pool dilation": (nn.MaxPool2d, lambda m: setattr(m, "dilation", 2)),
    "pool return_indices": (nn.MaxPool2d, lambda m: setattr(m, "return_indices", True)),
    "flatten": (nn.Flatten, lambda m: setattr(m, "start_dim", 2)),
    "dropout": (nn.Dropout, lambda m: setattr(m, "p", 7)),
}


@pytest.mark.parametrize("tail", ["whole", "images"])
@pytest.mark.parametrize("change", CHANGES)
def test_09_attributes_are_read_at_call_time(change: str, tail: str) -> None:
    """What a layer does is what its attributes say at the call; nothing is remembered from an earlier one."""
    kind, apply = CHANGES[change]
    model = conv_net() if tail == "whole" or kind in (nn.Linear, nn.Flatten, nn.Dropout) else conv_net()[:3]
    fast, x = fastseq.optimize(model), images()
    before = assert_close_to_eager(fast, x, runs=1)
    layer = first(fast, kind)
    kept, parameters = dict(layer.__dict__), dict(layer._parameters)
    apply(layer)
    with torch.no_grad():
        assert_same_outcome(fast, x)
        assert_same_outcome(fast, x)
    layer._parameters.update(parameters)
    for name, value in kept.items():
        if name != "_parameters":
            setattr(layer, name, value)
    assert torch.equal(assert_close_to_eager(fast, x, runs=1), before)


# 10: tools that walk the children -----------------------------------------------------------------------------------


def test_10_tools_that_walk_the_children_find_them() -> None:
    """torch.fx shows each layer as `call_module`; `apply`, initialisers and summaries see every layer."""
    model, x = nested_net(), images()
    fast = fastseq.optimize(model)
    assert_close_to_eager(fast, x, runs=1)
    ours, theirs = (torch.fx.symbolic_trace(m).graph for m in (fast, model))
    assert [(n.op, n.target) for n in ours.nodes] == [(n.op, n.target) for n in theirs.nodes]
    assert [n.op for n in ours.nodes].count("call_module") == 7

    visited: list[str] = []
    fast.apply(lambda m: visited.append(type(m).__name__.replace("FusedSequential", "Sequential")))
    assert visited == [type(m).__name__ for m in _children_first(model)]

    def initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.constant_(module.weight, 0.01)
            nn.init.zeros_(module.bias)

    fast.apply(initialise)
    assert_close_to_eager(fast, x, runs=1)

    def summary(net: nn.Module) -> list[tuple[str, torch.Size]]:
        rows: list[tuple[str, torch.Size]] = []
        leaves = [m for m in net.modules() if not list(m.children())]
        handles = [m.register_forward_hook(lambda m, a, o: rows.append((str(m), o.shape))) for m in leaves]
        with torch.no_grad():
            net(x)
        for handle in handles:
            handle.remove()
        return rows

    assert summary(fast) == summary(model) and len(summary(fast)) == 7
    assert_close_to_eager(fast, x, runs=1)


def _children_first(module: nn.Module) -> list[nn.Module]:
    return [m for child in module.children() for m in _children_first(child)] + [module]
