"""fastseq.optimize: an independent copy of any module that looks like the original in every way but its speed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dropin import (
    NETS,
    RUNS,
    Holder,
    assert_fused,
    call,
    conv_net,
    eager,
    fused,
    images,
    nested_net,
    one_thread,  # noqa: F401
    split_net,
)
from torch import Tensor, nn

import fastseq
from fastseq import FusedSequential
from fastseq.testing import MODELS, assert_matches

each_net = pytest.mark.parametrize("net", NETS)


def sequentials(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules() if isinstance(module, nn.Sequential)}


def contents(model: nn.Module) -> list[tuple[str, int, bytes]]:
    """Every tensor of a model: name, identity, bytes."""
    return [(name, id(t), t.detach().numpy().tobytes()) for name, t in model.state_dict(keep_vars=True).items()]


# The copy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["seed1", "seed1_named", "seed2", "seed3", "lenet5", "mlp"])
@pytest.mark.parametrize("batch", [1, 3])
def test_known_networks_run_fused_and_right(name: str, batch: int) -> None:
    case = MODELS[name]
    model, x = case.build(), case.example(batch)
    fast = fastseq.optimize(model)
    with torch.no_grad():
        actual, counters = call(fast, x)
    assert counters == fused(1)
    assert_matches(actual, model, x)


@each_net
def test_copy_is_independent(net: str) -> None:
    model = NETS[net]()
    before, x = contents(model), images()
    with torch.no_grad():
        expected = model(x)
    fast = fastseq.optimize(model)
    storages = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert not storages & {t.untyped_storage().data_ptr() for t in fast.state_dict().values()}
    assert not set(map(id, model.modules())) & set(map(id, fast.modules()))
    with torch.no_grad():
        fast(x)
        for parameter in fast.parameters():
            parameter.fill_(0.5)
        fast(x)
        assert contents(model) == before
        assert torch.equal(model(x), expected)
    assert FusedSequential not in {type(module) for module in model.modules()}
    assert not [key for module in model.modules() for key in module.__dict__ if "fastseq" in key]


@each_net
def test_original_may_change_without_the_copy(net: str) -> None:
    model, x = NETS[net](), images()
    fast = fastseq.optimize(model)
    before = assert_fused(fast, x, RUNS[net])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(assert_fused(fast, x, RUNS[net]), before)


def test_hooks_are_copied_and_the_original_keeps_its_own() -> None:
    model, seen = conv_net(), []
    handle = model[0].register_forward_hook(lambda *_: seen.append("conv"))
    hooks = model[0]._forward_hooks
    fast = fastseq.optimize(model)
    assert model[0]._forward_hooks is hooks and len(hooks) == 1
    handle.remove()
    with torch.no_grad():
        model(images())
        assert seen == []
        fast(images())
    assert seen == ["conv"]


def test_flags_are_copied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.5))
    model[0].requires_grad_(False)
    model[0].eval()
    fast = fastseq.optimize(model)
    assert fast.training and not fast[0].training and fast[2].training
    assert [p.requires_grad for p in fast.parameters()] == [False, False]


def test_gradients_stay_with_the_original() -> None:
    model = conv_net()
    model(images()).sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    fast = fastseq.optimize(model)
    assert [parameter.grad for parameter in fast.parameters()] == [None] * 4  # as copy.deepcopy does
    assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), grads, strict=True))


def test_parameters_shared_between_layers_stay_shared() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval()
    model[2].weight = model[0].weight
    fast = fastseq.optimize(model)
    assert fast[2].weight is fast[0].weight and fast[0].weight is not model[0].weight
    assert_fused(fast, torch.randn(3, 6))


def test_what_deepcopy_raises_is_raised() -> None:
    model = conv_net()
    model.generator = (i for i in range(3))
    with pytest.raises(TypeError, match="generator"):
        fastseq.optimize(model)


# Which modules ----------------------------------------------------------------------------------------------------


def test_root_nested_and_none() -> None:
    assert sequentials(fastseq.optimize(conv_net())) == {"": FusedSequential}
    assert sequentials(fastseq.optimize(Holder())) == {"features": FusedSequential, "classifier": FusedSequential}
    assert set(sequentials(fastseq.optimize(nested_net())).values()) == {FusedSequential}
    assert sequentials(fastseq.optimize(nn.Linear(3, 3))) == {}
    deep = nn.ModuleDict({"a": nn.ModuleList([Holder(), nn.ModuleDict({"b": conv_net()})])})
    assert set(sequentials(fastseq.optimize(deep))) == {"a.0.features", "a.0.classifier", "a.1.b"}
    assert set(sequentials(fastseq.optimize(deep)).values()) == {FusedSequential}


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(),
        nn.Sequential(nn.Softsign(), nn.Flatten()),
        nn.Sequential(nn.ReLU()),
        nn.Sequential(nn.Identity()),
    ],
    ids=["empty", "sigmoid", "relu", "identity"],
)
def test_nothing_to_fuse_stays_a_sequential(model: nn.Sequential) -> None:
    fast = fastseq.optimize(model)
    assert type(fast) is nn.Sequential and fast is not model
    x = torch.randn(2, 3)
    assert torch.equal(fast(x), model(x))
    assert fastseq.stats(fast) == fused(0)


def test_single_layer_models() -> None:
    for model, x in ((nn.Linear(3, 2), torch.randn(2, 3)), (nn.ReLU(), torch.randn(3)), (nn.Identity(), torch.ones(1))):
        fast = fastseq.optimize(model)
        assert type(fast) is type(model) and fast is not model
        assert torch.equal(fast(x), model(x))


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (None, "NoneType"),
        (nn.Sequential, "type"),
        (torch.zeros(2), "Tensor"),
        (nn.Linear(2, 2).state_dict(), "OrderedDict"),
        ([nn.Linear(2, 2)], "list"),
        (lambda x: x, "function"),
        (torch.relu, "builtin_function_or_method"),
        ("model.pt", "str"),
        (nn.Parameter(torch.zeros(1)), "Parameter"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_type_error_for_what_is_no_module(thing: Any, name: str) -> None:
    with pytest.raises(TypeError) as caught:
        fastseq.optimize(thing)
    assert str(caught.value) == (
        f"fastseq.optimize expects a torch.nn.Module, got {name}; pass the model itself, "
        "not its output, its class or its state_dict"
    )


class Doubled(nn.Sequential):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Renamed(nn.Sequential):
    """A subclass that adds nothing to forward but may add anything else."""


@pytest.mark.parametrize("kind", [Doubled, Renamed])
def test_subclasses_of_sequential_keep_their_forward(kind: type[nn.Sequential]) -> None:
    model = kind(nn.Linear(6, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 6), nn.ReLU())).eval()
    fast = fastseq.optimize(model)
    assert type(fast) is kind and type(fast[2]) is FusedSequential
    x = torch.randn(2, 6)
    with torch.no_grad():
        actual, counters = call(fast, x)
        torch.testing.assert_close(actual, model(x))
    assert counters == fused(1)


def test_sequential_with_its_own_forward_stays_as_it_is() -> None:
    model = conv_net()
    model.forward = lambda input: input + 1
    fast = fastseq.optimize(model)
    assert type(fast) is nn.Sequential
    x = images()
    assert torch.equal(fast(x), x + 1)


def test_subclasses_of_layers_run_as_they_are() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 3 * super().forward(input)

    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Scaled(6, 6), nn.ReLU6()).eval()
    assert_fused(fastseq.optimize(model), torch.randn(2, 6), runs=1)


def test_sequential_of_none_raises_when_called_as_eager_does() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model.add_module("gone", None)
    fast = fastseq.optimize(model)
    assert list(fast._modules) == ["0", "1", "gone"] and fast._modules["gone"] is None
    with torch.no_grad(), pytest.raises(TypeError, match="^'NoneType' object is not callable$"):
        fast(torch.randn(1, 3))
    only_none = fastseq.optimize(nn.Sequential(None))
    with pytest.raises(TypeError, match="^'NoneType' object is not callable$"):
        only_none(torch.randn(1, 3))


def test_shared_sequential_stays_shared() -> None:
    shared = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model = nn.ModuleList([shared, nn.ModuleDict({"again": shared})])
    fast = fastseq.optimize(model)
    assert fast[1]["again"] is fast[0] and type(fast[0]) is FusedSequential
    assert_fused(fast[0], torch.randn(2, 6))
    twice = fastseq.optimize(nn.Sequential(shared, shared).eval())
    assert twice[0] is twice[1]
    assert_fused(twice, torch.randn(2, 6))
    assert_fused(twice[0], torch.randn(2, 6))


def test_a_layer_that_stands_twice_runs_twice() -> None:
    linear, relu = nn.Linear(6, 6), nn.ReLU()
    model = nn.Sequential(linear, relu, linear, relu).eval()
    fast = fastseq.optimize(model)
    assert fast[0] is fast[2] and fast[1] is fast[3] and len(list(fast.parameters())) == 2
    assert list(fast.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    x = torch.randn(3, 6)
    actual = assert_fused(fast, x)
    with torch.no_grad():
        assert not torch.allclose(actual, relu(linear(x)))
        fast[2].weight.mul_(2)
    assert_fused(fast, x)


# Twice ------------------------------------------------------------------------------------------------------------


@each_net
@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
def test_optimising_twice_is_optimising_once(net: str, is_warm: bool) -> None:
    once, x = fastseq.optimize(NETS[net]()), images()
    if is_warm:
        assert_fused(once, x, RUNS[net])
    twice = fastseq.optimize(once)
    assert twice is not once and sequentials(twice) == sequentials(once)
    assert repr(twice) == repr(once) and list(twice.state_dict()) == list(once.state_dict())
    before = assert_fused(once, x, RUNS[net])
    with torch.no_grad():
        for parameter in once.parameters():
            parameter.mul_(0.5)
    assert torch.equal(assert_fused(twice, x, RUNS[net]), before)


def test_optimising_again_finds_new_sequentials() -> None:
    fast = fastseq.optimize(Holder().eval())
    fast.classifier = nn.Sequential(nn.Linear(200, 4), nn.ReLU()).eval()
    assert type(fast.classifier) is nn.Sequential
    assert_fused(fast, images(), runs=1)
    again = fastseq.optimize(fast)
    assert type(again.classifier) is FusedSequential
    assert_fused(again, images(), runs=1)


# Same structure ---------------------------------------------------------------------------------------------------


def named() -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), relu=nn.ReLU(), pool=nn.MaxPool2d(2))).eval()


STRUCTURES: dict[str, Callable[[], nn.Module]] = {**NETS, "named": named}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structure_is_the_originals(structure: str) -> None:
    model = STRUCTURES[structure]()
    fast = fastseq.optimize(model)
    assert isinstance(fast, type(model))
    assert repr(fast).replace("FusedSequential", "Sequential") == repr(model)
    for kind in ("modules", "children", "parameters", "buffers"):
        names = [[name for name, _ in getattr(either, f"named_{kind}")()] for either in (fast, model)]
        assert names[0] == names[1]
    assert list(fast.state_dict()) == list(model.state_dict())
    assert set(dir(model)) <= set(dir(fast))
    model.load_state_dict(fast.state_dict(), strict=True)
    fast.load_state_dict(model.state_dict(), strict=True)


def test_repr_says_that_it_is_fused() -> None:
    assert repr(fastseq.optimize(conv_net())).startswith("FusedSequential(\n  (0): Conv2d(3, 8,")
    assert repr(fastseq.optimize(Holder())).count("FusedSequential") == 2


def test_children_may_have_any_name_that_eager_allows() -> None:
    """The class adds no attribute that could stand in the way of a child's name."""
    added = set(dir(FusedSequential)) - set(dir(nn.Sequential))
    assert not [name for name in added if not name.startswith(("__", "_fastseq"))]
    names = ["_forward", "_compile", "run", "plan", "stats", "call"]
    model = nn.Sequential(OrderedDict((name, nn.Linear(3, 3)) for name in names)).eval()
    fast = fastseq.optimize(model)
    assert all(getattr(fast, name) is fast._modules[name] for name in names)
    assert list(fast[1:]._modules) == names[1:]
    assert_fused(fast, torch.randn(2, 3))


def test_a_sequence_like_the_original() -> None:
    model = named()
    fast = fastseq.optimize(model)
    assert len(fast) == 3 and bool(fast)
    assert [type(layer) for layer in fast] == [nn.Conv2d, nn.ReLU, nn.MaxPool2d]
    assert fast[0] is fast.conv is fast.get_submodule("conv") and fast[-1] is fast.pool
    assert list(fast._modules) == ["conv", "relu", "pool"]
    for index in (3, -4):
        with pytest.raises(IndexError, match="is out of range"):
            fast[index]
    for part in (fast[:2], fast[1:], fast[::2], fast[:]):
        assert isinstance(part, nn.Sequential)
    assert list(fast[1:]._modules) == ["relu", "pool"] and fast[1:][0] is fast.relu


@pytest.mark.parametrize("cut", [slice(0, 2), slice(1, None), slice(3, 7), slice(0, 0), slice(None, None, 2)])
def test_slices_share_their_layers_and_give_eagers_result(cut: slice) -> None:
    fast = fastseq.optimize(conv_net())
    part = fast[cut]
    assert [id(layer) for layer in part] == [id(layer) for layer in list(fast)[cut]]
    x = images() if cut.start in (0, None) else torch.randn(2, 8, 10, 10)
    x = torch.randn(2, 8, 5, 5) if cut.start == 3 else x
    with torch.no_grad():
        torch.testing.assert_close(part(x), nn.Sequential(*part)(x))


def test_walking_tools_see_plain_layers() -> None:
    fast = fastseq.optimize(nested_net())

    def zero(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.ones_(module.bias)

    before = assert_fused(fast, images())
    fast.apply(zero)
    after = assert_fused(fast, images())
    assert not torch.equal(before, after) and (after == 1).all()


def leaves(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if not list(module.children()))


def test_running_the_children_by_hand_is_eager() -> None:
    fast, x = fastseq.optimize(nested_net()), images()
    with torch.no_grad():
        value = x
        for layer in leaves(fast):
            value = layer(value)
        assert torch.equal(value, eager(fast, x))


def test_copy_of_the_module_object_behaves_alike() -> None:
    fast, x = fastseq.optimize(split_net()), images()
    expected = assert_fused(fast, x, runs=2)
    for copied in (copy.copy(fast), copy.deepcopy(fast)):
        assert type(copied) is FusedSequential
        assert torch.equal(assert_fused(copied, x, runs=2), expected)
