"""FusedSequential as a container and as a callable: edits, ways of calling it, aliasing, side effects, lifetime."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin import (
    NETS,
    RUNS,
    as_plain,
    assert_fused,
    assert_identical,
    assert_same_outcome,
    call,
    conv_net,
    eager,
    fused,
    images,
    nested_net,
    one_thread,  # noqa: F401
    outcome,
    split_net,
)
from torch import Tensor, nn

import fastseq
from fastseq import FusedSequential

# Ways of calling it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["flat", "nested", "split"])
@pytest.mark.parametrize(
    "way",
    [
        lambda model, x: model(x),
        lambda model, x: model(input=x),
        lambda model, x: model.forward(x),
        lambda model, x: model.forward(input=x),
        lambda model, x: model.__call__(x),
        lambda model, x: FusedSequential.forward(model, x),
        lambda model, x: nn.Module.__call__(model, x),
    ],
    ids=["call", "keyword", "forward", "forward keyword", "__call__", "unbound forward", "Module.__call__"],
)
def test_every_way_of_calling_is_fused(net: str, way: Callable[[nn.Module, Tensor], Tensor]) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images()
    with torch.no_grad():
        expected = eager(fast, x)
        for _ in range(2):
            actual, counters = call(fast, x) if way is None else (way(fast, x), fastseq.stats(fast))
            fastseq.reset_stats(fast)
            torch.testing.assert_close(actual, expected)
            assert counters == fused(RUNS[net])


def test_plain_sequentials_forward_on_it_is_eager() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    with torch.no_grad():
        assert torch.equal(nn.Sequential.forward(fast, x), eager(fast, x))
    assert fastseq.stats(fast) == fused(0)


ARGUMENTS: dict[str, Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "none": lambda x: ((), {}),
    "two": lambda x: ((x, x), {}),
    "three": lambda x: ((x, x, x), {}),
    "wrong keyword": lambda x: ((), {"x": x}),
    "extra keyword": lambda x: ((x,), {"scale": 2}),
    "twice": lambda x: ((x,), {"input": x}),
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("method", ["__call__", "forward"])
def test_wrong_arguments_raise_eagers_words(arguments: str, method: str) -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    args, kwargs = ARGUMENTS[arguments](x)
    with torch.no_grad():
        fast(x)
        with as_plain(fast):
            expected = outcome(getattr(fast, method), *args, **kwargs)
        actual = outcome(getattr(fast, method), *args, **kwargs)
    assert expected.error is TypeError
    assert (actual.error, actual.text) == (expected.error, expected.text)


def test_constructed_directly_it_is_a_sequential() -> None:
    layers = [nn.Linear(6, 6), nn.ReLU()]
    fast = FusedSequential(*layers)
    assert list(fast) == layers and isinstance(fast, nn.Sequential)
    assert_fused(fast, torch.randn(2, 6))
    empty, thing = FusedSequential(), object()
    assert empty(thing) is thing


# Edits ------------------------------------------------------------------------------------------------------------


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU()).eval()


def delete(model: nn.Sequential, index: Any) -> None:
    del model[index]


def assign(model: nn.Sequential, index: int, layer: nn.Module) -> None:
    model[index] = layer


EDITS: dict[str, tuple[Callable[[nn.Sequential], Any], int]] = {
    "append": (lambda m: m.append(nn.Linear(6, 3)), 1),
    "append eager": (lambda m: m.append(nn.Softsign()), 1),
    "insert": (lambda m: m.insert(2, nn.Softsign()), 2),
    "insert first": (lambda m: m.insert(0, nn.Tanhshrink()), 1),
    "extend": (lambda m: m.extend(block()), 1),
    "pop": (lambda m: m.pop(1), 1),
    "delete": (lambda m: delete(m, 1), 1),
    "delete slice": (lambda m: delete(m, slice(0, 2)), 1),
    "replace": (lambda m: assign(m, 0, nn.Linear(6, 6)), 1),
    "replace by a wider one": (lambda m: (assign(m, 0, nn.Linear(6, 9)), assign(m, 2, nn.Linear(9, 6))), 1),
    "replace by Identity": (lambda m: assign(m, 1, nn.Identity()), 1),
    "replace by eager": (lambda m: assign(m, 1, nn.Softsign()), 2),
    "setattr": (lambda m: setattr(m, "2", nn.Linear(6, 2)), 1),
    "add_module": (lambda m: m.add_module("extra", nn.Linear(6, 2)), 1),
    "+=": (lambda m: m.__iadd__(block()), 1),
    "*=": (lambda m: m.__imul__(2), 1),
    "swap order": (lambda m: m._modules.update({"0": m[2], "2": m[0]}), 1),
    "move to the end": (lambda m: m._modules.__setitem__("again", m._modules.pop("0")), 1),
    "delete all": (lambda m: delete(m, slice(None)), 0),
    "nest": (lambda m: assign(m, 1, nn.Sequential(nn.ReLU(), nn.Identity())), 1),
    "set_submodule": (lambda m: m.set_submodule("0", nn.Linear(6, 6)), 1),
}


def wide_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU()).eval()


@pytest.mark.parametrize("edit", EDITS)
def test_edits_count_at_the_next_call(edit: str) -> None:
    change, runs = EDITS[edit]
    fast, plain, x = fastseq.optimize(wide_net()), wide_net(), torch.randn(3, 6)
    assert_fused(fast, x)
    for model in (fast, plain):
        torch.manual_seed(1)
        change(model)
        model.eval()
    assert list(fast._modules) == list(plain._modules)
    assert_fused(fast, x, runs)
    assert_fused(fast, x, runs)


@pytest.mark.parametrize("edit", EDITS)
def test_edits_inside_a_nested_sequential_count_at_the_next_call(edit: str) -> None:
    change, runs = EDITS[edit]
    fast, x = fastseq.optimize(nn.Sequential(wide_net(), nn.Sequential(nn.Identity()))), torch.randn(3, 6)
    assert_fused(fast, x)
    change(fast[0])
    fast.eval()
    assert_fused(fast, x, runs)
    assert_fused(fast, x, runs)
    assert_fused(fast[0], x, runs)


def test_sums_and_products_of_sequentials() -> None:
    fast, x = fastseq.optimize(block()), torch.randn(2, 6)
    with torch.no_grad():
        for combined in (fast + block(), block() + fast, fast * 2, 2 * fast):
            assert type(combined) in (nn.Sequential, FusedSequential) and len(combined) == 4
            torch.testing.assert_close(combined(x), nn.Sequential(*combined)(x))


def test_replaced_layers_are_let_go() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    assert_fused(fast, x)
    old = weakref.ref(fast[0])
    fast[0] = nn.Conv2d(3, 8, 3)
    assert_fused(fast, x)
    gc.collect()
    assert old() is None


# Effects ----------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Returns `value` (or its input) and counts the calls."""

    def __init__(self, value: Any = ...) -> None:
        super().__init__()
        self.value, self.calls = value, 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return x if self.value is ... else self.value


@pytest.mark.parametrize("value", [None, "text", "changed", "a layer has hooks", "", 0, False, (), NotImplemented])
@pytest.mark.parametrize("way", [lambda m, x: m(x), lambda m, x: m.forward(x), lambda m, x: m(input=x)])
def test_a_layer_runs_once_whatever_it_returns(value: Any, way: Callable[[nn.Module, Tensor], Any]) -> None:
    fast = fastseq.optimize(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Counting(value)))
    with torch.no_grad():
        for calls in (1, 2):
            assert way(fast, torch.randn(2, 6)) is value
            assert fast[2].calls == calls
    assert fastseq.stats(fast) == fused(2)


@pytest.mark.parametrize("value", [None, "text", (), 3])
def test_what_is_no_tensor_reaches_the_next_layer(value: Any) -> None:
    fast = fastseq.optimize(nn.Sequential(Counting(value), nn.Linear(6, 6), nn.ReLU()))
    with torch.no_grad():
        assert assert_same_outcome(fast, torch.randn(2, 6)).error is TypeError


def test_an_eager_layer_that_raises_ran_once() -> None:
    class Broken(Counting):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise KeyError("broken on purpose")

    fast = fastseq.optimize(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Broken(), nn.Linear(6, 6)))
    with torch.no_grad(), pytest.raises(KeyError, match="broken on purpose"):
        fast(torch.randn(2, 6))
    assert fast[2].calls == 1


def test_statistics_of_a_training_batch_norm_move_once() -> None:
    fast, x = fastseq.optimize(split_net()), images(4)
    fast[2].train()
    with torch.no_grad():
        expected = eager(fastseq.optimize(fast), x)
        for _ in range(3):
            actual, counters = call(fast, x)
            torch.testing.assert_close(actual, expected)
            assert counters == fused(2)
    assert fast[2].num_batches_tracked == 3


class Acting(nn.Module):
    """Returns its input, and does something to the model it is in on the way."""

    def __init__(self, act: Callable[[nn.Sequential], Any]) -> None:
        super().__init__()
        self.act, self.owner = act, []

    def forward(self, x: Tensor) -> Tensor:
        self.act(*self.owner)
        return x


ACTS: dict[str, Callable[[nn.Sequential], Any]] = {
    "weight in place": lambda m: m[2].weight.data.mul_(2),
    "new weight": lambda m: setattr(m[2], "weight", nn.Parameter(m[2].weight * 2)),
    "no bias": lambda m: setattr(m[2], "bias", None),
    "hook": lambda m: m[2].register_forward_hook(lambda module, args, output: output + 1),
    "forward": lambda m: setattr(m[3], "forward", torch.sigmoid),
    "training": lambda m: m.train(),
    "earlier child replaced": lambda m: assign(m, 0, nn.Linear(6, 6)),
}


@pytest.mark.parametrize("act", ACTS)
def test_an_eager_layer_may_change_what_comes_after_it(act: str) -> None:
    fast = fastseq.optimize(nn.Sequential(nn.Linear(6, 6), Acting(ACTS[act]), nn.Linear(6, 6), nn.ReLU()).eval())
    plain, x = nn.Sequential(*(fastseq.optimize(layer) for layer in fast)), torch.randn(2, 6)
    for model in (fast, plain):
        model[1].owner.append(model)
    with torch.no_grad():
        for _ in range(3):
            results = []
            for model in (fast, plain):
                torch.manual_seed(1)
                results.append(model(x))
            torch.testing.assert_close(*results)


IN_PLACE: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "relu first": (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6)), (2, 6)),
    "behind free layers": (lambda: nn.Sequential(nn.Identity(), nn.Dropout(), nn.ReLU(True), nn.Linear(6, 6)), (2, 6)),
    "behind flatten": (lambda: nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(6, 6)), (2, 2, 3)),
    "behind linear": (lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True)), (2, 6)),
    "behind pool": (lambda: nn.Sequential(nn.MaxPool2d(2), nn.ReLU(inplace=True)), (2, 2, 4, 4)),
    "behind pool of one": (lambda: nn.Sequential(nn.MaxPool2d(1), nn.ReLU(inplace=True)), (2, 2, 4, 4)),
    "relu last": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Softsign(), nn.ReLU(inplace=True)), (2, 6)),
    "in-place dropout": (lambda: nn.Sequential(nn.Dropout(inplace=True), nn.Linear(6, 6)), (2, 6)),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_the_input_changes_as_in_eager(case: str) -> None:
    make, shape = IN_PLACE[case]
    model = make().eval()
    fast, x = fastseq.optimize(model), torch.randn(shape)
    theirs, ours = x.clone(), x.clone()
    with torch.no_grad():
        expected = model(theirs)
        actual, counters = call(fast, ours)
    assert counters == fused(1)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(ours, theirs) and ours._version == theirs._version
    assert torch.equal(ours, x) == (case not in ("relu first", "behind free layers", "behind flatten"))


def test_results_are_fresh_tensors_of_exact_size() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    with torch.no_grad():
        first, second = fast(x), fast(x)
        kept = first.clone()
        second.zero_()
        assert torch.equal(first, kept) and torch.equal(fast(x), kept)
    for result in (first, second):
        assert result.storage_offset() == 0 and result.is_leaf and result._base is None
        assert result.untyped_storage().nbytes() == result.numel() * result.element_size()
    storages = {t.untyped_storage().data_ptr() for t in (first, second, x, *fast.state_dict().values())}
    assert len(storages) == 3 + len(fast.state_dict())


@pytest.mark.parametrize("layers", [[], [nn.Identity()], [nn.Dropout(0.5)]], ids=["nothing", "identity", "dropout"])
def test_a_part_that_does_nothing_returns_its_argument(layers: list[nn.Module]) -> None:
    model = nn.ModuleList([nn.Sequential(*layers), nn.Sequential(nn.Linear(3, 3), nn.ReLU())]).eval()
    x = torch.randn(2, 3)
    assert fastseq.optimize(model)[0](x) is x


def test_calls_leave_global_state_alone() -> None:
    fast, x = fastseq.optimize(conv_net()), images()

    def state() -> tuple[Any, ...]:
        return (
            torch.get_num_threads(),
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            (torch.tensor(1e-40) * 1).item(),  # the processor flushes no denormals
        )

    before = state()
    assert_fused(fast, x)
    fast(x)
    assert state() == before


def test_the_default_dtype_does_not_matter() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    expected = assert_fused(fast, x)
    torch.set_default_dtype(torch.float64)
    try:
        assert_identical(assert_fused(fastseq.optimize(fast), x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


# Lifetime ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("grad", [False, True], ids=["fused", "eager"])
def test_a_model_that_was_called_is_freed(net: str, grad: bool) -> None:
    fast = fastseq.optimize(NETS[net]())
    with torch.set_grad_enabled(grad):
        fast(images())
    references = [weakref.ref(thing) for thing in (fast, *fast.modules(), *fast.parameters())]
    del fast
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_a_freed_model_leaves_its_parts_usable() -> None:
    fast, x = fastseq.optimize(nested_net()), images()
    assert_fused(fast, x)
    part = fast[0]
    del fast
    gc.collect()
    assert_fused(part, x)


def test_a_layer_that_holds_its_owner_is_freed_too() -> None:
    fast = fastseq.optimize(conv_net())
    fast[0].__dict__["owner"] = fast
    fast[0].__dict__["bound"] = fast.forward
    assert_fused(fast, images())
    reference = weakref.ref(fast)
    del fast
    gc.collect()
    assert reference() is None


# Threads ----------------------------------------------------------------------------------------------------------


def test_grad_mode_is_per_thread() -> None:
    """A worker of a pool does not see its creator's no_grad: it runs eager, and the counters say why."""
    fast, x, results = fastseq.optimize(conv_net()), images(), []
    with torch.no_grad():
        fast(x)
        fastseq.reset_stats(fast)
        thread = threading.Thread(target=lambda: results.append(fast(x)))
        thread.start()
        thread.join()
    assert results[0].requires_grad
    ((reason, count),) = fastseq.stats(fast)["fallbacks"].items()
    assert "gradients are being recorded" in reason and count == 1
