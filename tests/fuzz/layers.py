"""Building what a case describes: layers, Sequentials, modules around them, inputs."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: F401 - named in the lines of holders

from .case import Case, Group, Input, Layer


def sees_unwritten_memory(dtype: torch.dtype, rounds: int = 40) -> bool:
    """Whether eager's own convolutions of this type depend on what was in memory before.

    On a CPU with AMX some of torch 2.13's in bfloat16 do: NaN that somebody left there comes out of finite values.
    """
    conv = nn.Conv2d(3, 7, (1, 2), stride=3).to(dtype)
    x = torch.ones(33, 3, 13, 2, dtype=dtype)
    with torch.inference_mode():
        for _ in range(rounds):
            left = [torch.full((1 << k,), float("nan")) for k in range(4, 18)]
            del left
            if conv(x).isnan().any():
                return True
    return False


# Where eager disagrees with itself nothing can be compared with it: float16 takes the place of bfloat16 there.
BFLOAT16 = torch.float16 if sees_unwritten_memory(torch.bfloat16) else torch.bfloat16
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": BFLOAT16,
    "float16": torch.float16,
    "int64": torch.int64,
}


class Scale(nn.Module):
    """A layer fastseq knows nothing of."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.5


class Doubles(nn.Module):
    """A layer that writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class SubConv2d(nn.Conv2d):
    pass


class SubLinear(nn.Linear):
    """A subclass with a forward of its own, as adapters have."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class SubReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) - 0.25


class SubMaxPool2d(nn.MaxPool2d):
    pass


class SubSequential(nn.Sequential):
    """A subclass that changes nothing."""


class NegatingSequential(nn.Sequential):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return -super().forward(input)


OWN = (Scale, Doubles, SubConv2d, SubLinear, SubReLU, SubMaxPool2d, SubSequential, NegatingSequential)
KINDS: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in OWN}
SPECIAL_WEIGHTS = {"nan": float("nan"), "infinite": float("inf"), "minus infinite": -float("inf"), "huge": 1e12}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def kind_of(name: str) -> type[nn.Module]:
    return KINDS[name] if name in KINDS else getattr(nn, name)


def build_part(part: Layer | Group, built: dict[int, nn.Module]) -> nn.Module:
    """The module of a part. `built`: those made already, by key."""
    if part.key in built:
        return built[part.key]
    if isinstance(part, Layer):
        module = kind_of(part.kind)(*part.args, **part.kwargs)
    else:
        module = kind_of(part.kind)()
        for number, (name, child) in enumerate(part.children):
            module.add_module(name or str(number), build_part(child, built))
    built[part.key] = module
    return module


def holder_class(lines: list[str]) -> type[nn.Module]:
    """A class with these lines as its forward. It is this module's, so that its objects can be pickled."""
    source = "class {name}(nn.Module):\n    def forward(self, x):\n" + "".join(f"        {line}\n" for line in lines)
    name = "Holder" + hashlib.sha256(source.encode()).hexdigest()[:12]
    if name not in globals():
        text = source.replace("{name}", name)
        filename = f"<{name}>"
        linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
        exec(compile(text, filename, "exec"), globals())
    kind: type[nn.Module] = globals()[name]
    return kind


def build_model(case: Case) -> nn.Module:
    """The plain model of a case, with its weights."""
    torch.default_generator.manual_seed(case.seed)
    built: dict[int, nn.Module] = {}
    parts = [build_part(part, built) for part in case.parts]
    if case.lines:
        model = holder_class(case.lines)()
        for number, part in enumerate(parts):
            model.add_module(f"p{number}", part)
        model.flag = False
        model.calls = 0
    else:
        model = parts[0]
    fill(model, case.weights)
    ready = [p for p in model.parameters() if not isinstance(p, nn.parameter.UninitializedTensorMixin)]
    if case.channels_last and len(ready) == len(list(model.parameters())):
        model.to(memory_format=torch.channels_last)
    model.train(case.training)
    if case.frozen:
        for parameter in ready:
            parameter.requires_grad_(False)
    return model.to(DTYPES[case.dtype])


def fill(model: nn.Module, weights: str) -> None:
    """Draws weights and statistics. "integers" are small ones, so that sums are exact in any order."""
    with torch.no_grad():
        for parameter in model.parameters():
            if isinstance(parameter, nn.parameter.UninitializedTensorMixin):
                continue
            if weights == "integers":
                parameter.copy_(torch.randint(-1, 2, parameter.shape))
            elif weights == "sparse":
                parameter.mul_(torch.rand_like(parameter) < 0.3)
            elif weights in SPECIAL_WEIGHTS:
                parameter[torch.rand_like(parameter) < 0.04] = SPECIAL_WEIGHTS[weights]
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm) and module.weight is not None and weights == "normal":
                module.weight.normal_()
            if isinstance(module, NORMS) and module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)


def walk(parts: list[Layer | Group]) -> Iterator[Layer | Group]:
    for part in parts:
        yield part
        if isinstance(part, Group):
            yield from walk([child for _, child in part.children])


def build_values(given: Input, shape: tuple[int, ...]) -> Tensor:
    if given.dtype == "int64":
        return torch.randint(-3, 4, shape)
    x = torch.randn(shape)
    if given.values == "integers":
        x = torch.randint(-2, 3, shape).float()
    elif given.values == "special":
        chosen = torch.rand(shape)
        for at, value in enumerate((float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-41)):
            x[(chosen >= at * 0.02) & (chosen < at * 0.02 + 0.02)] = value
    elif given.values == "nan":
        x[torch.rand(shape) < 0.03] = float("nan")
    elif given.values == "infinite":
        x[torch.rand(shape) < 0.02] = float("inf")
    elif given.values == "zeros":
        x = torch.zeros(shape).copysign(x)
    elif given.values == "denormal":
        x = x * 1e-40
    elif given.values == "huge":
        x = x * 1e18
    return x.to(DTYPES[given.dtype])


def surroundings(given: Input, shape: tuple[int, ...]) -> Tensor:
    """What lies around a view: NaN, which shows in any result that was computed from it."""
    dtype = DTYPES[given.dtype]
    return torch.full(shape, float("nan") if dtype.is_floating_point else 9, dtype=dtype)


def build_input(given: Input, seed: int) -> tuple[Tensor, Tensor]:
    """The input, and the memory it lies in: no call may change what surrounds it."""
    torch.default_generator.manual_seed(seed)
    shape = given.shape
    layout = given.layout
    if layout == "channels_last" and len(shape) == 4:
        base = build_values(given, shape).to(memory_format=torch.channels_last)
        x = base.view_as(base)
    elif layout == "permuted" and len(shape) >= 3:  # memory as channels_last, whatever the rank
        base = build_values(given, (*shape[:-3], *shape[-2:], shape[-3]))
        x = base.movedim(-1, -3)
    elif layout == "transposed" and len(shape) >= 2:
        base = build_values(given, (*shape[:-2], shape[-1], shape[-2]))
        x = base.transpose(-1, -2)
    elif layout == "batch_last" and len(shape) >= 2:
        base = build_values(given, (*shape[1:], shape[0]))
        x = base.movedim(-1, 0)
    elif layout == "sliced" and len(shape) >= 1:
        base = surroundings(given, (*shape[:-1], 2 * shape[-1] + 1))
        x = base[..., 1::2].copy_(build_values(given, shape))
    elif layout == "cropped" and len(shape) >= 2:
        base = surroundings(given, (*shape[:-2], shape[-2] + 2, shape[-1] + 3))
        x = base[..., 1:-1, 2:-1].copy_(build_values(given, shape))
    elif layout == "channel_slice" and len(shape) >= 3:
        base = surroundings(given, (*shape[:-3], shape[-3] + 2, *shape[-2:]))
        x = base[..., 1:-1, :, :].copy_(build_values(given, shape))
    elif layout == "expanded" and len(shape) >= 2:
        base = build_values(given, (1, *shape[1:]))
        x = base.expand(shape)
    elif layout == "offset":
        base = surroundings(given, (3 + torch.Size(shape).numel(),))
        x = base[1:-2].view(shape).copy_(build_values(given, shape))
    elif layout == "negated":
        base = build_values(given, shape)
        x = torch._neg_view(base) if base.is_floating_point() else base
    elif layout == "parameter":
        base = build_values(given, shape)
        x = nn.Parameter(base, requires_grad=False)
    else:
        base = build_values(given, shape)
        x = base.view_as(base)
    if given.requires_grad and x.is_floating_point():
        x.requires_grad_()
    return x, base
