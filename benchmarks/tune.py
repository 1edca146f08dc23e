"""How good is the engine's choice of kernels? Times all that a layer can run on, and shows what another would save.

    python benchmarks/tune.py --networks seed1 seed3 --json rows.json --markdown table.md
    python benchmarks/tune.py --groups 3x3 linear --networks

One thread; all candidates of a layer run in one process, interleaved in rounds of one block each. The engine's own
choice runs twice in each round: how far the two are apart is the noise, below which a difference means nothing.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from layers import (
    GROUPS,
    OWN_CHOICE,
    Layer,
    Prepared,
    Variant,
    exact_result,
    of_network,
    prepare,
    seconds_per_call,
    winograd_variants,
)
from report import Report, Row, describe_machine, save, table_head

import fastseq
from fastseq.testing import MODELS

NETWORKS = [name for name in MODELS if name != "seed1_named"]  # which differs from seed1 in names only


def candidate_variants(layer: Layer) -> list[Variant]:
    """Everything that may be asked for: each kernel of the instruction set in use, with each choice about Winograd.

    Whether a layer runs on what was asked for is found out by running it: a kernel of another operation is not taken.
    """
    isa = fastseq.isa()
    kernels = [row["name"] for row in fastseq.kernels() if row["isa"] == isa and row["supported"]]
    variants = winograd_variants(layer)
    return [v for v in variants if v != OWN_CHOICE] + [
        Variant(f"{v.label}, {name}", v.options, name) for v in variants for name in kernels
    ]


def candidates(layer: Layer, x: torch.Tensor) -> list[Prepared]:
    """The engine's own choice twice, then one candidate for each other kernel that the layer can run on."""
    plain = layer.build()
    exact = exact_result(plain, x)
    found = [prepare(plain, x, exact, OWN_CHOICE) for _ in range(2)]
    kernels = {found[0].kernel}
    names = {row["name"] for row in fastseq.kernels()}
    for variant in candidate_variants(layer):
        prepared = prepare(plain, x, exact, variant)
        # A layer too narrow for what was asked for runs on a narrower kernel, cut up oddly: that has its own turn.
        is_answer = variant.kernel in prepared.kernel or prepared.kernel not in names
        if is_answer and prepared.kernel not in kernels:
            kernels.add(prepared.kernel)
            found.append(prepared)
    return found


def measure(layer: Layer, rounds: int, min_time: float) -> Row:
    """The layer's candidates by time, and what the best of them saves: medians over rounds of ratios within a round."""
    x = layer.example()
    found = candidates(layer, x)
    samples: list[list[float]] = [[] for _ in found]
    order = list(range(len(found)))
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for i in order:
            samples[i].append(seconds_per_call(found[i].native or found[i].module, x, min_time))

    def ratio(i: int) -> float:
        """The time of candidate `i` by that of the own choice, which is the mean of its two."""
        own = [(a + b) / 2 for a, b in zip(samples[0], samples[1], strict=True)]
        return statistics.median(s / o for s, o in zip(samples[i], own, strict=True))

    others = range(2, len(found))
    best = min(others, key=ratio, default=0)
    if best and ratio(best) >= 1:
        best = 0
    return {
        "layer": layer.name,
        "own": found[0].kernel,
        "own_us": statistics.median(samples[0] + samples[1]) * 1e6,
        "best": found[best].kernel,
        "loss": 1 / ratio(best) - 1 if best else 0.0,
        "noise": abs(statistics.median(a / b for a, b in zip(samples[0], samples[1], strict=True)) - 1),
        "candidates": [
            {
                "kernel": found[i].kernel,
                "variant": found[i].variant.label,
                "median_us": statistics.median(samples[i]) * 1e6,
                "of_own": ratio(i) if i > 1 else 1.0,
                "err_rel_max": found[i].error,
            }
            for i in (0, *others)
        ],
    }


def summary(rows: list[Row]) -> Row:
    """Over all layers: how much longer the own choice takes than the best."""
    compared = [row for row in rows if len(row["candidates"]) > 1]
    worst = max(compared, key=lambda row: row["loss"], default=None)
    return {
        "layers": len(rows),
        "without_choice": len(rows) - len(compared),
        "mean_loss": statistics.mean(row["loss"] for row in compared) if compared else None,
        "worst_loss": worst["loss"] if worst else None,
        "worst_layer": worst["layer"] if worst else None,
        "mean_noise": statistics.mean(row["noise"] for row in compared) if compared else None,
    }


def to_markdown(report: Report) -> str:
    machine, totals = report["machine"], summary(report["rows"])
    lines = [
        "# The choice of kernels, one core",
        "",
        f"`{machine['command']}`",
        "",
        f"{machine['cpu']}, fastseq's kernels for {report['isa']}, torch {machine['torch_version']}, commit "
        f"{machine['commit']}, {machine['date']}. Loss: how much longer the engine's own choice takes than the best "
        "kernel; noise: how far two runs of the own choice are apart.",
        "",
    ]
    if totals["mean_loss"] is not None:
        lines += [
            f"{totals['layers'] - totals['without_choice']} layers: mean loss {totals['mean_loss']:.1%}, worst "
            f"{totals['worst_loss']:.1%} ({totals['worst_layer']}), mean noise {totals['mean_noise']:.1%}. "
            f"{totals['without_choice']} more have one kernel only.",
            "",
        ]
    lines += table_head(["layer", "own choice", "best", "others, time by own", "us", "loss", "noise"], text_columns=4)
    for row in report["rows"]:
        others = [c for c in row["candidates"][1:] if c["kernel"] != row["best"]]
        text = ", ".join(f"{short_name(c['kernel'])}: {c['of_own']:.2f}" for c in others)
        best = "the same" if row["best"] == row["own"] else row["best"]
        lines.append(
            f"| {row['layer']} | {row['own']} | {best} | {text} | {row['own_us']:.1f} | {row['loss']:.1%} "
            f"| {row['noise']:.1%} |"
        )
    return "\n".join(lines)


def short_name(kernel: str) -> str:
    """Without type and instruction set, which are the same for all candidates."""
    operation, _, how = kernel.partition("_f32__")
    return f"{operation} {how.split('_')[-1]}".strip()


def layers_of(networks: Iterable[str], groups: Iterable[str], pattern: str) -> list[Layer]:
    """The layers of networks and of the table, each name once."""
    everything = [layer for name in networks for layer in of_network(name)]
    everything += [layer for group in groups for layer in GROUPS[group]]
    by_name = {layer.name: layer for layer in reversed(everything)}
    return [layer for name, layer in reversed(by_name.items()) if re.search(pattern, name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, metavar="NAME", help="all layers of these")
    parser.add_argument("--groups", nargs="*", choices=list(GROUPS), metavar="GROUP", help="layers of bench_layers.py")
    parser.add_argument("--layers", default="", metavar="REGEX", help="only layers whose name matches")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--min-time", type=float, default=0.01, help="seconds per block")
    parser.add_argument("--json", type=Path, help="write rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    arguments = parser.parse_args()
    if not fastseq.native_available():
        sys.exit(f"no native kernels to choose from: {fastseq.native_error()}")
    is_everything = arguments.networks is None and arguments.groups is None
    networks = NETWORKS if is_everything else arguments.networks or ()
    groups = GROUPS if is_everything else arguments.groups or ()
    layers = layers_of(networks, groups, arguments.layers)
    if not layers:
        parser.error(f"no layer to time matches {arguments.layers!r}")
    torch.set_num_threads(1)
    report: Report = {"machine": describe_machine(), "isa": fastseq.isa(), "rows": []}
    with torch.inference_mode():
        for number, layer in enumerate(layers, 1):
            print(f"[{number}/{len(layers)}] {layer.name}", file=sys.stderr, flush=True)
            report["rows"].append(measure(layer, arguments.rounds, arguments.min_time))
            report["summary"] = summary(report["rows"])
            save(report, arguments.json, arguments.markdown, to_markdown)
    print(to_markdown(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
