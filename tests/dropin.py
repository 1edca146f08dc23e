"""What the tests of drop-in behaviour share: small models, calls with their counters, eager on the same modules."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq import FusedSequential
from fastseq.straight_line import user_class


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """For the files that import it: these models are too small for two threads, which wait on a busy machine."""
    torch.set_num_threads(1)


def conv_net() -> nn.Sequential:
    """One native run: everything that is fused, for `images()`."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(200, 10), nn.ReLU()
    ).eval()


def nested_net() -> nn.Sequential:
    """The layers of `conv_net` in Sequentials inside a Sequential: still one native run."""
    conv, relu, pool, flatten, dropout, linear, last = conv_net()
    return nn.Sequential(nn.Sequential(conv, relu, pool), nn.Sequential(flatten, nn.Sequential(dropout, linear)), last)


class OtherNorm(nn.BatchNorm2d):
    """A subclass, which is left to eager."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Nothing: torch.fx cannot trace a comparison."""


def split_net() -> nn.Sequential:
    """Two native runs with an eager layer between them."""
    conv, relu, _, flatten, _, _, _ = conv_net()
    return nn.Sequential(conv, relu, OtherNorm(8), flatten, nn.Linear(800, 10)).eval()


class Holder(nn.Module):
    """A module with a forward of its own around two Sequentials, and layers outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.classifier = nn.Sequential(nn.Linear(200, 10), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(self.stem(x)).flatten(1))
        return y


NETS: dict[str, Callable[[], nn.Module]] = {
    "flat": conv_net,
    "nested": nested_net,
    "split": split_net,
    "holder": lambda: Holder().eval(),
}
RUNS = {"flat": 1, "nested": 1, "split": 2, "holder": 1}  # native calls of one forward


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 12, 12)


def first(model: nn.Module, kind: type[nn.Module]) -> Any:
    """The first layer of that class."""
    return next(module for module in model.modules() if isinstance(module, kind))


@contextmanager
def as_plain(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, every module of `model` has its plain class: the same objects, run by eager."""
    classes = {module: type(module) for module in model.modules()}
    try:
        for module, kind in classes.items():
            plain = nn.Sequential if kind is FusedSequential else user_class(kind)
            object.__setattr__(module, "__class__", plain)
        yield model
    finally:
        for module, kind in classes.items():
            object.__setattr__(module, "__class__", kind)


def eager(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What eager gives for the model as it is now."""
    with as_plain(model):
        return model(*args, **kwargs)


def mislead(patch: pytest.MonkeyPatch, kind: type[nn.Module], name: str, function: Callable[..., Any]) -> None:
    """Eager's layers of that class call `function` as `F.<name>`, and no check can see it: `F` itself is another."""
    own = {**vars(torch.nn.functional), name: function}
    patch.setattr(sys.modules[kind.__module__], "F", types.SimpleNamespace(**own))


def call(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """An optimised model's result, and the counters of this call alone."""
    owner = model if isinstance(model, nn.Module) else model.__self__  # type: ignore[attr-defined]
    fastseq.reset_stats(owner)
    result = model(*args, **kwargs)
    return result, fastseq.stats(owner)


def fused(runs: int = 1) -> dict[str, Any]:
    """The counters of a call that made `runs` native calls and fell back nowhere."""
    return {"fused_calls": runs, "eager_calls": 0, "fallbacks": {}}


def assert_fused(model: nn.Module, x: Tensor, runs: int = 1) -> Tensor:
    """`model(x)` runs fused under no_grad and is what eager gives for the weights of this moment."""
    __tracebackhide__ = True
    with torch.no_grad():
        expected = eager(model, x.clone())
        actual, counters = call(model, x)
    assert counters == fused(runs)
    torch.testing.assert_close(actual, expected, check_stride=True, equal_nan=True)
    assert type(actual) is torch.Tensor and not actual.requires_grad
    return actual


def assert_eager(model: nn.Module, x: Any, reason: str = "", runs: int = 0) -> Any:
    """`model(x)` gives the very bits of eager, and says why; `runs` native calls may still happen in other parts."""
    __tracebackhide__ = True
    expected = eager(model, x.clone())
    actual, counters = call(model, x)
    assert counters["fused_calls"] == runs
    assert_identical(actual, expected) if runs == 0 else torch.testing.assert_close(actual, expected)
    if reason:
        assert any(reason in text for text in counters["fallbacks"]), counters
        assert counters["eager_calls"] > 0
    return actual


def assert_identical(actual: Any, expected: Any) -> None:
    """Two tensors of any kind, or anything else, with nothing to tell them apart."""
    __tracebackhide__ = True
    assert type(actual) is type(expected)
    if not isinstance(expected, Tensor):
        assert actual == expected
        return
    for name in ("dtype", "device", "layout", "is_quantized", "requires_grad", "is_nested", "shape"):
        if name == "shape" and expected.is_nested:
            continue
        assert getattr(actual, name) == getattr(expected, name), name
    assert (actual.grad_fn is None) == (expected.grad_fn is None)
    assert actual.is_inference() == expected.is_inference()
    if expected.device.type == "meta":
        assert actual.stride() == expected.stride()
    elif expected.is_nested:
        for a, e in zip(actual.unbind(), expected.unbind(), strict=True):
            assert_identical(a, e)
    elif expected.is_quantized:
        assert torch.equal(actual.dequantize(), expected.dequantize())
    else:
        if expected.layout is not torch.strided:
            actual, expected = actual.to_dense(), expected.to_dense()
        else:
            assert actual.stride() == expected.stride()
        if not torch.equal(actual, expected):  # much faster, but two NaNs are not equal for it
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


class Outcome(NamedTuple):
    """What a call gave: a value, or an exception's class and text."""

    value: Any
    error: type[BaseException] | None
    text: str


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    try:
        return Outcome(function(*args, **kwargs), None, "")
    except Exception as error:
        # Some errors end with the C++ call stack, which names the callers.
        return Outcome(None, type(error), str(error).partition("\nException raised from")[0])


def assert_same_outcome(model: nn.Module, *args: Any, **kwargs: Any) -> Outcome:
    """An optimised model and eager agree: on the exception and its words, or on the value (to rounding)."""
    __tracebackhide__ = True
    expected = outcome(eager, model, *args, **kwargs)
    actual = outcome(model, *args, **kwargs)
    assert (actual.error, actual.text) == (expected.error, expected.text)
    if expected.error is None and isinstance(expected.value, Tensor):
        assert type(actual.value) is type(expected.value)
        torch.testing.assert_close(actual.value, expected.value, check_stride=True, equal_nan=True)
    return expected
