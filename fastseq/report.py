"""What was decided, and how it prints: explain, stats."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastseq import _native
from fastseq.matcher import IN_BFLOAT16, EagerSegment, Leaf, Match, is_excluded, match
from fastseq.module import FusedModule, match_forward, refuse_class
from fastseq.optimize import has_bf16_kernels, isa
from fastseq.plan import CompiledMatch
from fastseq.program import add_stats
from fastseq.sequential import KINDS, FusedSequential, compiled_of


class Report:
    """What `explain` found. `str(report)` is a table, `report.to_dict()` the same as plain data."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: {"isa", "native_error", "sequentials", "forwards", "fallbacks"}.

        "sequentials" and "forwards" are lists of {"path", "fused", "note", "segments"}: one for each Sequential, and
        one for each other module that has something to fuse inside and a forward of its own. "segments" are native
        runs and eager layers in order. A forward that does not run as one plan has none, and "note" says why.
        """
        return copy.deepcopy(self._data)

    def __repr__(self) -> str:
        return f"<fastseq.Report of {len(self._data['sequentials'])} Sequentials>"

    def __str__(self) -> str:
        data = self._data
        error = data["native_error"]
        lines = [f"fastseq: kernels for {data['isa']}" if error is None else f"fastseq: everything runs eager: {error}"]
        rows = [("layers", "runs as", "kernel", "output", "why")]
        for entry in data["forwards"] + data["sequentials"]:
            rows.append((entry["path"] or "(model)", "", "", "", entry["note"]))
            for segment in entry["segments"]:
                if segment["kind"] == "eager":
                    rows.append((f"  {segment['layer']}", "eager", "", "", segment["reason"]))
                    continue
                for i, step in enumerate(segment["steps"]):
                    mark = "  " if i == 0 else "  + "
                    rows.append(
                        (mark + " ".join(step["layers"]), step["name"], step["kernel"], step["output"], step["note"])
                    )
        if len(rows) == 1:
            lines.append("the model holds no nn.Sequential and no other layers to fuse")
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
            names the kernels and output sizes that were used and the reasons for fallbacks during that call. Without
            it the report has those of all calls since the last `reset_stats`, in every thread.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        Exception: whatever `model(x)` raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastseq.explain expects a torch.nn.Module, got {type(model).__name__}")
    declined: dict[int, str] = {}
    if x is None:
        fallbacks = stats(model)["fallbacks"]
    else:
        before, declined_before = stats(model)["fallbacks"], _declined(model)
        for compiled in _all_compiled(model):
            compiled.forget_last_plans()
        with torch.no_grad():
            model(x)
        fallbacks = news(before, stats(model)["fallbacks"])
        for key, reasons in _declined(model).items():
            declined.update((key, reason) for reason in news(declined_before.get(key, {}), reasons))
    sequentials, forwards = [], []
    inside: dict[int, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            sequentials.append(_describe(path, module, inside))
        elif entry := _describe_forward(path, module, inside, declined.get(id(module), "")):
            forwards.append(entry)
    error = _native.native_error()
    engine = "CUDA" if any(parameter.is_cuda for parameter in model.parameters()) else isa()
    data = {
        "isa": engine,
        "native_error": error,
        "sequentials": sequentials,
        "forwards": forwards,
        "fallbacks": fallbacks,
    }
    return Report(data)


def news(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """What `after` counts more than `before`."""
    return {reason: n - before.get(reason, 0) for reason, n in after.items() if n > before.get(reason, 0)}


def _describe(path: str, module: nn.Sequential, inside: dict[int, str]) -> dict[str, Any]:
    # Subclasses too: torch's fully_shard makes one of the module's class, and changes none of its methods.
    is_fused = isinstance(module, FusedSequential)
    entry: dict[str, Any] = {"path": path, "fused": is_fused, "note": "", "segments": []}
    if id(module) in inside:
        entry["note"] = f"runs inside {inside[id(module)] or '(model)'}"
        return entry
    if is_excluded(module):
        entry["note"] = "excluded by optimize(exclude=...)"
        return entry
    if type(module) not in KINDS and not is_fused:
        entry["note"] = f"{type(module).__name__} is a subclass of nn.Sequential; it keeps its own forward"
        return entry
    compiled = compiled_of(module)
    if compiled is not None and not compiled.is_current(module):
        compiled = None
    found = match(module, KINDS) if compiled is None else compiled.match
    entry["segments"] = list(_segments(found, compiled))
    if not found.has_native:
        entry["note"] = "nothing to fuse"
    elif type(module) is nn.Sequential:
        entry["note"] = "not optimised: fastseq.optimize would fuse this"
    else:
        entry["note"] = _in_bfloat16(module)
        inside.update((id(container), path) for container in found.nested)
    return entry


def _describe_forward(path: str, module: nn.Module, inside: dict[int, str], declined: str) -> dict[str, Any] | None:
    """Of a module with a forward of its own, None where there is nothing to tell. `declined`: why its last call was."""
    is_fused = isinstance(module, FusedModule)
    entry: dict[str, Any] = {"path": path, "fused": is_fused, "note": "", "segments": []}
    if id(module) in inside:
        entry["note"] = f"runs inside {inside[id(module)] or '(model)'}"
        return entry
    is_torchs = type(module).__module__.split(".")[0] == "torch" and not is_fused
    if is_torchs or is_excluded(module) or not module._modules:
        return None
    compiled = compiled_of(module)
    if compiled is not None and not compiled.is_current(module):
        compiled = None
    found = match_forward(module)
    if isinstance(found, str) or declined:
        reason = declined or found
        entry["note"] = f"runs as it is, each Sequential in it by itself: {reason}"
        return entry if is_fused or any(isinstance(child, nn.Sequential) for child in module.modules()) else None
    if not entry["fused"]:
        refused = refuse_class(module)
        entry["note"] = (
            "not optimised: fastseq.optimize would run its forward as one plan"
            if refused is None
            else f"runs as it is, each Sequential in it by itself: {refused}"
        )
        return entry
    made = found[0] if compiled is None else compiled.match
    if not made.has_native:
        reasons = [segment.reason for segment in made.segments if isinstance(segment, EagerSegment)]
        entry["note"] = f"runs as it is, each Sequential in it by itself: {next(iter(reasons), 'nothing to fuse')}"
        return entry
    entry["note"] = "; ".join(filter(None, ["its forward is a straight line: runs as one plan", _in_bfloat16(module)]))
    entry["segments"] = list(_segments(made, compiled))
    inside.update((id(container), path) for container in made.nested)
    return entry


def _segments(found: Match, compiled: CompiledMatch | None) -> Iterator[dict[str, Any]]:
    nothing = [None] * len(found.segments)
    runs, all_slower = (compiled.runs, compiled.slower) if compiled is not None else (nothing, nothing)
    for segment, run, slower in zip(found.segments, runs, all_slower, strict=True):
        if isinstance(segment, EagerSegment):
            yield {"kind": "eager", "layer": _layer_text(segment.leaf), "reason": segment.reason}
            continue
        plan = None if run is None else run.describe()
        made_of = iter(plan["steps"]) if plan is not None else None
        native = [[{} if made_of is None else next(made_of) for _ in step.natives] for step in segment.steps]
        steps = [
            {
                "name": step.pattern,
                "layers": [leaf.path for leaf in step.leaves],
                "kernel": made.get("kernel", ""),
                "dtype": dtype_of(made.get("kernel", "")),
                "output": made.get("output", ""),
                "flops": made.get("flops"),
                "packed_bytes": made.get("packed_bytes"),
                "note": "; ".join(filter(None, [*(f"behind {b['kernel']}" for b in before if b), made.get("note")])),
            }
            for step, (*before, made) in zip(segment.steps, native, strict=True)
        ]
        if slower is not None:
            steps[0]["note"] = "; ".join(filter(None, [steps[0]["note"], str(slower)]))
        yield {"kind": "native", "steps": steps, "scratch_bytes": None if plan is None else plan["scratch_bytes"]}


def dtype_of(kernel: str) -> str:
    """What a kernel of the CPU multiplies, whatever the model is stored in."""
    return {"f32": "float32", "bf16": "bfloat16"}.get(kernel.partition("__")[0].rpartition("_")[2], "")


def _in_bfloat16(module: nn.Module) -> str:
    if IN_BFLOAT16 not in module.__dict__:
        return ""
    if has_bf16_kernels():
        return "compute_dtype: bfloat16 where a kernel has it"
    return "compute_dtype: this CPU, or FASTSEQ_ISA, has no kernels for bfloat16, so everything is float32"


def _layer_text(leaf: Leaf) -> str:
    return f"{leaf.path}: {type(leaf.layer).__name__}" if leaf.call is None else f"{leaf.path}()"


def stats(model: nn.Module) -> dict[str, Any]:
    """Counters of an optimised model since the last reset.

    Returns:
        {"fused_calls": native calls made, "eager_calls": calls that ran eager instead, "fallbacks": {reason: count}}.
        A forward that does not run as one plan counts only where no Sequential inside counts for itself.
    """
    return add_stats(_counters(module) for module in model.modules())


def _counters(module: nn.Module) -> dict[str, Any]:
    compiled = compiled_of(module)
    if compiled is None:
        return add_stats([])
    counters = compiled.stats()
    if isinstance(module, FusedModule) and not any(isinstance(child, FusedSequential) for child in module.modules()):
        declined = compiled.declined()
        counters = add_stats(
            [counters, {"fused_calls": 0, "eager_calls": sum(declined.values()), "fallbacks": declined}]
        )
    return counters


def _declined(model: nn.Module) -> dict[int, dict[str, int]]:
    """By id of the module: why and how often a forward did not run as one plan."""
    return {id(m): compiled.declined() for m in model.modules() if (compiled := compiled_of(m)) is not None}


def reset_stats(model: nn.Module) -> None:
    """Set the counters of `stats` to zero."""
    for compiled in _all_compiled(model):
        compiled.reset_stats()


def _all_compiled(model: nn.Module) -> list[CompiledMatch]:
    return [compiled for compiled in map(compiled_of, model.modules()) if compiled is not None]
