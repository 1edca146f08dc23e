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

from fastseq.patterns import PATTERNS, activation, map_layers, row_layers
from fastseq.patterns.arguments import LARGEST
from fastseq.patterns.base import CHECKS, INNER_METHODS, NORMS, Pattern, padding_step, with_zeros_before

# In eval mode they return their argument. Others look at its dimensions, and warn.
DROPOUTS: tuple[type[nn.Module], ...] = (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)
KNOWN_LAYERS: set[type[nn.Module]] = {kind for pattern in PATTERNS for kind in pattern.types} | {
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    *DROPOUTS,
}
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
        *((kind, "_conv_forward") for kind in (nn.Conv1d, nn.Conv2d)),
        *((kind, "_check_input_dim") for kind in (nn.BatchNorm1d, nn.BatchNorm2d)),
        *((F, name) for name in ("conv1d", "conv2d", "linear", "batch_norm")),
        *((F, name) for name in ("dropout", "alpha_dropout", "feature_alpha_dropout")),
        *((F, name) for name in (*map_layers.FUNCTIONAL, *row_layers.FUNCTIONAL, *activation.FUNCTIONAL)),
        *((torch, name) for name in ("max_pool1d", "max_pool2d", "layer_norm", "group_norm", *activation.TORCH)),
    ]
]


# The key in a module's __dict__ that `optimize(exclude=...)` leaves: it goes with the module, also into copies.
EXCLUDED = "_fastseq_excluded"
# And the one that `optimize(winograd="off")` leaves.
WITHOUT_WINOGRAD = "_fastseq_without_winograd"
# And the one that `optimize(compute_dtype=torch.bfloat16)` leaves.
IN_BFLOAT16 = "_fastseq_in_bfloat16"


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
    """Layers that one fused step computes, and the step in the words of the native engine.

    `before`: another one that the engine runs first, for the same layers.
    """

    pattern: str
    leaves: list[Leaf]
    native: dict[str, Any]
    before: dict[str, Any] | None = None

    @property
    def natives(self) -> list[dict[str, Any]]:
        return [self.native] if self.before is None else [self.before, self.native]


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
    return type(layer) in DROPOUTS and layer.training is False and type(layer.p) in (int, float) and 0 <= layer.p <= 1


def is_flatten(layer: Any) -> bool:
    if type(layer) is not nn.Flatten or has_own_forward(layer) or is_excluded(layer):
        return False
    return type(layer.start_dim) is int and type(layer.end_dim) is int


def maps_of(layer: Any) -> tuple[int, ...] | None:
    """Channels, height and width that an Unflatten makes of rows, one of them perhaps -1; None for all other layers."""
    if type(layer) is not nn.Unflatten or has_own_forward(layer) or is_excluded(layer):
        return None
    sizes = layer.unflattened_size
    if type(layer.dim) is not int or layer.dim not in (1, -1):
        return None
    if not isinstance(sizes, tuple) or len(sizes) not in (2, 3):
        return None
    if not all(type(size) is int and -1 <= size <= LARGEST and size for size in sizes) or sizes.count(-1) > 1:
        return None
    return tuple(sizes) if len(sizes) == 3 else (sizes[0], 1, sizes[1])


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
        return CHECKS[type(layer)](layer) or f"{name} does not follow a layer that is fused"
    if isinstance(layer, NORMS) or type(layer) in map_layers.LAYERS or type(layer) in row_layers.LAYERS:
        check: Any = CHECKS[type(layer)]  # type: ignore[index]
        return check(layer) or f"{name} stands in no run with a Conv2d, Linear or pool"
    if type(layer) is nn.Flatten:
        if (layer.start_dim, layer.end_dim) != (1, -1):
            return f"Flatten has start_dim={layer.start_dim}, end_dim={layer.end_dim}; fused runs take 1 and -1"
        return "Flatten stands neither behind a fused convolution or pool nor before a fused Linear"
    if type(layer) is nn.Unflatten:
        if maps_of(layer) is None:
            found = f"dim={layer.dim!r}, unflattened_size={layer.unflattened_size!r}"
            return f"Unflatten has {found}; fused runs take dimension 1 and a tuple of two or three sizes"
        return "Unflatten stands before no fused layer of such maps, or behind maps"
    if isinstance(layer, DROPOUTS) and layer.training:
        return f"{name} is in training mode"
    if is_free(layer):
        return f"{name} does nothing and stands beside no fused layer"
    return f"no fused kernel for {name}"


class _Run:
    """A native run under construction: which steps may follow depends on what its data is by now."""

    def __init__(self) -> None:
        self.segment = NativeSegment([], [])
        self.pending: list[Leaf] = []  # free layers and a leading Flatten that wait for a step
        self.data = "unknown"  # "unknown", "flat input", "images", "flat", "rows"
        self.dimensions = 0  # of images
        self.has_unflattened = False
        self.unflattened: tuple[int, ...] | None = None  # what rows become before the next step
        self.is_worthwhile = False

    def takes(self, pattern: Pattern) -> bool:
        if pattern.maps_images and (not pattern.rows_op or self.data in ("unknown", "images")):
            fits = bool(pattern.rows_op) or pattern.dimensions in (0, self.dimensions)
            return self.data == "unknown" or (self.data == "images" and fits)
        if self.data == "images":
            return bool(pattern.line_op) and self.dimensions == 1
        # A map's features are in another order than eager's, which the weights of a Linear can follow.
        return pattern.reads_maps or pattern.maps_features or not self.segment.flattens_output

    def flattens(self, layer: nn.Flatten) -> bool | None:
        """Whether it makes rows of what the run has; False where it changes nothing, None for anything else."""
        dims = layer.start_dim, layer.end_dim
        if self.data == "images":
            rank = 2 + self.dimensions
            # Without a batch dimension some are errors.
            if dims[0] == dims[1] and 1 - rank <= dims[0] < rank - 1:
                return False
            known = all(-rank <= dim < rank for dim in dims)
            return True if known and [dim % rank for dim in dims] == [1, rank - 1] else None
        if self.data == "flat":
            return False if all(dim in (1, -1) for dim in dims) else None
        return True if dims == (1, -1) else None

    def takes_flatten(self, leaf: Leaf) -> bool:
        if (leaf.rows_features or leaf.is_view) and self.has_unflattened:
            return False  # a run knows of one view
        # Rows of features that are known to be rows stay what they are, but for a view to another number of features.
        fits = self.data in ("unknown", "images") if leaf.rows_features else self.data != "rows"
        return fits and self.flattens(leaf.layer) is not None

    def add_flatten(self, leaf: Leaf) -> None:
        # Already (N, features): Flatten changes nothing.
        self.pending.append(leaf)
        if not self.flattens(leaf.layer):
            return
        if self.data in ("unknown", "images") and not self.has_unflattened:
            self.segment.flattens_by_view, self.segment.rows_features = leaf.is_view, leaf.rows_features
        if self.data == "unknown":
            self.data = "flat input"
        elif self.data == "images":
            self.data = "flat"
            self.segment.flattens_output = True

    def takes_unflatten(self, layer: nn.Unflatten, pattern: Pattern | None, behind: Leaf | None) -> bool:
        """`pattern`: of what follows, which begins with the leaf `behind`."""
        maps = maps_of(layer)
        if maps is None or pattern is None or behind is None or not pattern.maps_images:
            return False
        dimensions = len(layer.unflattened_size) - 1
        if not pattern.rows_op and pattern.dimensions != dimensions:
            return False
        if not self.segment.steps:
            return self.data == "unknown" and not pattern.refuses_to_lead(behind.layer)
        is_rows = self.data in ("flat", "rows") and not self.segment.flattens_output
        return is_rows and self.dimensions in (0, dimensions)

    def add_unflatten(self, leaf: Leaf) -> None:
        self.pending.append(leaf)
        self.unflattened, self.has_unflattened = maps_of(leaf.layer), True
        self.data, self.dimensions = "images", len(leaf.layer.unflattened_size) - 1

    def add_step(self, pattern: Pattern, leaves: list[Leaf]) -> None:
        core = [leaf for leaf in leaves if not is_free(leaf.layer)]
        if not self.segment.steps:
            self.segment.flattens_input = self.data == "flat input"
        native, name = pattern.build([leaf.layer for leaf in core]), pattern.name
        maps_images = pattern.maps_images
        # A map's features are still a map.
        is_on_features = pattern.maps_features and self.segment.flattens_output
        if is_on_features:
            native |= {"op": "scale2d", "is_per_feature": True}
        elif pattern.rows_op and self.data not in ("unknown", "images"):
            maps_images, native["op"] = False, pattern.rows_op
        elif pattern.line_op and self.data == "images":
            maps_images, native["op"] = True, pattern.line_op
        if self.segment.steps and (merged := with_zeros_before(native, self.segment.steps[-1].native)):
            core, native, name = [*self.segment.steps.pop().leaves, *core], merged, merged["name"]
        step = Step(name, core, native, padding_step(native))
        if self.unflattened is not None:
            step.natives[0]["unflattened"], self.unflattened = self.unflattened, None
        self.segment.steps.append(step)
        self.is_worthwhile |= not pattern.needs_company
        self.segment.leaves += self.pending + leaves
        self.pending = []
        if is_on_features:
            return
        if maps_images:
            self.data = "images"
            if not pattern.rows_op and not pattern.line_op:
                self.dimensions = pattern.dimensions or self.dimensions or 2
            native["dimensions"] = self.dimensions  # a step may be for maps of any
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
        if run.is_worthwhile:
            # What waits behind the last step does nothing, or is the Flatten whose shape the run gives.
            run.segment.leaves += run.pending
            segments.append(run.segment)
        else:
            leaves = run.segment.leaves + run.pending
            segments.extend(EagerSegment(leaf, reason_for_unknown(leaf.layer)) for leaf in leaves)
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
            if run.takes_flatten(leaf):
                run.add_flatten(leaf)
            else:
                segments.append(EagerSegment(leaf, reason_for_unknown(leaf.layer)))
            i += 1
            continue
        if type(leaf.layer) is nn.Unflatten:
            following = [other for other in leaves[i + 1 :] if not is_free(other.layer)]
            pattern = match_pattern(following, table)[0] if following else None
            first = following[0] if following else None
            if not run.takes_unflatten(leaf.layer, pattern, first):
                close()
            if run.takes_unflatten(leaf.layer, pattern, first):
                run.add_unflatten(leaf)
            else:
                segments.append(EagerSegment(leaf, reason_for_unknown(leaf.layer)))
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
        if not run.segment.steps and (reason := pattern.refuses_to_lead(leaf.layer) or ""):
            close()
            segments.append(EagerSegment(leaf, reason))
            i += 1
            continue
        end, seen = i, 0
        while seen < len(pattern.types):
            seen += not is_free(leaves[end].layer)
            end += 1
        run.add_step(pattern, list(leaves[i:end]))
        i = end
    close()
    return segments
