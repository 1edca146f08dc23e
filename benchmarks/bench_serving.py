"""Requests per second of the plain and of the optimised model in the same LitServe server, in turns.

    pip install "fastseq[serve]" aiohttp
    python benchmarks/bench_serving.py --cases seed2 cifar_vgg_bn --p99 30 --json rows.json --markdown table.md

First as many requests as the server answers (a few connections that ask again at once), then arrivals at random times
at shares of what the plain model could take (an open loop), and with --p99 the highest rate at which 99 of 100 requests
are answered within so many milliseconds. Model seconds are the runner's own, from /metrics. The client shares the
machine's cores with the server, and its part is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from report import Row, describe_machine, save, table_head
from serving_load import Client, Server

from fastseq.testing import MODELS

HALVINGS = 6  # of what is between a rate that is too high and one that is not
Report = dict[str, Any]


async def observe(client: Client, rate: float | None, seconds: float) -> Row:
    """One load: `rate` requests per second, or as many as are answered."""
    before, start = await client.counters(), time.monotonic()
    used_before = resource.getrusage(resource.RUSAGE_SELF)
    answers = await (client.closed_loop(seconds) if rate is None else client.open_loop(rate, seconds))
    elapsed, used = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF)
    after = await client.counters()
    news = {name: after[name] - before.get(name, 0.0) for name in after}
    inputs, batches = news["fastseq_inputs_total"], max(1.0, news["fastseq_batches_total"])
    return {
        "load": rate,
        "requests_per_s": len(answers.seconds) / elapsed,
        "failures": sum(answers.problems.values()),
        "problems": dict(answers.problems.most_common(3)),
        "batch_size": inputs / batches,
        "model_ms_per_batch": 1e3 * news["fastseq_batch_seconds_sum"] / batches,
        "model_share": news["fastseq_batch_seconds_sum"] / elapsed,
        "client_cores": (used.ru_utime + used.ru_stime - used_before.ru_utime - used_before.ru_stime) / elapsed,
        "mean_ms": 1e3 * statistics.fmean(answers.seconds),
        **answers.quantiles(),
    }


async def highest_rate(client: Client, capacity: float, p99_ms: float, seconds: float) -> Row:
    """The highest rate that was found to keep the 99th percentile, by halving; what was measured at it."""
    low, high = 0.0, capacity
    best: Row = {"load": None, "requests_per_s": 0.0}
    for _ in range(HALVINGS):
        rate = (low + high) / 2
        row = await observe(client, rate, seconds)
        is_kept = not row["failures"] and row["p99_ms"] <= p99_ms
        progress(f"{rate:.0f} requests/s: p99 {row['p99_ms']:.1f} ms")
        if is_kept:
            low, best = rate, row
        else:
            high = rate
    return {**best, "p99_limit_ms": p99_ms}


async def measure(case: str, is_plain: bool, shared_rates: list[float], arguments: argparse.Namespace) -> Report:
    """All loads of one server. `shared_rates` are found by the first one for all of a case."""
    options = ["--max-batch-size", str(arguments.max_batch_size)] + ["--no-optimize"] * is_plain
    server = Server(case, arguments.threads, *options)
    report: Report = {"rows": [], "at_p99": []}
    try:
        async with Client(server, case) as client:
            await client.closed_loop(arguments.seconds / 5)
            row = await observe(client, None, arguments.seconds)
            capacity = row["requests_per_s"]
            if not shared_rates:
                shared_rates += arguments.rates or [round(share * capacity, 1) for share in arguments.shares]
            report["rows"] = [row, *[await observe(client, rate, arguments.seconds) for rate in shared_rates]]
            for row in report["rows"]:
                progress(f"{case}, {'plain' if is_plain else 'fastseq'}: {row['requests_per_s']:.0f} requests/s")
            if arguments.p99:
                report["at_p99"] = [await highest_rate(client, capacity, arguments.p99, arguments.seconds)]
    finally:
        server.close()
    return report


def progress(text: str) -> None:
    print(text, file=sys.stderr)


def to_markdown(report: Report) -> str:
    machine = report["machine"]
    lines = [
        f"`{machine['command']}`  ",
        "",
        f"{machine['cpu']}, {machine['isa']}, torch {machine['torch_version']}, commit {machine['commit']}, "
        f"{machine['date']}. Times in milliseconds, from when a request was due.",
    ]
    titles = ["network", "model", "load, requests/s", "answered/s", "failed", "p50", "p99", "p99.9", "batch", "model"]
    for name, text in (("rows", ""), ("at_p99", "The highest rate with the 99th percentile within its limit.")):
        if report[name]:
            lines += ["", text, ""] if text else [""]
            lines += table_head([*titles, "model's share", "client's cores"], text_columns=2)
            lines += [f"| {' | '.join(cells(row))} |" for row in report[name]]
    return "\n".join(lines)


def cells(row: Row) -> list[str]:
    if "p50_ms" not in row:
        return [row["case"], row["model"], "none", "0", *[""] * 8]
    texts = [row["case"], row["model"], "all" if row["load"] is None else f"{row['load']:.0f}"]
    texts += [f"{row['requests_per_s']:.0f}", str(row["failures"])]
    texts += [f"{row[name]:.2f}" for name in ("p50_ms", "p99_ms", "p999_ms")]
    texts += [f"{row['batch_size']:.1f}", f"{row['model_ms_per_batch']:.3f}", f"{row['model_share']:.0%}"]
    return [*texts, f"{row['client_cores']:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(MODELS), default=["seed2", "cifar_vgg_bn"], metavar="NAME")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.8], help="of what the plain model takes")
    parser.add_argument("--rates", nargs="+", type=float, help="requests per second instead")
    parser.add_argument("--p99", type=float, metavar="MS", help="find the highest rate with this 99th percentile")
    parser.add_argument("--seconds", type=float, default=20, help="of each load")
    parser.add_argument("--repeats", type=int, default=2, help="servers of each kind, in turns")
    parser.add_argument("--threads", type=int, default=1, help="of a worker")
    parser.add_argument("--max-batch-size", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    arguments = parser.parse_args()
    report: Report = {"machine": describe_machine(), "rows": [], "at_p99": []}
    for case in arguments.cases:
        rates: list[float] = []
        for repeat in range(arguments.repeats):
            for is_plain in (True, False):
                part = asyncio.run(measure(case, is_plain, rates, arguments))
                common = {"case": case, "model": "plain" if is_plain else "fastseq", "repeat": repeat}
                for name, rows in part.items():
                    report[name] += [{**common, **row} for row in rows]
                save(report, arguments.json, arguments.markdown, to_markdown)
    print(to_markdown(report))


if __name__ == "__main__":
    main()
