"""What the documentation shows is run; the commands, paths, links and patterns that it names exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from fastseq.patterns import PATTERNS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
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


def test_readme_quickstart_is_the_example() -> None:
    example = (ROOT / "examples/quickstart.py").read_text()
    assert example.split('"""', 2)[2].strip() in (ROOT / "README.md").read_text()


def test_readme_lists_the_patterns() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+(?: → \w+)*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert rows == [(pattern.name, " → ".join(kind.__name__ for kind in pattern.types)) for pattern in PATTERNS]


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shell = "\n".join(blocks(path, "sh", "bash"))
    named = re.findall(r"^make ([a-z]+)", shell, re.MULTILINE) + re.findall(r"`make ([a-z]+)", path.read_text())
    assert set(named) <= targets


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_named_paths_exist(path: Path) -> None:
    text = path.read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\((?!https?:)([^)#][^)]*)\)", text)]
    for link in links:
        assert (path.parent / link).exists(), f"{relative(path)} links to {link}"
    folders = "fastseq|csrc|tests|benchmarks|examples|docs"
    for name in re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*\w)", text):
        assert (ROOT / name).exists(), f"{relative(path)} names {name}"


def test_examples_run(tmp_path: Path) -> None:
    for command in (["quickstart.py"], ["digits.py", "--quick", "--no-compile"]):
        script = [sys.executable, str(ROOT / "examples" / command[0]), *command[1:]]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
