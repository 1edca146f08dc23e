"""Weights, attributes and children stay live: whatever changes, the next call is eager's on the model as it is now."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from dropin import (
    NETS,
    RUNS,
    assert_eager,
    assert_fused,
    assert_identical,
    call,
    conv_net,
    eager,
    first,
    fused,
    images,
    one_thread,  # noqa: F401
    split_net,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastseq
from fastseq.testing import assert_matches

each_net = pytest.mark.parametrize("net", NETS)
PARAMETERS = ["conv weight", "conv bias", "linear weight", "linear bias"]


def layer_of(model: nn.Module, parameter: str) -> tuple[Any, str]:
    """Layer and parameter name of an entry of PARAMETERS. Of a Holder, the convolution in its Sequential."""
    kind, name = parameter.split()
    inside = getattr(model, "features", model)
    return (first(inside, nn.Conv2d), name) if kind == "conv" else (first(model, nn.Linear), name)


def halved(model: nn.Module) -> dict[str, Tensor]:
    return {name: value / 2 for name, value in model.state_dict().items()}


# A parameter, in place or as another object -----------------------------------------------------------------------


def numpy_alias(layer: Any, name: str) -> None:
    getattr(layer, name).detach().numpy()[...] *= 2


def set_data(layer: Any, name: str) -> None:
    getattr(layer, name).data = getattr(layer, name).data * 2


def swap(layer: Any, name: str) -> None:
    torch.utils.swap_tensors(getattr(layer, name), nn.Parameter(getattr(layer, name).detach() * 2))


def flip(layer: Any, name: str) -> None:
    getattr(layer, name).data.copy_(getattr(layer, name).data.flip(0))


def copy_storage(layer: Any, name: str) -> None:
    parameter = getattr(layer, name)
    parameter.untyped_storage().copy_((parameter.detach() * 2).untyped_storage())


def one_element(layer: Any, name: str) -> None:
    getattr(layer, name).detach().numpy().flat[-1] += 3


def set_storage(layer: Any, name: str) -> None:
    with torch.no_grad():
        getattr(layer, name).set_(getattr(layer, name).detach() * 2)


def inference_write(layer: Any, name: str) -> None:
    with torch.inference_mode():
        getattr(layer, name).mul_(2)


def under_no_grad(layer: Any, name: str) -> None:
    with torch.no_grad():
        getattr(layer, name).add_(1)


WRITES: dict[str, Callable[[Any, str], Any]] = {
    "no_grad": under_no_grad,
    "inference_mode": inference_write,
    "data.mul_": lambda layer, name: getattr(layer, name).data.mul_(2),
    "data.copy_": flip,
    "data.zero_": lambda layer, name: getattr(layer, name).data.zero_(),
    "data.normal_": lambda layer, name: getattr(layer, name).data.normal_(),
    "detach().fill_": lambda layer, name: getattr(layer, name).detach().fill_(0.25),
    "data = new": set_data,
    "data[...] = ": lambda layer, name: getattr(layer, name).data.__setitem__(0, 0.5),
    "nan": lambda layer, name: getattr(layer, name).data.view(-1).__setitem__(0, float("nan")),
    "sign": lambda layer, name: getattr(layer, name).data.neg_(),
    "numpy": numpy_alias,
    "numpy, one element": one_element,
    "storage": copy_storage,
    "swap_tensors": swap,
    "setattr": lambda layer, name: setattr(layer, name, nn.Parameter(getattr(layer, name).detach() * 2)),
    "_parameters": lambda layer, name: layer._parameters.update(
        {name: nn.Parameter(getattr(layer, name).detach() * 2)}
    ),
    "register_parameter": lambda layer, name: layer.register_parameter(
        name, nn.Parameter(getattr(layer, name).detach() * 2)
    ),
    "frozen": lambda layer, name: setattr(
        layer, name, nn.Parameter(getattr(layer, name).detach() * 2, requires_grad=False)
    ),
    "set_": set_storage,
}


SMALL_WRITES = ("numpy, one element", "data[...] = ", "nan")  # a sample may miss these


@pytest.mark.parametrize("net", ["flat", "holder"])
@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("write", WRITES)
def test_a_written_parameter_counts_at_the_next_call(net: str, parameter: str, write: str) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images()
    before = assert_fused(fast, x, RUNS[net])
    WRITES[write](*layer_of(fast, parameter))
    after = assert_fused(fast, x, RUNS[net])
    assert not torch.equal(after, before)
    assert_identical(assert_fused(fast, x, RUNS[net]), after)


def sgd_step(model: nn.Module, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **options: Any) -> None:
    model(images()).sum().backward()
    optimizer(model.parameters(), lr=0.1, **options).step()


def to_vector_and_back(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 2, model.parameters())


def average_of(model: nn.Module) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.module.load_state_dict(halved(model))
    averaged.n_averaged += 1
    averaged.update_parameters(model)
    for parameter, mean in zip(model.parameters(), averaged.module.parameters(), strict=True):
        parameter.data.copy_(mean)


def set_to_empty(model: nn.Module) -> None:
    state = halved(model)
    model.to_empty(device="cpu")
    model.load_state_dict(state)


@contextmanager
def future(name: str) -> Iterator[None]:
    """A switch of torch.__future__, on inside."""
    getattr(torch.__future__, f"set_{name}")(True)
    try:
        yield
    finally:
        getattr(torch.__future__, f"set_{name}")(False)


def converted(model: nn.Module, switch: str) -> None:
    with future(switch):
        model.double()
        assert first(model, nn.Linear).weight.dtype is torch.float64
        model.float()
        model.load_state_dict(halved(model))


MODEL_WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "load_state_dict": lambda model: model.load_state_dict(halved(model)),
    "load_state_dict assign": lambda model: model.load_state_dict(halved(model), assign=True),
    "SGD": sgd_step,
    "SGD foreach": lambda model: sgd_step(model, foreach=True),
    "SGD fused": lambda model: sgd_step(model, fused=True),
    "Adam": lambda model: sgd_step(model, torch.optim.Adam),
    "AdamW": lambda model: sgd_step(model, torch.optim.AdamW),
    "vector_to_parameters": to_vector_and_back,
    "init": lambda model: model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None),
    "bfloat16 and back": lambda model: model.bfloat16().float(),
    "half and back": lambda model: model.half().float(),
    "to_empty": set_to_empty,
    "averaging": average_of,
    "overwritten parameters": lambda model: converted(model, "overwrite_module_params_on_conversion"),
    "swapped parameters": lambda model: converted(model, "swap_module_params_on_conversion"),
    "_foreach_mul_": lambda model: torch._foreach_mul_([p.data for p in model.parameters()], 0.5),
}


@each_net
@pytest.mark.parametrize("write", MODEL_WRITES)
def test_a_written_model_counts_at_the_next_call(net: str, write: str) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images()
    before = assert_fused(fast, x, RUNS[net])
    MODEL_WRITES[write](fast)
    assert not torch.equal(assert_fused(fast, x, RUNS[net]), before)


@each_net
def test_training_with_evaluation_in_between(net: str) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images(4)
    optimizer = torch.optim.SGD(fast.parameters(), lr=1e-3)
    results = [assert_fused(fast, x, RUNS[net])]
    for _ in range(3):
        optimizer.zero_grad()
        assert_eager(fast, x, "gradients are being recorded").square().sum().backward()
        optimizer.step()
        results.append(assert_fused(fast, x, RUNS[net]))
    assert len({tuple(result.flatten().tolist()) for result in results}) == 4


# Large weights, of which a sample is looked at ---------------------------------------------------------------------


def large_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 5)).eval()


@pytest.mark.parametrize("write", [name for name in WRITES if name not in SMALL_WRITES])
def test_a_written_large_weight_counts_at_the_next_call(write: str) -> None:
    fast, x = fastseq.optimize(large_net()), torch.randn(3, 300)
    before = assert_fused(fast, x)
    WRITES[write](fast[0], "weight")
    assert not torch.equal(assert_fused(fast, x), before)


def test_single_elements_of_a_large_weight_written_through_autograd_count() -> None:
    fast, x = fastseq.optimize(large_net()), torch.randn(3, 300)
    for index in range(0, fast[0].weight.numel(), 29989):
        before = assert_fused(fast, x)
        with torch.no_grad():
            fast[0].weight.view(-1)[index] = 30.0
        assert not torch.equal(assert_fused(fast, x), before)


def test_refresh_sees_what_the_sample_misses() -> None:
    fast, x = fastseq.optimize(large_net()), torch.randn(3, 300)
    assert_fused(fast, x)
    fast[0].weight.detach().numpy()[::7, ::11] += 1.0
    fastseq.refresh(fast)
    assert_fused(fast, x)


@each_net
def test_refresh_at_any_time(net: str) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images()
    fastseq.refresh(fast)
    before = assert_fused(fast, x, RUNS[net])
    fastseq.refresh(fast)
    fastseq.refresh(fast)
    assert torch.equal(assert_fused(fast, x, RUNS[net]), before)
    fastseq.refresh(nn.Linear(2, 2))


# Formats, dtypes, sizes -------------------------------------------------------------------------------------------


def test_memory_format_of_the_weights() -> None:
    fast, x = fastseq.optimize(conv_net()[:3]), images()
    for form in (torch.channels_last, torch.contiguous_format, torch.channels_last):
        fast.to(memory_format=form)
        assert assert_fused(fast, x).is_contiguous(memory_format=form)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_there_and_back(dtype: torch.dtype) -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    before = assert_fused(fast, x)
    fast.to(dtype)
    with torch.no_grad():
        if dtype is torch.float64:
            assert_eager(fast, x.to(dtype), "float32")
        else:
            assert_matches(fast(x.to(dtype)), fastseq.restore(copy.deepcopy(fast)), x.to(dtype))
    fast.float()
    after = assert_fused(fast, x)
    assert dtype is not torch.float64 or torch.equal(after, before)


@each_net
def test_meta_and_back(net: str) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images()
    state, before = fast.state_dict(), assert_fused(fast, x, RUNS[net])
    fast.to("meta")
    with torch.no_grad():
        assert assert_eager(fast, x.to("meta")).shape == before.shape
    fast.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(assert_fused(fast, x, RUNS[net]), before)


def test_a_parameter_of_another_size() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    assert_fused(fast, x)
    for features in (3, 17, 10):
        fast[5].weight = nn.Parameter(torch.randn(features, 200) / 14)
        fast[5].bias = nn.Parameter(torch.randn(features))
        assert assert_fused(fast, x).shape == (2, features)
    for kernel in (5, 1, 3):
        fast[0].weight = nn.Parameter(torch.randn(4, 3, kernel, kernel) / kernel)
        fast[0].bias = nn.Parameter(torch.randn(4))
        features = 4 * ((13 - kernel) // 2) ** 2
        fast[5].weight = nn.Parameter(torch.randn(10, features) / features**0.5)
        assert_fused(fast, x)
    fast[0].weight.data = torch.randn(4, 3, 5, 3) / 4
    fast[5].weight.data = torch.randn(10, 4 * 4 * 5) / 9
    assert_fused(fast, x)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Linear])
def test_bias_to_none_and_back(kind: type[nn.Module]) -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    before, layer = assert_fused(fast, x), first(fast, kind)
    bias, layer.bias = layer.bias, None
    without = assert_fused(fast, x)
    layer.bias = bias
    assert torch.equal(assert_fused(fast, x), before) and not torch.equal(without, before)


def test_weight_tying_and_untying() -> None:
    fast, x = fastseq.optimize(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval()), torch.randn(3, 6)
    assert_fused(fast, x)
    fast[2].weight = fast[0].weight
    tied = assert_fused(fast, x)
    with torch.no_grad():
        fast[0].weight.mul_(2)
    assert not torch.equal(assert_fused(fast, x), tied)
    fast[2].weight = nn.Parameter(torch.randn(6, 6))
    assert_fused(fast, x)


def test_parameters_that_are_views_of_one_vector() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    flat = torch.cat([p.detach().flatten() for p in fast.parameters()])
    start = 0
    for parameter in fast.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    before = assert_fused(fast, x)
    flat.mul_(2)
    assert not torch.equal(assert_fused(fast, x), before)


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.t().contiguous().t(),
        lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
        lambda w: torch.stack([w, w], -1)[..., 0],
        lambda w: w[:1].expand_as(w),
        lambda w: torch.cat([torch.zeros(1), w.flatten()])[1:].view_as(w),
    ],
    ids=["transposed", "sliced", "strided", "expanded", "unaligned"],
)
def test_a_weight_that_is_a_view(view: Callable[[Tensor], Tensor]) -> None:
    fast, x = fastseq.optimize(nn.Sequential(nn.Linear(6, 5), nn.ReLU()).eval()), torch.randn(3, 6)
    assert_fused(fast, x)
    fast[0].weight.data = view(fast[0].weight.data)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), eager(fast, x))
            fast[0].weight.data = fast[0].weight.data * 2
    fast[0].weight.data = torch.randn(5, 6)
    assert_fused(fast, x)


@each_net
def test_requires_grad_toggles(net: str) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images()
    fast.requires_grad_(False)
    for _ in range(2):
        result, counters = call(fast, x)
        assert counters == fused(RUNS[net]) and not result.requires_grad
        first(fast, nn.Linear).bias.requires_grad_(True)
        result, counters = call(fast, x)
        torch.testing.assert_close(result, eager(fast, x))
        assert result.requires_grad and counters["fused_calls"] < RUNS[net] + (net in ("nested", "holder"))
        assert any("a parameter requires grad" in reason for reason in counters["fallbacks"])
        assert_fused(fast, x, RUNS[net])
        fast.requires_grad_(False)


# Attributes -------------------------------------------------------------------------------------------------------

ATTRIBUTES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "conv stride": (nn.Conv2d, {"stride": (2, 1)}),
    "conv stride int": (nn.Conv2d, {"stride": 2}),
    "conv padding": (nn.Conv2d, {"padding": (0, 2)}),
    "conv padding same": (nn.Conv2d, {"padding": "same"}),
    "conv padding valid": (nn.Conv2d, {"padding": "valid", "stride": (1, 2)}),
    "dilated conv": (nn.Conv2d, {"dilation": (2, 1)}),
    "conv dilation": (nn.Conv2d, {"dilation": [1, 2]}),
    "conv padding mode": (nn.Conv2d, {"padding_mode": "circular", "_reversed_padding_repeated_twice": [1, 1, 1, 1]}),
    "pool kernel": (nn.MaxPool2d, {"kernel_size": 3}),
    "pool kernel pair": (nn.MaxPool2d, {"kernel_size": (1, 3)}),
    "pool stride": (nn.MaxPool2d, {"stride": 1}),
    "pool no stride": (nn.MaxPool2d, {"stride": None, "kernel_size": 3}),
    "pool padding": (nn.MaxPool2d, {"padding": 1}),
    "dilated pool": (nn.MaxPool2d, {"dilation": 2}),
    "pool ceil mode": (nn.MaxPool2d, {"ceil_mode": True, "kernel_size": 3, "stride": 2}),
    "relu in place": (nn.ReLU, {"inplace": True}),
}


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_an_edited_attribute_counts_at_the_next_call(attribute: str) -> None:
    kind, values = ATTRIBUTES[attribute]
    fast, x = fastseq.optimize(conv_net()[:3]), torch.randn(2, 3, 11, 12)
    before = assert_fused(fast, x)
    layer = first(fast, kind)
    old = {name: layer.__dict__[name] for name in values}
    layer.__dict__.update(values)
    with torch.no_grad():
        after, counters = call(fast, x)
        torch.testing.assert_close(after, eager(fast, x), check_stride=True)
    assert counters == fused(), "the part of the run that is not declined"
    assert (after.shape == before.shape and torch.equal(after, before)) == (attribute == "relu in place")
    declined = {"conv dilation": "dilation"}
    segments = fastseq.explain(fast).to_dict()["sequentials"][0]["segments"]
    reasons = [segment["reason"] for segment in segments if segment["kind"] == "eager"]
    assert bool(reasons) == (attribute in declined) and declined.get(attribute, "") in "".join(reasons)
    layer.__dict__.update(old)
    assert torch.equal(assert_fused(fast, x), before)


def test_pool_that_returns_indices() -> None:
    fast, x = fastseq.optimize(conv_net()[:3]), images()
    before = assert_fused(fast, x)
    fast[2].return_indices = True
    with torch.no_grad():
        (values, indices), (expected, where) = fast(x), eager(fast, x)
    torch.testing.assert_close(values, expected)
    assert torch.equal(indices, where)
    fast[2].return_indices = False
    assert torch.equal(assert_fused(fast, x), before)


def test_flatten_dims() -> None:
    fast, x = fastseq.optimize(conv_net()[:4]), images()
    before = assert_fused(fast, x)
    fast[3].end_dim = 2
    assert assert_fused(fast, x).dim() == 3
    fast[3].start_dim, fast[3].end_dim = 0, -1
    assert assert_fused(fast, x).dim() == 1
    fast[3].start_dim = 1
    assert torch.equal(assert_fused(fast, x), before)


@each_net
def test_train_and_eval(net: str) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images()
    before = assert_fused(fast, x, RUNS[net])
    for _ in range(2):
        fast.train()
        with torch.no_grad():
            torch.manual_seed(3)
            expected = eager(fastseq.optimize(fast), x)
            torch.manual_seed(3)
            actual, counters = call(fast, x)
        torch.testing.assert_close(actual, expected)
        assert counters["fused_calls"] > 0
        if net == "split":
            first(fast, nn.BatchNorm2d).reset_running_stats()
        fast.eval()
        assert torch.equal(assert_fused(fast, x, RUNS[net]), before), "one run again"


def test_dropout_of_a_child_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 60), nn.Dropout(0.5), nn.Linear(60, 6)).eval()
    fast, x = fastseq.optimize(model), torch.ones(2, 6)
    before = assert_fused(fast, x)
    fast[1].train()
    with torch.no_grad():
        a, counters = call(fast, x)
        assert not torch.equal(a, fast(x)) and counters == fused(2)
    fast[1].p = 0.0
    assert_fused(fast, x, runs=2)
    fast[1].eval()
    assert torch.equal(assert_fused(fast, x), before)
    fast[1].p = 1.5
    with torch.no_grad(), pytest.raises(ValueError, match="dropout probability has to be between 0 and 1, but got 1.5"):
        fast(x)


def test_a_model_first_called_in_training_mode_is_one_run_in_eval_mode() -> None:
    fast, x = fastseq.optimize(conv_net().train()), images()
    with torch.no_grad():
        assert call(fast, x)[1] == fused(2)
    assert_fused(fast.eval(), x, runs=1)


# Layers that become other layers ----------------------------------------------------------------------------------


def test_prune_and_remove() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    before = assert_fused(fast, x)
    prune.random_unstructured(fast[5], "weight", amount=0.5)
    with torch.no_grad():
        pruned = fast(x)
        torch.testing.assert_close(pruned, eager(fast, x))
        fast[5].weight_orig.data.mul_(2)
        torch.testing.assert_close(fast(x), eager(fast, x))
    prune.remove(fast[5], "weight")
    assert not torch.equal(assert_fused(fast, x), before)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=lambda norm: norm.__name__)
def test_norms_that_are_hooks(norm: Callable[[nn.Module], nn.Module]) -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    before = assert_fused(fast, x)
    norm(fast[5])
    fast.eval()
    name = "weight_g" if norm is nn.utils.weight_norm else "weight_orig"
    with torch.no_grad():
        for _ in range(2):
            normed = fast(x)
            torch.testing.assert_close(normed, eager(fast, x))
            fast[5]._parameters[name].mul_(3)
    remove = nn.utils.remove_weight_norm if norm is nn.utils.weight_norm else nn.utils.remove_spectral_norm
    remove(fast[5])
    assert not torch.equal(assert_fused(fast, x), before)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Linear])
@pytest.mark.parametrize("norm", ["weight_norm", "orthogonal", "spectral_norm"])
def test_parametrizations(kind: type[nn.Module], norm: str) -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    before, layer = assert_fused(fast, x), first(fast, kind)
    getattr(parametrizations, norm)(layer)
    fast.eval()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), eager(fast, x))
            layer.parametrizations.weight[0]  # exists: the weight is computed
            next(layer.parametrizations.weight.parameters()).mul_(2)
        with parametrize.cached():
            torch.testing.assert_close(fast(x), eager(fast, x))
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is kind
    after = assert_fused(fast, x)
    assert norm != "orthogonal" or not torch.equal(after, before)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("has_more", [False, True], ids=["lazy only", "with a pool"])
def test_lazy_layers_are_fused_once_they_are_real(has_more: bool) -> None:
    pool = nn.MaxPool2d(2) if has_more else nn.LPPool2d(2, 2)
    lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), pool, nn.Flatten(), nn.LazyLinear(10), nn.ReLU())
    fast, x = fastseq.optimize(lazy.eval()), images()
    with torch.no_grad():
        actual = fast(x)
        torch.testing.assert_close(actual, eager(fast, x))
    assert type(fast[0]) is nn.Conv2d and type(fast[4]) is nn.Linear
    assert_fused(fast, x, runs=1 if has_more else 2)
    kinds = [segment["kind"] for segment in fastseq.explain(fast).to_dict()["sequentials"][0]["segments"]]
    assert kinds == (["native"] if has_more else ["native", "eager", "native"])


@pytest.mark.filterwarnings("ignore")
def test_modules_fused_by_torch_itself() -> None:
    """torch.ao replaces the convolution by a Sequential of its own kind, and the ReLU by an Identity."""
    fast, x = fastseq.optimize(conv_net()), images()
    before = assert_fused(fast, x)
    torch.ao.quantization.fuse_modules(fast, [["0", "1"], ["5", "6"]], inplace=True)
    assert type(fast[0]) is torch.ao.nn.intrinsic.ConvReLU2d and type(fast[6]) is nn.Identity
    with torch.no_grad():
        result, counters = call(fast, x)
    torch.testing.assert_close(result, before)
    assert counters == fused(), "what is left is the pool"


class Tripled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


def test_class_of_a_layer() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    before = assert_fused(fast, x)
    fast[5].__class__ = Tripled
    tripled = assert_fused(fast, x)
    fast[5].__class__ = nn.Linear
    assert torch.equal(assert_fused(fast, x), before)
    torch.testing.assert_close(tripled, before * 3)
    fast[6].__class__ = nn.Identity
    assert not torch.equal(assert_fused(fast, x), before)


LAYERS: list[type[nn.Module]] = [nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Flatten, nn.Dropout, nn.Linear]


def doubled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, x: forward(self, x) * 2


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("when", ["before optimize", "before the first call", "after the first call"])
def test_forward_patched_on_a_class(kind: type[nn.Module], when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = conv_net(), images()
    expected = assert_fused(fastseq.optimize(model), x)
    with monkeypatch.context() as patch:
        if when == "before optimize":
            patch.setattr(kind, "forward", doubled(kind.forward))
        fast = fastseq.optimize(model)
        if when == "after the first call":
            assert_fused(fast, x)
        if when != "before optimize":
            patch.setattr(kind, "forward", doubled(kind.forward))
        with torch.no_grad():
            actual = fast(x)
            torch.testing.assert_close(actual, eager(fast, x))
        assert not torch.allclose(actual, expected)
    assert torch.equal(assert_fused(fast, x), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_patched_on_an_instance(kind: type[nn.Module]) -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    before, layer = assert_fused(fast, x), first(fast, kind)
    layer.forward = types.MethodType(doubled(kind.forward), layer)
    with torch.no_grad():
        for _ in range(2):
            actual, counters = call(fast, x)
            torch.testing.assert_close(actual, eager(fast, x))
            assert counters["fused_calls"] > 0, "the rest of the layers is fused"
    assert not torch.equal(actual, before)
    del layer.forward
    assert torch.equal(assert_fused(fast, x), before)


def test_forward_patched_on_the_sequential() -> None:
    fast, x = fastseq.optimize(nn.Sequential(conv_net(), nn.Identity())), images()
    before = assert_fused(fast, x)
    for sequential in (fast, fast[0]):
        sequential.forward = lambda input: input.sum()
        with torch.no_grad():
            torch.testing.assert_close(fast(x), x.sum())
        del sequential.forward
        assert torch.equal(assert_fused(fast, x), before)


def test_forward_patched_on_every_sequential(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, x = fastseq.optimize(nn.Sequential(conv_net(), nn.Identity())), images()
    before = assert_fused(fast, x)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Sequential, "forward", lambda self, input: input + 1)
        assert torch.equal(fast(x), x + 1)
        assert torch.equal(fast(input=x), x + 1)
        assert torch.equal(fast.forward(x), x + 1)
    assert torch.equal(assert_fused(fast, x), before)


# Hooks come and go (which hooks there are: test_gate.py) -----------------------------------------------------------


@each_net
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ReLU, nn.Linear])
def test_hooks_added_later_and_removed(net: str, kind: type[nn.Module]) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images()
    before = assert_fused(fast, x, RUNS[net])
    for _ in range(2):
        layer = first(getattr(fast, "features", fast) if kind is nn.Conv2d else fast, kind)
        handle = layer.register_forward_hook(lambda module, args, output: output + 1)
        with torch.no_grad():
            hooked, counters = call(fast, x)
            torch.testing.assert_close(hooked, eager(fast, x))
        assert any("hooks" in reason for reason in counters["fallbacks"]) and not torch.equal(hooked, before)
        handle.remove()
        assert torch.equal(assert_fused(fast, x, RUNS[net]), before)


# Parameters that are gone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize(
    "remove",
    [delattr, lambda layer, name: layer._parameters.pop(name), lambda layer, name: layer._parameters.clear()],
    ids=["del", "pop", "clear"],
)
def test_a_parameter_that_is_gone(is_warm: bool, parameter: str, remove: Callable[[Any, str], Any]) -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    before = assert_fused(fast, x) if is_warm else None
    layer, name = layer_of(fast, parameter)
    kept = dict(layer._parameters)
    remove(layer, name)
    missing = f"'{type(layer).__name__}' object has no attribute '(weight|bias)'"
    with torch.no_grad():
        for _ in range(3):
            with pytest.raises(AttributeError, match=missing):
                fast(x)
    layer._parameters.update(kept)
    after = assert_fused(fast, x)
    assert before is None or torch.equal(after, before)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Linear])
@pytest.mark.parametrize("value", [torch.randn(8), None], ids=["tensor", "None"])
def test_bias_as_a_plain_attribute(kind: type[nn.Module], value: Tensor | None) -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    assert_fused(fast, x)
    layer = first(fast, kind)
    shape = layer.bias.shape
    del layer.bias
    layer.__dict__["bias"] = None if value is None else torch.randn(shape)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), eager(fast, x))
            if value is not None:
                layer.bias.mul_(2)


def test_weight_as_a_buffer() -> None:
    fast, x = fastseq.optimize(split_net()), images()
    assert_fused(fast, x, runs=2)
    weight = fast[4].weight.detach()
    del fast[4].weight
    fast[4].register_buffer("weight", weight)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), eager(fast, x))
            weight.mul_(2)


def test_inference_mode_weights_are_followed() -> None:
    with torch.inference_mode():
        fast, x = fastseq.optimize(conv_net()), images()
        for _ in range(2):
            actual, counters = call(fast, x)
            torch.testing.assert_close(actual, eager(fast, x))
            assert counters == fused() and actual.is_inference()
            fast[0].weight.mul_(2)
            fast[5].bias.add_(1)
