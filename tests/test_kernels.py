"""Walks the list of kernels: each one this CPU runs is forced, named in the report, exact at its tails (or near),
and gives the bits of every other tile of its instruction set, whatever the batch size and the number of threads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import (
    ISAS,
    WINOGRAD_LARGEST,
    assert_exact,
    assert_was_fused,
    integer_model,
    integers,
    kernels_used,
    one_thread,  # noqa: F401
    run_fused,
    use_kernels,
)
from torch import Tensor, nn

import fastseq
from fastseq.testing import assert_matches

KERNELS = [row for row in fastseq.kernels() if row["dtype"] == "f32"]  # test_bfloat16.py has the others
OPS = sorted({row["op"] for row in KERNELS})

# Operations of which an instruction set has one kernel, for any number of channels.
ONE_TILE = (
    *("avgpool2d", "conv2d_depthwise", "conv2d_grouped", "conv2d_plane", "groupnorm", "layernorm", "logsoftmax"),
    *("maxpool2d", "scale", "softmax", "upsamplebilinear2d"),
)
# Those that round where sums of integers would be exact.
ROUNDING = ("conv2d_winograd", "groupnorm", "layernorm", "logsoftmax", "softmax")

each_kernel = pytest.mark.parametrize("row", KERNELS, ids=[row["name"] for row in KERNELS])
each_isa = pytest.mark.parametrize("isa", ISAS)


@pytest.fixture
def kernel(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The row, its kernel forced for the plans of this test."""
    if not row["supported"]:
        pytest.skip(f"this CPU cannot run {row['name']}")
    use_kernels(monkeypatch, row["isa"], row["name"])
    return row


def width(row: dict[str, Any]) -> int:
    """Output channels of the tile."""
    return int(row["name"].rpartition("x")[2])


def around(size: int) -> list[int]:
    """1, one below, at and above a tile, the same for two tiles, and a prime."""
    return sorted({1, size - 1, size, size + 1, 2 * size - 1, 2 * size + 1, 37} - {0})


def layers_for(op: str, channels: int, k: int = 3) -> list[nn.Module]:
    """A layer or two that this op computes, with `channels` outputs; k: input channels or features."""
    return {
        "conv2d": lambda: [nn.Conv2d(k, channels, (1, 3))],
        "conv2d_maxpool2d": lambda: [nn.Conv2d(k, channels, (1, 3)), nn.MaxPool2d(2)],
        # With one channel there is one group, and that is a convolution like any other.
        "conv2d_depthwise": lambda: [nn.Conv2d(channels + 1, channels + 1, (1, 3), groups=channels + 1)],
        "conv2d_grouped": lambda: [nn.Conv2d(channels + 1, 2 * channels + 2, (1, 3), groups=channels + 1)],
        "conv2d_plane": lambda: [nn.Conv2d(1, channels, (1, 3))],
        "conv2d_winograd": lambda: [nn.Conv2d(k, channels, 3)],
        "linear": lambda: [nn.Linear(k, channels)],
        "linear_in_place": lambda: [nn.Linear(k, channels)],
        "maxpool2d": lambda: [nn.MaxPool2d(3, 2, 1)],
        "avgpool2d": lambda: [nn.AvgPool2d(3, 2, 1)],
        "scale": lambda: [nn.MaxPool2d(1), nn.Hardtanh(-3, 3), nn.LeakyReLU(2.0)],
        "groupnorm": lambda: [nn.MaxPool2d(1), nn.GroupNorm(1, channels)],
        "layernorm": lambda: [nn.Linear(k, channels), nn.LayerNorm(channels)],
        "softmax": lambda: [nn.Linear(k, channels), nn.Softmax(1)],
        "logsoftmax": lambda: [nn.Linear(k, channels), nn.LogSoftmax(1)],
        # By weights of halves and quarters.
        "upsamplebilinear2d": lambda: [nn.MaxPool2d(1), nn.Upsample(scale_factor=(1, 2), mode="bilinear")],
    }[op]()


def shapes_for(op: str, rows: int, channels: int, k: int = 3) -> list[tuple[int, ...]]:
    """Inputs with `rows` rows for the op's tiles (pixels, windows of 2x2 pixels), in one block and in several."""
    return {
        "conv2d": [(1, k, 1, rows + 2), (2, k, 5, rows + 2), (1, k, rows, 3)],
        "conv2d_maxpool2d": [(1, k, 2, 2 * rows + 2), (2, k, 7, 2 * rows + 3), (1, k, 2 * rows, 4)],
        **dict.fromkeys(
            ("conv2d_depthwise", "conv2d_grouped"),
            [(1, channels + 1, 1, rows + 2), (2, channels + 1, 5, rows + 2), (1, channels + 1, rows, 3)],
        ),
        "conv2d_plane": [(1, 1, 1, rows + 2), (2, 1, 5, rows + 2), (1, 1, rows, 3)],
        "conv2d_winograd": [(1, k, 6, 4 * rows + 2), (2, k, 7, 2 * rows + 5)],
        "linear": [(rows, k)],
        "linear_in_place": [(rows, k)],
        "maxpool2d": [(1, channels, 1, rows), (2, channels, 5, rows)],
        "avgpool2d": [(1, channels, 1, rows), (2, channels, 5, rows)],
        "scale": [(1, channels, 1, rows), (2, channels, 5, rows)],
        "groupnorm": [(1, channels, 1, rows + 1), (2, channels, 5, rows)],
        **dict.fromkeys(("layernorm", "softmax", "logsoftmax"), [(rows, k)]),
        "upsamplebilinear2d": [(1, channels, 1, rows), (2, channels, 5, rows)],
    }[op]


def test_list() -> None:
    names = [row["name"] for row in KERNELS]
    assert len(set(names)) == len(names)
    assert OPS == [
        "avgpool2d",
        "conv2d",
        "conv2d_depthwise",
        "conv2d_grouped",
        "conv2d_maxpool2d",
        "conv2d_plane",
        "conv2d_winograd",
        "groupnorm",
        "layernorm",
        "linear",
        "linear_in_place",
        "logsoftmax",
        "maxpool2d",
        "scale",
        "softmax",
        "upsamplebilinear2d",
    ]
    for row in KERNELS:
        lanes = width(row) // row["vectors"]
        assert row["name"] == f"{row['op']}_f32__{row['isa']}_{row['rows']}x{row['vectors'] * lanes}"
    portable = [row for row in KERNELS if row["isa"] == "portable"]
    assert {row["op"] for row in portable} == set(OPS)
    assert all(row["supported"] and not row["test_only"] for row in portable)
    assert {row["isa"] for row in KERNELS if row["test_only"]} == {"emulated512"}


def test_isas_are_listed_best_first_and_the_best_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    order = [isa for isa in ("avx512", "avx2", "portable", "emulated512") if isa in {row["isa"] for row in KERNELS}]
    assert list(dict.fromkeys(row["isa"] for row in KERNELS)) == order
    monkeypatch.delenv("FASTSEQ_ISA", raising=False)
    assert fastseq.isa() == ISAS[0]
    for isa in ISAS:
        monkeypatch.setenv("FASTSEQ_ISA", isa)
        assert fastseq.isa() == isa


def test_emulated_tiles_are_those_of_avx512() -> None:
    tiles = {
        isa: [(row["op"], row["rows"], row["vectors"]) for row in KERNELS if row["isa"] == isa]
        for isa in ("avx512", "emulated512")
    }
    assert tiles["emulated512"]
    assert tiles["avx512"] in (tiles["emulated512"], [])


@each_kernel
def test_exact_at_the_tails(kernel: dict[str, Any]) -> None:
    op, lanes = kernel["op"], width(kernel) // kernel["vectors"]
    rounds = op in ROUNDING
    largest = WINOGRAD_LARGEST if op == "conv2d_winograd" else None
    rows = {"conv2d_maxpool2d": kernel["rows"] // 4, "conv2d_plane": width(kernel)}.get(op, kernel["rows"])
    for channels in sorted({*around(width(kernel)), lanes + 1}):
        model = nn.Sequential(*layers_for(op, channels, 16)) if rounds else integer_model(*layers_for(op, channels))
        fused = fastseq.optimize(model.eval())
        for count in around(rows):
            for shape in shapes_for(op, count, channels, 16 if rounds else 3):
                # Several, as eager's worst error of a small tensor may be near nothing by luck.
                inputs = [torch.randn(shape) for _ in range(4)] if rounds else [integers(*shape)]
                with torch.no_grad():
                    actual, x = torch.cat([fused(x) for x in inputs]), torch.cat(inputs)
                if rounds:
                    assert_matches(actual, model, x, largest_factor=largest)
                else:
                    assert_exact(actual, model, x)
        assert_was_fused(fused)
        name = kernels_used(fused)[-1]
        assert name.startswith(f"{op}_f32__{kernel['isa']}_")
        # Fewer channels take a narrower tile, more may be cut into others: these two fill exactly one of this width.
        if op in ONE_TILE or channels in (width(kernel) - 1, width(kernel)):
            assert name == kernel["name"]


@each_kernel
@pytest.mark.parametrize("k", [1, 37, 700], ids="k{}".format)
def test_error_is_that_of_float32(kernel: dict[str, Any], k: int) -> None:
    """k = 700: the sum is taken in parts."""
    channels = width(kernel) + 1
    for relu in ([], [nn.ReLU()]):
        model = nn.Sequential(*layers_for(kernel["op"], channels, k), *relu).eval()
        x = torch.randn(shapes_for(kernel["op"], kernel["rows"] + 1, channels, k)[0])
        largest = WINOGRAD_LARGEST if kernel["op"] == "conv2d_winograd" else None
        assert_matches(run_fused(model, x), model, x, largest_factor=largest)


@each_kernel
def test_bits_do_not_depend_on_the_batch_size(kernel: dict[str, Any]) -> None:
    channels = 2 * width(kernel) + 3
    model = nn.Sequential(*layers_for(kernel["op"], channels, k=600)).eval()
    rows, *rest = shapes_for(kernel["op"], 3, channels, k=600)[0]
    rows = 50 if kernel["op"].startswith("linear") else 7
    fused = fastseq.optimize(model)
    x = torch.randn(rows, *rest)
    with torch.no_grad():
        whole = fused(x)
        for size in (1, 2, 3, 5, 13):
            parts = torch.cat([fused(part) for part in x.split(size)])
            assert torch.equal(parts, whole), f"batches of {size}"
    assert_was_fused(fused)


@each_isa
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_the_tile(isa: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (75,) if op in ("conv2d_depthwise", "conv2d_grouped", "groupnorm") else (5, 75)
    models = [nn.Sequential(*layers_for(op, channels, k=600)).eval() for channels in sizes]
    inputs = [torch.randn(shape) for shape in shapes_for(op, 9, 75 if len(sizes) == 1 else 600, k=600)]
    results: dict[str, list[Tensor]] = {}
    for row in KERNELS:
        if (row["isa"], row["op"]) == (isa, op):
            use_kernels(monkeypatch, isa, row["name"])
            results[row["name"]] = [run_fused(model, x) for model in models for x in inputs]
    assert len(results) > 1 or op in (*ONE_TILE, "linear_in_place")
    first = next(iter(results.values()))
    for name, result in results.items():
        assert all(map(torch.equal, result, first)), name


NETWORKS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "convolutions": (
        [nn.Conv2d(3, 20, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 33, 3), nn.MaxPool2d(3, 2)],
        (7, 3, 30, 30),
    ),
    "convolution and linear": ([nn.Conv2d(2, 17, 5), nn.ReLU(), nn.Flatten(), nn.Linear(17 * 64, 65)], (50, 2, 12, 12)),
    "linear": ([nn.Linear(600, 200), nn.ReLU(), nn.Linear(200, 33), nn.ReLU(), nn.Linear(33, 7)], (97, 600)),
}


@each_isa
@pytest.mark.parametrize("name", NETWORKS)
def test_bits_do_not_depend_on_the_threads(isa: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    layers, shape = NETWORKS[name]
    model = nn.Sequential(*layers).eval()
    fused = fastseq.optimize(model)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.set_num_threads(1)
        serial = fused(x)
        assert_matches(serial, model, x)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(fused(x), serial), f"{threads} threads"
            assert torch.equal(fused(x[:1]), serial[:1]), f"{threads} threads, batch 1"
    assert_was_fused(fused)


@each_isa
@pytest.mark.parametrize("name", NETWORKS)
def test_every_isa_is_as_accurate_as_eager(isa: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    layers, shape = NETWORKS[name]
    model = nn.Sequential(*layers).eval()
    fused = fastseq.optimize(model)
    x = torch.randn(math.ceil(shape[0] / 4), *shape[1:])
    with torch.no_grad():
        assert_matches(fused(x), model, x)
    assert all(f"__{isa}_" in used for used in kernels_used(fused))


def test_a_kernel_of_another_op_or_isa_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(20, 40)).eval()
    x = torch.randn(5, 20)
    use_kernels(monkeypatch, "portable")
    usual = fastseq.optimize(model)
    with torch.no_grad():
        usual(x)
    for other in ("conv2d_f32__portable_6x8", "linear_f32__avx2_6x16", "no such kernel"):
        use_kernels(monkeypatch, "portable", other)
        fused = fastseq.optimize(model)
        with torch.no_grad():
            fused(x)
        assert kernels_used(fused) == kernels_used(usual)
