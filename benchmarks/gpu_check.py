"""The one script for a GPU machine: builds, checks every kernel, measures, and is done within eight minutes.

    python benchmarks/gpu_check.py --out DIR       on a machine with a CUDA GPU
    python benchmarks/gpu_check.py --dry-run       anywhere: plans, floors, and the checks on the emulated grid

README.md beside this file says what the phases are and how to read what they write. Exit code: 1 if anything was
incorrect, 2 if a phase could not run.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind PYTHONPATH, which may name the emulated package

from gpu_bench import (  # noqa: E402
    NOMINAL,
    Case,
    Work,
    cases,
    engine_description,
    plan_rows,
    run_bench,
)
from gpu_cases import run_correctness  # noqa: E402
from gpu_cudnn import probe_pool_fusion  # noqa: E402
from gpu_device import Device, Gpu, StandIn, measure_ceilings  # noqa: E402
from gpu_jobs import Outcome, Process, Reporter, python, read_events, run_tasks, text_of  # noqa: E402
from gpu_kernels import run_sanitized  # noqa: E402
from gpu_report import Report, bars, exit_code, failures, summary, to_markdown  # noqa: E402

# Seconds each phase may take; bench takes what is left.
BUDGETS = {"build": 180.0, "correctness": 110.0, "sanitizer": 110.0, "ceilings": 30.0, "probe": 20.0, "bench": 400.0}
PHASES = tuple(BUDGETS)  # in the order of execution; the sanitizer runs beside the correctness checks
LIMIT_SECONDS = 465.0
LAST_SECONDS = 6.0  # for the files
DRY_RUN_DEVICES = ["H200", "A100", "RTX 4090"]
SANITIZERS = ("memcheck", "racecheck")
SECONDS_PER_CASE, COMPILE_SECONDS, COMPILE_SHARE = 1.5, 30.0, 0.5


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.child:
        return run_child(arguments)
    return Session(arguments).run()


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go (benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="few kernels, few cases")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: plans, floors, and checks on the emulated grid")
    parser.add_argument("--only", metavar="PHASE,...", help=f"of {', '.join(PHASES)}")
    parser.add_argument(
        "--limit", type=float, metavar="S", help="seconds for everything (465; ten times that for a dry run)"
    )
    parser.add_argument("--budget", action="append", default=[], metavar="PHASE=S", help="seconds for one phase")
    parser.add_argument("--sanitized-cases", action="store_true", help="only what compute-sanitizer is to watch")
    # For the script itself, and for its tests.
    for name in ("--child", "--perturb", "--tasks"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--rows", "--package"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)
    parser.add_argument("--stand-in", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.phases = arguments.only.split(",") if arguments.only else list(PHASES)
    unknown = set(arguments.phases) - set(PHASES)
    if unknown:
        parser.error(f"--only: no such phase: {', '.join(sorted(unknown))}; there are {', '.join(PHASES)}")
    patience = StandIn.patience if arguments.dry_run else Gpu.patience
    arguments.limit = LIMIT_SECONDS * patience if arguments.limit is None else arguments.limit
    arguments.budgets = {name: seconds * patience for name, seconds in BUDGETS.items()}
    for text in arguments.budget:
        name, _, seconds = text.partition("=")
        if name not in PHASES or not re.fullmatch(r"\d+(\.\d+)?", seconds):
            parser.error(f"--budget: {text!r} is not PHASE=SECONDS with a phase of {', '.join(PHASES)}")
        arguments.budgets[name] = float(seconds)
    if arguments.limit <= LAST_SECONDS:
        parser.error(f"--limit: {arguments.limit:g} s are not enough")
    if arguments.sanitized_cases:
        arguments.child = "sanitized"
    return arguments


# The children --------------------------------------------------------------------------------------------------------


def run_child(arguments: argparse.Namespace) -> int:
    """One phase, in a process of its own."""
    if arguments.rows is None:  # --sanitized-cases by hand
        arguments.rows = Path(tempfile.mkdtemp()) / "rows"
    reporter = Reporter(arguments.rows, arguments.deadline)
    name, is_small = arguments.child, arguments.quick
    if name == "machine":
        reporter.row(**describe_gpu())
        reporter.done()
        return 0
    if name == "engine":
        reporter.row(**engine_description())
        reporter.done()
        return 0
    if name == "plans":
        for row in plan_rows(cases(is_small), DRY_RUN_DEVICES):
            reporter.row(**row)
        reporter.done()
        return 0
    if name == "probe":
        reporter.row(**probe_pool_fusion())
        reporter.done()
        return 0
    device: Device = StandIn() if arguments.stand_in else Gpu()
    if name == "correctness":
        return run_correctness(reporter, device, is_small, arguments.perturb, arguments.tasks or "")
    if name == "sanitized":
        code = run_sanitized(reporter, device, is_small)
        for event in read_events(arguments.rows):
            if event["event"] == "row" and event["row"]["problems"]:
                print(f"WRONG {event['row']['task']}: {'; '.join(event['row']['problems'])}")
        return code
    if name == "ceilings":
        assert isinstance(device, Gpu)
        for ceiling, value in measure_ceilings(device):
            reporter.row(ceiling=ceiling, value=value)
        reporter.done()
        return 0
    assert name == "bench", name
    seconds, chosen = SECONDS_PER_CASE, cases(is_small)
    if arguments.stand_in:
        seconds, chosen = 0.0, [Case("seed2", 1, "float32"), Case("lenet5", 1, "bfloat16")]
    budget = max(0.0, COMPILE_SHARE * reporter.seconds_left()) if not arguments.stand_in else 0.0
    return run_bench(reporter, device, chosen, seconds, COMPILE_SECONDS, budget, arguments.perturb)


def describe_gpu() -> dict[str, Any]:
    """What a row needs to be understood later; "error" where there is no GPU."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "torch CUDA": torch.version.cuda}
    try:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        torch.ones(1, device="cuda").add_(1).item()
    except Exception as error:
        return {**found, "error": text_of(error)}
    found.update(
        gpu=properties.name,
        arch=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_gib=round(properties.total_memory / 2**30, 1),
        l2_mib=getattr(properties, "L2_cache_size", 0) >> 20,
        gpus=torch.cuda.device_count(),
        cudnn=torch.backends.cudnn.version(),
    )
    return found


# The parent ----------------------------------------------------------------------------------------------------------


@dataclass
class Phase:
    name: str
    status: str = "ok"
    note: str = ""
    seconds: float = 0.0

    def could_not_run(self, note: str) -> None:
        self.status, self.note = "could not run", note


@dataclass
class Session:
    """One run of the script: its phases in order, its files at the end whatever happens."""

    arguments: argparse.Namespace
    started: float = field(default_factory=time.time)
    phases: list[Phase] = field(default_factory=list)
    running: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        arguments = self.arguments
        self.is_dry: bool = arguments.dry_run
        self.deadline = self.started + arguments.limit - LAST_SECONDS
        self.scratch = Path(tempfile.mkdtemp(prefix="gpu_check_"))
        self.package: Path | None = ROOT
        self.arch = ""
        now = datetime.datetime.now(datetime.timezone.utc)
        self.report: Report = {
            "dry_run": self.is_dry,
            "command": command_line(),
            "machine": {"date": now.isoformat(timespec="seconds"), "commit": commit(), **describe_host()},
            **{name: [] for name in ("phases", "failures", "bars", "correctness", "sanitizer", "bench", "bench_lost")},
            **{name: [] for name in ("plans", "not_reached")},
            **{name: {} for name in ("ceilings", "probe")},
        }
        default = ROOT / ("build/gpu_check" if self.is_dry else "benchmarks/results")
        self.out: Path = arguments.out or default
        self.stem = f"gpu-{'dry-run' if self.is_dry else 'none'}-{now:%Y-%m-%d-%H%M}"

    def run(self) -> int:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            self.run_phases()
        finally:
            for process in self.running:
                process.kill()
            code = self.finish()
        return code

    def run_phases(self) -> None:
        if self.is_dry:
            self.find_emulated_package()
        else:
            self.look_at_gpu()
        wanted = self.arguments.phases
        if "build" in wanted:
            self.phase("build", self.build)
        watchers = self.start_sanitizers() if "sanitizer" in wanted else []
        if "correctness" in wanted:
            self.phase("correctness", self.correctness)
        if "sanitizer" in wanted:
            self.phase("sanitizer", lambda phase, end: self.sanitizer(phase, end, watchers))
        for name in ("ceilings", "probe", "bench"):
            if name in wanted:
                self.phase(name, getattr(self, name))

    def phase(self, name: str, work: Callable[[Phase, float], None]) -> None:
        """One phase, which ends by itself at its own deadline; what it raises is noted, and the next one begins."""
        phase = Phase(name)
        self.phases.append(phase)
        start = time.time()
        end = min(start + self.arguments.budgets[name], self.deadline)
        say(f"{name} (up to {max(0, end - start):.0f} s)")
        try:
            if end - start < 2:
                phase.could_not_run("out of time")
            elif self.package is None and name in ("correctness", "sanitizer"):
                phase.could_not_run("no fastseq to check")
            else:
                work(phase, end)
        except Exception as error:
            phase.could_not_run(text_of(error))
        phase.seconds = time.time() - start
        say(f"{name}: {phase.status}{', ' if phase.note else ''}{phase.note} ({phase.seconds:.1f} s)")
        self.save()

    # What there is ---------------------------------------------------------------------------------------------------

    def environment(self, **more: str) -> dict[str, str]:
        """For a child: no FASTSEQ_* but the given ones, and the fastseq that is checked."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTSEQ_")}
        return {**kept, "PYTHONPATH": str(self.package or ROOT), "PYTHONUNBUFFERED": "1", **more}

    def log(self, name: str) -> Path:
        return self.scratch / f"{name}.log"

    def child(self, name: str, end: float, **environment: str) -> Outcome:
        """The phase of that name in processes of its own."""
        flags = ["--quick"] * self.arguments.quick + ["--stand-in"] * self.is_dry
        for option in ("perturb", "tasks"):
            value = getattr(self.arguments, option)
            flags += [] if value is None else [f"--{option}", value]

        def command(rows: Path, deadline: float) -> list[str]:
            return python(Path(__file__), "--child", name, "--rows", str(rows), "--deadline", str(deadline), *flags)

        rows = self.scratch / f"{name}.rows"
        return run_tasks(command, self.environment(**environment), rows, self.log(name), end)

    def look_at_gpu(self) -> None:
        say("looking for a GPU")
        outcome = self.child("machine", min(time.time() + 120, self.deadline))
        found = outcome.rows[0] if outcome.rows else {"error": outcome.problem}
        self.report["machine"].update(found)
        self.report["machine"].update(query_driver())
        if "error" in found:
            say(f"no usable GPU: {found['error']}; --dry-run needs none")
            self.package = None
            return
        self.arch = found["arch"]
        slug = re.sub(r"[^a-z0-9]+", "-", found["gpu"].lower().replace("nvidia", "")).strip("-")
        self.stem = self.stem.replace("gpu-none", f"gpu-{slug}")
        say(f"{found['gpu']}, sm_{self.arch.replace('.', '')}, torch {found['torch']}")

    def find_emulated_package(self) -> None:
        """The package of tests/emulation, whose CPU tensors take the way of CUDA ones; compiled if anything changed."""
        self.report["machine"]["stand-in"] = StandIn.name
        if self.arguments.package is not None:
            self.package = self.arguments.package
            return
        say("building the emulated package (minutes from nothing, seconds otherwise)")
        start = time.time()
        path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
        result = subprocess.run(
            [sys.executable, "-m", "emulation.extension"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        self.deadline += time.time() - start  # compiling is no part of the run that this is a rehearsal of
        lines = result.stdout.strip().splitlines()
        self.package = Path(lines[-1]) if result.returncode == 0 and lines else None
        if self.package is None:
            say(f"no emulated package: {(result.stderr or result.stdout).strip()[-1500:]}")

    # build -----------------------------------------------------------------------------------------------------------

    def build(self, phase: Phase, end: float) -> None:
        if self.is_dry:
            phase.note = "dry run: nothing built" if self.package else ""
            if self.package is None:
                phase.could_not_run("the emulated package does not build")
            self.print_fastseq()
            return
        if not self.arch:
            return phase.could_not_run("no GPU")
        reason = self.why_build()
        if reason:
            architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or self.arch
            environment = self.environment(FASTSEQ_CUDA="1", TORCH_CUDA_ARCH_LIST=architectures)
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            process = Process(command, environment, self.log("build"), cwd=ROOT)
            self.running.append(process)
            start = time.time()
            code = process.wait(end)
            phase.note = f"{reason}: built for {architectures} in {time.time() - start:.0f} s"
            if code != 0:
                print(process.tail(4000))
                phase.could_not_run("the build took too long" if code is None else f"setup.py: exit code {code}")
            reason = self.why_build()
            if reason and phase.status == "ok":
                phase.could_not_run(f"built, but {reason}")
        else:
            phase.note = "up to date"
        self.print_fastseq()

    def why_build(self) -> str:
        """Why the extension in the tree will not do; "" if it will."""
        extension = ROOT / f"fastseq/_C{EXTENSION_SUFFIXES[0]}"
        if not extension.is_file():
            return "there is no extension for this Python"
        sources = [ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*") if p.suffix in SOURCE_SUFFIXES)]
        newest = max(sources, key=lambda path: path.stat().st_mtime)
        if newest.stat().st_mtime > extension.stat().st_mtime:
            return f"the extension is older than {newest.relative_to(ROOT)}"
        with contextlib.suppress(FileNotFoundError):
            (self.scratch / "engine.rows").unlink()
        outcome = self.child("engine", time.time() + 60)
        found = outcome.rows[0] if outcome.rows else {"native_error": outcome.problem}
        self.report["machine"]["architectures"] = found.get("architectures")
        if found["native_error"]:
            return f"the extension does not load: {found['native_error']}"
        if not found["kernels"]:
            return "the extension has no CUDA kernels"
        if self.arch and not covers(found["architectures"], self.arch):
            return f"the extension is for {found['architectures']}, not {self.arch}"
        return ""

    def print_fastseq(self) -> None:
        """What `python -m fastseq` says."""
        command = [sys.executable, "-m", "fastseq"]
        result = subprocess.run(
            command, cwd=self.scratch, env=self.environment(), capture_output=True, text=True, timeout=60
        )
        print((result.stdout + result.stderr).strip()[:3000], flush=True)

    # correctness, sanitizer ------------------------------------------------------------------------------------------

    def correctness(self, phase: Phase, end: float) -> None:
        outcome = self.child("correctness", end)
        rows = outcome.rows
        rows += [{"task": row["task"], "problems": [row["problem"]], "checks": 0} for row in outcome.lost]
        self.report["correctness"] = rows
        left = [row for row in rows if row.get("not_run")]
        phase.note = f"{sum(row['checks'] for row in rows)} checks"
        if not outcome.is_complete or left:
            why = outcome.problem or left[0]["not_run"]
            phase.could_not_run(f"{phase.note}, not all of them: {why}")
            if not rows:
                print(self.tail("correctness"))
        if any(row["problems"] for row in rows):
            phase.status = "incorrect" if phase.status == "ok" else phase.status
            phase.note = f"{sum(bool(row['problems']) for row in rows)} tasks incorrect; {phase.note}"

    def start_sanitizers(self) -> list[Sanitizer]:
        """Started before the correctness checks, which they run beside: neither is timed."""
        if self.package is None:
            return []
        end = min(time.time() + self.arguments.budgets["sanitizer"], self.deadline)
        tool = None if self.is_dry else find_sanitizer()
        if tool is None and not self.is_dry:
            return []
        watchers = [Sanitizer(self, name, tool, end) for name in (SANITIZERS if tool else ("no tool",))]
        for watcher in watchers:
            watcher.start(filters=True)
        return watchers

    def sanitizer(self, phase: Phase, end: float, watchers: list[Sanitizer]) -> None:
        if not watchers:
            return phase.could_not_run("compute-sanitizer not found in PATH, CUDA_HOME/bin, /usr/local/cuda/bin")
        notes = []
        for watcher in watchers:
            rows, note, is_complete = watcher.finish(end)
            self.report["sanitizer"] += rows
            notes.append(f"{watcher.name}: {note}")
            if not is_complete:
                phase.status = "could not run"
        phase.note = "; ".join(notes)
        if self.is_dry:
            phase.note += " (dry run: the cases alone)"

    # ceilings, bench, probe ------------------------------------------------------------------------------------------

    def ceilings(self, phase: Phase, end: float) -> None:
        if self.is_dry:
            phase.note = "dry run: not measured, floors are from data sheets"
            return
        outcome = self.child("ceilings", end)
        self.report["ceilings"] = {row["ceiling"]: row["value"] for row in outcome.rows}
        if not outcome.is_complete:
            phase.could_not_run(outcome.problem or "incomplete")
            print(self.tail("ceilings"))

    def bench(self, phase: Phase, end: float) -> None:
        if self.is_dry:
            plans = self.child("plans", end)
            self.report["plans"] = plans.rows
            if not plans.is_complete:
                phase.could_not_run(f"no plans: {plans.problem} {self.tail('plans')}")
            if self.package is None:
                return
        elif not self.arch:
            return phase.could_not_run("no GPU")
        cache = str(self.scratch / "inductor")
        outcome = self.child("bench", end, TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=f"{cache}-triton")
        rows = outcome.rows
        rates, source = self.rates()
        self.report["machine"]["floors from"] = source
        for row in rows:
            if self.is_dry:
                for key in [key for key in row if key.endswith("_us")]:
                    del row[key]  # times of a CPU: nothing
            elif rates:
                add_floor(row, rates)
        self.report["bench"], self.report["bench_lost"] = rows, outcome.lost
        self.report["bars"] = bars(rows)
        timed = {Case(row["network"], row["batch"], row["dtype"]) for row in rows}
        if not self.is_dry:
            self.report["not_reached"] = [c.name for c in cases(self.arguments.quick) if c not in timed]
        phase.note += f"{len(timed)} cases, {len(self.report['not_reached'])} not reached"
        if outcome.lost:
            phase.note += f"; lost: {', '.join(row['task'] + ' ' + row['problem'] for row in outcome.lost)}"
        if not timed:
            phase.could_not_run(f"no case: {outcome.problem}")
            print(self.tail("bench"))

    def rates(self) -> tuple[dict[str, float] | None, str]:
        """Measured where the ceilings were, else the data sheet's of this GPU."""
        if self.is_dry:
            return None, "data sheets (of plans)"
        needed = {"copy_gbytes_per_s", "bf16_tflops", "tf32_tflops", "f32_tflops"}
        if needed <= set(self.report["ceilings"]):
            return self.report["ceilings"], "measured ceilings"
        gpu = self.report["machine"].get("gpu", "")
        name = next((name for name in NOMINAL if name in gpu), None)
        return (NOMINAL[name], f"data sheet, {name}") if name else (None, "nothing")

    def probe(self, phase: Phase, end: float) -> None:
        outcome = self.child("probe", end)
        self.report["probe"] = outcome.rows[0] if outcome.rows else {"answer": f"no answer: {outcome.problem}"}
        phase.note = str(self.report["probe"].get("answer"))

    # Files -----------------------------------------------------------------------------------------------------------

    def tail(self, name: str) -> str:
        with contextlib.suppress(OSError):
            return self.log(name).read_text(errors="replace")[-2500:]
        return ""

    def save(self) -> list[str]:
        report = self.report
        report["phases"] = [vars(phase) for phase in self.phases]
        report["failures"] = failures(report)
        self.out.mkdir(parents=True, exist_ok=True)
        files = [self.out / f"{self.stem}.{suffix}" for suffix in ("json", "md", "log")]
        files[0].write_text(json.dumps(finite(report), indent=1, default=str) + "\n")
        files[1].write_text(to_markdown(report))
        with open(files[2], "w", errors="replace") as log:
            for path in sorted(self.scratch.glob("*.log")):
                log.write(f"\n##### {path.stem}\n{path.read_text(errors='replace')[-400_000:]}")
        return [str(file) for file in files]

    def finish(self) -> int:
        self.report["machine"]["seconds"] = round(time.time() - self.started, 1)
        if not self.is_dry:
            self.report["machine"].update({f"{key} at the end": value for key, value in query_driver().items()})
        if not self.phases or not (self.is_dry or self.arch):
            self.phases.append(Phase("machine", "could not run", "no usable GPU"))
        files = self.save()
        print(summary(self.report, files), flush=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        return exit_code(self.report)


def finite(value: Any) -> Any:
    """For JSON, which knows neither infinity nor NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


SOURCE_SUFFIXES = {".cpp", ".h", ".cu", ".cuh", ".py"}


def add_floor(row: dict[str, Any], rates: dict[str, float]) -> None:
    """The least time the case can take, and how many times that it took."""
    with contextlib.suppress(KeyError):
        case = Case(row["network"], row["batch"], row["dtype"])
        row.update(floor_of(case, tuple(sorted(rates.items()))))
        if row.get("device_us"):
            row["of_floor"] = row["device_us"] / row["floor_us"]
            row["tflops"] = row["flops"] / row["device_us"] / 1e6


def floor_of(case: Case, rates: tuple[tuple[str, float], ...], known: dict[Any, Any] = {}) -> dict[str, Any]:  # noqa: B006
    if (case, rates) not in known:
        known[case, rates] = Work.of(case).floor(dict(rates), case.mode)
    return known[case, rates]


# compute-sanitizer ---------------------------------------------------------------------------------------------------


class Sanitizer:
    """One tool over the sanitized cases, started early and read late."""

    def __init__(self, session: Session, name: str, tool: str | None, end: float) -> None:
        self.session, self.name, self.tool, self.end = session, name, tool, end
        self.rows_file = session.scratch / f"sanitizer-{name}.rows"

    def start(self, filters: bool) -> None:
        session = self.session
        flags = ["--quick"] * session.arguments.quick + ["--stand-in"] * session.is_dry
        rows, deadline = ["--rows", str(self.rows_file)], ["--deadline", str(self.end - 8)]
        command = python(Path(__file__), "--sanitized-cases", *rows, *deadline, *flags)
        environment = session.environment()
        if self.tool:
            only_ours = ["--kernel-regex", "kns=fastseq"] if filters else []
            command = [self.tool, "--tool", self.name, "--print-limit", "40", *only_ours, *command]
            if self.name == "memcheck":
                environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        self.filters = filters
        self.process = Process(command, environment, session.log(f"sanitizer-{self.name}"))
        session.running.append(self.process)

    def finish(self, end: float) -> tuple[list[dict[str, Any]], str, bool]:
        """Rows, a note, and whether all cases were watched."""
        code = self.process.wait(min(end, max(self.end, time.time() + 1)))
        events = read_events(self.rows_file)
        text = self.process.log.read_text(errors="replace")
        if self.tool and self.filters and not events and code not in (0, None) and time.time() < end - 20:
            self.start(filters=False)  # perhaps it does not know the filter
            self.end = end
            code = self.process.wait(end)
            events, text = read_events(self.rows_file), self.process.log.read_text(errors="replace")
        rows = [{"tool": self.name, **event["row"]} for event in events if event["event"] == "row"]
        errors = sanitizer_errors(text)
        if errors:
            rows.insert(0, {"tool": self.name, "task": "report", "checks": 0, "problems": errors})
        left = [row for row in rows if row.get("not_run")]
        is_complete = any(event["event"] == "done" for event in events) and not left
        note = f"{sum(row['checks'] > 0 for row in rows)} kernels"
        if not is_complete:
            at = [event["task"] for event in events if event["event"] == "begin"]
            refusal = re.search(r".*(?:not supported|Internal Sanitizer Error|Unable to).*", text)
            why = "out of time" if code is None or left else f"ended with exit code {code}"
            note += f", then {refusal[0].strip() if refusal else why}" + (f" at {at[-1]}" if at else "")
        if self.tool and is_complete and "SUMMARY" not in text:
            is_complete, note = False, note + ", but the tool printed no summary"
        return rows, note + (f", {len(errors)} findings" if errors else ""), is_complete


def sanitizer_errors(text: str) -> list[str]:
    """What the tool found: the first lines of its findings, and its sums where they are not zero."""
    kinds = "Invalid|Misaligned|Out-of-bounds|Error: |Warning: Race|Race reported|Program hit"
    heads = rf"=+ (?:{kinds})[^\n]*(?:\n=+ +at [^\n]*)?"
    found = [" ".join(line.replace("=", "").split()) for line in re.findall(heads, text)]
    # What torch probes and handles is an error of the API to the tool, and none of ours.
    found = [line for line in dict.fromkeys(found) if not line.startswith("Program hit")]
    sums = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): ([^\n]*)", text)
    return found[:10] + [f"summary: {line.strip()}" for line in sums if found and not re.match(r"0 ", line)]


def find_sanitizer() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)] + ["/usr/local/cuda"]
    folders = [f"{home}/{folder}" for home in homes for folder in ("bin", "compute-sanitizer")]
    places = [os.environ.get("PATH", ""), *folders]
    return next((found for place in places if (found := shutil.which("compute-sanitizer", path=place))), None)


# The machine ---------------------------------------------------------------------------------------------------------


def covers(architectures: str | None, arch: str) -> bool:
    """Whether machine code for `arch` ("9.0") is among "75 80 90+PTX", or PTX that the driver can compile for it."""
    wanted = int(arch.replace(".", ""))
    for name in (architectures or "").split():
        found = re.match(r"(\d+)[af]?(\+PTX)?$", name)
        if found and (int(found[1]) == wanted or (found[2] and int(found[1]) <= wanted)):
            return True
        # Machine code runs on later minors of its major.
        if found and not found[2] and int(found[1]) // 10 == wanted // 10 and int(found[1]) <= wanted:
            return True
    return False


def query_driver() -> dict[str, str]:
    """Driver, clocks and power, as nvidia-smi reads them; it changes nothing."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu,pstate"
    try:
        result = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
        values = result.stdout.strip().splitlines()[0].split(", ")
        return dict(zip(fields.split(","), values, strict=True)) if result.returncode == 0 else {}
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return {}


def describe_host() -> dict[str, Any]:
    cpu = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    versions = {}
    for package in ("triton", "nvidia-cudnn-cu13", "nvidia-cublas"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu or platform.machine(), "cores": cores, "python": platform.python_version(), **versions}


def commit() -> str:
    git = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def command_line() -> str:
    names = ("FASTSEQ_", "CUDA_VISIBLE", "TORCH_", "NVIDIA_TF32")
    variables = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(names)]
    return shlex.join([*variables, "python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def say(text: str) -> None:
    print(f"gpu_check: {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
