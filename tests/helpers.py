"""What several test files share: models and inputs of integers, and running fused with proof that it was."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq import dynamo
from fastseq.testing import assert_matches

ModelT = TypeVar("ModelT", bound=nn.Module)

# Every instruction set whose kernels this CPU runs, the emulated one included; not what only adds bfloat16 to one.
ISAS = tuple(dict.fromkeys(row["isa"] for row in fastseq.kernels() if row["supported"] and row["dtype"] == "f32"))


# How far Winograd's worst element may be from float64's, in eager's worst errors: 5.13 is the most seen, where
# a small tensor of eager's happens to be near. Over a tensor (root mean square) the usual factor holds.
WINOGRAD_LARGEST = 5.5


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """For the modules that import it: small layers run on one thread, and a busy machine does not make them wait."""
    torch.set_num_threads(1)


def use_kernels(monkeypatch: pytest.MonkeyPatch, isa: str, kernel: str = "") -> None:
    """From here on plans are made of `isa`'s kernels, and of those named `kernel` where the layer allows."""
    monkeypatch.setenv("FASTSEQ_ISA", isa)
    monkeypatch.setenv("FASTSEQ_KERNEL", kernel)


def run_fused(model: nn.Module, x: Tensor, winograd: Literal["auto", "off"] = "auto") -> Tensor:
    """`x` through an optimised copy of `model`. Fails if anything falls back to eager."""
    fused = fastseq.optimize(model, winograd=winograd)
    with torch.no_grad():
        actual = fused(x)
    assert_was_fused(fused)
    return actual


def assert_rounds_as_eager(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """In a 16-bit type the fused result is no further from float64 than eager's, up to a quarter of a rounding."""
    model, x = model.to(dtype), x.to(dtype)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        actual, eager = fused(x), model(x)
        exact = model.double()(x.double())
    assert (actual.dtype, actual.stride()) == (dtype, eager.stride()) and not fastseq.stats(fused)["fallbacks"]
    error, eager_error = ((result.double() - exact).norm() / exact.norm() for result in (actual, eager))
    assert error <= 1.25 * eager_error + torch.finfo(dtype).eps / 4


def assert_was_fused(fused: nn.Module) -> None:
    counters = fastseq.stats(fused)
    assert counters["fused_calls"] > 0, counters
    assert not counters["fallbacks"], counters


def kernels_used(fused: nn.Module) -> list[str]:
    """The kernel of each fused step, as the report names them after a call."""
    report = fastseq.explain(fused).to_dict()
    segments = [segment for run in (*report["forwards"], *report["sequentials"]) for segment in run["segments"]]
    return [step["kernel"] for segment in segments if segment["kind"] == "native" for step in segment["steps"]]


def runs_of_graph(model: nn.Module, x: Tensor) -> list[list[str]]:
    """The layers of each native run that `torch.compile(model, backend="fastseq")` makes."""
    found: list[list[str]] = []

    def backend(graph: Any, _: Any) -> Any:
        found.extend([type(call.layer).__name__ for call in run] for run in dynamo.find_runs(graph))
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    return found


def settle(model: ModelT) -> ModelT:
    """Eval mode, BatchNorms with numbers as in a trained network: also negative and small ones."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert layer.running_mean is not None and layer.running_var is not None
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.05, 4)
            if layer.affine:
                nn.init.normal_(layer.weight)
                nn.init.normal_(layer.bias)
    return model.eval()


def integers(*shape: int, limit: int = 4) -> Tensor:
    """Floats with integer values: sums of their products are exact in any order."""
    return torch.randint(-limit, limit + 1, shape).float()


def integer_model(*layers: nn.Module, limit: int = 4) -> nn.Sequential:
    """The layers in eval mode with integers for weights and biases."""
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(integers(*parameter.shape, limit=limit))
    return model


def assert_exact(actual: Tensor, model: nn.Sequential, x: Tensor) -> None:
    """`actual` is the one right result of an integer-valued model and input: tolerance 0, eager's shape and strides."""
    __tracebackhide__ = True
    assert largest_sum(model, x) < 2**24, "the test's own numbers are too large to be exact"
    with torch.no_grad():
        eager = model(x)
        expected = copy.deepcopy(model).double()(x.double()).float()
    for name, found, wanted in (
        ("shape", actual.shape, eager.shape),
        ("dtype", actual.dtype, eager.dtype),
        ("strides", actual.stride(), eager.stride()),
    ):
        assert found == wanted, f"{name}: expected {wanted} as eager gives, found {found}"
    wrong = actual != expected
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} differ, the first at {wrong.nonzero()[0].tolist()}: "
        f"expected {expected[wrong][0].item()}, found {actual[wrong][0].item()}"
    )


def check_run(model: nn.Sequential, x: Tensor) -> None:
    """An integer-valued model on `x`: exact in the direct kernels, and in those chosen unless one is Winograd's.

    Its transforms round, so there integers are only near, and random numbers as accurate as eager's, to a factor.
    """
    __tracebackhide__ = True
    direct = run_fused(model, x, winograd="off")
    assert_exact(direct, model, x)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        actual = fused(x)
    assert_was_fused(fused)
    assert actual.stride() == direct.stride()
    if not any(name.startswith("conv2d_winograd") for name in kernels_used(fused)):
        assert torch.equal(actual, direct)
        return
    assert (actual - direct).abs().max() <= 1e-5 * max(1.0, largest_sum(model, x))
    floats = copy.deepcopy(model)
    for layer in floats:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()
    # A result of a few numbers would compare chance with chance.
    noise = torch.randn_like(torch.cat([x] * 8) if x.dim() == 4 else x)
    assert_matches(run_fused(floats, noise), floats, noise, largest_factor=WINOGRAD_LARGEST)


def largest_sum(model: nn.Sequential, x: Tensor) -> float:
    """A bound of every partial sum in every layer: the same network over absolute values."""
    bounding = copy.deepcopy(model).double()
    value, largest = x.double().abs(), 0.0
    with torch.no_grad():
        for parameter in bounding.parameters():
            parameter.abs_()
        for layer in bounding:
            value = layer(value)
            largest = max(largest, value.max().item())
    return largest


def outcome(call: Callable[[Tensor], Any], x: Tensor) -> Any:
    """The result without gradients, or the exception as text."""
    try:
        with torch.no_grad():
            return call(x)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def assert_eagers_error(model: nn.Module, x: Tensor) -> None:
    """`model` rejects `x`, and so does what is made of it, in the same words."""
    __tracebackhide__ = True
    expected = outcome(model.eval(), x)
    assert isinstance(expected, str)
    assert outcome(fastseq.optimize(model), x) == expected


def assert_same_outcome(actual: Any, expected: Any) -> None:
    """Tensors that are close, or the same exception."""
    __tracebackhide__ = True
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected)
    else:
        assert actual == expected


def run_on_threads(fused: nn.Module, x: Tensor) -> Tensor:
    """The result, whose bits one thread and two must agree on."""
    __tracebackhide__ = True
    with torch.no_grad():
        torch.set_num_threads(1)
        alone: Tensor = fused(x)
        torch.set_num_threads(2)
        assert torch.equal(fused(x), alone)
    return alone


def assert_same_bits_however_called(fused: nn.Module, x: Tensor) -> Tensor:
    """The results of the images of `x` one by one, which other batches, threads and layouts must repeat."""
    __tracebackhide__ = True
    with torch.no_grad():
        alone = torch.cat([fused(image[None]) for image in x])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for batch in (1, 2, 5, len(x)):
                assert torch.equal(fused(x[:batch]), alone[:batch]), (threads, batch)
            assert torch.equal(fused(x.to(memory_format=torch.channels_last)), alone), threads
    return alone


def in_threads(work: Callable[[int], None], count: int) -> None:
    """`work(i)` for each i below `count`, all at once."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
