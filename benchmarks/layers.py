"""Single layers with what is fused behind them: the table, those of the networks, and how one is called and timed."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

import fastseq
from fastseq.sequential import compiled_of
from fastseq.testing import MODELS, LayerCost, ModelCase, layer_costs, relative_error

# The layers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A Conv2d or Linear, with ReLU and a max-pool if there are any.

    Convolutions take their input as they would in the middle of a network: channels_last, with the padding already
    around it, so that nothing but the kernel runs. With `is_first` it takes what a user passes: contiguous, not padded.
    """

    c_in: int
    c_out: int
    kernel: tuple[int, int] | None = None  # None: a Linear layer
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1
    size: tuple[int, int] = (1, 1)  # of the input, without padding
    pool: tuple[int, int] | None = None  # kernel and stride
    has_relu: bool = True
    is_first: bool = False
    batch: int = 1

    @property
    def name(self) -> str:
        """Unique within a table: sizes are those of the convolution's output."""
        if self.kernel is None:
            return f"linear {self.c_in}-{self.c_out} M={self.batch}{'' if self.has_relu else ' no relu'}"
        k, s = self.kernel, self.stride
        h, w = ((n + 2 * p - k) // s + 1 for n, p, k, s in zip(self.size, self.padding, k, s, strict=True))
        parts = [
            f"{self.c_in}-{self.c_out} {k[0]}x{k[1]}",
            f"@{h}" if h == w else f"@{h}x{w}",
            "" if s == (1, 1) else f"stride {s[0]}" if s[0] == s[1] else f"stride {s[0]}x{s[1]}",
            "" if self.groups == 1 else "depthwise" if self.groups == self.c_in else f"groups {self.groups}",
            "" if self.pool is None else "pooled" if self.pool == (2, 2) else f"pooled {self.pool[0]}/{self.pool[1]}",
            "first" if self.is_first else "",
            "" if self.has_relu else "no relu",
            "" if self.batch == 1 else f"batch {self.batch}",
        ]
        return " ".join(filter(None, parts))

    def build(self) -> nn.Sequential:
        """In eval mode, with He-initialised weights that are always the same."""
        return ModelCase("layer", self._make, (), ()).build()

    def _make(self) -> nn.Sequential:
        layers: list[nn.Module] = []
        if self.kernel is None:
            layers.append(nn.Linear(self.c_in, self.c_out))
        else:
            padding = self.padding if self.is_first else 0
            layers.append(nn.Conv2d(self.c_in, self.c_out, self.kernel, self.stride, padding, groups=self.groups))
        if self.has_relu:
            layers.append(nn.ReLU())
        if self.pool is not None:
            layers.append(nn.MaxPool2d(*self.pool))
        return nn.Sequential(*layers)

    def example(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        if self.kernel is None:
            return torch.randn(self.batch, self.c_in, generator=generator)
        border = (0, 0) if self.is_first else self.padding
        h, w = (n + 2 * p for n, p in zip(self.size, border, strict=True))
        x = torch.randn(self.batch, self.c_in, h, w, generator=generator)
        return x if self.is_first else x.to(memory_format=torch.channels_last)

    @functools.cached_property
    def cost(self) -> LayerCost:
        """Of the whole batch, by the layer's definition: what Winograd saves and what a pool drops is counted."""
        with torch.device("meta"):
            return layer_costs(self._make(), torch.empty_like(self.example(), device="meta"))[0]


def conv(
    c_in: int, c_out: int, kernel: int, out: int, stride: int = 1, pool: tuple[int, int] | None = None, groups: int = 1
) -> Layer:
    """A convolution by the size of its output."""
    size = (out - 1) * stride + kernel
    return Layer(c_in, c_out, (kernel, kernel), (stride, stride), groups=groups, size=(size, size), pool=pool)


def first(
    c_in: int, c_out: int, kernel: int, size: int, stride: int = 1, padding: int = 0, pool: bool = False
) -> Layer:
    """The first convolution of a network, by the size of its input."""
    window = (2, 2) if pool else None
    layer = Layer(c_in, c_out, (kernel, kernel), (stride, stride), (padding, padding), size=(size, size), pool=window)
    return replace(layer, is_first=True)


def linear(n_in: int, n_out: int, rows: int) -> Layer:
    return Layer(n_in, n_out, batch=rows)


GROUPS: dict[str, tuple[Layer, ...]] = {
    "3x3": (
        *(conv(64, 64, 3, out) for out in (112, 56, 28, 14)),
        *(conv(128, 128, 3, out) for out in (112, 56, 28, 14)),
        *(conv(256, 256, 3, out) for out in (56, 28, 14)),
        *(conv(512, 512, 3, out) for out in (28, 14)),
    ),
    "3x3 pooled": (
        *(conv(64, 64, 3, out, pool=(2, 2)) for out in (112, 56, 28)),
        *(conv(128, 128, 3, out, pool=(2, 2)) for out in (56, 28)),
        *(conv(256, 256, 3, out, pool=(2, 2)) for out in (28, 14)),
        conv(512, 512, 3, 14, pool=(2, 2)),
        conv(64, 64, 3, 55, pool=(3, 2)),
    ),
    "5x5": (
        conv(64, 64, 5, 27),
        conv(64, 64, 5, 56),
        conv(128, 128, 5, 28),
        conv(64, 192, 5, 27, pool=(3, 2)),
        conv(64, 64, 5, 28, pool=(2, 2)),
        conv(20, 64, 5, 20),
        conv(64, 30, 5, 11, pool=(2, 2)),
    ),
    "first": (
        first(3, 64, 3, 224, padding=1, pool=True),
        first(3, 64, 3, 32, padding=1, pool=True),
        first(3, 64, 3, 32, pool=True),
        first(3, 64, 3, 224, padding=1),
        first(3, 64, 3, 32, padding=1),
        first(1, 20, 5, 28),
        first(1, 6, 5, 28, padding=2, pool=True),
        first(3, 64, 7, 224, stride=2, padding=3),
        first(3, 64, 11, 224, stride=4, padding=2),
    ),
    "1x1": (
        conv(64, 64, 1, 56),
        conv(64, 256, 1, 56),
        conv(256, 64, 1, 56),
        conv(512, 512, 1, 14),
        conv(256, 512, 1, 28, stride=2),
    ),
    "strided": (conv(64, 128, 3, 28, stride=2), conv(128, 256, 3, 14, stride=2), conv(64, 128, 5, 28, stride=2)),
    "large windows": (conv(64, 64, 7, 28), conv(32, 32, 7, 56), conv(64, 64, 11, 28), conv(16, 32, 11, 56)),
    "odd channels": (
        conv(20, 30, 3, 28),
        conv(30, 17, 3, 28),
        conv(17, 1, 3, 28),
        conv(6, 16, 5, 10, pool=(2, 2)),
        conv(20, 20, 1, 28),
    ),
    "depthwise": (conv(64, 64, 3, 56, groups=64), conv(256, 256, 3, 14, groups=256)),
    "linear": (
        *(linear(4096, 4096, rows) for rows in (1, 2, 4, 8, 16, 64, 256)),
        linear(25088, 4096, 1),
        *(linear(784, 512, rows) for rows in (1, 2, 4, 8, 16, 64, 256, 1024)),
        *(linear(256, 256, rows) for rows in (1, 16, 256, 4096)),
        *(linear(128, 64, rows) for rows in (1, 32, 1024)),
        linear(512, 10, 256),
    ),
}


def of_network(name: str) -> list[Layer]:
    """The convolutions and Linear layers of `MODELS[name]`, each once; Linear layers at each of its batch sizes."""
    case = MODELS[name]
    with torch.device("meta"):
        model, x = case.make().eval(), torch.empty(1, *case.input_shape)
    ran: list[tuple[nn.Module, Tensor]] = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.ReLU, nn.MaxPool2d)):
            module.register_forward_hook(lambda m, inputs, output: ran.append((m, inputs[0])))
    with torch.no_grad():
        model(x)
    layers: list[Layer] = []
    for i, (module, given) in enumerate(ran):
        behind = [m for m, _ in ran[i + 1 : i + 3]]
        has_relu = bool(behind) and isinstance(behind[0], nn.ReLU)
        if isinstance(module, nn.Linear):
            layer = Layer(module.in_features, module.out_features, has_relu=has_relu)
            layers += [replace(layer, batch=batch) for batch in case.batches]
        elif isinstance(module, nn.Conv2d):
            assert not isinstance(module.padding, str)
            pool = next((m for m in behind[has_relu:][:1] if isinstance(m, nn.MaxPool2d)), None)
            layers.append(
                Layer(
                    module.in_channels,
                    module.out_channels,
                    (module.kernel_size[0], module.kernel_size[1]),
                    (module.stride[0], module.stride[1]),
                    (module.padding[0], module.padding[1]),
                    module.groups,
                    (given.shape[2], given.shape[3]),
                    None if pool is None else (int(pool.kernel_size), int(pool.stride)),  # type: ignore[arg-type]
                    has_relu,
                    is_first=not layers,
                )
            )
    return list(dict.fromkeys(layers))


# Ways to run one -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A way to run a layer: options of `optimize`, and part of a kernel's name that is preferred, "" for none."""

    label: str
    options: tuple[tuple[str, Any], ...] = ()
    kernel: str = ""


OWN_CHOICE = Variant("own choice")


def optimize_options() -> Mapping[str, inspect.Parameter]:
    return inspect.signature(fastseq.optimize).parameters


def winograd_variants(layer: Layer) -> list[Variant]:
    """With and without Winograd, where it may apply and this fastseq has the option; else the own choice alone."""
    applies = layer.kernel in ((3, 3), (5, 5)) and layer.stride == (1, 1) and layer.groups == 1
    if "winograd" not in optimize_options() or not applies:
        return [OWN_CHOICE]
    return [Variant(f"winograd {value}", (("winograd", value),)) for value in ("auto", "off")]


@dataclass
class Prepared:
    """A variant ready to be called: `module`, and `native`, its engine without the module around, if it runs all."""

    variant: Variant
    kernel: str
    module: nn.Module
    native: Callable[[Tensor], Tensor] | None
    error: float


@contextmanager
def preferred_kernel(name: str) -> Iterator[None]:
    """Plans that are made inside prefer this kernel: models read the variable at their first call."""
    before = os.environ.get("FASTSEQ_KERNEL")
    os.environ["FASTSEQ_KERNEL"] = name or before or ""
    try:
        yield
    finally:
        os.environ.pop("FASTSEQ_KERNEL")
        if before is not None:
            os.environ["FASTSEQ_KERNEL"] = before


def prepare(plain: nn.Sequential, x: Tensor, exact: Tensor, variant: Variant) -> Prepared:
    """Optimises a copy of `plain`, calls it once, and finds out what it ran."""
    with torch.inference_mode():
        with preferred_kernel(variant.kernel):
            fast = fastseq.optimize(plain, **dict(variant.options))
            output = fast(x)
        segments = fastseq.explain(fast).to_dict()["sequentials"][0]["segments"]
    segment = segments[0]
    is_native = segment["kind"] == "native"
    compiled = compiled_of(fast)
    native = None
    if is_native and len(segments) == 1 and compiled is not None:
        native = functools.partial(compiled.call, fast)
        with torch.inference_mode():
            if not isinstance(native(x), Tensor):  # it would be timed refusing
                native = None
    kernel = segment["steps"][0]["kernel"] if is_native else f"eager: {segment['reason']}"
    return Prepared(variant, kernel, fast, native, relative_error(output, exact)["rel_max"])


def exact_result(plain: nn.Sequential, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = copy.deepcopy(plain).double()(x.double())
    return result


# Time ----------------------------------------------------------------------------------------------------------------


def seconds_per_call(call: Callable[[Tensor], Any], x: Tensor, min_time: float) -> float:
    """One block of calls, long enough to measure, in a loop without bytecode; each result is dropped at once.

    By the clock of this thread, which must do all the work: what another process takes of the core is not counted.
    """
    calls = 1
    while True:
        start = time.thread_time()
        deque(map(call, repeat(x, calls)), maxlen=0)
        elapsed = time.thread_time() - start
        if elapsed >= min_time:
            return elapsed / calls
        calls = max(calls + 1, int(calls * 1.2 * min_time / max(elapsed, 1e-7)))
