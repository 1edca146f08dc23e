"""fastseq with its CUDA engine on the emulated grid: the whole path of a CUDA tensor, for CPU tensors on any machine.

`build_package()` links the objects of the ordinary build with the emulated kernels instead of the CUDA ones. In a
Python that has the returned directory first on its path, every CPU tensor goes to the CUDA engine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from emulation.build import BUILD, ROOT, compiler, make_objects
from torch.utils.cpp_extension import library_paths

ENGINE = "tests/emulation/engine_emulated.cpp"


def kernel_sources() -> list[str]:
    sources = sorted((ROOT / "csrc/kernels/cuda").glob("*.cu"))
    return [str(path.relative_to(ROOT)) for path in sources if path.stem != "engine"]


def ordinary_objects() -> list[Path]:
    """The C++ objects of the build in this tree; made by setup.py if it has not run here."""
    folder = ROOT / f"build/{sys.implementation.cache_tag}-torch{torch.__version__}-release/csrc"
    sources = [path for part in ("bindings", "plan", "kernels") for path in (ROOT / "csrc" / part).rglob("*.cpp")]
    wanted = [
        folder / path.relative_to(ROOT / "csrc").with_suffix(".o") for path in sources if path.stem != "no_engine"
    ]
    if not all(path.is_file() for path in wanted):
        temporary = BUILD / "setup"
        command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={temporary}"]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "FASTSEQ_CUDA": "0", "FASTSEQ_DEBUG": "0"})
    return wanted


def build_package() -> Path:
    """The directory that holds the package; made anew if anything changed."""
    emulated = make_objects([*kernel_sources(), ENGINE])
    objects = [*ordinary_objects(), *emulated]
    package = BUILD / "package" / "fastseq"
    extension = package / f"_C{EXTENSION_SUFFIXES[0]}"
    stamp = package.parent / "objects.txt"
    state = "\n".join(f"{path} {path.stat().st_mtime_ns}" for path in objects)
    if not extension.is_file() or not stamp.is_file() or stamp.read_text() != state:
        package.mkdir(parents=True, exist_ok=True)
        unfinished = extension.with_suffix(f".{os.getpid()}.tmp")
        libraries = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
        command = [compiler(), "-shared", "-fopenmp", *map(str, objects), *libraries, "-o", str(unfinished)]
        subprocess.run(command, check=True)
        unfinished.replace(extension)
        stamp.write_text(state)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastseq", package, ignore=ignore, dirs_exist_ok=True)
    return package.parent


if __name__ == "__main__":
    print(build_package())
