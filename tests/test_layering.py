"""Who may use whom: read from the imports and includes, so that the rules need no remembering."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "fastseq"
CSRC = ROOT / "csrc"

# A module uses its own level and those below it, level 0 nothing. "patterns" is every file in that folder.
LEVELS = {
    "_env": 0,
    "_native": 1,
    "loading": 2,
    "patterns": 2,
    "program": 2,
    "matcher": 3,
    "straight_line": 4,
    "plan": 5,
    "sequential": 6,
    "cuda": 7,
    "module": 7,
    "controls": 8,
    "timing": 8,
    "reference": 9,
    "optimize": 9,
    "dynamo": 10,
    "report": 10,
    "serving": 11,
    "verification": 11,
    "__init__": 12,
    "testing": 12,
    "__main__": 13,
}
CPP_LEVELS = {"kernels": 0, "plan": 1, "bindings": 2}
INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)', re.MULTILINE)
TORCH_HEADER = re.compile(r"^(torch|ATen|c10|pybind11|Python\.h)")
# What takes the place of a GPU in the tests, and the only files that may include it.
EMULATION = ROOT / "tests/emulation"
EMULATED = {"launch.h", "ptx_emulated.inl.h"}


def unit(path: Path) -> str:
    """The name in LEVELS that a file of the package goes by."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(path: Path) -> Iterator[str]:
    """The units of fastseq that `path` imports at run time."""
    tree = ast.parse(path.read_text())
    for_types_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for node in ast.walk(block)
    }
    package = ("fastseq", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if node in for_types_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            if top == "fastseq":
                found = rest[0] if rest else "__init__"
                yield found if (PACKAGE / f"{found}.py").exists() or (PACKAGE / found).is_dir() else "__init__"


MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_module_has_a_level() -> None:
    assert {unit(path) for path in MODULES} <= set(LEVELS)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_go_down(path: Path) -> None:
    here = unit(path)
    for found in imported_units(path):
        assert found == here or LEVELS[found] <= LEVELS[here], f"{relative(path)} imports {found}, which is above it"
        assert LEVELS[here] > 0, f"{relative(path)} is a leaf, but imports {found}"


def test_imports_have_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        graph.setdefault(unit(path), set()).update(set(imported_units(path)) - {unit(path)})
    TopologicalSorter(graph).prepare()


def includes(path: Path) -> list[tuple[bool, str]]:
    """(whether in quotes, what) for each include of a file."""
    return [(mark == '"', name) for mark, name in INCLUDE.findall(path.read_text())]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_includes_go_down(path: Path) -> None:
    level = path.relative_to(CSRC).parts[0]
    for is_quoted, name in includes(path):
        if level != "bindings":
            assert not TORCH_HEADER.match(name), f"{relative(path)} includes {name}: only csrc/bindings knows torch"
        if is_quoted and path.name in EMULATED and (EMULATION / name).is_file():
            continue
        if is_quoted:
            assert (CSRC / name).is_file(), f"{relative(path)}: write {name} as a path below csrc/"
            assert CPP_LEVELS[name.split("/")[0]] <= CPP_LEVELS[level], f"{relative(path)} includes {name}, above it"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent == CSRC / "kernels/cuda"], ids=relative)
def test_cuda_kernels_include_only_their_own_headers(path: Path) -> None:
    """So that the grid of the tests compiles them too. The standard library is for host code; activation.h, the list of
    functions that both engines have, is plain C++."""
    for is_quoted, name in includes(path):
        if is_quoted:
            is_ours = (
                name.startswith("kernels/cuda/")
                or name == "kernels/activation.h"
                or (path.name in EMULATED and (EMULATION / name).is_file())
            )
        else:
            is_ours = re.fullmatch(r"\w+", name) is not None or (path.name, name) == ("launch.h", "cuda_runtime.h")
        assert is_ours, f"{relative(path)} includes {name}, which is not one of csrc/kernels/cuda"


@pytest.mark.parametrize("path", sorted(CSRC.rglob("isa_*.cpp")), ids=relative)
def test_target_region_includes_only_templates(path: Path) -> None:
    """An inline function of a shared header, compiled for AVX-512, could be the copy that the linker keeps for all."""
    _, pragma, region = path.read_text().partition("#pragma GCC target")
    if not pragma:
        return
    inside = {path: [name for _, name in INCLUDE.findall(region)]}
    templates = (CSRC / "kernels/cpu").rglob("*.inl.h")
    inside |= {template: [name for _, name in includes(template)] for template in templates}
    for file, names in inside.items():
        for name in names:
            assert name.endswith(".inl.h"), f"{relative(file)} includes {name} inside a target region"
