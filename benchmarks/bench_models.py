"""Whole networks on fastseq and its peers: checks every answer against float64, then times all engines interleaved.

    python benchmarks/bench_models.py --threads 1 --cases seed1 seed2 --json rows.json --markdown table.md

README.md beside this file says how to install the peers and how to read the rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peers import PEERS
from workers import Measurement, Worker, WorkerError, measure

from fastseq.testing import MODELS, Reference

CASES = [name for name in MODELS if name != "seed1_named"]  # which differs from seed1 in names only
QUICK = {"cases": ["seed1", "seed2", "seed3", "lenet5", "mlp"], "rounds": 7, "min_time": 0.005}
QUIET_SHARE = 0.97  # of a core, in the median block of an engine with one thread

Row = dict[str, Any]


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    report: dict[str, Any] = {"machine": describe_machine(), "ceilings": [], "skipped": {}, "rows": []}
    backends = []
    for name in arguments.backends:
        reason = PEERS[name].missing()
        if reason:
            report["skipped"][name] = reason
            progress(f"skipping {name}: {reason}", last=True)
        else:
            backends.append(name)

    todo = [(case, batch) for case in arguments.cases for batch in arguments.batches or MODELS[case].batches]
    references: dict[tuple[str, int], Reference] = {}
    for threads in arguments.threads:
        cores = choose_cores(threads, arguments.pin)
        workers = {name: Worker(name, threads, cores) for name in backends}
        ceiling = {"threads": threads, "cores": sorted(cores), **measure_ceiling(threads, cores)}
        report["ceilings"].append(ceiling)
        for number, (case, batch) in enumerate(todo, 1):
            progress(f"[{count(threads, 'thread')}, {number}/{len(todo)}] {case}, batch {batch}")
            if (case, batch) not in references:
                references[case, batch] = Reference.of(MODELS[case].build(), MODELS[case].example(batch))
            reference = references[case, batch]
            results = measure(
                workers, case, batch, reference.exact, arguments.rounds, arguments.min_time, arguments.budget
            )
            common = {
                "case": case,
                "batch": batch,
                "threads": threads,
                "cores": sorted(cores),
                "eager_err_rel_max": reference.errors(reference.eager)["rel_max"],
            }
            for name, result in results.items():
                report["rows"].append({**common, **describe_result(workers[name], result, common), **report["machine"]})
            if (case, batch) == todo[-1] or todo[number][0] != case:
                for worker in workers.values():
                    release(worker)
            save(report, arguments.json, arguments.markdown)
        for worker in workers.values():
            worker.close()
    progress("", last=True)
    print(to_markdown(report))


def parse_arguments() -> argparse.Namespace:
    all_threads = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(MODELS), metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", help="instead of each case's own")
    parser.add_argument("--backends", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="NAME")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, all_threads}), metavar="N")
    parser.add_argument("--rounds", type=int, help="blocks per engine and case (25)")
    parser.add_argument("--min-time", type=float, help="seconds of calls per block (0.01)")
    parser.add_argument("--budget", type=float, default=120, help="seconds after which a case ends early (120)")
    parser.add_argument("--no-pin", dest="pin", action="store_false", help="let the scheduler place the workers")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--quick", action="store_true", help="small networks and few rounds")
    arguments = parser.parse_args()
    defaults = QUICK if arguments.quick else {"cases": CASES, "rounds": 25, "min_time": 0.01}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def choose_cores(threads: int, pin: bool) -> set[int]:
    """The same `threads` cores for every engine; the last ones, since interrupts tend to go to the first."""
    available = sorted(os.sched_getaffinity(0))
    return set(available[-threads:] if pin else available)


def measure_ceiling(threads: int, cores: set[int]) -> dict[str, float]:
    worker = Worker("eager", threads, cores)
    try:
        return worker.ask("ceiling")
    finally:
        worker.close()


def release(worker: Worker) -> None:
    try:
        worker.ask("release")
    except WorkerError:
        worker.close()


def describe_result(worker: Worker, result: Measurement, common: Row) -> Row:
    """The engine's part of a row; without samples, the numbers are None and `problem` says why."""
    row: Row = {
        "backend": worker.peer_name,
        "backend_version": backend_version(worker),
        "median_us": None,
        "p20_us": None,
        "p80_us": None,
        "gflops": None,
        "cores_used": None,
        "err_rel_max": result.error,
        "first_result_s": result.first_result_s,
        "blocks": len(result.samples),
        "problem": result.problem,
    }
    if result.samples and result.problem is None:
        p20, median, p80 = percentiles(result.samples)
        flops = MODELS[common["case"]].flops_per_image * common["batch"]
        row.update(median_us=median * 1e6, p20_us=p20 * 1e6, p80_us=p80 * 1e6, gflops=flops / median / 1e9)
        row["cores_used"] = statistics.median(result.cores_used)
    return row


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return p20, statistics.median(samples), p80


def backend_version(worker: Worker) -> str:
    try:
        return worker.ask("version")
    except WorkerError as error:
        return f"unknown: {error}"


def describe_machine() -> Row:
    return {
        "cpu": cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch_version": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def command() -> str:
    """The command line, with the variables that change how fastseq or OpenMP run."""
    variables = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(("FASTSEQ_", "OMP_"))]
    return shlex.join([*variables, "python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def commit() -> str:
    """The short hash of the source tree, with "-dirty" when it has changes that are not in it."""
    git = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def progress(text: str, last: bool = False) -> None:
    """One line on stderr that overwrites itself on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\n" if last and text else "", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def save(report: dict[str, Any], json_path: Path | None, markdown_path: Path | None) -> None:
    """Called after each case, so that a run that is interrupted leaves what it has measured."""
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    if markdown_path:
        markdown_path.parent.mkdir(parents=True, exist_ok=True)
        markdown_path.write_text(to_markdown(report) + "\n")


def to_markdown(report: dict[str, Any]) -> str:
    """The machine, a table of medians for each thread count, the errors, and what was skipped or failed."""
    machine, rows = report["machine"], report["rows"]
    lines = [
        f"`{machine['command']}`",
        "",
        f"{machine['cpu']}, {machine['isa']}, torch {machine['torch_version']}, commit {machine['commit']}, "
        f"{machine['date']}. Median time of one call in microseconds; best of each line in bold.",
    ]
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    for ceiling in report["ceilings"]:
        threads = ceiling["threads"]
        cores = ", ".join(map(str, ceiling["cores"]))
        lines += [
            "",
            f"## {count(threads, 'thread')} (cores {cores})",
            "",
            describe_ceiling(ceiling),
            "",
            *timing_table([row for row in rows if row["threads"] == threads], backends),
        ]
        shares = [row["cores_used"] for row in rows if row["threads"] == threads == 1 and row["cores_used"]]
        if shares and min(shares) < QUIET_SHARE:
            lines += ["", f"**The machine was busy:** one engine had only {min(shares):.0%} of its core."]
    lines += [
        "",
        "## Largest error against float64, relative to the output's scale",
        "",
        *worst_table(rows, backends, "err_rel_max", ".1e"),
        "",
        "## Seconds from the plain model to the first result",
        "",
        *worst_table(rows, backends, "first_result_s", ".3f"),
    ]
    problems = [f"- {name}: skipped, {reason}" for name, reason in report["skipped"].items()]
    problems += [
        f"- {row['backend']}, {row['case']} batch {row['batch']}, {count(row['threads'], 'thread')}: {row['problem']}"
        for row in rows
        if row["problem"]
    ]
    if problems:
        lines += ["", "## Not timed", "", *problems]
    return "\n".join(lines)


def describe_ceiling(ceiling: dict[str, Any]) -> str:
    parts = [
        f"{ceiling['sgemm_gflops']} GFLOP/s in a large sgemm",
        f"{ceiling['copy_gbytes_per_s']} GB/s in a memory copy, read and written",
    ]
    if "fma_gflops_per_core" in ceiling:
        parts.insert(0, f"{ceiling['fma_gflops_per_core']} GFLOP/s per core in multiply-adds alone")
    return f"Machine: {', '.join(parts)}."


def timing_table(rows: list[Row], backends: list[str]) -> list[str]:
    has_fastseq = "fastseq" in backends
    head = ["case", "batch", *backends]
    if has_fastseq:
        head += ["fastseq GFLOP/s", "vs eager", "vs best peer"]
    lines = table_head(head, text_columns=1)
    for case, batch in dict.fromkeys((row["case"], row["batch"]) for row in rows):
        by_name = {row["backend"]: row for row in rows if (row["case"], row["batch"]) == (case, batch)}
        medians = {name: row["median_us"] for name, row in by_name.items() if row["median_us"] is not None}
        best = min(medians.values(), default=None)
        cells = [case, str(batch)]
        for name in backends:
            text = format_us(medians[name]) if name in medians else by_name[name]["problem"].split(":")[0]
            cells.append(f"**{text}**" if name in medians and medians[name] == best else text)
        if has_fastseq:
            peers = [median for name, median in medians.items() if name != "fastseq"]
            own = medians.get("fastseq")
            cells.append(f"{by_name['fastseq']['gflops']:.1f}" if own else "")
            cells.append(f"{medians['eager'] / own:.2f}x" if own and "eager" in medians else "")
            cells.append(f"{min(peers) / own:.2f}x" if own and peers else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def worst_table(rows: list[Row], backends: list[str], key: str, style: str) -> list[str]:
    """One line per case: the largest value over its batch sizes and thread counts."""
    lines = table_head(["case", *backends], text_columns=1)
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = [case]
        for name in backends:
            values = [row[key] for row in rows if (row["case"], row["backend"]) == (case, name)]
            worst = max((value for value in values if value is not None), default=None)
            cells.append("" if worst is None else format(worst, style))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table_head(titles: list[str], text_columns: int) -> list[str]:
    rule = ["---"] * text_columns + ["---:"] * (len(titles) - text_columns)
    return [f"| {' | '.join(titles)} |", f"|{'|'.join(rule)}|"]


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def format_us(value: float) -> str:
    """Three significant digits, with thin groups of thousands."""
    if value >= 1000:
        digits = len(str(int(value))) - 3
        return f"{round(value, -digits):,.0f}".replace(",", " ")
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"


if __name__ == "__main__":
    main()
