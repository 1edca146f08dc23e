"""Cuts a Sequential, or the leaves of a forward, into native runs and eager layers.

Pure: reads layers and a table, touches no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastseq.patterns import PATTERNS, activation
from fastseq.patterns.base import CHECKS, INNER_METHODS, NORMS, Pattern

KNOWN_LAYERS = {kind for pattern in PATTERNS for kind in pattern.types} | {nn.Flatten, nn.Dropout, nn.Identity}
# What the patterns describe: the classes' forwards as torch wrote them.
FORWARDS = {kind: kind.forward for kind in KNOWN_LAYERS}
# What eager looks up by name at each call of these layers. Where one was replaced, to count, to quantise or to pad
# otherwise, everything runs eager: see refuse_globally in csrc/bindings/watch.cpp.
LOOKED_UP: list[tuple[Any, str, Any]] = [
    (owner, name, getattr(owner, name))
    for owner, name in [
        (nn.Sequential, "forward"),
        (nn.Module, "_call_impl"),
        *((kind, "__call__") for kind in (nn.Sequential, *FORWARDS)),
        (nn.Conv2d, "_conv_forward"),
        *((kind, "_check_input_dim") for kind in (nn.BatchNorm1d, nn.BatchNorm2d)),
        *((F, name) for name in ("conv2d", "linear", "max_pool2d", "dropout", "batch_norm", *activation.FUNCTIONAL)),
        *((torch, name) for name in ("max_pool2d", *activation.TORCH)),
    ]
]


# The key in a module's __dict__ that `optimize(exclude=...)` leaves: it goes with the module, also into copies.
EXCLUDED = "_fastseq_excluded"
# And the one that `optimize(winograd="off")` leaves.
WITHOUT_WINOGRAD = "_fastseq_without_winograd"


@dataclass
class Leaf:
    """A layer as it is executed. A layer that stands twice in a Sequential is two leaves.

    In a module's own forward a functional call is a leaf too: `layer` then is the layer that it stands for, `call` the
    call itself. `is_view`: a Flatten that eager makes by `view`, which some memory formats do not allow;
    `rows_features`: it gives rows of that many features, 0 for one row an image; `needs_native`: `call` is right only
    where a native run would take the input.
    """

    path: str
    layer: Any  # an nn.Module, or None where a Sequential holds None
    call: Any = None
    is_view: bool = False
    rows_features: int = 0
    needs_native: bool = False

    @property
    def runs(self) -> Any:
        """What eager calls."""
        return self.layer if self.call is None else self.call


@dataclass
class Step:
    """Layers that one fused step computes, and the step in the words of the native engine."""

    pattern: str
    leaves: list[Leaf]
    native: dict[str, Any]


@dataclass
class NativeSegment:
    """Consecutive fused steps behind one native call. `leaves` includes what is free between them.

    `flattens_by_view`, `rows_features`: of its Flatten, as in Leaf.
    """

    steps: list[Step]
    leaves: list[Leaf]
    flattens_input: bool = False
    flattens_output: bool = False
    flattens_by_view: bool = False
    rows_features: int = 0


@dataclass
class EagerSegment:
    """A layer that runs as it is, and why."""

    leaf: Leaf
    reason: str


Segment = NativeSegment | EagerSegment


@dataclass
class Match:
    """`nested`: the Sequentials inside that were flattened for execution, outermost first."""

    segments: list[Segment]
    nested: list[nn.Module] = field(default_factory=list)

    @property
    def has_native(self) -> bool:
        return any(isinstance(segment, NativeSegment) for segment in self.segments)

    @property
    def may_become_native(self) -> bool:
        """Whether there is a lazy layer that turns into a known one at its first call."""
        eager = [segment.leaf.layer for segment in self.segments if isinstance(segment, EagerSegment)]
        return any(getattr(type(layer), "cls_to_become", None) in KNOWN_LAYERS for layer in eager)


def is_excluded(module: Any) -> bool:
    """Whether `optimize` was told to leave the module eager."""
    return EXCLUDED in getattr(module, "__dict__", ())


def is_plain_sequential(module: Any, kinds: tuple[type, ...] = (nn.Sequential,)) -> bool:
    """Whether calling `module` means calling its children in order: the exact type, no own forward, not excluded."""
    return type(module) in kinds and "forward" not in module.__dict__ and not is_excluded(module)


def flatten(sequential: nn.Module, kinds: tuple[type, ...], prefix: str = "") -> tuple[list[Leaf], list[nn.Module]]:
    """The layers of a Sequential and its nested ones in the order of execution, and the nested ones."""
    leaves: list[Leaf] = []
    nested: list[nn.Module] = []
    # _modules, not named_children(): a layer that stands twice runs twice.
    children: dict[str, Any] = sequential._modules
    for name, child in children.items():
        if is_plain_sequential(child, kinds) and child._modules:
            inner, inner_nested = flatten(child, kinds, f"{prefix}{name}.")
            leaves += inner
            nested += [child, *inner_nested]
        else:
            leaves.append(Leaf(f"{prefix}{name}", child))
    return leaves, nested


def has_own_forward(layer: Any) -> bool:
    """Whether the instance or its class was given another forward, or method that the forward calls, than torch's."""
    kind = type(layer)
    if kind not in FORWARDS:
        return False
    return kind.forward is not FORWARDS[kind] or any(name in layer.__dict__ for name in ("forward", *INNER_METHODS))


def is_free(layer: Any) -> bool:
    """Whether the layer returns its argument unchanged."""
    if has_own_forward(layer) or is_excluded(layer):
        return False
    if type(layer) is nn.Identity:
        return True
    # Exact types here and below: eager raises for a p that is no number, a flag that is no bool, a float dimension.
    return type(layer) is nn.Dropout and layer.training is False and type(layer.p) in (int, float) and 0 <= layer.p <= 1


def is_flatten(layer: Any) -> bool:
    if type(layer) is not nn.Flatten or has_own_forward(layer) or is_excluded(layer):
        return False
    dims = (layer.start_dim, layer.end_dim)
    return dims == (1, -1) and all(type(dim) is int for dim in dims)


def match_pattern(leaves: Sequence[Leaf], table: Sequence[Pattern]) -> tuple[Pattern | None, str]:
    """The first pattern of the table that `leaves` starts with, or why there is none."""
    types = tuple(type(leaf.layer) for leaf in leaves)
    reason = ""
    for pattern in table:
        if types[: len(pattern.types)] != pattern.types:
            continue
        layers = [leaf.layer for leaf in leaves[: len(pattern.types)]]
        if any(has_own_forward(layer) or is_excluded(layer) for layer in layers):
            continue
        refused = pattern.check(layers)
        if refused is None:
            return pattern, ""
        # The longest pattern's objection may be to a later layer; the last one is about this layer alone.
        reason = refused
    return None, reason or reason_for_unknown(leaves[0].layer)


def reason_for_unknown(layer: Any) -> str:
    name = type(layer).__name__
    if is_excluded(layer):
        return "excluded by optimize(exclude=...)"
    if not isinstance(layer, nn.Module) and layer is not None:
        return f"no fused kernel for {layer.name}()"
    if has_own_forward(layer):
        return f"this {name} has a forward of its own"
    for kind in KNOWN_LAYERS if type(layer) not in KNOWN_LAYERS else ():
        if isinstance(layer, kind):
            return f"{name} is a subclass of {kind.__name__}; fused kernels take exactly {kind.__name__}"
    if isinstance(layer, activation.ACTIVATIONS):
        return CHECKS[type(layer)](layer) or f"{name} does not follow a Conv2d, Linear or MaxPool2d that is fused"
    if isinstance(layer, NORMS):
        return CHECKS[type(layer)](layer) or f"{name} does not follow a Conv2d or Linear that is fused"
    if type(layer) is nn.Flatten:
        if not is_flatten(layer):
            return f"Flatten has start_dim={layer.start_dim}, end_dim={layer.end_dim}; fused runs take 1 and -1"
        return "Flatten stands neither behind a fused convolution or pool nor before a fused Linear"
    if type(layer) is nn.Dropout and layer.training:
        return "Dropout is in training mode"
    if is_free(layer):
        return f"{name} does nothing and stands beside no fused layer"
    return f"no fused kernel for {name}"


class _Run:
    """A native run under construction: which steps may follow depends on what its data is by now."""

    def __init__(self) -> None:
        self.segment = NativeSegment([], [])
        self.pending: list[Leaf] = []  # free layers and a leading Flatten that wait for a step
        self.data = "unknown"  # "unknown", "flat input", "images", "flat", "rows"

    def takes(self, pattern: Pattern) -> bool:
        return self.data in ("unknown", "images") if pattern.maps_images else self.data != "images"

    def takes_flatten(self, leaf: Leaf) -> bool:
        # Rows of features that are known to be rows stay what they are, but for a view to another number of features.
        return self.data in ("unknown", "images") if leaf.rows_features else self.data != "rows"

    def add_flatten(self, leaf: Leaf) -> None:
        if self.data in ("unknown", "images"):
            self.segment.flattens_by_view, self.segment.rows_features = leaf.is_view, leaf.rows_features
        if self.data == "unknown":
            self.data = "flat input"
        elif self.data == "images":
            self.data = "flat"
            self.segment.flattens_output = True
        # Already (N, features): Flatten changes nothing.
        self.pending.append(leaf)

    def add_step(self, pattern: Pattern, leaves: list[Leaf]) -> None:
        core = [leaf for leaf in leaves if not is_free(leaf.layer)]
        if not self.segment.steps:
            self.segment.flattens_input = self.data == "flat input"
        self.segment.steps.append(Step(pattern.name, core, pattern.build([leaf.layer for leaf in core])))
        self.segment.leaves += self.pending + leaves
        self.pending = []
        if pattern.maps_images:
            self.data = "images"
        else:
            self.segment.flattens_output = False
            self.data = "flat" if self.data in ("flat", "flat input") else "rows"


def match(sequential: nn.Module, kinds: tuple[type, ...], table: Sequence[Pattern] = PATTERNS) -> Match:
    """Segments of `sequential` in order. `kinds`: the container types that are flattened for execution."""
    leaves, nested = flatten(sequential, kinds)
    return Match(cut(leaves, table), nested)


def cut(leaves: Sequence[Leaf], table: Sequence[Pattern] = PATTERNS) -> list[Segment]:
    """Segments of the layers in order."""
    segments: list[Segment] = []
    run = _Run()

    def close() -> None:
        nonlocal run
        if run.segment.steps:
            # What waits behind the last step does nothing, or is the Flatten whose shape the run gives.
            run.segment.leaves += run.pending
            segments.append(run.segment)
        else:
            segments.extend(EagerSegment(leaf, reason_for_unknown(leaf.layer)) for leaf in run.pending)
        run = _Run()

    i = 0
    while i < len(leaves):
        leaf = leaves[i]
        if is_free(leaf.layer):
            run.pending.append(leaf)
            i += 1
            continue
        if is_flatten(leaf.layer):
            if not run.takes_flatten(leaf):
                close()
            run.add_flatten(leaf)
            i += 1
            continue
        core = [other for other in leaves[i:] if not is_free(other.layer)]
        pattern, reason = match_pattern(core, table)
        if pattern is None:
            close()
            segments.append(EagerSegment(leaf, reason))
            i += 1
            continue
        if not run.takes(pattern):
            close()
        end, seen = i, 0
        while seen < len(pattern.types):
            seen += not is_free(leaves[end].layer)
            end += 1
        run.add_step(pattern, list(leaves[i:end]))
        i = end
    close()
    return segments
