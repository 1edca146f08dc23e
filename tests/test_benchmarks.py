"""The scripts that measure, at sizes that measure nothing: what they compute, write and refuse, never how fast."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_python

import fastseq
from fastseq.optimize import has_bf16_kernels
from fastseq.testing import MODELS, LayerCost, assert_matches

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))

import cases  # noqa: E402
import layers  # noqa: E402
import limits  # noqa: E402
import plot_results  # noqa: E402
import report  # noqa: E402
import tune  # noqa: E402

FEW = ("--rounds", "2", "--min-time", "0.0005")


def run(script: str, *arguments: str) -> None:
    """The script's main() in this process."""
    module = importlib.import_module(script)
    before = sys.argv
    sys.argv = [str(BENCHMARKS / f"{script}.py"), *arguments]
    try:
        assert not module.main()
    finally:
        sys.argv = before


def run_process(script: str, *arguments: str) -> None:
    """A script that starts processes, which are to find it as their main module."""
    result = run_python(str(BENCHMARKS / f"{script}.py"), *arguments)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


# The limits ----------------------------------------------------------------------------------------------------------

KB, MB = 1 << 10, 1 << 20
ROUND = limits.Limits(1, 100.0, 50.0, 10.0, l2_bytes=MB, l3_bytes=16 * MB)


def test_a_layer_takes_the_longer_of_computing_and_reading() -> None:
    big = LayerCost(flops=10**9, weight_bytes=20 * 10**6)  # 10 ms at 100 GFLOP/s, 2 ms at 10 GB/s
    wide = LayerCost(flops=2 * 10**8, weight_bytes=10**8)  # 2 ms, 10 ms
    assert ROUND.floor([big], 1) == (pytest.approx(0.010), "FMA")
    assert ROUND.floor([wide], 1) == (pytest.approx(0.010), "DRAM")
    assert ROUND.floor([wide], 10) == (pytest.approx(0.020), "FMA"), "weights are read once for the whole batch"
    seconds, where = ROUND.floor([big, wide, wide], 1) or (0.0, "")
    assert seconds == pytest.approx(0.030) and where == "DRAM", "one layer after the other"


def test_weights_are_read_from_where_all_of_them_fit() -> None:
    cost = LayerCost(flops=0, weight_bytes=5 * 10**6)
    assert ROUND.floor([cost], 1) == (pytest.approx(1e-4), "L3")
    assert ROUND.floor([cost] * 4, 1) == (pytest.approx(2e-3), "DRAM")
    assert ROUND.floor([LayerCost(0, 100 * KB)], 1) == (0.0, "FMA")


def test_limits_go_through_a_file() -> None:
    data = {**json.loads(json.dumps(ROUND.as_dict())), "cores": [0], "sgemm_gflops": 1.0}
    assert limits.Limits.from_dict(data) == ROUND
    del data["dram_read_gbytes_per_s"]
    assert limits.Limits.from_dict(data) is None
    unknown = limits.Limits(1, None, 50.0, 10.0, MB, 16 * MB)
    assert unknown.floor([LayerCost(1, 1)], 1) is None


def test_limits_are_measured() -> None:
    torch.set_num_threads(1)
    found = limits.measure_limits(1, dram_bytes=4 * MB)
    assert found.threads == 1 and found.l3_bytes >= found.l2_bytes > 0
    assert found.l3_read_gbytes_per_s > 0 and found.dram_read_gbytes_per_s > 0
    assert (found.fma_gflops is not None) == fastseq.native_available()


@pytest.mark.parametrize("name", cases.STEPS)
def test_a_step_is_one_native_call(name: str) -> None:
    case = cases.STEPS[name]
    fast = fastseq.optimize(case.build())
    with torch.no_grad():
        assert_matches(fast(case.example(1)), case.build(), case.example(1))
    assert fastseq.stats(fast) == {"fused_calls": 1, "eager_calls": 0, "fallbacks": {}}


# The layers ----------------------------------------------------------------------------------------------------------


def test_names_of_layers_are_unique() -> None:
    names = [layer.name for group in layers.GROUPS.values() for layer in group]
    assert len(names) == len(set(names))
    for name in MODELS:
        names = [layer.name for layer in layers.of_network(name)]
        assert names and len(names) == len(set(names)), name


@pytest.mark.parametrize("name", ["seed1", "seed2", "seed3", "lenet5", "mlp", "cifar_vgg", "alexnet"])
def test_layers_of_a_network_are_its_work(name: str) -> None:
    found = [layer for layer in layers.of_network(name) if layer.batch == 1]
    assert tuple(layer.cost for layer in found) == MODELS[name].layer_costs


def test_layers_have_what_follows_them() -> None:
    names = [layer.name for layer in layers.of_network("alexnet")]
    assert names[:2] == ["3-64 11x11 @55 stride 4 pooled 3/2 first", "64-192 5x5 @27 pooled 3/2"]
    assert names[-1] == "linear 4096-1000 M=8 no relu"


@pytest.mark.parametrize("group", layers.GROUPS)
def test_layers_are_built_as_they_say(group: str) -> None:
    layer = min(layers.GROUPS[group], key=lambda layer: layer.cost.flops)
    module, x = layer.build(), layer.example()
    assert x.shape[1] == layer.c_in
    with torch.no_grad():
        assert module(x).shape[:2] == (layer.batch, layer.c_out)
    if layer.kernel is not None and not layer.is_first:
        assert x.is_contiguous(memory_format=torch.channels_last)
    again = layer.build()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


SMALL = {
    "pooled": layers.conv(8, 40, 3, 8, pool=(2, 2)),
    "pooled by rings": layers.conv(8, 24, 3, 9, pool=(3, 2)),
    "first": layers.first(3, 16, 5, 12, padding=2),
    "linear": layers.linear(30, 50, 5),
}


@pytest.mark.parametrize("name", SMALL)
def test_candidates_are_different_kernels_that_are_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_ISA", "portable")
    torch.set_num_threads(1)
    layer = SMALL[name]
    own, again, *others = tune.candidates(layer, layer.example())
    assert own.kernel == again.kernel and "portable" in own.kernel
    kernels = [own.kernel, *(other.kernel for other in others)]
    assert others and len(kernels) == len(set(kernels))
    assert all(prepared.error < 1e-5 and prepared.native is not None for prepared in (own, again, *others))


def test_a_preferred_kernel_leaves_the_variable_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "7x64"):
        if before is None:
            monkeypatch.delenv("FASTSEQ_KERNEL", raising=False)
        else:
            monkeypatch.setenv("FASTSEQ_KERNEL", before)
        with layers.preferred_kernel("6x16"):
            assert layers.os.environ["FASTSEQ_KERNEL"] == "6x16"
        assert layers.os.environ.get("FASTSEQ_KERNEL") == before


def test_eager_layers_are_said_to_be_eager() -> None:
    layer = layers.conv(4, 4, 3, 6, groups=4)
    plain, x = layer.build(), layer.example()
    prepared = layers.prepare(plain, x, layers.exact_result(plain, x), layers.OWN_CHOICE)
    assert prepared.kernel.startswith("eager: ") == (prepared.native is None)


def test_summary_of_losses() -> None:
    def row(name: str, loss: float, kernels: int) -> dict[str, Any]:
        return {"layer": name, "loss": loss, "noise": 0.01, "candidates": [{}] * kernels}

    found = tune.summary([row("a", 0.0, 3), row("b", 0.1, 2), row("c", 0.9, 1)])
    assert found["mean_loss"] == pytest.approx(0.05) and found["worst_layer"] == "b"
    assert (found["layers"], found["without_choice"]) == (3, 1)
    assert tune.summary([row("c", 0.9, 1)])["mean_loss"] is None


# The scripts ---------------------------------------------------------------------------------------------------------

ROW = {
    "case": str,
    "batch": int,
    "threads": int,
    "cores": list,
    "backend": str,
    "backend_version": str,
    "median_us": float,
    "p20_us": float,
    "p80_us": float,
    "gflops": float,
    "cores_used": float,
    "limit_us": float,
    "limited_by": str,
    "of_limit": float,
    "err_rel_max": float,
    "eager_err_rel_max": float,
    "first_result_s": float,
    "blocks": int,
    "cpu": str,
    "commit": str,
    "command": str,
}


@pytest.fixture(scope="module")
def models_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "rows.json"
    arguments = ("--threads", "1", "--cases", "seed2", "--batches", "1", "--no-pin", *FEW)
    run_process("bench_models", *arguments, "--backends", "eager", "fastseq", "--json", str(path))
    return path


def test_rows_of_models(models_file: Path) -> None:
    found = report.load(models_file)
    assert [row["backend"] for row in found["rows"]] == ["eager", "fastseq"]
    for row in found["rows"]:
        assert row["problem"] is None
        for name, kind in ROW.items():
            assert isinstance(row[name], kind), name
        assert row["of_limit"] == pytest.approx(row["limit_us"] / row["median_us"])
    (ceiling,) = found["ceilings"]
    assert limits.Limits.from_dict(ceiling) is not None and ceiling["cores"]
    text = report.to_markdown(found)
    assert "GB/s read from memory" in text and "| seed2 | 1 | " in text and "fastseq's by eager's, at worst" in text


def test_files_become_one(models_file: Path, tmp_path: Path) -> None:
    found = report.load(models_file)
    other = json.loads(models_file.read_text())
    other["machine"]["commit"] = "abc"
    other["skipped"] = {"eager": "was not there", "ncnn": "is not there"}
    del other["rows"][0]
    other["rows"][0]["median_us"] = 12345.0
    other["rows"].append({**found["rows"][0], "batch": 7})
    second = tmp_path / "second.json"
    second.write_text(json.dumps(other))
    out, table = tmp_path / "deep" / "all.json", tmp_path / "all.md"
    run("report", str(models_file), str(second), "--json", str(out), "--markdown", str(table))
    merged = report.load(out)
    assert [(row["batch"], row["backend"]) for row in merged["rows"]] == [(1, "eager"), (1, "fastseq"), (7, "eager")]
    assert merged["rows"][1]["median_us"] == 12345.0, "the later file counts"
    assert merged["skipped"] == {"ncnn": "is not there"} and len(merged["ceilings"]) == 2
    assert merged["machine"]["commit"] == f"{found['machine']['commit']}, abc"
    assert "12 300" in table.read_text(), "and a case without fastseq has an empty cell"


def test_files_of_different_machines_do_not(
    models_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.loads(models_file.read_text())
    other["machine"]["cpu"] = "another"
    second = tmp_path / "second.json"
    second.write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="2"):
        run("report", str(models_file), str(second))
    assert "different machines" in capsys.readouterr().err


def test_rows_in_bfloat16(models_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    backends = ("--backends", "eager", "onnxruntime", "fastseq", "fastseq_compute_dtype")
    arguments = ("--threads", "1", "--cases", "seed2", "--batches", "3", "--no-pin", *FEW)
    run_process("bench_models", "--dtype", "bfloat16", *arguments, *backends, "--json", str(path))
    found = report.load(path)
    assert found["dtype"] == "bfloat16" and found["skipped"] == {"onnxruntime": "no bfloat16"}
    assert [row["backend"] for row in found["rows"]] == ["eager", "fastseq", "fastseq_compute_dtype"]
    for row in found["rows"]:
        assert row["problem"] is None and row["limit_us"] is None
        in_float32 = row["backend"] == "fastseq_compute_dtype" and not has_bf16_kernels()
        assert (row["err_rel_max"] > 1e-4) is not in_float32 and row["eager_err_rel_max"] > 1e-4
    assert "bfloat16. Median" in report.to_markdown(found)
    with pytest.raises(SystemExit, match="2"):
        run("report", str(models_file), str(path))
    assert "of different types: bfloat16, float32" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(models_file: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / f"plot.{suffix}"
    run("plot_results", str(models_file), "--out", str(out))
    content = out.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml") and len(content) > 5000
    if suffix == "svg":
        run("plot_results", str(models_file), "--out", str(out))
        assert b"<dc:date>" not in content and b"machine's limit" in content


def test_lines_of_a_plot(models_file: Path) -> None:
    found = report.load(models_file)
    (line,) = plot_results.lines_of(found, 1)
    assert line.label == "seed 2: MLP 128-64-10, batch 1" and set(line.of_limit) == {"eager", "fastseq"}
    assert plot_results.lines_of(found, 2) == []


def test_layers_against_the_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    pattern = "128-64 M=32|depthwise|20-20"
    run("bench_layers", "--layers", pattern, *FEW, "--json", str(path))
    text = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert limits.Limits.from_dict(found["limits"]) is not None
    assert {row["group"] for row in found["rows"]} == {"linear", "depthwise", "odd channels"}
    for row in found["rows"]:
        assert row["layer"] in text and row["gflops"] > 0 and 0 < row["of_fma_peak"] <= row["best_of_fma_peak"]
        assert row["err_rel_max"] <= max(1e-6, 4 * row["eager_err_rel_max"])
        assert (row["kernel_us"] is None) == row["kernel"].startswith("eager")
        assert (row["weight_gbytes_per_s"] is not None) == row["layer"].startswith("linear")


def test_tuner(tmp_path: Path) -> None:
    path, table = tmp_path / "rows.json", tmp_path / "table.md"
    arguments = ("--networks", "seed2", "--groups", "odd channels", "--layers", "M=1 |M=32|17-1", *FEW)
    run("tune", *arguments, "--json", str(path), "--markdown", str(table))
    found = json.loads(path.read_text())
    names = [row["layer"] for row in found["rows"]]
    assert names == ["linear 128-64 M=32", "linear 64-10 M=1 no relu", "linear 64-10 M=32 no relu", "17-1 3x3 @28"]
    assert found["summary"] == tune.summary(found["rows"])
    for row in found["rows"]:
        assert row["loss"] >= 0 and row["noise"] >= 0
        assert row["candidates"][0]["kernel"] == row["own"] and row["candidates"][0]["of_own"] == 1
        assert row["best"] in [candidate["kernel"] for candidate in row["candidates"]]
        assert f"| {row['layer']} |" in table.read_text()


def test_parts_of_a_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, table = tmp_path / "blocks.json", tmp_path / "table.md"
    run("bench_call", *FEW, "--json", str(path), "--markdown", str(table))
    blocks = json.loads(path.read_text())
    assert {"module", "allocation", "liveness", "smallest", "network", "eager"} < set(blocks)
    assert all(len(times) == 2 and min(times) > 0 for times in blocks.values())
    assert table.read_text() == capsys.readouterr().out and "network less smallest" in table.read_text()


def test_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    run_process("bench_memory", "--cases", "mlp", "--repeats", "1", "--json", str(path))
    eager, fast, copied = json.loads(path.read_text())["rows"]
    weights = sum(p.numel() * 4 for p in MODELS["mlp"].build().parameters())
    assert eager["weight_bytes"] == fast["weight_bytes"] == copied["weight_bytes"] == weights
    assert eager["packed_bytes"] == 0 and fast["packed_bytes"] == copied["packed_bytes"]
    for row in (eager, fast, copied):
        assert row["peak_bytes"] >= row["weight_bytes"] and row["optimize_s"] >= 0 and row["first_call_s"] > 0
        assert row["of_eager"] == pytest.approx(row["peak_bytes"] / eager["peak_bytes"])


def test_start_of_a_replica(tmp_path: Path) -> None:
    path, table = tmp_path / "rows.json", tmp_path / "table.md"
    run_process("bench_start", "--cases", "seed2", "--repeats", "1", "--json", str(path), "--markdown", str(table))
    rows = json.loads(path.read_text())["rows"]
    assert [row["model"] for row in rows] == ["eager", "fastseq"]
    for row in rows:
        parts = [row[key] for key in ("import_fastseq_s", "model_s", "warm_s", "first_answer_s")]
        assert min(parts) > 0 and row["import_torch_s"] > 0 and row["beyond_torch_s"] == pytest.approx(sum(parts))
    assert table.read_text().count("| seed2 |") == 2


def test_requests_per_second(tmp_path: Path) -> None:
    pytest.importorskip("litserve", reason="needs the extra fastseq[serve]")
    path, table = tmp_path / "rows.json", tmp_path / "table.md"
    options = ("--seconds", "0.5", "--repeats", "1", "--p99", "5000", "--json", str(path), "--markdown", str(table))
    run_process("bench_serving", "--cases", "seed2", *options)
    found = json.loads(path.read_text())
    assert [(row["model"], row["load"] is None) for row in found["rows"]] == [
        (model, is_all) for model in ("plain", "fastseq") for is_all in (True, False, False)
    ]
    for row in [*found["rows"], *found["at_p99"]]:
        assert row["failures"] == 0 and row["requests_per_s"] > 0 and 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["model_ms_per_batch"] > 0 and row["batch_size"] >= 1
    assert [row["model"] for row in found["at_p99"]] == ["plain", "fastseq"]
    assert table.read_text().count("| seed2 |") == 8


def test_a_server_under_load(tmp_path: Path) -> None:
    pytest.importorskip("litserve", reason="needs the extra fastseq[serve]")
    path = tmp_path / "rows.json"
    options = ("--seconds", "4", "--swaps", "2", "--capacity-seconds", "0.5", "--share", "0.3", "--workers", "2")
    run_process("soak_serving", "--case", "seed2", *options, "--json", str(path))
    (row,) = json.loads(path.read_text())["rows"]
    assert row["failures"] == 0 and row["problems"] == {} and row["requests"] > 10
    assert row["swaps"] == row["swaps_seen"] == 2
    assert row["resident_mib"] > 100 and row["growth"] >= 0 and len(row["memory"]) > 20


def test_an_answer_of_wrong_weights_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soak_serving = importlib.import_module("soak_serving")
    weights = soak_serving.Weights("seed2", 4, tmp_path / "weights.pt")
    inputs = MODELS["seed2"].example(3)
    weights.answer_all(inputs)

    def answer(version: int, number: int) -> bytes:
        model = MODELS["seed2"].build()
        model.load_state_dict(weights.states[version])
        with torch.no_grad():
            return bytes(model(inputs)[number].numpy().tobytes())

    for version in (1, 2):
        weights.put(version)
        assert torch.equal(torch.load(weights.file)["0.weight"], weights.states[version]["0.weight"])
    assert weights.check(1, answer(2, 1)) is None and weights.check(1, answer(1, 1)) is None
    assert weights.check(1, answer(0, 1)) == "an answer of weights that were replaced long ago"
    assert weights.check(1, answer(3, 1)) == "an answer of weights that are not there yet"
    assert weights.check(1, answer(2, 0)) == "an answer of no version of the weights"
    assert weights.check(1, b"1234") == "an answer of another size"
    monkeypatch.setattr(soak_serving, "SECONDS_TO_LOAD", 0.0)
    assert weights.check(1, answer(2, 1)) is None
    assert weights.check(1, answer(1, 1)) == "an answer of old weights"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("bench_models", ("--cases", "nothing"), "invalid choice: 'nothing'"),
        ("bench_layers", ("--groups", "nothing"), "invalid choice: 'nothing'"),
        ("bench_layers", ("--layers", "nothing"), "no layer of 3x3"),
        ("tune", ("--networks", "seed1_named"), "invalid choice: 'seed1_named'"),
        ("tune", ("--networks", "--groups"), "no layer to time"),
        ("bench_memory", ("--repeats", "0"), "at least 1"),
        ("bench_start", ("--max-batch", "0"), "at least 1"),
        ("report", (), "expected result files, or --page"),
        ("report", ("a.json", "--page", "a.md"), "expected result files, or --page"),
        ("report", ("pyproject.toml",), "pyproject.toml: not JSON"),
        ("report", ("tests/cuda_registers.json",), "not a report of bench_models.py"),
        ("plot_results", ("nothing.json", "--out", "a.png"), "nothing.json"),
        ("plot_results", ("benchmarks/results/zen3-1-thread.json", "--out", "a.txt"), "expected .png"),
        ("plot_results", ("benchmarks/results/zen3-1-thread.json", "--out", "a.png"), "no row for 1 thread(s)"),
    ],
)
def test_bad_arguments(
    script: str,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        run(script, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("script", ["bench_layers", "bench_call", "tune", "bench_memory", "bench_start"])
def test_nothing_is_measured_without_kernels(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSEQ_DISABLE", "1")
    with pytest.raises(SystemExit) as ended:
        run(script)
    assert "FASTSEQ_DISABLE=1" in f"{ended.value} {capsys.readouterr().err}"


def test_committed_results_can_be_read() -> None:
    for path in sorted((BENCHMARKS / "results").glob("*-thread*.json")):
        found = report.load(path)
        assert report.to_markdown(report.merge([found])).count("\n| ") > 5, path


def test_tables_of_the_page_are_those_of_the_files() -> None:
    page = (ROOT / "docs/performance.md").read_text()
    assert report.TABLE.search(page) and report.with_tables(page) == page, "run benchmarks/report.py --page"


def test_winograd_is_an_option_where_it_may_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    optimize = fastseq.optimize
    asked: list[str] = []

    def with_option(model: torch.nn.Module, *, winograd: str = "auto") -> torch.nn.Module:
        asked.append(winograd)
        return optimize(model)

    monkeypatch.setattr(fastseq, "optimize", with_option)
    layer = layers.conv(8, 8, 3, 8)
    plain, x = layer.build(), layer.example()
    for variant in layers.winograd_variants(layer):
        layers.prepare(plain, x, layers.exact_result(plain, x), variant)
    assert asked == ["auto", "off"]
    for other in (layers.conv(8, 8, 3, 8, stride=2), layers.conv(8, 8, 1, 8), layers.linear(8, 8, 1)):
        assert layers.winograd_variants(other) == [layers.OWN_CHOICE]
    monkeypatch.setattr(fastseq, "optimize", lambda model: optimize(model))
    assert layers.winograd_variants(layer) == [layers.OWN_CHOICE]
