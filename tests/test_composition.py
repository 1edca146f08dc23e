"""Optimised models together with the rest of torch: compilers, exporters, wrappers, quantisation, registered operators.

What a call sees of transforms, modes, tracers, FakeTensors and hooks is in test_gate.py; copies, pickles, spawned
processes and replicas are in test_serialization.py; pruning, norms, parametrizations, lazy layers in test_liveness.py.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_python
from dropin import Holder, call, conv_net, eager, fused, images, one_thread, split_net  # noqa: F401
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq.reference import plain_copy
from fastseq.testing import MODELS, assert_matches

SEEDS = ["seed1", "seed2", "seed3"]


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def assert_still_fused(fast: nn.Module, x: Tensor) -> None:
    """The object itself runs natively and right, in however many runs."""
    __tracebackhide__ = True
    with torch.no_grad():
        actual, counters = call(fast, x)
    assert counters["fused_calls"] > 0 and not counters["fallbacks"], counters
    assert_matches(actual, plain_copy(fast), x)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("dynamic", [None, True], ids=["default", "dynamic"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", SEEDS)
def test_compiled_without_grad(name: str, backend: str, dynamic: bool | None, is_warm: bool) -> None:
    case = MODELS[name]
    plain = case.build()
    fast = fastseq.optimize(plain)
    if is_warm:
        assert_still_fused(fast, case.example(2))
    compiled = torch.compile(fast, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for batch in (2, 3, 5):
            assert_matches(compiled(case.example(batch)), plain, case.example(batch))
        assert graphs() == (1 if dynamic else 2), "as many as a plain model takes"
        # What the object itself does meanwhile, its counters and plans, is nothing that the graphs are guarded by.
        assert_still_fused(fast, case.example(4))
        for parameter in (*fast.parameters(), *plain.parameters()):
            parameter.mul_(0.5)
        assert_still_fused(fast, case.example(7))
        assert_matches(compiled(case.example(5)), plain, case.example(5))
    assert graphs() == (1 if dynamic else 2)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", SEEDS)
def test_compiled_with_grad(name: str, backend: str) -> None:
    case = MODELS[name]
    fast = fastseq.optimize(case.build())
    plain, compiled = plain_copy(fast), torch.compile(fast, backend=backend, fullgraph=True)
    for batch in (2, 3):
        x = case.example(batch)
        result, expected = compiled(x), plain(x)
        torch.testing.assert_close(result, expected)
        result.square().sum().backward()
        expected.square().sum().backward()
    for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert graphs() == 2
    assert_still_fused(fast, case.example(2))


@pytest.mark.parametrize("name", SEEDS)
def test_compiled_by_inductor(name: str) -> None:
    case = MODELS[name]
    fast = fastseq.optimize(case.build())
    assert_still_fused(fast, case.example(2))
    compiled = torch.compile(fast, fullgraph=True, dynamic=True if name == "seed2" else None)
    with torch.no_grad():
        assert_matches(compiled(case.example(3)), plain_copy(fast), case.example(3))
    assert_still_fused(fast, case.example(2))


def test_no_graph_break_by_torchs_own_account() -> None:
    fast = fastseq.optimize(Holder().eval())
    explanation = torch._dynamo.explain(fast)(images())
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


def test_compiled_as_a_part_of_a_function() -> None:
    """Around it, a training step; the model stands in a closure and in a list."""
    fasts = [fastseq.optimize(conv_net()), fastseq.optimize(split_net())]
    plains = [plain_copy(fast) for fast in fasts]

    def loss(models: list[nn.Module], x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for model in models:
            total = total + model(x).square().mean()
        return total

    compiled, x = torch.compile(loss, backend="aot_eager", fullgraph=True), images()
    torch.testing.assert_close(compiled(fasts, x), loss(plains, x))
    compiled(fasts, x).backward()
    loss(plains, x).backward()
    for ours, theirs in zip(fasts, plains, strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        assert_still_fused(ours, x)


def test_disabled_for_the_compiler_it_runs_natively() -> None:
    fast, x = fastseq.optimize(conv_net()), images()

    @torch.compile(backend="eager")
    def function(x: Tensor) -> Tensor:
        return torch.compiler.disable(lambda: fast(x + 1))() * 2

    with torch.no_grad():
        result, counters = call(fast, x)
        fastseq.reset_stats(fast)
        torch.testing.assert_close(function(x), eager(fast, x + 1) * 2)
    assert fastseq.stats(fast) == counters == fused()


@pytest.mark.parametrize("context", ["hook", "autocast", "inference_mode", "train"])
def test_compiled_under_what_turns_fusion_off(context: str) -> None:
    fast, x, fired = fastseq.optimize(conv_net()), images(), []
    assert_still_fused(fast, x)
    plain = plain_copy(fast)
    contexts: dict[str, Callable[[], Any]] = {
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "inference_mode": torch.inference_mode,
    }
    for model in (fast, plain):
        if context == "hook":
            model[1].register_forward_hook(lambda *_: fired.append(1))
        if context == "train":
            model.train()
    compiled = [torch.compile(model, backend="eager", fullgraph=True) for model in (fast, plain)]
    results = []
    for model in compiled:
        with contexts.get(context, torch.no_grad)():
            torch.manual_seed(3)
            results.append(model(x))
    assert torch.equal(*results) and len(fired) == 2 * (context == "hook")
    assert results[0].dtype is (torch.bfloat16 if context == "autocast" else torch.float32)


def test_a_compiled_model_is_copied_and_saved_like_a_plain_one() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    compiled = torch.compile(fast, backend="eager")
    with torch.no_grad():
        before = compiled(x)
        copied = copy.deepcopy(compiled)
        copied._orig_mod[0].weight.mul_(2)
        assert torch.equal(compiled(x), before) and not torch.equal(copied(x), before)
    assert list(compiled.state_dict()) == [f"_orig_mod.{key}" for key in fast.state_dict()]
    assert_still_fused(copied._orig_mod, x)


# Export -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", SEEDS)
def test_exported_programs(name: str, strict: bool) -> None:
    case = MODELS[name]
    plain = case.build()
    fast = fastseq.optimize(plain)
    assert_still_fused(fast, case.example(2))
    batch = torch.export.Dim("batch", min=2, max=64)
    programs = [
        torch.export.export(model, (case.example(3),), dynamic_shapes=({0: batch},), strict=strict)
        for model in (fast, plain)
    ]
    targets = [[str(node.target) for node in program.graph.nodes] for program in programs]
    assert targets[0] == targets[1]
    wanted = {"seed2": {"linear", "relu"}}.get(
        name, {"conv2d", "relu"} | ({"max_pool2d"} if name == "seed3" else set())
    )
    assert wanted <= {target.split(".")[1].rstrip("_") for target in targets[0] if target.startswith("aten.")}
    for program in (programs[0], programs[0].run_decompositions()):
        with torch.no_grad():
            for size in (2, 5):
                assert_matches(program.module()(case.example(size)), plain, case.example(size))
    assert_still_fused(fast, case.example(2))


@pytest.mark.filterwarnings("ignore")
def test_exported_and_scripted_files_run_where_fastseq_is_not_installed(tmp_path: Path) -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    with torch.no_grad():
        torch.save((x, eager(fast, x)), tmp_path / "expected.pt")
    torch.export.save(torch.export.export(fast, (x,)), tmp_path / "exported.pt2")
    torch.jit.save(torch.jit.script(fast), tmp_path / "scripted.pt")
    torch.jit.save(torch.jit.trace(fast, x), tmp_path / "traced.pt")
    script = """
import sys
sys.modules["fastseq"] = None  # an import of it raises
import torch
x, expected = torch.load("expected.pt")
exported = torch.export.load("exported.pt2").module()
for module in (exported, torch.jit.load("scripted.pt"), torch.jit.load("traced.pt")):
    torch.testing.assert_close(module(x), expected)
"""
    result = run_python("-c", script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["seed2", "seed3"])
def test_onnx(name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    case = MODELS[name]
    plain = case.build()
    fast = fastseq.optimize(plain)
    assert_still_fused(fast, case.example(2))
    operators = []
    for kind, model in (("fast", fast), ("plain", plain)):
        torch.onnx.export(model, (case.example(3),), tmp_path / f"{kind}.onnx", dynamo=True, verbose=False)
        graph = onnx.load(tmp_path / f"{kind}.onnx").graph
        operators.append([(node.domain, node.op_type) for node in graph.node])
    assert operators[0] == operators[1]
    counts = Counter(operator for domain, operator in operators[0])
    assert counts["Relu"] == {"seed2": 1, "seed3": 3}[name] and counts["Gemm"] == {"seed2": 2, "seed3": 1}[name]
    assert counts["Conv"] == counts["MaxPool"] == {"seed2": 0, "seed3": 2}[name]
    assert {domain for domain, _ in operators[0]} == {""}
    assert_still_fused(fast, case.example(2))
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: the file was not run")
    session = onnxruntime.InferenceSession(tmp_path / "fast.onnx", providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: case.example(3).numpy()})
    assert_matches(torch.from_numpy(result), plain, case.example(3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["script", "trace"])
def test_frozen_torchscript(way: str) -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    scripted = torch.jit.script(fast) if way == "script" else torch.jit.trace(fast, x)
    frozen = torch.jit.optimize_for_inference(torch.jit.freeze(scripted.eval()))
    with torch.no_grad():
        for _ in range(2):  # the first call is profiled, the second optimised
            torch.testing.assert_close(frozen(x), eager(fast, x))
    assert_still_fused(fast, x)


@pytest.mark.filterwarnings("ignore")
def test_batch_norm_folded_by_fx() -> None:
    norm = nn.BatchNorm2d(8)
    nn.init.normal_(norm.running_mean), nn.init.normal_(norm.weight)
    fast, x = fastseq.optimize(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.MaxPool2d(2)).eval()), images()
    folded = fuse(fast)
    assert nn.BatchNorm2d not in [type(module) for module in folded.modules()]
    with torch.no_grad():
        torch.testing.assert_close(folded(x), eager(fast, x))
    assert_still_fused(fast, x)


# Training helpers and wrappers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_activations(use_reentrant: bool) -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    assert_still_fused(fast, x)
    plain = plain_copy(fast)
    for model in (fast, plain):
        checkpoint(model, x.clone().requires_grad_(), use_reentrant=use_reentrant).square().sum().backward()
    for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)  # the reentrant way runs forward under no_grad first: fused
    assert_still_fused(fast, x)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_older_functional_call() -> None:
    fast, x = fastseq.optimize(Holder().eval()), images()
    assert_still_fused(fast, x)
    doubled = {name: 2 * parameter.detach() for name, parameter in fast.named_parameters()}
    with torch.no_grad():
        actual = nn.utils.stateless.functional_call(fast, doubled, (x,))
        torch.testing.assert_close(actual, torch.func.functional_call(plain_copy(fast), doubled, (x,)))
    assert_still_fused(fast, x)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_one_process_of_distributed_training(tmp_path: Path) -> None:
    """DistributedDataParallel and fully_shard over gloo: gradients, hooks and wrapped classes of their own."""
    script = f"""
import copy, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, {str(ROOT / "tests")!r})
from dropin import Holder, images
import fastseq

torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
x = images()
plain = Holder().eval()

fast = fastseq.optimize(plain)
wrapped = DistributedDataParallel(fast)
reference = copy.deepcopy(plain)
for model in (wrapped, reference):
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()
for ours, theirs in zip(fast.parameters(), reference.parameters()):
    torch.testing.assert_close(ours, theirs)
fastseq.reset_stats(fast)
with torch.no_grad():
    torch.testing.assert_close(wrapped(x), reference(x))
    stats = fastseq.stats(fast)
    assert stats["fused_calls"] > 0 and not stats["fallbacks"], stats
assert [key.removeprefix("module.") for key in wrapped.state_dict()] == list(plain.state_dict())

sharded = fastseq.optimize(plain)
with torch.no_grad():
    sharded(x)
fully_shard(sharded.features, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
with torch.no_grad():
    torch.testing.assert_close(sharded(x), plain(x))
sharded(x).square().sum().backward()
plain(x).square().sum().backward()
for ours, theirs in zip(sharded.parameters(), plain.parameters()):
    torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
dist.destroy_process_group()
"""
    result = run_python("-c", script, str(tmp_path / "store"))
    assert result.returncode == 0, result.stderr


# Quantisation -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_statically_quantised_layers_beside_fused_ones() -> None:
    """The eager-mode flow of torch.ao: observers are hooks, converted layers have classes of their own."""
    if "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch has no x86 engine for quantised layers here")
    ao = torch.ao.quantization
    torch.backends.quantized.engine = "x86"
    model = nn.Sequential(
        ao.QuantStub(), nn.Conv2d(3, 8, 3), ao.DeQuantStub(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 10)
    )
    fast, x = fastseq.optimize(model.eval()), images()
    assert_still_fused(fast, x)
    fast[0].qconfig = fast[1].qconfig = fast[2].qconfig = ao.get_default_qconfig("x86")
    with torch.no_grad():
        prepared = ao.prepare(fast)
        torch.testing.assert_close(prepared(x), eager(fast, x))
        quantised = ao.convert(prepared)
        assert type(quantised[1]) is not nn.Conv2d and type(quantised[5]) is nn.Linear
        result, counters = call(quantised, x)
        torch.testing.assert_close(result, eager(quantised, x))
        torch.testing.assert_close(result, eager(fast, x), atol=0.1, rtol=0)
    assert counters == fused(), "pool, flatten and linear behind the quantised convolution"
    assert_still_fused(fast, x)


# Registered operators ---------------------------------------------------------------------------------------------

# Arguments for torch.library.opcheck of every operator in torch.ops.fastseq: none is registered today.
SAMPLES: dict[str, list[tuple[Any, ...]]] = {}


def test_what_is_registered_with_torch_passes_opcheck() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    assert_still_fused(fast, x)  # whatever is registered on first use
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastseq::")}
    assert {name.partition("::")[2].partition(".")[0] for name in names} == set(SAMPLES)
    for name, samples in SAMPLES.items():
        for arguments in samples:
            torch.library.opcheck(getattr(torch.ops.fastseq, name), arguments)
