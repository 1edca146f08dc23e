"""The planner, on devices that need not be there."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from fastseq import cuda
from fastseq.testing import MODELS

H200 = cuda.DEVICES["H200"]
each_device = pytest.mark.parametrize("device", cuda.DEVICES.values(), ids=list(cuda.DEVICES))


def plan(layers: nn.Module, *shape: int, device: cuda.Device = H200, dtype: Any = torch.float32, **options: Any) -> Any:
    (made,) = cuda.plan(layers.to(dtype), torch.empty(shape, dtype=dtype, device="meta"), device, **options)
    return made


def kernels(made: Any) -> list[str]:
    return [launch["kernel"] for launch in made["launches"]]


def test_the_compiled_kernels_have_unique_names() -> None:
    names = [kernel["name"] for kernel in cuda.kernels()]
    assert len(names) == len(set(names))
    assert {kernel["op"] for kernel in cuda.kernels()} == {
        "conv2d",
        "maxpool2d",
        "tiny_mlp",
        "fused_mlp",
        "skinny_linear",
    }
    assert {kernel["math"] for kernel in cuda.kernels()} == {"f32", "tf32", "f16", "bf16"}


def random_network(source: random.Random) -> tuple[nn.Sequential, tuple[int, ...]]:
    c, size = source.choice([1, 3, 8, 20]), source.randint(70, 90)
    shape = (source.choice([1, 2, 7, 64]), c, size, size)
    layers: list[nn.Module] = []
    with torch.device("meta"):
        for _ in range(source.randint(1, 5)):
            c_out, k = source.choice([3, 16, 30, 64, 130]), source.choice([1, 3, 5])
            layers += [nn.Conv2d(c, c_out, k, padding=k // 2, stride=source.choice([1, 1, 2]))]
            layers += [nn.ReLU()] if source.random() < 0.8 else []
            pools = (nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(5, 1, 2), nn.MaxPool2d(2, ceil_mode=True))
            layers += [source.choice(pools)] if source.random() < 0.4 else []
            c = c_out
        if source.random() < 0.5:
            features = nn.Sequential(*layers)(torch.empty(shape)).flatten(1).shape[1]
            layers += [
                nn.Flatten(),
                nn.Linear(features, 64),
                nn.ReLU(),
                nn.Linear(64, 700),
                nn.ReLU(),
                nn.Linear(700, 10),
            ]
        return nn.Sequential(*layers), shape


@each_device
def test_launches_suit_the_device(device: cuda.Device) -> None:
    arch = 10 * device.major + device.minor
    source = random.Random(0)
    for _ in range(60):
        model, shape = random_network(source)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            made = plan(model, *shape, device=device, dtype=dtype)
            if dtype is torch.bfloat16 and arch < 80:
                assert "bfloat16" in made["refused"]
                continue
            for launch in made["launches"]:
                assert launch.get("min_arch", 0) <= arch
                assert launch.get("shared_bytes", 0) <= device.shared_bytes_per_block
                assert ("tf32" in launch["kernel"]) <= (arch >= 80)


def test_every_launch_reads_what_was_written_last() -> None:
    """The input, the library's result, or an arena slot that the launch before has written and nothing has since."""
    source = random.Random(1)
    for _ in range(150):
        model, shape = random_network(source)
        made = plan(model, *shape, trusts_cudnn_relu=source.random() < 0.5)
        launches = made["launches"]
        assert launches[0]["src"] == "input" and launches[-1]["dst"] in ("output", "library")
        for before, after in zip(launches, launches[1:], strict=False):
            assert (after["src"], after["src_offset"]) == (before["dst"], before["dst_offset"])
            assert (after["src"], after["src_offset"]) != (after["dst"], after["dst_offset"]) or after[
                "src"
            ] == "library"
        needed = [launch["packed"] for launch in launches[: made["packing_launch"] + 1] if launch["packed"] >= 0]
        assert all(pack < made["packs_before"] for pack in needed)


def test_the_seed_networks() -> None:
    assert kernels(plan(MODELS["seed2"].build(), 32, 128)) == ["tiny_mlp_f32__ffma_1"]
    assert len(kernels(plan(MODELS["seed1"].build(), 1, 1, 28, 28))) == 2
    assert len(kernels(plan(MODELS["lenet5"].build(), 256, 1, 28, 28))) == 3
    large = kernels(plan(MODELS["seed1"].build(), 64, 1, 28, 28))
    assert large == ["conv2d_tf32__mma_128x32_gather", "conv2d_tf32__mma_128x64_vector"]


def test_the_first_convolution_packs_for_the_later_ones() -> None:
    made = plan(MODELS["seed1"].build(), 1, 1, 28, 28)
    assert (made["packing_launch"], made["packs_before"], len(made["packs"])) == (0, 0, 1)
    last = plan(nn.Sequential(nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last), 1, 8, 9, 9)
    assert not last["packs"] or last["packs_before"] == len(last["packs"])


def test_flags_choose_the_arithmetic() -> None:
    model = MODELS["seed1"].build()
    assert all("tf32" in kernel for kernel in kernels(plan(model, 64, 1, 28, 28)))
    assert all("_f32__ffma" in kernel for kernel in kernels(plan(model, 64, 1, 28, 28, allows_tf32_conv=False)))
    assert all("_f32__ffma" in k for k in kernels(plan(model, 64, 1, 28, 28, device=cuda.DEVICES["T4"])))


def test_pools() -> None:
    def modes(pool: nn.Module, size: int = 24) -> list[str]:
        made = plan(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), pool), 4, 3, size, size)
        return [launch.get("pool", launch["kind"]) for launch in made["launches"]]

    assert modes(nn.MaxPool2d(2)) == ["registers"]
    assert modes(nn.MaxPool2d(2), 23) == ["registers"]
    assert modes(nn.MaxPool2d(2, ceil_mode=True), 23) == ["shared"]
    assert modes(nn.MaxPool2d(3, 2)) == ["shared"]
    assert modes(nn.MaxPool2d(2, 2, 1)) == ["shared"]
    assert modes(nn.MaxPool2d(15)) == ["none", "pool"]


def test_linears() -> None:
    wide = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU())
    assert kernels(plan(wide, 1, 4096))[0].startswith("skinny_linear")
    assert kernels(plan(wide, 16, 4096))[0].startswith("skinny_linear")
    assert kernels(plan(wide, 64, 4096)) == ["_addmm_activation"]
    assert kernels(plan(wide, 64, 4096, allows_cublas=False))[0].startswith("conv2d_f32")
    narrow = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.ReLU())])
    assert len(kernels(plan(narrow, 65536, 64))) == 1
    assert kernels(plan(narrow, 65536, 64))[0].startswith("fused_mlp_f32")
    assert kernels(plan(narrow, 65536, 64, dtype=torch.bfloat16))[0].startswith("fused_mlp_bf16")
    long = nn.Sequential(*[nn.Linear(16, 16) for _ in range(19)])
    assert [launch["layers"] for launch in plan(long, 4, 16)["launches"]] == [8, 8, 3]


def test_norms_and_activations() -> None:
    """In the same launches as ReLU, but for chains with many rows."""
    block = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.SiLU(), nn.MaxPool2d(2)).eval()
    assert [launch["pool"] for launch in plan(block, 4, 16, 24, 24)["launches"]] == ["registers"]
    assert [launch["kind"] for launch in plan(block, 4, 16, 24, 24)["launches"]] == ["conv"]
    halo = nn.Sequential(nn.Conv2d(3, 16, 3), nn.MaxPool2d(15), nn.GELU())
    assert [launch["kind"] for launch in plan(halo, 4, 3, 24, 24)["launches"]] == ["conv", "pool"]
    chain = nn.Sequential(
        *[layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.GELU())]
    ).eval()
    assert [k.split("__")[0] for k in kernels(plan(chain, 16, 64))] == ["tiny_mlp_f32"]
    assert [k.split("__")[0] for k in kernels(plan(chain, 65536, 64))] == ["conv2d_f32"] * 3
    tail = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    assert [k.split("_f32")[0] for k in kernels(plan(tail, 65536, 64))] == ["conv2d", "fused_mlp"]
    own = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4), nn.ELU(), nn.Tanh()
    )
    assert [launch["kind"] for launch in plan(own.eval(), 2, 3, 4, 4)["launches"]] == ["conv", "pool", "chain", "pool"]
    wide = nn.Sequential(nn.Linear(4096, 4096), nn.GELU())
    assert [launch["kind"] for launch in plan(wide, 64, 4096)["launches"]] == ["cublas", "pool"]
    assert kernels(plan(wide, 4, 4096))[0].startswith("skinny_linear")


def test_notes_say_why() -> None:
    def notes(model: nn.Module, *shape: int) -> list[str]:
        return [step["note"] for step in plan(model, *shape)["steps"]]

    assert notes(MODELS["seed1"].build(), 1, 1, 28, 28) == [f"{n} blocks on 132 multiprocessors" for n in (18, 26)]
    assert notes(MODELS["seed2"].build(), 32, 128) == ["2 layers in one launch"] * 2
    assert notes(nn.Sequential(nn.Linear(4096, 4096)), 1, 4096) == ["few rows: a stream of weights"]
    assert notes(nn.Sequential(nn.Linear(4096, 4096)), 64, 4096) == ["handed to cuBLAS: 64x4096x4096"]
    assert notes(nn.Sequential(nn.Conv2d(128, 64, 3)), 4, 128, 40, 40) == ["handed to cuDNN: 1152 products a sum"]
    (halo,) = notes(nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(15)), 1, 3, 40, 40)
    assert halo.endswith("pooled in a launch of its own, a block's halo would be too large")


def test_refusals_say_why() -> None:
    assert "up to 11x11" in plan(nn.Sequential(nn.Conv2d(1, 1, 12)), 1, 1, 20, 20)["refused"]
    with pytest.raises(RuntimeError):
        plan(nn.Sequential(nn.Conv2d(3, 1, 3)), 1, 2, 9, 9)  # eager's own, from the trace


def test_forced_kernels() -> None:
    model = MODELS["seed1"].build()
    for kernel in ("128x64", "128x32", "32x32"):
        assert all(kernel in name for name in kernels(plan(model, 1, 1, 28, 28, kernel=kernel)))
    chain = nn.Sequential(nn.Linear(50, 64), nn.ReLU(), nn.Linear(64, 10))
    for row in cuda.kernels():
        if row["op"] in ("tiny_mlp", "fused_mlp") and row["math"] == "f32":
            assert kernels(plan(chain, 32, 50, kernel=row["name"])) == [row["name"]]
