"""What the tests of the numbered behaviours share; docs/semantics.md lists the numbers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from dropin import Outcome, assert_identical, call, eager, fused, one_thread, outcome
from torch import Tensor, nn

import fastseq
from fastseq.testing import assert_matches

__all__ = [
    "assert_close_to_eager",
    "assert_declined",
    "assert_eager_outcome",
    "assert_fast",
    "one_thread",
    "plain",
    "reasons",
    "same",
]


def plain(model: nn.Module) -> nn.Module:
    """A copy of an optimised or plain model that eager runs."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if type(module) is fastseq.FusedSequential:
            module.__class__ = nn.Sequential
    return copied


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in every element to the sign of zero; any NaN equals any other."""
    return a.shape == b.shape and bool(((a == b) & (a.signbit() == b.signbit()) | a.isnan() & b.isnan()).all())


def reasons(model: nn.Module) -> str:
    """Why layers stay eager, in one text."""
    segments = [s for entry in fastseq.explain(model).to_dict()["sequentials"] for s in entry["segments"]]
    return "; ".join(s["reason"] for s in segments if s["kind"] == "eager")


def assert_fast(model: nn.Module, x: Tensor, runs: int = 1) -> Tensor:
    """An optimised copy makes `runs` native calls and nothing else; at most 4 times eager's error, all else exact.

    The input keeps its bits and its version.
    """
    __tracebackhide__ = True
    fast, kept, version = fastseq.optimize(model), x.detach().clone(), x._version
    with torch.no_grad():
        actual, counters = call(fast, x)
    assert counters == fused(runs)
    assert same(x.detach(), kept) and x._version == version
    assert type(actual) is Tensor and not actual.requires_grad
    assert_matches(actual, plain(model), x.detach())
    return actual


def assert_close_to_eager(fast: nn.Module, x: Tensor, runs: int) -> Tensor:
    """As `assert_fast` for a model that is optimised already, with its weights and layers of this moment."""
    __tracebackhide__ = True
    with torch.no_grad():
        actual, counters = call(fast, x)
    assert counters == fused(runs), counters
    assert_matches(actual, plain(fast), x)
    return actual


def assert_eager_outcome(fast: nn.Module, x: Any, reason: str = "", runs: int = 0) -> Outcome:
    """The call gives eager's very bits, strides and type, or its exception and words, for `reason`."""
    __tracebackhide__ = True
    expected = outcome(eager, fast, x)
    fastseq.reset_stats(fast)
    actual = outcome(fast, x)
    counters = fastseq.stats(fast)
    assert (actual.error, actual.text) == (expected.error, expected.text)
    assert_identical(actual.value, expected.value)
    assert counters["fused_calls"] == runs, counters
    assert not reason or any(reason in text for text in counters["fallbacks"]), counters
    return expected


def assert_declined(layer: nn.Module, x: Tensor, reason: str) -> Outcome:
    """The matcher leaves the layer to eager for `reason`, and the layers beside it are fused.

    A pool of 1x1 windows changes no bit, so that eager's very bits are asked for.
    """
    __tracebackhide__ = True
    fast = fastseq.optimize(nn.Sequential(nn.MaxPool2d(1), layer, nn.MaxPool2d(1)))
    assert reason in reasons(fast)
    with torch.no_grad():
        expected = outcome(eager, fast, x)
        fastseq.reset_stats(fast)
        actual = outcome(fast, x)
    assert fastseq.stats(fast)["fused_calls"] == (2 if expected.error is None else 1)
    assert (actual.error, actual.text) == (expected.error, expected.text)
    assert_identical(actual.value, expected.value)
    return expected
