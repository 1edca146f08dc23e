"""Shapes that bring each kernel to work, and the ways an input may lie in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_device import MODES, Mode
from torch import Tensor, nn

# Layouts -------------------------------------------------------------------------------------------------------------


def shifted(x: Tensor, elements: int = 1) -> Tensor:
    """The same values at a storage offset: misaligned by that many elements."""
    base = torch.empty(x.numel() + elements, dtype=x.dtype, device=x.device)
    view = base[elements:].as_strided(x.shape, x.stride(), elements)
    return view.copy_(x)


def image_layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(N, C, H, W) in the ways it may lie in memory."""
    n, c, h, w = x.shape
    last = x.contiguous(memory_format=torch.channels_last)
    yield "NCHW", x
    yield "channels_last", last
    yield "NCHW at offset 1", shifted(x)
    yield "channels_last at offset 1", shifted(last)
    wide = torch.empty(n + 1, c + 2, h + 2, 2 * w, dtype=x.dtype, device=x.device).normal_()
    yield "cropped", wide[1:, 1 : 1 + c, 1 : 1 + h, w : 2 * w].copy_(x)
    yield "every second column", wide[1:, 2:, 2:, ::2].copy_(x)
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    yield "every second image", torch.cat([x, x], 1).view(2 * n, c, h, w)[::2]
    yield "one image, expanded", x[:1].expand(n, c, h, w)
    yield "channels of a channels_last", torch.cat([last, last], 1).contiguous(memory_format=torch.channels_last)[:, :c]


def row_layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(N, K) in the ways it may lie in memory."""
    n, k = x.shape
    yield "contiguous", x
    yield "at offset 1", shifted(x)
    yield "columns of more", torch.cat([x, x[:, :3]], 1)[:, :k]
    yield "transposed", x.t().contiguous().t()
    yield "every second row", torch.cat([x, x], 1).view(2 * n, k)[::2]
    yield "one row, expanded", x[:1].expand(n, k)


def laid_out(x: Tensor, layout: str) -> Tensor:
    layouts = image_layouts if x.dim() == 4 else row_layouts
    if (x.dim() == 4 and layout == "NCHW") or (x.dim() == 2 and layout == "NCHW"):
        return x
    return next(view for name, view in layouts(x) if name == layout)


# Shapes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A model, an input, and how that lies: what brings a kernel to work."""

    label: str
    layers: tuple[Callable[[], nn.Module], ...]
    size: tuple[int, ...]
    layout: str = "NCHW"

    def build(self) -> nn.Sequential:
        return nn.Sequential(*(make() for make in self.layers))


def conv(*arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*arguments, **options)


def linear(*arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(*arguments, **options)


def pool(*arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MaxPool2d(*arguments, **options)


def conv_shapes(is_vector: bool, piece: int) -> list[Shape]:
    """For one tile. `piece` elements are 16 bytes; vector kernels need channels in such pieces, next to each other."""
    last = "channels_last"
    if is_vector:
        return [
            Shape("3x3", (conv(2 * piece, 40, 3, padding=1), nn.ReLU), (3, 2 * piece, 9, 11), last),
            Shape("5x5, 2x2 pool", (conv(3 * piece, 70, 5), nn.ReLU, pool(2)), (3, 3 * piece, 13, 16), last),
            Shape("3x3 pool", (conv(piece, 33, 3), nn.ReLU, pool(3, 2, 1, ceil_mode=True)), (5, piece, 14, 11), last),
            Shape("1x1, stride 2, no bias", (conv(piece, 65, 1, 2, bias=False),), (7, piece, 7, 5), last),
            Shape("behind another", (conv(3, 20, 3), nn.ReLU, conv(20, 9, 3), nn.ReLU, pool(2)), (3, 3, 12, 13)),
            Shape("rows", (linear(600, 520), nn.ReLU), (17, 600)),
        ]
    return [
        Shape("one channel", (conv(1, 20, 5), nn.ReLU), (3, 1, 13, 12)),
        Shape("2x2 pool", (conv(3, 33, 3, padding=1), nn.ReLU, pool(2)), (5, 3, 9, 14)),
        Shape("7x7, 3x3 pool", (conv(5, 70, 7, 2, 3), nn.ReLU, pool(3, 2)), (2, 5, 21, 19), last),
        Shape("3x2, same", (conv(4, 16, (3, 2), padding="same"), nn.ReLU), (3, 4, 8, 7), "every second column"),
        Shape("misaligned", (conv(2 * piece, 40, 3, padding=1),), (3, 2 * piece, 7, 7), "channels_last at offset 1"),
        Shape("11x11, stride 4", (conv(3, 64, 11, 4, 2), nn.ReLU, pool(3, 2)), (2, 3, 47, 43)),
        Shape("rows", (linear(601, 520), nn.ReLU), (17, 601)),
    ]


def chain_shapes(op: str, rows: int, max_width: int) -> list[Shape]:
    def chain(*widths: int) -> tuple[Callable[[], nn.Module], ...]:
        layers: list[Callable[[], nn.Module]] = []
        for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
            layers += [linear(n_in, n_out), nn.ReLU]
        return tuple(layers[:-1])

    if op == "skinny_linear":
        return [
            Shape("wide", (linear(1000, 777), nn.ReLU), (rows, 1000)),
            Shape("odd, no bias", (linear(513, 129, bias=False),), (max(1, rows - 1), 513), "at offset 1"),
        ]
    if op == "tiny_mlp":
        return [
            Shape("odd widths", chain(37, 64, 33, 10), (2 * rows + 3, 37)),
            Shape("eight layers", (*chain(20, 31, 9, 48, 1, 17, 5, 64, 3), nn.ReLU), (rows, 20), "at offset 1"),
            Shape("one row", chain(128, 64, 10), (1, 128), "columns of more"),
        ]
    w = max_width or 64
    return [
        Shape("full width", (*chain(w, w, w, w), nn.ReLU), (2 * rows + 5, w)),
        Shape("odd widths", chain(w - 3, w, w - 1, 10), (rows + 1, w - 3), "at offset 1"),
        Shape("narrow", chain(16, max(16, w // 2), w), (1, 16), "columns of more"),
    ]


def pool_shapes() -> list[Shape]:
    return [
        Shape("2x2", (pool(2),), (3, 5, 9, 8)),
        Shape("3x3, stride 2, padded, ceil", (pool(3, 2, 1, ceil_mode=True),), (2, 16, 12, 9), "channels_last"),
        Shape("5x2", (pool((5, 2), (1, 3)),), (4, 24, 11, 13), "channels_last"),
        Shape("misaligned", (pool(2),), (3, 16, 6, 6), "channels_last at offset 1"),
        Shape("cropped", (pool(3, 1, 1),), (2, 7, 6, 5), "cropped"),
    ]


def shapes_of(kernel: dict[str, Any]) -> list[Shape]:
    if kernel["op"] == "conv2d":
        return conv_shapes(kernel["is_vector"], 4 if kernel["math"] in ("f32", "tf32") else 8)
    if kernel["op"] == "maxpool2d":
        return pool_shapes()
    return chain_shapes(kernel["op"], kernel["rows"], kernel["max_width"])


@contextlib.contextmanager
def preferring(kernel: str) -> Iterator[None]:
    """Plans that are made inside take the kernel where the shape allows."""
    before = os.environ.get("FASTSEQ_KERNEL")
    os.environ["FASTSEQ_KERNEL"] = kernel
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTSEQ_KERNEL"]
        else:
            os.environ["FASTSEQ_KERNEL"] = before


def mode_of(kernel: dict[str, Any]) -> Mode:
    return MODES[kernel["math"]]
