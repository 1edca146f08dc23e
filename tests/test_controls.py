"""optimize(exclude, inplace), disabled, restore: what they switch off is off, and nothing else."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from dropin import NETS, RUNS, assert_fused, call, conv_net, eager, fused, images, nested_net, one_thread  # noqa: F401
from torch import nn

import fastseq
from fastseq import FusedModule, FusedSequential
from fastseq.testing import MODELS

each_net = pytest.mark.parametrize("net", NETS)


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


# exclude -------------------------------------------------------------------------------------------------------------


def eager_layers(model: nn.Module) -> dict[str, str]:
    """What explain says of excluded layers and Sequentials, by path."""
    data = fastseq.explain(model).to_dict()
    found = {e["path"]: e["note"] for e in data["sequentials"] if "excluded" in e["note"]}
    for entry in data["sequentials"] + data["forwards"]:
        for segment in entry["segments"]:
            if segment["kind"] == "eager" and "excluded" in segment["reason"]:
                found[".".join(filter(None, [entry["path"], segment["layer"]]))] = segment["reason"]
    return found


def test_a_layer_of_a_sequential() -> None:
    plain = conv_net()
    for name, runs in (("0", 1), ("1", 2), ("2", 2), ("3", 2), ("4", 2), ("5", 1)):
        fast = fastseq.optimize(plain, exclude=[name])
        assert len(eager_layers(fast)) == 1, name
        assert_fused(fast, images(), runs)
    assert fastseq.explain(fastseq.optimize(plain)).to_dict()["sequentials"][0]["segments"][0]["kind"] == "native"


def test_subtrees() -> None:
    fast = fastseq.optimize(nested_net(), exclude=["1"])
    assert kinds(fast)[:2] == [FusedSequential, FusedSequential] and type(fast[1]) is type(fast[1][1]) is nn.Sequential
    assert_fused(fast, images(), runs=1)
    assert set(eager_layers(fast)) == {"1", "1.1", "1: Sequential"}
    fast = fastseq.optimize(MODELS["seed3"].build(), exclude=["layer2"])
    assert type(fast.layer1) is FusedSequential and type(fast.layer2) is nn.Sequential
    with torch.no_grad():
        assert call(fast, MODELS["seed3"].example(2))[1] == fused(2)
    fast = fastseq.optimize(MODELS["seed3"].build(), exclude=[""])
    assert kinds(fast) == kinds(MODELS["seed3"].build())


@each_net
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "optimize", "inplace", "add to a Sequential"])
def test_exclusion_goes_with_the_layer(net: str, way: str) -> None:
    plain = NETS[net]()
    name = next(name for name, module in plain.named_modules() if type(module) is nn.Linear)
    fast = fastseq.optimize(plain, exclude={name})
    if way == "add to a Sequential":
        fast = fastseq.optimize(nn.Sequential(nn.Identity(), fast))
        name = f"1.{name}"
    else:
        fast = {
            "deepcopy": copy.deepcopy,
            "pickle": lambda model: pickle.loads(pickle.dumps(model)),
            "optimize": fastseq.optimize,
            "inplace": lambda model: fastseq.optimize(model, inplace=True),
        }[way](fast)
    assert any(name.endswith(path.split(":")[0].split(".")[-1]) for path in eager_layers(fast)), eager_layers(fast)
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(fast(x), eager(fast, x))
    fastseq.restore(fast)
    assert not eager_layers(fastseq.optimize(fast))


def test_excluding_what_was_fused_before() -> None:
    fast = fastseq.optimize(MODELS["seed3"].build())
    x = MODELS["seed3"].example(2)
    with torch.no_grad():
        fast(x)
        again = fastseq.optimize(fast, exclude=["layer1"], inplace=True)
        assert again is fast and type(fast.layer1) is nn.Sequential
        assert call(fast, x)[1] == fused(1)  # view and the rest in one run behind layer1
    assert set(eager_layers(fast)) == {"layer1", "layer1: Sequential"}


def test_bad_names() -> None:
    model = MODELS["seed3"].build()
    with pytest.raises(
        ValueError, match=r"exclude names 'layer4', which is no module of this model; did you mean 'layer"
    ):
        fastseq.optimize(model, exclude=["layer4"])
    with pytest.raises(ValueError, match="see model.named_modules"):
        fastseq.optimize(model, exclude=["quite another"])
    with pytest.raises(TypeError, match=r"got one string; did you mean \['layer1'\]"):
        fastseq.optimize(model, exclude="layer1")
    with pytest.raises(TypeError, match="expects names of modules, got int"):
        fastseq.optimize(model, exclude=[3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="positional"):
        fastseq.optimize(model, ["layer1"])  # type: ignore[misc]


# inplace -------------------------------------------------------------------------------------------------------------


@each_net
def test_inplace(net: str) -> None:
    model = NETS[net]()
    modules, parameters = list(model.modules()), list(model.parameters())
    fast = fastseq.optimize(model, inplace=True)
    assert fast is model
    assert all(a is b for a, b in zip(modules, fast.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, fast.parameters(), strict=True))
    assert_fused(fast, images(), RUNS[net])
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    fast(images()).sum().backward()
    optimizer.step()
    assert_fused(fast, images(), RUNS[net])


def test_a_bad_name_changes_nothing_in_place() -> None:
    model = conv_net()
    with pytest.raises(ValueError):
        fastseq.optimize(model, exclude=["0", "9"], inplace=True)
    assert type(model) is nn.Sequential and "_fastseq_excluded" not in model[0].__dict__


# disabled ------------------------------------------------------------------------------------------------------------


@each_net
@pytest.mark.parametrize("state", ["cold", "warm"])
def test_disabled(net: str, state: str) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images()
    if state == "warm":
        assert_fused(fast, x, RUNS[net])
    with torch.no_grad(), fastseq.disabled():
        actual, counters = call(fast, x)
        assert torch.equal(actual, eager(fast, x))
    assert counters["fused_calls"] == 0
    assert list(counters["fallbacks"]) == ["fastseq.disabled() is active in this thread"]
    assert_fused(fast, x, RUNS[net])


def test_disabled_nests_and_ends_with_an_exception() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    block = fastseq.disabled()
    with torch.no_grad():
        with block:
            with block, fastseq.disabled():
                pass
            assert call(fast, x)[1]["fused_calls"] == 0
        with pytest.raises(KeyError), fastseq.disabled():
            raise KeyError
        assert call(fast, x)[1] == fused(1)


def test_disabled_as_decorator() -> None:
    fast, x = fastseq.optimize(conv_net()), images()

    @fastseq.disabled()
    def plainly() -> Any:
        return call(fast, x)[1]

    with torch.no_grad():
        assert plainly()["fused_calls"] == plainly()["fused_calls"] == 0
        assert call(fast, x)[1] == fused(1)


def test_a_decorated_function_in_two_threads() -> None:
    """One leaves first, inside a block of its own: each has back what it had before."""
    fast, x = fastseq.optimize(conv_net()), images()
    barrier = threading.Barrier(2, timeout=60)
    found: dict[str, list[int]] = {"inside a block": [], "outside": []}
    left = threading.Event()

    @fastseq.disabled()
    def decorated(name: str) -> None:
        barrier.wait()
        if name == "outside":
            assert left.wait(60)

    def fused_calls() -> int:
        with torch.no_grad():
            before = fastseq.stats(fast)["fused_calls"]
            fast(x)
            return int(fastseq.stats(fast)["fused_calls"] - before)

    def first() -> None:
        with fastseq.disabled():
            decorated("inside a block")
            found["inside a block"].append(fused_calls())
        left.set()

    def second() -> None:
        decorated("outside")
        found["outside"].append(fused_calls())

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {"inside a block": [0], "outside": [1]}


def test_disabled_is_of_the_thread() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    counters: list[dict[str, Any]] = []

    def other() -> None:
        with torch.no_grad():
            counters.append(call(fast, x)[1])

    with fastseq.disabled():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert counters == [fused(1)]


# restore -------------------------------------------------------------------------------------------------------------


@each_net
def test_restore(net: str) -> None:
    plain, x = NETS[net](), images()
    fast = fastseq.optimize(plain)
    parameters = list(fast.parameters())
    assert_fused(fast, x, RUNS[net])
    compiled = [
        weakref.ref(m.__dict__["_fastseq_compiled"]) for m in fast.modules() if "_fastseq_compiled" in m.__dict__
    ]
    assert compiled and fastseq.restore(fast) is fast
    gc.collect()
    assert not any(ref() for ref in compiled)  # and with them plans and packed weights
    assert kinds(fast) == kinds(plain)
    assert all(set(a.__dict__) == set(b.__dict__) for a, b in zip(fast.modules(), plain.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, fast.parameters(), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=0, atol=0)
    assert pickle.dumps(fast).find(b"fastseq") == -1
    assert_fused(fastseq.optimize(fast), x, RUNS[net])


def test_restore_of_other_things() -> None:
    model = nn.Linear(2, 2)
    assert fastseq.restore(model) is model
    for wrong in (None, nn.Linear, model.state_dict()):
        with pytest.raises(TypeError, match="fastseq.restore expects a torch.nn.Module"):
            fastseq.restore(wrong)  # type: ignore[type-var]
        with pytest.raises(TypeError, match="fastseq.refresh expects a torch.nn.Module"):
            fastseq.refresh(wrong)  # type: ignore[arg-type]


def test_restore_of_a_part() -> None:
    fast = fastseq.optimize(MODELS["seed3"].build())
    x = MODELS["seed3"].example(2)
    with torch.no_grad():
        assert call(fast, x)[1] == fused(1)
        fastseq.restore(fast.layer2)
        assert type(fast.layer2) is nn.Sequential and isinstance(fast, FusedModule)
        torch.testing.assert_close(fast(x), eager(fast, x))
