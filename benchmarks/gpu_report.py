"""What gpu_check.py writes: bars, failures, the Markdown file and the summary at the end of its output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gpu_peers import CONTENDERS, OURS, PEERS

Row = dict[str, Any]
Report = dict[str, Any]

SEEDS = ("seed1", "seed2", "seed3", "lenet5")
NARROW = ("mlp64", "mlp128", "mlp256")
LARGE = ("alexnet", "vgg16", "mlp4096")
MOST_LINES = 25
SECOND_SEED_US = 4.0


# Judgement -----------------------------------------------------------------------------------------------------------


def grouped(rows: Iterable[Row]) -> dict[tuple[str, int, str], dict[str, Row]]:
    """By case, then by contender."""
    groups: dict[tuple[str, int, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["batch"], row["dtype"]), {})[row["contender"]] = row
    return groups


def best(rows: dict[str, Row], names: Sequence[str], metric: str) -> tuple[str, float] | None:
    """The contender of `names` with the least time, and the time."""
    times = [(rows[name][metric], name) for name in names if name in rows and rows[name].get(metric)]
    return (min(times)[1], min(times)[0]) if times else None


def bars(rows: Iterable[Row]) -> list[Row]:
    """Each case that a bar speaks of: how many times faster than the best peer fastseq is, and should be."""
    judged = []
    for (network, batch, dtype), group in grouped(rows).items():
        case = {"network": network, "batch": batch, "dtype": dtype}
        for metric, needed in bars_of(network, batch):
            ours, peer = best(group, OURS, metric), best(group, PEERS, metric)
            if ours is None or peer is None:
                continue
            ratio = peer[1] / ours[1]
            row = {**case, "bar": f"{metric_name(metric)} >= {needed:g}x", "ratio": ratio, "met": ratio >= needed}
            row.update(ours=ours[0], ours_us=ours[1], best_peer=peer[0], peer_us=peer[1])
            row["peers_timed"] = [name for name in PEERS if group.get(name, {}).get("latency_us")]
            if group.get("fastseq", {}).get(metric):
                row["ratio_of_plain_call"] = peer[1] / group["fastseq"][metric]
            judged.append(row)
        fast = group.get("fastseq", {})
        if network == "seed2" and fast.get("graph_us"):
            met = fast["graph_us"] < SECOND_SEED_US and fast.get("nodes") == 1
            bar = f"one launch, device < {SECOND_SEED_US:g} us"
            judged.append({**case, "bar": bar, "met": met, "ours_us": fast["graph_us"], "launches": fast.get("nodes")})
    return judged


def bars_of(network: str, batch: int) -> list[tuple[str, float]]:
    """Metric and factor."""
    if network in SEEDS and batch <= 256:
        return [("latency_us", 2.0)]
    if network in NARROW and batch >= 4096:
        return [("device_us", 2.0), ("latency_us", 2.0)]
    if network in LARGE:
        return [("device_us", 1.0), ("latency_us", 1.0)]
    return []


def metric_name(metric: str) -> str:
    return {"latency_us": "end to end", "device_us": "device"}[metric]


def failures(report: Report) -> list[str]:
    """Whatever was incorrect, in words."""
    found = []
    for row in report["correctness"]:
        if row.get("problems"):
            found.append(f"correctness, {row['task']}: {'; '.join(row['problems'])}")
    for row in report["sanitizer"]:
        if row.get("problems"):
            found.append(f"{row['tool']}, {row['task']}: {'; '.join(row['problems'])}")
    for row in report["bench"]:
        problem = row.get("problem") or ""
        if row["contender"] in OURS and problem and not problem.startswith("not run"):
            found.append(f"bench, {case_name(row)}, {row['contender']}: {problem}")
    for row in report["bench_lost"]:
        if row["stage"] in OURS:
            found.append(f"bench, {row['task']}, at {row['stage']}: {row['problem']}")
    return found


def exit_code(report: Report) -> int:
    """1 if anything was incorrect, else 2 if a phase could not run, else 0."""
    if report["failures"]:
        return 1
    return 2 if any(phase["status"] == "could not run" for phase in report["phases"]) else 0


# Text ----------------------------------------------------------------------------------------------------------------


def case_name(row: Row) -> str:
    return f"{row['network']}, batch {row['batch']}, {row['dtype']}"


def number(value: Any) -> str:
    """Three significant digits, without an exponent; "" for nothing."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if value == 0 or 0.001 <= abs(value) < 1e6:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.2e}"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> list[str]:
    """A Markdown table, the first `left` columns of text and the others of numbers."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * left + "---:|" * (len(columns) - left)]
    for row in rows:
        cells = [number(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def to_markdown(report: Report) -> str:
    machine = report["machine"]
    lines = [f"`{report['command']}`", ""]
    if report["dry_run"]:
        lines += ["**Dry run: no GPU was used, nothing here is a measurement of one.**", ""]
    lines += [f"{key}: {value}  " for key, value in machine.items()]
    lines += ["", "## Phases", ""]
    keys = ["name", "status", "note", "seconds"]
    lines += table(keys, ([phase[key] for key in keys] for phase in report["phases"]), 3)
    lines += ["", "## Incorrect", "", *([f"- {line}" for line in report["failures"]] or ["Nothing found."])]
    if report["ceilings"]:
        lines += ["", "## Ceilings", "", *table(["ceiling", "value"], report["ceilings"].items())]
    if report["bars"]:
        columns = ["case", "bar", "met", "ours", "best peer", "our us", "its us", "ratio", "plain call's", "launches"]
        keys = ["bar", "met", "ours", "best_peer", "ours_us", "peer_us", "ratio", "ratio_of_plain_call", "launches"]
        rows = [[case_name(row), *(row.get(key) for key in keys)] for row in report["bars"]]
        lines += ["", "## Bars", "", *table(columns, rows, 5)]
    lines += correctness_lines(report) + bench_lines(report) + plan_lines(report)
    if report["probe"]:
        lines += ["", "## cuDNN and pooling", "", *table(["question", "answer"], report["probe"].items(), 2)]
    return "\n".join(lines) + "\n"


def correctness_lines(report: Report) -> list[str]:
    lines: list[str] = []
    if report["correctness"]:
        columns = ["task", "result", "notes", "checks", "error", "eager's", "allowed"]
        keys = ["checks", "error", "eager_error", "limit"]
        rows = [
            [row["task"], verdict(row), "; ".join(row.get("notes", [])), *(row.get(key) for key in keys)]
            for row in report["correctness"]
        ]
        lines += ["", "## Correctness", "", *table(columns, rows, 3)]
    if report["sanitizer"]:
        rows = [[r["tool"], r["task"], verdict(r), r.get("checks")] for r in report["sanitizer"]]
        lines += ["", "## Sanitizer", "", *table(["tool", "kernel", "result", "checks"], rows, 3)]
    return lines


def verdict(row: Row) -> str:
    if row.get("problems"):
        return f"WRONG: {'; '.join(row['problems'])}"
    for key in ("not_run", "skipped"):
        if row.get(key):
            return f"{key.replace('_', ' ')}: {row[key]}"
    return "ok"


def bench_lines(report: Report) -> list[str]:
    rows = report["bench"]
    if not rows:
        return []
    lines = []
    names = list(CONTENDERS)
    for title, metric in (
        ("End to end: call and wait, microseconds", "latency_us"),
        ("Device time per call, microseconds", "device_us"),
        ("Host time per call, microseconds", "host_us"),
    ):
        body = []
        for (network, batch, dtype), group in grouped(rows).items():
            any_row = next(iter(group.values()))
            times = [group.get(name, {}).get(metric) or short_problem(group.get(name)) for name in names]
            label = f"{network}, batch {batch}, {dtype}"
            body.append([label, *times, any_row.get("floor_us"), group.get("fastseq", {}).get("of_floor")])
        columns = ["case", *names, "floor", "fastseq's device time / floor"]
        lines += ["", f"## {title}", "", *table(columns, body)]
    keys = ["nodes", "error", "rounds", "clock_mhz"]
    details = [
        [case_name(row), row["contender"], row.get("problem") or row.get("note"), *(row.get(key) for key in keys)]
        for row in rows
    ]
    columns = ["case", "contender", "note or problem", "nodes", "error", "rounds", "SM MHz"]
    lines += ["", "## Contenders", "", *table(columns, details, 3)]
    if report["not_reached"]:
        lines += ["", f"Not reached: {'; '.join(report['not_reached'])}."]
    return lines


def short_problem(row: Row | None) -> str:
    return "" if row is None or not row.get("problem") else row["problem"].split(":")[0]


def plan_lines(report: Report) -> list[str]:
    if not report["plans"]:
        return []
    columns = ["case", "device", "kernels", "launches", "arena bytes", "packed elements", "nominal floor us"]
    rows = [
        [
            *(case_name(row), row["device"], row.get("problem") or ", ".join(row["kernels"] + row["refused"])),
            *(row.get(key) for key in ("launches", "arena_bytes", "packed_elements", "floor_us")),
        ]
        for row in report["plans"]
    ]
    return ["", "## Plans", "", *table(columns, rows, 3)]


def summary(report: Report, files: Sequence[str]) -> str:
    """What the caller sees last: failures, what could not run, then the bars."""
    lines = ["", "=" * 100]
    if report["failures"]:
        lines.append(f"INCORRECT: {len(report['failures'])}")
        lines += [f"  {line[:300]}" for line in report["failures"][:MOST_LINES]]
        if len(report["failures"]) > MOST_LINES:
            lines.append(f"  and {len(report['failures']) - MOST_LINES} more")
    else:
        lines.append("INCORRECT: nothing found")
    for phase in report["phases"]:
        lines.append(f"{phase['name']:<12}{phase['status']:<15}{phase['seconds']:6.1f} s  {phase['note'][:200]}")
    correct = report["correctness"]
    if correct:
        skipped = [row["task"] for row in correct if row.get("skipped")]
        checks = sum(row.get("checks", 0) for row in correct)
        lines.append(f"correctness: {checks} checks in {len(correct)} tasks; skipped: {', '.join(skipped) or 'none'}")
    if report["ceilings"]:
        text = ", ".join(f"{name} {number(value)}" for name, value in report["ceilings"].items())
        lines.append(f"ceilings: {text}")
    peers_failed: dict[str, int] = {}
    for row in report["bench"]:
        if row["contender"] in PEERS and row.get("problem"):
            key = f"{row['contender']} {short_problem(row)}"
            peers_failed[key] = peers_failed.get(key, 0) + 1
    if peers_failed:
        lines.append("peers: " + ", ".join(f"{key} {count}x" for key, count in peers_failed.items()))
    for row in report["bars"]:
        mark = "met   " if row["met"] else "MISSED"
        if "ratio" in row:
            what = f"{number(row['ratio'])}x: {row['ours']} {number(row['ours_us'])} us"
            what += f", {row['best_peer']} {number(row['peer_us'])} us"
            if "compile_max" not in row["peers_timed"]:
                what += " (compile_max not timed)"
            if row["ours"] != "fastseq" and "ratio_of_plain_call" in row:
                what += f"; plain call {number(row['ratio_of_plain_call'])}x"
        else:
            what = f"{number(row['ours_us'])} us, {row['launches']} launches"
        lines.append(f"{mark} {case_name(row):<32} {row['bar']:<28} {what}")
    if report["dry_run"]:
        lines.append("dry run: no GPU was used, nothing above is a measurement of one")
    lines += [f"wrote {file}" for file in files]
    return "\n".join(lines)
