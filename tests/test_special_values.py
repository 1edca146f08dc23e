"""Values and memory that kernels stumble over.

NaN, infinities, signed zeros, denormals, the edge of float32; views into buffers full of NaN, memory that ends where
the tensor ends, scratch that an earlier call left dirty.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from conftest import run_python
from helpers import (
    ISAS,
    one_thread,  # noqa: F401
    run_fused,
    use_kernels,
)
from torch import Tensor, nn

import fastseq
from fastseq.testing import assert_matches

NAN, INF = float("nan"), float("inf")
FLT_MAX = torch.finfo(torch.float32).max

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 9, 3, padding=1)), (2, 3, 9, 8)),
    "conv2d_relu": (lambda: nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.ReLU()), (2, 3, 9, 8)),
    "conv2d_relu_maxpool2d": (
        lambda: nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        (2, 3, 9, 8),
    ),
    "conv2d_maxpool2d_relu": (
        lambda: nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.MaxPool2d(3, 2, 1), nn.ReLU()),
        (2, 3, 9, 8),
    ),
    "two stages": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 9, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(9, 5, 2, padding=1), nn.MaxPool2d(3, 1)),
        ),
        (2, 2, 12, 13),
    ),
    "maxpool2d": (lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1)), (2, 9, 9, 8)),
    "average": (lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d((2, 3))), (2, 9, 9, 8)),
    "convolution and global average": (
        lambda: nn.Sequential(nn.Conv2d(2, 9, 3), nn.AdaptiveAvgPool2d(1), nn.ReLU(), nn.Flatten(), nn.Linear(9, 5)),
        (3, 2, 8, 7),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(20, 17)), (5, 20)),
    "linear_relu": (lambda: nn.Sequential(nn.Linear(20, 17), nn.ReLU(), nn.Linear(17, 6), nn.ReLU()), (5, 20)),
    "convolution and linear": (
        lambda: nn.Sequential(nn.Conv2d(2, 9, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9 * 6 * 5, 11)),
        (3, 2, 8, 7),
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)
each_isa = pytest.mark.parametrize("isa", ISAS)
each_value = pytest.mark.parametrize("value", [NAN, INF, -INF], ids=["nan", "inf", "-inf"])


def make(name: str) -> tuple[nn.Module, Tensor]:
    layers, shape = MODELS[name]
    return layers().eval(), torch.randn(shape)


def places(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The corners and the middle."""
    return [*product(*({0, size - 1} for size in shape)), tuple(size // 2 for size in shape)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the sign of zero; any NaN equals any other."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(0.0).view(torch.int32), b.nan_to_num(0.0).view(torch.int32)
    )


# NaN and infinities -----------------------------------------------------------------------------------------------


@each_isa
@each_model
@each_value
def test_in_the_input(value: float, name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    model, clean = make(name)
    for place in places(clean.shape):
        x = clean.clone()
        x[place] = value
        assert_matches(run_fused(model, x), model, x)


@each_isa
@each_model
def test_of_both_signs_in_the_input(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """inf - inf is NaN wherever two of them meet in one sum, and a NaN wins every maximum."""
    use_kernels(monkeypatch, isa)
    model, x = make(name)
    x.view(-1)[:: x.numel() // 7] = INF
    x.view(-1)[3 :: x.numel() // 5] = -INF
    x.view(-1)[5 :: x.numel() // 2] = NAN
    assert_matches(run_fused(model, x), model, x)


def without_padding(model: nn.Module) -> nn.Module:
    """Whether 0 of the padding times inf is NaN depends on the engine that eager uses: only the inside is compared."""
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            layer.padding = (0, 0)
    return model


@each_value
@each_model
def test_in_the_weights(name: str, value: float) -> None:
    model, x = make(name)
    without_padding(model)
    weights = [p for p in model.parameters() if p.dim() > 1]
    for weight in weights:
        for place in places(weight.shape):
            before = weight[place].item()
            with torch.no_grad():
                weight[place] = value
                assert_matches(run_fused(model, x), model, x)
                weight[place] = before


@each_value
@each_model
def test_in_the_bias(name: str, value: float) -> None:
    model, x = make(name)
    for bias in (p for p in model.parameters() if p.dim() == 1):
        for place in (0, bias.numel() // 2, -1):
            before = bias[place].item()
            with torch.no_grad():
                bias[place] = value
                assert_matches(run_fused(model, x), model, x)
                bias[place] = before


@pytest.mark.parametrize("order", ["bias", "pool", "relu"])
@each_isa
@each_value
def test_infinite_bias_and_infinite_sums_in_one_window(
    value: float, isa: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pixel that loses the maximum still decides it: inf + -inf is NaN, and NaN wins."""
    use_kernels(monkeypatch, isa)
    conv, pool = nn.Conv2d(1, 9, 1), nn.MaxPool2d(2)
    layers = {"bias": [conv, pool], "pool": [conv, pool, nn.ReLU()], "relu": [conv, nn.ReLU(), pool]}[order]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        conv.weight.fill_(1)
        conv.bias.fill_(value)
    for other in (INF, -INF, NAN):
        x = torch.ones(1, 1, 6, 6)
        for i, (y, column) in enumerate(product((0, 2, 4), (0, 2))):
            x[0, 0, y + i % 2, column + i // 3] = other
        assert_matches(run_fused(model, x), model, x)


@each_isa
@pytest.mark.parametrize("pool", [(2, 2), (3, 2, 1), (3, 1, 1), (2, 1)], ids=str)
def test_windows_of_minus_infinity(pool: tuple[int, ...], isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    x = torch.full((1, 9, 7, 8), -INF)
    x[0, :3, 3:, 5:] = 1.0
    x[0, 2, 0, 0] = NAN
    for layers in ([nn.MaxPool2d(*pool)], [nn.MaxPool2d(*pool), nn.ReLU()]):
        for format in (torch.contiguous_format, torch.channels_last):
            model = nn.Sequential(*layers).eval()
            shaped = x.to(memory_format=format)
            with torch.no_grad():
                assert same_bits(run_fused(model, shaped), model(shaped))


# Zeros, denormals, the edge ---------------------------------------------------------------------------------------


@each_isa
@pytest.mark.parametrize("pool", [(2, 2), (3, 2, 1), (3, 1, 1), (1, 1)], ids=str)
def test_signed_zeros_through_a_pool(pool: tuple[int, ...], isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal values: the first in the window stays, as in eager."""
    use_kernels(monkeypatch, isa)
    x = torch.where(torch.rand(2, 19, 9, 8) < 0.5, -0.0, 0.0)
    for layers in ([nn.MaxPool2d(*pool)], [nn.MaxPool2d(*pool), nn.ReLU()]):
        model = nn.Sequential(*layers).eval()
        with torch.no_grad():
            assert same_bits(run_fused(model, x), model(x))


@each_isa
def test_signed_zeros_through_relu(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ReLU keeps -0.0. The sign that a sum of zeros has is not compared: eager's own depends on the batch size."""
    use_kernels(monkeypatch, isa)
    for layer, shape in ((nn.Linear(3, 9), (5, 3)), (nn.Conv2d(3, 9, 1), (2, 3, 4, 4))):
        nn.init.constant_(layer.weight, -0.5)
        nn.init.constant_(layer.bias, -0.0)
        # The product of the last vanishes below zero; with a fused multiply-add its sign comes through.
        for value in (0.0, -0.0, 1e-45):
            x = torch.full(shape, value)
            zeros = run_fused(nn.Sequential(layer), x)
            assert not zeros.any()
            assert same_bits(run_fused(nn.Sequential(layer, nn.ReLU()), x), zeros)


@each_isa
def test_denormals_are_kept(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    tiny = torch.tensor([1e-45, 1e-40, 1.1e-38, -1e-42, 3e-39, 0.0, 1.0, -1e-38])
    identity = nn.Linear(8, 8, bias=False)
    one = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.eye_(identity.weight)
    nn.init.ones_(one.weight)
    for layer, x in (
        (identity, tiny.expand(3, 8)),
        (one, tiny.view(1, 1, 2, 4)),
        (nn.MaxPool2d(1), tiny.view(1, 8, 1, 1)),
    ):
        model = nn.Sequential(layer).eval()
        assert torch.equal(run_fused(model, x), x)


@each_isa
@each_model
def test_large_values(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the largest float32 the sums stay finite, or every order of summation overflows."""
    use_kernels(monkeypatch, isa)
    model, x = make(name)
    for p in model.parameters():
        nn.init.constant_(p, 2.0**-10 if p.dim() > 1 else 0.0)
    for scale in (0.9, -0.9):
        huge = torch.full_like(x, scale * FLT_MAX)
        assert_matches(run_fused(model, huge), model, huge)
    for p in model.parameters():
        nn.init.constant_(p, 1.0)
    huge = torch.full_like(x, 0.9 * FLT_MAX)
    assert_matches(run_fused(model, huge), model, huge)


# Memory -----------------------------------------------------------------------------------------------------------


def misaligned(x: Tensor) -> Tensor:
    """The same values one element behind the start of a NaN-filled buffer, with NaN behind them too."""
    buffer = torch.full((x.numel() + 65,), NAN)
    view = buffer[1 : x.numel() + 1].view(x.shape)
    return view.copy_(x)


def cropped(x: Tensor) -> Tensor:
    """The same values inside a larger tensor of NaN: one more on each side in every dimension."""
    buffer = torch.full([size + 2 for size in x.shape], NAN)
    view = buffer[tuple(slice(1, size + 1) for size in x.shape)]
    return view.copy_(x)


def cropped_channels_last(x: Tensor) -> Tensor:
    """As `cropped`; an image in a channels_last buffer with more channels."""
    if x.dim() != 4:
        return cropped(x)
    buffer = torch.full([size + 2 for size in x.shape], NAN).to(memory_format=torch.channels_last)
    view = buffer[tuple(slice(1, size + 1) for size in x.shape)]
    return view.copy_(x)


def channels_last(x: Tensor) -> Tensor:
    """As `misaligned`, in channels_last order."""
    return misaligned(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2) if x.dim() == 4 else misaligned(x)


@each_isa
@pytest.mark.parametrize("place", [misaligned, cropped, cropped_channels_last, channels_last])
@each_model
def test_what_surrounds_the_input_does_not_matter(
    name: str, place: Callable[[Tensor], Tensor], isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernels(monkeypatch, isa)
    model, x = make(name)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        assert torch.equal(fused(place(x)), fused(x))


@each_model
def test_what_surrounds_the_parameters_does_not_matter(name: str) -> None:
    model, x = make(name)
    expected = run_fused(model, x)
    for p in model.parameters():
        p.data = misaligned(p.data)
    assert torch.equal(run_fused(model, x), expected)


@each_isa
@each_model
def test_output_is_fresh_memory_of_its_own(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    model, x = make(name)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        first, second = fused(x), fused(x)
    storages = {t.untyped_storage().data_ptr() for t in (first, second, x, *fused.parameters())}
    assert len(storages) == 3 + len(list(fused.parameters()))
    for output in (first, second):
        assert output.storage_offset() == 0
        assert output.untyped_storage().nbytes() == output.numel() * output.element_size()
    kept = second.clone()
    first.fill_(NAN)
    with torch.no_grad():
        assert torch.equal(fused(x), kept)
    assert torch.equal(second, kept)


SCRATCH = {
    **{name: make for name, (make, _) in MODELS.items()},
    # The scratch of the convolution and the features that the Linear reads are of one size here.
    "features as large as the map": lambda: nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 4096))
    ),
}


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("name", SCRATCH)
def test_an_earlier_call_leaves_nothing_behind(name: str, threads: int) -> None:
    """Scratch is used again: the border around a map must still be zero, and no NaN of another call be left in it."""
    torch.set_num_threads(threads)
    model = SCRATCH[name]().eval()
    shape = MODELS[name][1] if name in MODELS else (1, 1, 8, 8)
    fused = fastseq.optimize(model)
    x = torch.randn(9, *shape[1:])
    with torch.no_grad():
        expected = [run_fused(model, x[:batch]) for batch in range(1, 10)]
        for batch in (1, 2, 9, 1, 5, 3, 9, 4, 1, 1):
            assert torch.equal(fused(x[:batch]), expected[batch - 1]), f"batch {batch}"
            fused(torch.full_like(x[:batch], NAN))


GUARDED = """
import ctypes, mmap
import torch
from torch import nn
import fastseq

libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
keep = []

def guarded(x, at_end):
    # The tensor ends right before, or starts right behind, a page that must not be touched.
    nbytes = x.numel() * 4
    pages = -(-nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    keep.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(start + page * PAGE), PAGE, 0) == 0
    offset = PAGE + (pages * PAGE - nbytes if at_end else 0)
    flat = torch.frombuffer(memory, dtype=torch.float32, count=x.numel(), offset=offset)
    return flat.view(x.shape).copy_(x)

def check(model, x):
    model.eval()
    with torch.no_grad():
        expected = fastseq.optimize(model)(x)
        for at_end in (True, False):
            fused = fastseq.optimize(model)
            for p in fused.parameters():
                p.data = guarded(p.data, at_end)
            assert torch.equal(fused(guarded(x, at_end)), expected)
            if x.dim() == 4:
                pixels = guarded(x.permute(0, 2, 3, 1).contiguous(), at_end).permute(0, 3, 1, 2)
                assert torch.equal(fused(pixels), expected)
            assert fastseq.stats(fused)["fused_calls"] > 0 and not fastseq.stats(fused)["fallbacks"]

for channels in (1, 3, 5, 8, 9, 16, 17):
    for size in ((5, 7), (8, 8), (1, 9)):
        x = torch.randn(2, channels, *size)
        check(nn.Sequential(nn.MaxPool2d(3, 2, 1)), x)
        check(nn.Sequential(nn.Conv2d(channels, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)), x)
        check(nn.Sequential(nn.Conv2d(channels, 9, 1)), x)
        features = 9 * size[0] * (size[1] - 2)
        check(nn.Sequential(nn.Conv2d(channels, 9, (1, 3), bias=False), nn.Flatten(), nn.Linear(features, 5)), x)
    for rows in (1, 2, 5, 13):
        check(nn.Sequential(nn.Linear(channels, 7), nn.ReLU(), nn.Linear(7, channels)), torch.randn(rows, channels))
# More than a fingerprint reads whole.
check(nn.Sequential(nn.Linear(131, 257)), torch.randn(3, 131))
print("everything stayed inside")
"""


@each_isa
def test_nothing_outside_the_tensors_is_read_or_written(isa: str) -> None:
    """Inputs, weights and biases stand at the edge of pages that fault, in a process of its own, which may die.

    Where glibc's checking malloc is installed, a write behind an output ends that process as well.
    """
    checking = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
    done = run_python("-c", GUARDED, FASTSEQ_ISA=isa, OMP_NUM_THREADS="1", **checking)
    assert (done.returncode, done.stdout) == (0, "everything stayed inside\n"), done.stderr
