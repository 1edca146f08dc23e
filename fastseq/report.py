"""What was decided, and how it prints: explain, stats, verify."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastseq import _native
from fastseq.matcher import EagerSegment, Match, match
from fastseq.optimize import isa
from fastseq.plan import CompiledMatch
from fastseq.program import add_stats
from fastseq.reference import plain_copy
from fastseq.sequential import FusedSequential, compiled_of


class Report:
    """What `explain` found. `str(report)` is a table, `report.to_dict()` the same as plain data."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: {"isa", "native_error", "sequentials": [{"path", "fused", "note", "segments"}], "fallbacks"}."""
        return copy.deepcopy(self._data)

    def __repr__(self) -> str:
        return f"<fastseq.Report of {len(self._data['sequentials'])} Sequentials>"

    def __str__(self) -> str:
        data = self._data
        error = data["native_error"]
        lines = [f"fastseq: kernels for {data['isa']}" if error is None else f"fastseq: everything runs eager: {error}"]
        rows = [("layers", "runs as", "kernel", "output", "why")]
        for sequential in data["sequentials"]:
            rows.append((sequential["path"] or "(model)", "", "", "", sequential["note"]))
            for segment in sequential["segments"]:
                if segment["kind"] == "eager":
                    rows.append((f"  {segment['layer']}", "eager", "", "", segment["reason"]))
                    continue
                for i, step in enumerate(segment["steps"]):
                    mark = "  " if i == 0 else "  + "
                    rows.append(
                        (mark + " ".join(step["layers"]), step["name"], step["kernel"], step["output"], step["note"])
                    )
        if len(rows) == 1:
            lines.append("the model holds no nn.Sequential: nothing to fuse")
        else:
            widths = [max(len(row[column]) for row in rows) for column in range(4)]
            for row in rows:
                cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
                lines.append("  ".join([*cells, row[4]]).rstrip())
            lines.append("'+' marks steps that run in the same native call as the line above")
        for reason, count in data["fallbacks"].items():
            lines.append(f"fell back {count}x: {reason}")
        return "\n".join(lines)


def explain(model: nn.Module, x: Any = None) -> Report:
    """Which layers run in which fused step with which kernel, and which stay eager and why.

    Args:
        model: an optimised model; of any other module it tells what `optimize` would do.
        x: an input of the model. If given, the model is called once with it under `torch.no_grad()`, and the report
            names the kernels and output sizes that were used and the reasons for fallbacks during that call.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        Exception: whatever `model(x)` raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastseq.explain expects a torch.nn.Module, got {type(model).__name__}")
    fallbacks: dict[str, int] = {}
    if x is not None:
        before = stats(model)["fallbacks"]
        for compiled in _all_compiled(model):
            compiled.forget_last_plans()
        with torch.no_grad():
            model(x)
        after = stats(model)["fallbacks"]
        fallbacks = {r: n - before.get(r, 0) for r, n in after.items() if n > before.get(r, 0)}
    sequentials = []
    inside: dict[int, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            sequentials.append(_describe(path, module, inside))
    error = _native.native_error()
    engine = "CUDA" if any(parameter.is_cuda for parameter in model.parameters()) else isa()
    data = {"isa": engine, "native_error": error, "sequentials": sequentials, "fallbacks": fallbacks}
    return Report(data)


def _describe(path: str, module: nn.Sequential, inside: dict[int, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": path, "fused": type(module) is FusedSequential, "note": "", "segments": []}
    if id(module) in inside:
        entry["note"] = f"runs inside {inside[id(module)] or '(model)'}"
        return entry
    if type(module) not in (nn.Sequential, FusedSequential):
        entry["note"] = f"{type(module).__name__} is a subclass of nn.Sequential; it keeps its own forward"
        return entry
    compiled = compiled_of(module)
    if compiled is not None and not compiled.is_current(module):
        compiled = None
    found = match(module, (nn.Sequential, FusedSequential)) if compiled is None else compiled.match
    entry["segments"] = list(_segments(found, compiled))
    if not found.has_native:
        entry["note"] = "nothing to fuse"
    elif type(module) is nn.Sequential:
        entry["note"] = "not optimised: fastseq.optimize would fuse this"
    else:
        inside.update((id(container), path) for container in found.nested)
    return entry


def _segments(found: Match, compiled: CompiledMatch | None) -> Iterator[dict[str, Any]]:
    runs = compiled.runs if compiled is not None else [None] * len(found.segments)
    for segment, run in zip(found.segments, runs, strict=True):
        if isinstance(segment, EagerSegment):
            layer = f"{segment.leaf.path}: {type(segment.leaf.layer).__name__}"
            yield {"kind": "eager", "layer": layer, "reason": segment.reason}
            continue
        plan = None if run is None else run.describe()
        native = [{}] * len(segment.steps) if plan is None else plan["steps"]
        steps = [
            {
                "name": step.pattern,
                "layers": [leaf.path for leaf in step.leaves],
                "kernel": made.get("kernel", ""),
                "output": made.get("output", ""),
                "flops": made.get("flops"),
                "packed_bytes": made.get("packed_bytes"),
                "note": made.get("note", ""),
            }
            for step, made in zip(segment.steps, native, strict=True)
        ]
        yield {"kind": "native", "steps": steps, "scratch_bytes": None if plan is None else plan["scratch_bytes"]}


def stats(model: nn.Module) -> dict[str, Any]:
    """Counters of all FusedSequentials since the last reset.

    Returns:
        {"fused_calls": native calls made, "eager_calls": calls that ran eager instead, "fallbacks": {reason: count}}.
    """
    return add_stats(compiled.stats() for compiled in _all_compiled(model))


def reset_stats(model: nn.Module) -> None:
    """Set the counters of `stats` to zero."""
    for compiled in _all_compiled(model):
        compiled.reset_stats()


def _all_compiled(model: nn.Module) -> list[CompiledMatch]:
    return [compiled for compiled in map(compiled_of, model.modules()) if compiled is not None]


def verify(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Errors of the optimised model and of eager against a float64 copy, on one input.

    Args:
        model: an optimised model whose forward takes one tensor and returns one; put it in eval mode.
        x: float32 input.

    Returns:
        {"max_abs_error", "eager_max_abs_error", "scale": largest magnitude of the float64 result, "ratio": error over
        eager's error, "fused_calls", "fallbacks"}. A ratio near 1 means as accurate as eager; both errors are rounding.
    """
    reset = stats(model)
    with torch.no_grad():
        actual = model(x)
        eager = plain_copy(model)(x)
        exact = plain_copy(model).double()(x.double())
    after = stats(model)
    error = (actual.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    return {
        "max_abs_error": error,
        "eager_max_abs_error": eager_error,
        "scale": exact.abs().max().item(),
        "ratio": error / eager_error if eager_error else (0.0 if error == 0 else float("inf")),
        "fused_calls": after["fused_calls"] - reset["fused_calls"],
        "fallbacks": {
            r: n - reset["fallbacks"].get(r, 0)
            for r, n in after["fallbacks"].items()
            if n > reset["fallbacks"].get(r, 0)
        },
    }
