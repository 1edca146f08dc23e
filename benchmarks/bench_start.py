"""How long a replica takes from nothing to its first answer, part by part: each start in a new interpreter.

python benchmarks/bench_start.py --cases cifar_vgg_bn vgg16 --json rows.json --markdown table.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from report import Report, Row, describe_machine, save, table_head

from fastseq import native_available, native_error
from fastseq.testing import MODELS

PARTS = ("import_torch_s", "import_fastseq_s", "model_s", "warm_s", "first_answer_s")
TITLES = ("import torch", "import fastseq", "model", "optimize, warm-up", "first answer")
# The clock is read between the steps that a replica's start is made of.
START = """
import json, sys, time
at = [time.perf_counter()]
import torch
at.append(time.perf_counter())
import fastseq
from fastseq.serving import Runner
at.append(time.perf_counter())
from fastseq.testing import MODELS
case, threads, largest, wants_fastseq = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "fastseq"
torch.set_num_threads(threads)
x = MODELS[case].example(1)
at.append(time.perf_counter())
model = MODELS[case].build()
at.append(time.perf_counter())
runner = Runner(fastseq.optimize(model) if wants_fastseq else model, x, max_batch_size=largest)
at.append(time.perf_counter())
runner(x)
at.append(time.perf_counter())
torch_s, fastseq_s, _, *others = [b - a for a, b in zip(at, at[1:])]
print(json.dumps([torch_s, fastseq_s, *others]))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(MODELS), default=["cifar_vgg_bn"], metavar="NAME")
    parser.add_argument("--max-batch", type=int, default=8, help="warm-up runs batches of 1 and of this many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="interpreters per row, in turns; medians count")
    parser.add_argument("--json", type=Path, help="write rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    arguments = parser.parse_args()
    if arguments.max_batch < 1 or arguments.threads < 1 or arguments.repeats < 1:
        parser.error("--max-batch, --threads and --repeats are at least 1")
    if not native_available():
        parser.exit(1, f"no native kernels to measure: {native_error()}\n")
    report: Report = {"machine": describe_machine(), "rows": []}
    for case in arguments.cases:
        times: dict[str, list[list[float]]] = {"eager": [], "fastseq": []}
        for _ in range(arguments.repeats):
            for model, found in times.items():
                found.append(start(case, arguments.threads, arguments.max_batch, model))
        for model, found in times.items():
            row: Row = {"case": case, "model": model, "threads": arguments.threads, "max_batch": arguments.max_batch}
            row |= zip(PARTS, map(statistics.median, zip(*found, strict=True)), strict=True)
            row["beyond_torch_s"] = statistics.median(sum(parts[1:]) for parts in found)
            report["rows"].append(row)
        save(report, arguments.json, arguments.markdown, to_markdown)
    print(to_markdown(report))
    return 0


def start(case: str, threads: int, max_batch: int, model: str) -> list[float]:
    """Seconds of each part, in an interpreter of its own."""
    arguments = (case, str(threads), str(max_batch), model)
    done = subprocess.run([sys.executable, "-c", START, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return list(map(float, json.loads(done.stdout)))


def to_markdown(report: Report) -> str:
    machine = report["machine"]
    lines = [
        "# Start of a replica",
        "",
        f"`{machine['command']}`",
        "",
        f"{machine['cpu']}, torch {machine['torch_version']}, commit {machine['commit']}, {machine['date']}. Medians "
        "in milliseconds, each start in a new interpreter, the files in the system's cache. Warm-up is that of "
        "`fastseq.serving.Runner`; the model is built with random weights.",
        "",
        *table_head(["case", "model", "threads", "largest batch", *TITLES, "beyond torch"], text_columns=2),
    ]
    for row in report["rows"]:
        cells = [f"{1e3 * row[key]:.0f}" for key in (*PARTS, "beyond_torch_s")]
        lines.append(
            f"| {row['case']} | {row['model']} | {row['threads']} | {row['max_batch']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
