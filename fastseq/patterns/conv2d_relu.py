"""Conv2d, ReLU: one step."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastseq.patterns.base import Layers, Pattern, build_conv2d, check_conv2d, step


def check(layers: Layers) -> str | None:
    return check_conv2d(layers[0])


def build(layers: Layers) -> dict[str, Any]:
    return step("conv2d", "conv2d_relu", relu=layers[1], conv=build_conv2d(layers[0]), layer=layers[0])


def example() -> tuple[list[nn.Module], tuple[int, ...]]:
    return [nn.Conv2d(3, 5, 3), nn.ReLU()], (2, 3, 9, 8)


PATTERN = Pattern(
    "conv2d_relu",
    (
        nn.Conv2d,
        nn.ReLU,
    ),
    check,
    build,
    example,
    maps_images=True,
)
