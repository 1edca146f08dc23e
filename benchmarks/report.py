"""The files that benchmarks write: where the numbers are from, several files as one, and the table of networks.

    python benchmarks/report.py part1.json part2.json --json all.json --markdown all.md

merges runs of bench_models.py. Rows of a later file replace those of an earlier one for the same case, batch, threads
and engine.

    python benchmarks/report.py --page docs/performance.md

writes the tables of a page anew, each from the files that the comment before it names.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import CASES

from fastseq.__main__ import cpu_model

OWN = ("fastseq", "fastseq_compute_dtype")
QUIET_SHARE = 0.97  # of a core, in the median block of an engine with one thread

Row = dict[str, Any]
Report = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="JSON", help="what bench_models.py wrote")
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--page", type=Path, help="a page whose tables are to be written anew; no files then")
    arguments = parser.parse_args()
    if bool(arguments.files) == bool(arguments.page):
        parser.error("expected result files, or --page and none")
    try:
        if arguments.page:
            arguments.page.write_text(with_tables(arguments.page.read_text()))
            return
        report = merge([load(path) for path in arguments.files])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    save(report, arguments.json, arguments.markdown)
    print(to_markdown(report))


# Files ---------------------------------------------------------------------------------------------------------------


def load(path: Path) -> Report:
    """A report of bench_models.py. ValueError if the file holds something else."""
    try:
        report = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON, {error}") from None
    missing = [key for key in ("machine", "ceilings", "skipped", "rows") if key not in report]
    if missing:
        raise ValueError(f"{path}: not a report of bench_models.py, it has no {', '.join(map(repr, missing))}")
    return report


def merge(reports: list[Report]) -> Report:
    """One report of several from one machine; the rows say which command and commit each is from."""
    machines = sorted({(report["machine"]["cpu"], report["machine"]["torch_version"]) for report in reports})
    if len(machines) > 1:
        raise ValueError(f"the files are from different machines or versions of torch: {machines}")
    dtypes = sorted({dtype_of(report) for report in reports})
    if len(dtypes) > 1:
        raise ValueError(f"the files are of different types: {', '.join(dtypes)}")
    rows: dict[tuple[Any, ...], Row] = {}
    ceilings, skipped, commands = [], {}, []
    for report in reports:
        machine = report["machine"]
        origin = {key: machine[key] for key in ("command", "commit", "date")}
        ceilings += [{**origin, **ceiling} for ceiling in report["ceilings"]]
        skipped.update(report["skipped"])
        commands += machine["command"].splitlines()
        for row in report["rows"]:
            rows[row["case"], row["batch"], row["threads"], row["backend"]] = row
    measured = {row["backend"] for row in rows.values()}
    machine = {**reports[-1]["machine"], "command": "\n".join(dict.fromkeys(commands))}
    machine["commit"] = ", ".join(dict.fromkeys(report["machine"]["commit"] for report in reports))
    return {
        "machine": machine,
        "dtype": dtypes[0],
        "ceilings": ceilings,
        "skipped": {name: reason for name, reason in skipped.items() if name not in measured},
        "rows": list(rows.values()),
    }


def dtype_of(report: Report) -> str:
    return report.get("dtype", "float32")


def describe_machine() -> Row:
    """Where and how the numbers of this process are made."""
    return {
        "cpu": cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch_version": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command(),
    }


def command() -> str:
    """The command line, with the variables that change how fastseq or OpenMP run."""
    variables = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(("FASTSEQ_", "OMP_"))]
    return shlex.join([*variables, "python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def commit() -> str:
    """The short hash of the source tree, with "-dirty" when it has changes that are not in it."""
    git = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def save(
    report: Report, json_path: Path | None, markdown_path: Path | None, render: Callable[[Report], str] | None = None
) -> None:
    """Called after each case, so that a run that is interrupted leaves what it has measured."""
    texts = (json_path, lambda: json.dumps(report, indent=1)), (markdown_path, lambda: (render or to_markdown)(report))
    for path, text in texts:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text() + "\n")


# The table -----------------------------------------------------------------------------------------------------------


def to_markdown(report: Report) -> str:
    """The machine, a table of medians for each thread count, the errors, and what was skipped or failed."""
    machine, rows = report["machine"], report["rows"]
    lines = [
        *(f"`{line}`  " for line in machine["command"].splitlines()),
        "",
        f"{machine['cpu']}, {machine['isa']}, torch {machine['torch_version']}, commit {machine['commit']}, "
        f"{machine['date']}. {dtype_of(report)}. Median time of one call in microseconds; best of each line in bold.",
    ]
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    for threads in dict.fromkeys(ceiling["threads"] for ceiling in report["ceilings"]):
        ceilings = [ceiling for ceiling in report["ceilings"] if ceiling["threads"] == threads]
        cores = ", ".join(map(str, ceilings[-1]["cores"]))
        lines += [
            "",
            f"## {count(threads, 'thread')} (cores {cores})",
            "",
            describe_ceilings(ceilings),
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
        *describe_errors(rows),
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


# A table in a page: the files it is made of, relative to the root of the repository, and how many threads.
TABLE = re.compile(r"(<!-- (\d+) threads?: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
ROOT = Path(__file__).resolve().parent.parent


def with_tables(page: str) -> str:
    """The page with each of its tables as the result files have it now."""

    def table(found: re.Match[str]) -> str:
        rows = merge([load(ROOT / name) for name in found[3].split()])["rows"]
        return found[1] + "\n".join(summary_table(rows, int(found[2]))) + "\n" + found[4]

    return TABLE.sub(table, page)


def summary_table(rows: list[Row], threads: int) -> list[str]:
    """fastseq beside eager, the best peer and the machine's limit."""
    titles = ["network", "batch", "eager us", "best peer us", "fastseq us", "vs eager", "vs best peer", "of limit"]
    lines = table_head([*titles, "limited by", "error", "eager's error"], text_columns=1)
    rows = [row for row in rows if row["threads"] == threads and row["median_us"] is not None]
    for case, batch in dict.fromkeys((row["case"], row["batch"]) for row in rows):
        by_name = {row["backend"]: row for row in rows if (row["case"], row["batch"]) == (case, batch)}
        own, eager = by_name.get("fastseq"), by_name.get("eager")
        peers = [row for name, row in by_name.items() if name not in OWN]
        if own is None or eager is None:
            continue
        best = min(peers, key=lambda row: row["median_us"])
        cells = [
            CASES[case].title or case,
            str(batch),
            format_us(eager["median_us"]),
            f"{format_us(best['median_us'])} ({best['backend']})",
            format_us(own["median_us"]),
            f"{eager['median_us'] / own['median_us']:.2f}x",
            f"{best['median_us'] / own['median_us']:.2f}x",
            f"{own['of_limit']:.2f}" if own.get("of_limit") else "",
            own.get("limited_by") or "",
            f"{own['err_rel_max']:.1e}",
            f"{own['eager_err_rel_max']:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# What a ceiling may hold, and how it reads.
CEILINGS = {
    "fma_gflops_per_core": "GFLOP/s per core in multiply-adds alone",
    "fma_gflops": "GFLOP/s in multiply-adds on all of them",
    "sgemm_gflops": "GFLOP/s in a large sgemm",
    "l3_read_gbytes_per_s": "GB/s read from the last cache",
    "dram_read_gbytes_per_s": "GB/s read from memory",
    "copy_gbytes_per_s": "GB/s in a memory copy, read and written",
}


def describe_ceilings(ceilings: list[Row]) -> str:
    """The machine's limits; a range where several runs measured them."""
    parts = []
    for key, meaning in CEILINGS.items():
        values = sorted({ceiling[key] for ceiling in ceilings if ceiling.get(key) is not None})
        if values:
            parts.append(f"{'–'.join(map(str, [values[0], *values[1:][-1:]]))} {meaning}")
    return f"Machine: {', '.join(parts)}."


def timing_table(rows: list[Row], backends: list[str]) -> list[str]:
    has_fastseq = "fastseq" in backends
    head = ["case", "batch", *backends]
    if has_fastseq:
        head += ["fastseq GFLOP/s", "of limit", "vs eager", "vs best peer"]
    lines = table_head(head, text_columns=1)
    for case, batch in dict.fromkeys((row["case"], row["batch"]) for row in rows):
        by_name = {row["backend"]: row for row in rows if (row["case"], row["batch"]) == (case, batch)}
        medians = {name: row["median_us"] for name, row in by_name.items() if row["median_us"] is not None}
        best = min(medians.values(), default=None)
        cells = [case, str(batch)]
        for name in backends:
            text = "" if name not in by_name else (by_name[name]["problem"] or "").split(":")[0]
            if name in medians:
                text = format_us(medians[name])
            cells.append(f"**{text}**" if name in medians and medians[name] == best else text)
        if has_fastseq:
            peers = [median for name, median in medians.items() if name not in OWN]
            own = medians.get("fastseq")
            of_limit = by_name["fastseq"].get("of_limit") if own else None
            cells.append(f"{by_name['fastseq']['gflops']:.1f}" if own else "")
            cells.append(f"{of_limit:.2f}" if of_limit else "")
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


def describe_errors(rows: list[Row]) -> list[str]:
    """How fastseq's largest error compares with eager's on the same case, at its worst."""
    own = [row for row in rows if row["backend"] == "fastseq" and row["err_rel_max"] and row["eager_err_rel_max"]]
    if not own:
        return []
    worst = max(own, key=lambda row: row["err_rel_max"] / row["eager_err_rel_max"])
    ratio = worst["err_rel_max"] / worst["eager_err_rel_max"]
    return ["", f"fastseq's by eager's, at worst: {ratio:.2f} ({worst['case']}, batch {worst['batch']})."]


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
