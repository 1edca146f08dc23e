"""What every test gets: a fixed seed, torch's thread count as it was, and a skip for `gpu` tests without a GPU.

Files whose single tests take minutes come first, so that of several processes none is left alone with one at the end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import fastseq

ROOT = Path(__file__).resolve().parent.parent

# That suite needs another fastseq: test_cuda_engine.py runs it. Named on the command line it is collected.
collect_ignore = [] if "emulation" in fastseq.__file__ else ["on_emulated_grid"]


LONG = ("test_kernel_harness.py", "test_planted_faults.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if torch.version.cuda is not None and torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed_and_threads() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a new interpreter in `cwd`, whose `fastseq` it imports, with no FASTSEQ_* variables but the given ones."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTSEQ_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**inherited, "PYTHONPATH": str(cwd), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def shadow_package(tmp_path: Path) -> Callable[[str | bytes | None], Path]:
    """Makes a directory with a copy of the package whose extension is `content`.

    Text becomes `_C.py`, bytes a shared object of the right name, None no extension at all.
    """

    def make(content: str | bytes | None) -> Path:
        package = tmp_path / "fastseq"
        shutil.copytree(ROOT / "fastseq", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        if isinstance(content, str):
            (package / "_C.py").write_text(content)
        elif content is not None:
            (package / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(content)
        return tmp_path

    return make
