"""Behaviours 38 to 47: autograd, modes, transforms, tensor types, devices, training."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from behaviour import assert_close_to_eager, assert_eager_outcome, one_thread, plain  # noqa: F401
from dropin import (
    as_plain,
    assert_identical,
    assert_same_outcome,
    call,
    conv_net,
    eager,
    first,
    fused,
    images,
    outcome,
    split_net,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

import fastseq

GRADIENTS = "gradients are being recorded"


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


# 38: eval mode and gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_grad", [False, True], ids=["x", "x requires grad"])
@pytest.mark.parametrize("weights", ["trainable", "frozen", "last bias trainable"])
@pytest.mark.parametrize("net", [conv_net, split_net], ids=["flat", "split"])
def test_38_eval_does_not_switch_gradients_off(net: Callable[[], nn.Sequential], weights: str, x_grad: bool) -> None:
    """The output requires grad if a parameter or the input does, in eval mode too; fused only where nothing does."""
    fast = fastseq.optimize(net()).eval()
    runs = 2 if net is split_net else 1
    assert_close_to_eager(fast, images(), runs)
    fast.requires_grad_(weights == "trainable")
    if weights == "last bias trainable":
        first(fast, nn.Linear).bias.requires_grad_(True)
    twin = plain(fast)
    x = images().requires_grad_(x_grad)
    y = x.detach().clone().requires_grad_(x_grad)
    result, counters = call(fast, x)
    expected = twin(y)
    wants = weights != "frozen" or x_grad
    assert result.requires_grad == expected.requires_grad == wants
    assert (result.grad_fn is None) == (expected.grad_fn is None)
    if not wants:
        assert counters["fused_calls"] == runs
        torch.testing.assert_close(result, expected)
        return
    assert any(GRADIENTS in reason for reason in counters["fallbacks"])
    # A run in front, of which nothing requires grad, may be fused.
    assert counters["fused_calls"] == (1 if runs == 2 and weights == "last bias trainable" and not x_grad else 0)
    torch.testing.assert_close(result, expected)
    result.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for a, b in zip(fast.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.no_grad():
        assert call(fast, x)[1]["fused_calls"] == runs


# 39: modes belong to threads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_39_grad_mode_belongs_to_the_thread_and_the_report_says_so(mode: Callable[[], Any]) -> None:
    """A worker under somebody else's `no_grad` still records gradients, and so runs eager; the reason is told."""
    fast, x = fastseq.optimize(conv_net()), images()
    results: list[Tensor] = []
    with mode():
        fast(x)
        fastseq.reset_stats(fast)
        worker = threading.Thread(target=lambda: results.append(fast(x)))
        worker.start()
        worker.join()
        counters = fastseq.stats(fast)
    assert results[0].requires_grad and counters["fused_calls"] == 0
    ((reason, count),) = counters["fallbacks"].items()
    assert GRADIENTS in reason and "use torch.no_grad() or inference_mode()" in reason and count == 1
    assert f"fell back 1x: {reason}" in str(fastseq.explain(fast))


def test_39_autocast_belongs_to_the_thread() -> None:
    fast, x = fastseq.optimize(mlp()), torch.randn(2, 6)
    dtypes: list[torch.dtype] = []

    def work() -> None:
        with torch.no_grad():
            dtypes.append(fast(x).dtype)

    with torch.autocast("cpu"), torch.no_grad():
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
        assert fast(x).dtype is torch.bfloat16
    assert dtypes == [torch.float32]
    assert fastseq.stats(fast)["fused_calls"] == 1


# 40: inference mode -------------------------------------------------------------------------------------------------


def test_40_results_of_inference_mode_are_inference_tensors() -> None:
    """Not to be written to outside, nor to be saved for a backward pass: eager's errors."""
    fast = fastseq.optimize(conv_net()[:3])
    with torch.inference_mode():
        result, counters = call(fast, images())
    assert counters == fused() and result.is_inference()
    with torch.inference_mode(), as_plain(fast):
        expected = fast(images())
    weight = torch.randn(4, 8, 1, 1, requires_grad=True)
    for use in (
        lambda t: t.add_(1),
        lambda t: nn.functional.conv2d(t, weight),
        lambda t: t * weight[0, 0],
        lambda t: t._version,
    ):
        a, b = outcome(use, result), outcome(use, expected)
        assert (a.error, a.text) == (b.error, b.text) and a.error is RuntimeError
    with torch.no_grad():
        assert not call(fast, images())[0].is_inference()


def test_40_an_inference_tensor_as_input() -> None:
    """Eager cannot save it for the backward pass of weights that want gradients, and raises; else it is fused."""
    fast = fastseq.optimize(conv_net())
    with torch.inference_mode():
        x = images()
    error = assert_same_outcome(fast, x)
    assert error.error is RuntimeError and "Inference tensors cannot be saved for backward" in error.text
    with torch.no_grad():
        result, counters = call(fast, x)
    assert counters == fused() and not result.is_inference()
    frozen = fastseq.optimize(conv_net().requires_grad_(False))
    result, counters = call(frozen, x)
    expected = eager(frozen, x)
    assert counters == fused() and not result.requires_grad
    assert result.is_inference() == expected.is_inference() is False


def test_40_parameters_made_in_inference_mode_have_no_version() -> None:
    with torch.inference_mode():
        fast = fastseq.optimize(mlp())
        x = torch.randn(2, 6)
        with pytest.raises(RuntimeError, match="do not track version counter"):
            _ = fast[0].weight._version
        before = assert_close_to_eager(fast, x, runs=1)
        fast[0].weight.mul_(2)
        assert not torch.equal(assert_close_to_eager(fast, x, runs=1), before)
    assert_same_outcome(fast, torch.randn(2, 6))
    with torch.no_grad():
        assert call(fast, torch.randn(2, 6))[1] == fused()


# 41: forward mode ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("dual", ["input", "weight", "bias of the last"])
def test_41_forward_mode_tangents_flow_under_no_grad(dual: str, grad: bool) -> None:
    """A tangent comes in with the input or a parameter; `no_grad` is about the other direction."""
    fast, x = fastseq.optimize(mlp()), torch.randn(2, 6)
    assert_close_to_eager(fast, x, runs=1)
    tangents = []
    for net in (plain(fast), fast):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            parameters = {name: p.detach() for name, p in net.named_parameters()}
            torch.manual_seed(3)
            value = x
            if dual == "input":
                value = forward_ad.make_dual(x, torch.randn_like(x))
            else:
                name = "0.weight" if dual == "weight" else "2.bias"
                parameters[name] = forward_ad.make_dual(parameters[name], torch.randn_like(parameters[name]))
            result = torch.func.functional_call(net, parameters, (value,))
            tangents.append(forward_ad.unpack_dual(result).tangent.clone())
    torch.testing.assert_close(tangents[1], tangents[0])
    assert tangents[0].any()
    assert "forward-mode differentiation is active" in fastseq.stats(fast)["fallbacks"]
    assert_close_to_eager(fast, x, runs=1)


def test_41_a_leaf_that_requires_grad_cannot_be_written_to() -> None:
    fast = fastseq.optimize(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 2)).requires_grad_(False))
    expected = assert_same_outcome(fast, torch.randn(2, 6, requires_grad=True))
    assert expected.error is RuntimeError and "leaf Variable that requires grad" in expected.text


# 42: autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("net", ["conv", "linear", "pool", "pool relu", "all", "split"])
def test_42_autocast_gives_eagers_dtypes(net: str, dtype: torch.dtype) -> None:
    """Convolutions and Linear give 16 bits, a pool or ReLU alone keeps float32, and float64 is not cast."""
    model = {
        "conv": lambda: conv_net()[:3],
        "linear": lambda: nn.Sequential(nn.Linear(12, 4), nn.ReLU()),
        "pool": lambda: nn.Sequential(nn.MaxPool2d(2)),
        "pool relu": lambda: nn.Sequential(nn.MaxPool2d(2), nn.ReLU()),
        "all": conv_net,
        "split": split_net,
    }[net]()
    fast, x = fastseq.optimize(model), images()
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=dtype):
            result = assert_eager_outcome(fast, x, "autocast is active").value
            assert result.dtype is (torch.float32 if net.startswith("pool") else dtype)
            fast.double()
            assert_eager_outcome(fast, x.double())
            fast.float()
            with torch.autocast("cpu", enabled=False), torch.no_grad():
                assert call(fast, x)[1]["fused_calls"] >= 1
    with torch.no_grad():
        assert call(fast, x)[1]["fused_calls"] >= 1


def test_42_a_weight_written_inside_autocast_is_read_as_eager_reads_it() -> None:
    """Autocast keeps its cast copies of weights that require grad for one region; the next region is new."""
    fast, x = fastseq.optimize(mlp()), torch.randn(2, 6)
    twin = plain(fast)
    with torch.autocast("cpu"):
        for net in (fast, twin):
            net(x)
            net[0].weight.data.mul_(3)
        assert_identical(fast(x).detach(), twin(x).detach())
    with torch.autocast("cpu"):
        assert_identical(fast(x).detach(), twin(x).detach())
    assert_close_to_eager(fast, x, runs=1)


# 43: transforms -----------------------------------------------------------------------------------------------------


def weights(model: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    return {name: parameter.detach() * scale for name, parameter in model.named_parameters()}


def loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().sum()


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "vmap": lambda m, x: torch.vmap(m)(torch.stack([x, -x])),
    "vmap of rows": lambda m, x: torch.vmap(lambda row: m(row[None]))(x),
    "vmap inside": lambda m, x: torch.vmap(torch.vmap(lambda row: m(row[None])[0]))(torch.stack([x, -x])),
    "grad": lambda m, x: torch.func.grad(loss(m))(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (torch.ones_like(x),)),
    "vjp": lambda m, x: torch.func.vjp(m, x)[1](m(x).detach() * 0 + 1),
    "jacrev": lambda m, x: torch.func.jacrev(lambda x: m(x).sum(0))(x),
    "jacfwd": lambda m, x: torch.func.jacfwd(lambda s: m(x * s).sum(0))(torch.ones(())),
    "hessian": lambda m, x: torch.func.hessian(lambda s: m(x * s).square().sum())(torch.ones(())),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("net", ["conv", "linear"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_43_transforms_are_eagers(name: str, net: str, grad: bool) -> None:
    """Inside vmap a tensor claims to be a plain one, and has no memory that could be read."""
    fast, x = (
        (fastseq.optimize(conv_net()), images(3)) if net == "conv" else (fastseq.optimize(mlp()), torch.randn(3, 6))
    )
    before = assert_close_to_eager(fast, x, runs=1)
    with torch.set_grad_enabled(grad):
        expected = TRANSFORMS[name](plain(fast), x)
        fastseq.reset_stats(fast)
        torch.testing.assert_close(TRANSFORMS[name](fast, x), expected)
    assert fastseq.stats(fast)["eager_calls"] > 0
    assert torch.equal(assert_close_to_eager(fast, x, runs=1), before)


def test_43_what_vmap_passes_claims_to_be_plain() -> None:
    seen: list[Any] = []
    fast = fastseq.optimize(nn.Sequential(nn.Linear(6, 5), nn.ReLU()))
    with torch.no_grad():
        torch.vmap(lambda row: seen.extend([type(row) is Tensor, outcome(row.data_ptr).error]) or fast(row))(
            torch.randn(3, 6)
        )
    assert seen == [True, RuntimeError]
    assert fastseq.stats(fast)["fused_calls"] == 0
    assert any("transform" in reason or "plain dense" in reason for reason in fastseq.stats(fast)["fallbacks"])


def test_43_functional_call_swaps_the_weights_of_one_call() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    before = assert_close_to_eager(fast, x, runs=1)
    with torch.no_grad():
        for scale in (0.5, 2.0):
            expected = torch.func.functional_call(plain(fast), weights(fast, scale), (x,))
            fastseq.reset_stats(fast)
            torch.testing.assert_close(torch.func.functional_call(fast, weights(fast, scale), (x,)), expected)
            assert fastseq.stats(fast) == fused()
    assert torch.equal(assert_close_to_eager(fast, x, runs=1), before)


def test_43_an_ensemble_over_a_meta_base() -> None:
    """`stack_module_state`, and vmap of a model without weights of its own."""
    models = [mlp() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(4, 6)

    def ensemble(base: nn.Module) -> Tensor:
        one = lambda p, b, x: torch.func.functional_call(base, (p, b), (x,))  # noqa: E731
        result: Tensor = torch.vmap(one, in_dims=(0, 0, None))(parameters, buffers, x)
        return result

    with torch.no_grad():
        expected = torch.stack([model(x) for model in models])
        fast = fastseq.optimize(copy.deepcopy(models[0]).to("meta"))
        torch.testing.assert_close(ensemble(fast), expected)
        warm = fastseq.optimize(models[0])
        warm(x)
        torch.testing.assert_close(ensemble(warm), expected)


@pytest.mark.filterwarnings("ignore")
def test_43_fake_tensors_have_a_type_of_their_own() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    before = assert_close_to_eager(fast, x, runs=1)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = mode.from_tensor(x)
        for value in (fake, x):
            result, counters = call(fast, value)
            assert type(result) is FakeTensor and result.shape == before.shape and counters["fused_calls"] == 0
    assert torch.equal(assert_close_to_eager(fast, x, runs=1), before)


# 44: tensor types ---------------------------------------------------------------------------------------------------


class Sub(Tensor):
    """Takes part in everything, and comes out as it went in."""


SUBCLASSES: dict[str, tuple[Callable[[Tensor], Any], type | None]] = {
    "subclass": (lambda x: x.as_subclass(Sub), Sub),
    "Parameter": (nn.Parameter, None),
    "Buffer": (nn.Buffer, None),
    "mkldnn": (lambda x: x.to_mkldnn(), Tensor),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), Tensor),
    "sparse": (lambda x: x.to_sparse(), Tensor),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("net", ["conv", "linear", "pool"])
@pytest.mark.parametrize("kind", SUBCLASSES)
def test_44_the_type_of_a_tensor_goes_through_as_in_eager(kind: str, net: str) -> None:
    """Subclass in, subclass out; a Parameter gives a Tensor; others work or fail as they do in eager."""
    layers = {"conv": conv_net()[:3], "linear": [nn.Linear(12, 4)], "pool": [nn.MaxPool2d(2)]}[net]
    fast = fastseq.optimize(nn.Sequential(*layers))
    make, wanted = SUBCLASSES[kind]
    with torch.no_grad():
        x = make(images())
        if wanted is None:
            result, counters = call(fast, x)
            assert type(result) is Tensor and counters == fused()
            torch.testing.assert_close(result, eager(fast, x))
        else:
            expected = assert_eager_outcome(fast, x, "the input is not")
            assert expected.error is not None or type(expected.value) is wanted


def test_44_subclasses_of_parameters_are_eagers() -> None:
    class Scaled(nn.Parameter):
        pass

    fast, x = fastseq.optimize(mlp()), torch.randn(2, 6)
    fast[0].weight = Scaled(fast[0].weight.detach())
    with torch.no_grad():
        expected = assert_eager_outcome(fast, x)
        assert expected.error is None
        fast[0].weight = nn.Parameter(fast[0].weight.detach().as_subclass(Sub))
        assert_same_outcome(fast, x)


@contextmanager
def one_process() -> Iterator[None]:
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
@pytest.mark.filterwarnings("ignore")
def test_44_distributed_tensors() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor

    fast, x = fastseq.optimize(mlp()), torch.randn(2, 6)
    before = assert_close_to_eager(fast, x, runs=1)
    with one_process(), torch.no_grad():
        mesh = init_device_mesh("cpu", (1,))
        shared = distribute_tensor(x, mesh, [Replicate()])
        error = assert_same_outcome(fast, shared)  # plain weights: eager does not mix them
        assert error.error is RuntimeError and "mixed torch.Tensor and DTensor" in error.text
        distribute_module(fast, mesh)
        result, counters = call(fast, shared)
        assert type(result) is DTensor and counters["fused_calls"] == 0
        torch.testing.assert_close(result.to_local(), before)
        assert assert_same_outcome(fast, x).error is RuntimeError


# 45: meta, lazy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [conv_net, split_net, mlp])
def test_45_meta_models_give_shapes(net: Callable[[], nn.Sequential]) -> None:
    fast = fastseq.optimize(net())
    x = torch.randn(2, 6) if net is mlp else images()
    with torch.no_grad():
        shape = fast(x).shape
        fast.to("meta")
        result = assert_eager_outcome(fast, x.to("meta"), "not on the CPU").value
    assert result.is_meta and result.shape == shape
    with torch.device("meta"):
        made = fastseq.optimize(net())
    with torch.no_grad():
        assert made(x.to("meta")).shape == shape


def test_45_meta_weights_and_a_real_input_are_never_fused() -> None:
    """Linear raises; Conv2d may answer with memory that nobody wrote: then shapes are all that can be compared."""
    fast = fastseq.optimize(mlp().to("meta"))
    with torch.no_grad():
        assert assert_same_outcome(fast, torch.randn(2, 6)).error is not None
        conv = fastseq.optimize(conv_net()[:3].to("meta"))
        expected = outcome(eager, conv, images())
        fastseq.reset_stats(conv)
        actual = outcome(conv, images())
        assert (actual.error, actual.text) == (expected.error, expected.text)
        if expected.error is None:
            assert actual.value.shape == expected.value.shape and actual.value.device == expected.value.device
        assert fastseq.stats(conv)["fallbacks"] == {"a parameter is on another device than the input": 1}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_45_lazy_layers_are_planned_anew_once_they_are_real() -> None:
    """LazyConv2d and LazyLinear become Conv2d and Linear in the first call; before it `state_dict` has no sizes."""
    fast = fastseq.optimize(
        nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(5), nn.ReLU())
    )
    assert nn.parameter.is_lazy(fast[0].weight) and type(fast[0]) is nn.LazyConv2d
    with torch.no_grad():
        first_result, counters = call(fast, images())
        assert type(fast[0]) is nn.Conv2d and type(fast[4]) is nn.Linear
        assert fast[4].in_features == 100 and first_result.shape == (2, 5)
    assert_close_to_eager(fast, images(), runs=1)
    assert_close_to_eager(fastseq.optimize(fast), images(), runs=1)


# 46: devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["input", "model", "first layer", "last bias"])
def test_46_mixed_devices_are_eagers_error(part: str) -> None:
    """With one device more, `meta`: the gate compares each parameter's device with the input's."""
    fast, x = fastseq.optimize(mlp()), torch.randn(2, 6)
    assert_close_to_eager(fast, x, runs=1)
    if part == "input":
        x = x.to("meta")
    elif part == "model":
        fast.to("meta")
    elif part == "first layer":
        fast[0].to("meta")
    else:
        fast[2].bias = nn.Parameter(fast[2].bias.detach().to("meta"))
    with torch.no_grad():
        fastseq.reset_stats(fast)
        expected = assert_same_outcome(fast, x)
        reasons = fastseq.stats(fast)["fallbacks"]
    assert expected.error is not None or expected.value.is_meta
    assert fastseq.stats(fast)["fused_calls"] == 0
    assert any("device" in reason or "not on the CPU" in reason for reason in reasons)


@pytest.mark.gpu
def test_46_mixed_devices_on_a_gpu() -> None:
    """Input and weights on different devices: eager's words, whichever is where."""
    for model, x in ((mlp(), torch.randn(2, 6)), (conv_net(), images())):
        fast = fastseq.optimize(model)
        with torch.no_grad():
            assert assert_same_outcome(fast, x.cuda()).error is RuntimeError
            fast.cuda()
            assert assert_same_outcome(fast, x).error is RuntimeError
            assert call(fast, x.cuda())[1] == fused()
            fast[0].cpu()
            assert assert_same_outcome(fast, x.cuda()).error is RuntimeError


@pytest.mark.gpu
def test_46_the_current_stream_is_used_and_graphs_can_be_captured() -> None:
    """Work is queued on the current stream without waiting for it; a captured call replays with new inputs and weights.

    Captures, packing and launches are tested without a GPU in tests/on_emulated_grid/test_cuda_run.py.
    """
    fast, x = fastseq.optimize(conv_net().cuda()), images().cuda()
    with torch.no_grad():
        expected = eager(fast, x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                result = fast(x)
        torch.cuda.current_stream().wait_stream(stream)
        torch.testing.assert_close(result, expected, atol=5e-3, rtol=5e-3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fast(x)
        x.copy_(torch.randn_like(x))
        fast[0].weight.mul_(0.5)
        graph.replay()
        torch.testing.assert_close(captured, eager(fast, x), atol=5e-3, rtol=5e-3)


# 47: training mode --------------------------------------------------------------------------------------------------


def test_47_training_mode_does_not_matter_to_most_layers() -> None:
    """Conv2d, ReLU, MaxPool2d, Linear and Flatten do the same in training mode: fused there as well."""
    fast = fastseq.optimize(nn.Sequential(*[m for m in conv_net() if not isinstance(m, nn.Dropout)]))
    x = images()
    before = assert_close_to_eager(fast.eval(), x, runs=1)
    assert torch.equal(assert_close_to_eager(fast.train(), x, runs=1), before)


@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
@pytest.mark.parametrize("outer", [False, True], ids=["model in eval", "model in train"])
@pytest.mark.parametrize("own", [False, True], ids=["layer in eval", "layer in train"])
def test_47_dropout_looks_at_its_own_flag(own: bool, outer: bool, inplace: bool) -> None:
    """With the same random numbers, drawn as eager draws them; none are drawn in eval mode."""
    fast = fastseq.optimize(nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5, inplace), nn.ReLU(), nn.Linear(5, 3)))
    x = torch.randn(64, 6)
    fast.train(outer)
    fast[1].train(own)
    with torch.no_grad():
        results, states = [], []
        for net in (plain(fast), fast):
            torch.manual_seed(5)
            results.append(net(x))
            states.append(torch.get_rng_state())
        torch.testing.assert_close(results[1], results[0])
        assert torch.equal(*states)
        torch.manual_seed(5)
        assert torch.equal(torch.get_rng_state(), states[0]) != own
        assert (call(fast, x)[1] == fused()) != own
        # As the first layer, in place, it writes into the caller's tensor.
        y = torch.ones(4, 6)
        head = fastseq.optimize(nn.Sequential(fast[1], nn.Linear(6, 2)))
        head(y)
        assert (y == 1).all() != (own and inplace)


NORMS: dict[str, Callable[[], nn.BatchNorm2d]] = {
    "plain": lambda: nn.BatchNorm2d(8),
    "no running statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "cumulative": lambda: nn.BatchNorm2d(8, momentum=None),
    "not affine": lambda: nn.BatchNorm2d(8, affine=False),
    "wide eps": lambda: nn.BatchNorm2d(8, eps=0.1, momentum=0.7),
}


@pytest.mark.parametrize("own", [False, True], ids=["layer in eval", "layer in train"])
@pytest.mark.parametrize("outer", [False, True], ids=["model in eval", "model in train"])
@pytest.mark.parametrize("norm", NORMS)
def test_47_batch_norm_looks_at_its_own_flag_and_moves_its_statistics(norm: str, outer: bool, own: bool) -> None:
    """Also under no_grad; without running statistics those of the batch are used in eval mode too."""
    fast = fastseq.optimize(nn.Sequential(nn.Conv2d(3, 8, 3), NORMS[norm](), nn.ReLU(), nn.Conv2d(8, 2, 3), nn.ReLU()))
    fast.train(outer)
    fast[1].train(own)
    twin = plain(fast)
    with torch.no_grad():
        for _ in range(3):
            x = images() * 3 + 1
            result, counters = call(fast, x)
            torch.testing.assert_close(result, twin(x))
            assert counters["fused_calls"] == (1 if fast[1].track_running_stats and not own else 2)
    torch.testing.assert_close(fast.state_dict(), twin.state_dict())
    if fast[1].track_running_stats:
        assert fast[1].num_batches_tracked == (3 if own else 0)
        assert bool(fast[1].running_mean.any()) == own
