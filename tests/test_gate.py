"""The gate: what runs fused, and everything that must see the plain layers and so runs eager, with a reason."""

from __future__ import annotations

import collections
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from dropin import (
    NETS,
    RUNS,
    Holder,
    as_plain,
    assert_eager,
    assert_fused,
    assert_identical,
    assert_same_outcome,
    call,
    conv_net,
    eager,
    first,
    fused,
    images,
    nested_net,
    one_thread,  # noqa: F401
    outcome,
    split_net,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import fastseq
from fastseq.reference import plain_copy

each_net = pytest.mark.parametrize("net", NETS)

# Gradients --------------------------------------------------------------------------------------------------------


@each_net
def test_gradients_are_eagers(net: str) -> None:
    fast = fastseq.optimize(NETS[net]())
    plain = plain_copy(fast)
    x = images().requires_grad_()
    y = x.detach().clone().requires_grad_()
    actual, counters = call(fast, x)
    expected = plain(y)
    assert counters["fused_calls"] == 0 and counters["eager_calls"] >= RUNS[net]
    assert all("gradients are being recorded" in reason for reason in counters["fallbacks"])
    assert torch.equal(actual, expected) and actual.requires_grad
    actual.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name, rtol=0, atol=0)


def test_double_backward() -> None:
    fast = fastseq.optimize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)).double())
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fast, (x,)) and torch.autograd.gradgradcheck(fast, (x,))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
@each_net
def test_fused_where_grad_mode_is_off(net: str, mode: Callable[[], AbstractContextManager[Any]]) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images().requires_grad_()
    with mode():
        for _ in range(2):
            actual, counters = call(fast, x)
            expected = eager(fast, x)
            assert counters == fused(RUNS[net])
            torch.testing.assert_close(actual, expected)
            assert actual.is_inference() == expected.is_inference() == (mode is torch.inference_mode)
            assert not actual.requires_grad and actual.grad_fn is None


def test_frozen_parameters_with_grad_mode_on() -> None:
    fast, x = fastseq.optimize(conv_net()).requires_grad_(False), images()
    actual, counters = call(fast, x)
    assert counters == fused() and not actual.requires_grad
    torch.testing.assert_close(actual, eager(fast, x))
    result = assert_eager(fast, x.requires_grad_(), "the input requires grad")
    (gradient,) = torch.autograd.grad(result.sum(), x)
    (expected,) = torch.autograd.grad(eager(fast, x).sum(), x)
    assert torch.equal(gradient, expected)


def test_only_the_run_that_needs_gradients_is_eager() -> None:
    fast, x = fastseq.optimize(split_net()).requires_grad_(False), images()
    fast[4].requires_grad_(True)
    assert assert_eager(fast, x, "a parameter requires grad", runs=1).requires_grad
    fast.requires_grad_(False)
    fast[0].bias.requires_grad_(True)
    assert assert_eager(fast, x, "gradients are being recorded", runs=0).requires_grad


@each_net
def test_inference_tensors(net: str) -> None:
    fast = fastseq.optimize(NETS[net]())
    with torch.inference_mode():
        x = images()
        inside = assert_inference(fast, x, RUNS[net])
    with torch.no_grad():
        outside, counters = call(fast, x)
        assert counters == fused(RUNS[net]) and not outside.is_inference()
        assert torch.equal(outside, inside)
    assert_same_outcome(fast, x)
    fast.requires_grad_(False)
    actual, counters = call(fast, x)
    assert counters == fused(RUNS[net]) and not actual.is_inference() and torch.equal(actual, inside)
    # What was packed under inference_mode does not stand in autograd's way.
    fast.requires_grad_(True)
    assert_eager(fast, images().requires_grad_(), "gradients").sum().backward()
    assert all(parameter.grad is not None for parameter in fast.parameters())


def assert_inference(model: nn.Module, x: Tensor, runs: int) -> Tensor:
    actual, counters = call(model, x)
    assert counters == fused(runs) and actual.is_inference()
    torch.testing.assert_close(actual, eager(model, x))
    copied = actual.clone()
    with torch.inference_mode(False), pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        copied.add_(1)
    return actual


def test_inference_input_with_weights_that_want_gradients_raises_eagers_error() -> None:
    fast = fastseq.optimize(conv_net())
    with torch.inference_mode():
        x = images()
    assert assert_same_outcome(fast, x).error is RuntimeError


def test_a_result_can_be_used_in_autograd() -> None:
    """Fused features under no_grad, a trained head on top."""
    fast, head = fastseq.optimize(conv_net()), nn.Linear(10, 2)
    with torch.no_grad():
        features, counters = call(fast, images())
    head(features).sum().backward()
    assert counters == fused() and head.weight.grad is not None
    features.requires_grad_()


# Modes ------------------------------------------------------------------------------------------------------------


class Log(TorchFunctionMode):
    def __init__(self) -> None:
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


class DispatchLog(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


MODES: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str]] = {
    "function mode": (BaseTorchFunctionMode, "a torch function mode is active"),
    "function log": (Log, "a torch function mode is active"),
    "device": (lambda: torch.device("cpu"), "a torch function mode is active"),
    "dispatch mode": (DispatchLog, "a dispatch mode"),
    "flop counter": (lambda: FlopCounterMode(display=False), "hooks for all modules are registered"),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), "autocast"),
}


@each_net
@pytest.mark.parametrize("mode", MODES)
def test_modes_see_every_layer(net: str, mode: str) -> None:
    make, reason = MODES[mode]
    fast, x = fastseq.optimize(NETS[net]()), images()
    before = assert_fused(fast, x, RUNS[net])
    with torch.no_grad(), make():
        actual, counters = call(fast, x)
        assert_identical(actual, eager(fast, x))
    assert counters["fused_calls"] == 0 and counters["fallbacks"]
    assert all(reason in text for text in counters["fallbacks"])
    assert torch.equal(assert_fused(fast, x, RUNS[net]), before)


@each_net
@pytest.mark.parametrize("log", [Log, DispatchLog])
def test_modes_log_what_eager_does(net: str, log: Callable[[], Any]) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images()
    with torch.no_grad():
        fast(x)
        with log() as ours:
            fast(x)
        with as_plain(fast), log() as theirs:
            fast(x)
    assert ours.names == theirs.names and any("conv" in name for name in ours.names)


@each_net
def test_flop_counter_counts_eagers_flops(net: str) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images()
    counts = []
    for context in (nullcontext(), as_plain(fast)):
        with torch.no_grad(), context, FlopCounterMode(display=False) as counter:
            fast(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


INERT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "cuda autocast": lambda: torch.autocast("cuda", enabled=False),
    "profiler": lambda: torch.profiler.profile(record_shapes=True),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "mkldnn off": lambda: torch.backends.mkldnn.flags(enabled=False),
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "forward AD level": forward_ad.dual_level,
    "no function subclasses": torch._C.DisableTorchFunctionSubclass,
}


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning")
@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning", "ignore:TF32 acceleration:UserWarning")
@pytest.mark.parametrize("context", INERT)
def test_contexts_that_change_no_result_stay_fused(context: str) -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    with torch.no_grad(), INERT[context]():
        assert_fused(fast, x)


def test_autocast_gives_eagers_dtypes() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    with torch.autocast("cpu", torch.bfloat16):
        trained = assert_eager(fast, x, "autocast")
        assert trained.dtype is torch.bfloat16 and trained.requires_grad
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            assert assert_fused(fast, x).dtype is torch.float32


def test_default_device() -> None:
    """torch.set_default_device installs a function mode for good; results are still eager's."""
    fast, x = fastseq.optimize(conv_net()), images()
    torch.set_default_device("cpu")
    try:
        with torch.no_grad():
            assert_eager(fast, x, "a torch function mode is active")
    finally:
        torch.set_default_device(None)
    assert_fused(fast, x)


def test_profiler_shows_the_native_call() -> None:
    fast, x = fastseq.optimize(split_net()), images()
    with torch.no_grad():
        fast(x)
        with torch.profiler.profile(record_shapes=True, with_stack=True, profile_memory=True) as profile:
            fast(x)
    names = collections.Counter(event.name for event in profile.events())
    assert names["fastseq::run"] == 2 and names["aten::batch_norm"] == 1 and names["aten::conv2d"] == 0


# Transforms -------------------------------------------------------------------------------------------------------


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().sum()


def forward_derivative(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x))))
        return result.primal.clone(), result.tangent.clone()


def weight_derivative(model: nn.Module, x: Tensor) -> Tensor:
    """Tangents that come in with a weight, not with the input."""
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, torch.ones_like(p)) for name, p in parameters_of(model).items()}
        tangent = forward_ad.unpack_dual(torch.func.functional_call(model, duals, (x,))).tangent
        return tangent.clone()


def ensemble(model: nn.Module, x: Tensor) -> Tensor:
    stacked = {name: torch.stack([p, 2 * p, -p]) for name, p in parameters_of(model).items()}
    result: Tensor = torch.vmap(lambda p, x: torch.func.functional_call(model, p, (x,)), in_dims=(0, None))(stacked, x)
    return result


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "vmap": lambda model, x: torch.vmap(model)(torch.stack([x, 2 * x])),
    "vmap over images": lambda model, x: torch.vmap(lambda image: model(image[None]))(x),
    "vmap chunked": lambda model, x: torch.vmap(model, chunk_size=1)(torch.stack([x, 2 * x])),
    "vmap ensemble": ensemble,
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),)),
    "vjp": lambda model, x: torch.func.vjp(model, x)[1](torch.ones(len(x), 10)),
    "grad": lambda model, x: torch.func.grad(loss(model))(x),
    "jacrev": lambda model, x: torch.func.jacrev(lambda x: model(x)[0])(x),
    "jacfwd of grad": lambda model, x: torch.func.jacfwd(lambda s: torch.func.grad(loss(model))(x * s).sum())(
        torch.ones(())
    ),
    "functional_call": lambda model, x: torch.func.functional_call(
        model, {name: 2 * p for name, p in parameters_of(model).items()}, (x,)
    ),
    "grad of parameters": lambda model, x: torch.func.grad(
        lambda p: torch.func.functional_call(model, p, (x,)).square().sum()
    )(parameters_of(model)),
    "linearize": lambda model, x: torch.func.linearize(model, x)[1](torch.ones_like(x)),
    "functionalize": lambda model, x: torch.func.functionalize(model)(x),
    "forward AD": forward_derivative,
    "forward AD of weights": weight_derivative,
}


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize("net", ["flat", "split", "holder"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(net: str, grad: bool, transform: str) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images()
    before = assert_fused(fast, x, RUNS[net])
    with torch.set_grad_enabled(grad):
        function = TRANSFORMS[transform]
        expected = function(plain_copy(fast), x)
        actual, counters = call_with(function, fast, x)
    torch.testing.assert_close(actual, expected)
    if transform == "functional_call":
        assert counters == fused(RUNS[net]), "other weights for one call"
    elif transform != "linearize":  # calls the model once outside of the transform, too
        assert counters["fused_calls"] == 0 and counters["eager_calls"] > 0
    assert torch.equal(assert_fused(fast, x, RUNS[net]), before)


def call_with(function: Callable[[nn.Module, Tensor], Any], model: nn.Module, x: Tensor) -> tuple[Any, dict[str, Any]]:
    fastseq.reset_stats(model)
    result = function(model, x)
    return result, fastseq.stats(model)


# Inputs -----------------------------------------------------------------------------------------------------------


class Sub(Tensor):
    """A subclass that takes part in everything."""


class Wrapped(Tensor):
    """A subclass without data of its own."""

    @staticmethod
    def __new__(cls, value: Tensor) -> Wrapped:
        made: Wrapped = Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype)  # type: ignore[attr-defined]
        made.value = value
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tree_map_only(cls, lambda wrapped: wrapped.value, args)
        return tree_map_only(Tensor, cls, function(*args, **(kwargs or {})))


def tag(x: Tensor) -> Tensor:
    """Plain, with Python attributes, as some libraries attach."""
    x.source = "camera"
    return x


def saved_and_loaded(x: Tensor) -> Tensor:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    loaded: Tensor = torch.load(buffer)
    return loaded


PLAIN_INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "attributes": tag,
    "Parameter": nn.Parameter,
    "Buffer": nn.Buffer,
    "requires grad": lambda x: x.clone().requires_grad_(),
    "non-leaf": lambda x: x.clone().requires_grad_() * 2,
    "detached": lambda x: x.clone().requires_grad_().detach(),
    "view": lambda x: torch.cat([x, x])[1 : len(x) + 1],
    "flipped": lambda x: x.flip(0),
    "transposed": lambda x: x.transpose(-1, -2),
    "every other": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "unaligned": lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x),
    "from numpy": lambda x: torch.from_numpy(x.numpy().copy()),
    "from numpy, other order": lambda x: torch.from_numpy(x.numpy().copy(order="F")),
    "shared memory": lambda x: x.clone().share_memory_(),
    "loaded": saved_and_loaded,
    "resolved negative": lambda x: torch._neg_view(x).resolve_neg(),
}


@pytest.mark.parametrize("kind", PLAIN_INPUTS)
@each_net
def test_plain_inputs_are_fused(net: str, kind: str) -> None:
    fast, x = fastseq.optimize(NETS[net]()), PLAIN_INPUTS[kind](images())
    kept = x.detach().clone()
    with torch.no_grad():
        # Eager's Holder may change the memory format on the way, which is not the subject here.
        expected = eager(fast, x)
        for _ in range(2):
            actual, counters = call(fast, x)
            assert counters == fused(RUNS[net])
            torch.testing.assert_close(actual, expected)
    assert torch.equal(x.detach(), kept)


UNUSUAL_INPUTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "subclass": (lambda x: x.as_subclass(Sub), "not a plain torch.Tensor"),
    "wrapper subclass": (Wrapped, "not a plain torch.Tensor"),
    "negative bit": (torch._neg_view, "not a plain dense tensor"),
    "conjugate bit": (lambda x: torch.complex(x, x).conj(), "dense"),
    "imaginary part": (lambda x: torch.complex(x, x).conj().imag, "not a plain dense tensor"),
    "zero tensor": (lambda x: torch._efficientzerotensor(x.shape), "not a plain dense tensor"),
    "complex": (lambda x: torch.complex(x, x), "not float32"),
    "double": (Tensor.double, "not float32"),
    "half": (Tensor.half, "a parameter has another dtype than the input"),
    "bfloat16": (Tensor.bfloat16, "a parameter has another dtype than the input"),
    "int64": (Tensor.long, "not float32"),
    "uint8": (lambda x: x.to(torch.uint8), "not float32"),
    "bool": (Tensor.bool, "not float32"),
    "meta": (lambda x: x.to("meta"), "not on the CPU"),
    "sparse": (Tensor.to_sparse, "not a plain dense tensor"),
    "mkldnn": (Tensor.to_mkldnn, "not a plain dense tensor"),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "dense"),
    "nested": (lambda x: torch.nested.nested_tensor([x[0], x[1]]), "not"),
    "jagged": (
        lambda x: torch.nested.nested_tensor([x[0, 0], x[1, 0, :5]], layout=torch.jagged),
        "not a plain torch.Tensor",
    ),
    "list": (Tensor.tolist, "not a plain torch.Tensor"),
    "array": (Tensor.numpy, "not a plain torch.Tensor"),
    "None": (lambda x: None, "not a plain torch.Tensor"),
    "str": (lambda x: "changed", "not a plain torch.Tensor"),
    "tuple": (lambda x: (x,), "not a plain torch.Tensor"),
    "packed": (
        lambda x: nn.utils.rnn.pack_sequence([x[0, 0], x[1, 0]]),
        "not a plain torch.Tensor",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNUSUAL_INPUTS)
@pytest.mark.parametrize("net", ["flat", "linear", "pool"])
def test_unusual_inputs_give_eagers_result_or_error(net: str, kind: str) -> None:
    model = {
        "flat": conv_net,
        "linear": lambda: nn.Sequential(nn.Linear(12, 4), nn.ReLU()),
        "pool": lambda: nn.Sequential(nn.MaxPool2d(2)),
    }[net]()
    make, reason = UNUSUAL_INPUTS[kind]
    fast = fastseq.optimize(model)
    if kind == "meta":
        fast.to("meta")  # eager itself returns uninitialised memory for a meta input and real weights
    x = make(images())
    with torch.no_grad():
        expected = outcome(eager, fast, x)
        fastseq.reset_stats(fast)
        actual = outcome(fast, x)
    assert (actual.error, actual.text) == (expected.error, expected.text)
    if kind == "wrapper subclass":
        actual, expected = (result._replace(value=result.value.value) for result in (actual, expected))
    assert_identical(actual.value, expected.value)
    counters = fastseq.stats(fast)
    if net == "pool" and "parameter" in reason:
        assert counters["fused_calls"] == 1 and not counters["fallbacks"]  # there are none
        return
    assert counters["fused_calls"] == 0
    assert counters["fallbacks"] and all(reason in text for text in counters["fallbacks"])


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
def test_fake_tensors() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    before = assert_fused(fast, x)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            results = [fast(mode.from_tensor(x)), fast(x)]
            # A model made inside has fake parameters.
            made_inside = fastseq.optimize(conv_net())
            results.append(made_inside(torch.empty(2, 3, 12, 12)))
        results.append(fast(mode.from_tensor(x)))
    for result in results:
        assert type(result) is FakeTensor and result.shape == before.shape
    assert torch.equal(assert_fused(fast, x), before)


def test_meta_models_give_shapes() -> None:
    with torch.device("meta"):
        fast = fastseq.optimize(conv_net())
        x = images()
    with torch.no_grad():
        result = assert_eager(fast, x, "not on the CPU")
    assert result.is_meta and result.shape == (2, 10)


def test_a_model_of_float64_is_eager() -> None:
    fast, x = fastseq.optimize(conv_net().double()), images().double()
    with torch.no_grad():
        assert_eager(fast, x, "not float32, float16 or bfloat16")


# Hooks ------------------------------------------------------------------------------------------------------------

HOOKS: dict[str, Callable[[nn.Module, list[str]], Any]] = {
    "forward": lambda m, log: m.register_forward_hook(lambda m, a, out: log.append("forward") or out + 1),
    "forward, silent": lambda m, log: m.register_forward_hook(lambda m, a, out: log.append("forward")),
    "forward with keywords": lambda m, log: m.register_forward_hook(
        lambda m, a, k, out: log.append(f"forward {len(a)} {list(k)}"), with_kwargs=True
    ),
    "forward, always": lambda m, log: m.register_forward_hook(lambda m, a, out: log.append("always"), always_call=True),
    "forward, first": lambda m, log: m.register_forward_hook(lambda m, a, out: log.append("first"), prepend=True),
    "before forward": lambda m, log: m.register_forward_pre_hook(lambda m, a: log.append("before") or (a[0] * 2,)),
    "before forward, silent": lambda m, log: m.register_forward_pre_hook(lambda m, a: log.append("before")),
    "before forward with keywords": lambda m, log: m.register_forward_pre_hook(
        lambda m, a, k: log.append(f"before {len(a)} {list(k)}"), with_kwargs=True
    ),
    "backward": lambda m, log: m.register_full_backward_hook(lambda m, gi, go: log.append("backward")),
    "before backward": lambda m, log: m.register_full_backward_pre_hook(lambda m, go: log.append("before backward")),
    "old backward": lambda m, log: m.register_backward_hook(lambda m, gi, go: log.append("backward")),
}


def places(model: nn.Module) -> dict[str, nn.Module]:
    """Every kind of module that a hook can sit on, of an outer module around `nested_net`."""
    inner = model.net
    return {
        "outer": model,
        "sequential": inner,
        "nested": inner[0],
        "doubly nested": inner[1][1],
        "conv": inner[0][0],
        "relu": inner[0][1],
        "pool": inner[0][2],
        "flatten": inner[1][0],
        "dropout": inner[1][1][0],
        "linear": inner[1][1][1],
        "last relu": inner[2],
    }


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nested_net()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", places(Outer()))
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_fire_as_in_eager(place: str, hook: str) -> None:
    fast, x, log = fastseq.optimize(Outer().eval()), images(), []
    before = assert_fused(fast, x)
    handle = HOOKS[hook](places(fast)[place], log)
    with torch.no_grad():
        expected, expected_log = eager(fast, x), log.copy()
        log.clear()
        actual, counters = call(fast, x)
    torch.testing.assert_close(actual, expected)
    assert log == expected_log and bool(log) != ("backward" in hook)
    if place in ("outer", "sequential"):
        assert counters == fused(), "hooks around a whole run do not disturb it"
    else:
        assert any("hooks" in reason for reason in counters["fallbacks"])
    # With gradients, backward hooks too.
    log.clear()
    eager(fast, x).sum().backward()
    expected_log = log.copy()
    log.clear()
    fast(x).sum().backward()
    assert log == expected_log and log
    handle.remove()
    assert torch.equal(assert_fused(fast, x), before)


def test_hooks_of_layers_that_stay_eager_fire_in_a_fused_model() -> None:
    fast, x, log = fastseq.optimize(split_net()), images(), []
    fast[2].register_forward_hook(lambda m, a, out: log.append(a[0].shape))
    assert_fused(fast, x, runs=2)
    assert log == [(2, 8, 10, 10)] * 2  # once by eager, once by the model


def test_a_hook_hears_of_an_exception() -> None:
    fast, log = fastseq.optimize(conv_net()), []
    fast.register_forward_hook(lambda *_: log.append("always"), always_call=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="expected input"):
        fast(torch.randn(2, 4, 12, 12))
    assert log == ["always"]


def test_a_stored_activation_is_eagers() -> None:
    """A hook keeps the convolution's output, an in-place ReLU writes over it."""
    model = conv_net()
    model[1].inplace = True
    fast, x, kept = fastseq.optimize(model), images(), []
    handle = fast[0].register_forward_hook(lambda m, a, out: kept.append(out))
    with torch.no_grad():
        fast(x)
    handle.remove()
    assert (kept[0] >= 0).all() and (kept[0] == 0).any()


GLOBAL_HOOKS: dict[str, Callable[[list[str]], Any]] = {
    "forward": lambda log: nn.modules.module.register_module_forward_hook(
        lambda m, a, out: log.append(type(m).__name__)
    ),
    "forward, always": lambda log: nn.modules.module.register_module_forward_hook(
        lambda m, a, out: log.append(type(m).__name__), always_call=True
    ),
    "before forward": lambda log: nn.modules.module.register_module_forward_pre_hook(
        lambda m, a: log.append(type(m).__name__)
    ),
    "backward": lambda log: nn.modules.module.register_module_full_backward_hook(
        lambda m, gi, go: log.append(type(m).__name__)
    ),
    "before backward": lambda log: nn.modules.module.register_module_full_backward_pre_hook(
        lambda m, go: log.append(type(m).__name__)
    ),
}


def backward(result: Tensor) -> None:
    if result.requires_grad:
        result.sum().backward()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("hook", GLOBAL_HOOKS)
@each_net
def test_hooks_for_all_modules_fire_for_each(net: str, hook: str) -> None:
    fast, x, log = fastseq.optimize(NETS[net]()), images(), []
    before = assert_fused(fast, x, RUNS[net])
    handle = GLOBAL_HOOKS[hook](log)
    try:
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                expected = eager(fast, x)
                backward(expected)
                expected_log = [name.replace("FusedSequential", "Sequential") for name in log]
                log.clear()
                actual, counters = call(fast, x)
                backward(actual)
            assert torch.equal(actual, expected)
            assert [name.replace("FusedSequential", "Sequential") for name in log] == expected_log
            assert bool(log) == (grad or "backward" not in hook)
            log.clear()
            assert counters["fused_calls"] == 0 and "hooks for all modules are registered" in counters["fallbacks"]
    finally:
        handle.remove()
    assert torch.equal(assert_fused(fast, x, RUNS[net]), before)


# Tracers and compilers --------------------------------------------------------------------------------------------


def graph_of(graph_module: torch.fx.GraphModule) -> list[str]:
    return [f"{node.op} {node.target}" for node in graph_module.graph.nodes]


@contextmanager
def both(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """A warm optimised model, and a plain one with the same weights."""
    with torch.no_grad():
        model(images())
    yield model, plain_copy(model)


def tensors_traced(model: nn.Module, x: Tensor) -> list[str]:
    return graph_of(make_fx(model)(x))


def exported(model: nn.Module, x: Tensor, strict: bool) -> list[str]:
    program = torch.export.export(model, (x,), strict=strict)
    assert set(program.state_dict) == set(model.state_dict())
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def jit_traced(model: nn.Module, x: Tensor) -> list[str]:
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(x), eager(model, x))
    assert list(traced.state_dict()) == list(model.state_dict())
    return [node.kind() for node in traced.inlined_graph.nodes()]


def jit_scripted(model: nn.Module, x: Tensor) -> list[str]:
    scripted = torch.jit.script(model)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), eager(model, x))
    assert list(scripted.state_dict()) == list(model.state_dict())
    return [node.kind() for node in scripted.inlined_graph.nodes()]


TRACERS: dict[str, Callable[[nn.Module, Tensor], list[str]]] = {
    "fx.symbolic_trace": lambda model, x: graph_of(torch.fx.symbolic_trace(model)),
    "make_fx": tensors_traced,
    "export": lambda model, x: exported(model, x, strict=False),
    "export strict": lambda model, x: exported(model, x, strict=True),
    "jit.trace": jit_traced,
    "jit.script": jit_scripted,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracer", TRACERS)
@each_net
def test_tracers_see_the_plain_layers(net: str, tracer: str) -> None:
    with both(fastseq.optimize(NETS[net]())) as (fast, plain):
        x = images()
        structure = repr(fast)
        ours, theirs = TRACERS[tracer](fast, x), TRACERS[tracer](plain, x)
        assert ours == theirs and len(ours) > 3
        assert repr(fast) == structure
        assert_fused(fast, x, RUNS[net])


class CountingBackend:
    """A torch.compile backend that runs the graphs as they are and keeps what they call."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []

    def __call__(self, graph_module: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.graphs.append([str(n.target) for n in graph_module.graph.nodes if n.op.startswith("call")])
        return graph_module.forward


@pytest.mark.parametrize("net", ["flat", "holder"])
def test_compile_sees_one_graph_of_plain_layers(net: str) -> None:
    torch._dynamo.reset()
    with both(fastseq.optimize(NETS[net]())) as (fast, plain), torch.no_grad():
        x = images()
        graphs = []
        for model in (fast, plain):
            backend = CountingBackend()
            torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), eager(model, x))
            graphs.append(backend.graphs)
        assert graphs[0] == graphs[1] and len(graphs[0]) == 1
        assert_fused(fast, x, RUNS[net])


@pytest.mark.parametrize("place", ["model", "nested", "layer"])
def test_module_compile(place: str) -> None:
    torch._dynamo.reset()
    fast, x, backend = fastseq.optimize(nested_net()), images(), CountingBackend()
    before = assert_fused(fast, x)
    {"model": fast, "nested": fast[0], "layer": fast[0][0]}[place].compile(backend=backend)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), before)
    # torch itself compiles no frame of a layer of torch.nn that is called by itself.
    assert len(backend.graphs) == (place != "layer"), "the user's compiler is used"


# Mixed ------------------------------------------------------------------------------------------------------------


def test_conditions_are_looked_at_in_every_call() -> None:
    """Warm, and then each condition in turn, fused again in between."""
    fast, x = fastseq.optimize(Holder().eval()), images()
    before = assert_fused(fast, x)
    for disturb in (
        lambda: assert_eager(fast, x, "gradients"),
        lambda: torch.vmap(fast)(x[None]),
        lambda: first(fast, nn.Linear).double(),
        lambda: fast.float(),
        lambda: outcome(fast, x.double()),
        lambda: outcome(fast, None),
        lambda: torch.fx.symbolic_trace(fast),
    ):
        disturb()
        fast.float()
        assert torch.equal(assert_fused(fast, x), before)
