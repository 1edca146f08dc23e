"""MaxPool2d by itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastseq.patterns.base import Layers, Pattern, build_maxpool2d, check_maxpool2d, step


def check(layers: Layers) -> str | None:
    return check_maxpool2d(layers[0])


def build(layers: Layers) -> dict[str, Any]:
    return step("maxpool2d", "maxpool2d", pool=build_maxpool2d(layers[0]))


def example() -> tuple[list[nn.Module], tuple[int, ...]]:
    return [nn.MaxPool2d(3, 2, 1)], (2, 3, 9, 8)


PATTERN = Pattern("maxpool2d", (nn.MaxPool2d,), check, build, example, maps_images=True)
