"""What eager rejects, an optimised model rejects with the same class and words, and it works again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin import (
    as_plain,
    assert_fused,
    assert_same_outcome,
    conv_net,
    eager,
    images,
    nested_net,
    one_thread,  # noqa: F401
    outcome,
    split_net,
)
from torch import Tensor, nn

import fastseq

pytestmark = pytest.mark.filterwarnings("ignore")  # eager warns before it raises; the words are compared below


def conv_part() -> nn.Sequential:
    return conv_net()[:3]


def pool() -> nn.Sequential:
    return nn.Sequential(nn.MaxPool2d(3, 2, 1))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 4)).eval()


def same_conv() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.ReLU()).eval()


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "conv": conv_part,
    "pool": pool,
    "mlp": mlp,
    "all": conv_net,
    "nested": nested_net,
    "split": split_net,
    "same": same_conv,
}


def works(fast: nn.Sequential) -> None:
    """A good input runs fused, whatever happened before."""
    assert_fused(fast, images(), runs=sum(isinstance(layer, nn.BatchNorm2d) for layer in fast) + 1)


# Inputs -----------------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, ...]] = {
    "0-D": (),
    "1-D": (12,),
    "1-D short": (5,),
    "2-D": (2, 12),
    "2-D wrong": (2, 13),
    "3-D": (3, 12, 12),
    "3-D wrong": (2, 12, 12),
    "4-D one channel": (2, 1, 12, 12),
    "4-D more channels": (2, 6, 12, 12),
    "4-D small": (2, 3, 2, 2),
    "4-D narrow": (2, 3, 12, 2),
    "4-D low": (2, 3, 1, 12),
    "4-D pixel": (2, 3, 1, 1),
    "4-D other size": (2, 3, 13, 12),
    "4-D large": (2, 3, 30, 30),
    "5-D": (1, 2, 3, 12, 12),
    "6-D": (1, 1, 2, 3, 12, 12),
    "no images": (0, 3, 12, 12),
    "no channels": (2, 0, 12, 12),
    "no rows": (2, 3, 0, 12),
    "no columns": (2, 3, 12, 0),
    "no pixels": (2, 3, 0, 0),
    "nothing": (0, 0, 0, 0),
    "unbatched, no rows": (3, 0, 12),
    "empty rows": (3, 0),
    "no rows of features": (0, 12),
    "empty": (0,),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("model", MODELS)
def test_shapes(model: str, shape: str) -> None:
    fast = fastseq.optimize(MODELS[model]())
    works(fast)
    with torch.no_grad():
        for x in (torch.randn(SHAPES[shape]), torch.randn(SHAPES[shape]).double()):
            assert_same_outcome(fast, x)
            assert_same_outcome(fast.forward.__self__, input=x)
    works(fast)


@pytest.mark.parametrize("shape", ["0-D", "4-D one channel", "4-D small", "5-D", "no images", "no channels"])
@pytest.mark.parametrize("model", MODELS)
def test_shapes_with_gradients_wanted(model: str, shape: str) -> None:
    fast = fastseq.optimize(MODELS[model]())
    assert_same_outcome(fast, torch.randn(SHAPES[shape]))
    assert_same_outcome(fast, torch.randn(SHAPES[shape], requires_grad=True))


DTYPES = [
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_input_dtypes(model: str, dtype: torch.dtype) -> None:
    fast = fastseq.optimize(MODELS[model]())
    works(fast)
    with torch.no_grad():
        assert_same_outcome(fast, images().to(dtype))
    works(fast)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("part", ["weight", "bias", "layer", "model"])
@pytest.mark.parametrize("model", ["conv", "mlp", "all", "split"])
def test_parameter_dtypes(model: str, part: str, dtype: torch.dtype) -> None:
    fast, x = fastseq.optimize(MODELS[model]()), images()
    works(fast)
    if part == "model":
        fast.to(dtype)
    elif part == "layer":
        fast[-2 if model == "all" else 0].to(dtype)
    else:
        setattr(fast[0], part, nn.Parameter(getattr(fast[0], part).detach().to(dtype)))
    with torch.no_grad():
        assert_same_outcome(fast, x)
        assert_same_outcome(fast, x.to(dtype))


@pytest.mark.parametrize("model", ["mlp", "pool"])
def test_devices(model: str) -> None:
    # A convolution whose weights are real and whose input is not gives uninitialised memory in eager: not compared.
    fast, x = fastseq.optimize(MODELS[model]()), images()
    works(fast)
    with torch.no_grad():
        assert_same_outcome(fast, x.to("meta"))
        fast.to("meta")
        assert_same_outcome(fast, x)
        assert outcome(fast, x.to("meta")).value.is_meta


def test_linear_weights_on_meta_behind_a_convolution() -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    fast[5].to("meta")
    with torch.no_grad():
        assert assert_same_outcome(fast, x).error is RuntimeError


THINGS: dict[str, Any] = {
    "None": None,
    "int": 3,
    "float": 1.5,
    "str": "changed",
    "list": [[1.0] * 12],
    "dict": {"input": 1},
    "module": nn.Linear(2, 2),
    "class": Tensor,
    "storage": torch.zeros(12).untyped_storage(),
    "NotImplemented": NotImplemented,
    "Ellipsis": ...,
    "exception": RuntimeError("not raised"),
}


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("model", MODELS)
def test_things_that_are_no_tensors(model: str, thing: str) -> None:
    fast = fastseq.optimize(MODELS[model]())
    works(fast)
    with torch.no_grad():
        assert assert_same_outcome(fast, THINGS[thing]).error is not None
        assert_same_outcome(fast, input=THINGS[thing])
    works(fast)


def test_an_object_with_a_torch_function() -> None:
    class Duck:
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return cls()

    fast = fastseq.optimize(mlp())
    with torch.no_grad():
        assert type(fast(Duck())) is Duck


def test_a_tensor_without_storage() -> None:
    fast, x = fastseq.optimize(mlp()), torch.randn(2, 12)
    works(fast)
    x.untyped_storage().resize_(0)
    expected = outcome(eager, fast, x)
    with torch.no_grad():
        assert outcome(fast, x).error is expected.error
    works(fast)


# Parameters of another size ----------------------------------------------------------------------------------------

SIZES: dict[str, tuple[str, int, str, tuple[int, ...] | None]] = {
    "conv bias long": ("all", 0, "bias", (9,)),
    "conv bias short": ("all", 0, "bias", (1,)),
    "conv bias empty": ("all", 0, "bias", (0,)),
    "conv bias 0-D": ("all", 0, "bias", ()),
    "conv bias 2-D": ("all", 0, "bias", (8, 1)),
    "conv weight channels": ("all", 0, "weight", (8, 4, 3, 3)),
    "conv weight fewer channels": ("all", 0, "weight", (8, 1, 3, 3)),
    "conv weight more outputs": ("all", 0, "weight", (9, 3, 3, 3)),
    "conv weight kernel": ("all", 0, "weight", (8, 3, 5, 5)),
    "conv weight too large": ("all", 0, "weight", (8, 3, 13, 13)),
    "conv weight 3-D": ("all", 0, "weight", (8, 3, 3)),
    "conv weight 5-D": ("all", 0, "weight", (8, 3, 3, 3, 1)),
    "conv weight 2-D": ("all", 0, "weight", (8, 3)),
    "conv weight 0-D": ("all", 0, "weight", ()),
    "conv weight no outputs": ("conv", 0, "weight", (0, 3, 3, 3)),
    "conv weight no channels": ("all", 0, "weight", (8, 0, 3, 3)),
    "conv weight no kernel": ("all", 0, "weight", (8, 3, 0, 3)),
    "conv weight None": ("all", 0, "weight", None),
    "linear bias long": ("all", 5, "bias", (11,)),
    "linear bias of one": ("all", 5, "bias", (1,)),
    "linear bias 0-D": ("all", 5, "bias", ()),
    "linear bias rows": ("all", 5, "bias", (2, 10)),
    "linear bias empty": ("all", 5, "bias", (0,)),
    "linear weight inputs": ("all", 5, "weight", (10, 199)),
    "linear weight outputs": ("all", 5, "weight", (11, 200)),
    "linear weight 1-D": ("all", 5, "weight", (200,)),
    "linear weight 3-D": ("all", 5, "weight", (1, 10, 200)),
    "linear weight 0-D": ("all", 5, "weight", ()),
    "linear weight no outputs": ("all", 5, "weight", (0, 200)),
    "linear weight no inputs": ("all", 5, "weight", (10, 0)),
    "linear weight None": ("all", 5, "weight", None),
    "last linear weight": ("mlp", 2, "weight", (4, 6)),
    "first linear weight": ("mlp", 0, "weight", (6, 12)),
}


@pytest.mark.parametrize("case", SIZES)
def test_parameters_of_another_size(case: str) -> None:
    model, index, name, shape = SIZES[case]
    fast, x = fastseq.optimize(MODELS[model]()), images()
    works(fast)
    old = getattr(fast[index], name)
    setattr(fast[index], name, None if shape is None else nn.Parameter(torch.randn(shape)))
    with torch.no_grad():
        for _ in range(2):
            assert_same_outcome(fast, x)
    setattr(fast[index], name, old)
    works(fast)


@pytest.mark.parametrize("case", [name for name in SIZES if "None" not in name])
def test_data_of_another_size(case: str) -> None:
    """The same Parameter object, resized behind its back."""
    model, index, name, shape = SIZES[case]
    fast, x = fastseq.optimize(MODELS[model]()), images()
    works(fast)
    parameter = getattr(fast[index], name)
    old = parameter.data
    parameter.data = torch.randn(shape)
    with torch.no_grad():
        assert_same_outcome(fast, x)
    parameter.data = old
    works(fast)


# Attributes that eager rejects, set after construction --------------------------------------------------------------

BIG = [2**31 - 1, 2**31, 2**40, 2**62, 2**63, 2**70, -(2**40), -(2**70)]
ODD: list[Any] = [
    0,
    -1,
    (0, 1),
    (1, 0),
    (1,),
    (1, 2, 3),
    (),
    [],
    [1],
    [2, 2],
    1.0,
    (1.5, 1),
    "1",
    True,
    None,
    (None, 1),
]
ATTRIBUTES: dict[str, tuple[type[nn.Module], str, list[Any]]] = {
    "conv stride": (nn.Conv2d, "stride", ODD + BIG),
    "conv padding": (nn.Conv2d, "padding", [*ODD, "same", "valid", "SAME", "", 20, *BIG]),
    "conv dilation": (nn.Conv2d, "dilation", [*ODD, 5, 6, *BIG]),
    "conv groups": (nn.Conv2d, "groups", [0, -1, 2, 3, 1.0, "1", True, None, (1,), *BIG]),
    "conv padding_mode": (nn.Conv2d, "padding_mode", ["reflect", "circular", "replicate", "ones", "", None, 0]),
    "pool kernel_size": (nn.MaxPool2d, "kernel_size", [*ODD, 12, (1, 11), *BIG]),
    "pool stride": (nn.MaxPool2d, "stride", ODD + BIG),
    "pool padding": (nn.MaxPool2d, "padding", [*ODD, 2, (0, 2), *BIG]),
    "pool dilation": (nn.MaxPool2d, "dilation", ODD + [20] + [value for value in BIG if value < 0 or value > 2**40]),
    "pool ceil_mode": (nn.MaxPool2d, "ceil_mode", [0, 1, None, "yes", [], torch.tensor(True)]),
    "pool return_indices": (nn.MaxPool2d, "return_indices", [True, 1, 0, None, "yes"]),
    "average kernel_size": (nn.AvgPool2d, "kernel_size", [*ODD, 12, (1, 11), *BIG]),
    "average stride": (nn.AvgPool2d, "stride", ODD + BIG),
    "average padding": (nn.AvgPool2d, "padding", [*ODD, 2, (0, 2), *BIG]),
    "average ceil_mode": (nn.AvgPool2d, "ceil_mode", [0, 1, None, "yes", []]),
    "average count_include_pad": (nn.AvgPool2d, "count_include_pad", [0, 1, None, "yes", []]),
    "average divisor_override": (nn.AvgPool2d, "divisor_override", [0, -1, 3, True, 1.0, "1", (1,), *BIG]),
    "adaptive output_size": (nn.AdaptiveAvgPool2d, "output_size", [*ODD, (2, None), (None, None)]),
    "adaptive maximum output_size": (nn.AdaptiveMaxPool2d, "output_size", [*ODD, (2, None), (None, None)]),
    "adaptive return_indices": (nn.AdaptiveMaxPool2d, "return_indices", [True, 1, 0, None, "yes"]),
    "flatten start_dim": (nn.Flatten, "start_dim", [0, 2, 4, 7, -1, -9, 1.0, None, True, "1"]),
    "flatten end_dim": (nn.Flatten, "end_dim", [0, 1, 2, 3, 4, -2, -9, 1.0, None, True]),
    "dropout p": (nn.Dropout, "p", [-0.1, 1.0, 1.1, 2, None, "0.5", float("nan"), float("inf")]),
    "dropout training": (nn.Dropout, "training", [0, 1, None, "yes"]),
    "dropout inplace": (nn.Dropout, "inplace", [True, 1, "yes", None]),
    "relu inplace": (nn.ReLU, "inplace", [1, "yes", None, [], torch.tensor(True)]),
    "linear in_features": (nn.Linear, "in_features", [3, None]),
}
OTHER_POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def net_with(kind: type[nn.Module]) -> nn.Sequential:
    """A network that runs as one native call and has a layer of this type."""
    if kind not in OTHER_POOLS:
        return conv_net()
    pools = [nn.AvgPool2d(3, 1, 1), nn.AdaptiveMaxPool2d((4, 3)), nn.AdaptiveAvgPool2d((3, 2))]
    return nn.Sequential(*conv_net()[:2], *pools, nn.Flatten(), nn.Linear(8 * 3 * 2, 4)).eval()


ATTRIBUTE_CASES = [
    pytest.param(kind, name, value, id=f"{label} {value!r}")
    for label, (kind, name, values) in ATTRIBUTES.items()
    for value in values
]


@pytest.mark.parametrize(("kind", "name", "value"), ATTRIBUTE_CASES)
def test_attributes(kind: type[nn.Module], name: str, value: Any) -> None:
    fast, x = fastseq.optimize(net_with(kind)), images()
    works(fast)
    layer = next(module for module in fast if type(module) is kind)
    old = layer.__dict__[name]
    layer.__dict__[name] = value
    with torch.no_grad():
        for _ in range(2):
            compare_seeded(fast, x)
    layer.__dict__[name] = old
    works(fast)


def compare_seeded(fast: nn.Module, x: Tensor) -> None:
    """`assert_same_outcome` where a Dropout may draw numbers, and a result may be large."""
    results = []
    for function in (lambda x: eager(fast, x), fast):
        torch.manual_seed(1)
        results.append(outcome(function, x.clone()))
    expected, actual = results
    assert (actual.error, actual.text) == (expected.error, expected.text)
    if expected.error is None:
        torch.testing.assert_close(actual.value, expected.value, check_stride=True, equal_nan=True)


@pytest.mark.parametrize(("kind", "name", "value"), ATTRIBUTE_CASES)
def test_attributes_before_the_first_call(kind: type[nn.Module], name: str, value: Any) -> None:
    """What the constructors do not check reaches optimize itself, which must not stumble either."""
    model = net_with(kind)
    next(module for module in model if type(module) is kind).__dict__[name] = value
    fast = fastseq.optimize(model)
    fastseq.explain(fast)
    with torch.no_grad():
        compare_seeded(fast, images())


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, name, _ in ATTRIBUTES.values() if name not in ("in_features", "training", "inplace")],
)
def test_attributes_that_are_gone(kind: type[nn.Module], name: str) -> None:
    fast, x = fastseq.optimize(net_with(kind)), images()
    works(fast)
    layer = next(module for module in fast if type(module) is kind)
    old = layer.__dict__.pop(name)
    with torch.no_grad():
        for _ in range(2):
            assert_same_outcome(fast, x)
    assert_same_outcome(fastseq.optimize(fast), x)
    layer.__dict__[name] = old
    works(fast)


def test_same_padding_with_a_stride() -> None:
    fast = fastseq.optimize(same_conv())
    works(fast)
    fast[0].stride = (2, 1)
    with torch.no_grad():
        result = assert_same_outcome(fast, images())
    assert result.error is RuntimeError and "not supported for strided convolutions" in result.text


POOLS = [
    (kernel, stride, padding, ceil, size)
    for kernel in (1, 2, 3, (1, 4), 7)
    for stride in (None, 1, 3, 8)
    for padding in (0, 1, 3)
    for ceil in (False, True)
    for size in ((1, 1), (2, 5), (6, 3), (7, 7))
]


def test_pools_of_every_size() -> None:
    """Windows larger than the image, windows that only ceil mode allows, paddings that eager rejects."""
    fast, kinds = fastseq.optimize(nn.Sequential(nn.MaxPool2d(2))), set()
    pool = fast[0]
    with torch.no_grad():
        for pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, size in POOLS:
            if pool.stride is None:
                pool.stride = pool.kernel_size
            kinds.add(assert_same_outcome(fast, torch.randn(2, 3, *size)).error)
    assert kinds == {None, RuntimeError} and fastseq.stats(fast)["fused_calls"] > len(POOLS) / 4


# The whole path ---------------------------------------------------------------------------------------------------


def test_an_error_in_a_later_run_is_eagers() -> None:
    """The first native run has already happened; what comes after it raises as eager does."""
    fast, x = fastseq.optimize(split_net()), torch.randn(2, 3, 14, 14)
    with torch.no_grad():
        result = assert_same_outcome(fast, x)
    assert result.error is RuntimeError and "shapes cannot be multiplied" in result.text
    assert fastseq.stats(fast)["fused_calls"] == 1


def test_the_traceback_leads_to_the_layer() -> None:
    fast = fastseq.optimize(conv_net())
    with torch.no_grad(), pytest.raises(RuntimeError) as caught:
        fast(torch.randn(2, 4, 12, 12))
    frames = [str(entry.path).rsplit("/", 1)[-1] for entry in caught.traceback]
    assert "conv.py" in frames
    assert caught.value.__cause__ is None and caught.value.__context__ is None


def test_errors_are_counted_with_their_reasons() -> None:
    fast = fastseq.optimize(conv_net())
    with torch.no_grad():
        for shape in ((2, 4, 12, 12), (2, 3, 2, 2), (2, 3), (2, 3, 15, 15), (0, 3, 12, 12)):
            outcome(fast, torch.randn(shape))
    counters = fastseq.stats(fast)
    assert counters["fused_calls"] == 0 and counters["eager_calls"] == 5 and len(counters["fallbacks"]) == 5
    assert all(count == 1 and len(reason.split()) > 3 for reason, count in counters["fallbacks"].items())


def test_interrupts_pass_through() -> None:
    class Interrupting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    fast = fastseq.optimize(nn.Sequential(nn.Linear(12, 4), Interrupting()))
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        fast(images())


def test_deep_recursion_is_an_error_not_a_crash() -> None:
    class Again(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.__dict__["owner"](x)
            return result

    fast = fastseq.optimize(nn.Sequential(nn.Linear(4, 4), Again()))
    fast[1].__dict__["owner"] = fast
    with torch.no_grad(), pytest.raises(RecursionError):
        fast(torch.randn(1, 4))
    with as_plain(fast), pytest.raises(RecursionError):
        fast(torch.randn(1, 4))


def test_many_errors_leak_nothing() -> None:
    import gc

    fast = fastseq.optimize(conv_net())
    bad = torch.randn(2, 4, 12, 12)
    with torch.no_grad():
        outcome(fast, bad)
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(200):
            outcome(fast, bad)
        gc.collect()
        assert len(gc.get_objects()) - before < 50
