"""Models, inputs and the oracle that tests and benchmarks share.

`MODELS` is the table of networks. `assert_matches` compares a result with the same model in float64, and allows a small
multiple of the error that eager PyTorch itself makes: two correct float32 engines differ from each other by more than
fixed tolerances allow once a network is deep, so float64 is the only fair judge.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

__all__ = [
    "MODELS",
    "LayerCost",
    "ModelCase",
    "Reference",
    "assert_matches",
    "count_flops",
    "error_vs_float64",
    "error_floor",
    "layer_costs",
    "relative_error",
]


# The networks -----------------------------------------------------------------------------------------------------


class TwoStageConvNet(nn.Module):
    """Two Conv-ReLU-MaxPool stages and a Linear-ReLU head, for (batch, 3, 32, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.layer2 = nn.Sequential(nn.Conv2d(64, 30, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.layer3 = nn.Sequential(nn.Linear(30 * 5 * 5, 10), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(x))
        y: Tensor = self.layer3(x.view(x.shape[0], -1))
        return y


class ImageNetModel(nn.Module):
    """The outline that torchvision's AlexNet and VGG share: features, adaptive average pool, classifier."""

    def __init__(self, features: nn.Sequential, pooled_size: int, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d((pooled_size, pooled_size))
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        y: Tensor = self.classifier(torch.flatten(x, 1))
        return y


def _seed1() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.Conv2d(20, 64, 5), nn.ReLU())


def _seed1_named() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            [
                ("conv1", nn.Conv2d(1, 20, 5)),
                ("relu1", nn.ReLU()),
                ("conv2", nn.Conv2d(20, 64, 5)),
                ("relu2", nn.ReLU()),
            ]
        )
    )


def _seed2() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def _lenet5() -> nn.Module:
    return nn.Sequential(
        *_conv_stack(1, [6, "M"], kernel_size=5, padding=2),
        *_conv_stack(6, [16, "M"], kernel_size=5, padding=0),
        nn.Flatten(),
        *_linear_stack(16 * 5 * 5, 120, 84, 10),
    )


def _lenet_tanh() -> nn.Module:
    """LeNet-5 as it was first: tanh, and averages instead of maxima."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * 5 * 5, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)),
    )


def _mlp() -> nn.Module:
    return nn.Sequential(*_linear_stack(784, 512, 512, 10))


def _mlp_8x256() -> nn.Module:
    return nn.Sequential(*_linear_stack(*[256] * 9))


def _mlp_3x4096() -> nn.Module:
    return nn.Sequential(*_linear_stack(*[4096] * 4))


def _cifar_vgg(has_norm: bool = False) -> nn.Module:
    features = _conv_stack(3, [64, 64, "M", 128, 128, "M", 256, 256, "M"], has_norm=has_norm)
    return nn.Sequential(*features, nn.Flatten(), *_linear_stack(256 * 4 * 4, 256, 10))


def _cifar_cnn() -> nn.Module:
    """Convolutions of stride 2 instead of pools, BatchNorm behind ReLU, and a global average before the one Linear."""
    layers: list[nn.Module] = []
    for c_in, c_out, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.ReLU(), nn.BatchNorm2d(c_out)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 10))


def _alexnet() -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
    )
    classifier = nn.Sequential(
        nn.Dropout(),
        nn.Linear(256 * 6 * 6, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Linear(4096, 1000),
    )
    return ImageNetModel(features, 6, classifier)


def _vgg(channels: list[int | str], has_norm: bool = False) -> nn.Module:
    features = nn.Sequential(*_conv_stack(3, channels, inplace=True, has_norm=has_norm))
    classifier = nn.Sequential(
        nn.Linear(512 * 7 * 7, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, 1000),
    )
    return ImageNetModel(features, 7, classifier)


def _vgg11() -> nn.Module:
    return _vgg([64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"])


def _vgg16(has_norm: bool = False) -> nn.Module:
    return _vgg([64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"], has_norm)


def _mobilenet_v1() -> nn.Module:
    """Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017."""
    layers = [nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
    c_in = 32
    for c_out, stride in (
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        *5 * ((512, 1),),
        (1024, 2),
        (1024, 1),
    ):
        depthwise = nn.Conv2d(c_in, c_in, 3, stride, padding=1, groups=c_in, bias=False)
        layers += [depthwise, nn.BatchNorm2d(c_in), nn.ReLU(inplace=True)]
        layers += [nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
        c_in = c_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000))


def _autoencoder() -> nn.Module:
    """Images to codes of 32 numbers, by convolutions and pools, and back, by upsampling and convolutions."""
    return nn.Sequential(
        nn.Sequential(*_conv_stack(1, [16, "M", 32, "M"]), nn.Flatten(), nn.Linear(32 * 7 * 7, 32)),
        nn.Sequential(
            *(nn.Linear(32, 32 * 7 * 7), nn.ReLU(), nn.Unflatten(1, (32, 7, 7))),
            *(nn.Upsample(scale_factor=2), *_conv_stack(32, [16])),
            *(nn.Upsample(scale_factor=2), nn.Conv2d(16, 1, 3, padding=1), nn.Sigmoid()),
        ),
    )


def _espcn() -> nn.Module:
    """Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural
    Network", 2016: three times the size."""
    return nn.Sequential(
        *(nn.Conv2d(1, 64, 5, padding=2), nn.Tanh()),
        *(nn.Conv2d(64, 32, 3, padding=1), nn.Tanh()),
        *(nn.Conv2d(32, 9, 3, padding=1), nn.PixelShuffle(3)),
    )


def _conv_stack(
    c_in: int,
    channels: list[int | str],
    kernel_size: int = 3,
    padding: int = 1,
    inplace: bool = False,
    has_norm: bool = False,
) -> list[nn.Module]:
    """Conv-ReLU for each number in `channels`, or Conv-BatchNorm-ReLU, and a 2x2 max-pool for each "M"."""
    layers: list[nn.Module] = []
    for entry in channels:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers.append(nn.Conv2d(c_in, entry, kernel_size, padding=padding, bias=not has_norm))
            layers += [nn.BatchNorm2d(entry)] if has_norm else []
            layers.append(nn.ReLU(inplace=inplace))
            c_in = entry
    return layers


def _linear_stack(*widths: int) -> list[nn.Module]:
    """Linear layers with ReLU between them, none after the last."""
    layers: list[nn.Module] = []
    for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return layers[:-1]


@dataclass(frozen=True)
class ModelCase:
    """One network of the table: how to make it, what it takes, and the batch sizes it is usually timed at."""

    name: str
    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    batches: tuple[int, ...]
    title: str = ""  # for tables and plots, where the name says too little

    def build(self, seed: int = 0) -> nn.Module:
        """The model in eval mode with He-initialised weights; the same seed gives the same bytes.

        PyTorch's default initialisation shrinks activations layer by layer until the biases are all that is left of a
        deep network; He's keeps them at unit scale, so that errors mean the same at every depth.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make()
            for module in model.modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    if module.bias is not None:
                        nn.init.normal_(module.bias, std=0.1)
                elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    assert module.running_mean is not None and module.running_var is not None
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, std=0.1)
                    nn.init.normal_(module.running_mean, std=0.1)
                    nn.init.uniform_(module.running_var, 0.5, 2.0)
        return model.eval()

    def example(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """A (batch, *input_shape) input from a standard normal; without a generator, always the same one."""
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, *self.input_shape, generator=generator)

    @cached_property
    def layer_costs(self) -> tuple[LayerCost, ...]:
        """What each convolution and Linear layer costs for a batch of one, in the order in which they run."""
        with torch.device("meta"):
            return tuple(layer_costs(self.make().eval(), torch.empty(1, *self.input_shape)))

    @property
    def flops_per_image(self) -> int:
        """Floating-point operations of the convolutions and Linear layers for a batch of one."""
        return sum(cost.flops for cost in self.layer_costs)


MODELS: dict[str, ModelCase] = {
    case.name: case
    for case in (
        ModelCase("seed1", _seed1, (1, 28, 28), (1, 64), "seed 1: two convolutions"),
        ModelCase("seed1_named", _seed1_named, (1, 28, 28), (1, 64), "seed 1, named layers"),
        ModelCase("seed2", _seed2, (128,), (1, 32), "seed 2: MLP 128-64-10"),
        ModelCase("seed3", TwoStageConvNet, (3, 32, 32), (1, 64), "seed 3: two pooled stages"),
        ModelCase("lenet5", _lenet5, (1, 28, 28), (1, 256), "LeNet-5"),
        ModelCase("lenet_tanh", _lenet_tanh, (1, 28, 28), (1, 256), "LeNet-5, tanh and average pools"),
        ModelCase("mlp", _mlp, (784,), (1, 256), "MLP 784-512-512-10"),
        ModelCase("mlp_8x256", _mlp_8x256, (256,), (4096,), "MLP of 8 x 256"),
        ModelCase("mlp_3x4096", _mlp_3x4096, (4096,), (1, 64), "MLP of 3 x 4096"),
        ModelCase("cifar_vgg", _cifar_vgg, (3, 32, 32), (1, 32), "CIFAR VGG-like, no batch norm"),
        ModelCase(
            "cifar_vgg_bn", partial(_cifar_vgg, has_norm=True), (3, 32, 32), (1, 32), "CIFAR VGG-like, batch norm"
        ),
        ModelCase("cifar_cnn", _cifar_cnn, (3, 32, 32), (1, 32), "CIFAR CNN, global average"),
        ModelCase("autoencoder", _autoencoder, (1, 28, 28), (1, 64), "convolutional autoencoder"),
        ModelCase("espcn", _espcn, (1, 64, 64), (1, 8), "ESPCN, three times the size"),
        ModelCase("alexnet", _alexnet, (3, 224, 224), (1, 8), "AlexNet"),
        ModelCase("vgg11", _vgg11, (3, 224, 224), (1,), "VGG11"),
        ModelCase("vgg16", _vgg16, (3, 224, 224), (1, 4), "VGG16"),
        ModelCase("vgg16_bn", partial(_vgg16, has_norm=True), (3, 224, 224), (1, 4), "VGG16, batch norm"),
        ModelCase("mobilenet_v1", _mobilenet_v1, (3, 224, 224), (1, 8), "MobileNetV1"),
    )
}


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs by its definition: its multiply-adds, counted twice, and the weights that it reads."""

    flops: int
    weight_bytes: int  # bias not counted


COSTLY = (nn.Conv1d, nn.Conv2d, nn.Linear)


def layer_costs(model: nn.Module, x: Tensor) -> list[LayerCost]:
    """What each convolution and Linear that `model(x)` runs costs, in that order; all else costs nothing."""
    costs: list[LayerCost] = []

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, COSTLY)
        weight = module.weight
        costs.append(LayerCost(2 * output.numel() * weight[0].numel(), weight.numel() * weight.element_size()))

    handles = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, COSTLY)]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return costs


def count_flops(model: nn.Module, x: Tensor) -> int:
    """2 x multiply-adds of every convolution and Linear that `model(x)` runs; all else is not counted."""
    return sum(cost.flops for cost in layer_costs(model, x))


# The oracle -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What a model gives for one input: eager's own result, and the float64 one that both are measured against."""

    eager: Tensor
    exact: Tensor

    @classmethod
    def of(cls, model: nn.Module, x: Tensor) -> Reference:
        """Runs copies of `model`, so that hooks and statistics leave no trace; in-place changes of `x` are undone.

        Eager runs on `x` itself: the strides of a view decide about those of the result, and a copy has others.
        """
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            saved = x.clone()
            eager = copy.deepcopy(model)(x)
            if not torch.equal(x.nan_to_num(), saved.nan_to_num()):
                eager = eager.clone()  # it may share the memory of `x`
                x.copy_(saved)
            return cls(eager=eager, exact=exact)

    def errors(self, actual: Tensor) -> dict[str, float]:
        """Errors of `actual` and of eager against float64; those named `rel` are relative to the output's scale."""
        return {
            **relative_error(actual, self.exact),
            **{f"eager_{name}": value for name, value in relative_error(self.eager, self.exact).items()},
        }


def relative_error(actual: Tensor, exact: Tensor) -> dict[str, float]:
    """Largest and root-mean-square error where both are finite, absolute and relative to the output's scale.

    The scale is the largest (for `rel_max`) and the root-mean-square (for `rel_rms`) of the exact values, not each
    element's own: a sum that cancels to almost nothing keeps the rounding errors of its terms.
    """
    actual, exact = actual.detach().double(), exact.detach().double()
    finite = actual.isfinite() & exact.isfinite()
    actual, exact = actual[finite], exact[finite]
    if exact.numel() == 0:
        return {"max_abs": 0.0, "rel_max": 0.0, "rel_rms": 0.0}
    difference = actual - exact
    max_abs, rms = difference.abs().max().item(), difference.square().mean().sqrt().item()
    # An exact result of all zeros has no scale; the error then stands as it is.
    scale_max, scale_rms = exact.abs().max().item() or 1.0, exact.square().mean().sqrt().item() or 1.0
    return {"max_abs": max_abs, "rel_max": max_abs / scale_max, "rel_rms": rms / scale_rms}


def error_vs_float64(actual: Tensor, model: nn.Module, x: Tensor) -> dict[str, float]:
    """`max_abs`, `rel_max` and `rel_rms` of `actual` against `model(x)` in float64, and the same of eager."""
    return Reference.of(model, x).errors(actual)


def error_floor(dtype: torch.dtype) -> float:
    """The relative error that is always allowed: a few roundings, for eager itself is sometimes exact by luck."""
    return 8 * torch.finfo(dtype).eps


def assert_matches(
    actual: Tensor, model: nn.Module, x: Tensor, factor: float = 4.0, largest_factor: float | None = None
) -> None:
    """Raises AssertionError unless `actual` is what `model(x)` gives, up to the error of the arithmetic.

    Device, shape, dtype, strides and the places of NaN, inf and -inf are exactly eager's. Everywhere else, `actual` is
    at most `factor` times as far from the float64 result as eager is, or within a few roundings (`error_floor`), in
    root mean square and in the largest element; `largest_factor`: another factor for the latter.
    `model` is the plain model, not an optimised one.
    """
    __tracebackhide__ = True
    reference = Reference.of(model, x)
    eager = reference.eager
    for name, found, expected in (
        ("device", actual.device, eager.device),
        ("dtype", actual.dtype, eager.dtype),
        ("shape", tuple(actual.shape), tuple(eager.shape)),
        ("strides", actual.stride(), eager.stride()),
    ):
        if found != expected:
            raise AssertionError(f"{name}: expected {expected} as eager gives, found {found}")
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        mismatches = int((test(actual) != test(eager)).sum())
        if mismatches:
            raise AssertionError(
                f"{name}: eager has {int(test(eager).sum())}, found {int(test(actual).sum())}; "
                f"{mismatches} of {eager.numel()} places differ"
            )
    errors = reference.errors(actual)
    for name in ("rel_max", "rel_rms"):
        times = largest_factor if name == "rel_max" and largest_factor is not None else factor
        allowed = max(error_floor(eager.dtype), times * errors[f"eager_{name}"])
        if errors[name] > allowed:
            raise AssertionError(
                f"{name}: error against float64 is {errors[name]:.3g}, allowed is {allowed:.3g} (eager: "
                f"{errors[f'eager_{name}']:.3g}); largest absolute error {errors['max_abs']:.3g}"
            )
