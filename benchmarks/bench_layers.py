"""Layer by layer: fastseq against the machine's limits, which are measured in turn with it, on one thread.

    python benchmarks/bench_layers.py --groups 3x3 5x5 --json rows.json --markdown table.md

Convolutions take channels_last input with the padding already in it, so that nothing but the kernel runs: what a layer
in the middle of a network does. Where this fastseq has Winograd, each layer runs with and without it.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import statistics
import sys
from pathlib import Path

import torch
from layers import GROUPS, Layer, Prepared, exact_result, prepare, seconds_per_call, winograd_variants
from limits import Limits, measure_limits
from report import Report, Row, describe_machine, save, table_head

import fastseq
from fastseq import _native
from fastseq.testing import relative_error


def measure(group: str, layer: Layer, limits: Limits, rounds: int, min_time: float) -> list[Row]:
    """A row per variant: medians over rounds, in each of which the peak and all variants are measured in turn."""
    plain, x = layer.build(), layer.example()
    exact = exact_result(plain, x)
    with torch.no_grad():
        eager_error = relative_error(plain(x), exact)["rel_max"]
    variants = [prepare(plain, x, exact, variant) for variant in winograd_variants(layer)]
    call_seconds: list[list[float]] = [[] for _ in variants]
    kernel_seconds: list[list[float]] = [[] for _ in variants]
    peaks: list[float] = []
    order = list(range(len(variants)))
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        peaks.append(_native.module().fma_peak(os.environ.get("FASTSEQ_ISA", "")))
        shuffle(order)
        for i in order:
            call_seconds[i].append(seconds_per_call(variants[i].module, x, min_time))
            native = variants[i].native
            if native is not None:
                kernel_seconds[i].append(seconds_per_call(native, x, min_time))
    common = {"group": group, "layer": layer.name, "eager_err_rel_max": eager_error}
    return [
        {**common, **describe(layer, limits, *of_variant, peaks)}
        for of_variant in zip(variants, call_seconds, kernel_seconds, strict=True)
    ]


def describe(
    layer: Layer,
    limits: Limits,
    prepared: Prepared,
    call_seconds: list[float],
    kernel_seconds: list[float],
    peaks: list[float],
) -> Row:
    """`call_us` is a call of the module, `kernel_us` one of its engine, by which the rates are where there is one."""
    cost = layer.cost
    seconds = kernel_seconds or call_seconds
    median = statistics.median(seconds)
    shares = [cost.flops / s / 1e9 / peak for s, peak in zip(seconds, peaks, strict=True)]
    is_linear = layer.kernel is None
    read_rate, read_limit = cost.weight_bytes / median / 1e9, limits.read_gbytes_per_s(cost.weight_bytes)
    return {
        "variant": prepared.variant.label,
        "kernel": prepared.kernel,
        "flops": cost.flops,
        "weight_bytes": cost.weight_bytes,
        "call_us": statistics.median(call_seconds) * 1e6,
        "kernel_us": statistics.median(kernel_seconds) * 1e6 if kernel_seconds else None,
        "gflops": cost.flops / median / 1e9,
        "of_fma_peak": statistics.median(shares),
        "best_of_fma_peak": max(shares),
        "weight_gbytes_per_s": read_rate if is_linear else None,
        "of_read_limit": read_rate / read_limit if is_linear and read_limit else None,
        "err_rel_max": prepared.error,
    }


# Title: field and format.
COLUMNS = {
    "call us": ("call_us", ".1f"),
    "kernel us": ("kernel_us", ".1f"),
    "GFLOP/s": ("gflops", ".1f"),
    "of FMA peak": ("of_fma_peak", ".1%"),
    "best round": ("best_of_fma_peak", ".1%"),
    "weights GB/s": ("weight_gbytes_per_s", ".1f"),
    "of read limit": ("of_read_limit", ".0%"),
    "error": ("err_rel_max", ".1e"),
    "eager's error": ("eager_err_rel_max", ".1e"),
}


def to_markdown(report: Report) -> str:
    machine, limits = report["machine"], report["limits"]
    lines = [
        "# Layers, one core",
        "",
        f"`{machine['command']}`",
        "",
        f"{machine['cpu']}, fastseq's kernels for {report['isa']}, torch {machine['torch_version']}, commit "
        f"{machine['commit']}, {machine['date']}. Multiply-adds alone: {limits['fma_gflops']} GFLOP/s; reading: "
        f"{limits['l3_read_gbytes_per_s']} GB/s from the last cache, {limits['dram_read_gbytes_per_s']} GB/s from "
        "memory. GFLOP/s are those of the layer's definition, also where Winograd does fewer.",
    ]
    for group in dict.fromkeys(row["group"] for row in report["rows"]):
        lines += ["", f"## {group}", "", *table_head(["layer", "variant", "kernel", *COLUMNS], text_columns=3)]
        for row in (row for row in report["rows"] if row["group"] == group):
            cells = [row["layer"], row["variant"], row["kernel"]]
            cells += ["" if row[key] is None else format(row[key], style) for key, style in COLUMNS.values()]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--layers", default="", metavar="REGEX", help="only layers whose name matches")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--min-time", type=float, default=0.05, help="seconds per block")
    parser.add_argument("--json", type=Path, help="write rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    arguments = parser.parse_args()
    if not fastseq.native_available():
        sys.exit(f"no native kernels to measure: {fastseq.native_error()}")
    todo = [(g, layer) for g in arguments.groups for layer in GROUPS[g] if re.search(arguments.layers, layer.name)]
    if not todo:
        parser.error(f"no layer of {', '.join(arguments.groups)} matches {arguments.layers!r}")
    torch.set_num_threads(1)
    limits = measure_limits(1)
    report: Report = {"machine": describe_machine(), "isa": fastseq.isa(), "limits": limits.as_dict(), "rows": []}
    with torch.inference_mode():
        for group, layer in todo:
            print(f"{group}: {layer.name}", file=sys.stderr, flush=True)
            report["rows"] += measure(group, layer, limits, arguments.rounds, arguments.min_time)
            save(report, arguments.json, arguments.markdown, to_markdown)
    print(to_markdown(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
