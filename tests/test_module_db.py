"""PyTorch's own cases as ours: the samples of its `module_db`, and those of some functions (`torch_samples.FUNCTIONS`).

A module stands in a Sequential alone, between two fused runs, behind one, and before ReLU and MaxPool2d. The Sequential
is called without gradients (twice: the second call takes the fast lane), with frozen weights and with gradients; images
also in channels_last order. Whatever a call does, eager does: value, dtype, strides, autograd history, gradients,
exception, random numbers drawn, buffers, what happens to the input. What runs eager has eager's very bits, what runs
fused is as close to float64 as eager is. How many native calls it takes is known beforehand, so that nothing stays
eager unnoticed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from dropin import Outcome, assert_identical, one_thread, outcome  # noqa: F401
from torch import Tensor, nn
from torch_samples import (
    FUNCTIONS,
    MODULES,
    OPS,
    Case,
    dtypes_of,
    module_cases,
    module_error_cases,
    op_cases,
    op_error_cases,
)

import fastseq
from fastseq.patterns.activation import ACTIVATIONS

# Eager warns about what the samples are made of: odd padding, lazy layers, complex32, deprecated arguments.
pytestmark = pytest.mark.filterwarnings("ignore")


# What Sequential, and who runs native in it -----------------------------------------------------------------------


def fused_layer(x: Any) -> nn.Module:
    """A layer that the kernels take, for values like `x` and of its shape: Conv2d for images, Linear for the rest."""
    is_tensor = isinstance(x, Tensor)
    dtype = x.dtype if is_tensor and (x.is_floating_point() or x.is_complex()) else torch.float32
    if is_tensor and x.dim() in (3, 4):
        channels = max(1, x.size(-3))
        return nn.Conv2d(channels, channels, 1).to(dtype)
    features = max(1, x.size(-1)) if is_tensor and x.dim() else 3
    return nn.Linear(features, features).to(dtype)


# The Sequentials that a sample is tested in. A "run" is a layer that runs fused and fits its neighbour.
ALONE, BETWEEN, BEHIND = "sample", "run relu sample run relu", "run sample"
OTHERS = ("sample relu pool", "sample pool relu", "run relu sample", "sample relu run")
FEW, ALL = (ALONE, BETWEEN, BEHIND), (ALONE, BETWEEN, BEHIND, *OTHERS)


def build(case: Case, chain: str, output: Any) -> nn.Sequential:
    """The Sequential of that name; `output`: what the sample's module gives for its input, whatever that is."""
    sample = case.make()
    layers: list[nn.Module] = []
    for word in chain.split():
        if word == "sample":
            layers.append(sample)
        elif word == "run":
            layers.append(fused_layer(output if sample in layers else case.x))
        else:
            layers.append(nn.ReLU() if word == "relu" else nn.MaxPool2d(2))
    model = nn.Sequential(*layers)
    model.train(sample.training)
    return model


PADDINGS = (nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)
IMAGES, IMAGES_1D, ROWS, EITHER = "images", "images of one dimension", "rows", "either"


RESIZING = (nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.PixelShuffle, nn.PixelUnshuffle)
ROW_LAYERS = (nn.Softmax, nn.LogSoftmax, nn.LayerNorm)
NEEDS_COMPANY = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm),
    *(*ROW_LAYERS, *ACTIVATIONS, *PADDINGS, *RESIZING),
)


def takes(layer: nn.Module) -> str:
    """What data a step that begins with the layer is for by README.md, "" for none: one condition per type."""
    kind = type(layer)
    images = IMAGES_1D if kind.__name__.endswith("1d") else IMAGES
    if kind in (nn.Conv1d, nn.Conv2d):
        return images
    if kind in (nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d):
        return "" if layer.return_indices else images
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d):
        is_fixed = not layer.training and layer.running_mean is not None
        return (IMAGES if kind is nn.BatchNorm2d else ROWS) if is_fixed else ""
    if kind in (nn.Softmax, nn.LogSoftmax):
        return ROWS if layer.dim in (-1, 1) else ""
    if kind is nn.LayerNorm:
        return ROWS if len(layer.normalized_shape) == 1 else ""
    if kind is nn.GroupNorm:
        return IMAGES
    if kind in ACTIVATIONS:
        return EITHER
    if kind in PADDINGS:
        padding = layer.padding
        return IMAGES if type(padding) is tuple and min(padding) >= 0 and any(padding) else ""
    if kind in RESIZING:
        given = getattr(layer, "size", None) or getattr(layer, "scale_factor", None)
        return IMAGES if not isinstance(given, tuple) or len(given) == 2 else ""
    if kind in (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d):
        return images
    return ROWS if kind is nn.Linear else ""


def leads(layer: nn.Module) -> bool:
    """Whether a run may begin with the layer."""
    is_average = type(layer) in (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
    return not (is_average and layer.output_size in (1, (1,), (1, 1)))


def native_calls(model: nn.Sequential) -> int:
    """The number of native calls that one forward of float32 data takes: the runs with a layer that is worth it."""
    runs, data, is_worth_it = 0, "", False
    for layer in (*model, None):
        kind = takes(layer)
        if kind == EITHER:
            kind = data
        if kind != data:
            runs += is_worth_it
            data, is_worth_it = kind, False
            if data and not leads(layer):
                data = ""
        is_worth_it |= bool(data) and type(layer) not in NEEDS_COMPANY
    return runs


# Comparison -------------------------------------------------------------------------------------------------------


class Mode(NamedTuple):
    """How a model is called: with grad mode on or off, and with parameters and input that require grad or do not."""

    name: str
    grad_mode: bool
    requires_grad: bool


NO_GRAD = Mode("no_grad", grad_mode=False, requires_grad=True)
FROZEN = Mode("frozen weights", grad_mode=True, requires_grad=False)
GRAD = Mode("grad", grad_mode=True, requires_grad=True)

ALL_MODES = (NO_GRAD, NO_GRAD, FROZEN, GRAD)  # twice without gradients: the second call takes the fast lane

MEMORY_ORDERS = ("as given", "channels_last", "channels_last weights")
# What is tested with everything above, and how many samples of it there are at least.
CORE = {"nn.Conv2d": 4, "nn.LazyConv2d": 4, "nn.MaxPool2d": 3, "nn.Linear": 3, "nn.ReLU": 4}

# Why a float32 Sequential that nothing is wrong with may run eager all the same.
DOCUMENTED = (
    "the input is empty",
    "an unbatched input with channels_last weights or Flatten",
    "a non-contiguous input of more than 2 dimensions to linear",
    "an unbatched input to BatchNorm, GroupNorm, PReLU, Upsample or Unflatten",
    "an input to Linear and BatchNorm, PReLU, Unflatten or a softmax over dimension 1 that does not have 2 dimensions",
)


@dataclass
class Counts:
    """What was compared, so that a test can say that it was not nothing."""

    calls: int = 0
    fused: int = 0
    raised: int = 0


def compare(name: str, model: nn.Sequential, x: Any, modes: Iterable[Mode], counts: Counts, error: Any = None) -> None:
    """Calls an optimised copy of `model` and a plain one with `x`, once in each mode: they cannot be told apart."""
    plain, fast = model, fastseq.optimize(model)
    was_fused = False
    for i, mode in enumerate(modes):
        for parameter in (*plain.parameters(), *fast.parameters()):
            if not is_lazy(parameter):
                trains = parameter.is_floating_point() or parameter.is_complex()
                parameter.requires_grad_(mode.requires_grad and trains)
        try:
            was_fused |= _compare_call(plain, fast, x, mode, counts, error)
            compare_states(plain, fast, assert_close if was_fused else assert_same)
        except AssertionError as failed:
            raise AssertionError(f"{name}, call {i} ({mode.name}):\n{failed}\nof {plain}") from failed


def _compare_call(plain: nn.Sequential, fast: nn.Module, x: Any, mode: Mode, counts: Counts, error: Any) -> bool:
    """Whether the call had a fused part."""
    # A lazy layer becomes another one at its first call, and is fused from the next one on.
    was_lazy = any(map(is_lazy, plain.parameters()))
    arguments, outcomes, random_states = [], [], []
    fastseq.reset_stats(fast)
    for model in (plain, fast):
        argument = copy.deepcopy(x)
        if mode is GRAD and isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):
            argument.requires_grad_()
        seed(2)
        with torch.set_grad_enabled(mode.grad_mode):
            outcomes.append(outcome(model, argument))
        arguments.append(argument)
        random_states.append(torch.get_rng_state())
    expected, actual = outcomes
    counters = fastseq.stats(fast)
    counts.calls += 1
    counts.raised += expected.error is not None
    counts.fused += counters["fused_calls"] > 0

    assert (actual.error, actual.text) == (expected.error, expected.text), f"raised {actual}, eager {expected}"
    assert torch.equal(*random_states), "the generators are in another state than after eager"
    if error is not None:
        assert expected.error is not None and issubclass(expected.error, error), f"eager gives {expected}"
    if mode is GRAD and isinstance(x, Tensor) and x.is_floating_point():
        assert counters["fused_calls"] == 0, counters
    draws = not torch.equal(random_states[0], torch.Generator().manual_seed(2).get_state())
    if expected.error is None:
        if mode is not GRAD and isinstance(x, Tensor) and x.dtype is torch.float32 and not was_lazy:
            assert_as_fused_as_expected(plain, counters)
        if counters["fused_calls"] == 0:
            assert_same(actual.value, expected.value)
        else:
            exact = None if draws else outcome(copy.deepcopy(plain).double(), copy.deepcopy(x).double())
            assert_close(actual.value, expected.value, exact)
        assert shares_memory(actual.value, arguments[1]) == shares_memory(expected.value, arguments[0])
    # A ReLU in place changes the argument.
    (assert_close if counters["fused_calls"] else assert_same)(arguments[1], arguments[0])
    if mode is GRAD and expected.error is None and backward_is_safe(plain):
        errors = []
        for model, result in ((plain, expected.value), (fast, actual.value)):
            model.zero_grad()
            if isinstance(result, Tensor) and result.requires_grad:
                errors.append(outcome(result.backward, torch.ones_like(result)))
        assert not errors or errors[0] == errors[1]  # eager refuses after some changes in place
        for parameter, other in zip(plain.parameters(), fast.parameters(), strict=True):
            assert_same(other.grad, parameter.grad)
        if isinstance(x, Tensor):
            assert_same(arguments[1].grad, arguments[0].grad)
    return bool(counters["fused_calls"])


def compare_states(plain: nn.Module, fast: nn.Module, compare: Callable[[Any, Any], None]) -> None:
    """Parameters and buffers: training moves the latter, by what came out of a fused run perhaps."""
    for (key, expected), (other_key, actual) in zip(plain.state_dict().items(), fast.state_dict().items(), strict=True):
        assert key == other_key and is_lazy(actual) == is_lazy(expected)
        if not is_lazy(expected):
            compare(actual, expected)


def seed(number: int) -> None:
    """torch.manual_seed for the CPU alone: that of all devices takes longer than a call of these models."""
    torch.default_generator.manual_seed(number)


def is_lazy(parameter: Tensor) -> bool:
    return isinstance(parameter, nn.parameter.UninitializedTensorMixin)


def backward_is_safe(model: nn.Sequential) -> bool:
    """Eager's backward writes out of bounds for windows that lie wholly in the padding."""
    pools = (layer for layer in model if isinstance(layer, nn.MaxPool2d))
    return not any(pool.dilation not in (1, (1, 1)) and pool.padding not in (0, (0, 0)) for pool in pools)


def assert_as_fused_as_expected(plain: nn.Sequential, counters: dict[str, Any]) -> None:
    for reason in counters["fallbacks"]:
        assert reason in DOCUMENTED, counters
    if not counters["fallbacks"]:
        expected = native_calls(plain)
        assert counters["fused_calls"] == expected, f"{expected} native calls expected, {counters}"


def shares_memory(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def assert_same(actual: Any, expected: Any) -> None:
    """The same bits, also in tuples, which recurrent layers and pools with indices return."""
    assert type(actual) is type(expected)
    if isinstance(expected, tuple):
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
    elif isinstance(expected, Tensor) and expected.dtype is torch.complex32:  # which nothing compares
        assert actual.dtype is torch.complex32
        assert_identical(torch.view_as_real(actual), torch.view_as_real(expected))
    else:
        assert_identical(actual, expected)


def assert_close(actual: Any, expected: Any, exact: Outcome | None = None) -> None:
    """Results of a Sequential with fused runs: as `expected`, eager's, but for rounding; `exact`: in float64."""
    assert type(actual) is type(expected)
    if isinstance(expected, tuple):
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_close(a, e, exact and exact._replace(value=exact.value and exact.value[i]))
        return
    if not isinstance(expected, Tensor):
        assert actual == expected
        return
    for attribute in ("dtype", "shape", "requires_grad", "layout"):
        assert getattr(actual, attribute) == getattr(expected, attribute), attribute
    assert actual.stride() == expected.stride(), f"strides: {expected.stride()} expected, {actual.stride()} found"
    assert (actual.grad_fn is None) == (expected.grad_fn is None)
    if exact is None or exact.error is not None or not expected.is_floating_point():
        torch.testing.assert_close(actual, expected, equal_nan=True)
        return
    finite = expected.isfinite() & exact.value.isfinite()
    assert_identical(actual.where(~finite, 0), expected.where(~finite, 0))
    reference = exact.value[finite]
    scale = reference.norm().item() or 1.0
    error, eager_error = ((found[finite] - reference).norm().item() / scale for found in (actual, expected))
    assert error <= max(1e-6, 4 * eager_error), f"error {error:.2g} against float64, eager's is {eager_error:.2g}"


def in_place(case: Case) -> Case:
    def make() -> nn.Module:
        module: Any = case.make()
        module.inplace = True
        return module

    return case._replace(name=f"{case.name} in place", make=make)


def compare_in_chains(
    case: Case,
    counts: Counts,
    chains: Iterable[str] = ALL,
    modes: Iterable[Mode] = ALL_MODES,
    orders: Iterable[str] = ("as given",),
) -> None:
    """One case in each of the Sequentials, images in each memory order, called once in each mode."""
    seed(1)
    with torch.no_grad():
        output = outcome(case.make(), copy.deepcopy(case.x)).value
    for chain, order in itertools.product(chains, orders):
        seed(3)
        model, x = build(case, chain, output), case.x
        if order != "as given":
            if not isinstance(x, Tensor) or x.dim() not in (3, 4) or (x.dim() == 3 and order == "channels_last"):
                continue
            x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        if order == "channels_last weights":
            if any(is_lazy(parameter) or parameter.dim() == 5 for parameter in model.parameters()):
                continue  # cannot be converted
            model = model.to(memory_format=torch.channels_last)
        error = case.error if chain == ALONE else None
        compare(f"{case.name}, [{chain}], {order}", model, x, modes, counts, error)


# The tests --------------------------------------------------------------------------------------------------------


def test_there_are_samples() -> None:
    """Another torch may have fewer; then this file tests less than it says."""
    one_tensor = []
    for name, info in MODULES.items():
        cases = [case for case in module_cases(info, torch.float32, training=False) if not case.more]
        assert len(cases) >= CORE.get(name, 0), name
        one_tensor += cases
    assert not set(CORE) - set(MODULES)
    assert len(MODULES) >= 100
    assert len(one_tensor) >= 300
    assert sum(bool(module_error_cases(info, training=True)) for info in MODULES.values()) >= 12
    for name, samples, errors in (
        ("nn.functional.conv2d", 30, 10),
        ("nn.functional.max_pool2d", 1440, 7),
        ("nn.functional.linear", 18, 0),
        ("nn.functional.relu", 20, 0),
    ):
        assert len(op_cases(name, torch.float32)) >= samples, name
        assert len(op_error_cases(name)) >= errors, name


def test_importing_the_samples_changed_nothing_for_other_tests() -> None:
    assert not torch.backends.flags_frozen()
    assert "torch.testing" not in str(getattr(torch._C.ScriptFunction.__call__, "__module__", ""))
    assert torch.jit.script(twice)(torch.ones(1)) == 2


def twice(x: Tensor) -> Tensor:
    return x + x


@pytest.mark.parametrize("name", MODULES)
def test_module_samples(name: str) -> None:
    info, counts = MODULES[name], Counts()
    for dtype, training in itertools.product(dtypes_of(info), (False, True)):
        cases = module_cases(info, dtype, training)
        assert cases, f"{name} has no samples for {dtype}"
        in_full = dtype is torch.float32 and (not training or info.train_and_eval_differ)
        for case in cases:
            if case.more:
                continue
            if name in CORE:
                compare_in_chains(case, counts, orders=MEMORY_ORDERS)
            elif in_full:
                compare_in_chains(case, counts, FEW, orders=MEMORY_ORDERS)
                # Of Transformer encoders, say, there are many samples.
                compare_in_chains(case, counts, OTHERS if len(cases) <= 20 else (), (NO_GRAD,), MEMORY_ORDERS)
            else:
                compare_in_chains(case, counts, FEW, (NO_GRAD, GRAD))
            if in_full and not training and hasattr(case.make(), "inplace"):  # which no sample has
                compare_in_chains(in_place(case), counts, (*FEW, "run relu sample"))
        # A Sequential hands one argument on. Of samples with more, some will do: nearly all of them raise.
        for case in [case for case in cases if case.more][:2]:
            compare_in_chains(case, counts, FEW, (NO_GRAD,))
    assert counts.fused > 0
    assert counts.raised < counts.calls or all(case.more for case in cases)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", [name for name, info in MODULES.items() if module_error_cases(info, training=False)])
def test_module_errors(name: str, training: bool) -> None:
    counts = Counts()
    for case in module_error_cases(MODULES[name], training):
        if case.more or not training:
            # An error of another argument is none in a Sequential, and BatchNorm's are errors in training only.
            case = case._replace(error=None)
        compare_in_chains(case, counts, orders=MEMORY_ORDERS)
    assert counts.raised > 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_samples(name: str) -> None:
    counts = Counts()
    for dtype in dtypes_of(OPS[name]):
        cases = op_cases(name, dtype)
        assert cases, f"{name} has no samples for {dtype}"
        if name == "nn.functional.max_pool2d":
            # Each combination of its settings: all of them alone, a part in the rest. The steps are coprime to 1440.
            if dtype is torch.float32:
                for case in cases:
                    compare_in_chains(case, counts, (ALONE,), (NO_GRAD, NO_GRAD))
                for case in cases[::7]:
                    compare_in_chains(case, counts, ("run relu sample", "run sample relu"), (NO_GRAD,))
            cases = cases[::43]
        for case in cases:
            if dtype is torch.float32:
                compare_in_chains(case, counts, orders=MEMORY_ORDERS)
            else:
                compare_in_chains(case, counts, FEW, (NO_GRAD, GRAD))
    assert counts.fused > 0


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if op_error_cases(name)])
def test_function_errors(name: str) -> None:
    counts = Counts()
    for case in op_error_cases(name):
        compare_in_chains(case, counts, orders=MEMORY_ORDERS)
    assert counts.raised > 0
