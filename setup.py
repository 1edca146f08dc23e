"""Builds `fastseq._C` beside the installed torch. Metadata is in pyproject.toml, FASTSEQ_* in docs/debugging.md."""

from __future__ import annotations

import os
import runpy
import sys
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import setup

ENV = runpy.run_path("fastseq/_env.py")  # the package itself imports torch, which may be absent here
CPU = runpy.run_path("csrc/build_cpu.py")
CUDA = runpy.run_path("csrc/build_cuda.py")


def say(text: str) -> None:
    print(f"fastseq build: {text}", file=sys.stderr, flush=True)


def plan_cuda(is_debug: bool, torch_cuda: str | None) -> tuple[Any, str]:
    """What FASTSEQ_CUDA and nvcc make possible: a plan of csrc/build_cuda.py and "", or None and the reason."""
    wanted = ENV["cuda"]()
    try:
        plan, reason = CUDA["plan"](wanted, is_debug)
    except CUDA["CannotBuild"] as error:
        sys.exit(f"fastseq build: {error}")
    if plan is None:
        say(f"building CPU only: {reason}")
        return None, reason
    say(f"FASTSEQ_CUDA={wanted}: {plan.describe()}")
    say("the CUDA kernels have not yet run on hardware; FASTSEQ_CUDA=0 leaves them out, TORCH_CUDA_ARCH_LIST restricts")
    if torch_cuda is None:
        say("the installed torch is built without CUDA; the same binary will use the kernels beside one with CUDA")
    for warning in plan.warnings():
        say(f"warning: {warning}")
    return plan, ""


def c_string(text: str) -> str:
    return " ".join(text.split()).replace("\\", r"\\").replace('"', r"\"")


def write_if_changed(path: str, text: str) -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


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

    # For torch's part of the build, as csrc/build_cuda.py does.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    debug = ENV["debug"]()
    cuda, why_no_cuda = plan_cuda(debug, torch.version.cuda)
    kind = "debug" if debug else "release"
    # pip would build in a new directory each time; a fixed one makes every route incremental.
    build_temp = f"build/{sys.implementation.cache_tag}-torch{torch.__version__}-{kind}"

    class BuildExtension(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = build_temp

        def build_extensions(self) -> None:
            # In a header and not among the flags, where a change would compile every file again.
            version = f'#define FS_CUDA_VERSION "{cuda.nvcc.version if cuda else ""}"'
            note = f'#define FS_CUDA_NOTE "{c_string(why_no_cuda)}"'
            write_if_changed(f"{build_temp}/fs_cuda_build.h", f"#pragma once\n{version}\n{note}\n")
            try:
                if cuda:
                    extension.extra_objects = [str(path) for path in CUDA["compile_objects"](cuda)]
                    extension.depends += extension.extra_objects
                super().build_extensions()
            except CUDA["CannotBuild"] as error:
                sys.exit(f"fastseq build: FAILED: {error}. FASTSEQ_CUDA=0 builds without")
            except RuntimeError as error:  # ninja failed; a Python traceback would bury the compiler's message
                sys.exit(f"fastseq build: FAILED, see the compiler's message above ({error})")

    folders = ("bindings", "plan", "kernels/cpu", "kernels/cuda")
    sources = [f for folder in folders for f in sorted(glob(f"csrc/{folder}/*.cpp"))]
    if cuda:
        sources.remove("csrc/kernels/cuda/no_engine.cpp")  # engine.cu has it
    # Torch's headers as system headers: -Wextra is meant for ours.
    cxx_flags = CPU["CXX_FLAGS"] + [f"-isystem{path}" for path in cpp_extension.include_paths()]
    cxx_flags += CPU["DEBUG_FLAGS" if debug else "RELEASE_FLAGS"]
    say(f"torch {torch.__version__}, {kind}, {len(sources)} C++ files")
    extension = cpp_extension.CppExtension(
        "fastseq._C",
        sources,
        include_dirs=[os.path.abspath("csrc"), os.path.abspath(build_temp)],  # ninja runs elsewhere
        # For builds without ninja, which reads depfiles instead; and when to link again.
        depends=sorted(glob("csrc/**/*.h", recursive=True)) + [f"{build_temp}/fs_cuda_build.h"],
        extra_compile_args={"cxx": cxx_flags},
        extra_link_args=["-fopenmp", *(CUDA["link_flags"](cuda) if cuda else [])],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**native())
