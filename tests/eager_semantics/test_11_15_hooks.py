"""Behaviours 11 to 15: hooks and instrumentation."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from behaviour import assert_close_to_eager, one_thread, plain, reasons  # noqa: F401
from dropin import assert_same_outcome, call, conv_net, eager, images, outcome, split_net
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastseq

Log = list[str]

# 11: hooks on a layer -----------------------------------------------------------------------------------------------

HOOKS: dict[str, Callable[[nn.Module, Log], Any]] = {
    "replaces the output": lambda m, log: m.register_forward_hook(lambda m, a, out: log.append("after") or out + 1),
    "replaces the input": lambda m, log: m.register_forward_pre_hook(lambda m, a: log.append("before") or (a[0] * 2,)),
    "replaces the input by a value": lambda m, log: m.register_forward_pre_hook(
        lambda m, a: log.append("before") or a[0] * 2
    ),
    "writes into the output": lambda m, log: m.register_forward_hook(
        lambda m, a, out: log.append(str(out.detach().mul_(2).shape))
    ),
    "always_call": lambda m, log: m.register_forward_hook(lambda m, a, out: log.append("always"), always_call=True),
    "with_kwargs": lambda m, log: m.register_forward_hook(
        lambda m, a, k, out: log.append(f"{len(a)} {k}") or out - 1, with_kwargs=True
    ),
    "before, with_kwargs": lambda m, log: m.register_forward_pre_hook(
        lambda m, a, k: log.append(f"{len(a)} {k}") or ((a[0] + 1,), k), with_kwargs=True
    ),
    "two, the later one first": lambda m, log: (
        m.register_forward_hook(lambda m, a, out: log.append("second") or out * 2),
        m.register_forward_hook(lambda m, a, out: log.append("first") or out + 1, prepend=True),
    )[0],
    "full backward": lambda m, log: m.register_full_backward_hook(lambda m, gi, go: log.append("backward")),
    "full backward pre": lambda m, log: m.register_full_backward_pre_hook(lambda m, go: log.append("before backward")),
    "backward": lambda m, log: m.register_backward_hook(lambda m, gi, go: log.append("backward")),
}
LAYERS = ("Conv2d", "ReLU", "MaxPool2d", "Flatten", "Dropout", "Linear", "last ReLU")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", range(len(LAYERS)), ids=LAYERS)
@pytest.mark.parametrize("hook", HOOKS)
def test_11_a_hook_on_any_layer_of_a_run_makes_the_run_eager(hook: str, layer: int) -> None:
    """It may replace inputs and outputs, run always, with keywords, first, or in the backward pass."""
    fast, x, log = fastseq.optimize(conv_net()), images(), []
    before = assert_close_to_eager(fast, x, runs=1)
    HOOKS[hook](fast[layer], log)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = eager(fast, x)
            error = outcome(expected.sum().backward) if grad else None
            expected_log, log[:] = log[:], []
            actual, counters = call(fast, x)
            assert not grad or outcome(actual.sum().backward) == error
        assert torch.equal(actual, expected) and counters["fused_calls"] == 0
        assert log == expected_log and (log or ("backward" in hook and not grad))
        assert any("hooks" in reason for reason in counters["fallbacks"])
        log.clear()
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(fast[layer], hooks).clear()
    assert torch.equal(assert_close_to_eager(fast, x, runs=1), before)


def test_11_only_the_run_with_the_hook_is_eager() -> None:
    fast, x = fastseq.optimize(split_net()), images()
    assert_close_to_eager(fast, x, runs=2)
    fast[4].register_forward_hook(lambda m, a, out: out + 1)
    with torch.no_grad():
        actual, counters = call(fast, x)
        torch.testing.assert_close(actual, eager(fast, x))
    assert counters["fused_calls"] == 1 and any("hooks" in reason for reason in counters["fallbacks"])


def test_11_a_hook_that_always_runs_hears_of_errors() -> None:
    """`always_call`: also where a layer behind, or the layer itself, raised; its own error does not hide the first."""
    for place in (0, 3, 5):
        fast, log = fastseq.optimize(conv_net()), []
        fast[place].register_forward_hook(lambda m, a, out: log.append(type(out).__name__), always_call=True)  # noqa: B023
        with torch.no_grad():
            for bad in (torch.randn(2, 4, 12, 12), torch.randn(2, 3, 20, 20), images().double()):
                expected = outcome(eager, fast, bad)
                heard = log[:]
                log.clear()
                actual = outcome(fast, bad)
                assert (actual.error, actual.text, log) == (expected.error, expected.text, heard)
                assert expected.error is RuntimeError
                log.clear()


# 12: hooks for all modules ------------------------------------------------------------------------------------------

GLOBAL_HOOKS: dict[str, Callable[[Log], Any]] = {
    "forward": lambda log: global_hooks.register_module_forward_hook(lambda m, a, out: log.append(m._get_name())),
    "forward always": lambda log: global_hooks.register_module_forward_hook(
        lambda m, a, out: log.append(m._get_name()), always_call=True
    ),
    "forward with kwargs": lambda log: global_hooks.register_module_forward_hook(
        lambda m, a, k, out: log.append(m._get_name()), with_kwargs=True
    ),
    "forward pre": lambda log: global_hooks.register_module_forward_pre_hook(lambda m, a: log.append(m._get_name())),
    "full backward": lambda log: global_hooks.register_module_full_backward_hook(
        lambda m, gi, go: log.append(m._get_name())
    ),
    "full backward pre": lambda log: global_hooks.register_module_full_backward_pre_hook(
        lambda m, go: log.append(m._get_name())
    ),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("hook", GLOBAL_HOOKS)
def test_12_global_hooks_fire_for_each_layer_and_the_container(hook: str) -> None:
    """Three times for a Sequential of two layers; the dictionaries are looked at in every call."""
    fast, x, log = fastseq.optimize(nn.Sequential(nn.Linear(6, 4), nn.ReLU())), torch.randn(3, 6), []
    before = assert_close_to_eager(fast, x, runs=1)
    try:
        handle = GLOBAL_HOOKS[hook](log)
    except TypeError:
        pytest.skip("this torch has no keywords for global hooks")
    try:
        with torch.set_grad_enabled("backward" in hook):
            result, counters = call(fast, x)
            if "backward" in hook:
                result.sum().backward()
    finally:
        handle.remove()
    assert sorted(log) == ["FusedSequential", "Linear", "ReLU"]
    assert counters["fused_calls"] == 0 and "hooks for all modules are registered" in counters["fallbacks"]
    torch.testing.assert_close(result.detach(), before)
    assert torch.equal(assert_close_to_eager(fast, x, runs=1), before)


# 13: what a hook keeps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [conv_net, lambda: nn.Sequential(nn.Linear(12, 5), nn.ReLU())], ids=["conv", "linear"])
def test_13_an_in_place_relu_writes_into_what_a_hook_kept(make: Callable[[], nn.Sequential]) -> None:
    """A hook keeps the convolution's output; the in-place ReLU behind it changes that very tensor."""
    fast, x, kept = fastseq.optimize(make()), images(), []
    assert_close_to_eager(fast, x, runs=1)
    fast[1].inplace = True
    fast[0].register_forward_hook(lambda m, a, out: kept.append(out))
    with torch.no_grad():
        expected = eager(fast, x)
        assert torch.equal(fast(x), expected)
    assert torch.equal(kept[0], kept[1]) and kept[1]._version == kept[0]._version
    assert kept[1].min() == 0, "negative values are gone"


# 14: modes ----------------------------------------------------------------------------------------------------------


class Functions(TorchFunctionMode):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.log.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.log.append(str(function))
        return function(*args, **(kwargs or {}))


def small() -> tuple[nn.Sequential, Tensor]:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (Functions, ["conv2d", "relu", "max_pool2d"]),
        (Dispatched, ["aten.convolution.default", "aten.relu.default", "aten.max_pool2d_with_indices.default"]),
    ],
)
def test_14_an_active_mode_sees_every_operation(mode: Any, expected: Log) -> None:
    model, x = small()
    fast = fastseq.optimize(model)
    before = assert_close_to_eager(fast, x, runs=1)
    logs: list[Log] = [[], []]
    with torch.no_grad():
        for net, log in ((model, logs[0]), (fast, logs[1])):
            fastseq.reset_stats(net)
            with mode(log):
                torch.testing.assert_close(net(x), before)
    seen = [[name for name in log if name in expected] for log in logs]
    assert seen == [expected, expected], logs
    counters = fastseq.stats(fast)
    assert counters["fused_calls"] == 0 and any("mode" in reason for reason in counters["fallbacks"])
    assert torch.equal(assert_close_to_eager(fast, x, runs=1), before)


@pytest.mark.parametrize("name", ["conv2d", "relu", "max_pool2d", "linear", "dropout"])
def test_14_a_replaced_function_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some profilers put functions of their own into torch.nn.functional, where eager finds them."""
    fast, x, log = fastseq.optimize(conv_net()), images(), list[str]()
    before = assert_close_to_eager(fast, x, runs=1)
    own = getattr(nn.functional, name)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, name, lambda *args, **kwargs: log.append(name) or own(*args, **kwargs))
        expected = eager(fast, x)
        seen, log[:] = log[:], []
        result, counters = call(fast, x)
        assert torch.equal(result, expected) and log == seen != []
        assert counters["fallbacks"] == {f"torch.nn.functional.{name} was replaced": 1}
        assert torch.equal(fastseq.optimize(fast)(x), expected)
    assert torch.equal(assert_close_to_eager(fast, x, runs=1), before)


def test_14_flops_are_counted_as_in_eager() -> None:
    """2 images, 4 maps of 6x6, 27 products each: 15552 operations."""
    model, x = small()
    fast = fastseq.optimize(model)
    assert_close_to_eager(fast, x, runs=1)
    totals = []
    for net in (model, fast):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(x)
        totals.append(counter.get_total_flops())
    assert totals == [15552, 15552]


def test_14_the_profiler_shows_one_range_per_run_and_the_users_own() -> None:
    """The one difference: `fastseq::run` stands for the operators inside, which are back with gradients wanted."""
    fast, x = fastseq.optimize(small()[0]), small()[1]
    assert_close_to_eager(fast, x, runs=1)

    def names(grad: bool) -> collections.Counter[str]:
        with torch.set_grad_enabled(grad), torch.profiler.profile() as profile, torch.profiler.record_function("mine"):
            fast(x)
        return collections.Counter(event.name for event in profile.events())

    inside = names(grad=False)
    assert inside["fastseq::run"] == 1 and inside["mine"] == 1 and inside["aten::conv2d"] == 0
    outside = names(grad=True)
    assert outside["fastseq::run"] == 0 and outside["aten::conv2d"] == outside["aten::max_pool2d"] == 1


# 15: weights that are not plain parameters --------------------------------------------------------------------------

REWEIGHTED: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any], str]] = {
    "weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm, "Linear"),
    "spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm, "Linear"),
    "prune": (
        lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
        lambda m: prune.remove(m, "weight"),
        "Linear",
    ),
    "prune the bias": (
        lambda m: prune.random_unstructured(m, "bias", 0.5),
        lambda m: prune.remove(m, "bias"),
        "Linear",
    ),
    "parametrized weight_norm": (
        parametrizations.weight_norm,
        lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight"),
        "ParametrizedLinear",
    ),
    "parametrized spectral_norm": (
        parametrizations.spectral_norm,
        lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight"),
        "ParametrizedLinear",
    ),
    "orthogonal": (
        parametrizations.orthogonal,
        lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight"),
        "ParametrizedLinear",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before optimize", "after a call"])
@pytest.mark.parametrize("name", REWEIGHTED)
def test_15_normalised_and_pruned_weights_stay_eagers(name: str, when: str) -> None:
    """The old norms and pruning are pre-hooks on an unchanged class; parametrizations change the class.

    Afterwards, when the weight is a plain parameter again, the layer is fused again.
    """
    apply, remove, kind = REWEIGHTED[name]
    model = nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Tanhshrink(), nn.Linear(5, 3)
    ).eval()
    x = torch.randn(4, 6)
    if when == "before optimize":
        with torch.no_grad():
            apply(model[2])
            model(x)  # a weight that is no leaf of autograd, which deepcopy wants
        fast = fastseq.optimize(model)
    else:
        fast = fastseq.optimize(model)
        assert_close_to_eager(fast, x, runs=2)
        apply(fast[2])
    assert type(fast[2]).__name__ == kind
    for module in (fast, fast.train()):
        assert_as_a_twin(module, x)
    fast.eval()
    with torch.no_grad():
        for parameter in fast[2].parameters():
            parameter.mul_(1.5)
    assert_as_a_twin(fast, x)
    assert fastseq.stats(fast)["fused_calls"] > 0, "the other run is fused"
    remove(fast[2])
    assert type(fast[2]) is nn.Linear
    assert_close_to_eager(fast, x, runs=2)


def assert_as_a_twin(fast: nn.Module, x: Tensor) -> None:
    """Result and state afterwards are a plain copy's: a norm in training mode updates its vectors at each call."""
    twin = plain_deepcopy(fast)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), twin(x))
        torch.testing.assert_close(fast(x), twin(x))
    torch.testing.assert_close(fast.state_dict(), twin.state_dict())


def plain_deepcopy(model: nn.Module) -> nn.Module:
    """`plain` for a weight that is a computed tensor, which deepcopy refuses: with another of the same values."""
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, Tensor) and value.requires_grad:
                module.__dict__[name] = value.detach()
    return plain(model)


@pytest.mark.filterwarnings("ignore")
def test_15_what_deepcopy_cannot_copy_raises_its_error() -> None:
    """A computed weight with a graph behind it: eager cannot copy such a model either."""
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)), nn.ReLU())
    model(torch.randn(2, 3))
    expected, actual = outcome(copy.deepcopy, model), outcome(fastseq.optimize, model)
    assert actual == expected and actual.error is RuntimeError


def test_15_a_weight_that_is_a_plain_tensor() -> None:
    fast, x = fastseq.optimize(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))), torch.randn(4, 6)
    assert_close_to_eager(fast, x, runs=1)
    weight = fast[0].weight.detach()
    del fast[0].weight
    fast[0].weight = weight * 2
    assert_same_outcome(fast, x)
    assert "not a plain registered parameter" in reasons(fast)
    assert_close_to_eager(copy.deepcopy(fast[2:]), torch.randn(2, 5), runs=1)
