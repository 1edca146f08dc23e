"""benchmarks/gpu_check.py as far as it goes without a GPU: its dry run, what it calls wrong, and what it writes."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from emulation.build import compiler
from torch import nn

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu_bench  # noqa: E402
import gpu_check  # noqa: E402
import gpu_compare  # noqa: E402
import gpu_cudnn  # noqa: E402
import gpu_jobs  # noqa: E402
import gpu_peers  # noqa: E402
import gpu_report  # noqa: E402
from gpu_device import MODES  # noqa: E402


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own. Skips where nothing compiles."""
    compiler()
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


# The dry run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("out")
    result = run("--dry-run", "--quick", "--out", str(out))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    (path,) = out.glob("gpu-dry-run-*.json")
    return SimpleNamespace(
        stdout=result.stdout, report=json.loads(path.read_text()), text=path.with_suffix(".md").read_text()
    )


def test_dry_run_says_that_it_is_one(dry_run: SimpleNamespace) -> None:
    assert dry_run.report["dry_run"] is True
    assert "Dry run: no GPU was used" in dry_run.text
    summary = dry_run.stdout.split("=" * 100)[-1]
    assert "INCORRECT: nothing found" in summary and "dry run: no GPU was used" in summary
    assert [phase["name"] for phase in dry_run.report["phases"]] == list(gpu_check.PHASES)
    assert {phase["status"] for phase in dry_run.report["phases"]} == {"ok"}


def test_dry_run_holds_no_times_of_a_gpu(dry_run: SimpleNamespace) -> None:
    assert dry_run.report["ceilings"] == {} and dry_run.report["bars"] == []
    assert {row["contender"] for row in dry_run.report["bench"]} == set(gpu_peers.CONTENDERS)
    for row in dry_run.report["bench"]:
        assert not [key for key in row if key.endswith("_us")], row
        assert (row["problem"] is None) == (row["contender"] != "compile_max"), row


def test_dry_run_checks_one_kernel_of_each_kind(dry_run: SimpleNamespace) -> None:
    rows = {row["task"]: row for row in dry_run.report["correctness"]}
    for start in ("kernel conv2d_tf32", "kernel conv2d_bf16", "kernel tiny_mlp_f32", "kernel fused_mlp_f16"):
        checked = [row for task, row in rows.items() if task.startswith(start)]
        assert checked and all(row["checks"] and not row["problems"] for row in checked), checked
        assert all(row["task"].removeprefix("kernel ") in row["kernels"] for row in checked)
    assert rows["two streams"]["skipped"] == "needs streams"
    assert rows["graph replay, changed inputs and weights"]["skipped"] == "needs graphs"
    assert {row["task"] for row in dry_run.report["sanitizer"]} >= {"maxpool2d_f32__cuda"}


def test_dry_run_plans_every_case(dry_run: SimpleNamespace) -> None:
    found = {(row["network"], row["batch"], row["dtype"], row["device"]) for row in dry_run.report["plans"]}
    devices = gpu_check.DRY_RUN_DEVICES
    assert found == {(c.network, c.batch, c.dtype, name) for c in gpu_bench.cases(True) for name in devices}
    for row in dry_run.report["plans"]:
        assert row["problem"] is None and not row["refused"] and row["launches"] >= 1 and row["floor_us"] > 0
    (row,) = [r for r in dry_run.report["plans"] if (r["network"], r["device"]) == ("seed2", "H200")]
    assert row["launches"] == 1 and row["kernels"][0] in dry_run.text


def test_a_wrong_result_is_a_failure(tmp_path: Path) -> None:
    flags = ("--tasks", "model seed2", "--perturb", "model seed2", "--only", "correctness")
    result = run("--dry-run", "--quick", "--out", str(tmp_path), *flags)
    assert result.returncode == 1, result.stdout[-3000:] + result.stderr[-3000:]
    summary = result.stdout.split("=" * 100)[-1]
    assert "INCORRECT: 1" in summary and "correctness, model seed2, default: batch 1: error" in summary
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["failures"]


# What needs streams and graphs, on a GPU that is pretended -----------------------------------------------------------

PRETENDED = """
import contextlib, sys, tempfile, time, types
from pathlib import Path
import torch

class Stream:
    cuda_stream = 0
    def wait_stream(self, other): pass
    def synchronize(self): pass

class Event:
    def __init__(self, enable_timing): pass
    def record(self): self.at = time.perf_counter()
    def synchronize(self): pass
    def elapsed_time(self, other): return 1e3 * (other.at - self.at)

class CUDAGraph:
    def __init__(self, keep_graph): pass
    def raw_cuda_graph(self): raise RuntimeError
    def instantiate(self): pass
    def replay(self): pass

properties = types.SimpleNamespace(
    name="pretended", major=9, minor=0, multi_processor_count=132, L2_cache_size=1 << 20, total_memory=1 << 30)
blocks = [{"size": 512, "state": "inactive"}]
for name, value in dict(
    Stream=Stream, Event=Event, CUDAGraph=CUDAGraph, current_stream=Stream, current_device=lambda: 0,
    device_count=lambda: 1, synchronize=lambda device: None, empty_cache=lambda: None, clock_rate=lambda device: 1000,
    stream=lambda stream: contextlib.nullcontext(), graph=lambda graph: contextlib.nullcontext(),
    set_sync_debug_mode=lambda mode: None, get_device_properties=lambda device: properties, _sleep=lambda cycles: None,
    memory_snapshot=lambda: [{"device": None, "stream": 0, "segment_pool_id": (0, 0), "blocks": blocks}],
).items():
    assert hasattr(torch.cuda, name), name
    setattr(torch.cuda, name, value)

import gpu_bench, gpu_cases, gpu_device, gpu_jobs, gpu_peers

class Pretended(gpu_device.Gpu):
    def __init__(self):
        super().__init__()
        self.device = torch.device("cpu")
    def warm_up(self, seconds=0): pass
    def capture(self, work, warm_ups=3):
        captured = super().capture(work, warm_ups)
        def replay():
            result = work()
            if captured.output is not None:
                captured.output.copy_(result)
        return gpu_device.Captured(replay, captured.output, captured.nodes)

assert gpu_bench.cuda_architectures() == "emulated", "another package came first"
gpu = Pretended()
assert len(dict(gpu_device.measure_ceilings(gpu, 1 << 20, 64))) == 12
wanted = ("first call of a process in a capture, small net", "many graphs", "a graph outlives its plans",
    "no synchronisation")
for task in gpu_cases.tasks_of(gpu, True):
    if task.name in wanted:
        row = gpu_cases.run_task(task, gpu, True, None)
        assert row["checks"] and not row["problems"] and not row["skipped"], row
        if "outlives" in task.name:
            assert gpu_cases.run_task(task, gpu, True, "outlives")["problems"], "a wrong replay was not seen"
gpu_peers.CONTENDERS.pop("compile_max")
reporter = gpu_jobs.Reporter(Path(tempfile.mkdtemp()) / "rows", time.time() + 60)
gpu_bench.run_bench(reporter, gpu, [gpu_bench.Case("seed2", 1, "float32")], 0.1, 5, 5)
rows = gpu_bench.reported_rows(reporter)
assert [row["contender"] for row in rows] == ["eager", "graph_eager", "graph_aten", "fastseq", "fastseq_graph"]
for row in rows:
    assert row["problem"] is None and row["latency_us"] > 0 and row["rounds"] >= 3, row
print("fine")
"""


def test_tasks_that_need_a_gpu_run_on_a_pretended_one() -> None:
    from emulation.extension import build_package

    compiler()
    package = build_package()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(BENCHMARKS)])}
    # Not from the root: the package there would come first.
    command = [sys.executable, "-c", PRETENDED]
    result = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, timeout=600)
    assert result.stdout.strip() == "fine", result.stdout + result.stderr[-4000:]


# The question to cuDNN -----------------------------------------------------------------------------------------------

# As strict as the library about what each attribute is, for the descriptors in question. FUSES: -1 it has no engines at
# all, 0 none for a pool behind others, 1 for everything.
FAKE_CUDNN = r"""
#include <cstdint>
#include <cstring>
#include <cstddef>
#include <map>
#include <vector>
struct Descriptor {
  int kind;
  bool is_final = false;
  std::map<int, std::vector<void*>> pointers;
  std::map<int, int> set;
};
static int live = 0;
static std::map<int, int> wanted(int kind) {  // attribute, type
  switch (kind) {
    case 0: return {{0, 14}, {1, 1}};
    case 1: return {{100, 1}, {101, 7}, {102, 3}, {103, 3}, {104, 3}, {105, 3}, {106, 3}};
    case 3: return {};
    case 4: return {{200, 8}, {201, 15}};
    case 5: return {{400, 0}, {401, 15}};
    case 10: return {{700, 4}, {701, 4}, {702, 15}, {703, 15}, {704, 15}, {705, 15}};
    case 13: return {{750, 15}, {751, 15}, {753, 15}};
    case 15: return {{800, 0}, {801, 15}};
    case 17: return {{900, 3}, {901, 1}, {902, 3}, {903, 3}, {906, 3}, {907, 2}};
    case 24: return {{1700, 21}, {1701, 1}, {1702, 3}, {1703, 26}, {1704, 26}, {1705, 26}, {1706, 26}, {1708, 22}};
    case 25: return {{1710, 15}, {1711, 15}, {1713, 5}, {1714, 5}, {1716, 15}};
  }
  return {{-1, -1}};
}
extern "C" {
int cudnnCreate(void** handle) { *handle = &live; return 0; }
int cudnnDestroy(void*) { return 0; }
size_t cudnnGetVersion() { return 91900; }
int fake_live() { return live; }
const char* cudnnGetErrorString(int status) {
  return status / 1000 == 3 ? "CUDNN_STATUS_NOT_SUPPORTED" : "CUDNN_STATUS_BAD";
}
void cudnnGetLastErrorString(char* text, size_t size) { std::strncpy(text, "as the fake says", size); }
int cudnnBackendCreateDescriptor(int kind, void** made) { ++live; *made = new Descriptor{kind}; return 0; }
int cudnnBackendDestroyDescriptor(void* d) { --live; delete static_cast<Descriptor*>(d); return 0; }
int cudnnBackendSetAttribute(void* d, int name, int type, int64_t count, const void* values) {
  Descriptor& to = *static_cast<Descriptor*>(d);
  if (to.is_final || count < 1) return 2000;
  if (type == 15) {
    std::vector<void*> all(count);
    std::memcpy(all.data(), values, count * sizeof(void*));
    for (void* one : all) if (!static_cast<Descriptor*>(one)->is_final && to.kind != 5) return 2004;
    to.pointers[name] = all;
  }
  to.set[name] = type;
  return 0;
}
int cudnnBackendFinalize(void* d) {
  Descriptor& it = *static_cast<Descriptor*>(d);
  for (const auto& [name, type] : wanted(it.kind)) if (!it.set.count(name) || it.set[name] != type) return 2000;
  if (it.kind == 5) {
    if (FUSES < 0) return 3000;
  }
  if (it.kind == 4 && FUSES == 0) {
    bool pools = false, others = false;
    for (void* op : static_cast<Descriptor*>(it.pointers[201][0])->pointers[801])
      (static_cast<Descriptor*>(op)->kind == 25 ? pools : others) = true;
    if (pools && others) return 3001;
  }
  it.is_final = true;
  return 0;
}
int cudnnBackendGetAttribute(void* d, int name, int type, int64_t wanted, int64_t* count, void* values) {
  if (name != 202 || type != 15 || !static_cast<Descriptor*>(d)->is_final) return 2000;
  *count = 2;
  return wanted == 0 ? values != nullptr : 0;
}
}
"""


@pytest.mark.parametrize(
    ("fuses", "answer"),
    [
        (1, "cuDNN fuses them"),
        (0, "not fused: finalize descriptor 4: CUDNN_STATUS_NOT_SUPPORTED as the fake says"),
        (-1, "no answer: convolution, bias, ReLU: no: finalize descriptor 5: CUDNN_STATUS_NOT_SUPPORTED"),
    ],
)
def test_the_question_to_cudnn(fuses: int, answer: str, tmp_path: Path) -> None:
    source, library = tmp_path / "cudnn.cpp", tmp_path / f"libcudnn_{fuses}.so"
    source.write_text(FAKE_CUDNN)
    flags = ["-std=c++17", "-w", "-fPIC", "-shared", f"-DFUSES={fuses}"]
    subprocess.run([compiler(), *flags, str(source), "-o", str(library)], check=True)
    found = gpu_cudnn.probe_pool_fusion(str(library))
    assert found["answer"].startswith(answer), found
    assert found["cudnn"] == 91900 and ctypes.CDLL(str(library)).fake_live() == 0
    assert found["both"] == "yes" if fuses == 1 else str(found["both"]).startswith("no: ")


def test_no_answer_is_none(tmp_path: Path) -> None:
    assert gpu_cudnn.probe_pool_fusion(str(tmp_path / "none.so"))["answer"].startswith(
        "not asked: RuntimeError: no lib"
    )
    asked = {"convolution, bias, ReLU": "yes", "max-pool": "error: bad", "both": "no: engine"}
    assert gpu_cudnn.conclusion(asked) == "no answer: max-pool: error: bad"


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--only", "bench,speed"], "no such phase: speed"),
        (["--budget", "bench"], "is not PHASE=SECONDS"),
        (["--budget", "speed=3"], "is not PHASE=SECONDS"),
        (["--limit", "1"], "1 s are not enough"),
    ],
)
def test_argument_errors(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_check.parse_arguments(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_budgets_and_phases() -> None:
    arguments = gpu_check.parse_arguments(["--only", "build,bench", "--budget", "bench=12.5"])
    assert arguments.phases == ["build", "bench"] and arguments.budgets["bench"] == 12.5
    assert arguments.budgets["build"] == gpu_check.BUDGETS["build"] and arguments.limit < 480
    patient = gpu_check.parse_arguments(["--dry-run", "--budget", "bench=7"])  # the machine may be a slow one
    assert patient.limit > 1000 and patient.budgets["correctness"] > 1000 and patient.budgets["bench"] == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = run("--only", "ceilings", "--out", str(tmp_path))
    assert result.returncode == 2 and "no usable GPU" in result.stdout and list(tmp_path.glob("gpu-none-*.md"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_on_the_device(tmp_path: Path) -> None:
    """Few of the checks, in a minute or two: the whole script says more."""
    result = run("--quick", "--only", "build,correctness", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


# Floors --------------------------------------------------------------------------------------------------------------

RATES = {"copy_gbytes_per_s": 1000.0, "bf16_tflops": 100.0, "tf32_tflops": 50.0, "f32_tflops": 10.0}


def test_work_of_linear_layers() -> None:
    case = gpu_bench.Case("seed2", 32, "float32")
    work = gpu_bench.Work.of(case)
    assert (work.conv_flops, work.linear_flops) == (0, 32 * 2 * (128 * 64 + 64 * 10))
    assert work.bytes_moved == 4 * (32 * (128 + 10) + 128 * 64 + 64 + 64 * 10 + 10)
    floor = work.floor(RATES, case.mode)
    assert floor["floor_us"] == pytest.approx(max(work.linear_flops / 10e12, work.bytes_moved / 1e12) * 1e6)
    assert floor["bound_by"] == "arithmetic" and floor["flops"] == work.linear_flops


def test_work_of_convolutions() -> None:
    flops = 2 * (20 * 24 * 24 * 25 + 64 * 20 * 20 * 20 * 25)
    for dtype, rate, size in (("float32", 50e12, 4), ("bfloat16", 100e12, 2)):
        case = gpu_bench.Case("seed1", 1, dtype)
        work = gpu_bench.Work.of(case)
        assert (work.conv_flops, work.linear_flops) == (flops, 0)
        assert work.bytes_moved == size * (28 * 28 + 64 * 20 * 20 + 20 * 26 + 64 * 501)
        assert work.floor(RATES, case.mode)["floor_us"] == pytest.approx(1e6 * flops / rate)


def test_memory_bound() -> None:
    case = gpu_bench.Case("mlp4096", 1, "bfloat16")
    work = gpu_bench.Work.of(case)
    floor = work.floor(RATES, case.mode)
    assert floor["bound_by"] == "memory" and floor["floor_us"] == pytest.approx(work.bytes_moved / 1e12 * 1e6)


def test_cases_are_known_and_once_each() -> None:
    table = gpu_bench.cases()
    assert len(set(table)) == len(table) and {case.network for case in table} <= set(gpu_bench.NETWORKS)
    assert table[0] == gpu_bench.Case("seed2", 1, "float32")
    mlps = {case.network for case in table if case.network.startswith("mlp")}
    assert mlps == {"mlp64", "mlp128", "mlp256", "mlp256_gelu", "mlp512", "mlp1024", "mlp4096"}
    assert {case.batch for case in table if case.network == "mlp64"} == {1, 256, 4096, 65536}
    assert {case.dtype for case in table} == {"float32", "bfloat16"}
    assert set(gpu_bench.NOMINAL) == set(gpu_check.DRY_RUN_DEVICES)


# What counts as wrong ------------------------------------------------------------------------------------------------


def problems(actual: torch.Tensor, exact: torch.Tensor, floor: float = 1e-6) -> str:
    return "; ".join(gpu_compare.compare(actual, exact.float(), exact, floor).problems)


def test_compare() -> None:
    exact = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    right = exact.float()
    assert problems(right, exact) == ""
    assert "error" in problems(right * (1 + 1e-5), exact) and not problems(right * (1 + 1e-5), exact, 1e-3)
    assert "strides" in problems(right.contiguous(memory_format=torch.channels_last), exact)
    assert "dtype" in problems(right.double(), exact)
    assert "shape" in problems(right[:2], exact)
    one_wrong = right.clone()
    one_wrong[3, 2, 4, 4] += 1
    assert "largest error" in problems(one_wrong, exact, 2e-2)
    odd = right.clone()
    odd[0, 0, 0, 0] = float("nan")
    assert "NaN in other places" in problems(odd, exact) and "the first at [0, 0, 0, 0]" in problems(odd, exact)


def test_signs_of_zeros_count_where_asked() -> None:
    zeros = torch.zeros(4)
    found = gpu_compare.compare(-zeros, zeros, zeros.double(), 1e-6, signs=True)
    assert found.problems == ["signs of zeros are not eager's"]


def test_default_flags_allow_no_tf32_in_linear_layers() -> None:
    mode = MODES["default"]
    assert gpu_compare.floor_of(nn.Sequential(nn.Linear(2, 2)), mode) == MODES["f32"].floor
    assert gpu_compare.floor_of(nn.Sequential(nn.Conv2d(2, 2, 1)), mode) == MODES["tf32"].floor
    assert gpu_compare.floor_of(nn.Sequential(nn.Linear(2, 2)), MODES["bf16"]) == MODES["bf16"].floor


def test_sanitizer_findings() -> None:
    clean = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_check.sanitizer_errors(clean) == []
    bad = textwrap.dedent(
        """\
        ========= Invalid __global__ read of size 4 bytes
        =========     at fastseq::cuda::kernel(Args)+0x70
        =========     by thread (0,0,0) in block (0,0,0)
        ========= ERROR SUMMARY: 1 error
        """
    )
    first, last = gpu_check.sanitizer_errors(bad)
    assert first.startswith("Invalid __global__ read") and "fastseq::cuda::kernel" in first and "1 error" in last
    race = "========= Error: Race reported between Write access at 0x1 and Read access at 0x2\n"
    assert "Race reported" in gpu_check.sanitizer_errors(race)[0]


@pytest.mark.parametrize(
    ("architectures", "arch", "does"),
    [
        ("90", "9.0", True),
        ("75 80 90+PTX", "12.0", True),
        ("80", "8.6", True),
        ("100", "9.0", False),
        ("", "9.0", False),
    ],
)
def test_which_architectures_will_do(architectures: str, arch: str, does: bool) -> None:
    assert gpu_check.covers(architectures, arch) is does


# Processes -----------------------------------------------------------------------------------------------------------

CHILD = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
from gpu_jobs import RESTART, Reporter
reporter = Reporter(Path(sys.argv[1]), float(sys.argv[2]))
for task in ("first", "crash", "hang", "restart", "last"):
    if not reporter.wants(task):
        continue
    with reporter.task(task, 1.0):
        reporter.stage(f"part of {{task}}", 1.0)
        if task == "crash":
            os.abort()
        if task == "hang":
            time.sleep(60)
        reporter.row(task=task)
    if task == "restart":
        sys.exit(RESTART)
reporter.done()
"""


@pytest.fixture
def child(tmp_path: Path) -> Callable[[str, float], gpu_jobs.Outcome]:
    def run_child(source: str, seconds: float) -> gpu_jobs.Outcome:
        def command(rows: Path, deadline: float) -> list[str]:
            return [sys.executable, "-c", source, str(rows), str(deadline)]

        deadline = time.time() + seconds
        return gpu_jobs.run_tasks(command, os.environ, tmp_path / "rows", tmp_path / "log", deadline, grace=0.5)

    return run_child


def test_a_task_that_crashes_or_hangs_takes_no_other_along(child: Callable[[str, float], gpu_jobs.Outcome]) -> None:
    outcome = child(CHILD.format(benchmarks=str(BENCHMARKS)), 60)
    assert outcome.is_complete and not outcome.problem
    assert [row["task"] for row in outcome.rows] == ["first", "restart", "last"]
    assert [(row["task"], row["stage"]) for row in outcome.lost] == [
        ("crash", "part of crash"),
        ("hang", "part of hang"),
    ]
    assert "SIGABRT" in outcome.lost[0]["problem"] and "no end after 1 s" in outcome.lost[1]["problem"]


def test_a_child_that_does_not_start_is_not_started_again(child: Callable[[str, float], gpu_jobs.Outcome]) -> None:
    outcome = child("raise SystemExit(7)", 60)
    assert not outcome.is_complete and outcome.rows == [] and "exit code 7" in outcome.problem


def test_the_deadline_ends_it(child: Callable[[str, float], gpu_jobs.Outcome]) -> None:
    start = time.time()
    outcome = child("import time; time.sleep(60)", 1)
    assert time.time() - start < 20 and outcome.problem == "out of time"


# Reports -------------------------------------------------------------------------------------------------------------


def made_up_row(contender: str, us: float, network: str = "seed2", **more: Any) -> dict[str, Any]:
    row = {"network": network, "batch": 1, "dtype": "float32", "contender": contender, "problem": None}
    return {**row, "latency_us": us, "device_us": us, "graph_us": us, "host_us": us, **more}


def made_up_report(**content: Any) -> dict[str, Any]:
    names = ("phases", "failures", "bars", "correctness", "sanitizer", "bench", "bench_lost", "plans", "not_reached")
    report: dict[str, Any] = {name: [] for name in names}
    report |= {"dry_run": False, "command": "python", "machine": {}, "ceilings": {}, "probe": {}, **content}
    report["failures"] = gpu_report.failures(report)
    return report


def test_table() -> None:
    lines = gpu_report.table(["name", "value"], [["a|b", 1.23456], ["c", None], ["d", 12345678], ["e", 1234.5]])
    assert lines == [
        "| name | value |",
        "|---|---:|",
        "| a\\|b | 1.23 |",
        "| c |  |",
        "| d | 1.23e+07 |",
        "| e | 1234 |",
    ]


def test_bars_compare_with_the_best_peer_that_was_timed() -> None:
    rows = [
        made_up_row("eager", 30.0),
        made_up_row("graph_aten", 10.0),
        made_up_row("compile_max", 5.0) | {"latency_us": None, "device_us": None},
        made_up_row("fastseq", 8.0, nodes=1),
        made_up_row("fastseq_graph", 4.0),
    ]
    end_to_end, launch = gpu_report.bars(rows)
    assert (end_to_end["ratio"], end_to_end["best_peer"], end_to_end["ours"]) == (2.5, "graph_aten", "fastseq_graph")
    assert end_to_end["met"] and end_to_end["ratio_of_plain_call"] == 1.25
    assert end_to_end["peers_timed"] == ["eager", "graph_aten"]
    assert not launch["met"] and launch["launches"] == 1
    text = gpu_report.summary(made_up_report(bench=rows, bars=[end_to_end, launch]), ["a.json"])
    assert "met    seed2, batch 1, float32" in text and "MISSED" in text and "compile_max not timed" in text
    assert gpu_report.to_markdown(made_up_report(bench=rows, bars=[end_to_end, launch])).count("graph_aten") > 2


def test_large_networks_may_not_be_slower() -> None:
    rows = [made_up_row("eager", 10.0, "vgg16"), made_up_row("fastseq", 11.0, "vgg16")]
    assert [row["met"] for row in gpu_report.bars(rows)] == [False, False]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ({}, 0),
        ({"phases": [{"name": "build", "status": "could not run"}]}, 2),
        ({"correctness": [{"task": "t", "problems": ["wrong"]}], "phases": [{"status": "could not run"}]}, 1),
        ({"sanitizer": [{"tool": "memcheck", "task": "t", "problems": ["Invalid read"]}]}, 1),
        ({"bench": [made_up_row("fastseq", 1.0) | {"problem": "wrong: error"}]}, 1),
        ({"bench": [made_up_row("eager", 1.0) | {"problem": "failed: error"}]}, 0),
        ({"bench": [made_up_row("fastseq", 1.0) | {"problem": "not run: no kernels"}]}, 0),
        ({"bench_lost": [{"task": "t", "stage": "fastseq", "problem": "SIGSEGV"}]}, 1),
        ({"bench_lost": [{"task": "t", "stage": "compile_max", "problem": "no end"}]}, 0),
    ],
)
def test_exit_codes(content: dict[str, Any], code: int) -> None:
    assert gpu_report.exit_code(made_up_report(**content)) == code


def test_json_is_strict() -> None:
    assert gpu_check.finite({"a": [float("nan"), 1.5, (float("inf"),)]}) == {"a": ["nan", 1.5, ["inf"]]}


def test_a_compilation_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(gpu_peers.TooLong), gpu_peers.time_limit(0.05):
        time.sleep(5)


def test_fused_operators_give_the_same_result() -> None:
    """The peer that is built of ATen's fused operators; on a CPU its convolutions fall back."""
    for name, network in gpu_bench.NETWORKS.items():
        if name in ("seed1", "seed2", "seed3", "lenet5"):
            model, x = network.build(), network.example(3)
            with torch.no_grad():
                torch.testing.assert_close(gpu_peers.with_fused_operators(model)(x), model(x))
