"""A server at a steady load for a long time, its weights changed under it: every answer is checked, memory is watched.

    pip install "fastseq[serve]" aiohttp
    python benchmarks/soak_serving.py --case cifar_vgg_bn --seconds 600 --swaps 10 --json soak.json --markdown soak.md

First as many requests as the server answers, then random arrivals at a share of that rate. At even distances a new
file of weights is put in the place of the old one; from then on an answer may be that of the old or the new weights
until the first new one has come, and some seconds later of the new weights alone. Memory is that of all the server's
processes together.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import Row, describe_machine, save, table_head
from serving_load import Client, Server, expected_answers

from fastseq.testing import MODELS

# Norm by norm, beside float64: any two sets of weights are much further from each other.
TOLERANCE = 1e-4
SECONDS_TO_LOAD = 10.0  # in which all workers have taken a file that was put there
WARM_SHARE = 0.1  # of the time, after which memory should grow no more
SAMPLES = 120  # of memory


class Weights:
    """Versions of a network's weights, a file that holds the newest, and what each version answers."""

    def __init__(self, case: str, count: int, file: Path) -> None:
        self.file, self.newest, self.seen, self.since = file, 0, 0, time.monotonic()
        self.states: list[dict[str, torch.Tensor]] = []
        generator = torch.Generator().manual_seed(1)
        for version in range(count):
            model = MODELS[case].build()
            if version:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter *= 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
            self.states.append(model.state_dict())
        self.case, self.answers = case, torch.empty(0)
        self.put(0)

    def answer_all(self, inputs: torch.Tensor) -> None:
        exact = []
        for state in self.states:
            model = MODELS[self.case].build()
            model.load_state_dict(state)
            exact.append(expected_answers(model, inputs))
        self.answers = torch.stack(exact)

    def put(self, version: int) -> None:
        unfinished = self.file.with_suffix(".new")
        torch.save(self.states[version], unfinished)
        unfinished.replace(self.file)
        self.newest, self.since = version, time.monotonic()

    def check(self, number: int, answer: bytes) -> str | None:
        """What is wrong about the answer to an input."""
        exact = self.answers[:, number]
        actual = torch.frombuffer(bytearray(answer), dtype=torch.float32).double()
        if actual.numel() != exact[0].numel():
            return "an answer of another size"
        errors = (actual - exact.flatten(1)).norm(dim=1) / exact.flatten(1).norm(dim=1)
        version = int(errors.argmin())
        if not errors[version] <= TOLERANCE:
            return "an answer of no version of the weights"
        if version not in (self.newest, self.newest - 1):
            which = "were replaced long ago" if version < self.newest else "are not there yet"
            return f"an answer of weights that {which}"
        if version != self.newest and time.monotonic() - self.since > SECONDS_TO_LOAD:
            return "an answer of old weights"
        self.seen = max(self.seen, version)
        return None


async def soak(server: Server, weights: Weights, arguments: argparse.Namespace) -> Row:
    async with Client(server, arguments.case, weights.check) as client:
        weights.answer_all(client.inputs)
        capacity = len((await client.closed_loop(arguments.capacity_seconds)).seconds) / arguments.capacity_seconds
        rate = arguments.share * capacity
        progress(f"{capacity:.0f} requests/s at most, {rate:.0f} for {arguments.seconds:g} s")
        memory: list[tuple[float, int]] = []
        begin = time.monotonic()

        async def watch() -> None:
            while True:
                memory.append((time.monotonic() - begin, server.resident_bytes()))
                await asyncio.sleep(arguments.seconds / SAMPLES)

        async def swap() -> None:
            for version in range(1, arguments.swaps + 1):
                await asyncio.sleep(arguments.seconds / (arguments.swaps + 1))
                weights.put(version)
                progress(f"{time.monotonic() - begin:.0f} s: weights {version}, {memory[-1][1] >> 20} MiB")

        helpers = [asyncio.create_task(watch()), asyncio.create_task(swap())]
        answers = await client.open_loop(rate, arguments.seconds)
        for helper in helpers:
            helper.cancel()
        for result in await asyncio.gather(*helpers, return_exceptions=True):
            if result is not None and not isinstance(result, asyncio.CancelledError):
                raise result
        counters = await client.counters()
    warm = [used for at, used in memory if at >= WARM_SHARE * arguments.seconds]
    return {
        "case": arguments.case,
        "capacity_per_s": capacity,
        "load_per_s": rate,
        "requests": len(answers.seconds),
        "failures": sum(answers.problems.values()),
        "problems": dict(answers.problems.most_common(5)),
        "swaps": weights.newest,
        "swaps_seen": weights.seen,
        "fallbacks": counters.get("fastseq_fallbacks_total", 0.0),
        **answers.quantiles(),
        "slowest_ms": 1e3 * max(answers.seconds),
        "resident_mib": warm[0] / 2**20,
        "resident_most_mib": max(warm) / 2**20,
        "growth": max(warm) / warm[0] - 1,
        "memory": memory,
    }


def progress(text: str) -> None:
    print(text, file=sys.stderr)


def to_markdown(report: dict[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        f"`{machine['command']}`  ",
        "",
        f"{machine['cpu']}, {machine['isa']}, torch {machine['torch_version']}, commit {machine['commit']}, "
        f"{machine['date']}. Times in milliseconds, from when a request was due. Memory of all processes of the server "
        f"from {WARM_SHARE:.0%} of the time on.",
        "",
    ]
    titles = ["network", "at most/s", "load/s", "requests", "failed", "new weights", "p50", "p99", "p99.9", "slowest"]
    lines += table_head([*titles, "MiB", "growth"], text_columns=1)
    for row in report["rows"]:
        cells = [row["case"], f"{row['capacity_per_s']:.0f}", f"{row['load_per_s']:.0f}", str(row["requests"])]
        cells += [str(row["failures"]), f"{row['swaps_seen']} of {row['swaps']}"]
        cells += [f"{row[name]:.1f}" for name in ("p50_ms", "p99_ms", "p999_ms", "slowest_ms", "resident_mib")]
        lines.append(f"| {' | '.join([*cells, format(row['growth'], '.2%')])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(MODELS), default="cifar_vgg_bn", metavar="NAME")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--share", type=float, default=0.8, help="of what the server can take")
    parser.add_argument("--swaps", type=int, default=10, help="of the weights")
    parser.add_argument("--capacity-seconds", type=float, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of a worker")
    parser.add_argument("--max-batch-size", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = Weights(arguments.case, arguments.swaps + 1, Path(folder) / "weights.pt")
        options = ["--weights", str(weights.file), "--workers", str(arguments.workers)]
        server = Server(arguments.case, arguments.threads, *options, "--max-batch-size", str(arguments.max_batch_size))
        try:
            row = asyncio.run(soak(server, weights, arguments))
        finally:
            server.close()
    report = {"machine": describe_machine(), "rows": [row]}
    save(report, arguments.json, arguments.markdown, to_markdown)
    print(to_markdown(report))


if __name__ == "__main__":
    main()
