"""verify: what it measures is true, and it finds what is wrong and where."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from dropin import NETS, RUNS, conv_net, images, mislead, nested_net, one_thread  # noqa: F401
from torch import Tensor, nn

import fastseq
from fastseq import Verification
from fastseq.testing import MODELS, error_vs_float64
from fastseq.verification import compare


@pytest.mark.parametrize("net", NETS)
def test_of_a_right_model(net: str) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images()
    kept, classes = x.clone(), [type(module) for module in fast.modules()]
    for _ in range(2):
        found = fastseq.verify(fast, x)
        data = found.to_dict()
        assert found.ok and data["ok"] and data["fused_calls"] == RUNS[net] and data["fallbacks"] == {}
        assert json.loads(json.dumps(data)) == data
        assert 0 <= data["max_abs_error"] < 1e-5 * data["scale"]
        assert data["special_values"] == {"nan": 0, "inf": 0, "-inf": 0}
        assert all(step["ok"] and step["is_fused"] for step in data["steps"])
    assert [type(module) for module in fast.modules()] == classes and torch.equal(x, kept)
    assert {parameter.dtype for parameter in fast.parameters()} == {torch.float32}


def test_numbers_are_those_of_the_oracle() -> None:
    case = MODELS["lenet5"]
    x = case.example(3)
    fast = fastseq.optimize(case.build())
    data = fastseq.verify(fast, x).to_dict()
    with torch.no_grad():
        errors = error_vs_float64(fast(x), case.build(), x)
    assert data["max_abs_error"] == pytest.approx(errors["max_abs"])
    assert data["eager_max_abs_error"] == pytest.approx(errors["eager_max_abs"])
    assert data["error"] == pytest.approx(errors["rel_rms"]) and data["eager_error"] == pytest.approx(
        errors["eager_rel_rms"]
    )


def test_steps_are_those_of_explain() -> None:
    for model in (nested_net(), NETS["holder"](), MODELS["seed3"].build()):
        x = MODELS["seed3"].example(2) if "layer1" in dict(model.named_modules()) else images()
        fast = fastseq.optimize(model)
        report = fastseq.explain(fast, x).to_dict()
        segments = [s for entry in report["forwards"] + report["sequentials"] for s in entry["segments"]]
        wanted = [step for segment in segments if segment["kind"] == "native" for step in segment["steps"]]
        found = fastseq.verify(fast, x)
        steps = found.to_dict()["steps"]
        for key in ("layers", "name"):
            assert [step[key] for step in steps] == [step[key] for step in wanted]
        text = str(found).splitlines()
        assert text[0].startswith("fastseq") and len(text) == len(steps) + 4
        assert all(step["kernel"] in line for step, line in zip(steps, text[2:], strict=False))
        assert text[-2].strip().endswith("ok") and text[-1].startswith("worst element")


def test_special_values() -> None:
    x = images(4)
    x[0, 0, 3, 3], x[1, 1, 5, 5], x[2, 2, 7, 7] = float("nan"), float("inf"), -float("inf")
    found = fastseq.verify(fastseq.optimize(conv_net()), x)
    assert found.ok and "as eager" in str(found)


def test_moved_special_values_are_found() -> None:
    eager = torch.tensor([float("nan"), 1.0, float("inf"), -float("inf")])
    exact = eager.double()
    assert compare(eager.clone(), eager, exact)["ok"]
    for i in range(4):
        wrong = eager.clone()
        wrong[i] = 1.0 if i != 1 else float("nan")
        found = compare(wrong, eager, exact)
        assert not found["ok"] and sum(found["special_values"].values()) == 1


def test_worst_element() -> None:
    exact = torch.zeros(2, 3, dtype=torch.float64) + 1
    actual = exact.float()
    actual[1, 2] += 0.5
    found = compare(actual, exact.float(), exact)
    assert not found["ok"] and found["max_abs_error"] == 0.5
    assert found["worst"] == {"index": [1, 2], "actual": 1.5, "eager": 1.0, "exact": 1.0}


def test_after_an_edit() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    for stride in ((1, 1), (1, 1)):
        fastseq.verify(fast, x)
        fast[0].stride = stride
        assert fastseq.verify(fast, x).to_dict()["fused_calls"] == 1


def test_says_when_nothing_was_fused() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    handle = fast[0].register_forward_hook(lambda *_: None)
    found = fastseq.verify(fast, x)
    data = found.to_dict()
    ((reason, count),) = data["fallbacks"].items()
    assert data["fused_calls"] == 0 and "hooks" in reason and count == 1 and data["error"] == data["eager_error"]
    assert f"fell back 1x: {reason}" in str(found)
    handle.remove()
    assert fastseq.verify(fast, x).to_dict()["fused_calls"] == 1
    assert fastseq.verify(conv_net(), x).to_dict()["steps"] == []


def test_finds_an_error_and_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager computes something else than the layers say: the fused result must not pass for right."""
    fast = fastseq.optimize(conv_net())
    right = torch.nn.functional.linear
    mislead(monkeypatch, nn.Linear, "linear", lambda *args: 1.01 * right(*args))
    found = fastseq.verify(fast, images())
    assert not found.ok and "NOT ok" in str(found) and "NOT ok" in repr(found)
    assert [step["ok"] for step in found.to_dict()["steps"]] == [True, False]


def test_of_an_exact_result() -> None:
    found = fastseq.verify(fastseq.optimize(nn.Sequential(nn.MaxPool2d(2))), images())
    data = found.to_dict()
    assert found.ok and (data["max_abs_error"], data["eager_max_abs_error"], data["worst"]) == (0.0, 0.0, None)


def test_eager_layers_between_and_inputs_that_are_written_to() -> None:
    model = nn.Sequential(
        nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.Softmax(1)
    )
    fast, x = fastseq.optimize(model.eval()), images()
    kept = x.clone()
    found = fastseq.verify(fast, x)
    assert found.ok and torch.equal(x, kept) and len(found.to_dict()["steps"]) == 2


@pytest.mark.parametrize("wrong", [None, 3, "model", nn.Linear])
def test_of_something_else_than_a_module(wrong: Any) -> None:
    with pytest.raises(TypeError, match="expects a torch.nn.Module"):
        fastseq.verify(wrong, images())


def test_of_other_results() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(TypeError, match="one floating-point tensor, got tuple"):
        fastseq.verify(Pair(), images())
    assert isinstance(fastseq.verify(nn.Identity(), images()), Verification)
