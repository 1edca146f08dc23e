"""Behaviours 48 to 52: weights live or stale, copies, other processes, quantisation."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from behaviour import assert_close_to_eager, assert_declined, assert_eager_outcome, one_thread, plain, reasons  # noqa: F401
from conftest import run_python
from dropin import call, conv_net, eager, first, fused, images, nested_net, split_net
from torch import Tensor, nn

import fastseq
from fastseq import FusedSequential

distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)


def large() -> nn.Sequential:
    """Its first weight is larger than what is compared whole at every call."""
    return nn.Sequential(nn.Linear(150, 200), nn.ReLU(), nn.Linear(200, 5)).eval()


# 48: ways to write a weight -----------------------------------------------------------------------------------------


def other(model: nn.Module) -> dict[str, Tensor]:
    return {name: value * 0.5 + 0.01 for name, value in model.state_dict().items()}


def step(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()


def from_vector(model: nn.Module) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach() * 2, model.parameters())


def through_numpy(model: nn.Module) -> None:
    alias = first(model, nn.Linear).weight.detach().numpy()
    alias *= 2


def through_data(write: Callable[[Tensor], Any]) -> Callable[[nn.Module], None]:
    return lambda model: write(first(model, nn.Linear).weight.data)


# name: (the write; whether the Linear weight stays the same object, at the same address; what its version gains)
WRITES: dict[str, tuple[Callable[[nn.Module], Any], bool, bool, int]] = {
    "load_state_dict": (lambda m: m.load_state_dict(other(m)), True, True, 1),
    "load_state_dict(assign=True)": (lambda m: m.load_state_dict(other(m), assign=True), False, False, 0),
    "vector_to_parameters": (from_vector, True, False, 0),
    "data.copy_": (through_data(lambda data: data.copy_(torch.randn_like(data))), True, True, 0),
    "data.zero_": (through_data(lambda data: data.zero_()), True, True, 0),
    "data.mul_": (through_data(lambda data: data.mul_(-1)), True, True, 0),
    "numpy": (through_numpy, True, True, 0),
    "SGD": (step, True, True, 1),
    "to(float64), to(float32)": (lambda m: through_float64(m), True, False, 0),
}


def through_float64(model: nn.Module) -> None:
    model.to(torch.float64)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    model.to(torch.float32)


@pytest.mark.parametrize("net", ["small", "large"])
@pytest.mark.parametrize("write", WRITES)
def test_48_every_write_counts_at_the_next_call(write: str, net: str) -> None:
    """Address and version counter alone would miss half of these: neither moves, or only one of them."""
    apply, is_same_object, is_same_address, gain = WRITES[write]
    fast, x = (
        (fastseq.optimize(conv_net()), images()) if net == "small" else (fastseq.optimize(large()), torch.randn(3, 150))
    )
    before = assert_close_to_eager(fast, x, runs=1)
    weight = first(fast, nn.Linear).weight
    address, version = weight.data_ptr(), weight._version
    apply(fast)
    after = first(fast, nn.Linear).weight
    assert (after is weight) == is_same_object
    if is_same_object:
        assert after._version - version == gain, "what torch does, which this test is about"
    if is_same_address:
        assert after.data_ptr() == address
    assert not torch.equal(assert_close_to_eager(fast, x, runs=1), before)


def test_48_memory_format_of_the_weights() -> None:
    """`.to(memory_format=...)` gives the parameter other strides; the next result has those of eager."""
    fast, x = fastseq.optimize(conv_net()[:3]), images()
    weight = fast[0].weight
    for order in (torch.channels_last, torch.contiguous_format, torch.channels_last):
        fast.to(memory_format=order)
        assert fast[0].weight is weight and weight.is_contiguous(memory_format=order)
        assert assert_close_to_eager(fast, x, runs=1).is_contiguous(memory_format=order)


def test_48_a_few_elements_of_a_large_weight_behind_autograds_back() -> None:
    """The one gap: what the sample misses is read after `fastseq.refresh`. Through autograd single elements count."""
    fast, x = fastseq.optimize(large()), torch.randn(3, 150)
    assert_close_to_eager(fast, x, runs=1)
    for row in range(0, 200, 37):
        with torch.no_grad():
            fast[0].weight[row, 5] += 1
        assert_close_to_eager(fast, x, runs=1)
        fast[0].weight.data[row, 7] += 1
        fastseq.refresh(fast)
        assert_close_to_eager(fast, x, runs=1)


# 49: weights that are shared, or not what they seem -----------------------------------------------------------------


def test_49_a_parameter_in_two_layers() -> None:
    """Tied weights: a write counts in both layers, and untying in one."""
    fast = fastseq.optimize(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)))
    x = torch.randn(3, 6)
    assert_close_to_eager(fast, x, runs=1)
    fast[2].weight = fast[0].weight
    assert_close_to_eager(fast, x, runs=1)
    with torch.no_grad():
        fast[0].weight.mul_(2)
    tied = assert_close_to_eager(fast, x, runs=1)
    again = fastseq.optimize(fast)
    assert again[2].weight is again[0].weight
    assert torch.equal(assert_close_to_eager(again, x, runs=1), tied)
    fast[2].weight = nn.Parameter(torch.randn(6, 6))
    assert not torch.equal(assert_close_to_eager(fast, x, runs=1), tied)


def test_49_parameters_that_are_views_of_one_storage() -> None:
    """As DDP and FSDP flatten them: a write to the flat tensor counts, and so does another flat tensor."""
    fast, x = fastseq.optimize(conv_net()), images()
    before = assert_close_to_eager(fast, x, runs=1)
    for _ in range(2):
        flat = torch.cat([p.detach().flatten() for p in fast.parameters()] + [torch.zeros(1)]).roll(1)
        at = 1  # unaligned, too
        for parameter in fast.parameters():
            parameter.data = flat[at : at + parameter.numel()].view(parameter.shape)
            at += parameter.numel()
        assert torch.equal(assert_close_to_eager(fast, x, runs=1), before)
        flat.mul_(0.5)
        before = assert_close_to_eager(fast, x, runs=1)


def test_49_requires_grad_toggles() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    before = assert_close_to_eager(fast, x, runs=1)
    for flag in (False, True, False):
        fast.requires_grad_(flag)
        result, counters = call(fast, x)
        assert result.requires_grad == flag and counters["fused_calls"] == (0 if flag else 1)
        torch.testing.assert_close(result.detach(), before)


def test_49_a_layer_of_another_dtype() -> None:
    """Eager rejects the mixture; with a cast between the layers both parts run."""

    class Cast(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.dtype = dtype

        def forward(self, x: Tensor) -> Tensor:
            return x.to(self.dtype)

    layers = [nn.Linear(6, 5), nn.ReLU(), Cast(torch.bfloat16), nn.Linear(5, 4).bfloat16(), nn.ReLU()]
    fast = fastseq.optimize(nn.Sequential(*layers, Cast(torch.float32), nn.Linear(4, 2)))
    x = torch.randn(3, 6)
    with torch.no_grad():
        result, counters = call(fast, x)
        torch.testing.assert_close(result, eager(fast, x))
        assert counters == fused(3)
        del fast[2]
        assert_eager_outcome(copy.deepcopy(fast)[2:], torch.randn(3, 5), "a parameter is not float32, as the input is")


@pytest.mark.filterwarnings("ignore")
def test_49_layers_fused_by_torch_itself() -> None:
    """torch.nn.utils.fusion makes new layers with folded weights: plain ones, and fused like any other."""
    conv, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    norm.running_mean.normal_()  # type: ignore[union-attr]
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    model = nn.Sequential(conv, norm, nn.ReLU()).eval()
    folded = nn.Sequential(nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1]), nn.ReLU()).eval()
    fast, x = fastseq.optimize(folded), images()
    with torch.no_grad():
        torch.testing.assert_close(assert_close_to_eager(fast, x, runs=1), model(x), atol=1e-5, rtol=1e-4)


@distributed
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", ["DDP", "FSDP", "FSDP, original parameters", "fully_shard"])
def test_49_wrapped_for_distributed_training(wrap: str) -> None:
    """One process, gloo: answers, gradients and an optimiser step are those of a plain model wrapped alike."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    dist, cpu = torch.distributed, torch.device("cpu")
    wrappers: dict[str, Callable[[nn.Module], nn.Module]] = {
        "DDP": nn.parallel.DistributedDataParallel,
        "FSDP": lambda m: FullyShardedDataParallel(m, device_id=cpu),
        "FSDP, original parameters": lambda m: FullyShardedDataParallel(m, device_id=cpu, use_orig_params=True),
        "fully_shard": lambda m: fully_shard(m, mesh=init_device_mesh("cpu", (1,))),
    }
    model, x = conv_net(), images()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fast, twin = wrappers[wrap](fastseq.optimize(model)), wrappers[wrap](copy.deepcopy(model))
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (fast, twin)]
        for _ in range(3):
            with torch.no_grad():
                torch.testing.assert_close(fast(x), twin(x))
                torch.testing.assert_close(fast(x), twin(x))
            for net, optimizer in zip((fast, twin), optimizers, strict=True):
                optimizer.zero_grad()
                net(x).square().sum().backward()
                optimizer.step()
        if not wrap.startswith("FSDP"):
            assert fastseq.stats(fast)["fused_calls"] == 6
        else:
            assert "not a plain registered parameter" in reasons(fast)
    finally:
        dist.destroy_process_group()


# 50: copies and files -----------------------------------------------------------------------------------------------


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("net", [conv_net, nested_net, split_net])
@pytest.mark.parametrize("way", COPIES)
def test_50_copies_carry_no_native_handles(way: str, net: Callable[[], nn.Sequential], is_warm: bool) -> None:
    """A copy plans anew at its first call, with weights of its own.

    Where fastseq's binary is absent it runs eager: tests/test_serialization.py starts such a process.
    """
    fast, x, runs = fastseq.optimize(net()), images(), 2 if net is split_net else 1
    if is_warm:
        assert_close_to_eager(fast, x, runs)
    twin = COPIES[way](fast)
    assert [type(m) for m in twin.modules()] == [type(m) for m in fast.modules()]
    assert b"_fastseq" not in pickle.dumps(fast) and b"fastseq._C" not in pickle.dumps(fast)
    before = assert_close_to_eager(twin, x, runs)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.zero_()
    assert torch.equal(assert_close_to_eager(twin, x, runs), before)
    assert not assert_close_to_eager(fast, x, runs).any()


def test_50_weights_only_rejects_whole_modules() -> None:
    for model in (conv_net(), fastseq.optimize(conv_net())):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(buffer)


@pytest.mark.parametrize("net", [conv_net, nested_net, split_net])
def test_50_state_dicts_fit_both_ways(net: Callable[[], nn.Sequential]) -> None:
    """Same keys in the same order, `strict=True` both ways; the metadata too; extra keys raise the same words."""
    model = net()
    fast, x, runs = fastseq.optimize(net()), images(), 2 if net is split_net else 1
    assert list(fast.state_dict()) == list(model.state_dict())
    assert fast.state_dict()._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    fast.load_state_dict(model.state_dict(), strict=True)
    result = assert_close_to_eager(fast, x, runs)
    with torch.no_grad():
        torch.testing.assert_close(result, model(x))
    back = net()
    back.load_state_dict(fast.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(back(x), model(x))
    texts = []
    for target in (fast, model):
        with pytest.raises(RuntimeError) as error:
            target.load_state_dict({"nobody": torch.ones(1)})
        texts.append(str(error.value).replace("FusedSequential", "Sequential"))
    assert texts[0] == texts[1]


# 51: replicas and processes -----------------------------------------------------------------------------------------


def replicated(network: nn.Module, scale: float) -> nn.Module:
    """What DataParallel makes for each device: `__dict__` is copied, parameters become plain tensors."""
    replicas = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])  # type: ignore[index]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * scale)
    return replicas[network]


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("net", [conv_net, nested_net, split_net])
def test_51_a_replica_has_its_own_weights(net: Callable[[], nn.Sequential], is_warm: bool) -> None:
    """Nothing that was planned for the original is used for the copy of its `__dict__`, and the other way round."""
    fast, x, runs = fastseq.optimize(net()), images(), 2 if net is split_net else 1
    before = assert_close_to_eager(fast, x, runs) if is_warm else None
    with torch.no_grad():
        for scale in (0.5, -1.0):
            replica = replicated(fast, scale)
            assert type(replica) is FusedSequential and not list(replica.parameters())
            expected = eager(replica, x)
            torch.testing.assert_close(replica(x), expected)
            torch.testing.assert_close(replica(x), expected)
            after = assert_close_to_eager(fast, x, runs)
            assert before is None or torch.equal(after, before)
            assert not torch.allclose(after, expected)


def test_51_shared_memory_and_a_write_through_it() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    before = assert_close_to_eager(fast, x, runs=1)
    fast.share_memory()
    assert torch.equal(assert_close_to_eager(fast, x, runs=1), before)
    torch.from_numpy(first(fast, nn.Linear).weight.detach().numpy()).mul_(2)
    assert not torch.equal(assert_close_to_eager(fast, x, runs=1), before)


FORK = """
import os, signal, sys
import torch
from torch import nn
import fastseq
torch.set_num_threads({threads})
model = fastseq.optimize(nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()))
x = torch.randn(4, 8, 40, 40)
if {warm}:
    with torch.no_grad():
        model(x)
torch.save([model.state_dict(), x], {file!r})
child = os.fork()
if child == 0:
    signal.alarm(60)
    with torch.no_grad():
        y = model(x)
    assert fastseq.stats(model)["fused_calls"] >= 1, fastseq.stats(model)
    torch.save(y, {file!r} + ".result")
    os._exit(0)
status = os.waitpid(child, 0)[1]
sys.exit(0 if status == 0 else 1)
"""


@pytest.mark.parametrize(
    ("threads", "warm"), [(1, False), (1, True), (2, False)], ids=["1 thread", "1 thread, used before", "2 threads"]
)
def test_51_a_forked_child_answers(threads: int, warm: bool, tmp_path: Any) -> None:
    """Importing and optimising start no threads, so that a child forked before the first call has a working pool.

    After the pool was used torch's own does not work in a child, see README; `spawn` is in tests/test_serialization.py.
    """
    file = str(tmp_path / "fork.pt")
    done = run_python("-c", FORK.format(threads=threads, warm=warm, file=file))
    assert done.returncode == 0, done.stderr
    state, x = torch.load(file)
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU())
    model.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(file + ".result"), model(x))


# 52: quantisation, folding ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_52_a_dynamically_quantised_linear_is_no_linear() -> None:
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(12, 6)), {nn.Linear})[0]
    assert not isinstance(quantised, nn.Linear)
    assert_declined(quantised, images(), "no fused kernel for Linear")
    # Of an optimised model: the copy that quantize_dynamic makes has quantised layers, and the rest stays fused.
    fast, x = fastseq.optimize(conv_net()), images()
    assert_close_to_eager(fast, x, runs=1)
    mixed = torch.ao.quantization.quantize_dynamic(fast, {nn.Linear})
    with torch.no_grad():
        result, counters = call(mixed, x)
        torch.testing.assert_close(result, eager(mixed, x), atol=0.05, rtol=0)
    assert counters["fused_calls"] == 1


@pytest.mark.filterwarnings("ignore")
def test_52_torchs_fused_modules_keep_their_own_forward() -> None:
    """`torch.ao.nn.intrinsic.ConvReLU2d` is a subclass of Sequential; fuse_modules puts Identity where ReLU was."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    ready = torch.ao.quantization.fuse_modules(model, [["0", "1"]])
    fast, x = fastseq.optimize(ready), images()
    assert type(fast[0]) is torch.ao.nn.intrinsic.ConvReLU2d and type(fast[1]) is nn.Identity
    assert list(fast.state_dict())[0] == "0.0.weight"
    assert_close_to_eager(fast, x, runs=1)
    torch.testing.assert_close(fast(x), model(x))


def test_52_batch_norm_is_never_folded_into_the_model() -> None:
    """`state_dict` keeps running_mean and the rest, and new statistics count at the next call."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    fast, x = fastseq.optimize(model), images()
    before = assert_close_to_eager(fast, x, runs=1)
    assert list(fast.state_dict()) == list(model.state_dict()) and "1.running_mean" in fast.state_dict()
    fast[1].running_mean.add_(1)
    assert not torch.equal(assert_close_to_eager(fast, x, runs=1), before)
    plain(fast).load_state_dict(fast.state_dict(), strict=True)
