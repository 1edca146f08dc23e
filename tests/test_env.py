"""The FASTSEQ_* variables: defaults, bad values, the page and the sources that name them, and what each one does."""

from __future__ import annotations

import gc
import logging
import re
import weakref
from collections.abc import Iterator

import pytest
import torch
from conftest import ROOT
from dropin import (
    NETS,
    RUNS,
    assert_eager,
    assert_fused,
    assert_identical,
    assert_same_outcome,
    call,
    conv_net,
    eager,
    first,
    fused,
    images,
    mislead,
    one_thread,  # noqa: F401
    split_net,
)
from torch import nn

import fastseq
from fastseq import _env

ACCESSORS = {
    "FASTSEQ_DISABLE": _env.disabled,
    "FASTSEQ_ISA": _env.isa_cap,
    "FASTSEQ_KERNEL": _env.preferred_kernel,
    "FASTSEQ_VERBOSE": _env.verbose,
    "FASTSEQ_CHECK": _env.check,
    "FASTSEQ_CUDA": _env.cuda,
    "FASTSEQ_DEBUG": _env.debug,
}
NAMES = [variable.name for variable in _env.VARIABLES]


def test_each_variable_has_an_accessor() -> None:
    assert list(ACCESSORS) == NAMES


@pytest.mark.parametrize("variable", _env.VARIABLES, ids=NAMES)
def test_values(variable: _env.Variable, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ACCESSORS[variable.name]
    monkeypatch.delenv(variable.name, raising=False)
    default = read()
    monkeypatch.setenv(variable.name, "")
    assert read() == default
    for value in variable.values or ("conv2d",):
        monkeypatch.setenv(variable.name, value)
        assert read() == ({"0": False, "1": True}[value] if isinstance(default, bool) else value)
    if variable.values:
        monkeypatch.setenv(variable.name, "perhaps")
        with pytest.raises(ValueError, match=f"{variable.name} is 'perhaps'; expected one of"):
            read()


def test_debugging_page_lists_the_table() -> None:
    page = (ROOT / "docs/debugging.md").read_text()
    rows = re.findall(r"^\| `(FASTSEQ_\w+)` \| (run|build) \| (.*?) \| (.*?) \| (.*) \|$", page, re.MULTILINE)
    assert rows == [
        (
            variable.name,
            variable.kind,
            ", ".join(f"`{value}`" for value in variable.values) or "any text",
            f"`{variable.default}`" if variable.default else "unset",
            variable.meaning,
        )
        for variable in _env.VARIABLES
    ]


def test_no_variable_outside_the_table() -> None:
    """Whatever code, pages and the Makefile call FASTSEQ_something is in the table, or a C++ macro."""
    files = [ROOT / "Makefile", ROOT / "setup.py", *ROOT.glob("*.md")]
    suffixes = (".py", ".md", ".cpp", ".h", ".cu", ".cuh")
    for folder in ("fastseq", "csrc", "docs", "benchmarks", "examples"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    text = "\n".join(path.read_text() for path in files)
    macros = set(re.findall(r"#define (FASTSEQ_\w+)", text))
    assert set(re.findall(r"\bFASTSEQ_[A-Z]\w*", text)) - macros == set(NAMES)


# What the run variables do ----------------------------------------------------------------------------------------


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def kernels_of(model: torch.nn.Module) -> list[str]:
    """The kernels of the model's last call."""
    segments = [s for entry in fastseq.explain(model).to_dict()["sequentials"] for s in entry["segments"]]
    return [step["kernel"] for segment in segments for step in segment.get("steps", ())]


def test_unset_and_empty_are_the_same(clean: pytest.MonkeyPatch) -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    expected = assert_fused(fast, x)
    for name in NAMES:
        clean.setenv(name, "")
    assert torch.equal(assert_fused(fastseq.optimize(fast), x), expected)


@pytest.mark.parametrize("variable", [v for v in _env.VARIABLES if v.kind == "run" and v.values], ids=lambda v: v.name)
@pytest.mark.parametrize("value", ["perhaps", "true", "2", "AVX2", "-1"])
def test_a_bad_value_is_reported_by_optimize(variable: _env.Variable, value: str, clean: pytest.MonkeyPatch) -> None:
    """Not in the middle of a forward pass."""
    clean.setenv(variable.name, value)
    expected = f"{variable.name} is {value!r}; expected one of {', '.join(variable.values)}, or unset"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        fastseq.optimize(conv_net())


def test_spaces_around_a_value_do_not_matter(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("FASTSEQ_DISABLE", " 1 ")
    assert not fastseq.native_available()


# FASTSEQ_DISABLE


@pytest.mark.parametrize("net", NETS)
def test_disable(net: str, clean: pytest.MonkeyPatch) -> None:
    clean.setenv("FASTSEQ_DISABLE", "1")
    fast, x = fastseq.optimize(NETS[net]()), images()
    assert not fastseq.native_available() and fastseq.native_error() == "FASTSEQ_DISABLE=1"
    assert fastseq.isa() == "none" and fastseq.kernels() == []
    with torch.no_grad():
        actual, counters = call(fast, x)
        assert_identical(actual, eager(fast, x))
    assert counters["fused_calls"] == 0
    fast(x).sum().backward()
    # Switched on again, the same model is fused.
    clean.setenv("FASTSEQ_DISABLE", "0")
    assert_fused(fast, x, RUNS[net])


# FASTSEQ_ISA

ISAS = list(dict.fromkeys(k["isa"] for k in fastseq.kernels() if k["supported"] and k["dtype"] == "f32"))


@pytest.mark.parametrize("isa", ISAS)
def test_isa_is_a_cap(isa: str, clean: pytest.MonkeyPatch) -> None:
    clean.setenv("FASTSEQ_ISA", isa)
    assert fastseq.isa() == isa
    fast = fastseq.optimize(conv_net())
    assert_fused(fast, images())
    names = kernels_of(fast)
    assert len(names) == 2 and all(f"__{isa}_" in name for name in names)


def test_isa_beyond_the_cpu_is_the_best_it_has(clean: pytest.MonkeyPatch) -> None:
    best = fastseq.isa()
    clean.setenv("FASTSEQ_ISA", "avx512")
    assert fastseq.isa() == best
    assert_fused(fastseq.optimize(conv_net()), images())


def test_a_model_keeps_the_instruction_set_of_its_first_call(clean: pytest.MonkeyPatch) -> None:
    fast, x = fastseq.optimize(conv_net()), images()
    assert_fused(fast, x)
    before = kernels_of(fast)
    clean.setenv("FASTSEQ_ISA", "portable")
    assert_fused(fast, x)
    assert kernels_of(fast) == before
    again = fastseq.optimize(fast)
    assert_fused(again, x)
    assert all("__portable_" in name for name in kernels_of(again))


# FASTSEQ_KERNEL


@pytest.mark.parametrize("isa", ISAS)
def test_kernel_is_a_preference(isa: str, clean: pytest.MonkeyPatch) -> None:
    """Each tile of an operation can be asked for, where the layer is as wide as the tile."""
    wanted = [k["name"] for k in fastseq.kernels() if (k["op"], k["isa"], k["dtype"]) == ("linear", isa, "f32")]
    clean.setenv("FASTSEQ_ISA", isa)
    used = []
    for name in wanted:
        clean.setenv("FASTSEQ_KERNEL", name)
        fast = fastseq.optimize(torch.nn.Sequential(torch.nn.Linear(12, int(name.rpartition("x")[2]))).eval())
        assert_fused(fast, images())
        used += kernels_of(fast)
    assert used == wanted and len(set(wanted)) > 1


@pytest.mark.parametrize("text", ["no such kernel", "conv2d", "%s", "\\", "ß"])
def test_a_kernel_that_does_not_exist_or_fit_is_no_error(text: str, clean: pytest.MonkeyPatch) -> None:
    fast = fastseq.optimize(torch.nn.Sequential(torch.nn.Linear(12, 30)).eval())
    assert_fused(fast, images())
    before = kernels_of(fast)
    clean.setenv("FASTSEQ_KERNEL", text)
    fast = fastseq.optimize(fast)
    assert_fused(fast, images())
    assert kernels_of(fast) == before


# FASTSEQ_VERBOSE


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """fastseq's logger, put back afterwards: nothing else in the tests should write to stderr."""
    logger = logging.getLogger("fastseq")
    before = logger.level, logger.handlers[:]
    logger.handlers = []
    yield logger
    logger.setLevel(before[0])
    logger.handlers = before[1]


def test_verbose(clean: pytest.MonkeyPatch, log: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    clean.setenv("FASTSEQ_VERBOSE", "1")
    fast, x = fastseq.optimize(torch.nn.ModuleDict({"body": conv_net(), "rest": torch.nn.Tanhshrink()})), images()
    fastseq.optimize(fast)
    optimised = capsys.readouterr()
    assert "body" in optimised.err and "rest" not in optimised.err and optimised.out == ""
    assert len(log.handlers) == 1, "one handler however often optimize is called"
    with torch.no_grad():
        fast["body"](x)
    planned = capsys.readouterr().err
    for name in kernels_of(fast):
        assert planned.count(name) == 1, "the plan names its kernels"
    with torch.no_grad():
        fast["body"](x)
    assert capsys.readouterr().err == "", "a plan is logged once"
    fast["body"](x)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "gradients are being recorded" in lines[0] and lines[0].startswith("fastseq: ")


def test_verbose_names_the_fallback_of_one_run_among_others(
    clean: pytest.MonkeyPatch, log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    clean.setenv("FASTSEQ_VERBOSE", "1")
    fast = fastseq.optimize(split_net())
    fast[4].double()
    capsys.readouterr()
    with torch.no_grad(), pytest.raises(RuntimeError):
        fast(images())
    assert "not float32" in capsys.readouterr().err


def test_quiet_without_verbose(
    clean: pytest.MonkeyPatch, log: logging.Logger, capfd: pytest.CaptureFixture[str]
) -> None:
    fast = fastseq.optimize(conv_net())
    assert_fused(fast, images())
    fast(images())
    assert log.handlers == [] and log.level == logging.NOTSET
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


# FASTSEQ_CHECK


@pytest.mark.parametrize("net", NETS)
def test_check_changes_no_result_and_no_counter(net: str, clean: pytest.MonkeyPatch) -> None:
    fast, x = fastseq.optimize(NETS[net]()), images()
    expected = assert_fused(fast, x, RUNS[net])
    clean.setenv("FASTSEQ_CHECK", "1")
    checked = fastseq.optimize(fast)
    for _ in range(2):
        assert torch.equal(assert_fused(checked, x, RUNS[net]), expected)
    special = x.clone()
    special[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    assert_fused(checked, special, RUNS[net])
    assert_eager(checked, x, "gradients are being recorded").sum().backward()
    with torch.no_grad():
        for parameter in checked.parameters():
            parameter.mul_(2)
    assert not torch.equal(assert_fused(checked, x, RUNS[net]), expected)
    with torch.no_grad():
        assert_same_outcome(checked, torch.randn(2, 4, 12, 12))
        assert_same_outcome(checked, None)
        assert_same_outcome(checked, x[0])
        handle = first(checked, torch.nn.Linear).register_forward_hook(lambda module, args, output: output + 1)
        torch.testing.assert_close(checked(x), eager(checked, x))
        handle.remove()


@pytest.mark.parametrize("value", [None, "text", "changed", 3])
def test_check_runs_layers_that_are_not_fused_once(value: object, clean: pytest.MonkeyPatch) -> None:
    class Counting(torch.nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> object:
            self.calls += 1
            return value

    clean.setenv("FASTSEQ_CHECK", "1")
    fast = fastseq.optimize(torch.nn.Sequential(torch.nn.Linear(12, 4), torch.nn.ReLU(), Counting()))
    with torch.no_grad():
        assert fast(images()) is value
    assert fast[2].calls == 1 and fastseq.stats(fast) == fused(1)


@pytest.mark.parametrize("layer", ["first", "last"])
def test_check_finds_a_result_that_is_not_eagers(layer: str, clean: pytest.MonkeyPatch) -> None:
    """Eager is made to compute something else behind the back of every check."""
    clean.setenv("FASTSEQ_CHECK", "1")
    fast, x = fastseq.optimize(split_net()), images()
    assert_fused(fast, x, runs=2)
    kind, name = {"first": (torch.nn.ReLU, "relu"), "last": (torch.nn.Linear, "linear")}[layer]
    right = getattr(torch.nn.functional, name)
    mislead(clean, kind, name, lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    layers = {"first": r"\[Conv2d, ReLU\]", "last": r"\[Flatten, Linear\]|\[Linear\]"}[layer]
    with torch.no_grad(), pytest.raises(AssertionError, match=f"FASTSEQ_CHECK: the fused result of ({layers}) differs"):
        fast(x)


@pytest.mark.parametrize("change", ["shape", "nan", "dtype"])
def test_check_finds_other_differences(change: str, clean: pytest.MonkeyPatch) -> None:
    clean.setenv("FASTSEQ_CHECK", "1")
    fast, x = fastseq.optimize(torch.nn.Sequential(torch.nn.Linear(12, 4)).eval()), images()
    right = torch.nn.functional.linear
    wrong = {
        "shape": lambda *args: right(*args)[None],
        "nan": lambda *args: right(*args).index_fill(3, torch.tensor([1]), float("nan")),
        "dtype": lambda *args: right(*args).double(),
    }
    mislead(clean, torch.nn.Linear, "linear", wrong[change])
    with torch.no_grad(), pytest.raises(AssertionError, match="FASTSEQ_CHECK"):
        fast(x)


@pytest.mark.parametrize("net", NETS)
def test_check_and_verbose_together(
    net: str, clean: pytest.MonkeyPatch, log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    clean.setenv("FASTSEQ_CHECK", "1")
    clean.setenv("FASTSEQ_VERBOSE", "1")
    fast, x = fastseq.optimize(NETS[net]()), images()
    for _ in range(2):
        assert_fused(fast, x, RUNS[net])
    text = capsys.readouterr().err
    assert all(text.count(name) == 1 for name in kernels_of(fast))
    assert_eager(fast, x, "gradients are being recorded")
    assert "gradients are being recorded" in capsys.readouterr().err


def test_check_leaves_the_collector_right(clean: pytest.MonkeyPatch) -> None:
    """Several programs share watches and runs, of which the collector is told once."""
    clean.setenv("FASTSEQ_CHECK", "1")
    fast, x = (
        fastseq.optimize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanhshrink(), nn.Linear(4, 2)).eval()),
        torch.ones(2, 4),
    )
    with torch.no_grad():
        fast(x)
    kept = fast[0].weight
    fast.itself = [fast]
    ended = weakref.ref(fast)
    fast[0].weight = nn.Parameter(torch.zeros(4, 4))
    del fast
    gc.collect()
    gc.collect()
    assert ended() is None
    assert kept.shape == (4, 4) and kept.requires_grad
