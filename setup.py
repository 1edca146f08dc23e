"""Builds `fastseq._C` beside the installed torch. Metadata is in pyproject.toml, FASTSEQ_* in docs/debugging.md."""

from __future__ import annotations

import os
import runpy
import sys
from glob import glob
from typing import Any

from setuptools import setup

ENV = runpy.run_path("fastseq/_env.py")  # the package itself imports torch, which may be absent here

# One binary for every CPU of an architecture: no -march here, the per-ISA files open their own target regions.
CXX_FLAGS = ["-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
CXX_FLAGS += ["-Wall", "-Wextra", "-Wno-psabi"]
RELEASE_FLAGS = ["-O3", "-g0", "-DNDEBUG"]
DEBUG_FLAGS = ["-O1", "-g", "-UNDEBUG"]


def say(text: str) -> None:
    print(f"fastseq build: {text}", file=sys.stderr, flush=True)


def cuda_sources(cuda_home: str | None, torch_cuda: str | None) -> list[str]:
    """The CUDA sources to build: none unless FASTSEQ_CUDA, the tree, nvcc and torch all agree."""
    wanted = ENV["cuda"]()
    sources = sorted(glob("csrc/kernels/cuda/*.cu"))
    if wanted == "0":
        reason = "FASTSEQ_CUDA=0"
    elif not sources:
        reason = "no CUDA kernels in this version"
    elif torch_cuda is None:
        reason = "the installed torch is built without CUDA"
    elif cuda_home is None:
        reason = "no nvcc found (set CUDA_HOME)"
    else:
        say(f"FASTSEQ_CUDA={wanted}: building CPU and CUDA {torch_cuda} kernels with {cuda_home}")
        return sources
    if wanted == "1":
        sys.exit(f"fastseq build: FASTSEQ_CUDA=1, but {reason}")
    say(f"{reason}; building CPU only")
    return []


def native() -> dict[str, Any]:
    """The setup() arguments that build the extension; none of them when torch is missing."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        if ENV["cuda"]() == "1":
            sys.exit("fastseq build: FASTSEQ_CUDA=1, but torch is not installed where the build runs")
        say("torch is not installed where the build runs: pure-Python package, models will run eager.")
        say("For the native kernels install torch first, then: pip install --no-build-isolation --no-deps .")
        return {}

    debug = ENV["debug"]()

    class BuildExtension(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # pip would build in a new directory each time; a fixed one makes every route incremental.
            kind = "debug" if debug else "release"
            self.build_temp = f"build/{sys.implementation.cache_tag}-torch{torch.__version__}-{kind}"

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except RuntimeError as error:  # ninja failed; a Python traceback would bury the compiler's message
                sys.exit(f"fastseq build: FAILED, see the compiler's message above ({error})")

    sources = [f for folder in ("bindings", "plan", "kernels/cpu") for f in sorted(glob(f"csrc/{folder}/*.cpp"))]
    cuda = cuda_sources(cpp_extension.CUDA_HOME, torch.version.cuda)
    make_extension = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    # Torch's headers as system headers: -Wextra is meant for ours.
    cxx_flags = CXX_FLAGS + [f"-isystem{path}" for path in cpp_extension.include_paths()]
    cxx_flags += DEBUG_FLAGS if debug else RELEASE_FLAGS
    say(f"torch {torch.__version__}, {'debug' if debug else 'release'}, {len(sources) + len(cuda)} files")
    extension = make_extension(
        "fastseq._C",
        sources + cuda,
        include_dirs=[os.path.abspath("csrc")],  # ninja runs elsewhere
        depends=sorted(glob("csrc/**/*.h", recursive=True)),  # for builds without ninja, which reads depfiles instead
        extra_compile_args={"cxx": cxx_flags, "nvcc": ["-g"] if debug else []},
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**native())
