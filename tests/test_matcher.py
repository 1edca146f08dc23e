"""The matcher: how layers are cut into native runs and eager layers, and the reason for each eager one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fastseq import FusedSequential
from fastseq.matcher import NativeSegment, match

KINDS = (nn.Sequential, FusedSequential)


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(2, 2, 3, **options)


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def pool(**options: Any) -> nn.MaxPool2d:
    return nn.MaxPool2d(2, **options)


relu, flat, same, drop = nn.ReLU, nn.Flatten, nn.Identity, nn.Dropout


def cut(*layers: Any) -> list[str]:
    """One string per segment: the steps of a run joined by " + ", or "eager" and the layer's class."""
    return describe(nn.Sequential(*layers).eval())


def describe(sequential: nn.Sequential) -> list[str]:
    return [
        " + ".join(step.pattern for step in segment.steps)
        if isinstance(segment, NativeSegment)
        else f"eager {type(segment.leaf.layer).__name__}"
        for segment in match(sequential, KINDS).segments
    ]


def altered(layer: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


CUTS: dict[str, tuple[Callable[[], list[Any]], list[str]]] = {
    "empty": (list, []),
    "conv": (lambda: [conv()], ["conv2d"]),
    "conv relu": (lambda: [conv(), relu()], ["conv2d_relu"]),
    "conv pool": (lambda: [conv(), pool()], ["conv2d_maxpool2d"]),
    "conv relu pool": (lambda: [conv(), relu(), pool()], ["conv2d_relu_maxpool2d"]),
    "conv pool relu": (lambda: [conv(), pool(), relu()], ["conv2d_maxpool2d_relu"]),
    "in-place relu": (lambda: [conv(), relu(inplace=True)], ["conv2d_relu"]),
    "pool": (lambda: [pool()], ["maxpool2d"]),
    "linear": (lambda: [linear()], ["linear"]),
    "linear relu": (lambda: [linear(), relu()], ["linear_relu"]),
    "second pool": (lambda: [conv(), pool(), pool()], ["conv2d_maxpool2d + maxpool2d"]),
    "second relu": (lambda: [conv(), relu(), relu()], ["conv2d_relu + relu"]),
    "relu pool relu": (lambda: [conv(), relu(), pool(), relu()], ["conv2d_relu_maxpool2d + relu"]),
    "norm relu conv": (lambda: [nn.BatchNorm2d(2), relu(), conv()], ["batchnorm2d_relu + conv2d"]),
    "norm alone": (lambda: [nn.BatchNorm2d(2), relu()], ["eager BatchNorm2d", "eager ReLU"]),
    "norm, then another run": (
        lambda: [nn.BatchNorm2d(2), relu(), linear(), relu(), relu(), nn.BatchNorm1d(2)],
        ["eager BatchNorm2d", "eager ReLU", "linear_relu + relu + batchnorm1d"],
    ),
    "relu of a flattened map": (lambda: [conv(), flat(), relu(), linear()], ["conv2d + relu + linear"]),
    "relu first": (lambda: [relu(), conv()], ["eager ReLU", "conv2d"]),
    "pool relu": (lambda: [pool(), relu()], ["maxpool2d_relu"]),
    "two convs": (lambda: [conv(), relu(), conv(), relu()], ["conv2d_relu + conv2d_relu"]),
    "three linears": (
        lambda: [linear(), relu(), linear(), linear()],
        ["linear_relu + linear + linear"],
    ),
    "lenet": (
        lambda: [conv(), relu(), pool(), conv(), relu(), pool(), flat(), linear(), relu(), linear()],
        ["conv2d_relu_maxpool2d + conv2d_relu_maxpool2d + linear_relu + linear"],
    ),
    "linear on images": (lambda: [conv(), linear()], ["conv2d", "linear"]),
    "conv behind linear": (lambda: [linear(), conv()], ["linear", "conv2d"]),
    "flatten behind linear": (lambda: [linear(), flat(), linear()], ["linear", "linear"]),
    "flatten first": (lambda: [flat(), linear(), relu()], ["linear_relu"]),
    "flatten last": (lambda: [conv(), relu(), flat()], ["conv2d_relu"]),
    "flatten twice": (lambda: [conv(), flat(), flat(), linear(), flat(), linear()], ["conv2d + linear + linear"]),
    "flatten then conv": (lambda: [conv(), flat(), conv()], ["conv2d", "conv2d"]),
    "flatten alone": (lambda: [flat()], ["eager Flatten"]),
    "flatten before conv": (lambda: [flat(), conv()], ["eager Flatten", "conv2d"]),
    "flatten before sigmoid": (
        lambda: [flat(), nn.Softsign(), linear()],
        ["eager Flatten", "eager Softsign", "linear"],
    ),
    "free layers": (
        lambda: [same(), conv(), drop(), relu(), same(), pool(), flat(), drop(0.9), linear(), same()],
        ["conv2d_relu_maxpool2d + linear"],
    ),
    "other dropouts": (
        lambda: [
            conv(),
            nn.FeatureAlphaDropout().eval(),
            flat(),
            linear(),
            nn.SELU(),
            nn.AlphaDropout().eval(),
            linear(),
        ],
        ["conv2d + linear_selu + linear"],
    ),
    "free layers alone": (lambda: [same(), drop()], ["eager Identity", "eager Dropout"]),
    "free between relu and sigmoid": (lambda: [same(), nn.Softsign()], ["eager Identity", "eager Softsign"]),
    "eager between": (
        lambda: [conv(), relu(), nn.BatchNorm2d(2), pool(), nn.Softsign(), flat(), linear()],
        ["conv2d_relu + batchnorm2d + maxpool2d", "eager Softsign", "linear"],
    ),
    "declined pool": (lambda: [conv(), relu(), pool(dilation=[2, 2])], ["conv2d_relu", "eager MaxPool2d"]),
    "declined pool at once": (lambda: [conv(), pool(return_indices=True)], ["conv2d", "eager MaxPool2d"]),
    "declined conv": (
        lambda: [altered(conv(padding=1), padding_mode="ones"), relu(), pool()],
        ["eager Conv2d", "eager ReLU", "maxpool2d"],
    ),
    "zeros before a conv": (
        lambda: [pool(), nn.ZeroPad2d(1), same(), conv(), relu(), nn.ConstantPad2d(1, 0.5), conv()],
        ["maxpool2d + zeropad2d_conv2d_relu + constantpad2d + conv2d"],
    ),
    "padding mode": (
        lambda: [nn.ConstantPad2d(1, 0), conv(padding=1, padding_mode="circular"), relu(), pool()],
        ["constantpad2d + conv2d_relu_maxpool2d"],
    ),
    "upsampling and shuffles": (
        lambda: [conv(), nn.Upsample(scale_factor=2), conv(), relu(), nn.PixelShuffle(1), nn.UpsamplingBilinear2d(4)],
        ["conv2d + upsample + conv2d_relu + pixelshuffle + upsamplingbilinear2d"],
    ),
    "upsampling alone": (lambda: [nn.Upsample(scale_factor=2)], ["eager Upsample"]),
    "features of a map": (
        lambda: [conv(), flat(), relu(), nn.BatchNorm1d(8).eval(), nn.Tanh(), linear(), relu()],
        ["conv2d + relu + batchnorm1d_tanh + linear_relu"],
    ),
    "rows to maps": (
        lambda: [linear(), relu(), nn.Unflatten(1, (2, 2, 2)), same(), relu(), conv(), flat(), linear()],
        ["linear_relu + relu + conv2d + linear"],
    ),
    "maps first": (
        lambda: [drop(), nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 2, 3), flat(), linear()],
        ["conv1d + linear"],
    ),
    "maps of another dimension": (
        lambda: [linear(), nn.Unflatten(1, (4, 2)), conv(), nn.Unflatten(1, (1, 2)), conv()],
        ["linear", "eager Unflatten", "conv2d", "eager Unflatten", "conv2d"],
    ),
    "maps last": (
        lambda: [linear(), nn.Unflatten(1, (2, 2, 2)), nn.Softsign()],
        ["linear", "eager Unflatten", "eager Softsign"],
    ),
    "flattened by other dimensions": (
        lambda: [conv(), nn.Flatten(2, 2), nn.Flatten(-3, 3), nn.Flatten(1, 1), linear(), nn.Flatten(-1, 1), linear()],
        ["conv2d + linear + linear"],
    ),
    "flattened in part": (
        lambda: [conv(), nn.Flatten(2), nn.Flatten(), linear()],
        ["conv2d", "eager Flatten", "linear"],
    ),
    "flattened with the batch": (lambda: [conv(), nn.Flatten(0, -1), linear()], ["conv2d", "eager Flatten", "linear"]),
    "nested": (
        lambda: [nn.Sequential(conv(), nn.Sequential(relu())), nn.Sequential(nn.Sequential(pool(), flat())), linear()],
        ["conv2d_relu_maxpool2d + linear"],
    ),
    "empty nested": (lambda: [linear(), nn.Sequential(), relu()], ["linear", "eager Sequential", "eager ReLU"]),
    "none": (lambda: [linear(), None, linear()], ["linear", "eager NoneType", "linear"]),
    "module list": (lambda: [linear(), nn.ModuleList([linear()])], ["linear", "eager ModuleList"]),
    "lazy": (lambda: [nn.LazyConv2d(2, 3), relu()], ["eager LazyConv2d", "eager ReLU"]),
}


@pytest.mark.parametrize("case", CUTS)
def test_cut(case: str) -> None:
    make, expected = CUTS[case]
    assert cut(*make()) == expected


REASONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "conv groups": (
        lambda: altered(conv(), groups=2.0),
        "Conv2d has groups 2.0; fused kernels take a positive int",
    ),
    "conv no groups": (lambda: altered(conv(), groups=0), "Conv2d has groups 0; fused kernels take a positive int"),
    "conv dilation": (
        lambda: altered(conv(), dilation=[2, 1]),
        "Conv2d has dilation [2, 1]; fused kernels take one or two ints",
    ),
    "conv padding mode": (
        lambda: altered(conv(), padding_mode="ones"),
        "Conv2d has padding_mode 'ones'; fused kernels take 'zeros', 'reflect', 'replicate' and 'circular'",
    ),
    "upsample corners": (
        lambda: nn.Upsample(scale_factor=2, align_corners=True),
        "Upsample has align_corners True in mode 'nearest', which eager rejects",
    ),
    "conv stride": (
        lambda: altered(conv(), stride=[1, 1]),
        "Conv2d has stride [1, 1]; fused kernels take one or two ints",
    ),
    "conv padding": (
        lambda: altered(conv(), padding=(1, 1, 1)),
        "Conv2d has padding (1, 1, 1); fused kernels take 'same', 'valid', or one or two ints",
    ),
    "conv padding text": (
        lambda: altered(conv(), padding="full"),
        "Conv2d has padding 'full'; fused kernels take 'same', 'valid', or one or two ints",
    ),
    "pool indices": (
        lambda: pool(return_indices=True),
        "MaxPool2d has return_indices=True; fused kernels return values only",
    ),
    "pool dilation": (
        lambda: pool(dilation=[2, 2]),
        "MaxPool2d has dilation [2, 2]; fused kernels take one or two ints",
    ),
    "pool kernel": (
        lambda: altered(pool(), kernel_size=[2, 2]),
        "MaxPool2d has kernel_size [2, 2]; fused kernels take one or two ints",
    ),
    "pool stride": (
        lambda: altered(pool(), stride=1.0),
        "MaxPool2d has stride 1.0; fused kernels take one or two ints",
    ),
    "pool padding": (
        lambda: altered(pool(), padding=None),
        "MaxPool2d has padding None; fused kernels take one or two ints",
    ),
    "relu": (relu, "ReLU does not follow a layer that is fused"),
    "flatten dims": (lambda: flat(0), "Flatten has start_dim=0, end_dim=-1; fused runs take 1 and -1"),
    "flatten end": (lambda: flat(1, 2), "Flatten has start_dim=1, end_dim=2; fused runs take 1 and -1"),
    "flatten": (flat, "Flatten stands neither behind a fused convolution or pool nor before a fused Linear"),
    "identity": (same, "Identity does nothing and stands beside no fused layer"),
    "dropout": (drop, "Dropout does nothing and stands beside no fused layer"),
    "relu6": (nn.ReLU6, "ReLU6 does not follow a layer that is fused"),
    "conv3d": (lambda: nn.Conv3d(1, 1, 1), "no fused kernel for Conv3d"),
    "conv transposed": (lambda: nn.ConvTranspose2d(1, 1, 1), "no fused kernel for ConvTranspose2d"),
    "pool of powers": (lambda: nn.LPPool2d(2, 2), "no fused kernel for LPPool2d"),
    "dropout2d": (nn.Dropout2d, "no fused kernel for Dropout2d"),
    "subclass": (
        lambda: nn.LazyLinear(3),
        "LazyLinear is a subclass of Linear; fused kernels take exactly Linear",
    ),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(linear()),
        "ParametrizedLinear is a subclass of Linear; fused kernels take exactly Linear",
    ),
    "pruned": (
        lambda: prune.identity(linear(), "weight"),
        "weight is not a plain registered parameter (pruned, normalised or replaced); fused kernels read those",
    ),
    "own forward": (lambda: altered(linear(), forward=torch.relu), "this Linear has a forward of its own"),
}


@pytest.mark.parametrize("case", REASONS)
def test_reason(case: str) -> None:
    make, expected = REASONS[case]
    (segment,) = match(nn.Sequential(make()).eval(), KINDS).segments
    assert not isinstance(segment, NativeSegment)
    assert segment.reason == expected


def test_reason_in_training_mode() -> None:
    first, second = match(nn.Sequential(drop(), linear()).train(), KINDS).segments
    assert not isinstance(first, NativeSegment) and first.reason == "Dropout is in training mode"
    assert isinstance(second, NativeSegment)


def test_training_matters_for_dropout_alone() -> None:
    layers = [conv(), relu(), pool(), flat(), linear(), relu()]
    assert describe(nn.Sequential(*layers).train()) == cut(*layers) == ["conv2d_relu_maxpool2d + linear_relu"]


def test_a_layers_own_training_flag_counts() -> None:
    model = nn.Sequential(linear(), drop(), linear()).train()
    assert describe(model) == ["linear", "eager Dropout", "linear"]
    model[1].eval()
    assert describe(model) == ["linear + linear"]


@pytest.mark.parametrize("p", [-0.5, 1.5])
def test_dropout_that_eager_rejects_stays_eager(p: float) -> None:
    assert cut(linear(), altered(drop(), p=p)) == ["linear", "eager Dropout"]


def test_a_reason_is_about_the_layer_itself() -> None:
    """Of a pattern that fails at its pool, only the pool is to blame."""
    first, second = match(nn.Sequential(conv(), relu(), pool(dilation=[2, 2])), KINDS).segments
    assert isinstance(first, NativeSegment)
    assert not isinstance(second, NativeSegment) and second.reason.startswith("MaxPool2d has dilation [2, 2]; ")


@pytest.mark.parametrize("layer", [same, flat, drop, relu, pool, conv, linear], ids=lambda kind: kind.__name__)
def test_a_layer_with_its_own_forward_is_never_fused(layer: Callable[[], nn.Module]) -> None:
    # Between two convolutions of one run, so that a free layer would be taken along.
    model = nn.Sequential(conv(), altered(layer(), forward=lambda x: 2 * x), conv()).eval()
    first, second, third = match(model, KINDS).segments
    assert isinstance(first, NativeSegment) and isinstance(third, NativeSegment)
    assert not isinstance(second, NativeSegment) and "forward of its own" in second.reason


def test_paths_lead_to_the_layers() -> None:
    inner = nn.Sequential(OrderedDict(conv=conv(), act=relu()))
    model = nn.Sequential(OrderedDict(body=nn.Sequential(inner, same()), head=nn.Softsign(), pool=pool())).eval()
    found = match(model, KINDS)
    run, eager, last = found.segments
    assert isinstance(run, NativeSegment) and isinstance(last, NativeSegment)
    assert not isinstance(eager, NativeSegment)
    assert [leaf.path for leaf in run.leaves] == ["body.0.conv", "body.0.act", "body.1"]
    assert [leaf.path for leaf in run.steps[0].leaves] == ["body.0.conv", "body.0.act"]
    assert (eager.leaf.path, [leaf.path for leaf in last.leaves]) == ("head", ["pool"])
    for leaf in (*run.leaves, eager.leaf, *last.leaves):
        assert model.get_submodule(leaf.path) is leaf.layer
    assert [id(container) for container in found.nested] == [id(model.body), id(inner)]


def test_every_layer_is_in_one_segment_in_order() -> None:
    layers = [
        same(),
        conv(),
        relu(),
        drop(),
        flat(),
        linear(),
        nn.Tanhshrink(),
        same(),
        flat(),
        linear(),
        relu(),
        same(),
    ]
    for first in range(len(layers)):
        for last in range(first, len(layers) + 1):
            seen: list[Any] = []
            for segment in match(nn.Sequential(*layers[first:last]).eval(), KINDS).segments:
                seen += segment.leaves if isinstance(segment, NativeSegment) else [segment.leaf]
            assert [id(leaf.layer) for leaf in seen] == list(map(id, layers[first:last]))


def test_a_layer_that_stands_twice_is_two_leaves() -> None:
    layer, act = linear(), relu()
    (segment,) = match(nn.Sequential(layer, act, layer, act), KINDS).segments
    assert isinstance(segment, NativeSegment)
    assert [leaf.path for leaf in segment.leaves] == ["0", "1", "2", "3"]
    assert [step.pattern for step in segment.steps] == ["linear_relu", "linear_relu"]


def test_nested_subclasses_and_own_forwards_are_not_flattened() -> None:
    class Block(nn.Sequential):
        pass

    assert cut(linear(), Block(linear(), relu()), linear()) == ["linear", "eager Block", "linear"]
    assert cut(linear(), altered(nn.Sequential(relu()), forward=torch.tanh)) == ["linear", "eager Sequential"]


def test_matching_touches_no_tensor() -> None:
    with torch.device("meta"):
        model = nn.Sequential(conv(), relu(), pool(), flat(), linear()).eval()
    versions = [p._version for p in model.parameters()]

    class NoOperations(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"{function} was called")

    with NoOperations():
        assert describe(model) == ["conv2d_relu_maxpool2d + linear"]
    assert [p._version for p in model.parameters()] == versions
