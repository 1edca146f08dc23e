"""Random models with random lives, plain and optimised side by side: tests/fuzz, in a bounded run.

Then what earlier runs found, each as the smallest model that shows it, and proof that the fuzzer sees planted defects.
`make fuzz` runs it for longer.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import run_python
from dropin import one_thread  # noqa: F401
from fuzz import campaign, plants
from fuzz.case import Case, Layer, Mutation
from fuzz.layers import walk
from fuzz.lockstep import run_case
from fuzz.mutations import MUTATIONS
from fuzz.reduce import reduce, replay
from fuzz.source import SeededSource
from fuzz.strategies import cases, make_case
from hypothesis import HealthCheck, given, settings
from torch import nn

import fastseq

PLANTS = sorted(set(plants.PLANTS) - {"killed_process"})


# The bounded run ------------------------------------------------------------------------------------------------------


@settings(
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
@given(cases())
def test_an_optimised_model_does_what_the_plain_one_does(case: Case) -> None:
    failure = run_case(case).failure
    assert not failure, failure


def test_seeded_cases_run_fused_fall_back_and_raise() -> None:
    """The cases of `make fuzz`, and that they reach what they are for."""
    features: Counter[str] = Counter()
    for index in range(250):
        case = make_case(SeededSource(11, index))
        result = run_case(case)
        assert not result.failure, f"--seed 11 --case {index}: {result.failure}\n{case}"
        features += result.features
    assert features["call fused"] > 180
    assert features["call fell back"] > 80
    assert features["call raised"] > 40
    assert features["call mixed"] > 10
    assert features["fused after changes"] > 100
    assert features["gradients compared"] > 100
    assert features["hooks fired"] > 100
    assert len([name for name in features if name.startswith("layer ")]) > 40
    seen = {name for name in MUTATIONS if features[f"mutation {name}"]}
    assert len(seen) > 0.9 * len(MUTATIONS), set(MUTATIONS) - seen


# The fuzzer itself ----------------------------------------------------------------------------------------------------


def test_a_case_is_the_same_from_its_seed_and_from_its_choices() -> None:
    for index in range(20):
        source = SeededSource(4, index)
        case = make_case(source)
        assert make_case(SeededSource(4, index)) == case
        assert replay(source.choices) == (case, source.choices)


def test_a_failing_case_is_reduced_to_what_makes_it_fail() -> None:
    def fails(case: Case) -> bool:
        return "MaxPool2d" in repr(case) and any(isinstance(step, Mutation) for step in case.script)

    source = next(
        source
        for index in range(1000)
        if fails(make_case(source := SeededSource(5, index))) and len(source.choices) > 99
    )
    case, choices = reduce(source.choices, fails, seconds=60)
    assert fails(case) and replay(choices)[0] == case
    assert len([part for part in walk(case.parts) if isinstance(part, Layer)]) <= 2
    assert len(case.script) <= 3


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_defect_is_found(plant: str) -> None:
    with plants.planted(plant):
        failures = (campaign.outcome(make_case(SeededSource(1, index))).failure for index in range(400))
        found = next(filter(None, failures), "")
    assert "script[" in found or "at the end" in found, found
    assert "not a difference but an error" not in found, found


def test_failures_and_crashes_are_reported_with_a_line_that_reproduces_them() -> None:
    """A worker that dies costs its case alone: the others run."""
    arguments = ("-m", "tests.fuzz", "--plant", "killed_process", "--seed", "1")
    run = run_python(*arguments, "--cases", "24", "--jobs", "2")
    assert run.returncode == 1, run.stderr
    crashed = [line for line in run.stdout.splitlines() if line.startswith("CRASHED --seed 1 --case ")]
    assert crashed and all("ended with -6" in line for line in crashed)
    assert "Fatal Python error: Aborted" in run.stdout
    assert run.stdout.endswith(f"\n24 cases, {len(crashed)} failures\n")

    case = crashed[0].split()[4].rstrip(":")
    assert run_python(*arguments, "--case", case).returncode == -6


def test_a_failure_comes_with_a_reduced_case_that_can_be_replayed() -> None:
    arguments = ("-m", "tests.fuzz", "--plant", "wrong_element", "--seconds", "1")
    run = run_python(*arguments, "--cases", "12", "--seed", "1")
    assert run.returncode == 1, run.stderr
    assert "FAILED python -m tests.fuzz --seed 1 --case " in run.stdout
    choices = next(line.split()[1] for line in run.stdout.splitlines() if line.strip().startswith("--replay "))
    again = run_python(*arguments, "--replay", choices)
    assert again.returncode == 1 and "differs most at" in again.stdout, again.stderr


# What it found --------------------------------------------------------------------------------------------------------


def conv_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)).eval()


def test_an_instances_own_forward_runs_at_each_call_and_may_call_the_classes_one() -> None:
    """The second call skipped it: what it calls was planned with it in place."""
    model = conv_net()
    fast = fastseq.optimize(model)
    x = torch.randn(2, 2, 6, 6)
    with torch.no_grad():
        expected = model(x)
        fast.forward = lambda x, forward=fast.forward: -forward(x)
        for _ in range(3):
            torch.testing.assert_close(fast(x), -expected)
        assert fastseq.stats(fast)["fused_calls"] == 3
        del fast.forward
        for _ in range(2):
            torch.testing.assert_close(fast(x), expected)
        assert fastseq.stats(fast) == {"fused_calls": 5, "eager_calls": 0, "fallbacks": {}}
