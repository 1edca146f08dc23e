"""Linear, ReLU: one step."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastseq.patterns.base import Layers, Pattern, has_parameters, step


def check(layers: Layers) -> str | None:
    return has_parameters(layers[0])


def build(layers: Layers) -> dict[str, Any]:
    return step("linear", "linear_relu", relu=layers[1], layer=layers[0])


def example() -> tuple[list[nn.Module], tuple[int, ...]]:
    return [nn.Linear(7, 5), nn.ReLU()], (3, 7)


PATTERN = Pattern(
    "linear_relu",
    (
        nn.Linear,
        nn.ReLU,
    ),
    check,
    build,
    example,
)
