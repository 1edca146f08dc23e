"""A plot of what bench_models.py measured: every engine on every case, by the machine's limit. Needs matplotlib.

    python benchmarks/plot_results.py rows.json --out benchmarks/results/plot.png
    python benchmarks/plot_results.py small.json large.json --threads 1 2 --out plot.svg

Several files of one machine are taken together, as report.py does. A point at 1 takes as long as the network's
multiply-adds at the peak measured in the same run, or as reading its weights, layer by layer the longer of the two.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import Report, count, load, merge

from fastseq.testing import MODELS

# Marker and colour of each engine; fastseq comes last, on top of the others. Colours that the colour-blind tell apart.
STYLES = {
    "eager": ("o", "#7f7f7f"),
    "eager_channels_last": ("s", "#7f7f7f"),
    "compile": ("o", "#56b4e9"),
    "compile_max": ("s", "#0072b2"),
    "jit_ofi": ("^", "#999933"),
    "onnxruntime": ("v", "#009e73"),
    "openvino": ("D", "#cc79a7"),
    "ncnn": ("P", "#e69f00"),
    "fastseq": ("*", "#d62728"),
}
AXIS = (
    "machine's limit / time of a call   (right is faster)\n"
    "limit: sum over layers of max(multiply-adds / FMA peak, weights / read bandwidth), both measured in the same run\n"
    "Winograd needs fewer multiply-adds and may pass 1"
)
TICKS = [digit * 10.0**power for power in range(-6, 2) for digit in (1, 2, 5)]


@dataclass(frozen=True)
class Line:
    """A case at one batch size, and how much of the limit each engine reaches."""

    label: str
    limited_by: str
    of_limit: dict[str, float]


def lines_of(report: Report, threads: int) -> list[Line]:
    """The lines of a plot, in the order of the table of networks; without those that have no limit or no times."""
    rows = [row for row in report["rows"] if row["threads"] == threads and row.get("of_limit")]
    order = list(MODELS)
    keys = sorted({(order.index(row["case"]), row["batch"]) for row in rows if row["case"] in MODELS})
    lines = []
    for index, batch in keys:
        case = MODELS[order[index]]
        found = [row for row in rows if (row["case"], row["batch"]) == (case.name, batch)]
        of_limit = {row["backend"]: row["of_limit"] for row in found}
        lines.append(Line(f"{case.title or case.name}, batch {batch}", found[0]["limited_by"], of_limit))
    return lines


def draw(report: Report, threads: list[int], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {number: lines_of(report, number) for number in threads}
    height = max(map(len, panels.values()))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.2 + 5.2 * (len(panels) - 1), 2.1 + 0.33 * height), sharey=False, squeeze=False
    )
    for axis, (number, lines) in zip(axes[0], panels.items(), strict=True):
        _draw_panel(axis, lines)
        axis.set_title(f"{report['machine']['cpu']}, {count(number, 'thread')}", fontsize=9)
    texts = [[text.get_text() for text in axis.get_yticklabels()] for axis in axes[0]]
    for axis, text in zip(axes[0][1:], texts[1:], strict=True):
        if text == texts[0]:
            axis.set_yticklabels([])
    handles, labels = _legend(axes[0])
    figure.legend(handles, labels, loc="upper center", ncols=min(len(labels), 5), fontsize=8, frameon=False)
    figure.supxlabel(AXIS, fontsize=7.5)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / figure.get_figheight()))
    out.parent.mkdir(parents=True, exist_ok=True)
    # No date in the file, so that the same numbers give the same bytes.
    figure.savefig(out, dpi=110, metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)


def _draw_panel(axis: Any, lines: list[Line]) -> None:
    for y, line in enumerate(lines):
        best = max((value for name, value in line.of_limit.items() if name != "fastseq"), default=None)
        own = line.of_limit.get("fastseq")
        if own and best:  # from the best peer to fastseq
            axis.plot([best, own], [y, y], color=STYLES["fastseq"][1], linewidth=1.2, alpha=0.5, zorder=1)
        for name, value in line.of_limit.items():
            marker, colour = STYLES.get(name, ("x", "black"))
            is_own = name == "fastseq"
            axis.plot(
                value, y, marker, color=colour, markersize=11 if is_own else 5, zorder=3 if is_own else 2, label=name
            )
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yticks(range(len(lines)), [f"{line.label} ({line.limited_by})" for line in lines], fontsize=8)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    low, high = axis.get_xlim()
    axis.set_xticks([tick for tick in TICKS if low <= tick <= high])
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, _: "")
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", which="both", linewidth=0.3, alpha=0.6)
    axis.grid(axis="y", linewidth=0.3, alpha=0.6)


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    """Each engine once, in the order of STYLES."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    names = [name for name in STYLES if name in found] + [name for name in found if name not in STYLES]
    return [found[name] for name in names], names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="JSON", help="what bench_models.py or report.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="the plot: .png, .svg or .pdf")
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", help="a panel for each (all there are)")
    arguments = parser.parse_args()
    if arguments.out.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--out names {arguments.out.name}; expected .png, .svg or .pdf")
    try:
        report = merge([load(path) for path in arguments.files])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    threads = arguments.threads or sorted({row["threads"] for row in report["rows"]})
    without = [number for number in threads if not lines_of(report, number)]
    if without or not threads:
        which = " or ".join(map(str, without)) or "any"
        parser.error(f"no row for {which} thread(s) has a limit; files from before limits were measured have none")
    draw(report, threads, arguments.out)


if __name__ == "__main__":
    main()
