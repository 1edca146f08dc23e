"""Linear by itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastseq.patterns.base import Layers, Pattern, has_parameters, step


def check(layers: Layers) -> str | None:
    return has_parameters(layers[0])


def build(layers: Layers) -> dict[str, Any]:
    return step("linear", "linear", layer=layers[0])


def example() -> tuple[list[nn.Module], tuple[int, ...]]:
    return [nn.Linear(7, 5)], (3, 7)


PATTERN = Pattern("linear", (nn.Linear,), check, build, example)
