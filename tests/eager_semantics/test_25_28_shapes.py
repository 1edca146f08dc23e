"""Behaviours 25 to 28: shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from behaviour import assert_eager_outcome, assert_fast, one_thread  # noqa: F401
from dropin import assert_identical, assert_same_outcome, call, eager, fused, outcome
from torch import Tensor, nn

import fastseq
from fastseq import cuda
from fastseq.testing import assert_matches

LAST = torch.channels_last


# 25: one image without a batch --------------------------------------------------------------------------------------


def conv_relu_pool() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()


UNBATCHED: dict[str, Callable[[], nn.Sequential]] = {
    "conv relu pool": conv_relu_pool,
    "conv pool relu": lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.MaxPool2d(2), nn.ReLU()),
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 5, 3)),
    "pool": lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1)),
    "two stages": lambda: nn.Sequential(*conv_relu_pool(), nn.Conv2d(5, 2, 2), nn.ReLU()),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_25_an_image_without_batch_is_fused(name: str) -> None:
    """(C, H, W) goes through Conv-ReLU-Pool and comes out with three dimensions."""
    model, x = UNBATCHED[name](), torch.randn(3, 9, 8)
    assert assert_fast(model, x).dim() == 3


@pytest.mark.parametrize("name", UNBATCHED)
def test_25_an_unbatched_image_of_any_strides_gives_a_contiguous_one(name: str) -> None:
    x = torch.randn(9, 8, 3).permute(2, 0, 1)  # as channels_last without its batch
    with torch.no_grad():
        assert UNBATCHED[name]()(x).is_contiguous()
    for form in (
        x,
        torch.randn(3, 8, 9).transpose(1, 2),
        torch.randn(3, 9, 16)[..., ::2],
        torch.randn(1, 9, 8).expand(3, 9, 8),
    ):
        assert assert_fast(UNBATCHED[name](), form).is_contiguous()


def test_25_an_unbatched_image_and_flatten_or_channels_last_weights_stay_eager() -> None:
    """Flatten then keeps the channels apart; a channels_last weight gives strides of a batch that is not there."""
    reason = "an unbatched input with channels_last weights or Flatten"
    x = torch.randn(3, 9, 8)
    with torch.no_grad():
        flat = fastseq.optimize(nn.Sequential(*conv_relu_pool(), nn.Flatten()))
        assert assert_eager_outcome(flat, x, reason).value.shape == (5, 9)
        assert_eager_outcome(
            fastseq.optimize(nn.Sequential(*conv_relu_pool(), nn.Flatten(), nn.Linear(45, 2))), x, reason
        )
        assert_eager_outcome(fastseq.optimize(conv_relu_pool().to(memory_format=LAST)), x, reason)


# 26: nothing in it --------------------------------------------------------------------------------------------------

EMPTY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any]] = {
    # the layer, the input, and the result's shape or the error
    "batch 0, conv": (lambda: nn.Conv2d(4, 5, 3, padding=1), (0, 4, 3, 3), (0, 5, 3, 3)),
    "batch 0, pool": (lambda: nn.MaxPool2d(2), (0, 4, 4, 4), (0, 4, 2, 2)),
    "batch 0, linear": (lambda: nn.Linear(3, 4), (0, 3), (0, 4)),
    "rows of no batch": (lambda: nn.Linear(3, 4), (2, 0, 3), (2, 0, 4)),
    "no channels, conv": (lambda: nn.Conv2d(4, 5, 3, padding=1), (2, 0, 3, 3), RuntimeError),
    "no channels, pool": (lambda: nn.MaxPool2d(2), (2, 0, 4, 4), RuntimeError),
    "no rows, padded conv": (lambda: nn.Conv2d(4, 5, 3, padding=1), (2, 4, 0, 3), RuntimeError),
    "no columns, padded conv": (lambda: nn.Conv2d(4, 5, 3, padding=2), (2, 4, 3, 0), RuntimeError),
    "no rows, pool": (lambda: nn.MaxPool2d(3, 1, 1), (2, 4, 0, 3), RuntimeError),
    "no features": (lambda: nn.Linear(0, 4), (3, 0), (3, 4)),
    "no features, no bias": (lambda: nn.Linear(0, 4, bias=False), (3, 0), (3, 4)),
    "no outputs": (lambda: nn.Linear(3, 0), (2, 3), (2, 0)),
    "no output channels": (lambda: nn.Conv2d(4, 0, 3), (2, 4, 3, 3), None),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
@pytest.mark.parametrize("tail", [[], [nn.ReLU()]], ids=["", "relu"])
@pytest.mark.parametrize("name", EMPTY)
def test_26_empty_inputs_give_eagers_result_or_error(name: str, tail: list[nn.Module]) -> None:
    """A batch of nothing is fine; no channels or no rows raise, with padding too; no features give the bias alone."""
    make, shape, result = EMPTY[name]
    try:
        layer = make()
    except Exception:
        assert result is None, "eager makes no such layer"
        return
    fast, x = fastseq.optimize(nn.Sequential(layer, *tail)), torch.randn(shape)
    with torch.no_grad():
        expected = outcome(eager, fast, x)
        for _ in range(2):
            actual = outcome(fast, x)
            assert (actual.error, actual.text) == (expected.error, expected.text)
            assert_identical(actual.value, expected.value)
        if isinstance(result, tuple):
            assert actual.value.shape == result
        elif result is not None:
            assert issubclass(actual.error or type(None), result)
        if name == "no features" and not tail:
            assert torch.equal(actual.value, fast[0].bias.expand(3, 4))
    assert fastseq.stats(fast)["fused_calls"] == 0 and fastseq.stats(fast)["fallbacks"]


@pytest.mark.parametrize("order", [torch.contiguous_format, LAST])
def test_26_a_batch_of_nothing_through_everything(order: torch.memory_format) -> None:
    layers = [*conv_relu_pool(), nn.Flatten(), nn.Linear(45, 4), nn.ReLU()]
    for count, shape in ((3, (0, 5, 3, 3)), (4, None), (6, (0, 4))):
        fast = fastseq.optimize(nn.Sequential(*layers[:count]))
        x = torch.empty(0, 3, 9, 8).to(memory_format=order)
        with torch.no_grad():
            actual = outcome(fast, x)
            expected = assert_eager_outcome(fast, x, "the input is empty")
            assert_identical(actual.value, expected.value)
        assert shape is None or actual.value.shape == shape
        assert_fast(nn.Sequential(*layers[:count]), torch.randn(1, 3, 9, 8))


# 27: Linear takes any number of dimensions --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12,), (1, 12), (5, 12), (2, 3, 12), (2, 1, 3, 12), (1, 2, 1, 2, 1, 12)])
@pytest.mark.parametrize("layers", ["linear", "linear relu linear"])
def test_27_linear_takes_one_dimension_or_more(shape: tuple[int, ...], layers: str) -> None:
    tail = [nn.ReLU(), nn.Linear(5, 3)] if "relu" in layers else []
    result = assert_fast(nn.Sequential(nn.Linear(12, 5), *tail), torch.randn(shape))
    assert result.shape == (*shape[:-1], 3 if tail else 5)


def test_27_no_dimension_raises() -> None:
    fast = fastseq.optimize(nn.Sequential(nn.Linear(1, 5), nn.ReLU()))
    with torch.no_grad():
        assert assert_same_outcome(fast, torch.tensor(1.0)).error is RuntimeError
        assert assert_same_outcome(fast, torch.randn(3, 2)).error is RuntimeError


KINDS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "jagged": (lambda x: torch.nested.nested_tensor([x[0, :2], x[1]], layout=torch.jagged), "not a plain torch.Tensor"),
    "nested": (lambda x: torch.nested.nested_tensor([x[0, :2], x[1]]), "not a plain"),
    "sparse": (lambda x: x[0].to_sparse(), "not a plain dense tensor"),
    "sparse rows": (lambda x: x[0].to_sparse_csr(), "not a plain dense tensor"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_27_jagged_nested_and_sparse_inputs_are_eagers(kind: str) -> None:
    make, reason = KINDS[kind]
    fast = fastseq.optimize(nn.Sequential(nn.Linear(12, 5)))
    with torch.no_grad():
        x = make(torch.randn(2, 4, 12))
        expected = outcome(eager, fast, x)
        fastseq.reset_stats(fast)
        actual = outcome(fast, x)
    assert (actual.error, actual.text, type(actual.value)) == (expected.error, expected.text, type(expected.value))
    if kind in ("jagged", "nested"):
        assert expected.error is None
        for a, e in zip(actual.value.unbind(), expected.value.unbind(), strict=True):
            assert torch.equal(a, e)
    elif expected.error is None:
        assert_identical(actual.value, expected.value)
    counters = fastseq.stats(fast)
    assert counters["fused_calls"] == 0 and any(reason in text for text in counters["fallbacks"])


# 28: more than 2^31 elements ----------------------------------------------------------------------------------------

LARGE = 2**31


def untouched(count: int) -> Tensor:
    """Memory of which nobody has written a page: it reads as zeros and takes no room."""
    deterministic = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        return torch.zeros(0).new_empty(count)
    except RuntimeError as error:
        pytest.skip(f"no address space for {4 * count / 1e9:.1f} GB: {error}")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = deterministic


@pytest.mark.parametrize("kind", ["conv", "pool", "linear"])
def test_28_inputs_of_more_than_2_to_31_elements(kind: str) -> None:
    """Offsets have 64 bits: what stands behind the first 2^31 elements counts, and nothing wraps around."""
    size = 4096
    batch = LARGE // size + 2
    rows = untouched(batch * size).view(batch, size)
    marks = {0: 1.0, 1: 2.0, batch // 2: 3.0, batch - 2: 4.0, batch - 1: 5.0}
    for row, value in marks.items():
        rows[row, 0] = value
    # Few of the elements are looked at, except by Linear, which sums all of them.
    layer = {
        "conv": lambda: nn.Conv2d(1, 1, 1, stride=64, bias=False),
        "pool": lambda: nn.MaxPool2d(1, 64),
        "linear": lambda: nn.Linear(size, 1, bias=False),
    }[kind]()
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    fast, x = fastseq.optimize(nn.Sequential(layer)), rows if kind == "linear" else rows.view(batch, 1, 64, 64)
    assert x.numel() > LARGE
    with torch.no_grad():
        result, counters = call(fast, x)
    assert counters == fused()
    expected = torch.zeros(batch)
    for row, value in marks.items():
        expected[row] = value
    assert torch.equal(result.flatten(), expected)


@pytest.mark.parametrize("kind", ["conv", "pool", "linear"])
def test_28_strides_beyond_2_to_31(kind: str) -> None:
    """Two images, and two rows of each, that lie more than 2^31 elements apart."""
    buffer = untouched(2 * LARGE + 64)
    shape, strides = (
        ((2, 3, 4, 5), (LARGE + 3, 5, LARGE // 4 + 17, 1)) if kind != "linear" else ((2, 7), (LARGE + 3, 1))
    )
    x = buffer.as_strided(shape, strides)
    x.copy_(torch.randn(shape))
    model = {
        "conv": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
        "pool": lambda: nn.Sequential(nn.MaxPool2d(2)),
        "linear": lambda: nn.Sequential(nn.Linear(7, 3), nn.ReLU()),
    }[kind]()
    fast = fastseq.optimize(model)
    with torch.no_grad():
        result, counters = call(fast, x)
    assert counters == fused()
    assert_matches(result, model, x)


@pytest.mark.skipif(not cuda.kernels(), reason="this build of fastseq has no CUDA kernels")
@pytest.mark.parametrize("device", cuda.DEVICES)
def test_28_cuda_grids_and_offsets_are_planned_or_refused(device: str) -> None:
    """A batch of any size gets a grid that fits (all blocks in x), or is refused with a reason and runs eager."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
    linear = nn.Sequential(nn.Linear(64, 8))
    for net, shape in ((model, (1, 9, 9)), (linear, (64,))):
        for batch in (1, 65535, 65536, 2**20, 2**24):
            (made,) = cuda.plan(net, torch.empty(batch, *shape, device="meta"), cuda.DEVICES[device])
            assert made.get("refused") is None and made["output"][0] == batch
    (made,) = cuda.plan(model, torch.empty(2**40, 1, 9, 9, device="meta"), cuda.DEVICES[device])
    assert "2^31" in made["refused"]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [65535, 65536, 70001])
def test_28_large_batches_on_a_gpu(batch: int) -> None:
    for model, shape in (
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2)), (1, 5, 5)),
        (nn.Sequential(nn.Linear(5, 3), nn.ReLU()), (5,)),
    ):
        fast, x = fastseq.optimize(model.cuda()), torch.randn(batch, *shape, device="cuda")
        with torch.no_grad():
            result, counters = call(fast, x)
            assert counters == fused()
            torch.testing.assert_close(result, eager(fast, x), atol=5e-3, rtol=5e-3)
