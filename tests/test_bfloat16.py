"""bfloat16 and float16 models on the CPU: float32 sums, one rounding where eager's layers have theirs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    ISAS,
    assert_same_bits_however_called,
    assert_same_outcome,
    assert_was_fused,
    integer_model,
    integers,
    kernels_used,
    one_thread,
    outcome,
    run_fused,
    settle,
    use_kernels,
)
from torch import Tensor, nn

import fastseq
from fastseq.testing import MODELS

__all__ = ["one_thread"]

DTYPES = [torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# One step each, and what it takes: all that a step consists of, before and behind the rounding.
STEPS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "conv": (lambda: [nn.Conv2d(5, 19, 3, padding=1)], (5, 9, 11)),
    "conv relu": (lambda: [nn.Conv2d(3, 16, 4, stride=3, bias=False), nn.ReLU()], (3, 17, 14)),
    "conv of one pixel": (lambda: [nn.Conv2d(6, 33, 1)], (6, 1, 1)),
    "conv to one channel": (lambda: [nn.Conv2d(40, 1, 3)], (40, 8, 9)),
    "plane": (lambda: [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)], (1, 12, 14)),
    "conv relu pool": (lambda: [nn.Conv2d(3, 20, 3), nn.ReLU(), nn.MaxPool2d(2)], (3, 14, 12)),
    "conv pool through rows": (lambda: [nn.Conv2d(7, 20, 3), nn.MaxPool2d(3, 2, 1)], (7, 13, 15)),
    "conv gelu": (lambda: [nn.Conv2d(5, 9, 3), nn.GELU()], (5, 9, 11)),
    "conv norm silu": (lambda: [nn.Conv2d(5, 18, 3, padding=1), nn.BatchNorm2d(18), nn.SiLU()], (5, 9, 11)),
    "conv prelu pool": (lambda: [nn.Conv2d(4, 9, 3), nn.PReLU(9), nn.MaxPool2d(3, 2)], (4, 9, 11)),
    "pool tanh": (lambda: [nn.MaxPool2d(3, 2, 1), nn.Tanh()], (19, 9, 8)),
    "pool": (lambda: [nn.MaxPool2d(2)], (5, 9, 8)),
    "depthwise": (lambda: [nn.Conv2d(20, 20, 3, padding=1, groups=20), nn.ReLU6()], (20, 9, 11)),
    "one dimension": (lambda: [nn.Conv1d(9, 20, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2)], (9, 21)),
    "groups": (lambda: [nn.Conv2d(24, 36, 3, stride=2, groups=3), nn.SiLU()], (24, 9, 11)),
    "dilated": (lambda: [nn.Conv2d(9, 17, 3, padding=2, dilation=2), nn.ReLU()], (9, 9, 11)),
    "average": (lambda: [nn.AvgPool2d(3, 2, 1)], (19, 9, 8)),
    "adaptive average": (lambda: [nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten()], (19, 9, 8)),
    "linear": (lambda: [nn.Linear(37, 65)], (37,)),
    "long linear": (lambda: [nn.Linear(1030, 21, bias=False), nn.ReLU()], (1030,)),
    "linear sigmoid": (lambda: [nn.Linear(120, 7), nn.Sigmoid()], (120,)),
    "flatten linear": (lambda: [nn.Flatten(), nn.Linear(5 * 3 * 4, 10)], (5, 3, 4)),
}
each_step = pytest.mark.parametrize("step", STEPS)


def make(layers: list[nn.Module], dtype: torch.dtype) -> nn.Sequential:
    """In eval mode, of numbers that the type holds, with statistics that do something."""
    return settle(nn.Sequential(*layers)).to(dtype)


def in_double(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = copy.deepcopy(model).double()(x.double())
    return result


def units(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of `dtype` around each of `exact`."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact)[1] - 1
    least = torch.frexp(torch.tensor(info.smallest_normal))[1] - 1
    return torch.ldexp(torch.full_like(exact, info.eps), torch.maximum(exponent, least))


@pytest.mark.parametrize("isa", ISAS)
@each_dtype
@each_step
def test_a_step_is_rounded_once(step: str, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a unit from float64, and what float32 sums are off by."""
    use_kernels(monkeypatch, isa)
    layers, shape = STEPS[step]
    model = make(layers(), dtype)
    x = torch.randn(3, *shape).to(dtype)
    actual = run_fused(model, x)
    with torch.no_grad():
        eager = model(x)
    assert (actual.dtype, actual.shape, actual.stride()) == (dtype, eager.shape, eager.stride())
    exact = in_double(model, x)
    off = (actual.double() - exact).abs() - 0.5 * units(exact, dtype)
    assert off.max() <= 1e-5 * exact.abs().max()


@each_dtype
@pytest.mark.parametrize("name", ["seed1", "seed2", "seed3", "lenet5", "mlp", "cifar_vgg", "cifar_vgg_bn"])
def test_networks(name: str, dtype: torch.dtype) -> None:
    case = MODELS[name]
    model = case.build().to(dtype)
    x = torch.randn(4, *case.input_shape).to(dtype)
    fast = fastseq.optimize(model)
    with torch.no_grad():
        actual, eager = fast(x), model(x)
    assert_was_fused(fast)
    assert (actual.dtype, actual.stride()) == (dtype, eager.stride())
    exact = in_double(model, x)

    def error(result: Tensor) -> float:
        return ((result.double() - exact).norm() / exact.norm()).item()

    assert error(actual) <= 1.25 * error(eager) + torch.finfo(dtype).eps / 4
    assert fastseq.verify(fast, x).ok


# Steps that are no layer with weights, of rows and of maps, between those that may multiply in bfloat16.
MIXED: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "rows": (
        lambda: [
            *(nn.Linear(20, 33), nn.ReLU(), nn.BatchNorm1d(33), nn.Linear(33, 40), nn.GELU(), nn.Tanh()),
            *(nn.Linear(40, 7), nn.ReLU(), nn.BatchNorm1d(7)),
        ],
        (20,),
    ),
    "norm first": (lambda: [nn.BatchNorm1d(21), nn.Linear(21, 33), nn.SiLU()], (21,)),
    "maps": (
        lambda: [
            *(nn.ZeroPad2d((1, 2, 0, 1)), nn.Conv2d(3, 20, 3), nn.ReLU(), nn.BatchNorm2d(20), nn.Tanh()),
            *(
                nn.AvgPool2d(2),
                nn.ConstantPad2d(1, 0.3),
                nn.Conv2d(20, 16, 3, padding=1),
                nn.BatchNorm2d(16),
                nn.ReLU(),
            ),
            *(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(144, 10)),
        ],
        (3, 17, 16),
    ),
    "norms and softmax": (
        lambda: [
            *(nn.Conv2d(3, 20, 3), nn.GroupNorm(5, 20), nn.SiLU(), nn.Conv2d(20, 16, 3), nn.GroupNorm(1, 16)),
            *(nn.Flatten(), nn.LayerNorm(16 * 13 * 12), nn.Linear(16 * 13 * 12, 33), nn.LayerNorm(33), nn.GELU()),
            *(nn.Linear(33, 7), nn.Softmax(1)),
        ],
        (3, 17, 16),
    ),
    "one dimension": (
        lambda: [
            *(nn.Conv1d(3, 20, 5), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(20, 32, 3), nn.Tanh(), nn.Sigmoid()),
            *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 5)),
        ],
        (3, 40),
    ),
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_steps_of_all_kinds_in_one_run(name: str, dtype: torch.dtype) -> None:
    layers, shape = MIXED[name]
    model, x = make(layers(), dtype), torch.randn(9, *shape).to(dtype)
    fast = fastseq.optimize(model, compute_dtype=torch.bfloat16 if dtype is torch.float32 else None)
    with torch.no_grad():
        actual, eager = fast(x), model(x)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(torch.cat([fast(part) for part in x.split(4)]), actual)
    assert fastseq.stats(fast)["eager_calls"] == 0
    exact = in_double(model, x)
    error, eager_error = ((result.double() - exact).norm() / exact.norm() for result in (actual, eager))
    if dtype is torch.float32:
        assert error <= torch.finfo(torch.bfloat16).eps
    else:
        assert error <= 1.25 * eager_error + torch.finfo(dtype).eps / 4


@each_dtype
@pytest.mark.parametrize("winograd", ["auto", "off"])
def test_each_step_gives_numbers_of_the_type(dtype: torch.dtype, winograd: Any) -> None:
    """Cut in two anywhere, a network gives the same bits: between steps nothing is kept that eager would not keep."""
    layers = [
        [nn.Conv2d(3, 40, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(40, 32, 3, padding=1), nn.BatchNorm2d(32), nn.SiLU()],
        [nn.Conv2d(32, 24, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)],
        [nn.Conv2d(24, 20, 3), nn.MaxPool2d(3, 2, 1), nn.GELU()],
        [nn.MaxPool2d(2, 1), nn.Hardswish()],
        [nn.Conv2d(20, 20, 3, padding=1, groups=20), nn.ReLU()],
        [nn.AvgPool2d(2, 1)],
        [nn.Flatten(), nn.Linear(20 * 2 * 2, 50), nn.Mish()],
        [nn.Linear(50, 30), nn.PReLU(30)],
        [nn.Linear(30, 10)],
    ]
    model = make([layer for step in layers for layer in step], dtype)
    x = torch.randn(3, 3, 20, 20).to(dtype)
    whole = run_fused(model, x, winograd)
    end = 0
    for step in layers[:-1]:
        end += len(step)
        assert torch.equal(run_fused(model[end:], run_fused(model[:end], x, winograd), winograd), whole), end


@each_dtype
@pytest.mark.parametrize(
    "shape",
    [(0, 3, 9, 9), (3, 9, 9), (1, 3, 9, 9), (2, 4, 9, 9), (1, 3, 2, 2)],
    ids=["empty", "unbatched", "one image", "channels that eager rejects", "too small"],
)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = make([nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)], dtype)
    x = torch.randn(shape).to(dtype)
    assert_same_outcome(outcome(fastseq.optimize(model), x), outcome(model, x))


@each_dtype
@pytest.mark.parametrize("shape", [(0, 20), (20,), (2, 3, 20), (5, 21)], ids=str)
def test_shapes_of_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = make([nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3)], dtype)
    x = torch.randn(shape).to(dtype)
    assert_same_outcome(outcome(fastseq.optimize(model), x), outcome(model, x))


@each_dtype
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "odd offset"])
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    """Strides are eager's, values those of the contiguous input."""
    model = make([nn.Conv2d(3, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 6, 3)], dtype)
    x = torch.randn(2, 3, 12, 12).to(dtype)
    other = {
        "channels_last": lambda: x.to(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": lambda: torch.cat([x, x], 3)[..., :12],
        "odd offset": lambda: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    }[layout]()
    assert torch.equal(other, x) and (layout != "odd offset" or other.data_ptr() % 4 == 2)
    actual = run_fused(model, other)
    with torch.no_grad():
        assert actual.stride() == model(other).stride()
    assert torch.equal(actual, run_fused(model, x))


@each_dtype
@pytest.mark.parametrize("step", ["conv relu", "conv relu pool", "conv pool through rows", "conv norm silu", "plane"])
def test_same_bits_however_called(step: str, dtype: torch.dtype) -> None:
    layers, shape = STEPS[step]
    x = torch.randn(7, *shape).to(dtype)
    assert_same_bits_however_called(fastseq.optimize(make(layers(), dtype)), x)


@each_dtype
def test_same_bits_of_rows(dtype: torch.dtype) -> None:
    fast = fastseq.optimize(make([nn.Linear(700, 600), nn.ReLU(), nn.Linear(600, 530)], dtype))
    x = torch.randn(40, 700).to(dtype)
    with torch.no_grad():
        alone = torch.cat([fast(row[None]) for row in x])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for batch in (1, 2, 3, 9, 40):
                assert torch.equal(fast(x[:batch]), alone[:batch]), (threads, batch)


@each_dtype
@pytest.mark.parametrize("step", [name for name in STEPS if "norm" not in name])
def test_special_values(step: str, dtype: torch.dtype) -> None:
    """Where eager's float32 layers have them: its bfloat16 convolutions make NaN of sums that hold no infinity."""
    layers, shape = STEPS[step]
    model = make(layers(), dtype)
    x = torch.randn(4, *shape).to(dtype)
    flat = x.flatten()
    for value in (NAN, INF, -INF, -0.0, torch.finfo(dtype).smallest_normal / 4):
        flat[torch.randint(flat.numel(), ())] = value
    actual = run_fused(model, x)
    with torch.no_grad():
        eager = copy.deepcopy(model).float()(x.float()).to(dtype)
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        # GELU of +inf is NaN in eager's kernel for contiguous numbers.
        if "gelu" not in step:
            assert torch.equal(test(actual), test(eager)), test
    finite = actual.isfinite() & eager.isfinite()
    assert finite.any()
    torch.testing.assert_close(actual[finite], eager[finite], rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


def test_what_is_too_large_for_float16_is_infinite() -> None:
    """Also between two steps, where float32 would hold it."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)).half().eval()
    with torch.no_grad():
        model[0].weight.fill_(2.0**13)
        model[2].weight.copy_(torch.tensor([[2.0**-10, 0.0], [0.0, 2.0**-10]]))
        x = torch.tensor([[2.0, 2.0, 2.0, 1.0], [2.0, 2.0, 2.0, 2.0]]).half()
        expected = model(x)
    assert torch.equal(run_fused(model, x)[0], torch.tensor([56.0, 56.0]).half())
    actual = run_fused(model, x)[1]
    assert actual.isnan().all() and expected[1].isnan().all()  # infinity times zero


@each_dtype
def test_subnormal_numbers_stay(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for vdpbf16ps, which takes them for zero."""
    use_kernels(monkeypatch, "portable")
    tiny = torch.finfo(dtype).smallest_normal / 8
    model = nn.Sequential(nn.Linear(3, 3, bias=False)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
    x = torch.tensor([[tiny, -tiny, 3 * tiny]]).to(dtype)
    assert torch.equal(run_fused(model, x), x)


# Mixtures -------------------------------------------------------------------------------------------------------------

MIXTURES: dict[str, tuple[Callable[[nn.Sequential], Any], Callable[[Tensor], Tensor]]] = {
    "float32 input": (lambda m: m, Tensor.float),
    "the other type": (lambda m: m, lambda x: x.to(DTYPES[1 - DTYPES.index(x.dtype)])),
    "float32 bias": (lambda m: m[0].__setattr__("bias", nn.Parameter(m[0].bias.float())), lambda x: x),
    "float32 layer": (lambda m: m[0].float(), lambda x: x),
    "float32 second layer": (lambda m: m[3].float(), lambda x: x),
    "float32 BatchNorm": (lambda m: m[1].float(), lambda x: x),
    "float32 statistics": (lambda m: m[1].__setattr__("running_mean", m[1].running_mean.float()), lambda x: x),
}


@each_dtype
@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixtures_are_eagers(mixture: str, dtype: torch.dtype) -> None:
    model = make([nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)], dtype)
    change, cast = MIXTURES[mixture]
    change(model)
    x = cast(torch.randn(2, 3, 9, 9).to(dtype))
    fast = fastseq.optimize(model)
    actual, expected = outcome(fast, x), outcome(model, x)
    assert type(actual) is type(expected)
    assert torch.equal(actual, expected) if isinstance(expected, Tensor) else actual == expected
    assert fastseq.stats(fast)["fused_calls"] == 0 and fastseq.stats(fast)["fallbacks"]


def test_from_type_to_type() -> None:
    """A model that changes its type is packed anew; a run without parameters takes all types in turn."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    fast, pool = fastseq.optimize(model), fastseq.optimize(nn.Sequential(nn.MaxPool2d(2), nn.ReLU()))
    x = torch.randn(2, 3, 10, 10)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16):
            fast.to(dtype), model.to(dtype)
            assert fast(x.to(dtype)).dtype == dtype
            torch.testing.assert_close(fast(x.to(dtype)), model(x.to(dtype)), rtol=1e-2, atol=1e-2)
            assert torch.equal(pool(x.to(dtype)), nn.functional.max_pool2d(x.to(dtype), 2).relu())
        assert_was_fused(pool)
        assert_was_fused(fast)


@each_dtype
def test_gradients_and_autocast_are_eagers(dtype: torch.dtype) -> None:
    model = make([nn.Linear(20, 8), nn.ReLU()], dtype)
    fast, x = fastseq.optimize(model), torch.randn(3, 20).to(dtype)
    assert torch.equal(fast(x), model(x)) and fast(x).requires_grad
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast(x), model(x))
    assert fastseq.stats(fast)["fused_calls"] == 0


# Weights --------------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 1), (300, 301)], ids=str)
def test_a_write_behind_autograds_back_is_seen(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Odd numbers of elements too, of which the last has no partner in its 32 bits."""
    model = make([nn.Linear(shape[1], shape[0], bias=False)], dtype)
    with torch.no_grad():
        model[0].weight.fill_(1)
        fast, x = fastseq.optimize(model), torch.ones(2, shape[1]).to(dtype)
        before = fast(x)
        for place in (-1, 0):
            version = fast[0].weight._version
            fast[0].weight.data.flatten()[place] = -30 - place
            assert fast[0].weight._version == version
            after = fast(x)
            assert not torch.equal(after, before)
            torch.testing.assert_close(after, nn.functional.linear(x, fast[0].weight))
            before = after
    assert_was_fused(fast)


@each_dtype
def test_weights_at_odd_addresses(dtype: torch.dtype) -> None:
    model = make([nn.Linear(9, 7)], dtype)
    flat = torch.cat([torch.zeros(1), torch.randn(63)]).to(dtype)
    model[0].weight = nn.Parameter(flat[1:].view(7, 9))
    assert model[0].weight.data_ptr() % 4 == 2
    fast, x = fastseq.optimize(model), torch.randn(3, 9).to(dtype)
    fast[0].weight = nn.Parameter(flat[1:].view(7, 9))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), nn.functional.linear(x, fast[0].weight, fast[0].bias))
        flat[-1] += 50
        torch.testing.assert_close(fast(x), nn.functional.linear(x, fast[0].weight, fast[0].bias))
    assert_was_fused(fast)


@each_dtype
def test_load_state_dict(dtype: torch.dtype) -> None:
    layers = lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 5)]  # noqa: E731
    first, second = make(layers(), dtype), make(layers(), dtype)
    fast, x = fastseq.optimize(first), torch.randn(2, 3, 9, 9).to(dtype)
    with torch.no_grad():
        fast(x)
        fast.load_state_dict(second.state_dict())
        actual = fast(x)
    assert_matches_16_bits(actual, second, x)
    assert_was_fused(fast)


@each_dtype
def test_weights_read_in_place_are_a_copy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where asked for: other weights of two bytes are packed, however large."""
    use_kernels(monkeypatch, fastseq.isa(), "linear_in_place")
    model = make([nn.Flatten(), nn.Linear(24, 19), nn.GELU(), nn.Linear(19, 5)], dtype)
    fast, x = fastseq.optimize(model), torch.randn(9, 2, 3, 4).to(dtype)
    with torch.no_grad():
        for batch in (1, 3, 9):
            assert_matches_16_bits(fast(x[:batch]), fast, x[:batch])
        fast[1].weight.mul_(2)
        assert_matches_16_bits(fast(x), fast, x)
    assert all(kernel.startswith("linear_in_place") for kernel in kernels_used(fast))
    assert_was_fused(fast)


def assert_matches_16_bits(actual: Tensor, model: nn.Module, x: Tensor) -> None:
    __tracebackhide__ = True
    exact = in_double(fastseq.restore(copy.deepcopy(model)), x)
    assert ((actual.double() - exact).norm() / exact.norm()).item() <= 2 * torch.finfo(actual.dtype).eps


# Kernels that multiply bfloat16 numbers ------------------------------------------------------------------------------

BF16_KERNELS = [row for row in fastseq.kernels() if row["dtype"] == "bf16"]
each_kernel = pytest.mark.parametrize("row", BF16_KERNELS, ids=[row["name"] for row in BF16_KERNELS])
BF16_ISAS = list(dict.fromkeys(row["isa"] for row in BF16_KERNELS if row["supported"]))
each_bf16_isa = pytest.mark.parametrize("isa", BF16_ISAS)


def layers_of(op: str, channels: int, k: int) -> tuple[list[nn.Module], tuple[int, ...]]:
    """What the op computes, with `channels` outputs and an odd number of pixels or rows."""
    return {
        "conv2d": lambda: ([nn.Conv2d(k, channels, (2, 3), stride=2, padding=1), nn.ReLU()], (3, k, 9, 11)),
        "conv2d_maxpool2d": lambda: ([nn.Conv2d(k, channels, 1), nn.MaxPool2d(2)], (3, k, 9, 11)),
        "linear": lambda: ([nn.Linear(k, channels)], (29, k)),
    }[op]()


@each_kernel
@pytest.mark.parametrize("k", [8, 9, 37, 301], ids="k{}".format)
def test_each_kernel_is_exact_but_for_one_rounding(
    row: dict[str, Any], k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integers, odd numbers of channels and features too, in a bfloat16 model and in a float32 one that asks for it."""
    if not row["supported"]:
        pytest.skip(f"this CPU cannot run {row['name']}")
    use_kernels(monkeypatch, row["isa"], row["name"])
    lanes = int(row["name"].rpartition("x")[2])
    for channels in (lanes - 1, lanes, 2 * lanes + 1):
        layers, shape = layers_of(row["op"], channels, k)
        model = integer_model(*layers)
        x = integers(*shape)
        exact = in_double(model, x)
        for dtype in (torch.bfloat16, torch.float32):
            fast = fastseq.optimize(copy.deepcopy(model).to(dtype), compute_dtype=torch.bfloat16)
            with torch.no_grad():
                assert torch.equal(fast(x.to(dtype)), exact.to(dtype))
                assert torch.equal(fast(x[:1].to(dtype)), exact[:1].to(dtype))
            assert_was_fused(fast)
            (name,) = kernels_used(fast)
            assert name.startswith(f"{row['op']}_bf16__{row['isa']}_")
            assert name == row["name"] or channels == 2 * lanes + 1


# Chains in which every step may be of another kind, and so every border between them.
CHAINS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "strided": (
        lambda: [
            *(nn.Conv2d(3, 17, 3, padding=1), nn.ReLU(), nn.Conv2d(17, 33, 3, stride=2, padding=1), nn.SiLU()),
            *(nn.Conv2d(33, 41, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(41, 9, 3, stride=2, padding=2)),
        ],
        (3, 21, 19),
    ),
    "pools between": (
        lambda: [
            *(nn.Conv2d(12, 20, 1), nn.MaxPool2d(3, 2, 1), nn.GELU(), nn.MaxPool2d(2, 1)),
            *(nn.Conv2d(20, 24, 7, padding=3), nn.MaxPool2d(3, 1), nn.Conv2d(24, 11, 1), nn.ReLU()),
        ],
        (12, 17, 18),
    ),
    "heavy weights": (
        lambda: [nn.Conv2d(160, 161, 3, stride=2), nn.ReLU(), nn.Conv2d(161, 300, 1), nn.Conv2d(300, 40, 3)],
        (160, 9, 9),
    ),
    "linear behind odd channels": (
        lambda: [nn.Conv2d(8, 17, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(17 * 16, 31), nn.Linear(31, 5)],
        (8, 9, 10),
    ),
    "heavy linear behind odd channels": (
        lambda: [nn.Conv2d(1, 17, 3), nn.ReLU(), nn.Flatten(), nn.Linear(17 * 56, 601), nn.GELU(), nn.Linear(601, 5)],
        (1, 9, 10),
    ),
    "linear": (
        lambda: [nn.Linear(333, 601), nn.ReLU(), nn.Linear(601, 77), nn.PReLU(77), nn.Linear(77, 1), nn.Sigmoid()],
        (333,),
    ),
}


@each_bf16_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("chain", CHAINS)
def test_chains(chain: str, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, special values, and the same bits however a model is called."""
    use_kernels(monkeypatch, isa)
    layers, shape = CHAINS[chain]
    model = make(layers(), dtype)
    fast = fastseq.optimize(model, compute_dtype=torch.bfloat16)
    x = torch.randn(7, *shape).to(dtype)
    flat = x[6].flatten()
    flat[0], flat[flat.numel() // 2], flat[-1] = NAN, INF, -INF
    with torch.no_grad():
        alone = torch.cat([fast(part[None]) for part in x])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for batch in (1, 2, 5, 7):
                assert same_bits(fast(x[:batch]), alone[:batch]), (threads, batch)
            if len(shape) == 3:
                assert same_bits(fast(x.to(memory_format=torch.channels_last)).contiguous(), alone), threads
        wide = copy.deepcopy(model).float()(x.float())
    assert_was_fused(fast)
    assert any("_bf16__" in kernel for kernel in kernels_used(fast))
    exact = in_double(model, x[:6])
    assert ((alone[:6].double() - exact).norm() / exact.norm()).item() <= 3 * torch.finfo(torch.bfloat16).eps
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(alone), test(wide)), test


@pytest.mark.parametrize("winograd", ["auto", "off"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_maps_in_each_others_places(dtype: torch.dtype, winograd: Any) -> None:
    """Those of an image are more than a cache holds: borders, and the partners of odd channels, are made anew."""
    layers = [
        *(nn.Conv2d(16, 65, 7, padding=3), nn.ReLU(), nn.Conv2d(65, 33, 5, padding=2), nn.SiLU()),
        *(nn.Conv2d(33, 64, 3, stride=2, padding=1), nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.Conv2d(64, 70, 1)),
        *(nn.Conv2d(70, 20, 3, stride=2, padding=1), nn.MaxPool2d(2)),
    ]
    model = make(layers, dtype)
    fast = fastseq.optimize(model, compute_dtype=torch.bfloat16, winograd=winograd)
    halves = [
        fastseq.optimize(part, compute_dtype=torch.bfloat16, winograd=winograd) for part in (model[:4], model[4:])
    ]
    x = torch.randn(5, 16, 56, 52).to(dtype)
    with torch.no_grad():
        alone = assert_same_bits_however_called(fast, x)
        assert torch.equal(halves[1](halves[0](x)), alone)
    exact = in_double(model, x)
    assert ((alone.double() - exact).norm() / exact.norm()).item() <= 2 * torch.finfo(torch.bfloat16).eps


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)) and a.shape == b.shape


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa not in BF16_ISAS])
def test_without_the_instruction_all_is_float32(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    model = make([nn.Conv2d(16, 20, 1), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 9, 10)], torch.float32)
    x = torch.randn(4, 16, 3, 3)
    fast = fastseq.optimize(model, compute_dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(fast(x), run_fused(model, x))
    assert "has no kernels for bfloat16" in str(fastseq.explain(fast))
    assert all("_f32__" in kernel for kernel in kernels_used(fast))


NORMED: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "conv": ([nn.Conv2d(16, 20, 3), nn.BatchNorm2d(20)], (16, 9, 9)),
    "conv, pool in registers": ([nn.Conv2d(16, 20, 3), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(2)], (16, 9, 9)),
    "conv, another pool": ([nn.Conv2d(16, 40, 1), nn.BatchNorm2d(40), nn.MaxPool2d(3, 2, 1), nn.ReLU()], (16, 9, 9)),
    "strided, no bias": ([nn.Conv2d(24, 70, 3, 2, bias=False), nn.BatchNorm2d(70), nn.GELU()], (24, 11, 11)),
    "linear": ([nn.Linear(70, 33), nn.BatchNorm1d(33), nn.ReLU()], (70,)),
    "flattened": ([nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20 * 9, 33), nn.BatchNorm1d(33)], (20, 6, 6)),
}


@each_bf16_isa
@pytest.mark.parametrize("chain", NORMED)
def test_a_norm_behind_bfloat16_weights(chain: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scale, of either sign, multiplies the sums: in the weights it would be a rounding that eager has not."""
    layers, shape = NORMED[chain]
    model = make(layers, torch.bfloat16)
    for module in model:
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.num_features)), module.bias.normal_()
                module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    use_kernels(monkeypatch, isa)
    fast = fastseq.optimize(model, winograd="off")
    for batch in (1, 2, 3, 9):
        x = torch.randn(batch, *shape).bfloat16()
        with torch.no_grad():
            actual = fast(x)
        assert_matches_16_bits(actual, model, x)
        exact = in_double(model, x)
        # One rounding, and sums in float32.
        ulp = torch.finfo(torch.bfloat16).eps
        assert ((actual.double() - exact).abs() <= 0.51 * ulp * exact.abs() + 1e-4).all()
    assert any("_bf16__" in kernel for kernel in kernels_used(fast))


def test_a_norm_in_front_of_bfloat16_kernels() -> None:
    layers = [nn.Conv2d(16, 20, 1), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 24, 1)]
    x = torch.randn(2, 16, 9, 9)
    for dtype in (torch.bfloat16, torch.float32):
        fast = fastseq.optimize(make(layers, dtype), compute_dtype=torch.bfloat16)
        with torch.no_grad():
            fast(x.to(dtype))
        assert ["_bf16__" in kernel for kernel in kernels_used(fast)] == [True, True] or not bf16_here()


def bf16_here() -> bool:
    return any(row["supported"] and not row["test_only"] for row in BF16_KERNELS)


# compute_dtype -------------------------------------------------------------------------------------------------------


def test_compute_dtype_is_off_unless_asked_for() -> None:
    model, x = make([nn.Conv2d(16, 20, 1), nn.ReLU()], torch.float32), torch.randn(2, 16, 9, 9)
    usual = run_fused(model, x)
    assert torch.equal(run_fused(fastseq.optimize(model, compute_dtype=torch.float32), x), usual)
    fast = fastseq.optimize(model, compute_dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(fast(x), usual) != bf16_here()
        assert torch.equal(copy.deepcopy(fast)(x), fast(x)), "copies keep it"
        assert torch.equal(fastseq.optimize(fast)(x), usual), "optimised anew it is off"
        assert torch.equal(fastseq.restore(fast)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, "bfloat16"], ids=str)
def test_compute_dtype_is_checked(dtype: Any) -> None:
    with pytest.raises(ValueError, match="compute_dtype expects"):
        fastseq.optimize(nn.Sequential(nn.Linear(2, 2)), compute_dtype=dtype)


def test_compute_dtype_leaves_float16_alone() -> None:
    model = make([nn.Linear(64, 20), nn.ReLU()], torch.float16)
    fast, x = fastseq.optimize(model, compute_dtype=torch.bfloat16), torch.randn(3, 64).half()
    with torch.no_grad():
        assert torch.equal(fast(x), run_fused(model, x))


def test_compute_dtype_in_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """explain shows each step's type, verify its error and the bound that it is judged by."""
    use_kernels(monkeypatch, "emulated512")
    model = make(
        [nn.Conv2d(1, 20, 5), nn.ReLU(), nn.Conv2d(20, 24, 1), nn.Flatten(), nn.Linear(24 * 25, 10)], torch.float32
    )
    fast, x = fastseq.optimize(model, compute_dtype=torch.bfloat16), torch.randn(4, 1, 9, 9)
    report = fastseq.explain(fast, x)
    assert "compute_dtype: bfloat16 where a kernel has it" in str(report)
    (segment,) = report.to_dict()["sequentials"][0]["segments"]
    assert [step["dtype"] for step in segment["steps"]] == ["float32", "bfloat16", "bfloat16"]
    found = fastseq.verify(fast, x)
    data = found.to_dict()
    assert found.ok and data["error"] > 100 * data["eager_error"]
    assert data["allowed"] == 4 * torch.finfo(torch.bfloat16).eps
    assert [step["allowed"] for step in data["steps"]] == [data["allowed"]] * 3
    usual = fastseq.verify(fastseq.optimize(model), x).to_dict()
    assert usual["allowed"] < 1e-5 and usual["ok"]


def test_compute_dtype_in_check_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_CHECK", "1")
    model, x = make([nn.Linear(64, 20), nn.ReLU()], torch.float32), torch.randn(3, 64)
    fast = fastseq.optimize(model, compute_dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)
    assert_was_fused(fast)


def test_compute_dtype_follows_weights() -> None:
    model, x = make([nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 20)], torch.float32), torch.randn(3, 64)
    fast = fastseq.optimize(model, compute_dtype=torch.bfloat16)
    with torch.no_grad():
        before = fast(x)
        fast[2].weight.data.mul_(2), fast[2].bias.data.mul_(2)
        assert torch.equal(fast(x), 2 * before)


# Around it ------------------------------------------------------------------------------------------------------------


@each_dtype
def test_timed_kernels(dtype: torch.dtype) -> None:
    model = make([nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 49, 10)], dtype)
    x = torch.randn(2, 8, 9, 9).to(dtype)
    fast = fastseq.optimize(model, example_input=x)
    with torch.no_grad():
        assert_matches_16_bits(fast(x), model, x)
    assert_was_fused(fast)


@each_dtype
def test_check_mode(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_CHECK", "1")
    model = make([nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 10)], dtype)
    fast, x = fastseq.optimize(model), torch.randn(2, 3, 9, 9).to(dtype)
    with torch.no_grad():
        assert_matches_16_bits(fast(x), model, x)
    assert_was_fused(fast)


@each_dtype
def test_backend_of_torch_compile(dtype: torch.dtype) -> None:
    model = make([nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 10)], dtype)
    compiled, x = torch.compile(model, backend="fastseq"), torch.randn(2, 3, 9, 9).to(dtype)
    with torch.no_grad():
        assert_matches_16_bits(compiled(x), model, x)


def test_large_results_are_of_the_type() -> None:
    """They come from memory of their own."""
    model = make([nn.Conv2d(1, 40, 3, padding=1)], torch.bfloat16)
    x = torch.randn(2, 1, 150, 150).bfloat16()
    actual = run_fused(model, x)
    assert actual.untyped_storage().nbytes() == actual.numel() * 2 > 1 << 20
    assert_matches_16_bits(actual, model, x)


def test_float64_is_eagers() -> None:
    model = nn.Sequential(nn.Linear(5, 3)).double()
    fast, x = fastseq.optimize(model), torch.randn(2, 5).double()
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
    assert list(fastseq.stats(fast)["fallbacks"]) == [
        "the input is not float32, float16 or bfloat16; fused kernels take those"
    ]
