"""tests/kernel_harness/: kernels and plans without torch, as in the extension, with sanitizers, and on aarch64."""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from emulation.build import compile_objects, compiler, make
from helpers import ISAS

CPU = runpy.run_path(str(ROOT / "csrc/build_cpu.py"))
BUILD = ROOT / "build" / "kernel_harness"
# All that runs on a CPU without torch.
SOURCES = [
    *sorted(ROOT.glob("csrc/kernels/cpu/*.cpp")),
    *sorted(path for path in ROOT.glob("csrc/plan/*.cpp") if not path.name.startswith("cuda_")),
    *sorted(ROOT.glob("tests/kernel_harness/*.cpp")),
]
FLAGS = ["-std=c++17", "-fPIC", f"-I{ROOT / 'csrc'}", *CPU["CXX_FLAGS"]]
# Debug flags: assertions are the kernels' contracts.
SANITIZERS = [*CPU["DEBUG_FLAGS"], "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
AARCH64_COMPILER = "aarch64-linux-gnu-g++"
AARCH64_EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")


def build(name: str, cxx: str, *flags: str) -> Path:
    """build/kernel_harness/<name>-<hash>, unless it is there already."""
    objects = [str(path) for path in compile_objects([cxx, *FLAGS, *flags], SOURCES, BUILD)]
    digest = hashlib.sha256("\0".join([cxx, *flags, *objects]).encode()).hexdigest()[:16]
    return make(BUILD / f"{name}-{digest}", cxx, *FLAGS, *flags, *objects, "-o")


def run(*command: str | Path, **environment: str) -> dict[str, int]:
    """Instruction sets that the harness ran, each with its number of comparisons."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # The limit is for one that hangs: under an emulator a run takes ten minutes.
    done = subprocess.run(command, env={**os.environ, **environment}, timeout=1800, **output)
    assert done.returncode == 0, f"status {done.returncode}:\n{done.stdout}"
    return {isa: int(count) for isa, count in re.findall(r"^(\w+): (\d+) comparisons$", done.stdout, re.MULTILINE)}


def test_as_compiled_for_the_extension() -> None:
    ran = run(build("release", compiler(), *CPU["RELEASE_FLAGS"]))
    assert tuple(ran) == ISAS
    assert min(ran.values()) > 1_000_000


def test_with_sanitizers() -> None:
    """No access outside of what a caller allocated, no undefined behaviour."""
    ran = run(build("sanitized", compiler(), *SANITIZERS), UBSAN_OPTIONS="print_stacktrace=1")
    assert tuple(ran) == ISAS


def test_on_aarch64() -> None:
    """The portable kernels, here NEON's, and the plans, from a cross compiler, on an emulated CPU."""
    cxx = shutil.which(AARCH64_COMPILER)
    emulator = next(filter(None, map(shutil.which, AARCH64_EMULATORS)), None)
    if not cxx or not emulator:
        pytest.skip(f"needs {AARCH64_COMPILER} and qemu-aarch64: `make test-aarch64` says which packages those are")
    # What no aarch64 CPU is asked to run, an emulated one runs for many minutes.
    ran = run(emulator, build("aarch64", cxx, *CPU["RELEASE_FLAGS"], "-static"), "portable")
    assert tuple(ran) == ("portable",)
    assert min(ran.values()) > 1_000_000
