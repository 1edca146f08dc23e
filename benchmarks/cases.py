"""What can be measured whole: the networks of `fastseq.testing.MODELS`, and single steps, a few layers that run as one.

A step stands between the layers of a network: behind a convolution's image or a Linear's row of features of its size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from fastseq.patterns.activation import ACTIVATIONS
from fastseq.testing import MODELS, ModelCase

Make = Callable[[], nn.Module]


def sequential(*makers: Make) -> nn.Module:
    return nn.Sequential(*(make() for make in makers))


def step(
    name: str, shape: tuple[int, ...], *makers: Make, batches: tuple[int, ...] = (1, 8), title: str = ""
) -> ModelCase:
    return ModelCase(name, partial(sequential, *makers), shape, batches, title)


# Behind a convolution and behind Linear; ReLU is among the steps anyhow.
_activations = [kind for kind in ACTIVATIONS if kind is not nn.ReLU]
_conv = partial(nn.Conv2d, 64, 64, 3, padding=1)
_depthwise = partial(nn.Conv2d, 64, 64, 3, padding=1, groups=64)
_image = (64, 28, 28)

STEPS: dict[str, ModelCase] = {
    case.name: case
    for case in (
        step("conv2d_relu", _image, _conv, nn.ReLU),
        step("conv2d_batchnorm2d_relu", _image, _conv, partial(nn.BatchNorm2d, 64), nn.ReLU),
        step("conv2d_relu_maxpool2d", _image, _conv, nn.ReLU, partial(nn.MaxPool2d, 2)),
        step("conv2d_1x1_relu", _image, partial(nn.Conv2d, 64, 64, 1), nn.ReLU),
        step("conv2d_strided_relu", _image, partial(nn.Conv2d, 64, 64, 3, 2, 1), nn.ReLU),
        step("conv2d_dilated_relu", _image, partial(nn.Conv2d, 64, 64, 3, 1, 2, 2), nn.ReLU),
        step("depthwise_relu", _image, _depthwise, nn.ReLU),
        step("depthwise_strided_relu", _image, partial(_depthwise, stride=2), nn.ReLU),
        step("depthwise_5x5_relu", _image, partial(nn.Conv2d, 64, 64, 5, padding=2, groups=64), nn.ReLU),
        step("depthwise_twice_relu", _image, partial(nn.Conv2d, 64, 128, 3, padding=1, groups=64), nn.ReLU),
        step("groups_of_4_relu", _image, partial(_conv, groups=16), nn.ReLU),
        step("groups_of_16_relu", _image, partial(_conv, groups=4), nn.ReLU),
        step("depthwise_separable", _image, _depthwise, nn.ReLU, partial(nn.Conv2d, 64, 128, 1), nn.ReLU),
        step("conv2d_relu_batchnorm2d_relu", _image, _conv, nn.ReLU, partial(nn.BatchNorm2d, 64), nn.ReLU),
        step("zeropad2d_conv2d_relu", _image, partial(nn.ZeroPad2d, 1), partial(nn.Conv2d, 64, 64, 3), nn.ReLU),
        step(
            "reflectionpad2d_conv2d_relu",
            _image,
            partial(nn.ReflectionPad2d, 1),
            partial(nn.Conv2d, 64, 64, 3),
            nn.ReLU,
        ),
        step("conv2d_reflect_relu", _image, partial(_conv, padding_mode="reflect"), nn.ReLU),
        step("conv2d_upsample", (64, 14, 14), partial(nn.Conv2d, 64, 64, 1), partial(nn.Upsample, scale_factor=2)),
        step(
            "conv2d_upsample_bilinear",
            (64, 14, 14),
            partial(nn.Conv2d, 64, 64, 1),
            partial(nn.UpsamplingBilinear2d, 28),
        ),
        step("upsample_conv2d_relu", (64, 14, 14), partial(nn.Upsample, scale_factor=2), _conv, nn.ReLU),
        step("conv2d_pixelshuffle", _image, partial(nn.Conv2d, 64, 12, 3, padding=1), partial(nn.PixelShuffle, 2)),
        step(
            "pixelunshuffle_conv2d",
            (3, 56, 56),
            partial(nn.PixelUnshuffle, 2),
            partial(nn.Conv2d, 12, 64, 3, padding=1),
        ),
        step(
            "linear_unflatten_conv2d", (64,), partial(nn.Linear, 64, 3136), partial(nn.Unflatten, 1, (64, 7, 7)), _conv
        ),
        step("conv2d_flatten_relu", _image, _conv, nn.Flatten, nn.ReLU),
        step("conv1d_relu_maxpool1d", (64, 256), partial(nn.Conv1d, 64, 64, 5), nn.ReLU, partial(nn.MaxPool1d, 2)),
        step("maxpool2d", _image, partial(nn.MaxPool2d, 2)),
        step("maxpool2d_3x3", _image, partial(nn.MaxPool2d, 3, 2, 1)),
        step("avgpool2d", _image, partial(nn.AvgPool2d, 2)),
        step("adaptivemaxpool2d_7x7", _image, partial(nn.AdaptiveMaxPool2d, 7)),
        step("adaptiveavgpool2d_7x7", _image, partial(nn.AdaptiveAvgPool2d, 7)),
        step("conv2d_adaptiveavgpool2d_1x1", _image, _conv, partial(nn.AdaptiveAvgPool2d, 1)),
        step("linear_relu", (256,), partial(nn.Linear, 256, 256), nn.ReLU, batches=(1, 64)),
        step("linear_batchnorm1d_relu", (256,), partial(nn.Linear, 256, 256), partial(nn.BatchNorm1d, 256), nn.ReLU),
        step("linear_relu_batchnorm1d", (256,), partial(nn.Linear, 256, 256), nn.ReLU, partial(nn.BatchNorm1d, 256)),
        step("conv2d_groupnorm_relu", _image, _conv, partial(nn.GroupNorm, 8, 64), nn.ReLU),
        step("linear_softmax", (256,), partial(nn.Linear, 256, 256), partial(nn.Softmax, -1), batches=(1, 64)),
        step("linear_logsoftmax", (256,), partial(nn.Linear, 256, 256), partial(nn.LogSoftmax, -1), batches=(1, 64)),
        step(
            "linear_layernorm_gelu",
            (256,),
            partial(nn.Linear, 256, 256),
            partial(nn.LayerNorm, 256),
            nn.GELU,
            batches=(1, 64),
        ),
        # As the blocks of transformers and of MLP-Mixer begin.
        step(
            "layernorm_linear_gelu_linear",
            (256,),
            partial(nn.LayerNorm, 256),
            partial(nn.Linear, 256, 512),
            nn.GELU,
            partial(nn.Linear, 512, 256),
            batches=(1, 64),
        ),
        *(
            step(f"conv2d_{kind.__name__.lower()}", _image, partial(nn.Conv2d, 64, 64, 1), kind, batches=(1,))
            for kind in _activations
        ),
        *(
            step(f"linear_{kind.__name__.lower()}", (256,), partial(nn.Linear, 256, 256), kind, batches=(1, 64))
            for kind in _activations
        ),
    )
}

CASES: dict[str, ModelCase] = {**MODELS, **STEPS}
