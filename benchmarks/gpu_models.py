"""Checks of whole models: layouts, special values, poisoned memory, and the networks of fastseq.testing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from gpu_device import MODES, Mode
from gpu_shapes import image_layouts, laid_out, preferring, row_layouts
from gpu_task import Check, Task
from torch import Tensor, nn

import fastseq
from fastseq.testing import MODELS

MODEL_MODES = ("default", "f32", "tf32", "f16", "bf16")


def small_net() -> nn.Sequential:
    """Two convolutions with pools and three Linear layers, all in kernels of our own."""
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 20, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(20 * 3 * 3, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 10)),
    )


SMALL_INPUT = (3, 16, 16)


def library_net() -> nn.Sequential:
    """Deep enough for the convolution to go to cuDNN and a Linear layer to cuBLAS, at 8 images."""
    return nn.Sequential(
        *(nn.Conv2d(3, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(16 * 6 * 6, 512), nn.ReLU(), nn.Linear(512, 10)),
    )


LIBRARY_INPUT = (3, 24, 24)


def norm_net() -> nn.Sequential:
    """BatchNorm and activations behind every kind of kernel of ours, and behind a convolution for cuDNN at 8 images."""
    return nn.Sequential(
        *(nn.Conv2d(3, 128, 3, padding=1), nn.BatchNorm2d(128), nn.SiLU(), nn.Conv2d(128, 24, 3, padding=1)),
        *(nn.BatchNorm2d(24), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(24, 20, 3, bias=False), nn.BatchNorm2d(20)),
        *(
            nn.MaxPool2d(3, 2),
            nn.PReLU(20),
            nn.Conv2d(20, 12, 3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(12),
            nn.Flatten(),
        ),
        *(nn.Linear(12 * 4 * 4, 300), nn.BatchNorm1d(300), nn.GELU(), nn.Linear(300, 40), nn.Tanh(), nn.Linear(40, 10)),
    )


NETS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "small net": (small_net, SMALL_INPUT),
    "net with library calls": (library_net, LIBRARY_INPUT),
    "net with norms and activations": (norm_net, LIBRARY_INPUT),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    **{kind.__name__: kind for kind in (nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.Hardtanh, nn.ReLU6)},
    **{kind.__name__: kind for kind in (nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.SiLU, nn.GELU)},
    **{kind.__name__: kind for kind in (nn.Softplus, nn.Mish)},
    "GELU by tanh": lambda: nn.GELU(approximate="tanh"),
}


def activations(check: Check) -> None:
    """Each behind each kind of kernel and pool, and of odd values: the functions are the GPU's own here."""
    for mode in map(MODES.__getitem__, ("f32",) if check.is_small else ("f32", "f16", "bf16")):
        for name, make in ACTIVATIONS.items():
            for place, layers, size in (
                ("convolution", [nn.Conv2d(3, 9, 3), make()], (3, 10, 10)),
                ("convolution, pool behind it", [nn.Conv2d(16, 9, 3), make(), nn.MaxPool2d(2)], (16, 10, 9)),
                ("convolution, pool in front", [nn.Conv2d(3, 9, 3), nn.MaxPool2d(3, 2), make()], (3, 12, 10)),
                (
                    "norm, overlapping pool",
                    [nn.Conv2d(8, 9, 3), nn.BatchNorm2d(9), make(), nn.MaxPool2d(3, 2)],
                    (8, 9, 9),
                ),
                ("tiny_mlp", [nn.Linear(33, 20), make(), nn.Linear(20, 7), nn.BatchNorm1d(7), make()], (33,)),
                ("skinny_linear", [nn.Linear(520, 300), make()], (520,)),
                ("cuBLAS", [nn.Linear(512, 520), make()], (512,)),
            ):
                model = check.model(layers, mode)
                x = check.random(33 if place == "cuBLAS" else 9, *size, mode=mode)
                check.run(model, x, mode, f"{mode.name}, {name}, {place}")
                if check.is_small:
                    break
            eye = check.model([nn.Linear(1, 5, bias=False), make()], mode)
            with torch.no_grad():
                eye[0].weight.fill_(1.0)
            odd = [
                0.0,
                -0.0,
                math.inf,
                -math.inf,
                math.nan,
                6e4,
                -6e4,
                88.5,
                -88.5,
                20.5,
                -20.5,
                -5.5,
                -3.0,
                3.0,
                6.0,
                1e-4,
            ]
            x = torch.tensor(odd)[:, None].to(mode.dtype).to(check.device.device)
            check.run(eye, x, mode, f"{mode.name}, {name}, odd values")


def layouts(check: Check) -> None:
    for mode in map(MODES.__getitem__, ("f32", "tf32", "f16", "bf16")):
        for ends, layers in (
            ("images", [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]),
            ("odd images", [nn.Conv2d(5, 7, 3), nn.ReLU(), nn.Conv2d(7, 9, 3)]),
        ):
            model = check.model(layers, mode)
            fast = fastseq.optimize(model)
            first = model[0]
            assert isinstance(first, nn.Conv2d)
            for name, x in image_layouts(check.random(3, first.in_channels, 9, 10, mode=mode)):
                check.run(model, x, mode, f"{mode.name}, {ends}, {name}", fast)
            single, several = (check.random(*n, first.in_channels, 9, 10, mode=mode) for n in ((), (2,)))
            check.run(model, single, mode, f"{mode.name}, {ends}, 3-D", fast)
            late = copy.deepcopy(model).to(memory_format=torch.channels_last)
            check.run(late, several, mode, f"{mode.name}, {ends}, channels_last weights")
        model = check.model([nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 9)], mode)
        fast = fastseq.optimize(model)
        for name, x in row_layouts(check.random(5, 24, mode=mode)):
            check.run(model, x, mode, f"{mode.name}, rows, {name}", fast)
        for size in ((24,), (2, 3, 24), (1, 1, 1, 24)):
            check.run(model, check.random(*size, mode=mode), mode, f"{mode.name}, rows, {len(size)}-D", fast)


def special_inputs(x: Tensor) -> Tensor:
    """Rows or images of which each has a different oddity somewhere, and one has none."""
    x = x.clone()
    inf, nan = math.inf, math.nan
    flat = x.flatten(1)
    middle, end = flat.shape[1] // 2, flat.shape[1] - 1
    for i, values in enumerate(((nan,), (inf,), (-inf,), (inf, -inf), (nan, inf), (-0.0,))):
        for j, value in enumerate(values):
            flat[i, (middle, end)[j]] = value
    flat[6], flat[7] = -0.0, 0.0
    return flat.view_as(x)


def special_values(check: Check) -> None:
    for mode in map(MODES.__getitem__, ("f32", "tf32", "f16", "bf16")):
        for name, layers, size in (
            ("gather, pool", [nn.Conv2d(3, 12, 3), nn.ReLU(), nn.MaxPool2d(2)], (3, 10, 10)),
            ("vector", [nn.Conv2d(16, 9, 3), nn.ReLU()], (16, 7, 7)),
            ("overlapping pool", [nn.Conv2d(8, 8, 3), nn.MaxPool2d(3, 2), nn.ReLU()], (8, 12, 12)),
            ("two convolutions", [nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 6, 3)], (1, 9, 9)),
            ("norm, pool", [nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)], (3, 10, 10)),
            ("tiny_mlp", [nn.Linear(33, 20), nn.ReLU(), nn.Linear(20, 7), nn.ReLU()], (33,)),
            ("tiny_mlp, norm", [nn.Linear(33, 20), nn.BatchNorm1d(20), nn.GELU(), nn.Linear(20, 7)], (33,)),
            ("skinny_linear", [nn.Linear(520, 300), nn.ReLU()], (520,)),
            ("deep", [nn.Conv2d(128, 16, 3), nn.ReLU(), nn.MaxPool2d(2)], (128, 27, 27)),
        ):
            model = check.model(layers, mode)
            x = special_inputs(check.random(9, *size, mode=mode))
            for layout in ("NCHW", "channels_last") if len(size) == 3 else ("contiguous",):
                check.run(model, laid_out(x, layout), mode, f"{mode.name}, {name}, {layout}")
        with preferring("fused_mlp"):
            model = check.model([nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 40), nn.ReLU()], mode)
            check.run(model, special_inputs(check.random(9, 48, mode=mode)), mode, f"{mode.name}, fused_mlp")
        model = check.model([nn.MaxPool2d(3, 2, 1)], mode)
        x = torch.where(check.random(9, 8, 9, 9, mode=mode) < 0, -0.0, 0.0).to(mode.dtype)
        for name, values in (("zeros", x), ("oddities", special_inputs(check.random(9, 8, 9, 9, mode=mode)))):
            for layout in ("NCHW", "channels_last"):
                label = f"{mode.name}, MaxPool2d of {name}, {layout}"
                check.run(model, laid_out(values, layout), mode, label, signs=name == "zeros")
        # An infinite bias and weight reach exactly the outputs they belong to.
        model = check.model([nn.Conv2d(4, 10, 3), nn.ReLU(), nn.MaxPool2d(2)], mode)
        with torch.no_grad():
            model[0].bias[3], model[0].bias[4], model[0].weight[5, 0, 0, 0] = math.inf, -math.inf, math.nan
        check.run(model, check.random(3, 4, 9, 9, mode=mode), mode, f"{mode.name}, odd weights")


def poisoned(check: Check) -> None:
    """Fresh data in memory full of NaN, many times: for unwritten outputs, and libraries that read what they write."""
    for mode in map(MODES.__getitem__, ("default", "f16", "bf16")):
        for name, (make, size) in NETS.items():
            model = check.model(make(), mode)
            fast = fastseq.optimize(model)
            for batch in (8, 1, 3, 8, 8) if not check.is_small else (8, 1):
                check.run(model, check.random(batch, *size, mode=mode), mode, f"{mode.name}, {name}, {batch}", fast)


def zoo_task(name: str, mode: Mode, batches: Sequence[int]) -> Task:
    def run(check: Check) -> None:
        case = MODELS[name]
        model = case.build(seed=int(torch.randint(1 << 30, (1,), generator=check.generator)))
        model = model.to(mode.dtype).to(check.device.device)
        fast = fastseq.optimize(model)
        for batch in batches:
            x = check.random(batch, *case.input_shape, mode=mode)
            check.run(model, x, mode, f"batch {batch}", fast)
            if x.dim() == 4 and batch > 1 and name != "seed3":  # whose view() eager refuses in channels_last
                check.run(model, laid_out(x, "channels_last"), mode, f"batch {batch}, channels_last", fast)

    return Task(f"model {name}, {mode.name}", run)


def zoo_tasks(is_small: bool, is_stand_in: bool) -> Iterator[Task]:
    names: dict[str, Sequence[int]] = {"seed1": (1, 3, 33), "seed2": (1, 7, 300), "seed3": (1, 5)}
    names["lenet5"] = (1, 9, 257)
    if not is_small and not is_stand_in:
        names |= {"mlp": (1, 37, 1500), "cifar_vgg": (1, 5, 32), "alexnet": (1, 9), "vgg11": (1, 3)}
        names["cifar_vgg_bn"] = (1, 5, 32)
    for name, batches in names.items():
        for mode in ("default",) if is_small else MODEL_MODES:
            yield zoo_task(name, MODES[mode], batches[:2] if is_stand_in else batches)
