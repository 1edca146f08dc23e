"""What the documentation shows is run; the commands, paths, links and patterns that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT, run_python

import fastseq
from fastseq.patterns import PATTERNS
from fastseq.patterns.activation import ACTIVATIONS

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
README = PAGES[0].read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, *languages: str) -> list[str]:
    return [body for language, body in BLOCK.findall(path.read_text()) if language in languages]


SNIPPETS = [
    pytest.param(path, body, id=f"{relative(path)}-{i}")
    for path in PAGES
    for i, body in enumerate(blocks(path, "python"), 1)
]


@pytest.mark.parametrize(("path", "body"), SNIPPETS)
def test_snippet_runs(path: Path, body: str) -> None:
    exec(compile(body, str(path), "exec"), {"__name__": "__main__"})


def test_readme_shows_the_quickstart_and_what_it_prints() -> None:
    script = ROOT / "examples/quickstart.py"
    assert script.read_text().split('"""', 2)[2].strip() in README
    result = run_python(str(script), FASTSEQ_ISA="avx2")
    assert result.returncode == 0, result.stderr
    if fastseq.isa() in ("avx2", "avx512"):
        assert result.stdout in README, result.stdout


def layers_of_row(row: str, activations: list[str]) -> set[str]:
    """All that `A [→ B] → activation` stands for."""
    runs = [""]
    for is_optional, name in re.findall(r"(\[?)(?:→ )?(\w+)\]?", row):
        names = activations if name == "activation" else [name]
        longer = [f"{run} → {name}".removeprefix(" → ") for run in runs for name in names]
        runs = runs + longer if is_optional else longer
    return set(runs)


def test_readme_lists_the_patterns() -> None:
    (listed,) = re.findall(r"^An activation is one of (.*)\.$", README, re.MULTILINE)
    activations = re.split(", | and ", listed)
    assert activations == [kind.__name__ for kind in ACTIVATIONS]
    (table,) = re.findall(r"^\| layers of one fused step.*\n\|---.*\n((?:\|.*\n)+)", README, re.MULTILINE)
    rows = [layers_of_row(line.split("|")[1], activations) for line in table.splitlines()]
    assert set().union(*rows) == {" → ".join(kind.__name__ for kind in pattern.types) for pattern in PATTERNS}
    assert sum(map(len, rows)) == len(PATTERNS)


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shell = "\n".join(blocks(path, "sh", "bash"))
    named = re.findall(r"^make ([a-z0-9-]+)", shell, re.MULTILINE) + re.findall(r"`make ([a-z0-9-]+)", path.read_text())
    assert set(named) <= targets


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_named_paths_exist(path: Path) -> None:
    text = re.sub(r"`[^`\n]*\*[^`\n]*`", "", path.read_text())  # a wildcard may name what is to come
    links = [link.split("#")[0] for link in re.findall(r"\]\((?!https?:)([^)#][^)]*)\)", text)]
    for link in links:
        assert (path.parent / link).exists(), f"{relative(path)} links to {link}"
    folders = "fastseq|csrc|tests|benchmarks|examples|docs"
    for name in re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*\w)", text):
        assert (ROOT / name).exists(), f"{relative(path)} names {name}"


def test_digits_example_runs() -> None:
    result = run_python("examples/digits.py", "--quick", "--no-compile")
    assert result.returncode == 0, result.stdout + result.stderr
