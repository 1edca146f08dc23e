"""Forked processes: they answer with the parent's bits whatever was used before the fork, and do not hang."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from emulation.build import compiler
from fork_scenarios import FIRST, SCENARIOS


def run_bounded(*command: str) -> None:
    """Runs a command that must end with 0, and ends it and all its children if it does not within some minutes."""
    __tracebackhide__ = True
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTSEQ_")}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"hangs:\n{output}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"status {process.returncode}:\n{output}"


@pytest.mark.parametrize("name", FIRST)
def test_forked_processes_answer(name: str) -> None:
    run_bounded(sys.executable, "tests/fork_scenarios.py", name)


def test_forked_processes_answer_after_use() -> None:
    """One process, to import torch once; the output names the scenario that failed."""
    run_bounded(sys.executable, "tests/fork_scenarios.py", *(name for name in SCENARIOS if name not in FIRST))


@pytest.mark.parametrize("flags", [["-O2"], ["-O1", "-fsanitize=address,undefined"]], ids=["release", "sanitized"])
def test_helpers_by_themselves(tmp_path: Path, flags: list[str]) -> None:
    """csrc/plan/threads.cpp: helpers come, take each unit once, phase by phase, and pass exceptions on; also forked."""
    harness = tmp_path / "threads_harness"
    sources = ["tests/threads_harness.cpp", "csrc/plan/threads.cpp", "csrc/plan/fork.cpp"]
    flags = ["-std=c++17", "-Wall", "-Wextra", "-fopenmp", "-Icsrc", *flags]
    run_bounded(compiler(), *flags, *sources, "-o", str(harness))
    run_bounded(str(harness))


def test_locks_and_threads_across_a_fork(tmp_path: Path) -> None:
    """csrc/plan/fork.cpp by itself, with a lock that certainly is another thread's at the moment of the fork."""
    harness = tmp_path / "fork_harness"
    sources = ["tests/fork_harness.cpp", "csrc/plan/fork.cpp"]
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-pthread", "-Icsrc"]
    run_bounded(compiler(), *flags, *sources, "-o", str(harness))
    run_bounded(str(harness))
