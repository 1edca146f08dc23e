"""The table of FASTSEQ_* variables: defaults, bad values, and the page and the sources that name them."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

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
    for folder in ("fastseq", "csrc", "docs", "benchmarks", "examples"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".cpp", ".h", ".cu")]
    text = "\n".join(path.read_text() for path in files)
    macros = set(re.findall(r"#define (FASTSEQ_\w+)", text))
    assert set(re.findall(r"\bFASTSEQ_[A-Z]\w*", text)) - macros == set(NAMES)
