"""What a random case is: plain data, so that a failure prints as something one can read, paste and change."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any


class Terse:
    """Prints as what makes it: positional what has no default, the rest only where it is not the default."""

    def __repr__(self) -> str:
        words = []
        for entry in fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            default = entry.default if entry.default_factory is MISSING else entry.default_factory()
            if default is MISSING:
                words.append(repr(value))
            elif value != default:
                words.append(f"{entry.name}={value!r}")
        return f"{type(self).__name__}({', '.join(words)})"


@dataclass(frozen=True, repr=False)
class Layer(Terse):
    """A layer by its name in `layers.KINDS`. Layers of the same key are one object that stands in several places."""

    kind: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    key: int = 0


@dataclass(frozen=True, repr=False)
class Group(Terse):
    """A Sequential, or a subclass of it, with named children; a name of "" is a number."""

    children: list[tuple[str, Layer | Group]]
    kind: str = "Sequential"
    key: int = 0


@dataclass(frozen=True, repr=False)
class Hook(Terse):
    """A hook on the module number `target` (modulo their count); `changes`: it returns something else than it got."""

    kind: str
    target: int
    changes: bool = False


@dataclass(frozen=True, repr=False)
class Input(Terse):
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    values: str = "normal"
    requires_grad: bool = False


@dataclass(frozen=True, repr=False)
class Call(Terse):
    """One call of the model. mode: "no_grad", "inference" or "grad", which goes on to the gradients."""

    input: Input
    mode: str = "no_grad"
    seed: int = 0
    threads: int = 1
    global_hook: str = ""
    style: str = "positional"


@dataclass(frozen=True, repr=False)
class Mutation(Terse):
    """A change between two calls, by its name in `mutations.MUTATIONS`. It chooses by `target` and `choice`, modulo."""

    name: str
    target: int = 0
    choice: int = 0
    seed: int = 0


@dataclass(frozen=True, repr=False)
class Case(Terse):
    """A model, how it is run, and what happens to it.

    `lines`: the body of the forward of a module that holds `parts` as self.p0, self.p1 ...; none: the model is the
    only part.
    """

    parts: list[Layer | Group]
    script: list[Call | Mutation]
    lines: list[str] = field(default_factory=list)
    hooks: list[Hook] = field(default_factory=list)
    weights: str = "normal"
    seed: int = 0
    training: bool = False
    frozen: bool = False
    dtype: str = "float32"
    channels_last: bool = False
    isa: str = ""
    kernel: str = ""
    winograd: str = "auto"
    checked: bool = False
