"""The zoo of fastseq.testing through the whole package: as accurate as eager, fused throughout, row by row the same."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_was_fused
from torch import nn

import fastseq
from fastseq.testing import MODELS, ImageNetModel, ModelCase, TwoStageConvNet, assert_matches


def features(name: str) -> nn.Sequential:
    """The convolutions of an ImageNet model. Its Linear layers, most of the bytes, are never allocated."""
    with torch.device("meta"):
        model = MODELS[name].make()
    assert isinstance(model, ImageNetModel)
    return model.features.to_empty(device="cpu")


def narrowed(model: nn.Module) -> nn.Module:
    """The model with an eighth of its channels and features; for one that was made on meta."""
    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Conv2d):
            c_in = layer.in_channels if layer.in_channels == 3 else layer.in_channels // 8
            sizes = (layer.kernel_size, layer.stride, layer.padding)
            made: nn.Module = nn.Conv2d(c_in, layer.out_channels // 8, *sizes, bias=layer.bias is not None)  # type: ignore[arg-type]
        elif isinstance(layer, nn.BatchNorm2d):
            made = nn.BatchNorm2d(layer.num_features // 8)
        elif isinstance(layer, nn.Linear):
            made = nn.Linear(layer.in_features // 8, layer.out_features // 8)
        else:
            made = narrowed(layer)
        setattr(model, name, made)
    return model


def narrow(name: str) -> nn.Module:
    with torch.device("meta"):
        model = MODELS[name].make()
    return narrowed(model)


NAMES = ("seed1", "seed1_named", "seed2", "seed3", "lenet5", "lenet_tanh", "mlp", "cifar_cnn", "autoencoder")
SMALL = [*(MODELS[name] for name in NAMES), ModelCase("espcn", MODELS["espcn"].make, (1, 17, 14), (1,))]
LARGE = [
    MODELS["cifar_vgg"],
    MODELS["cifar_vgg_bn"],
    ModelCase("mobilenet_v1", MODELS["mobilenet_v1"].make, (3, 64, 64), (1,)),
    ModelCase("alexnet features", lambda: features("alexnet"), (3, 79, 67), (1,)),
    ModelCase("vgg11 features", lambda: features("vgg11"), (3, 32, 32), (1,)),
    ModelCase("vgg16 features", lambda: features("vgg16"), (3, 32, 40), (1,)),
    # Whole, of other sizes than those at which the adaptive pool does nothing.
    ModelCase("narrow alexnet", lambda: narrow("alexnet"), (3, 127, 131), (1,)),
    ModelCase("narrow vgg16", lambda: narrow("vgg16"), (3, 96, 64), (1,)),
    ModelCase("narrow vgg16_bn", lambda: narrow("vgg16_bn"), (3, 64, 97), (1,)),
    ModelCase("narrow vgg16_bn at its size", lambda: narrow("vgg16_bn"), (3, 224, 224), (1,)),
]

each_small = pytest.mark.parametrize("case", SMALL, ids=[case.name for case in SMALL])
each_network = pytest.mark.parametrize("case", SMALL + LARGE, ids=[case.name for case in SMALL + LARGE])


@each_small
@pytest.mark.parametrize("batch", [1, 3, 33])
def test_as_accurate_as_eager(case: ModelCase, batch: int) -> None:
    model, x = case.build(), case.example(batch)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        assert_matches(fused(x), model, x)
    assert_was_fused(fused)


@pytest.mark.parametrize("case", LARGE, ids=[case.name for case in LARGE])
def test_large_networks_are_as_accurate_as_eager(case: ModelCase) -> None:
    model, x = case.build(), case.example(2)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        assert_matches(fused(x), model, x)
    assert_was_fused(fused)


@each_network
def test_every_layer_is_fused_into_one_call(case: ModelCase) -> None:
    fused = fastseq.optimize(case.build())
    with torch.no_grad():
        fused(case.example(1))
    data = fastseq.explain(fused).to_dict()
    runs = [entry["segments"] for entry in data["forwards"] + data["sequentials"] if "inside" not in entry["note"]]
    assert [[segment["kind"] for segment in segments] for segments in runs] == [["native"]]
    assert fastseq.stats(fused) == {"fused_calls": len(runs), "eager_calls": 0, "fallbacks": {}}


@each_network
def test_a_row_does_not_depend_on_its_batch(case: ModelCase) -> None:
    fused = fastseq.optimize(case.build())
    x = case.example(5)
    with torch.no_grad():
        whole = fused(x)
        assert torch.equal(torch.cat([fused(row) for row in x.split(1)]), whole)
        assert torch.equal(fused(x[1:4]), whole[1:4])
        assert torch.equal(fused(x.flip(0)).flip(0), whole)


@each_small
def test_names_and_weights_stay(case: ModelCase) -> None:
    model = case.build()
    before = copy.deepcopy(model.state_dict())
    fused = fastseq.optimize(model)
    with torch.no_grad():
        fused(case.example(2))
    for state in (fused.state_dict(), model.state_dict()):
        assert list(state) == list(before)
        assert all(torch.equal(state[name], before[name]) for name in before)
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in model.named_modules()]


@each_small
def test_inference_mode_gives_the_same(case: ModelCase) -> None:
    fused, x = fastseq.optimize(case.build()), case.example(3)
    with torch.no_grad():
        expected = fused(x)
    with torch.inference_mode():
        assert torch.equal(fused(x), expected)
    with torch.no_grad():
        assert torch.equal(fused(x), expected)


def test_seed3_between_its_sequentials_is_what_view_needs() -> None:
    """Its forward calls `x.view(...)` on what a fused Sequential returns, so that must be contiguous."""
    fused = fastseq.optimize(MODELS["seed3"].build())
    assert isinstance(fused, TwoStageConvNet)
    with torch.no_grad():
        between = fused.layer2(fused.layer1(MODELS["seed3"].example(3)))
    assert between.is_contiguous()


@each_small
def test_verify_finds_rounding_only(case: ModelCase) -> None:
    fused = fastseq.optimize(case.build())
    verification = fastseq.verify(fused, case.example(4))
    found = verification.to_dict()
    assert verification.ok and found["fused_calls"] > 0 and not found["fallbacks"]
    assert all(step["ok"] and step["is_fused"] and step["kernel"] for step in found["steps"])
    assert 0 < found["max_abs_error"] < 1e-5 * found["scale"]
