"""Modules whose own forward is a straight line run as one plan, exactly as long as that is what forward does."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dropin import assert_same_outcome, call, eager, fused, images, one_thread, outcome  # noqa: F401
from torch import Tensor, nn, relu
from torch.nn import functional
from torch.nn.functional import max_pool2d

import fastseq
from fastseq import FusedModule, FusedSequential, module
from fastseq.testing import MODELS, assert_matches


class Base(nn.Module):
    """Layers for `images()`; the subclasses say in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2 = nn.Conv2d(8, 6, 3)
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.layer2 = nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(inplace=True))
        self.norm = nn.BatchNorm2d(8)
        self.instance_norm = nn.InstanceNorm2d(8, affine=True)
        self.dropout = nn.Dropout(0.5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(54, 20)
        self.fc2 = nn.Linear(20, 10)
        self.head = nn.Sequential(nn.Linear(54, 10), nn.ReLU())
        self.width = 54


class Seed3(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(x))
        y: Tensor = self.head(x.view(x.shape[0], -1))
        return y


class ViewOfSize(Base):
    def forward(self, x):
        out = self.layer1(x)
        out = self.layer2(out)
        out = out.view(out.size(0), -1)
        return self.head(out)


class ViewOfBatchTakenFirst(Base):
    def forward(self, x):
        n = x.size()[0]
        return self.head(self.layer2(self.layer1(x)).view(n, -1))


class ViewOfFeatures(Base):
    def forward(self, x):
        return self.head(self.layer2(self.layer1(x)).view(-1, 6 * 3 * 3))


class ReshapeOfAttribute(Base):
    def forward(self, x):
        return self.head(self.layer2(self.layer1(x)).reshape(-1, self.width))


class Functions(Base):
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = torch.relu(self.conv2(x))
        x = torch.flatten(x, 1)
        x = relu(self.fc1(x))
        return self.fc2(x)


class Methods(Base):
    def forward(self, x):
        x = max_pool2d(self.conv1(x).relu(), (2, 2), stride=2)
        x = functional.relu(self.conv2(x), inplace=True)
        x = self.fc1(torch.nn.functional.dropout(x.flatten(1), 0.3, training=self.training)).relu_()
        return self.fc2(self.dropout(x))


class PoolOfLayer(Base):
    def forward(self, x):
        return self.conv2(self.pool(torch.relu_(self.conv1(x))))


class Inner(Base):
    def forward(self, x):
        return self.layer2(self.layer1(x))


class Outer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = Inner()

    def forward(self, x):
        return self.head(torch.flatten(self.trunk(x), start_dim=1))


class Normed(Base):
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv1(x))), 2)
        return self.head(torch.flatten(self.layer2(x), 1))


ONE_RUN: list[type[nn.Module]] = [
    Seed3, ViewOfSize, ViewOfBatchTakenFirst, ViewOfFeatures, ReshapeOfAttribute, Functions, Methods, PoolOfLayer,
    Inner, Outer, Normed,
]  # fmt: skip


class NormBetween(Base):
    def forward(self, x):
        x = F.relu(self.instance_norm(self.conv1(x)))
        x = self.layer2(F.max_pool2d(x, 2))
        return F.log_softmax(self.fc2(F.relu(self.fc1(torch.flatten(x, 1)))) * 2.0, dim=1)


class Twice(Base):
    def forward(self, x):
        x = self.pool(self.pool(F.relu(self.conv1(x))))
        return x.mean((2, 3))


SEVERAL_SEGMENTS: dict[type[nn.Module], int] = {NormBetween: 2, Twice: 1}


def optimized(kind: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    plain = kind().eval()
    return plain, fastseq.optimize(plain)


@pytest.mark.parametrize("kind", ONE_RUN, ids=lambda kind: kind.__name__)
def test_whole_forward_is_one_native_call(kind: type[nn.Module]) -> None:
    plain, fast = optimized(kind)
    for batch in (1, 2, 5):
        x = images(batch)
        with torch.no_grad():
            actual, counters = call(fast, x)
        assert counters == fused(1)
        assert_matches(actual, plain, x)


@pytest.mark.parametrize("kind", SEVERAL_SEGMENTS, ids=lambda kind: kind.__name__)
def test_other_layers_and_functions_run_eager_in_between(kind: type[nn.Module]) -> None:
    plain, fast = optimized(kind)
    x = images()
    with torch.no_grad():
        actual, counters = call(fast, x)
    assert counters == fused(SEVERAL_SEGMENTS[kind])
    assert_matches(actual, plain, x)


@pytest.mark.parametrize("name", ["seed3", "alexnet"])
def test_table_models(name: str) -> None:
    case = MODELS[name]
    fast = fastseq.optimize(case.build())
    assert isinstance(fast, FusedModule) and isinstance(fast, type(case.build()))
    x = case.example(2)
    with torch.no_grad():
        actual, counters = call(fast, x)
    assert counters == fused()
    assert_matches(actual, case.build(), x)


@pytest.mark.parametrize("kind", [*ONE_RUN, *SEVERAL_SEGMENTS], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "make",
    [
        lambda: images().requires_grad_(),
        lambda: images().to(memory_format=torch.channels_last),
        lambda: images()[:, :, ::2],
        lambda: images()[0],
        lambda: images()[:0],
        lambda: torch.randn(2, 3, 12, 40),
        lambda: torch.randn(4, 3, 12, 30),
        lambda: torch.randn(2, 4, 12, 12),
        lambda: images().double(),
        lambda: images().long(),
        lambda: torch.randn(3, 12),
        lambda: "text",
        lambda: None,
    ],
    ids=["grad", "channels_last", "sliced", "unbatched", "empty", "wide", "regrouped", "channels", "double", "long",
         "rank", "str", "None"],
)  # fmt: skip
@pytest.mark.parametrize("grad", [False, True])
def test_every_input_gives_what_eager_gives(kind: type[nn.Module], make: Callable[[], Any], grad: bool) -> None:
    _, fast = optimized(kind)
    with torch.set_grad_enabled(grad):
        assert_same_outcome(fast, make())
        assert_same_outcome(fast, x=make())
        assert_same_outcome(fast)
        assert_same_outcome(fast, make(), 2)


def test_channels_last_weights_and_view() -> None:
    """eager's view raises on a channels_last map: no result where eager has none."""
    _, fast = optimized(Seed3)
    fast.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert assert_same_outcome(fast, images()).error is RuntimeError
        assert assert_same_outcome(fast, images().to(memory_format=torch.channels_last)).error is RuntimeError
    _, fast = optimized(Functions)
    fast.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_same_outcome(fast, images())
        assert call(fast, images())[1] == fused(1)


# What forward does is watched ----------------------------------------------------------------------------------------


def assert_follows(fast: nn.Module, runs: int | None = None) -> None:
    """`fast` gives what its own modules give eager, whatever was done to it."""
    __tracebackhide__ = True
    with torch.no_grad():
        for _ in range(2):
            x = images()
            expected = outcome(eager, fast, x)
            actual, counters = call(fast, x) if expected.error is None else (None, {})
            if expected.error is None:
                torch.testing.assert_close(actual, expected.value, check_stride=True)
            else:
                assert outcome(fast, x)[1:] == expected[1:]
    if runs is not None:
        assert counters["fused_calls"] == runs


def warm(kind: type[nn.Module]) -> nn.Module:
    _, fast = optimized(kind)
    with torch.no_grad():
        fast(images())
    assert fastseq.stats(fast)["fused_calls"] >= 1
    return fast


def test_replaced_children() -> None:
    fast = warm(Seed3)
    fast.head = nn.Sequential(nn.Linear(54, 7), nn.Tanhshrink())
    assert_follows(fast, 1)
    fast.layer2[1] = nn.Softsign()
    assert_follows(fast, 2)
    fast.layer1 = nn.Conv2d(3, 8, 8)
    fast.layer2 = nn.Identity()
    assert_follows(fast)
    del fast.head
    assert_follows(fast)


def test_a_child_hidden_by_an_attribute() -> None:
    fast = warm(Seed3)
    fast.__dict__["head"] = lambda x: x * 2
    assert_follows(fast)


def test_attributes_that_forward_reads() -> None:
    fast = warm(ReshapeOfAttribute)
    fast.width = 27
    assert_follows(fast)
    fast.width = 54
    assert_follows(fast, 1)
    fast = warm(Methods)
    torch.manual_seed(1)
    fast.train()
    assert "training" not in fast.__dict__ or fast.training
    with torch.no_grad():
        x = images()
        torch.manual_seed(2)
        expected = eager(fast, x)
        torch.manual_seed(2)
        torch.testing.assert_close(fast(x), expected)
    fast.eval()
    assert_follows(fast, 1)


def test_weights_are_live() -> None:
    fast = warm(Seed3)
    with torch.no_grad():
        fast.layer1[0].weight.data.mul_(2)
        fast.head[0].bias.add_(1)
    assert_follows(fast, 1)
    fast.load_state_dict(Seed3().state_dict())
    assert_follows(fast, 1)
    fast.load_state_dict(Seed3().state_dict(), assign=True)
    assert_follows(fast, 1)
    fast.double().float()
    assert_follows(fast, 1)


def test_children_that_swap_their_names() -> None:
    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.b(F.relu(self.a(x)))

    fast = warm(Net)
    a, b = fast.a, fast.b
    del fast.a, fast.b
    fast.b, fast.a = a, b
    assert_follows(fast, 1)
    fast.c = fast._modules.pop("a")
    assert_follows(fast)


def test_changes_of_the_class() -> None:
    class Block(Base):
        def forward(self, x):
            return self.layer1(x)

    def new() -> tuple[type[nn.Module], nn.Module]:
        class Net(Base):
            def __init__(self) -> None:
                super().__init__()
                self.block = Block()

            def forward(self, x):
                return self.layer2(self.block(x))

        return Net, warm(Net)

    def twice(self, *args):
        return 2 * nn.Module.__call__(self, *args)

    Net, fast = new()
    Net.__call__ = twice  # type: ignore[method-assign]
    assert_follows(fast)
    with torch.no_grad():
        x = images()
        torch.testing.assert_close(fast(x), 2 * nn.Module.__call__(fast, x))
    Net, fast = new()
    Block.__call__ = twice  # type: ignore[method-assign]
    assert_follows(fast)
    del Block.__call__
    Net, fast = new()
    Net.block = property(lambda self: self.conv1)  # type: ignore[attr-defined]
    assert_follows(fast)
    Net, fast = new()
    Net.__getattr__ = lambda self, name: nn.Module.__getattr__(self, "layer1" if name == "block" else name)  # type: ignore
    assert_follows(fast)


def test_replaced_methods_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = warm(Methods)
    monkeypatch.setattr(torch.Tensor, "relu", lambda x: x + 1, raising=False)
    assert_follows(fast)
    monkeypatch.undo()
    assert_follows(fast)


def test_a_forward_that_depends_on_what_changes_each_call() -> None:
    """It is traced ever more seldom, and right all the time."""
    fast = warm(ReshapeOfAttribute)
    for i in range(40):
        fast.width = (54, 27)[i % 2]
        with torch.no_grad():
            x = images()
            expected, actual = outcome(eager, fast, x), outcome(fast, x)
        assert expected[1:] == actual[1:]
        if expected.error is None:
            torch.testing.assert_close(actual.value, expected.value)
    fast.width = 54
    with torch.no_grad():
        for _ in range(100):
            fast(images())
    assert_follows(fast, 1)


def test_dropout_in_training_before_a_view_to_an_earlier_batch() -> None:
    """Not all of it can be native, and the view is right only if it is: the forward itself runs until that changes."""

    class Net(Base):
        def forward(self, x):
            n = x.shape[0]
            return self.head(self.layer2(self.dropout(self.layer1(x))).view(n, -1))

    fast = fastseq.optimize(Net().train())
    x = images()
    with torch.no_grad():
        for _ in range(3):
            assert call(fast, x)[1]["fused_calls"] == 3  # each Sequential
        assert "batch size from another value" in str(fastseq.explain(fast))
        fast.eval()
        assert_follows(fast, 1)


def test_sizes_that_nobody_uses_are_read_all_the_same() -> None:
    class Pair(nn.Module):
        def forward(self, x):
            return (x, x)

    class First(nn.Module):
        def forward(self, pair):
            return pair[0]

    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.first = Pair(), First()

        def forward(self, x):
            x = self.pair(x)
            x.shape[0]
            return self.layer1(self.first(x))

    with torch.no_grad():
        assert assert_same_outcome(fastseq.optimize(Net().eval()), images()).error is AttributeError


def test_another_code_object() -> None:
    class Net(Base):
        def forward(self, x):
            return self.layer2(self.layer1(x))

    def other(self, x):
        return self.layer1(x)

    def with_branch(self, x):
        return self.layer1(x) if x.sum() > 0 else self.conv1(x)

    fast = warm(Net)
    code = Net.forward.__code__
    Net.forward.__code__ = other.__code__
    assert_follows(fast, 1)
    Net.forward.__code__ = with_branch.__code__
    assert_follows(fast)
    Net.forward.__code__ = code
    assert_follows(fast, 1)
    Net.forward = other  # type: ignore[method-assign]
    assert_follows(fast, 1)
    fast.forward = lambda x: x + 1
    assert_follows(fast, 0)


def test_a_forward_that_cannot_be_traced_any_more_is_not_traced_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(Base):
        def forward(self, x):
            return self.layer2(self.layer1(x))

    def with_branch(self, x):
        return self.layer1(x) if x.sum() > 0 else self.conv1(x)

    traced: list[nn.Module] = []
    real = module.straight_line
    monkeypatch.setattr(module, "straight_line", lambda m, kinds: (traced.append(m), real(m, kinds))[1])
    fast, code = warm(Net), Net.forward.__code__
    del traced[:]
    Net.forward.__code__ = with_branch.__code__
    x = images()
    with torch.no_grad():
        for _ in range(60):
            fast(x)
        assert 3 < len(traced) < 9
        torch.testing.assert_close(fast(x), eager(fast, x))
        Net.forward.__code__ = code
        for _ in range(32):
            torch.testing.assert_close(fast(x), eager(fast, x))
        assert fastseq.stats(fast)["fused_calls"] >= 32  # of the time before as well
        assert call(fast, x)[1] == fused(1) and len(traced) < 10
    assert not [key for m in copy.deepcopy(fast).modules() for key in m.__dict__ if "fastseq" in key]


def test_fused_classes_end_with_their_modules() -> None:
    class Net(Base):
        def forward(self, x):
            return self.layer2(self.layer1(x))

    fast = fastseq.optimize(Net())
    ended = weakref.ref(type(fast)), weakref.ref(Net)
    del fast, Net
    gc.collect()  # the fused class
    gc.collect()  # then the user's, which that one referred to
    assert ended[0]() is None and ended[1]() is None


def test_patched_functions_and_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = warm(Functions)
    monkeypatch.setattr(F, "relu", torch.tanh)
    assert_follows(fast)
    monkeypatch.undo()
    assert_follows(fast, 1)
    monkeypatch.setitem(Functions.forward.__globals__, "relu", torch.sigmoid)
    assert_follows(fast)
    monkeypatch.setitem(Functions.forward.__globals__, "F", torch)
    assert_follows(fast)
    monkeypatch.undo()
    assert_follows(fast, 1)


@pytest.mark.parametrize("where", ["", "layer1", "layer1.0", "head", "all modules"])
def test_hooks(where: str) -> None:
    fast = warm(Seed3)
    seen: list[str] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(type(module).__name__)
        return output + 1

    if where == "all modules":
        handle: Any = nn.modules.module.register_module_forward_hook(hook)
    else:
        handle = fast.get_submodule(where).register_forward_hook(hook)
    x = images()
    with torch.no_grad():
        expected = eager(fast, x)
        count, seen[:] = len(seen), []
        actual, counters = call(fast, x)
    # A hook on a Sequential as a whole leaves the run inside it as it is.
    expected_runs = {"": 3, "layer1": 3, "layer1.0": 2, "head": 3, "all modules": 0}
    assert len(seen) == count > 0
    torch.testing.assert_close(actual, expected)
    assert counters["fused_calls"] == expected_runs[where]
    handle.remove()
    assert_follows(fast, 1)


def test_training_records_gradients_of_the_forward_itself() -> None:
    plain, fast = optimized(Seed3)
    x = images()
    fast(x).sum().backward()
    plain(x).sum().backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    assert_follows(fast, 1)


# What is no straight line ---------------------------------------------------------------------------------------------


class Branch(Base):
    def forward(self, x):
        x = self.layer1(x)
        if x.shape[0] > 1:
            x = self.layer2(x)
        return x


class BranchOnFlag(Base):
    def forward(self, x):
        return self.layer2(self.layer1(x)) if self.width else self.layer1(x)


class Loop(Base):
    def forward(self, x):
        for layer in (self.layer1, self.layer2):
            x = layer(x)
        return x


class Residual(Base):
    def forward(self, x):
        y = self.layer1(x)
        return y + y


class Counts(Base):
    def forward(self, x):
        self.width = self.width + 1
        return self.layer1(x)


class Prints(Base):
    def forward(self, x):
        print("called")
        return self.layer1(x)


class Seeds(Base):
    def forward(self, x):
        torch.manual_seed(0)
        return self.layer1(x)


class AddsNoise(Base):
    def forward(self, x):
        return self.layer1(x + torch.rand(1))


class AddsInPlace(Base):
    def forward(self, x):
        x += 1
        return self.layer1(x)


class ReadsParameter(Base):
    def forward(self, x):
        return F.linear(self.layer2(self.layer1(x)).flatten(1), self.fc1.weight)


class CallsMethod(Base):
    def features(self, x):
        return self.layer1(x)

    def forward(self, x):
        return self.layer2(self.features(x))


class TwoInputs(Base):
    def forward(self, x, scale=1.0):
        return self.layer1(x) * scale


class Tuple(Base):
    def forward(self, x):
        y = self.layer1(x)
        return y, self.layer2(y)


class Super(Inner):
    def forward(self, x):
        return super().forward(x)


class OwnCall(Base):
    def __call__(self, x):
        return super().__call__(x) * 2

    def forward(self, x):
        return self.layer1(x)


class LooksUp(Base):
    def __getattr__(self, name):
        return super().__getattr__("layer2" if name == "head" else name)

    def forward(self, x):
        return self.head(self.layer1(x))


class Tries(Base):
    def forward(self, x):
        try:
            return self.layer1(x)
        except RuntimeError:
            return x


class WithBlock(Base):
    def forward(self, x):
        with torch.no_grad():
            return self.layer1(x)


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x):
        return self.layer1(x)


LIMIT = 3
LAYERS = [1.0]


class ReadsList(Base):
    def forward(self, x):
        return self.layer1(x * LAYERS[0])


OTHERS: list[type[nn.Module]] = [
    Branch, BranchOnFlag, Loop, Residual, Counts, Prints, Seeds, AddsNoise, AddsInPlace, ReadsParameter, CallsMethod,
    TwoInputs, Tuple, Super, OwnCall, LooksUp, Tries, WithBlock, Decorated, ReadsList,
]  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_no_straight_line_keeps_its_forward(kind: type[nn.Module], capsys: pytest.CaptureFixture[str]) -> None:
    plain, fast = optimized(kind)
    assert type(fast) is kind
    assert type(fast.layer1) is FusedSequential
    assert not capsys.readouterr().out  # nothing of it ran
    with torch.no_grad():
        for _ in range(2):
            x = images()
            torch.manual_seed(3)
            expected = plain(x.clone())
            torch.manual_seed(3)
            torch.testing.assert_close(fast(x.clone()), expected, check_stride=True)
    assert capsys.readouterr().out == ("called\n" * 4 if kind is Prints else "")
    (entry,) = fastseq.explain(fast).to_dict()["forwards"]
    assert not entry["fused"] and "each Sequential in it by itself: its" in entry["note"], entry
    assert entry["note"] in str(fastseq.explain(fast))


def test_tracing_leaves_other_threads_alone() -> None:
    """torch.fx patches nn.Module while it traces; here nothing is patched and no layer runs."""
    called: list[str] = []

    class Sees(nn.Module):
        def forward(self, x):
            called.append("forward")
            return x

    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.sees = Sees()

        def forward(self, x):
            return self.layer1(self.sees(x))

    before = (nn.Module.__call__, nn.Module.__getattr__)
    fast = fastseq.optimize(Net().eval())
    assert not called and (nn.Module.__call__, nn.Module.__getattr__) == before
    with torch.no_grad():
        fast(images())
    assert called == ["forward"]


# The class -----------------------------------------------------------------------------------------------------------


def test_class_is_the_users_with_its_name() -> None:
    plain, fast = optimized(Seed3)
    assert isinstance(fast, Seed3) and isinstance(fast, FusedModule) and type(fast) is not Seed3
    assert type(fast) is type(fastseq.optimize(Seed3()))
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(fast), name) == getattr(Seed3, name)
    assert repr(fast).replace("FusedSequential", "Sequential") == repr(plain)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in plain.named_modules()]


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "copy", "optimize"])
@pytest.mark.parametrize("state", ["cold", "warm"])
def test_copies(way: str, state: str) -> None:
    fast = warm(Seed3) if state == "warm" else optimized(Seed3)[1]
    copied = {
        "pickle": lambda: pickle.loads(pickle.dumps(fast)),
        "deepcopy": lambda: copy.deepcopy(fast),
        "copy": lambda: copy.copy(fast),
        "optimize": lambda: fastseq.optimize(fast),
    }[way]()
    assert type(copied) is type(fast) and copied is not fast
    assert_follows(copied, 1)
    if way != "copy":
        with torch.no_grad():
            copied.head[0].bias.add_(1)
    assert_follows(fast, 1)


def test_user_defined_pickling_is_kept() -> None:
    class Odd(Base):
        def __getstate__(self) -> dict[str, Any]:
            return {**self.__dict__, "extra": 7}

        def forward(self, x):
            return self.layer1(x)

    fast = warm(Odd)
    copied = copy.deepcopy(fast)
    assert copied.extra == 7 and isinstance(copied, FusedModule)
    assert_follows(copied, 1)


def test_modules_that_copy_their_dict_by_hand() -> None:
    class ByHand(Base):
        def forward(self, x):
            return self.layer2(self.layer1(x))

        def __deepcopy__(self, memo: Any) -> Any:
            copied = type(self).__new__(type(self))
            memo[id(self)] = copied
            copied.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
            return copied

    class Nested(Base):
        def forward(self, x):
            return self.layer2(self.layer1(x))

        def __getstate__(self) -> Any:
            return {"inner": dict(self.__dict__)}

        def __setstate__(self, state: Any) -> None:
            self.__dict__.update(state["inner"])

    for kind in (ByHand, Nested):
        copied = copy.deepcopy(warm(kind))
        assert isinstance(copied, kind)
        assert_follows(copied, 1)


def test_a_class_derived_from_a_fused_one() -> None:
    """As torch's fully_shard makes them."""
    fast = warm(Seed3)
    fast.__class__ = type("Sharded", (type(fast),), {})
    assert_follows(fast, 1)
    assert_follows(copy.deepcopy(fast), 1)
    assert fastseq.explain(fast, images()).to_dict()["forwards"][0]["fused"]
    assert fastseq.verify(fast, images()).ok and len(fastseq.verify(fast, images()).to_dict()["steps"]) == 3


def test_class_that_cannot_be_extended_keeps_its_forward() -> None:
    subclasses: list[type] = []

    class Registers(Base):
        def __init_subclass__(cls) -> None:
            subclasses.append(cls)

        def forward(self, x):
            return self.layer2(self.layer1(x))

    class Reduces(Base):
        def __reduce__(self) -> Any:
            return (Reduces, ())

        def forward(self, x):
            return self.layer2(self.layer1(x))

    class NewArguments(Base):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return super().__new__(cls)

        def __getnewargs_ex__(self) -> Any:
            return (), {"a": 1}

        def forward(self, x):
            return self.layer2(self.layer1(x))

    for kind in (Registers, Reduces, NewArguments):
        fast = fastseq.optimize(kind().eval())
        assert type(fast) is kind and not subclasses
        assert "its class" in str(fastseq.explain(fast))
        assert_follows(fast, 2)


def test_compiling_many_classes() -> None:
    """torch.compile gives up on a code object after eight recompilations: each class has its own."""

    def compiled(i: int) -> tuple[Any, nn.Module]:
        class Net(Base):
            def forward(self, x):
                return self.layer2(self.layer1(x))

        fast = fastseq.optimize(Net().eval())
        assert isinstance(fast, FusedModule)
        return torch.compile(fast, backend="eager", fullgraph=True), fast

    with torch.no_grad():
        for i in range(10):
            function, fast = compiled(i)
            x = images()
            torch.testing.assert_close(function(x), eager(fast, x))


# explain -------------------------------------------------------------------------------------------------------------


def test_explain_shows_the_one_plan() -> None:
    _, fast = optimized(Seed3)
    data = fastseq.explain(fast, images()).to_dict()
    (entry,) = data["forwards"]
    assert entry["fused"] and entry["note"] == "its forward is a straight line: runs as one plan"
    (segment,) = entry["segments"]
    assert [step["name"] for step in segment["steps"]] == ["conv2d_relu_maxpool2d", "conv2d_relu", "linear_relu"]
    assert [step["layers"] for step in segment["steps"]][2] == ["head.0", "head.1"]
    assert [entry["note"] for entry in data["sequentials"]] == ["runs inside (model)"] * 3


def test_explain_says_why_the_plan_was_not_used() -> None:
    _, fast = optimized(Seed3)
    fast.layer1.register_forward_hook(lambda module, args, output: None)
    report = fastseq.explain(fast, images())
    assert "a layer has hooks" in report.to_dict()["forwards"][0]["note"]
    assert [entry["note"] for entry in report.to_dict()["sequentials"]][1] == ""


def test_explain_of_a_plain_model_says_what_optimize_would_do() -> None:
    (entry,) = fastseq.explain(Seed3()).to_dict()["forwards"]
    assert not entry["fused"] and "optimize would run its forward as one plan" in entry["note"]


def test_stats_count_a_forward_without_sequentials() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return F.relu(self.conv(x))

    fast = fastseq.optimize(Bare())
    fast(images())
    counters = fastseq.stats(fast)
    assert counters["eager_calls"] == 1 and "gradients" in next(iter(counters["fallbacks"]))
