"""Behaviours 16 to 18: in-place layers, aliases, fresh results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from behaviour import assert_close_to_eager, assert_fast, one_thread, same  # noqa: F401
from dropin import as_plain, call, conv_net, images, outcome
from torch import Tensor, nn

import fastseq

LAST = torch.channels_last


def relu_() -> nn.ReLU:
    return nn.ReLU(inplace=True)


# 16: what changes the caller's input --------------------------------------------------------------------------------

# Layers before an in-place ReLU, and whether the caller's tensor is what it writes into.
HEADS: dict[str, tuple[Callable[[], list[nn.Module]], bool]] = {
    "first": (lambda: [], True),
    "Identity": (lambda: [nn.Identity()], True),
    "Dropout": (lambda: [nn.Dropout(0.5)], True),
    "Flatten, a view": (lambda: [nn.Flatten()], True),
    "Identity, Dropout, Flatten": (lambda: [nn.Identity(), nn.Dropout(), nn.Flatten()], True),
    "nested": (lambda: [nn.Sequential(nn.Identity(), nn.Sequential(nn.Flatten()))], True),
    "Unflatten of Flatten": (lambda: [nn.Flatten(2), nn.Unflatten(2, (4, 4))], True),
    "a pool": (lambda: [nn.MaxPool2d(1)], False),
    "a convolution": (lambda: [nn.Conv2d(3, 3, 1)], False),
    "an out-of-place ReLU": (lambda: [nn.ReLU()], False),
}
TAILS: dict[str, Callable[[], list[nn.Module]]] = {
    "alone": lambda: [],
    "Flatten, Linear": lambda: [nn.Flatten(), nn.Linear(48, 5)],
    "Flatten, Linear, in-place ReLU": lambda: [nn.Flatten(), nn.Linear(48, 5), relu_()],
    "Identity": lambda: [nn.Identity()],
}


def effects(model: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """The result, what became of the input, how often it was written to, and whether the two share memory."""
    version = x._version
    got = outcome(model, x)
    aliases = got.value is not None and got.value.data_ptr() == x.data_ptr()
    return got.error, got.text, got.value, x.detach().clone(), x._version - version, aliases


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("head", HEADS)
def test_16_an_in_place_relu_writes_into_the_callers_tensor(head: str, tail: str) -> None:
    """First in the model, or behind layers that pass their input on; the result may be the input's memory."""
    layers, reaches = HEADS[head]
    model = nn.Sequential(*layers(), relu_(), *TAILS[tail]()).eval()
    # Something to fuse in each: a run of its own in front would hide the effect.
    fast = fastseq.optimize(nn.Sequential(model, nn.Sequential(nn.Flatten(), nn.Linear(5 if "L" in tail else 48, 2))))
    for _ in range(2):
        x = torch.randn(2, 3, 4, 4)
        y = x.clone()
        with torch.no_grad():
            with as_plain(fast):
                expected = effects(fast, y)
            actual = effects(fast, x)
            assert actual[:2] == expected[:2] == (None, "")
            torch.testing.assert_close(actual[2], expected[2])
            assert same(actual[3], expected[3]) and actual[4:] == expected[4:]
            assert (x >= 0).all().item() == reaches and actual[4] == int(reaches)
    assert fastseq.stats(fast)["fused_calls"] >= 2


@pytest.mark.parametrize("head", HEADS)
def test_16_the_result_aliases_the_input_where_eagers_does(head: str) -> None:
    layers, reaches = HEADS[head]
    fast = fastseq.optimize(nn.Sequential(*layers(), relu_(), nn.Identity(), nn.Sequential(nn.Dropout())).eval())
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        assert effects(fast, x)[5] == reaches
        with as_plain(fast):
            assert effects(fast, x)[5] == reaches


@pytest.mark.parametrize("form", ["channels_last", "sliced", "expanded"])
def test_16_a_flatten_that_copies_protects_the_input(form: str) -> None:
    x = torch.randn(2, 3, 4, 4)
    x = {"channels_last": x.to(memory_format=LAST), "sliced": x[..., :3], "expanded": x[:, :1].expand(2, 3, 4, 4)}[form]
    fast = fastseq.optimize(nn.Sequential(nn.Flatten(), relu_(), nn.Linear(x[0].numel(), 3)))
    kept = x.clone()
    with torch.no_grad():
        actual, counters = call(fast, x)
        assert torch.equal(x, kept) and x._version == 0 and counters["fused_calls"] == 1
        with as_plain(fast):
            torch.testing.assert_close(actual, fast(x))


def test_16_in_place_on_a_leaf_that_requires_grad_raises() -> None:
    fast = fastseq.optimize(nn.Sequential(nn.Identity(), relu_(), nn.Linear(4, 2)))
    for make in (lambda: torch.randn(3, 4).requires_grad_(), lambda: nn.Parameter(torch.randn(3, 4))):
        x = make()
        with as_plain(fast):
            expected = outcome(fast, x)
        actual = outcome(fast, x)
        assert actual == expected and actual.error is RuntimeError and "leaf Variable" in actual.text
        with torch.no_grad():
            fast(x)
        assert (x >= 0).all() and x._version == 1


# 17: in place behind a fused layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        (lambda relu: [nn.Conv2d(3, 5, 3, padding=1), relu], (2, 3, 7, 6)),
        (lambda relu: [nn.Conv2d(3, 5, 3), relu, nn.MaxPool2d(2)], (2, 3, 7, 6)),
        (lambda relu: [nn.Conv2d(3, 5, 3), nn.MaxPool2d(2), relu], (2, 3, 7, 6)),
        (lambda relu: [nn.Conv2d(3, 5, 3), nn.Identity(), nn.Dropout(), relu, nn.Conv2d(5, 2, 3)], (2, 3, 7, 6)),
        (lambda relu: [nn.Linear(7, 5), relu], (3, 7)),
        (lambda relu: [nn.Linear(7, 5), relu, nn.Linear(5, 2), relu], (3, 7)),
    ],
)
def test_17_an_in_place_relu_behind_a_layer_is_fused(
    layers: Callable[[nn.Module], list[nn.Module]], shape: tuple[int, ...], inplace: bool
) -> None:
    """Nobody can see the tensor it writes into: the input keeps its values and version, one native call."""
    assert_fast(nn.Sequential(*layers(nn.ReLU(inplace))).eval(), torch.randn(shape))


# 18: results are fresh ----------------------------------------------------------------------------------------------

FRESH: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "all": (conv_net, images),
    "maps": (lambda: conv_net()[:3], images),
    "channels_last": (lambda: conv_net()[:3], lambda: images().to(memory_format=LAST)),
    "unbatched": (lambda: conv_net()[:3], lambda: images()[0]),
    "flattened": (lambda: conv_net()[:4], images),
    "pool": (lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1)), images),
    "pool that changes nothing": (lambda: nn.Sequential(nn.MaxPool2d(1)), images),
    "linear": (lambda: nn.Sequential(nn.Linear(12, 5), nn.ReLU()), images),
    "vector": (lambda: nn.Sequential(nn.Linear(12, 5)), lambda: torch.randn(12)),
    "one number": (lambda: nn.Sequential(nn.Linear(12, 1), nn.ReLU()), lambda: torch.randn(1, 12)),
}


@pytest.mark.parametrize("name", FRESH)
def test_18_results_are_fresh_tensors_of_exact_size(name: str) -> None:
    """Offset 0, storage of exactly the elements, never the memory of another result, of the input or of a weight."""
    make, data = FRESH[name]
    fast, x = fastseq.optimize(make()), data()
    with torch.no_grad():
        results = [call(fast, x)[0] for _ in range(4)]
        assert call(fast, x)[1]["fused_calls"] == 1
    held = [x, *fast.parameters(), *results]
    assert len({t.untyped_storage().data_ptr() for t in held}) == len(held)
    for result in results:
        assert result.storage_offset() == 0 and result._base is None and not result._is_view()
        assert result.untyped_storage().nbytes() == result.numel() * result.element_size()
    kept = results[1].clone()
    results[0].fill_(float("nan"))
    with torch.no_grad():
        assert torch.equal(fast(x), kept)
        fast(x * 2)
    assert torch.equal(results[1], kept)
    results[1].resize_(results[1].numel() * 3)  # its memory is its own


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.Identity()],
        lambda: [nn.Dropout(0.5)],
        lambda: [nn.Identity(), nn.Sequential(nn.Dropout(), nn.Identity()), nn.Dropout(0.1)],
        lambda: [nn.Sequential()],
        lambda: [],
    ],
)
def test_18_what_does_nothing_returns_its_argument(layers: Callable[[], list[nn.Module]]) -> None:
    """Identity, Dropout in eval mode, an empty Sequential give the same object, in a once fused model too."""
    x = torch.randn(2, 3)
    emptied = fastseq.optimize(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), *layers()).eval())
    assert_close_to_eager(emptied, x, runs=1)
    del emptied[:2]
    for fast in (emptied, fastseq.optimize(nn.Sequential(*layers()).eval())):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert fast(x) is x
