"""explain, stats, verify, refresh: what they say is what happened, as a table and as data."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from dropin import (
    NETS,
    RUNS,
    assert_fused,
    conv_net,
    fused,
    images,
    nested_net,
    one_thread,  # noqa: F401
    split_net,
)
from torch import Tensor, nn

import fastseq
from fastseq import Report

each_net = pytest.mark.parametrize("net", NETS)


def segments(report: Report, index: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = report.to_dict()["sequentials"][index]["segments"]
    return found


def steps(report: Report, index: int = 0) -> list[dict[str, Any]]:
    return [step for segment in segments(report, index) if segment["kind"] == "native" for step in segment["steps"]]


# explain ----------------------------------------------------------------------------------------------------------


@each_net
@pytest.mark.parametrize("state", ["plain", "cold", "warm", "with input"])
def test_data_is_json_and_the_text_says_the_same(net: str, state: str) -> None:
    model, x = NETS[net](), images()
    if state != "plain":
        model = fastseq.optimize(model)
    if state == "warm":
        assert_fused(model, x, RUNS[net])
    report = fastseq.explain(model, x) if state == "with input" else fastseq.explain(model)
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert list(data) == ["isa", "native_error", "sequentials", "forwards", "fallbacks"]
    assert data["isa"] == fastseq.isa() and data["native_error"] is None and data["fallbacks"] == {}
    text = str(report)
    assert text.splitlines()[0] == f"fastseq: kernels for {fastseq.isa()}"
    assert len(data["forwards"]) == (net == "holder")
    for sequential in data["sequentials"] + data["forwards"]:
        assert set(sequential) == {"path", "fused", "note", "segments"}
        assert sequential["fused"] == (state != "plain")
        assert sequential["note"] in text and (sequential["path"] or "(model)") in text
        for segment in sequential["segments"]:
            if segment["kind"] == "eager":
                assert segment["layer"] in text and segment["reason"] in text
                continue
            for step in segment["steps"]:
                assert " ".join(step["layers"]) in text and step["name"] in text
                assert step["kernel"] in text and step["output"] in text
                assert bool(step["kernel"]) == bool(step["output"]) == (state in ("warm", "with input"))
    assert all(line == line.rstrip() for line in text.splitlines())


def test_table() -> None:
    report = fastseq.explain(fastseq.optimize(split_net()), images())
    names = [step["kernel"] for step in steps(report)]
    width = max(map(len, names))
    assert str(report) == "\n".join(
        [
            f"fastseq: kernels for {fastseq.isa()}",
            f"layers          runs as      {'kernel':<{width}}  output   why",
            "(model)",
            f"  0 1           conv2d_relu  {names[0]:<{width}}  8x10x10",
            f"  2: OtherNorm  eager        {'':<{width}}           "
            "OtherNorm is a subclass of BatchNorm2d; fused kernels take exactly BatchNorm2d",
            f"  4             linear       {names[1]:<{width}}  10",
            "'+' marks steps that run in the same native call as the line above",
        ]
    )


def test_steps_of_one_native_call() -> None:
    report = fastseq.explain(fastseq.optimize(nested_net()), images())
    (segment,) = segments(report)
    assert [(step["name"], step["layers"], step["output"]) for step in segment["steps"]] == [
        ("conv2d_relu_maxpool2d", ["0.0", "0.1", "0.2"], "8x5x5"),
        ("linear_relu", ["1.1.1", "2"], "10"),
    ]
    assert [step["flops"] for step in segment["steps"]] == [2 * 8 * 3 * 9 * 10 * 10, 2 * 200 * 10]
    assert all(step["packed_bytes"] > 0 for step in segment["steps"]) and segment["scratch_bytes"] > 0
    assert "  + 1.1.1 2" in str(report)


def test_kernels_are_of_the_list() -> None:
    listed = {kernel["name"]: kernel for kernel in fastseq.kernels()}
    found = [step["kernel"] for step in steps(fastseq.explain(fastseq.optimize(conv_net()), images()))]
    assert found and all(listed[name]["supported"] for name in found)


def test_outputs_follow_the_input() -> None:
    fast = fastseq.optimize(conv_net()[:3])
    for h, w in ((12, 12), (20, 9)):
        (step,) = steps(fastseq.explain(fast, torch.randn(1, 3, h, w)))
        assert step["output"] == f"8x{(h - 2) // 2}x{(w - 2) // 2}"


def test_notes() -> None:
    class Own(nn.Sequential):
        pass

    model = nn.ModuleDict(
        {
            "plain": conv_net(),
            "nothing": nn.Sequential(nn.Tanhshrink()),
            "own": Own(nn.Linear(2, 2)),
            "nested": nested_net(),
        }
    )
    notes = {
        entry["path"]: entry["note"] for entry in fastseq.explain(fastseq.optimize(model)).to_dict()["sequentials"]
    }
    assert notes == {
        "plain": "",
        "nothing": "nothing to fuse",
        "own": "Own is a subclass of nn.Sequential; it keeps its own forward",
        "nested": "",
        "nested.0": "runs inside nested",
        "nested.1": "runs inside nested",
        "nested.1.1": "runs inside nested",
    }
    notes = {entry["path"]: entry["note"] for entry in fastseq.explain(model).to_dict()["sequentials"]}
    assert notes["plain"] == notes["nested"] == "not optimised: fastseq.optimize would fuse this"


def test_models_without_a_sequential() -> None:
    for model in (nn.Linear(2, 2), nn.ModuleList()):
        report = fastseq.explain(model)
        assert report.to_dict()["sequentials"] == []
        assert str(report).endswith("the model holds no nn.Sequential and no other layers to fuse")


def test_explaining_a_plain_model_changes_nothing() -> None:
    model, x = split_net(), images()
    keys = [set(module.__dict__) for module in model.modules()]
    report = fastseq.explain(model, x)
    assert [set(module.__dict__) for module in model.modules()] == keys and type(model) is nn.Sequential
    assert [s["kind"] for s in segments(report)] == ["native", "eager", "native"]
    assert fastseq.stats(model) == fused(0)


def test_fallbacks_of_this_call_alone_or_of_all_calls() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    fast(x)
    assert fastseq.explain(fast).to_dict()["fallbacks"] == fastseq.stats(fast)["fallbacks"] != {}
    assert fastseq.explain(fast, x).to_dict()["fallbacks"] == {}
    fast.double()
    report = fastseq.explain(fast, x.double())
    ((reason, count),) = report.to_dict()["fallbacks"].items()
    assert "float32" in reason and count == 1
    assert f"fell back 1x: {reason}" in str(report).splitlines()


def test_kernels_of_a_call_that_fell_back_are_not_shown() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    assert_fused(fast, x)
    fast.double()
    assert [step["kernel"] for step in steps(fastseq.explain(fast, x.double()))] == ["", ""]
    fast.float()
    assert all(step["kernel"] for step in steps(fastseq.explain(fast, x)))


def test_explain_runs_without_gradients_and_raises_what_the_model_raises() -> None:
    seen: list[bool] = []

    class Probe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.is_grad_enabled())
            return x

    fast = fastseq.optimize(nn.Sequential(nn.Linear(12, 4), Probe()))
    fastseq.explain(fast, images())
    assert seen == [False] and torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        fastseq.explain(fast, torch.randn(2, 5))


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
def test_the_report_is_of_the_model_as_it_is_now(is_warm: bool) -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    if is_warm:
        assert_fused(fast, x)
    fast[0].dilation = [2, 2]
    first, second, third = segments(fastseq.explain(fast))[:3]
    assert (first["kind"], first["layer"]) == ("eager", "0: Conv2d") and "dilation [2, 2]" in first["reason"]
    assert second["layer"] == "1: ReLU" and third["kind"] == "native"
    fast[0] = nn.Identity()
    assert [s["kind"] for s in segments(fastseq.explain(fast))] == ["eager", "eager", "native"]
    del fast[:]
    assert segments(fastseq.explain(fast)) == []


@pytest.mark.parametrize("thing", [None, nn.Linear, torch.zeros(1), {}])
def test_explain_of_no_module(thing: Any) -> None:
    expected = f"fastseq.explain expects a torch.nn.Module, got {type(thing).__name__}"
    with pytest.raises(TypeError, match=f"^{expected}$"):
        fastseq.explain(thing)


def test_to_dict_is_a_copy() -> None:
    report = fastseq.explain(fastseq.optimize(conv_net()))
    report.to_dict()["sequentials"].clear()
    assert len(report.to_dict()["sequentials"]) == 1
    assert repr(report) == "<fastseq.Report of 1 Sequentials>"


def test_a_disabled_engine_is_the_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_DISABLE", "1")
    report = fastseq.explain(fastseq.optimize(conv_net()), images())
    assert str(report).startswith("fastseq: everything runs eager: FASTSEQ_DISABLE=1\n")
    assert report.to_dict()["isa"] == "none" and report.to_dict()["native_error"] == "FASTSEQ_DISABLE=1"


def test_layers_that_stand_twice_and_shared_sequentials() -> None:
    linear, shared = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model = nn.ModuleList([nn.Sequential(linear, nn.ReLU(), linear), shared, shared])
    report = fastseq.explain(fastseq.optimize(model))
    assert [step["layers"] for step in steps(report)] == [["0", "1"], ["2"]]
    assert [entry["path"] for entry in report.to_dict()["sequentials"]] == ["0", "1"]


# stats ------------------------------------------------------------------------------------------------------------


@each_net
def test_stats_count_every_call(net: str) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images()
    assert fastseq.stats(fast) == fused(0)
    with torch.no_grad():
        for _ in range(3):
            fast(x)
    assert fastseq.stats(fast) == fused(3 * RUNS[net])
    fast(x)
    counters = fastseq.stats(fast)
    assert (
        counters["fused_calls"] == 3 * RUNS[net] and counters["eager_calls"] == sum(counters["fallbacks"].values()) > 0
    )
    fastseq.reset_stats(fast)
    assert fastseq.stats(fast) == fused(0)
    json.dumps(counters)


def test_counters_survive_changes_of_the_model() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    with torch.no_grad():
        fast(x)
        fast[0].stride = (1, 1)
        fast(x)
        fast[6] = nn.Identity()
        fast(x)
        fastseq.refresh(fast)
        fast(x)
        fast.double()(x.double())
        fast.float()(x)
    counters = fastseq.stats(fast)
    assert counters["fused_calls"] == 5 and counters["eager_calls"] == 1


def test_stats_of_a_part() -> None:
    fast = fastseq.optimize(nn.ModuleList([conv_net(), nested_net()]))
    for part in fast:
        assert_fused(part, images())
        assert fastseq.stats(part) == fused(1)
    assert fastseq.stats(fast) == fused(2)
    fastseq.reset_stats(fast[0])
    assert fastseq.stats(fast) == fused(1)


def test_stats_of_models_that_are_not_optimised() -> None:
    for model in (conv_net(), nn.Linear(2, 2)):
        fastseq.reset_stats(model)
        fastseq.refresh(model)
        assert fastseq.stats(model) == fused(0)


def test_stats_are_a_snapshot() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    fast(x)
    before = fastseq.stats(fast)
    before["fallbacks"].clear()
    assert fastseq.stats(fast)["fallbacks"]
    assert_fused(fast, x)
    assert before["fused_calls"] == 0


# Information ------------------------------------------------------------------------------------------------------


def test_kernels_and_isa() -> None:
    kernels = fastseq.kernels()
    assert len({kernel["name"] for kernel in kernels}) == len(kernels) > 10
    for kernel in kernels:
        op, _, how = kernel["name"].partition(f"_{kernel['dtype']}__")
        assert op == kernel["op"] and how.rpartition("_")[0] == kernel["isa"]
        assert set(kernel) >= {"name", "op", "isa", "supported"}
    floats = [k for k in kernels if k["dtype"] == "f32"]
    supported = list(dict.fromkeys(k["isa"] for k in floats if k["supported"] and not k["test_only"]))
    assert fastseq.isa() == supported[0] and "portable" in supported
    json.dumps(kernels)
