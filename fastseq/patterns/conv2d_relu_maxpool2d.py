"""Conv2d, ReLU, MaxPool2d: one step, the pool in the convolution's epilogue."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastseq.patterns.base import Layers, Pattern, build_conv2d, build_maxpool2d, check_conv2d, check_maxpool2d, step


def check(layers: Layers) -> str | None:
    return check_conv2d(layers[0]) or check_maxpool2d(layers[2])


def build(layers: Layers) -> dict[str, Any]:
    return step(
        "conv2d",
        "conv2d_relu_maxpool2d",
        relu=layers[1],
        conv=build_conv2d(layers[0]),
        pool=build_maxpool2d(layers[2]),
        layer=layers[0],
    )


def example() -> tuple[list[nn.Module], tuple[int, ...]]:
    return [nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2)], (2, 3, 9, 8)


PATTERN = Pattern(
    "conv2d_relu_maxpool2d",
    (
        nn.Conv2d,
        nn.ReLU,
        nn.MaxPool2d,
    ),
    check,
    build,
    example,
    maps_images=True,
)
