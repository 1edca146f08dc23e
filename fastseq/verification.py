"""verify: the optimised model, eager and float64 side by side on one input, as a whole and step by step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastseq._native import native_available
from fastseq.matcher import IN_BFLOAT16, Leaf, Match, NativeSegment, Step, is_flatten, match
from fastseq.module import FusedModule, match_forward
from fastseq.plan import CompiledMatch
from fastseq.reference import plain_copy
from fastseq.report import news, stats
from fastseq.sequential import KINDS, FusedSequential

FACTOR = 4.0  # how far from float64 a result may be, in errors of eager
IN_BFLOAT16_ALLOWED = 4 * torch.finfo(torch.bfloat16).eps  # and where float32 layers multiply in bfloat16


class Verification:
    """What `verify` found. `str(v)` is a table, `v.to_dict()` the same as plain data, `v.ok` the verdict."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data

    @property
    def ok(self) -> bool:
        """Whether the result is as accurate as eager's, within the bound of `allowed`, with special values in the same
        places."""
        return bool(self._data["ok"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able. Of the whole result: "fused_calls", "fallbacks", and the fields of each of the "steps":

        "error", "eager_error": norm of the difference from float64 over the norm of float64's result, of finite values;
        "allowed": the larger of four times eager's error and eight roundings of the dtype, or, with
        `optimize(compute_dtype=torch.bfloat16)`, four roundings of bfloat16; "max_abs_error",
        "eager_max_abs_error", "scale": largest difference and largest magnitude; "special_values": how many NaN, inf
        and -inf stand elsewhere than in eager's result; "worst": index and values of the element furthest from float64;
        "ok". Steps also have "path", "layers", "name", "kernel" and "is_fused"; each gets eager's result of the one
        before.
        """
        return copy.deepcopy(self._data)

    def __repr__(self) -> str:
        return f"<fastseq.Verification: {'ok' if self.ok else 'NOT ok'}, {len(self._data['steps'])} steps>"

    def __str__(self) -> str:
        data = self._data
        rows = [("step", "kernel", "error", "eager", "allowed", "special values", "")]
        whole = {**data, "path": "", "layers": ["the whole model"], "kernel": "", "is_fused": bool(data["fused_calls"])}
        for entry in [*data["steps"], whole]:
            where = f"{entry['path'] or '(model)'}: " if entry is not whole else ""
            moved = sum(entry["special_values"].values())
            rows.append(
                (
                    where + " ".join(entry["layers"]),
                    entry["kernel"] if entry["is_fused"] else "eager",
                    f"{entry['error']:.2e}",
                    f"{entry['eager_error']:.2e}",
                    f"{entry['allowed']:.2e}",
                    f"{moved} moved" if moved else "as eager",
                    "ok" if entry["ok"] else "NOT ok",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(7)]
        lines = ["fastseq: relative errors against float64"]
        lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if (worst := data["worst"]) is not None:
            lines.append(
                f"worst element {worst['index']}: fused {worst['actual']!r}, eager {worst['eager']!r}, "
                f"float64 {worst['exact']!r}"
            )
        lines += [f"fell back {count}x: {reason}" for reason, count in data["fallbacks"].items()]
        return "\n".join(lines)


def verify(model: nn.Module, x: Tensor) -> Verification:
    """An optimised model against eager and a float64 copy, on one input.

    The model is called once as it is; copies of it run eager and in float64, and each fused step by itself.

    Args:
        model: an optimised model whose forward takes one tensor and returns one; put it in eval mode.
        x: an input, such as float32 (batch, channels, height, width).

    Returns:
        Errors, special values, the worst element and which step is to blame, as a table and as data.

    Raises:
        TypeError: `model` is not an `nn.Module`, or its result is not one floating-point tensor.
        Exception: whatever `model(x)` raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastseq.verify expects a torch.nn.Module, got {type(model).__name__}")
    before = stats(model)
    plain = plain_copy(model)
    with torch.no_grad():
        actual = model(_own(x))
        after = stats(model)
        if not isinstance(actual, Tensor) or not actual.is_floating_point():
            raise TypeError(
                f"fastseq.verify compares results that are one floating-point tensor, got {type(actual).__name__}"
            )
        exact = copy.deepcopy(plain).double()(_double(x))
        inputs: dict[str, Tensor] = {}
        matches = dict(_matches(model, plain))
        handles = [_record(plain.get_submodule(path), path, inputs) for path in matches]
        eager = plain(_own(x))
        for handle in handles:
            handle.remove()
        steps = [
            step
            for path, found in matches.items()
            if path in inputs
            for step in _steps(path, found, inputs[path], IN_BFLOAT16 in model.get_submodule(path).__dict__)
        ]
    whole = compare(actual, eager, exact, any(IN_BFLOAT16 in module.__dict__ for module in model.modules()))
    return Verification(
        {
            **whole,
            "fused_calls": after["fused_calls"] - before["fused_calls"],
            "fallbacks": news(before["fallbacks"], after["fallbacks"]),
            "steps": steps,
        }
    )


def _own(x: Any) -> Any:
    """A copy that layers may write to, of the same strides."""
    return x.detach().clone() if isinstance(x, Tensor) else x


def _double(x: Any) -> Any:
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else _own(x)


def _matches(model: nn.Module, plain: nn.Module) -> Iterator[tuple[str, Match]]:
    """What is fused in `model`, by path, matched in the modules of its plain copy; nothing twice."""
    inside: set[int] = set()
    modules = dict(model.named_modules())
    for path, module in plain.named_modules():
        if id(module) in inside:
            continue
        if isinstance(modules[path], FusedModule):
            found = match_forward(module)
            if isinstance(found, str):
                continue
            made = found[0]
        elif isinstance(modules[path], FusedSequential):
            made = match(module, KINDS)
        else:
            continue
        inside.update(map(id, made.nested))
        yield path, made


def _record(module: nn.Module, path: str, inputs: dict[str, Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if path not in inputs and len(args) == 1 and isinstance(args[0], Tensor):
            inputs[path] = args[0].clone()

    return module.register_forward_pre_hook(hook)


def _steps(path: str, found: Match, value: Any, in_bfloat16: bool) -> Iterator[dict[str, Any]]:
    for segment in found.segments:
        if not isinstance(segment, NativeSegment):
            value = segment.leaf.runs(value)
            continue
        for layers, name, leaves, step in _chunks(segment):
            actual, plan = _run_alone(step, leaves, value, in_bfloat16)
            exact = _eager([copy.deepcopy(leaf.layer).double() for leaf in leaves], _double(value))
            value = _eager([leaf.runs for leaf in leaves], _own(value))
            yield {
                "path": path,
                "layers": layers,
                "name": name,
                "kernel": plan["steps"][-1]["kernel"] if plan else "",
                "is_fused": plan is not None,
                **compare(actual, value, exact, in_bfloat16),
            }


def _run_alone(step: Step, leaves: list[Leaf], value: Any, in_bfloat16: bool) -> tuple[Any, dict[str, Any] | None]:
    """The step as a run of its own, whether the matcher finds that worth it or not, and its plan if it was made."""
    layers = [leaf.layer for leaf in leaves]
    if native_available():
        sequential = FusedSequential(*layers)
        if in_bfloat16:
            sequential.__dict__[IN_BFLOAT16] = True
        has_flatten, is_on_features = any(map(is_flatten, layers)), "is_per_feature" in step.native
        alone = NativeSegment(
            [step],
            leaves,
            flattens_input=has_flatten and not is_on_features,
            flattens_output=has_flatten and is_on_features,
        )
        compiled = CompiledMatch(sequential, Match([alone]))
        result = compiled.program.forward(sequential, _own(value))
        if result.__class__ is not compiled.refused:
            (run,) = compiled.runs
            return result, run and run.describe()
    return _eager(layers, _own(value)), None


def _eager(layers: list[Any], value: Any) -> Any:
    for layer in layers:
        value = layer(value)
    return value


def _chunks(segment: NativeSegment) -> Iterator[tuple[list[str], str, list[Leaf], Step]]:
    """For each step its layers' paths, its name, the leaves of a run of it alone, with a Flatten before it, and it."""
    rest = list(segment.leaves)
    for step in segment.steps:
        end = next(i for i, leaf in enumerate(rest) if leaf is step.leaves[-1]) + 1
        leaves, rest = rest[:end], rest[end:]
        yield [leaf.path for leaf in step.leaves], step.pattern, leaves, step


def compare(actual: Tensor, eager: Tensor, exact: Tensor, in_bfloat16: bool = False) -> dict[str, Any]:
    """The fields of `Verification.to_dict` for one result. actual, eager: of one shape; exact: float64."""
    if actual.shape != eager.shape or actual.dtype != eager.dtype:
        raise TypeError(
            f"the results have other shapes or dtypes: {tuple(actual.shape)} {actual.dtype}, "
            f"eager {tuple(eager.shape)} {eager.dtype}"
        )
    special = {
        name: int((test(actual) != test(eager)).sum())
        for name, test in (("nan", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf))
    }
    finite = actual.isfinite() & eager.isfinite() & exact.isfinite()

    def difference(result: Tensor) -> Tensor:
        return torch.where(finite, result.double() - exact, 0.0)

    found, of_eager = difference(actual), difference(eager)
    reference = torch.where(finite, exact, 0.0)
    scale = reference.norm().item() or 1.0  # an exact result of zeros has no scale; the error stands as it is
    error, eager_error = found.norm().item() / scale, of_eager.norm().item() / scale
    allowed = max(FACTOR * eager_error, 8 * torch.finfo(actual.dtype).eps, IN_BFLOAT16_ALLOWED if in_bfloat16 else 0.0)
    worst = None
    if found.numel() and found.abs().max() > 0:
        at = int(found.abs().argmax())
        worst = {
            "index": [int(i) for i in torch.unravel_index(torch.tensor(at), found.shape)],
            "actual": actual.flatten()[at].item(),
            "eager": eager.flatten()[at].item(),
            "exact": exact.flatten()[at].item(),
        }
    return {
        "ok": error <= allowed and not any(special.values()),
        "error": error,
        "eager_error": eager_error,
        "allowed": allowed,
        "max_abs_error": found.abs().max().item() if found.numel() else 0.0,
        "eager_max_abs_error": of_eager.abs().max().item() if found.numel() else 0.0,
        "scale": reference.abs().max().item() if found.numel() else 0.0,
        "special_values": special,
        "worst": worst,
    }
