"""optimize(example_input=...): kernels found by timing are those that run, go with the model, and change no results."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fastseq
from fastseq.plan import TIMED, TIMING
from fastseq.program import race
from fastseq.testing import MODELS, assert_matches, relative_error

pytestmark = pytest.mark.skipif(not fastseq.native_available(), reason="needs the native engine")
KEPT, OTHER = "timed: its own choice is the fastest", "timed: faster than its own choice"
CASES = ("seed1", "seed2", "seed3", "lenet5")


def steps(model: nn.Module, x: Any) -> list[dict[str, Any]]:
    data = fastseq.explain(model, x).to_dict()
    return [
        step
        for entry in data["sequentials"] + data["forwards"]
        for segment in entry["segments"]
        if segment["kind"] == "native"
        for step in segment["steps"]
    ]


def timed_of(model: nn.Module) -> dict[str, str]:
    return {key: kernel for module in model.modules() for key, kernel in module.__dict__.get(TIMED, {}).items()}


def conv_net() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Conv2d(5, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 65, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(65 * 3 * 3, 67)).eval()


@pytest.mark.parametrize("name", CASES)
def test_each_layer_is_timed_once_and_the_results_are_right(name: str) -> None:
    case = MODELS[name]
    plain, x = case.build(), case.example(3)
    fast = fastseq.optimize(plain, example_input=x)
    found = steps(fast, x)
    assert found and all(step["note"] in (KEPT, OTHER) for step in found if step["kernel"] and step["flops"])
    timed = timed_of(fast)
    assert len(timed) == sum(bool(step["flops"]) for step in found)
    assert all(key.startswith(f"{fastseq.isa()} ") for key in timed)
    names = {row["name"] for row in fastseq.kernels()}
    assert set(timed.values()) - {""} <= names
    for step in found:
        if step["note"] == OTHER:
            assert step["kernel"] in timed.values() or "_few_" in step["kernel"]
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())
        # Whichever kernels it is: those of Winograd may be among them.
        eager_error = relative_error(plain(x), exact)["rel_rms"]
        assert relative_error(fast(x), exact)["rel_rms"] <= max(4 * eager_error, 1e-6)
    assert not any(TIMING in module.__dict__ for module in fast.modules())


def test_without_an_example_nothing_is_timed() -> None:
    x = torch.randn(2, 5, 14, 14)
    fast = fastseq.optimize(conv_net())
    assert all(step["note"] == "" for step in steps(fast, x)) and not timed_of(fast)


def kernels_of(operation: str) -> list[str]:
    return [row["name"] for row in fastseq.kernels() if row["isa"] == fastseq.isa() and row["op"] == operation]


def test_what_timing_found_is_what_runs() -> None:
    """Each kernel in turn as if it had been the fastest: all layers are as wide as the widest of them."""
    x = torch.randn(2, 5, 14, 14)
    timed = timed_of(fastseq.optimize(conv_net(), example_input=x))
    assert len(timed) == 3
    plain, seen = conv_net(), set[str]()
    for position, part, operation in [
        (0, "conv2d 5x14x14", "conv2d_maxpool2d"),
        (0, "conv2d 5x14x14", "conv2d_winograd"),
        (1, "conv2d 64x7x7", "conv2d"),
        (2, "linear", "linear"),
    ]:
        (key,) = [key for key in timed if part in key]
        ran = set()
        names = kernels_of(operation)
        for name in names:
            fast = fastseq.optimize(plain)
            fast.__dict__[TIMED] = {key: name}
            found = steps(fast, x)
            ran.add(found[position]["kernel"])
            assert found[position]["note"] == OTHER
            assert not any(step["note"] for i, step in enumerate(found) if i != position)
            with torch.no_grad():
                assert_matches(fast(x), plain, x, largest_factor=6)
        assert ran <= set(names)
        seen |= ran
    assert len(seen) > 5  # some tiles would leave a lone vector, and become wider ones


def test_a_kernel_that_is_not_there_is_the_engines_own_choice() -> None:
    x = torch.randn(2, 5, 14, 14)
    timed = timed_of(fastseq.optimize(conv_net(), example_input=x))
    usual = [step["kernel"] for step in steps(fastseq.optimize(conv_net()), x)]
    fast = fastseq.optimize(conv_net())
    fast.__dict__[TIMED] = dict.fromkeys(timed, "conv2d_f32__of_another_release_9x9")
    assert [(step["kernel"], step["note"]) for step in steps(fast, x)] == [(kernel, "") for kernel in usual]


def test_it_goes_with_the_model() -> None:
    x = torch.randn(2, 5, 14, 14)
    fast = fastseq.optimize(conv_net(), example_input=x)
    kernels = [(step["kernel"], step["note"]) for step in steps(fast, x)]
    with torch.no_grad():
        y = fast(x)
        for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert [(step["kernel"], step["note"]) for step in steps(again, x)] == kernels
            assert torch.equal(again(x), y)
        fast.load_state_dict({k: v + 0 for k, v in fast.state_dict().items()})
        fast[0].weight.data.mul_(1.5)
        assert [(step["kernel"], step["note"]) for step in steps(fast, x)] == kernels
    assert list(fast.state_dict()) == list(conv_net().state_dict())
    # Of another size the first layer is another one; behind its pool everything is as before.
    assert [bool(step["note"]) for step in steps(fast, torch.randn(2, 5, 15, 15))] == [False, True, True]
    assert not timed_of(fastseq.optimize(fast))
    assert not timed_of(fastseq.restore(fast))


def test_the_model_is_called_in_eval_mode_and_left_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm2d(5), nn.Dropout(0.5), *conv_net())
    model.train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    x = torch.randn(2, 5, 14, 14)
    torch.set_rng_state(random)
    fast = fastseq.optimize(model, example_input=x)
    assert timed_of(fast) and torch.equal(random, torch.get_rng_state())
    assert [module.training for module in fast.modules()] == modes
    for key, value in fast.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not any(parameter.grad is not None for parameter in fast.parameters())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Sequential(nn.Linear(9, 4), nn.ReLU()), nn.Sequential(nn.Linear(6, 4), nn.ReLU())

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.left(a) + self.right(b)


def test_several_arguments() -> None:
    fast = fastseq.optimize(TwoInputs().eval(), example_input=(torch.randn(2, 9), torch.randn(2, 6)))
    assert len(timed_of(fast)) == 2


def test_a_bad_example_is_eagers_exception_and_leaves_a_model_that_works() -> None:
    plain = conv_net().train()
    x = torch.randn(2, 4, 14, 14)
    with pytest.raises(RuntimeError) as eagers:
        plain(x)
    with pytest.raises(RuntimeError) as ours:
        fastseq.optimize(plain, inplace=True, example_input=x)
    assert str(ours.value) == str(eagers.value)
    assert plain.training and not any(TIMING in module.__dict__ for module in plain.modules())
    good = torch.randn(2, 5, 14, 14)
    with torch.no_grad():
        assert_matches(plain(good), conv_net(), good, largest_factor=6)


@pytest.mark.parametrize("x", [torch.randn(0, 5, 14, 14), torch.randn(2, 5, 14, 14).double(), torch.randn(5, 14, 14)])
def test_examples_that_are_not_run_by_the_engine(x: torch.Tensor) -> None:
    plain = conv_net() if x.dtype == torch.float32 else conv_net().double()
    fast = fastseq.optimize(plain, example_input=x) if x.dim() == 4 else None
    if fast is None:  # Flatten and Linear refuse one image in eager mode too
        with pytest.raises(RuntimeError):
            fastseq.optimize(plain, example_input=x)
        return
    assert not timed_of(fast)
    with torch.no_grad():
        assert fast(x).shape == plain(x).shape


def test_winograd_off_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 64, 30, 30)
    plain = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU()).eval()
    fast = fastseq.optimize(plain, winograd="off", example_input=x)
    assert timed_of(fast) and not any("winograd" in kernel for kernel in timed_of(fast).values())
    assert "winograd" not in steps(fast, x)[0]["kernel"]


def test_a_forced_kernel_leaves_nothing_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_KERNEL", "conv2d_f32")
    x = torch.randn(2, 5, 14, 14)
    fast = fastseq.optimize(conv_net(), example_input=x)
    assert not timed_of(fast) and all(step["note"] == "" for step in steps(fast, x))


def test_channels_last_and_shared_layers() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    plain = nn.Sequential(conv, nn.ReLU(), conv, nn.ReLU()).eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 12, 12).to(memory_format=torch.channels_last)
    fast = fastseq.optimize(plain, example_input=x)
    assert len(timed_of(fast)) == 1  # the same layer on maps of the same size
    with torch.no_grad():
        assert_matches(fast(x), plain, x, largest_factor=6)
        assert fast(x).is_contiguous(memory_format=torch.channels_last)


# Runs that are slower than eager ------------------------------------------------------------------------------------


@pytest.fixture
def eager_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastseq.program.race", lambda native, eager: (native(), eager()) and (2e-3, 1e-3))


REASON = "eager was faster for such an input in the trial of optimize(example_input=...)"


@pytest.mark.usefixtures("eager_wins")
def test_a_run_that_is_slower_than_eager_is_left_to_it_and_explain_says_so() -> None:
    plain, x = conv_net(), torch.randn(2, 5, 14, 14)
    fast = fastseq.optimize(plain, example_input=x)
    with torch.no_grad():
        assert torch.equal(fast(x), plain(x))
        assert fastseq.stats(fast)["fallbacks"] == {REASON: 1}
        report = fastseq.explain(fast, x)
        assert REASON in str(report)
        first, *others = steps(fast, x)
        assert first["note"] == "left to eager for 2x5x14x14: 1000.0 us there, 2000.0 us here"
        assert not any("left to eager" in step["note"] for step in others)
        # Of another batch, size, dtype or memory format nothing is known.
        fastseq.reset_stats(fast)
        for other in (x[:1], torch.randn(2, 5, 15, 15), x.to(memory_format=torch.channels_last)):
            fast(other)
        assert fastseq.stats(fast)["fused_calls"] == 3
    assert fastseq.verify(fast, x).ok


@pytest.mark.usefixtures("eager_wins")
def test_what_is_left_to_eager_goes_with_the_model_until_it_is_optimised_again() -> None:
    plain, x = conv_net(), torch.randn(2, 5, 14, 14)
    fast = fastseq.optimize(plain, example_input=x)
    with torch.no_grad():
        for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            again(x)
            assert fastseq.stats(again)["fallbacks"] == {REASON: 1}
        for fused in (fastseq.optimize(fast), fastseq.optimize(fastseq.restore(copy.deepcopy(fast)))):
            fused(x)
            assert fastseq.stats(fused) == {"fused_calls": 1, "eager_calls": 0, "fallbacks": {}}
        fast[0] = nn.Conv2d(5, 64, 3, padding="same")  # not the layers that were timed
        fast(x)
        assert fastseq.stats(fast)["fused_calls"] == 1


@pytest.mark.usefixtures("eager_wins")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_every_layout_is_known_again(layout: str) -> None:
    x = torch.randn(2, 5, 14, 28)
    x = {"contiguous": x, "channels_last": x.to(memory_format=torch.channels_last), "sliced": x[..., ::2]}[layout]
    plain = nn.Sequential(nn.Conv2d(5, 8, 3), nn.ReLU()).eval()
    fast = fastseq.optimize(plain, example_input=x)
    with torch.no_grad():
        assert torch.equal(fast(x), plain(x))
    assert fastseq.stats(fast)["fallbacks"] == {REASON: 1}


@pytest.mark.usefixtures("eager_wins")
def test_runs_between_eager_layers_are_tried_each_by_itself() -> None:
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.RReLU(), nn.Linear(5, 4), nn.Tanh()).eval()
    x = torch.randn(3, 6)
    fast = fastseq.optimize(plain, example_input=x)
    assert [bool(step["note"].count("left to eager")) for step in steps(fast, x)] == [True, True]
    with torch.no_grad():
        assert torch.equal(fast(x), plain(x))
    assert fastseq.stats(fast)["fallbacks"][REASON] > 1


@pytest.mark.usefixtures("eager_wins")
def test_a_forward_and_the_sequentials_inside_are_tried_in_turn() -> None:
    case = MODELS["seed3"]
    plain, x = case.build(), case.example(2)
    fast = fastseq.optimize(plain, example_input=x)
    with torch.no_grad():
        assert torch.equal(fast(x), plain(x))
    assert fastseq.stats(fast)["fused_calls"] == 0
    assert "left to eager for 2x3x32x32" in str(fastseq.explain(fast, x))


def test_of_two_the_race_tells_the_slower_one() -> None:
    def burn(count: int) -> None:
        sum(range(count))

    quick, slow = race(lambda: burn(100), lambda: burn(100_000))
    assert quick < slow
    slow, quick = race(lambda: burn(100_000), lambda: burn(100))
    assert quick < slow
