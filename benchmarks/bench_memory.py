"""Peak memory of a network, and how long `optimize` and the first call take: each way in a process of its own.

python benchmarks/bench_memory.py --cases vgg16 --json rows.json --markdown table.md
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import re
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from report import Report, Row, describe_machine, save, table_head
from torch import nn

import fastseq
from fastseq.testing import MODELS

ENGINES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda model: model,
    "fastseq": lambda model: fastseq.optimize(model, inplace=True),
    "fastseq, copy": fastseq.optimize,  # and the plain model is dropped: both are there for a moment
}
STATUS = Path("/proc/self/status")
MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(MODELS), default=["vgg16"], metavar="NAME")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="processes per row; the medians count")
    parser.add_argument("--json", type=Path, help="write rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    arguments = parser.parse_args()
    if arguments.batch < 1 or arguments.threads < 1 or arguments.repeats < 1:
        parser.error("--batch, --threads and --repeats are at least 1")
    if not fastseq.native_available():
        parser.exit(1, f"no native kernels to measure: {fastseq.native_error()}\n")
    report: Report = {"machine": describe_machine(), "rows": []}
    for case in arguments.cases:
        runs = [
            {name: in_child(case, arguments.batch, arguments.threads, name) for name in ENGINES}
            for _ in range(arguments.repeats)
        ]
        middle = {name: sorted((run[name] for run in runs), key=lambda row: row["peak_bytes"]) for name in ENGINES}
        rows = {name: results[len(results) // 2] for name, results in middle.items()}
        for name, row in rows.items():
            for key in ("optimize_s", "first_call_s"):
                row[key] = sorted(run[name][key] for run in runs)[len(runs) // 2]
            row["of_eager"] = row["peak_bytes"] / rows["eager"]["peak_bytes"]
            report["rows"].append(row)
        save(report, arguments.json, arguments.markdown, to_markdown)
    print(to_markdown(report))
    return 0


def in_child(*arguments: Any) -> Row:
    """`measure` in a new process, whose memory holds nothing else."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, arguments))
    process.start()
    there.close()
    try:
        row: Row = here.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"the process for {arguments} ended with exit code {process.exitcode}") from None
    process.join()
    return row


def _send(connection: Connection, arguments: tuple[Any, ...]) -> None:
    connection.send(measure(*arguments))


def measure(case: str, batch: int, threads: int, engine: str) -> Row:
    """Bytes are those above what Python and torch take before there is a model."""
    torch.set_num_threads(threads)
    warm_up()
    with contextlib.suppress(OSError):  # where that is not allowed, the peak of importing counts too
        Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    model = MODELS[case].build()
    x = MODELS[case].example(batch)
    start = time.perf_counter()
    model = ENGINES[engine](model)
    optimize_s = time.perf_counter() - start
    with torch.inference_mode():
        start = time.perf_counter()
        model(x)
        first_call_s = time.perf_counter() - start
        model(x)
    runs = [
        segment
        for part in ("sequentials", "forwards")
        for found in (fastseq.explain(model).to_dict()[part] if engine != "eager" else ())
        for segment in found["segments"]
        if segment["kind"] == "native"
    ]
    return {
        "case": case,
        "batch": batch,
        "threads": threads,
        "engine": engine,
        "peak_bytes": status("VmHWM") - before,
        "resident_bytes": status("VmRSS") - before,
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "packed_bytes": sum(step["packed_bytes"] or 0 for run in runs for step in run["steps"]),
        "scratch_bytes": sum(run["scratch_bytes"] or 0 for run in runs),
        "optimize_s": optimize_s,
        "first_call_s": first_call_s,
    }


def warm_up() -> None:
    """What torch sets up once, by a network that is small."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 8)).eval()
    with torch.inference_mode():
        model(torch.zeros(1, 1, 4, 4))
        fastseq.optimize(model)(torch.zeros(1, 1, 4, 4))


def status(field: str) -> int:
    """A field of this process's status in bytes."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{STATUS} has no {field}")
    return int(found[1]) << 10


# Title: field and what it is divided by.
COLUMNS = {
    "peak MiB": ("peak_bytes", MIB, ".1f"),
    "of eager": ("of_eager", 1, ".2f"),
    "resident MiB": ("resident_bytes", MIB, ".1f"),
    "weights MiB": ("weight_bytes", MIB, ".1f"),
    "packed MiB": ("packed_bytes", MIB, ".1f"),
    "scratch MiB": ("scratch_bytes", MIB, ".1f"),
    "optimize s": ("optimize_s", 1, ".3f"),
    "first call s": ("first_call_s", 1, ".3f"),
}


def to_markdown(report: Report) -> str:
    machine = report["machine"]
    lines = [
        "# Memory",
        "",
        f"`{machine['command']}`",
        "",
        f"{machine['cpu']}, torch {machine['torch_version']}, commit {machine['commit']}, {machine['date']}. Each row "
        "in a process of its own, above what it took before it had a model. `fastseq` is "
        "`optimize(model, inplace=True)`; with a copy, the plain model is there too until it is dropped.",
        "",
        *table_head(["case", "batch", "engine", *COLUMNS], text_columns=1),
    ]
    for row in report["rows"]:
        cells = [format(row[key] / divisor, style) for key, divisor, style in COLUMNS.values()]
        lines.append(f"| {row['case']} | {row['batch']} | {row['engine']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
