"""ZeroPad2d, ConstantPad2d, ReflectionPad2d, ReplicationPad2d, CircularPad2d in runs: values are copied, bit by bit.

Zeros in front of a convolution are its own padding, and a convolution's padding mode is a step before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ISAS,
    assert_same_bits_however_called,
    check_run,
    integer_model,
    integers,
    kernels_used,
    one_thread,  # noqa: F401
    outcome,
    run_fused,
    use_kernels,
)
from torch import Tensor, nn

import fastseq
from fastseq.testing import assert_matches

PADS: dict[str, Callable[[Any], nn.Module]] = {
    "zero": nn.ZeroPad2d,
    "constant": lambda padding: nn.ConstantPad2d(padding, -1.5),
    "int": lambda padding: nn.ConstantPad2d(padding, 3),
    "infinite": lambda padding: nn.ConstantPad2d(padding, float("-inf")),
    "reflection": nn.ReflectionPad2d,
    "replication": nn.ReplicationPad2d,
    "circular": nn.CircularPad2d,
}
PADDINGS: tuple[Any, ...] = (1, 3, (1, 0, 0, 0), (0, 2, 0, 0), (0, 0, 3, 0), (0, 0, 0, 1), (3, 1, 2, 3))

each_pad = pytest.mark.parametrize("name", PADS)
each_isa = pytest.mark.parametrize("isa", ISAS)


@each_isa
@each_pad
def test_bitwise_eager(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a pool and before one, special values among the pixels, in every memory format."""
    use_kernels(monkeypatch, isa)
    for padding in PADDINGS:
        for channels in (1, 3, 17):
            x = torch.randn(2, channels, 5, 4)
            x.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
            for layers in (
                [nn.MaxPool2d(1), PADS[name](padding)],
                [PADS[name](padding), nn.MaxPool2d(2, 1)],
                [nn.MaxPool2d(1), PADS[name](padding), nn.ReLU()],
            ):
                model = nn.Sequential(*layers).eval()
                for given in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[0]):
                    actual = run_fused(model, given)
                    with torch.no_grad():
                        expected = model(given)
                    assert torch.equal(actual.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
                    assert torch.equal(actual.signbit(), expected.signbit())
                    assert actual.stride() == expected.stride(), (padding, channels, given.stride())


@each_pad
def test_between_convolutions(name: str) -> None:
    if name == "infinite":
        name = "constant"
    for padding in ((1, 1, 1, 1), (2, 0, 1, 3)):
        for first in ([], [nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()], [nn.Conv2d(3, 3, 1), nn.MaxPool2d(2, 1)]):
            for behind in ([nn.Conv2d(3, 17, 3)], [nn.Conv2d(3, 9, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]):
                pad = nn.ConstantPad2d(padding, 2) if name == "constant" else PADS[name](padding)
                model = integer_model(*first, pad, *behind, limit=2)
                check_run(model, integers(2, 3, 7, 9, limit=2))


@each_pad
def test_flatten_and_linear_behind(name: str) -> None:
    if name == "infinite":
        name = "int"
    pad = nn.ConstantPad2d((1, 0, 2, 1), 2) if name == "constant" else PADS[name]((1, 0, 2, 1))
    model = integer_model(nn.Conv2d(3, 9, 3), nn.ReLU(), pad, nn.Flatten(), nn.Linear(9 * 8 * 6, 5), limit=2)
    check_run(model, integers(2, 3, 7, 7, limit=2))


@each_pad
def test_bits_do_not_depend_on_batch_threads_and_layout(name: str) -> None:
    model = nn.Sequential(nn.MaxPool2d(1), PADS[name]((1, 2, 0, 3)), nn.AvgPool2d(3, 2)).eval()
    assert_same_bits_however_called(fastseq.optimize(model), torch.randn(7, 18, 13, 14))


@each_isa
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 3, 2, 0), (2, 0, 0, 1)])
def test_zeros_are_the_convolutions_own(padding: tuple[int, ...], isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step, asymmetric, beside padding of its own, on every kind of kernel."""
    use_kernels(monkeypatch, isa)
    for pad in (nn.ZeroPad2d(padding), nn.ConstantPad2d(padding, -0.0)):
        for c_in, conv in (
            (3, nn.Conv2d(3, 17, 3, padding=(0, 1))),
            (1, nn.Conv2d(1, 4, 3)),  # lanes of pixels
            (16, nn.Conv2d(16, 20, 3)),  # Winograd's
            (4, nn.Conv2d(4, 4, 3, stride=2, groups=4)),
            (8, nn.Conv2d(8, 9, (2, 4), padding="same")),
        ):
            for first in ([], [nn.MaxPool2d(1)]):
                model = integer_model(*first, pad, nn.Identity(), conv, nn.ReLU(), nn.MaxPool2d(2), limit=2)
                x = integers(2, c_in, 9, 8, limit=2)
                check_run(model, x)
                check_run(model, x.to(memory_format=torch.channels_last))
    fused = fastseq.optimize(nn.Sequential(nn.ZeroPad2d(padding), nn.Conv2d(3, 4, 3), nn.ReLU()).eval())
    (segment,) = fastseq.explain(fused, torch.randn(1, 3, 6, 6)).to_dict()["sequentials"][0]["segments"]
    (step,) = segment["steps"]
    assert step["name"] == "zeropad2d_conv2d_relu" and step["layers"] == ["0", "1", "2"]


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 0), "same", "valid", 0])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_padding_modes(padding: Any, mode: str) -> None:
    for kernel in (3, (4, 2)):
        conv = nn.Conv2d(3, 17, kernel, padding=padding, padding_mode=mode)
        for model in (
            integer_model(conv, limit=2),
            integer_model(nn.ZeroPad2d((1, 0, 2, 0)), conv, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(17, 2, 1), limit=1),
        ):
            x = integers(2, 3, 7, 9, limit=2)
            for given in (x, x.to(memory_format=torch.channels_last), x[0]):
                check_run(model, given)
        one = {"kernel_size": 4, "padding": padding if type(padding) is not tuple else 2, "padding_mode": mode}
        check_run(integer_model(nn.Conv1d(3, 5, **one), nn.ReLU()), integers(2, 3, 9))
    fused = fastseq.optimize(nn.Sequential(conv).eval())
    report = fastseq.explain(fused, torch.randn(1, 3, 6, 6)).to_dict()
    assert report["sequentials"][0]["segments"][0]["steps"][0]["note"] == "behind pad2d_f32__copy"
    assert fastseq.verify(fused, torch.randn(2, 3, 6, 6)).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models(dtype: torch.dtype) -> None:
    """A value is rounded to the type, as eager's is."""
    layers = [
        nn.ConstantPad2d(1, 0.1),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.ZeroPad2d((1, 0, 0, 2)),
    ]
    model = nn.Sequential(*layers, nn.Conv2d(8, 5, 3), nn.ReLU()).eval().to(dtype)
    x = torch.randn(2, 8, 6, 7).to(dtype)
    assert_matches(run_fused(model, x), model, x)


def test_padding_modes_eager_rejects() -> None:
    for mode, padding in (("reflect", 6), ("circular", 7)):
        model, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode)).eval(), torch.randn(2, 3, 6, 6)
        expected = outcome(model, x)
        assert isinstance(expected, str) and outcome(fastseq.optimize(model), x) == expected


def test_report_names_it() -> None:
    fused = fastseq.optimize(nn.Sequential(nn.ZeroPad2d(1), nn.MaxPool2d(2)).eval())
    with torch.no_grad():
        fused(torch.randn(1, 3, 6, 6))
    assert kernels_used(fused)[0] == "pad2d_f32__copy"


def test_attributes_count_at_the_next_call() -> None:
    layers = [nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3), nn.ConstantPad2d(1, 0.5), nn.ReflectionPad2d(1), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers).eval()
    fused, x = fastseq.optimize(model), torch.randn(2, 3, 8, 8)
    for index, attribute, value in (
        (0, "padding", (0, 1, 2, 0)),
        (0, "value", 2.0),
        (2, "value", -1),
        (3, "padding", (2, 2, 1, 0)),
    ):
        with torch.no_grad():
            before = fused(x)
            for changed in (model, fused):
                setattr(changed[index], attribute, value)
            after = fused(x)
        assert_matches(after, model, x)
        assert after.shape != before.shape or not torch.equal(after, before)
    assert not fastseq.stats(fused)["fallbacks"] and fastseq.stats(fused)["fused_calls"] == 8


OTHERS: dict[str, nn.Module] = {
    "crops": nn.ZeroPad2d((-1, 1, 0, 0)),
    "crops the map": nn.ZeroPad2d(-1),
    "adds nothing": nn.ZeroPad2d(0),
    "reflects more than there is": nn.ReflectionPad2d(6),
    "wraps around more than once": nn.CircularPad2d(7),
    "crops by reflection": nn.ReflectionPad2d((-1, 1, 0, 0)),
    "too large a value": nn.ConstantPad2d(1, 1e300),
    "NaN": nn.ConstantPad2d(1, float("nan")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_else_eager_takes_or_rejects(name: str) -> None:
    """The same result or the same words, whoever computes."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), OTHERS[name], nn.MaxPool2d(1)).eval()
    fused, x = fastseq.optimize(model), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        try:
            model(x)
        except Exception as error:
            with pytest.raises(type(error)) as found:
                fused(x)
            assert str(found.value) == str(error)
        else:
            assert_matches(fused(x), model, x)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1))
        x = F.relu(self.conv(x))
        x = F.pad(x, (0, 1, 0, 1), "constant", 1.0)
        x = F.pad(x, (2, 1, 0, 1), mode="reflect")
        return F.max_pool2d(x, 2)


class PadsRows(nn.Module):
    """Two numbers are of the last dimension alone: another padding, of another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.conv(x), (1, 1))


@pytest.mark.parametrize("kind", [Functional, PadsRows])
def test_functional_forms(kind: type[nn.Module]) -> None:
    model = kind().eval()
    x = torch.randn(2, 3, 12, 13)
    fused = fastseq.optimize(model)
    with torch.no_grad():
        assert_matches(fused(x), model, x)
    assert fastseq.stats(fused) == {"fused_calls": 1, "eager_calls": 0, "fallbacks": {}}
