"""Copies, pickles, checkpoints, other processes, replicas: the layers travel, what belongs to this process does not."""

from __future__ import annotations

import copy
import io
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from conftest import run_python
from dropin import (
    NETS,
    RUNS,
    Holder,
    assert_fused,
    assert_identical,
    call,
    conv_net,
    eager,
    fused,
    images,
    nested_net,
    one_thread,  # noqa: F401
    split_net,
)
from torch import Tensor, nn

import fastseq
from fastseq import FusedSequential
from fastseq.testing import assert_matches

each_net = pytest.mark.parametrize("net", NETS)


def through_pickle(protocol: int) -> Callable[[Any], Any]:
    return lambda thing: pickle.loads(pickle.dumps(thing, protocol))


def through_torch_save(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_cloudpickle(thing: Any) -> Any:
    cloudpickle = pytest.importorskip("cloudpickle")
    return cloudpickle.loads(cloudpickle.dumps(thing))


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": through_torch_save,
    "cloudpickle": through_cloudpickle,
    **{f"pickle {protocol}": through_pickle(protocol) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)},
}


@each_net
@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("way", WAYS)
def test_round_trip(net: str, is_warm: bool, way: str) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images()
    if is_warm:
        assert_fused(fast, x, RUNS[net])
    copied = WAYS[way](fast)
    assert copied is not fast and repr(copied) == repr(fast)
    assert not set(map(id, fast.parameters())) & set(map(id, copied.parameters()))
    assert fastseq.stats(copied) == fused(0), "counters belong to the model, not to its copy"
    expected = assert_fused(fast, x, RUNS[net])
    assert torch.equal(assert_fused(copied, x, RUNS[net]), expected)
    # They live apart.
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(assert_fused(copied, x, RUNS[net]), expected)
    assert torch.equal(assert_fused(fast, x, RUNS[net]), expected)


@each_net
def test_no_native_handle_in_the_state(net: str) -> None:
    fast = fastseq.optimize(NETS[net]())
    cold = pickle.dumps(fast)
    assert_fused(fast, images(), RUNS[net])
    warm = pickle.dumps(fast)
    assert len(warm) == len(cold)
    strings = {argument for _, argument, _ in pickletools.genops(warm) if isinstance(argument, str)}
    assert not [text for text in strings if "_C" in text.split(".") and "fastseq" in text or "Program" in text]
    assert {text for text in strings if text.startswith("fastseq")} <= {"fastseq.sequential", "fastseq.module"}
    for module in fast.modules():
        state = module.__reduce_ex__(4)[2]
        assert not [key for key in state if "fastseq" in key]


def test_shallow_copies_share_the_layers() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    assert_fused(fast, x)
    copied = copy.copy(fast)
    assert copied[0] is fast[0] and type(copied) is FusedSequential
    before = assert_fused(copied, x)
    with torch.no_grad():
        fast[0].weight.mul_(2)
    assert not torch.equal(assert_fused(copied, x), before)
    assert_fused(fast, x)


def test_a_copied_dict_is_not_the_owner() -> None:
    """What DataParallel and some frameworks do: a new object with the same __dict__."""
    fast, x = fastseq.optimize(conv_net()), images()
    before = assert_fused(fast, x)
    twin = FusedSequential.__new__(FusedSequential)
    twin.__dict__ = fast.__dict__.copy()
    twin._modules = {name: copy.deepcopy(layer) for name, layer in fast._modules.items()}
    twin[0].weight.data.mul_(2)
    assert not torch.equal(assert_fused(twin, x), before)
    assert torch.equal(assert_fused(fast, x), before)


# Checkpoints ------------------------------------------------------------------------------------------------------


@each_net
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_fit_both_ways(net: str, assign: bool, tmp_path: Path) -> None:
    plain, x = NETS[net](), images()
    fast = fastseq.optimize(NETS[net]())
    assert_fused(fast, x, RUNS[net])
    assert list(fast.state_dict()) == list(plain.state_dict())
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    torch.save(fast.state_dict(), tmp_path / "fast.pt")
    ours, theirs = torch.load(tmp_path / "fast.pt"), torch.load(tmp_path / "plain.pt")
    with torch.no_grad():
        expected_plain, expected_fast = plain(x), eager(fast, x)
        assert str(plain.load_state_dict(ours, assign=assign)) == "<All keys matched successfully>"
        assert str(fast.load_state_dict(theirs, strict=True, assign=assign)) == "<All keys matched successfully>"
        torch.testing.assert_close(plain(x), expected_fast)
    torch.testing.assert_close(assert_fused(fast, x, RUNS[net]), expected_plain)


def test_wrong_state_dicts_raise_as_for_a_sequential() -> None:
    fast = fastseq.optimize(conv_net())
    with pytest.raises(RuntimeError, match="Missing key.*0.weight"):
        fast.load_state_dict({})
    with pytest.raises(RuntimeError, match="size mismatch for 0.weight"):
        fast.load_state_dict({**fast.state_dict(), "0.weight": torch.zeros(1)})
    assert_fused(fast, images())


def test_loading_a_whole_model_needs_weights_only_false(tmp_path: Path) -> None:
    fast = fastseq.optimize(conv_net())
    torch.save(fast, tmp_path / "model.pt")
    with pytest.raises(pickle.UnpicklingError, match="fastseq.sequential.FusedSequential"):
        torch.load(tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    x = images()
    assert torch.equal(assert_fused(loaded, x), assert_fused(fast, x))


def test_a_file_of_an_optimised_model_loads_where_the_extension_is_missing(
    tmp_path_factory: pytest.TempPathFactory, shadow_package: Callable[[str | bytes | None], Path]
) -> None:
    fast, x = fastseq.optimize(nested_net()), images()
    with torch.no_grad():
        expected = eager(fast, x)
        fast(x)
    file = tmp_path_factory.mktemp("saved") / "model.pt"
    torch.save({"model": fast, "x": x, "expected": expected}, file)
    script = """
import sys
import torch, fastseq
saved = torch.load(sys.argv[1], weights_only=False)
model = saved["model"]
with torch.no_grad():
    result = model(saved["x"])
torch.testing.assert_close(result, saved["expected"])
assert not fastseq.native_available() and type(model) is fastseq.FusedSequential
assert fastseq.stats(model)["fused_calls"] == 0
"""
    result = run_python("-c", script, str(file), cwd=shadow_package(None))
    assert result.returncode == 0, result.stderr


def test_a_plain_file_can_be_optimised_after_loading() -> None:
    assert_fused(fastseq.optimize(through_torch_save(conv_net())), images())


# Other processes --------------------------------------------------------------------------------------------------


def run_in_child(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Any], list[str]]:
    torch.set_num_threads(1)
    with torch.no_grad():
        result, counters = call(model, x)
    return result, counters, [type(module).__name__ for module in model.modules()]


def test_spawned_process() -> None:
    fast, x = fastseq.optimize(split_net()), images()
    expected = assert_fused(fast, x, runs=2)
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        result, counters, names = pool.apply(run_in_child, (fast, x))
    assert torch.equal(result, expected) and counters == fused(2)
    assert names == [type(module).__name__ for module in fast.modules()]


def test_shared_memory() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    before = assert_fused(fast, x)
    assert fast.share_memory() is fast and all(parameter.is_shared() for parameter in fast.parameters())
    assert torch.equal(assert_fused(fast, x), before)
    # Another process writes through the same storage: no version counter of this one moves.
    file_backed = fast[0].weight.untyped_storage()
    alias = torch.empty(0).set_(file_backed, 0, fast[0].weight.shape)
    alias.mul_(2)
    assert not torch.equal(assert_fused(fast, x), before)


# Replicas, as torch.nn.parallel.replicate makes them ---------------------------------------------------------------


def replicate(network: nn.Module, scale: float = 1.0) -> nn.Module:
    """torch.nn.parallel.replicate without its devices: parameters become plain tensors, each `scale` times its own."""
    replicas = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter * scale)
        for name, buffer in module._buffers.items():
            setattr(replica, name, buffer.clone())
    return replicas[network]


@each_net
@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_replicas_use_their_own_weights(net: str, is_warm: bool, grad: bool) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images()
    before = assert_fused(fast, x, RUNS[net]) if is_warm else None
    with torch.set_grad_enabled(grad):
        replica = replicate(fast, scale=0.5)
        expected = eager(replica, x)
        for _ in range(2):
            torch.testing.assert_close(replica(x), expected)
            torch.testing.assert_close(fast(x), eager(fast, x))
        assert replica(x).requires_grad == grad
    if grad:
        replica(x).sum().backward()
        assert all(parameter.grad is not None for parameter in fast.parameters())
    after = assert_fused(fast, x, RUNS[net])
    assert before is None or torch.equal(after, before)
    assert not torch.allclose(after, expected)


def test_replicas_of_one_model_do_not_disturb_each_other() -> None:
    fast, x = fastseq.optimize(Holder().eval()), images()
    with torch.no_grad():
        replicas = [replicate(fast, scale) for scale in (0.5, 2.0, -1.0)]
        expected = [eager(replica, x) for replica in replicas]
        for _ in range(3):
            for replica, result in zip(replicas, expected, strict=True):
                torch.testing.assert_close(replica(x), result)
            assert_fused(fast, x)


def test_data_parallel_and_distributed_wrappers_keep_the_model() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    wrapped = nn.DataParallel(fast)
    with torch.no_grad():
        result, counters = call(wrapped, x)
    assert counters == fused() and list(wrapped.state_dict()) == [f"module.{key}" for key in fast.state_dict()]
    assert torch.equal(result, assert_fused(fast, x))


def test_averaged_model() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(fastseq.optimize(conv_net())).eval()
    assert type(averaged.module) is FusedSequential
    x = images()
    with torch.no_grad():
        result, counters = call(averaged, x)
        torch.testing.assert_close(result, eager(averaged, x))
    assert counters == fused()


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation() -> None:
    """quantize_dynamic copies the model and replaces the Linears by modules of its own."""
    fast, x = fastseq.optimize(conv_net()), images()
    assert_fused(fast, x)
    quantised = torch.ao.quantization.quantize_dynamic(fast, {nn.Linear})
    assert type(quantised[5]) is not nn.Linear
    with torch.no_grad():
        result, counters = call(quantised, x)
        torch.testing.assert_close(result, eager(quantised, x), atol=0.05, rtol=0)
    assert counters == fused()
    assert_fused(fast, x)


def test_float_copy_of_a_half_model() -> None:
    fast = fastseq.optimize(conv_net().half())
    with torch.no_grad():
        x = images().half()
        assert_matches(fast(x), fastseq.restore(copy.deepcopy(fast)), x)
    assert_identical(assert_fused(copy.deepcopy(fast).float(), images() * 0), assert_fused(fast.float(), images() * 0))
