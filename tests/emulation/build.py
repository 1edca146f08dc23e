"""Compiles CUDA kernels for the emulated grid, on the CPU."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulation"
INCLUDE_DIRS = (ROOT / "csrc", ROOT / "tests" / "emulation")
# Alignment: a load from a misaligned pointer is an error on a GPU. The handler is in emulated_grid.h.
FLAGS = (
    *("-x", "c++", "-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fsanitize=alignment"),
    *(f"-I{folder}" for folder in INCLUDE_DIRS),
)
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def compiler() -> str:
    """The C++ compiler: CXX, g++ or c++. Skips the test where there is none."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    pytest.skip("no C++ compiler: CXX is not set to one, and neither g++ nor c++ is found")


def with_includes(source: Path) -> Iterator[Path]:
    """`source` and all files of ours that it includes, directly or not."""
    seen = set()
    pending = [source.resolve()]
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        yield path
        for name in INCLUDE.findall(path.read_text()):
            found = (folder / name for folder in (path.parent, *INCLUDE_DIRS))
            pending += [file.resolve() for file in found if file.is_file()][:1]


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")


def make(output: Path, *command: str) -> Path:
    """Runs the command, which writes the file after its last argument, unless the file is there."""
    if not output.exists():
        unfinished = output.with_suffix(f".{os.getpid()}.tmp")
        run(*command, str(unfinished))
        unfinished.replace(output)
    return output


def compile_emulated(sources: Iterable[str | Path], out: str, extra_flags: Iterable[str] = ()) -> Path:
    """Builds build/emulation/<out>-<hash>.so of `sources`, relative to the root, unless it is there already.

    With extra_flags=["-fsanitize=address"], load it into a Python that runs with LD_PRELOAD="libasan.so libstdc++.so",
    as `g++ -print-file-name=` has them, and ASAN_OPTIONS=detect_leaks=0.
    """
    objects = [str(path) for path in make_objects(sources, extra_flags)]
    digest = hashlib.sha256("\0".join(objects).encode()).hexdigest()[:16]
    link_flags = [flag for flag in extra_flags if flag == "-fsanitize=address"]  # alignment needs no library
    return make(BUILD / f"{out}-{digest}.so", compiler(), "-shared", *link_flags, *objects, "-o")


def make_objects(sources: Iterable[str | Path], extra_flags: Iterable[str] = ()) -> list[Path]:
    """The objects of `sources`, relative to the root, compiled for the emulated grid unless they are there already."""
    return compile_objects([compiler(), *FLAGS, *extra_flags], sources, BUILD)


def compile_objects(command: list[str], sources: Iterable[str | Path], folder: Path) -> list[Path]:
    """The objects that `command`, a compiler and its flags, makes of `sources`, unless they are in `folder` already."""
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: str | Path) -> Path:
        path = ROOT / source
        parts = ["\n".join(command), *(file.read_text() for file in sorted(with_includes(path)))]
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
        return make(folder / f"{path.stem}-{digest}.o", *command, "-c", str(path), "-o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))
