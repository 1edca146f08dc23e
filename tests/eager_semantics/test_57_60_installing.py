"""Behaviours 57 to 60: how the fast path is put in place."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from behaviour import assert_close_to_eager, one_thread, plain  # noqa: F401
from conftest import run_python
from dropin import Holder, call, conv_net, eager, images, nested_net, outcome, split_net
from torch import Tensor, nn

import fastseq
from fastseq import FusedSequential

each_net = pytest.mark.parametrize("net", [conv_net, nested_net, split_net])


# 57: another class --------------------------------------------------------------------------------------------------


@each_net
def test_57_the_class_is_a_subclass_of_sequential(net: Callable[[], nn.Sequential]) -> None:
    """isinstance and pickle work; `type(m) is nn.Sequential` does not, as the repr says; slices are alike."""
    fast = fastseq.optimize(net())
    assert isinstance(fast, nn.Sequential) and type(fast) is FusedSequential is not nn.Sequential
    assert issubclass(FusedSequential, nn.Sequential)
    assert repr(fast).startswith("FusedSequential(\n") and "Sequential" in str(fast)
    assert type(fast[:2]) is FusedSequential and type(copy.copy(fast)) is FusedSequential
    assert type(pickle.loads(pickle.dumps(fast))) is FusedSequential
    wrapped, x = nn.DataParallel(fast), images()
    with torch.no_grad():
        result, counters = call(wrapped, x)
        torch.testing.assert_close(result, eager(fast, x))
    assert counters["fused_calls"] >= 1


def test_57_a_pickle_needs_fastseq_to_be_importable(tmp_path: Path) -> None:
    """And says so: the error of a Python without it names the package."""
    torch.save(fastseq.optimize(conv_net()), tmp_path / "model.pt")
    script = """
import sys
sys.modules["fastseq"] = None  # as if it were not installed
import torch
torch.load(sys.argv[1], weights_only=False)
"""
    done = run_python("-c", script, str(tmp_path / "model.pt"))
    assert done.returncode != 0 and "ModuleNotFoundError" in done.stderr and "fastseq" in done.stderr
    # The state_dict loads anywhere.
    torch.save(fastseq.optimize(conv_net()).state_dict(), tmp_path / "state.pt")
    conv_net().load_state_dict(torch.load(tmp_path / "state.pt"), strict=True)


# 58: not a forward on the instance ----------------------------------------------------------------------------------


@each_net
def test_58_nothing_is_bound_to_the_instance(net: Callable[[], nn.Sequential]) -> None:
    """A forward in the instance's `__dict__` would stay bound to the original's weights in every copy of it."""
    fast, x = fastseq.optimize(net()), images()
    with torch.no_grad():
        fast(x)
    for module in fast.modules():
        assert "forward" not in module.__dict__ and "__call__" not in module.__dict__
        assert not any(isinstance(value, types.MethodType) for value in module.__dict__.values())
    replica = fast._replicate_for_data_parallel()
    for name, child in fast._modules.items():
        setattr(replica, name, copy.deepcopy(child))
    with torch.no_grad():
        before = replica(x)
        for parameter in fast.parameters():
            parameter.zero_()
        assert torch.equal(replica(x), before) and not fast(x).any()


def test_58_why_not() -> None:
    """What the other way does: a bound method that answers for the original, whoever is called."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.forward = types.MethodType(nn.Sequential.forward, model)  # type: ignore[method-assign]
    replica = model._replicate_for_data_parallel()
    replica._modules = {"0": nn.Linear(2, 2)}
    x = torch.randn(1, 2)
    assert torch.equal(replica(x), model(x))
    # Such a forward, put there by somebody else, is theirs, and is kept.
    assert type(fastseq.optimize(nn.Sequential(model, nn.ReLU()))[0]) is nn.Sequential


# 59: not a wrapper in the place of children -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@each_net
def test_59_no_child_is_replaced_or_wrapped(net: Callable[[], nn.Sequential]) -> None:
    """Keys, names, length and indices stay; torch's own fuse_modules, for comparison, changes them."""
    model = net()
    fast = fastseq.optimize(model)
    for a, b in zip(fast.named_modules(), model.named_modules(), strict=True):
        assert a[0] == b[0] and (type(a[1]) is type(b[1]) or type(a[1]) is FusedSequential)
    assert list(fast.state_dict()) == list(model.state_dict()) and len(fast) == len(model)
    assert [n for n, _ in fast.named_children()] == [n for n, _ in model.named_children()]
    for i, layer in enumerate(model):
        assert fast[i]._get_name().replace("Fused", "") == layer._get_name()
    other = torch.ao.quantization.fuse_modules(conv_net(), [["0", "1"]])
    assert list(other.state_dict()) != list(conv_net().state_dict())


# 60: ways of calling ------------------------------------------------------------------------------------------------


def through_children(net: Any, x: Tensor) -> Tensor:
    for layer in net:
        x = layer(x)
    return x


WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "call": lambda net, x: net(x),
    "forward": lambda net, x: net.forward(x),
    "__call__": lambda net, x: net.__call__(x),
    "keyword": lambda net, x: net(input=x),
    "the class's call": lambda net, x: type(net).__call__(net, x),
    "the class's forward": lambda net, x: type(net).forward(net, x),
    "Sequential's forward": lambda net, x: nn.Sequential.forward(net, x),
    "loop": through_children,
    "slices": lambda net, x: net[3:](net[:3](x)),
    "slices of slices": lambda net, x: net[1:][2:](net[1:][:2](net[:4][:1](x))),
    "children": lambda net, x: through_children(list(net.children()), x),
    "modules": lambda net, x: through_children([m for m in net.modules() if not list(m.children())], x),
    "inside another": lambda net, x: nn.Sequential(nn.Identity(), net)(x),
    "unpacked": lambda net, x: nn.Sequential(*net)(x),
    "added": lambda net, x: (nn.Sequential() + net)(x),
    "optimised unpacked": lambda net, x: fastseq.optimize(nn.Sequential(*net))(x),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("net", [conv_net, split_net])
def test_60_every_way_of_calling_gives_eagers_result(net: Callable[[], nn.Sequential], way: str, grad: bool) -> None:
    fast, x = fastseq.optimize(net()), images()
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            result = WAYS[way](fast, x)
            torch.testing.assert_close(result, plain(fast)(x))
            assert result.requires_grad == grad


class Model(nn.Module):
    """Two Sequentials, `view`, a Sequential; parts of it are called by its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.layer2 = nn.Sequential(nn.Conv2d(8, 6, 2), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.layer3 = nn.Sequential(nn.Linear(6 * 2 * 2, 5), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(x))
        result: Tensor = self.layer3(x.view(x.shape[0], -1))
        return result


class Branching(nn.Module):
    """Calls its parts in an order that depends on the data, one of them layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3)])
        self.table = nn.ModuleDict({"head": nn.Sequential(nn.Linear(6, 2), nn.ReLU())})

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        for part in self.parts:
            x = part(x) if x.sum() > 0 else -part(-x)
        for _ in range(times):
            x = through_children(self.parts[0], x) + self.parts[0][:1](x)
        result: Tensor = self.table["head"](x)
        return result


@pytest.mark.parametrize("make", [Model, Branching, Holder], ids=lambda kind: kind.__name__)
def test_60_the_root_need_not_be_a_sequential(make: Callable[[], nn.Module]) -> None:
    """Its Sequentials are fused, whatever its own forward does with them and their layers."""
    fast = fastseq.optimize(make().eval())
    assert isinstance(fast, make)  # type: ignore[arg-type]
    for _ in range(3):
        x = torch.randn(4, 6) if make is Branching else images()
        with torch.no_grad():
            result, counters = call(fast, x)
            torch.testing.assert_close(result, plain(fast)(x))
        assert counters["fused_calls"] >= 1
        assert not [reason for reason in counters["fallbacks"] if "eager layer" not in reason]
        assert fast(x).requires_grad
    if make is Branching:
        with torch.no_grad():
            torch.testing.assert_close(fast(x, times=3), plain(fast)(x, times=3))
            assert outcome(fast, x, 1, 2).error is TypeError


def test_60_parts_of_a_model_called_from_outside() -> None:
    fast, x = fastseq.optimize(Model().eval()), images()
    with torch.no_grad():
        features = fast.layer1(x)
        torch.testing.assert_close(features, plain(fast).layer1(x))
        torch.testing.assert_close(through_children(fast.layer1, x), features)
        torch.testing.assert_close(fast.layer1[:2](x), plain(fast).layer1[:2](x))
        torch.testing.assert_close(fast.layer2.forward(features), plain(fast).layer2(features))
    assert_close_to_eager(fast.layer2, features, runs=1)
