"""LayerNorm as a step of rows, GroupNorm as one of images: by the mean and variance of what comes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ISAS,
    assert_eagers_error,
    assert_rounds_as_eager,
    assert_same_bits_however_called,
    kernels_used,
    one_thread,  # noqa: F401
    run_fused,
    run_on_threads,
    runs_of_graph,
    use_kernels,
)
from torch import Tensor, nn

import fastseq
from fastseq.testing import assert_matches

IMAGE, ROWS, LINE = (5, 3, 11, 12), (70, 20), (5, 3, 25)
# Models, an input's shape, and how many steps there are.
MODELS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...], int]] = {
    "linear norm": (lambda: [nn.Linear(20, 33), nn.LayerNorm(33)], ROWS, 2),
    "mixer block": (
        lambda: [nn.LayerNorm(20), nn.Linear(20, 40), nn.GELU(), nn.Linear(40, 20)],
        (6, 5, 20),
        3,
    ),
    "norms everywhere": (
        lambda: [
            *(nn.Linear(20, 17), nn.LayerNorm(17, bias=False), nn.SiLU(), nn.Linear(17, 30), nn.ReLU()),
            *(nn.LayerNorm(30, elementwise_affine=False), nn.Linear(30, 6), nn.LayerNorm(6, eps=0.1), nn.ReLU()),
        ],
        ROWS,
        6,
    ),
    "norm of a map's features": (
        lambda: [nn.Conv2d(3, 5, 3), nn.Flatten(), nn.LayerNorm(5 * 90), nn.Tanh(), nn.Linear(450, 7)],
        IMAGE,
        3,
    ),
    "norm of a flattened input": (lambda: [nn.Flatten(), nn.LayerNorm(396), nn.Linear(396, 7)], IMAGE, 2),
    "wide norm": (lambda: [nn.Linear(20, 1201), nn.LayerNorm(1201)], ROWS, 2),
    "norm of one feature": (lambda: [nn.Linear(20, 1), nn.LayerNorm(1), nn.PReLU()], ROWS, 2),
    "conv group": (lambda: [nn.Conv2d(3, 18, 3, padding=1), nn.GroupNorm(6, 18), nn.ReLU()], IMAGE, 2),
    "group first, groups of one channel": (
        lambda: [nn.GroupNorm(3, 3), nn.SiLU(), nn.Conv2d(3, 17, 3), nn.GroupNorm(1, 17, affine=False)],
        IMAGE,
        3,
    ),
    "groups between": (
        lambda: [
            *(nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(32, 32)),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(2, 32, eps=0.1), nn.PReLU(32), nn.Flatten()),
            nn.Linear(32 * 30, 7),
        ],
        IMAGE,
        7,
    ),
    "groups of one dimension": (
        lambda: [nn.Conv1d(3, 18, 5), nn.GroupNorm(3, 18), nn.ReLU(), nn.MaxPool1d(2), nn.GroupNorm(2, 18)],
        LINE,
        4,
    ),
    "many channels": (lambda: [nn.Conv2d(3, 530, 1), nn.GroupNorm(5, 530)], (2, 3, 4, 5), 2),
}
each_model = pytest.mark.parametrize("name", MODELS)
each_isa = pytest.mark.parametrize("isa", ISAS)


def make(name: str) -> tuple[nn.Sequential, Tensor]:
    layers, shape, _ = MODELS[name]
    model = nn.Sequential(*layers()).eval()
    with torch.no_grad():
        for layer in norms(model):
            for parameter in layer.parameters():
                parameter.normal_()
    return model, torch.randn(shape)


def norms(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model if isinstance(layer, nn.LayerNorm | nn.GroupNorm)]


def layouts(x: Tensor) -> list[Tensor]:
    if x.dim() == 4:
        return [x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)]
    return [x, torch.stack([x, x], x.dim())[..., 0]] if x.dim() == 2 else [x]


@each_isa
@each_model
def test_as_accurate_as_eager(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, isa)
    model, x = make(name)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        for given in layouts(x):
            assert_matches(fused(given), model, given)
        whole = fused(x)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for batch in (1, 2, 5):
                assert torch.equal(fused(x[:batch]), whole[:batch]), (threads, batch)
    assert not fastseq.stats(fused)["fallbacks"] and fastseq.stats(fused)["eager_calls"] == 0
    assert len(kernels_used(fused)) == MODELS[name][2] and all(f"__{isa}_" in kernel for kernel in kernels_used(fused))


@each_model
def test_special_values(name: str) -> None:
    model, x = make(name)
    for value in (float("nan"), float("inf"), -float("inf")):
        special = x.clone()
        special.view(-1)[x.numel() // 2] = value
        if any(isinstance(layer, nn.Conv2d) and layer.padding != (0, 0) for layer in model):
            special = special.nan_to_num(nan=float("nan"), posinf=3e38, neginf=-3e38)
        assert_matches(run_fused(model, special, winograd="off"), model, special)


@pytest.mark.parametrize("size", [1e-20, 1e-4, 1, 1e15])
@pytest.mark.parametrize("offset", [0, 1e4, -1e7])
def test_numbers_far_from_0_and_of_every_size(offset: float, size: float) -> None:
    """What is left of a large mean is exact; against float64 of the same numbers, since eager's own error is large."""
    for model, x in (
        (nn.Sequential(nn.LayerNorm(101), nn.Linear(101, 101)), torch.randn(9, 101) * size + offset),
        (nn.Sequential(nn.GroupNorm(2, 6), nn.Conv2d(6, 6, 1)), torch.randn(3, 6, 13, 12) * size + offset),
    ):
        with torch.no_grad():
            model[1].bias.zero_()
            model[1].weight.copy_(torch.eye(model[1].weight.shape[0]).view_as(model[1].weight))
        model.eval()
        assert_matches(run_fused(model, x), model, x)
        exact = model.double()(x.double()).detach()
        # Equal numbers, whose deviation is the root of eps, show what the second mean has lost 300 times as large.
        assert (run_fused(model.float(), x).double() - exact).abs().max() <= (1e-5 if size >= 1 else 1e-4)


def test_same_bits_of_images() -> None:
    for name in ("groups between", "group first, groups of one channel"):
        model, x = make(name)
        assert_same_bits_however_called(fastseq.optimize(model), torch.cat([x, x.flip(0)])[:7])


def test_a_large_map_on_several_threads() -> None:
    model = nn.Sequential(nn.MaxPool2d(2, 1), nn.GroupNorm(11, 33), nn.SiLU(), nn.AvgPool2d(2)).eval()
    for batch in (1, 3):
        x = torch.randn(batch, 33, 113, 112)
        assert_matches(run_on_threads(fastseq.optimize(model), x), model, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_model
def test_16_bit_models(name: str, dtype: torch.dtype) -> None:
    assert_rounds_as_eager(*make(name), dtype)


@pytest.mark.parametrize("name", ["mixer block", "linear norm", "groups between", "norm of a map's features"])
def test_weights_and_eps_stay_live(name: str) -> None:
    model, x = make(name)
    fused = fastseq.optimize(model)
    changes: list[Callable[[nn.Module], object]] = [
        lambda norm: norm.weight.data.neg_(),
        lambda norm: norm.bias.detach().numpy().__iadd__(0.5),
        lambda norm: setattr(norm, "eps", 0.25),
        lambda norm: norm.load_state_dict({key: value + 1 for key, value in norm.state_dict().items()}),
        lambda norm: setattr(norm, "bias", None),
        lambda norm: setattr(norm, "weight", None),
        lambda norm: setattr(norm, "bias", nn.Parameter(torch.ones(whole(norm)))),
    ]
    with torch.no_grad():
        for change in changes:
            before = fused(x)
            for changed in (model, fused):
                for layer in norms(changed):
                    change(layer)
            after = fused(x)
            assert_matches(after, model, x)
            assert not torch.equal(after, before)
    assert not fastseq.stats(fused)["fallbacks"]


def whole(norm: nn.Module) -> int:
    return norm.normalized_shape[0] if isinstance(norm, nn.LayerNorm) else norm.num_channels


@pytest.mark.parametrize("shape", [(3, 1, 9, 9), (3, 5, 1, 1), (1, 1, 1, 5), (2, 4, 1, 3)], ids=str)
@pytest.mark.parametrize("is_last", [False, True])
def test_strides_where_memory_formats_coincide(shape: tuple[int, ...], is_last: bool) -> None:
    channels = shape[1]
    layers = [nn.MaxPool2d(1), nn.GroupNorm(1, channels), nn.ReLU(inplace=True)]
    model = nn.Sequential(*layers[: 2 if is_last else 3]).eval()
    x = torch.randn(shape)
    for given in (x, x.to(memory_format=torch.channels_last)):
        assert_matches(run_fused(model, given), model, given)


EAGER: dict[str, tuple[list[nn.Module], tuple[int, ...], int]] = {
    "layer norm alone": ([nn.LayerNorm(6), nn.ReLU()], (3, 6), 0),
    "group norm alone": ([nn.GroupNorm(1, 3), nn.ReLU()], IMAGE, 0),
    "layer norm of images": ([nn.Conv2d(3, 4, 1), nn.LayerNorm((4, 11, 12))], IMAGE, 1),
    "layer norm of a row of pixels": ([nn.Conv2d(3, 4, 1), nn.LayerNorm(12), nn.Linear(12, 3)], IMAGE, 2),
    "group norm of rows": ([nn.Linear(20, 6), nn.GroupNorm(2, 6)], ROWS, 1),
    "group norm of a line first": ([nn.GroupNorm(1, 3), nn.Conv1d(3, 4, 3)], LINE, 1),
    "unbatched": ([nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 5)], (3, 5, 4), 0),
    "groups of one number": ([nn.AdaptiveMaxPool2d(1), nn.GroupNorm(3, 3)], IMAGE, 0),
    "empty": ([nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)], (0, 3, 5, 4), 0),
    "no rows": ([nn.Linear(20, 6), nn.LayerNorm(6)], (0, 20), 0),
}


@pytest.mark.parametrize("name", EAGER)
def test_what_stays_eager(name: str) -> None:
    layers, shape, runs = EAGER[name]
    model, x = nn.Sequential(*layers).eval(), torch.randn(shape)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        assert_matches(fused(x), model, x)
    assert fastseq.stats(fused)["fused_calls"] == runs


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Linear(20, 6), nn.LayerNorm(5)], ROWS),
        ([nn.LayerNorm(5), nn.Linear(20, 6)], ROWS),
        ([nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 6)], IMAGE),
        ([nn.Conv2d(3, 5, 1), nn.GroupNorm(2, 4)], IMAGE),
        ([nn.AdaptiveMaxPool2d(1), nn.GroupNorm(3, 3)], (1, 3, 5, 5)),
    ],
    ids=["features", "features first", "channels", "groups", "one number"],
)
def test_errors_are_eager_s(layers: list[nn.Module], shape: tuple[int, ...]) -> None:
    assert_eagers_error(nn.Sequential(*layers).eval(), torch.randn(shape))


class Functions(nn.Module):
    """With the weights of its children, which dynamo alone follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.group, self.fc, self.norm = (
            nn.Conv2d(3, 8, 3),
            nn.GroupNorm(4, 8),
            nn.Linear(10, 6),
            nn.LayerNorm(6),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.group_norm(self.conv(x), 4, self.group.weight, self.group.bias))
        x = F.layer_norm(self.fc(x), (6,), self.norm.weight, None, 1e-3)
        return F.layer_norm(x, [6]) + 1


class Straight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.conv = nn.Linear(12, 6), nn.LayerNorm(6), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(F.gelu(self.norm(self.fc(F.group_norm(self.conv(x), 3)))), (6,))


@pytest.mark.parametrize("kind", [Functions, Straight])
def test_functional_forms(kind: type[nn.Module]) -> None:
    model, x = kind().eval(), torch.randn(IMAGE)
    fused = fastseq.optimize(model)
    compiled = torch.compile(model, backend="fastseq")
    with torch.no_grad():
        for call in (fused, compiled):
            assert_matches(call(x), model, x)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert_matches(compiled(x), model, x)
    groups, rows = ["Conv2d", "GroupNorm", "ReLU"], ["Linear", "LayerNorm", "LayerNorm"]
    if kind is Functions:
        assert runs_of_graph(model, x) == [groups, rows]
    else:
        assert runs_of_graph(model, x) == [groups[:2], [*rows[:2], "GELU", "LayerNorm"]]
        assert [name.split("_f32")[0] for name in kernels_used(fused)][-2:] == ["layernorm", "layernorm"]


@pytest.mark.parametrize("owner", [F, torch], ids=["F", "torch"])
@pytest.mark.parametrize("name", ["layer_norm", "group_norm"])
def test_a_replaced_function_is_called(name: str, owner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make("linear norm" if name == "layer_norm" else "conv group")
    fused = fastseq.optimize(model)
    monkeypatch.setattr(owner, name, lambda x, *_, **__: x + 1)
    with torch.no_grad():
        assert torch.equal(fused(x), model(x))
    assert fastseq.stats(fused)["fused_calls"] == 0
