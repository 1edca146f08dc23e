"""What a call costs beside its arithmetic: nanoseconds from Python to the result, part by part.

All parts are timed interleaved, block by block, on one thread; the table shows the smallest and the median block.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastseq
from fastseq.sequential import COMPILED
from fastseq.testing import MODELS

Part = tuple[str, str, Callable[[], Any]]  # name, what it is, one call


class Nothing(nn.Module):
    """A module whose call is nothing but nn.Module's own."""

    def forward(self, x: Any) -> Any:
        return x


def optimised(model: nn.Module, x: torch.Tensor) -> Any:
    """The model after a first call, which made its plan."""
    fused = fastseq.optimize(model)
    fused(x)
    counters = fastseq.stats(fused)
    if counters["fused_calls"] != 1 or counters["eager_calls"]:
        sys.exit(f"a model to be timed is not fused: {counters}")
    return fused


def parts() -> list[Part]:
    """Small ones first. The differences between them are what `derived` names."""
    one = torch.ones(1, 1)
    smallest = optimised(nn.Sequential(nn.Linear(1, 1)), one)
    seed2, plain = MODELS["seed2"], MODELS["seed2"].build()
    x = seed2.example(1)
    network = optimised(plain, x)
    program = network.__dict__[COMPILED].program
    nothing = Nothing()
    batch = seed2.example(32)
    python_call = type(network).__call__
    return [
        ("loop", "the timing loop: a function that does nothing", lambda: None),
        ("binding", "a function of torch that reads one flag", torch.is_grad_enabled),
        ("module", "nn.Module.__call__ around an empty forward", lambda: nothing(x)),
        ("allocation", "torch.empty of the result's size", lambda: torch.empty(1, 10)),
        ("liveness", "watches of the model, its layers and torch's functions", lambda: program.is_current(network)),
        ("smallest", "a fused Linear(1, 1)", lambda: smallest(one)),
        ("python", "seed 2, batch 1, through the class's `__call__` in Python", lambda: python_call(network, x)),
        ("network", "seed 2, batch 1", lambda: network(x)),
        ("batch", "seed 2, batch 32", lambda: network(batch)),
        ("eager", "seed 2, batch 1, in eager PyTorch", lambda: plain(x)),
    ]


# A row that is the difference of two.
DERIVED = [
    ("network", "smallest", "kernels, and reading 35 KiB of weights for changes"),
    ("smallest", "allocation", "all that a call costs beyond one torch.empty"),
    ("python", "network", "what the lane saves"),
]


def measure(timed: list[Part], rounds: int, block_seconds: float) -> dict[str, list[float]]:
    """Nanoseconds per call of each part, one number a block."""
    blocks: dict[str, list[float]] = {name: [] for name, _, _ in timed}
    calls = {}
    for name, _, function in timed:
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < block_seconds:
            function()
            count += 1
        calls[name] = max(1, count)
    for _ in range(rounds):
        for name, _, function in timed:
            repeat = range(calls[name])
            for _ in repeat[: max(1, len(repeat) // 5)]:  # the others have had the caches
                function()
            start = time.perf_counter()
            for _ in repeat:
                function()
            blocks[name].append((time.perf_counter() - start) / len(repeat) * 1e9)
    return blocks


def table(timed: list[Part], blocks: dict[str, list[float]]) -> str:
    lines = ["| part | smallest ns | median ns |", "|---|---:|---:|"]
    loop = min(blocks["loop"])
    for name, what, _ in timed:
        if name != "loop":
            least, median = min(blocks[name]) - loop, statistics.median(blocks[name]) - loop
            lines.append(f"| {what} | {least:.0f} | {median:.0f} |")
    for larger, smaller, what in DERIVED:
        least = min(blocks[larger]) - min(blocks[smaller])
        median = statistics.median(blocks[larger]) - statistics.median(blocks[smaller])
        lines.append(f"| {larger} less {smaller}: {what} | {least:.0f} | {median:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200, help="blocks of each part")
    parser.add_argument("--min-time", type=float, default=0.002, help="seconds per block")
    parser.add_argument("--json", type=Path, help="write all blocks here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    arguments = parser.parse_args()
    if not fastseq.native_available():
        sys.exit(f"no native kernels to measure: {fastseq.native_error()}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        timed = parts()
        blocks = measure(timed, arguments.rounds, arguments.min_time)
    text = table(timed, blocks)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(blocks, indent=1) + "\n")


if __name__ == "__main__":
    main()
