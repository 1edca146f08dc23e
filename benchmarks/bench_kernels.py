"""The convolution tiles alone against the core's fused-multiply-add peak, which is measured in turn with them.

One thread, channels_last in and out without padding, so that nothing but the tiles runs: no copy, no transposition.
`python benchmarks/bench_kernels.py --json rows.json --markdown table.md`
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch
from torch import nn

import fastseq
from fastseq import _native
from fastseq.__main__ import cpu_model
from fastseq.testing import relative_error

# (channels in, channels out, kernel, height and width, pooled)
LAYERS = [
    (64, 64, 3, 58, False),
    (64, 64, 3, 58, True),
    (128, 128, 3, 58, False),
    (128, 128, 3, 58, True),
    (256, 256, 3, 30, False),
    (512, 512, 3, 16, False),
    (64, 64, 1, 56, False),
    (64, 64, 5, 27, False),
    (20, 64, 5, 24, False),
    (64, 30, 5, 15, True),
    (3, 64, 3, 32, True),
    (1, 20, 5, 28, False),
]


def seconds_per_call(model: nn.Module, x: torch.Tensor, min_time: float) -> float:
    """One block of calls, long enough to measure."""
    calls, elapsed = 1, 0.0
    while True:
        start = time.perf_counter()
        for _ in range(calls):
            model(x)
        elapsed = time.perf_counter() - start
        if elapsed >= min_time:
            return elapsed / calls
        calls = max(calls + 1, int(calls * 1.2 * min_time / max(elapsed, 1e-7)))


def measure(layer: tuple[int, int, int, int, bool], rounds: int, min_time: float) -> dict[str, object]:
    """A row: the layer's rate and the peak, medians over rounds in which both are measured one after the other."""
    c_in, c_out, k, size, pooled = layer
    layers: list[nn.Module] = [nn.Conv2d(c_in, c_out, k), nn.ReLU()]
    plain = nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pooled else [])).eval()
    fast = fastseq.optimize(plain)
    x = torch.randn(1, c_in, size, size).to(memory_format=torch.channels_last)
    error = relative_error(fast(x), copy.deepcopy(plain).double()(x.double()))["rel_max"]
    step = fastseq.explain(fast).to_dict()["sequentials"][0]["segments"][0]["steps"][0]
    rates, shares = [], []
    for _ in range(rounds):
        peak = _native.module().fma_peak(os.environ.get("FASTSEQ_ISA", ""))
        rates.append(step["flops"] / seconds_per_call(fast, x, min_time) / 1e9)
        shares.append(rates[-1] / peak)
    return {
        "layer": f"{c_in}-{c_out} {k}x{k} @{size}{' pooled' if pooled else ''}",
        "kernel": step["kernel"],
        "gflops": round(statistics.median(rates), 1),
        "share_of_peak": round(statistics.median(shares), 3),
        "best_share": round(max(shares), 3),
        "err_rel_max": error,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--min-time", type=float, default=0.05, help="seconds per block")
    parser.add_argument("--json", type=Path, help="write rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    arguments = parser.parse_args()
    if not fastseq.native_available():
        sys.exit(f"no native kernels to measure: {fastseq.native_error()}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        peak = _native.module().fma_peak(os.environ.get("FASTSEQ_ISA", ""))
        rows = [measure(layer, arguments.rounds, arguments.min_time) for layer in LAYERS]
    head = {
        "cpu": cpu_model(),
        "isa": fastseq.isa(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "fma_peak_gflops": round(peak, 1),
    }
    table = [
        "| layer | kernel | GFLOP/s | of FMA peak | best round | max error vs float64 |",
        "|---|---|---|---|---|---|",
    ]
    table += [
        f"| {r['layer']} | `{r['kernel']}` | {r['gflops']} | {r['share_of_peak']:.1%} | {r['best_share']:.1%} "
        f"| {r['err_rel_max']:.1e} |"
        for r in rows
    ]
    text = "\n".join(f"{key}: {value}  " for key, value in head.items()) + "\n\n" + "\n".join(table) + "\n"
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text("# Convolution tiles, one core\n\n" + text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
