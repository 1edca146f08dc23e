"""One case: a plain model and an optimised one live the same life, and every call of both is compared."""

from __future__ import annotations

import copy
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import fastseq

from . import recording
from .case import Call, Case, Group, Layer, Mutation
from .layers import BFLOAT16, build_input, build_model, walk
from .mutations import MUTATIONS, PLAIN

FACTOR = 4  # how much larger than eager's error ours may be
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SUPPORTED_ISAS = {row["isa"] for row in fastseq.kernels() if row["supported"]}
# Layers that only choose and move values: their results have the bits of eager's.
EXACT = {"ReLU", "MaxPool2d", "AdaptiveMaxPool2d", "Flatten", "Identity", "Unflatten"}
EXACT |= {"ZeroPad2d", "ConstantPad2d", "ReflectionPad2d", "ReplicationPad2d", "CircularPad2d"}
# Layers and changes that make integers of integers.
SUMMING = {"Conv2d", "Linear", "SubConv2d", "SubMaxPool2d", "SubLinear", "Doubles", "Dropout", "Dropout2d"}
NATIVE = {"Conv2d", "Linear", "ReLU", "MaxPool2d", "Flatten", "Identity", "Dropout"}
NATIVE |= {"AvgPool2d", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d"}
KEEPS_INTEGERS = {
    *("load_state_dict", "load_state_dict_assign", "load_some_state", "write_data", "scale_data", "write_numpy"),
    *("write_no_grad", "write_one_element", "new_parameter", "replace_data", "share_parameter", "drop_bias"),
    *("swap_tensors", "set_requires_grad", "delete", "to_memory_format", "to_dtype_and_back", "deepcopy", "refresh"),
    *("pickle_roundtrip", "optimize_again", "optimize_in_place", "optimize_without", "restore", "look"),
    *("set_attribute", "new_parameter_layout", "vector_roundtrip"),
}


class Subclass(Tensor):
    """A tensor that is more than a tensor to its owner."""


class Difference(AssertionError):
    """The optimised model did something else than the plain one."""


@dataclass
class Result:
    """What a case did, counted for the summary."""

    features: Counter[str] = field(default_factory=Counter)
    failure: str = ""


@dataclass
class Side:
    """What one of the two models did in one call."""

    value: Any = None
    error: str = ""
    log: list[str] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    random_state: Tensor | None = None
    threads: int = 0
    grad_mode: bool = True


def run_case(case: Case) -> Result:
    result = Result()
    with environment(case), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            lockstep = Lockstep(case, result.features)
            for number, step in enumerate(case.script):
                lockstep.where = f"script[{number}]"
                lockstep.call(step) if isinstance(step, Call) else lockstep.mutate(step)
            lockstep.finish()
        except Difference as difference:
            result.failure = f"{lockstep.where}: {difference}"
    return result


@contextmanager
def environment(case: Case) -> Iterator[None]:
    """The variables of a case, and torch's thread count as it was."""
    threads = torch.get_num_threads()
    names = ("FASTSEQ_ISA", "FASTSEQ_KERNEL", "FASTSEQ_CHECK")
    before = {name: os.environ.get(name) for name in names}
    isa = case.isa if case.isa in SUPPORTED_ISAS else ""
    os.environ.update(zip(names, (isa, case.kernel, "1" if case.checked else ""), strict=True))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def error_text(error: BaseException) -> str:
    """Class and words, without the C++ stack and with the plain class's name."""
    text = f"{type(error).__name__}: {error}".partition("\nException raised from")[0]
    return text.replace("FusedSequential", "Sequential")


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


def structure(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: structure(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(structure(item) for item in value)
    return type(value)


def bits(x: Tensor) -> Tensor:
    """Something that is equal only where every bit is, NaN included."""
    x = x.detach().resolve_neg()
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(kinds[x.element_size()]) if x.is_floating_point() else x


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def same_zeros(a: Tensor, b: Tensor) -> bool:
    """Of equal values: the same bits too, but for NaN in 16 bits: which of them eager makes depends on the layout."""
    if a.dtype in (torch.bfloat16, torch.float16):
        a, b = a.nan_to_num(1, None, None), b.nan_to_num(1, None, None)
    return same_bits(a, b)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether both are equal, NaN being equal to NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))


def version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.layout is torch.strided else 0


def distance(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖ over what is finite in both; of results that are denormal, in units of the smallest normal."""
    a, b = a.detach().double(), b.detach().double()
    finite = a.isfinite() & b.isfinite()
    a, b = a[finite], b[finite]
    if a.numel() == 0:
        return 0.0
    largest = max(b.abs().max().item(), 1e-32)
    return ((a - b) / largest).norm().item() / max((b / largest).norm().item(), 1e-3)


class Lockstep:
    """The two models of a case. `where` is the step that runs, for messages."""

    def __init__(self, case: Case, features: Counter[str]) -> None:
        self.case = case
        self.features = features
        self.where = "optimize"
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.was_changed = False
        self.was_made_inexact = False
        self.plain = build_model(case)
        for hook in case.hooks:
            recording.add_hook(self.plain, hook)
            features[f"hook {hook.kind}"] += 1
        for part in walk(case.parts):
            features[f"layer {part.kind}" if isinstance(part, Layer) else f"group {part.kind}"] += 1
        before = torch.get_rng_state()
        self.fused = fastseq.optimize(self.plain, winograd=case.winograd)
        self.check(torch.equal(before, torch.get_rng_state()), "optimize drew random numbers")
        self.is_exact = self.only_moves_values()

    def check(self, holds: bool, *words: Any) -> None:
        if not holds:
            raise Difference(" ".join(map(str, words)))

    def only_moves_values(self) -> bool:
        """Whether no layer computes; a mutation may change that."""
        kinds = [part.kind for part in walk(self.case.parts) if isinstance(part, Layer)]
        groups = [part.kind for part in walk(self.case.parts) if isinstance(part, Group)]
        return not self.case.lines and set(kinds) <= EXACT and "NegatingSequential" not in groups

    # Calls ----------------------------------------------------------------------------------------------------------

    def call(self, call: Call) -> None:
        plain_x, plain_base = build_input(call.input, call.seed)
        fused_x, fused_base = build_input(call.input, call.seed)
        before = plain_base.detach().clone()
        torch.set_num_threads(call.threads)
        expected = self.run(self.plain, plain_x, call)
        counted = fastseq.stats(self.fused)
        actual = self.run(self.fused, fused_x, call)
        counters = fastseq.stats(self.fused)
        fused = counters["fused_calls"] - counted["fused_calls"]
        eager = counters["eager_calls"] - counted["eager_calls"]
        self.count(call, expected, fused, eager)
        self.check(not fused or call.style != "disabled", "ran fused inside fastseq.disabled()")

        self.check(actual.error == expected.error, f"raised {actual.error!r}; eager {expected.error!r}")
        self.check(actual.log == expected.log, f"hooks: {actual.log}; eager: {expected.log}")
        self.check(actual.threads == call.threads, f"torch's threads were set to {actual.threads}")
        self.check(actual.grad_mode == expected.grad_mode, "the grad mode has changed")
        if fused == 0 or not actual.error:
            assert actual.random_state is not None and expected.random_state is not None
            self.check(torch.equal(actual.random_state, expected.random_state), "the random state differs")
        self.check(version(fused_x) == version(plain_x), "the input's version differs")
        # What is written to the input may have been computed from rounded values.
        if not same_bits(fused_base, plain_base):
            self.check(not same_bits(plain_base, before), "the input's memory was written to")
            self.compare(fused_base, plain_base, "the input after the call", call)
        outputs = tensors(expected.value)
        self.check(structure(actual.value) == structure(expected.value), "other outputs")
        for number, (found, wanted) in enumerate(zip(tensors(actual.value), outputs, strict=True)):
            self.compare_outputs(found, wanted, (fused_x, plain_x), fused, call, number)
        self.compare_gradients(actual, expected, fused)
        if fused and not eager and isinstance(actual.value, Tensor) and self.runs_in_one_piece():
            self.keep_promises(call, actual.value)
        self.synchronise()
        self.kept += [(t.detach(), t.detach().clone()) for t in tensors(actual.value) if memory(t) != memory(fused_x)]

    def runs_in_one_piece(self) -> bool:
        """Whether no eager layer takes part, whose bits may depend on the batch size and the number of threads."""
        case = self.case
        if self.was_changed or case.lines or case.hooks or case.training:
            return False
        return all(
            part.kind == "Sequential"
            if isinstance(part, Group)
            else part.kind in NATIVE and (part.kind != "Flatten" or not part.args)
            for part in walk(case.parts)
        )

    def keep_promises(self, call: Call, value: Tensor) -> None:
        """A row of the result has the same bits in a batch of its own, in other memory formats and in any thread."""
        x, _ = build_input(call.input, call.seed)
        if call.style != "positional" or x.dim() != 4 or value.dim() < 2 or x.shape[0] != value.shape[0]:
            return
        row = call.seed % x.shape[0]
        trials = {
            "alone": (1, lambda: self.fused(x[row : row + 1].clone())[0], value[row]),
            "contiguous": (2, lambda: self.fused(x.contiguous()), value),
            "with other threads": (call.threads % 3 + 1, lambda: self.fused(x), value),
        }
        for name, (threads, trial, wanted) in trials.items():
            torch.set_num_threads(threads)
            with torch.inference_mode():
                found = trial()
            self.check(found.shape == wanted.shape and same_values(found, wanted), f"other bits {name}")
        if call.seed % 4 == 0:
            self.check_concurrent_calls(x, value)

    def check_concurrent_calls(self, x: Tensor, wanted: Tensor) -> None:
        def call() -> Tensor:
            torch.set_num_threads(1)
            with torch.no_grad():
                return [self.fused(x[: 1 + i % x.shape[0]].clone() if i % 2 else x.clone()) for i in range(4)][-2]

        with ThreadPoolExecutor(3) as pool:
            for found in [task.result() for task in [pool.submit(call) for _ in range(3)]]:
                self.check(same_values(found, wanted), "other bits in concurrent calls")
        self.features["concurrent calls"] += 12

    def run(self, model: nn.Module, x: Tensor, call: Call) -> Side:
        side = Side()
        recording.log = side.log
        modes: dict[str, AbstractContextManager[Any]] = {
            "no_grad": torch.no_grad(),
            "inference": torch.inference_mode(),
            "grad": nullcontext(),
            "autocast": torch.autocast("cpu", BFLOAT16),
        }
        hooks = recording.add_global_hook(call.global_hook, model) if call.global_hook else None
        torch.default_generator.manual_seed(call.seed)
        try:
            with modes[call.mode]:
                side.value = self.invoke(model, x, call.style)
                side.grad_mode = torch.is_grad_enabled()
            if call.mode == "grad" and not self.is_backward_unsafe():
                side.gradients = self.backward(model, x, side.value, call.seed)
        except Exception as error:
            side.error = error_text(error)
        finally:
            if hooks is not None:
                hooks.remove()
            recording.log = []
        side.random_state = torch.get_rng_state()
        side.threads = torch.get_num_threads()
        return side

    def invoke(self, model: nn.Module, x: Tensor, style: str) -> Any:
        if style == "disabled":
            with fastseq.disabled():
                return model(x)
        if any(isinstance(p, nn.parameter.UninitializedTensorMixin) for p in model.parameters()):
            return model(x)  # transforms cannot initialise
        if style == "keyword":
            return model(**{"input" if isinstance(model, nn.Sequential) else "x": x})
        if style == "two":
            return model(x, x)
        if style == "none":
            return model(None)
        if style == "forward":
            return model.forward(x)
        if style == "functional":
            return torch.func.functional_call(model, {name: p * 2 for name, p in model.named_parameters()}, (x,))
        if style == "vmap":
            return torch.func.vmap(model)(x)
        if style == "jvp":
            return torch.func.jvp(model, (x,), (torch.ones_like(x),))
        if style == "subclass":
            return model(x.as_subclass(Subclass))
        return model(x)

    def is_backward_unsafe(self) -> bool:
        """Where eager itself may write out of bounds or crash.

        A MaxPool2d with dilation, if a window lies wholly in the padding; a GroupNorm, if its input is channels_last
        and needs no gradient.
        """
        return any(
            isinstance(module, nn.GroupNorm)
            or (isinstance(module, nn.MaxPool2d) and module.dilation not in (1, (1, 1)))
            for module in self.plain.modules()
        )

    def backward(self, model: nn.Module, x: Tensor, value: Any, seed: int) -> list[Tensor | None]:
        wanted = [t for t in tensors(value) if t.requires_grad]
        if not wanted:
            return []
        torch.default_generator.manual_seed(seed)
        torch.autograd.backward(wanted, [torch.randn(t.shape).to(t.dtype) for t in wanted])
        gradients = [x.grad, *(p.grad for p in model.parameters())]
        for parameter in model.parameters():
            parameter.grad = None
        return gradients

    def count(self, call: Call, expected: Side, fused: int, eager: int) -> None:
        features = self.features
        kind = "raised" if expected.error else "fused" if fused and not eager else "mixed" if fused else "fell back"
        features[f"call {kind}"] += 1
        if fused:
            features[f"fused on {self.case.isa or 'the default'}"] += 1
            features["fused where eager raises"] += bool(expected.error)
            for name in ("layout", "values"):
                features[f"fused {name} {getattr(call.input, name)}"] += 1
            features[f"fused {call.mode}"] += 1
            features["fused after changes" if self.was_changed else "fused before any change"] += 1
        features[f"mode {call.mode}"] += 1
        features[f"dtype {call.input.dtype}"] += 1
        if call.global_hook:
            features[f"global hook {call.global_hook}"] += 1
        features["hooks fired"] += len(expected.log)

    # Comparisons ----------------------------------------------------------------------------------------------------

    def compare_outputs(
        self,
        found: Tensor,
        wanted: Tensor,
        inputs: tuple[Tensor, Tensor],
        fused: int,
        call: Call,
        number: int,
    ) -> None:
        self.check(type(found) is type(wanted), f"a {type(found)}; eager {type(wanted)}")
        fused_x, plain_x = inputs
        for name in ("dtype", "device", "layout", "shape", "requires_grad"):
            ours, theirs = getattr(found, name), getattr(wanted, name)
            self.check(ours == theirs, f"{name} {ours}; eager {theirs}")
        self.check(found.stride() == wanted.stride(), f"strides {found.stride()}; eager {wanted.stride()}")
        self.check(found.storage_offset() == wanted.storage_offset(), "another storage offset")
        self.check(found.is_inference() == wanted.is_inference(), "is an inference tensor or not")
        self.check((found.grad_fn is None) == (wanted.grad_fn is None), "has a grad_fn or not")
        self.check(found.is_neg() == wanted.is_neg(), "is a negated view or not")
        self.check((found is fused_x) == (wanted is plain_x), "the output is the input itself or not")
        self.check(
            (memory(found) == memory(fused_x)) == (memory(wanted) == memory(plain_x)),
            "the output shares the input's memory or does not",
        )
        if wanted.untyped_storage().nbytes() == wanted.numel() * wanted.element_size():
            size = found.untyped_storage().nbytes()
            self.check(size == found.numel() * found.element_size(), f"the output's storage has {size} bytes")
        self.compare(found, wanted, f"output {number}", call, number)
        if fused:
            self.features["outputs of fused calls compared"] += 1

    def compare(
        self,
        found: Tensor,
        wanted: Tensor,
        what: str,
        call: Call,
        number: int = -1,
    ) -> None:
        """Special values where eager has them; the rest as near to float64 as eager is, to a factor.

        `number`: the output's; -1 for what is no output.
        """
        is_output = number >= 0
        found, wanted = found.detach(), wanted.detach()
        if same_values(found, wanted):
            if self.is_exact and is_output:
                self.check(same_zeros(found, wanted), f"{what}: the signs of zeros differ")
            return
        self.check(not self.is_exact, f"{what}: {self.first_difference(found, wanted)}, where no layer computes")
        self.check(wanted.is_floating_point(), f"{what}: {self.first_difference(found, wanted)}")
        for name, test in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
            wrong = test(found) != test(wanted)
            if is_output and wrong.any() and self.overflows(call, number):
                self.features["overflows"] += 1
                return
            if is_output and wrong.any() and self.has_gelu() and self.are_places_of_float64(found, call, number):
                self.features["GELU of infinity"] += 1
                return
            self.check(
                not wrong.any(),
                f"{what}: {name} at {int(test(found).sum())} places; eager at {int(test(wanted).sum())}; "
                f"{int(wrong.sum())} places differ",
            )
        if is_output and self.sums_are_exact(call, number):
            raise Difference(f"{what}: {self.first_difference(found, wanted)}, where all sums are exact")
        difference = distance(found, wanted)
        floor = FLOOR[wanted.dtype]
        # If eager's own error is less than a third of the difference, ours is less than four thirds of it: below the
        # floor. Else it is at most four times eager's.
        if difference <= 0.75 * floor:
            return
        exact = self.exact(call, number) if is_output and wanted.dtype is torch.float32 else None
        if exact is None or exact.shape != found.shape:
            self.features["compared without float64"] += 1
            self.check(difference <= 100 * floor, f"{what}: differs by {difference:.3g}")
            return
        self.features["compared with float64"] += 1
        error, eager = distance(found, exact), distance(wanted, exact)
        if self.uses_winograd():
            floor *= 4  # where integers make eager exact, or a window takes the least of many, only that is a measure
        allowed = max(floor, FACTOR * eager)
        if error > allowed:
            # Eager may be near by luck: how far does one rounding of each weight and each layer's result lead?
            noise = self.noise(call, number, exact)
            self.features["judged by sensitivity"] += 1
            self.check(
                error <= FACTOR * noise,
                f"{what}: error against float64 is {error:.3g}, eager's {eager:.3g}, that of single roundings "
                f"{noise:.3g}; {self.first_difference(found, wanted)}",
            )

    def first_difference(self, found: Tensor, wanted: Tensor) -> str:
        worst = (found.double() - wanted.double()).abs().nan_to_num(0).argmax()
        index = [int(i) for i in torch.unravel_index(worst, found.shape)]
        ours, theirs = found.flatten()[worst].item(), wanted.flatten()[worst].item()
        return f"differs most at {index}: {ours!r}; eager {theirs!r}"

    def exact(self, call: Call, number: int, observer: Observer | None = None) -> Tensor | None:
        """The call in float64, on a copy of the plain model as it is after the call: calls change statistics only."""
        x, _ = build_input(call.input, call.seed)
        log, recording.log = recording.log, []
        handle = None
        try:
            model = copy.deepcopy(self.plain).double()
            wide = x.detach().double()
            if observer is not None:
                wide = observer.prepare(model, wide)
                handle = register_module_forward_hook(observer)
            torch.default_generator.manual_seed(call.seed)
            with torch.no_grad():
                return tensors(self.invoke(model, wide, call.style))[number]
        except Exception:
            return None  # such a model cannot be copied, or float64 does not suit it
        finally:
            if handle is not None:
                handle.remove()
            recording.log = log

    def noise(self, call: Call, number: int, exact: Tensor) -> float:
        """The largest error of a few float64 runs with every weight and result rounded at random."""
        runs = [self.exact(call, number, Noise(seed)) for seed in range(8)]
        return max((distance(run, exact) for run in runs if run is not None), default=0.0)

    def overflows(self, call: Call, number: int) -> bool:
        """Whether finite terms add up to more than float32 holds: where, and with which sign first, is left open."""
        bound = Bound()
        return self.exact(call, number, bound) is not None and bound.largest > torch.finfo(torch.float32).max

    def has_gelu(self) -> bool:
        """Whose float32 kernel gives NaN for inf, though not for all memory formats, and float64's inf."""
        kinds = {part.kind for part in walk(self.case.parts) if isinstance(part, Layer)}
        return "GELU" in kinds or any("gelu" in line for line in self.case.lines)

    def are_places_of_float64(self, found: Tensor, call: Call, number: int) -> bool:
        """Whether NaN and the infinities are where float64 has them."""
        exact = self.exact(call, number)
        tests = (torch.isnan, torch.isposinf, torch.isneginf)
        return exact is not None and all(torch.equal(test(found), test(exact.float())) for test in tests)

    def sums_are_exact(self, call: Call, number: int) -> bool:
        """Whether all numbers are integers small enough that the order of summation does not matter."""
        case = self.case
        kinds = {part.kind for part in walk(case.parts) if isinstance(part, Layer)}
        if self.was_made_inexact or case.lines or case.hooks or case.training or not kinds <= EXACT | SUMMING:
            return False
        if (case.weights, call.input.values, call.input.dtype) != ("integers", "integers", "float32"):
            return False
        if self.uses_winograd():
            return False
        bound = Bound()
        return self.exact(call, number, bound) is not None and bound.largest < 2**24

    def uses_winograd(self) -> bool:
        """Whether a convolution of the last call was Winograd's, whose transforms round integers too."""
        report = fastseq.explain(self.fused).to_dict()
        segments = [segment for run in (*report["forwards"], *report["sequentials"]) for segment in run["segments"]]
        steps = [step for segment in segments for step in segment.get("steps", ())]
        return any((step["kernel"] or "").startswith("conv2d_winograd") for step in steps)

    def compare_gradients(self, actual: Side, expected: Side, fused: int) -> None:
        self.check(len(actual.gradients) == len(expected.gradients), "other gradients")
        for found, wanted in zip(actual.gradients, expected.gradients, strict=True):
            self.check((found is None) == (wanted is None), "a gradient is missing, or there is one")
            if found is None or wanted is None:
                continue
            self.features["gradients compared"] += 1
            self.check(found.dtype == wanted.dtype and found.shape == wanted.shape, "a gradient of another kind")
            self.check(found.stride() == wanted.stride(), "a gradient's strides differ")
            if same_values(found, wanted):
                continue
            self.check(torch.equal(found.isnan(), wanted.isnan()), "a gradient's NaN differ")
            difference = distance(found, wanted)
            limit = (1000 if fused else 10) * FLOOR[wanted.dtype]
            self.check(difference <= limit, f"a gradient differs by {difference:.3g}")

    def synchronise(self) -> None:
        """Statistics that moved moved alike; rounding is then taken out, so that it does not add up over calls."""
        for (name, found), (_, wanted) in zip(self.fused.named_buffers(), self.plain.named_buffers(), strict=True):
            lazy = isinstance(wanted, nn.parameter.UninitializedTensorMixin)
            if lazy or same_bits(found, wanted):
                continue
            # A mean of what another layer normalised is 0 but for rounding.
            moved_alike = torch.allclose(found, wanted, rtol=1e-4, atol=1e-6, equal_nan=True)
            self.check(moved_alike or distance(found, wanted) <= 1e-4, f"buffer {name}: {found}; eager {wanted}")
            with torch.no_grad():
                found.copy_(wanted)

    # Changes and the end --------------------------------------------------------------------------------------------

    def mutate(self, mutation: Mutation) -> None:
        self.is_exact = False
        self.was_changed = True
        self.was_made_inexact |= mutation.name not in KEEPS_INTEGERS
        ours = MUTATIONS[mutation.name]
        theirs = PLAIN.get(mutation.name, ours)
        models, errors, states = [], [], []
        for model, change in ((self.plain, theirs), (self.fused, ours)):
            torch.default_generator.manual_seed(mutation.seed)
            error = ""
            try:
                changed = change(model, mutation)
                model = model if changed is None else changed
            except Exception as raised:
                error = error_text(raised)
            models.append(model)
            errors.append(error)
            states.append(torch.get_rng_state())
        self.features[f"mutation {mutation.name}"] += 1
        self.features["mutation raised"] += bool(errors[0])
        self.check(errors[0] == errors[1], f"{mutation.name} raised {errors[1]!r}; eager {errors[0]!r}")
        self.check(torch.equal(*states), f"{mutation.name}: the random state differs")
        self.plain, self.fused = models
        self.compare_states()

    def compare_states(self) -> None:
        found, wanted = self.fused.state_dict(), self.plain.state_dict()
        self.check(list(found) == list(wanted), f"state_dict has {list(found)}; eager {list(wanted)}")
        for key, value in wanted.items():
            lazy = isinstance(value, nn.parameter.UninitializedTensorMixin)
            self.check(lazy == isinstance(found[key], nn.parameter.UninitializedTensorMixin), f"{key} is lazy or not")
            if not lazy:
                self.check(same_bits(found[key], value), f"state_dict: {key} differs")
        modes = [[m.training for m in model.modules()] for model in (self.fused, self.plain)]
        self.check(modes[0] == modes[1], "train and eval modes differ")
        paths = [[path for path, _ in model.named_modules()] for model in (self.fused, self.plain)]
        self.check(paths[0] == paths[1], f"modules {paths[0]}; eager {paths[1]}")

    def finish(self) -> None:
        self.where = "at the end"
        self.compare_states()
        for output, copied in self.kept:
            self.check(same_bits(output, copied), "an output was overwritten by a later call")


class Observer:
    """A hook for all modules of a float64 run."""

    def prepare(self, model: nn.Module, x: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        raise NotImplementedError


class Noise(Observer):
    """One float32 rounding, of random size, for each weight and each layer's result."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def round(self, x: Tensor) -> Tensor:
        return x * (1 + 2**-24 * torch.randn(x.shape, generator=self.generator, dtype=torch.float64))

    def prepare(self, model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(self.round(parameter))
        return self.round(x)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.round(output) if isinstance(output, Tensor) and not module._modules else None


class Bound(Observer):
    """The largest finite sum of absolute values anywhere."""

    largest = 0.0

    def prepare(self, model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.abs_()
        return x.abs()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        for tensor in tensors(output):
            finite = tensor[tensor.isfinite()]
            if finite.numel():
                self.largest = max(self.largest, finite.abs().max().item())
