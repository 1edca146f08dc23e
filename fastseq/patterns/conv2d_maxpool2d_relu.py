"""Conv2d, MaxPool2d, ReLU: the same step as conv2d_relu_maxpool2d, since ReLU and maximum commute."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastseq.patterns.base import Layers, Pattern, build_conv2d, build_maxpool2d, check_conv2d, check_maxpool2d, step


def check(layers: Layers) -> str | None:
    return check_conv2d(layers[0]) or check_maxpool2d(layers[1])


def build(layers: Layers) -> dict[str, Any]:
    return step(
        "conv2d",
        "conv2d_maxpool2d_relu",
        relu=layers[2],
        relu_after_pool=True,
        conv=build_conv2d(layers[0]),
        pool=build_maxpool2d(layers[1]),
        layer=layers[0],
    )


def example() -> tuple[list[nn.Module], tuple[int, ...]]:
    return [nn.Conv2d(3, 5, 3), nn.MaxPool2d(2), nn.ReLU()], (2, 3, 9, 8)


PATTERN = Pattern(
    "conv2d_maxpool2d_relu",
    (
        nn.Conv2d,
        nn.MaxPool2d,
        nn.ReLU,
    ),
    check,
    build,
    example,
    maps_images=True,
)
