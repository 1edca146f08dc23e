"""Training: where gradients are needed, results, gradients and everything that moves are eager's bit for bit, and the
same object then serves fused from the weights it was trained to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from dropin import first, one_thread  # noqa: F401
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastseq
from fastseq.testing import MODELS, assert_matches

# The networks -----------------------------------------------------------------------------------------------------


def regularised() -> nn.Module:
    """Fused layers between those that act in training: batch norm and dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 3),
        nn.BatchNorm2d(7),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(7, 5, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(5, momentum=None),
        nn.Dropout2d(0.3),
        nn.Flatten(),
        nn.Linear(5 * 5 * 5, 11),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(11, 4),
    )


class Straight(nn.Module):
    """A forward that is a straight line through its Sequentials and functional operations."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.more = nn.Sequential(nn.Conv2d(6, 5, 3), nn.ReLU(inplace=True))
        self.head = nn.Sequential(nn.Dropout(0.25), nn.Linear(5 * 3 * 3, 9), nn.ReLU(), nn.Linear(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.flatten(self.more(self.features(x)), 1))
        return y


class Branching(nn.Module):
    """A forward that asks for values, adds a shortcut and uses one Sequential twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Sequential(nn.Linear(6 * 6 * 6, 9), nn.ReLU(), nn.Linear(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.body(self.norm(x))
        if x.mean() > 0.1:
            x = x - self.body(x)
        y: Tensor = self.head(x.flatten(1))
        return y


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: (MODELS[name].build, MODELS[name].input_shape) for name in ("seed1", "seed2", "seed3")},
    "regularised": (regularised, (3, 12, 12)),
    "straight": (Straight, (3, 12, 12)),
    "branching": (Branching, (3, 12, 12)),
}
each_net = pytest.mark.parametrize("net", NETS)
BATCH = 3

OPTIMISERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=2e-3, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
}


# What the tests share ---------------------------------------------------------------------------------------------


def twins(net: str) -> tuple[nn.Module, nn.Module]:
    """An optimised model and the plain one it was made from, in training mode."""
    plain = NETS[net][0]().train()
    return fastseq.optimize(plain), plain


def inputs(net: str, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, *NETS[net][1])


def loss_of(output: Tensor) -> Tensor:
    """The distance from a ramp above zero, where a ReLU at the end stays alive."""
    return (output - torch.linspace(0.5, 2.5, output.numel()).view_as(output)).square().mean()


def assert_same_bits(actual: Any, expected: Any, name: str = "") -> None:
    __tracebackhide__ = True
    if expected is None:
        assert actual is None, name
        return
    assert actual.dtype == expected.dtype and actual.stride() == expected.stride(), name
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}")


def assert_same_state(fast: nn.Module, plain: nn.Module) -> None:
    """Parameters, gradients and buffers are the same bits under the same names."""
    __tracebackhide__ = True
    parameters, buffers = dict(fast.named_parameters()), dict(fast.named_buffers())
    assert list(parameters) == [name for name, _ in plain.named_parameters()]
    assert list(buffers) == [name for name, _ in plain.named_buffers()]
    for name, expected in plain.named_parameters():
        assert_same_bits(parameters[name], expected, name)
        assert_same_bits(parameters[name].grad, expected.grad, f"gradient of {name}")
    for name, expected in plain.named_buffers():
        assert_same_bits(buffers[name], expected, name)


def step(model: nn.Module, x: Tensor, optimiser: torch.optim.Optimizer, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)  # the same dropout for both
    optimiser.zero_grad()
    output: Tensor = model(x)
    loss_of(output).backward()
    optimiser.step()
    return output.detach()


def serve(fast: nn.Module, plain: nn.Module, x: Tensor) -> Tensor:
    """Both in eval mode for one call: `fast` runs fused and gives what `plain` gives."""
    __tracebackhide__ = True
    modes = [(module, module.training) for model in (fast, plain) for module in model.modules()]
    fast.eval(), plain.eval()
    fastseq.reset_stats(fast)
    with torch.no_grad():
        result: Tensor = fast(x)
    counters = fastseq.stats(fast)
    assert counters["fused_calls"] > 0 and not counters["fallbacks"], counters
    assert_matches(result, plain, x)
    for module, mode in modes:
        module.training = mode
    return result


# Training and serving in turns ------------------------------------------------------------------------------------


@each_net
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_training_and_serving_in_turns(net: str, kind: str) -> None:
    fast, plain = twins(net)
    ours, theirs = OPTIMISERS[kind](fast.parameters()), OPTIMISERS[kind](plain.parameters())
    probe = inputs(net, 5)
    served = [serve(fast, plain, probe)]
    for turn in range(3):
        fast.train(), plain.train()
        fastseq.reset_stats(fast)
        for i in range(3):
            x, seed = inputs(net), 10 * turn + i
            assert_same_bits(step(fast, x, ours, seed), step(plain, x, theirs, seed), "result")
            assert_same_state(fast, plain)
        counters = fastseq.stats(fast)
        assert counters["fused_calls"] == 0 and counters["eager_calls"] > 0
        assert any("gradients are being recorded" in reason for reason in counters["fallbacks"])
        served.append(serve(fast, plain, probe))
        assert not torch.equal(served[-1], served[-2]), "the weights moved, and the answer did not"


def test_statistics_of_batch_norm_move_as_in_eager() -> None:
    """Also in the calls that record no gradient, where the convolution in front of it runs fused."""
    fast, plain = twins("regularised")
    for i in range(4):
        x = inputs("regularised")
        with torch.set_grad_enabled(i % 2 == 0):
            torch.manual_seed(i)
            actual = fast(x)
            torch.manual_seed(i)
            expected = plain(x)
        torch.testing.assert_close(actual, expected)
        buffers = dict(fast.named_buffers())
        for name, wanted in plain.named_buffers():
            torch.testing.assert_close(buffers[name], wanted, msg=name)
            if "num_batches_tracked" in name:
                assert int(buffers[name]) == i + 1
        if i == 0:  # so far no call was fused
            assert_same_state(fast, plain)
    assert fastseq.stats(fast)["fused_calls"] > 0
    serve(fast, plain, inputs("regularised"))


def test_the_optimisers_state_goes_from_one_twin_to_the_other() -> None:
    fast, plain = twins("straight")
    ours, theirs = OPTIMISERS["Adam"](fast.parameters()), OPTIMISERS["Adam"](plain.parameters())
    for i in range(2):
        step(fast, inputs("straight"), ours, i)
    plain.load_state_dict(fast.state_dict())
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))  # which it would share
    x = inputs("straight")
    assert_same_bits(step(fast, x, ours, 5), step(plain, x, theirs, 5))
    assert_same_state(fast, plain)
    # And a copy made in the middle of training goes on by itself.
    twin = copy.deepcopy(fast)
    step(fast, x, ours, 6)
    assert not torch.equal(first(twin, nn.Linear).weight, first(fast, nn.Linear).weight)
    serve(twin, plain, x)


# Hooks ------------------------------------------------------------------------------------------------------------


def hook_everything(model: nn.Module, log: list[Any]) -> None:
    """Every kind of hook a training loop may have, each logging its name and the values it sees."""

    def add(*entry: Any) -> None:
        log.append([e.clone() if isinstance(e, Tensor) else e for e in entry])

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, i, name=name: add("before", name, i[0]))
        module.register_forward_hook(lambda m, i, o, name=name: add("after", name, o))
        # A full backward hook makes views of its module's results, which may then not be changed in place.
        if not getattr(module, "inplace", False) and name:
            module.register_full_backward_pre_hook(lambda m, g, name=name: add("before backward", name, g[0]))
            module.register_full_backward_hook(lambda m, i, o, name=name: add("backward", name, i[0], o[0]))
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda g, name=name: add("gradient", name, g))
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: add("accumulated", name, p.grad))


def without_inplace(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


@each_net
def test_hooks_see_what_eagers_see(net: str) -> None:
    fast, plain = twins(net)
    logs: list[list[Any]] = [[], []]
    for model, log in zip((fast, plain), logs, strict=True):
        hook_everything(without_inplace(model), log)
        optimiser = OPTIMISERS["SGD"](model.parameters())
        optimiser.register_step_pre_hook(lambda *_, log=log: log.append(["step"]))
        torch.manual_seed(1)
        x = inputs(net).requires_grad_()  # or full backward hooks of the first layer would warn
        for i in range(2):
            step(model, x, optimiser, i)
    assert len(logs[0]) == len(logs[1]) > 2 * len(list(plain.modules()))
    for ours, theirs in zip(*logs, strict=True):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            if isinstance(b, Tensor):
                assert_same_bits(a, b, str(theirs[:2]))
            else:
                assert a == b
    assert_same_state(fast, plain)


@each_net
def test_hooks_on_intermediate_tensors(net: str) -> None:
    """A hook on a layer's result that changes the gradient on its way, and retain_grad."""
    fast, plain = twins(net)
    seen: list[list[Tensor]] = [[], []]
    results = []
    x = inputs(net)
    for model, kept in zip((fast, plain), seen, strict=True):

        def keep(_: nn.Module, __: Any, output: Tensor, kept: list[Tensor] = kept) -> None:
            output.retain_grad()
            output.register_hook(lambda gradient: 1.5 * gradient)
            kept.append(output)

        first(without_inplace(model), nn.Linear if net == "seed2" else nn.Conv2d).register_forward_hook(keep)
        torch.manual_seed(3)
        results.append(model(x))
        loss_of(results[-1]).backward()
    assert_same_bits(*results)
    (ours,), (theirs,) = seen
    assert theirs.grad is not None
    assert_same_bits(ours.grad, theirs.grad, "retained gradient")
    assert_same_state(fast, plain)


@each_net
def test_autograd_saves_what_it_saves_in_eager(net: str) -> None:
    logs = []
    fast, plain = twins(net)
    x = inputs(net)
    for model in (fast, plain):
        log: list[Tensor] = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, log=log: log.append(t.clone()) or t, lambda t: t):
            loss_of(model(x)).backward()
        logs.append(log)
    assert len(logs[0]) == len(logs[1]) > 0
    for ours, theirs in zip(*logs, strict=True):
        assert_same_bits(ours, theirs)


# What training loops do besides -----------------------------------------------------------------------------------


@each_net
def test_gradients_of_the_input(net: str) -> None:
    """With every weight frozen too, as in an attack or a saliency map: several steps along the sign of the gradient."""
    fast, plain = twins(net)
    for is_frozen in (False, True):
        for model in (fast, plain):
            model.requires_grad_(not is_frozen)
            model.eval()
        ours = inputs(net)
        theirs = ours.clone()
        for _ in range(3):
            gradients = []
            for model, x in ((fast, ours), (plain, theirs)):
                x.requires_grad_()
                gradients += torch.autograd.grad(loss_of(model(x)), x)
            assert_same_bits(*gradients)
            assert gradients[0].abs().sum() > 0
            ours = (ours + 0.1 * gradients[0].sign()).detach()
            theirs = (theirs + 0.1 * gradients[1].sign()).detach()
        serve(fast, plain, ours)


@each_net
def test_gradient_of_a_gradient(net: str) -> None:
    """A penalty on the norm of the input's gradient, as in WGAN-GP."""
    fast, plain = twins(net)
    x = inputs(net)
    for model in (fast, plain):
        torch.manual_seed(0)
        source = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(model(source)), source, create_graph=True)
        ((gradient.norm() - 1).square() + loss_of(gradient)).backward()
    assert sum(parameter.grad is not None for parameter in plain.parameters()) >= 2
    assert_same_state(fast, plain)


@each_net
def test_backward_twice_and_accumulated_gradients(net: str) -> None:
    fast, plain = twins(net)
    batches = [inputs(net), inputs(net, 2)]
    for model in (fast, plain):
        torch.manual_seed(0)
        for x in batches:
            loss = loss_of(model(x))
            loss.backward(retain_graph=True)
            loss.backward()
    assert_same_state(fast, plain)
    for model in (fast, plain):
        model.zero_grad(set_to_none=False)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss = loss_of(model(batches[0]))
            loss.backward(), loss.backward()


@each_net
def test_clipped_gradients(net: str) -> None:
    fast, plain = twins(net)
    ours, theirs = OPTIMISERS["SGD"](fast.parameters()), OPTIMISERS["SGD"](plain.parameters())
    for i in range(3):
        x = inputs(net)
        norms = []
        for model, optimiser in ((fast, ours), (plain, theirs)):
            torch.manual_seed(i)
            optimiser.zero_grad()
            loss_of(model(x)).backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
            nn.utils.clip_grad_value_(model.parameters(), 0.02)
            optimiser.step()
        assert_same_bits(*norms)
        assert norms[0] > 0.1
        assert_same_state(fast, plain)
    serve(fast, plain, inputs(net))


@each_net
def test_bfloat16_autocast(net: str) -> None:
    fast, plain = twins(net)
    ours, theirs = OPTIMISERS["Adam"](fast.parameters()), OPTIMISERS["Adam"](plain.parameters())
    for i in range(2):
        x = inputs(net)
        outputs = []
        for model, optimiser in ((fast, ours), (plain, theirs)):
            torch.manual_seed(i)
            optimiser.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs.append(model(x))
            loss_of(outputs[-1].float()).backward()
            optimiser.step()
        assert outputs[0].dtype == torch.bfloat16
        assert_same_bits(*outputs)
        assert_same_state(fast, plain)
    assert fastseq.stats(fast)["fused_calls"] == 0
    serve(fast, plain, inputs(net))


@each_net
def test_gradient_checkpointing(net: str) -> None:
    """The recomputing kind of today."""
    fast, plain = twins(net)
    x = inputs(net)
    for model in (fast, plain):
        torch.manual_seed(0)
        loss_of(checkpoint(model, x, use_reentrant=False)).backward()
    assert_same_state(fast, plain)
    if isinstance(plain, nn.Sequential):
        for model in (fast, plain):
            torch.manual_seed(0)
            loss_of(checkpoint_sequential(model, 2, x, use_reentrant=False)).backward()
        assert_same_state(fast, plain)
    assert fastseq.stats(fast)["fused_calls"] == 0


@each_net
def test_reentrant_gradient_checkpointing(net: str) -> None:
    """Its first pass is under no_grad, which may run fused: eager's up to rounding; the second pass is eager's own."""
    fast, plain = twins(net)
    x = inputs(net)
    results = []
    for model in (fast, plain):
        torch.manual_seed(0)
        results.append(checkpoint(model, x.clone().requires_grad_(), use_reentrant=True))
        loss_of(results[-1]).backward()
    torch.testing.assert_close(*results)
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name, rtol=1e-4, atol=1e-4)
        assert theirs.grad.abs().sum() > 0 or "bias" in name


FREEZES: dict[str, Callable[[nn.Module], Any]] = {
    "weights, not biases": lambda m: [p.requires_grad_(p.dim() == 1) for p in m.parameters()],
    "the last layer": lambda m: [m_.requires_grad_(False) for m_ in list(m.modules())[-1:]],
    "all but the first": lambda m: [p.requires_grad_(i == 0) for i, p in enumerate(m.parameters())],
}


@each_net
@pytest.mark.parametrize("freeze", FREEZES)
def test_frozen_behind_trained_layers(net: str, freeze: str) -> None:
    """Gradients have to pass through the frozen layers."""
    fast, plain = twins(net)
    optimisers = []
    for model in (fast, plain):
        FREEZES[freeze](model)
        optimisers.append(OPTIMISERS["SGD"]([p for p in model.parameters() if p.requires_grad]))
    for i in range(2):
        x = inputs(net)
        assert_same_bits(step(fast, x, optimisers[0], i), step(plain, x, optimisers[1], i))
        assert_same_state(fast, plain)
    serve(fast, plain, inputs(net))


@pytest.mark.parametrize("net", ["straight", "branching", "seed3"])
def test_a_frozen_stem_may_run_fused(net: str) -> None:
    """Nothing in it records a gradient: its results are eager's up to rounding, and so are gradients behind it."""
    fast, plain = twins(net)
    for model in (fast, plain):
        next(model.children()).requires_grad_(False)
        model.eval()
    x = inputs(net)
    expected, exact = plain(x), copy.deepcopy(plain).double()
    actual = fast(x)
    torch.testing.assert_close(actual, expected)
    for result in (actual, expected, exact(x.double())):
        loss_of(result).backward()
    for (name, ours), theirs, truth in zip(
        fast.named_parameters(), plain.parameters(), exact.parameters(), strict=True
    ):
        assert (ours.grad is None) == (theirs.grad is None) == (not ours.requires_grad)
        if theirs.grad is not None:
            errors = [((g.double() - truth.grad).norm() / truth.grad.norm()).item() for g in (ours.grad, theirs.grad)]
            assert errors[0] <= max(1e-6, 4 * errors[1]), f"{name}: {errors}"
    # Thawed, every bit is eager's again.
    for model in (fast, plain):
        model.requires_grad_(True).train()
        model.zero_grad()
        torch.manual_seed(0)
        loss_of(model(x)).backward()
    assert_same_state(fast, plain)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_layers(norm: str) -> None:
    fast, plain = twins("straight")
    for model in (fast, plain):
        torch.manual_seed(7)
        getattr(parametrizations, norm)(first(model, nn.Conv2d), "weight")
        getattr(parametrizations, norm)(first(model, nn.Linear), "weight")
    ours, theirs = OPTIMISERS["SGD"](fast.parameters()), OPTIMISERS["SGD"](plain.parameters())
    probe = inputs("straight", 5)
    before = serve(fast, plain, probe)
    for i in range(3):
        x = inputs("straight")
        assert_same_bits(step(fast, x, ours, i), step(plain, x, theirs, i))
        assert_same_state(fast, plain)
    trained = serve(fast, plain, probe)
    assert not torch.equal(trained, before)
    for model in (fast, plain):
        model.eval()  # in training mode spectral_norm would move the weight once more
        for kind in (nn.Conv2d, nn.Linear):
            parametrize.remove_parametrizations(first(model, kind), "weight")
    assert_same_state(fast, plain)
    torch.testing.assert_close(serve(fast, plain, probe), trained)


@pytest.mark.parametrize("net", ["regularised", "straight", "seed3"])
def test_averaged_weights_are_served(net: str) -> None:
    """An exponential moving average beside the training: each update counts at its next call."""
    fast, plain = twins(net)
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True) for m in (fast, plain)]
    optimisers = [OPTIMISERS["SGD"](m.parameters()) for m in (fast, plain)]
    probe = inputs(net, 4)
    served: list[Tensor] = []
    for i in range(4):
        x = inputs(net)
        for model, average, optimiser in zip((fast, plain), averages, optimisers, strict=True):
            step(model, x, optimiser, i)
            average.update_parameters(model)
        assert_same_state(*averages)
        served.append(serve(averages[0], averages[1], probe))
        assert i == 0 or not torch.equal(served[i], served[i - 1])
        assert not torch.equal(serve(fast, plain, probe), served[i]) or i == 0
    if net == "regularised":
        data = [inputs(net) for _ in range(3)]
        for average in averages:
            torch.manual_seed(0)
            update_bn(data, average)
        for (name, ours), theirs in zip(averages[0].named_buffers(), averages[1].buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, msg=name)
        serve(averages[0], averages[1], probe)


@each_net
def test_parameters_as_one_vector(net: str) -> None:
    """vector_to_parameters makes every parameter a view of the vector, which the training then moves as a whole."""
    fast, plain = twins(net)
    probe = inputs(net, 4)
    before = serve(fast, plain, probe)
    for i in range(2):
        x = inputs(net)
        for model in (fast, plain):
            model.zero_grad()
            torch.manual_seed(i)
            loss_of(model(x)).backward()
            vector = nn.utils.parameters_to_vector(model.parameters()).detach()
            gradient = nn.utils.parameters_to_vector([p.grad for p in model.parameters()])
            nn.utils.vector_to_parameters(vector - 2e-3 * gradient, model.parameters())
        assert_same_state(fast, plain)
        served = serve(fast, plain, probe)
        assert not torch.equal(served, before)
        before = served


@pytest.mark.parametrize("net", ["seed1", "straight", "regularised"])
def test_functional_training(net: str) -> None:
    """Weights outside of the module, as in meta-learning: an inner step, and the gradient through it."""
    fast, plain = twins(net)
    x = inputs(net)
    gradients = []
    for model in (fast, plain):
        weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

        def loss(values: dict[str, Tensor], model: nn.Module = model) -> Tensor:
            torch.manual_seed(0)
            return loss_of(torch.func.functional_call(model, values, (x,)))

        inner = torch.autograd.grad(loss(weights), list(weights.values()), create_graph=True)
        moved = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), inner, strict=True)}
        gradients.append(torch.autograd.grad(loss(moved), list(weights.values())))
    for ours, theirs in zip(*gradients, strict=True):
        assert_same_bits(ours, theirs)
    serve(fast, plain, x)


def test_the_lbfgs_closure() -> None:
    fast, plain = twins("seed2")
    x, target = inputs("seed2", 8), torch.randn(8, 10)
    for model in (fast, plain):
        optimiser = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)

        def closure(model: nn.Module = model, optimiser: torch.optim.Optimizer = optimiser) -> Tensor:
            optimiser.zero_grad()
            loss = F.mse_loss(model(x), target)
            loss.backward()
            return loss

        for _ in range(2):
            optimiser.step(closure)
    assert_same_state(fast, plain)
    serve(fast, plain, x)
