"""Tasks in a process of their own, which may crash, hang or lose its GPU without taking the rest along.

The child appends JSON lines to a file: it begins a task, writes rows, ends the task. The parent reads them as they
come, kills a child that takes too long over a task, and starts another one for the tasks that are left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]

START_SECONDS = 90.0  # importing torch and making a CUDA context, on a machine that is busy
LONGEST_TEXT = 600
MOST_CHILDREN = 20
RESTART, LOST_DEVICE = 4, 3  # exit codes of a child that wants another one to go on


def text_of(error: BaseException) -> str:
    """Type and text of an exception on one line of sensible length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}..."


# The child -----------------------------------------------------------------------------------------------------------


class Reporter:
    """The child's side of the file."""

    def __init__(self, path: Path, deadline: float) -> None:
        self.path = path
        self.deadline = deadline
        self.begun = {event["task"] for event in read_events(path) if event["event"] == "begin"}
        self.is_first = True

    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def wants(self, task: str) -> bool:
        """Whether a task is still to be done, and there is time."""
        return task not in self.begun and self.seconds_left() > 0

    def write(self, event: str, **content: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **content}) + "\n")

    def row(self, **content: Any) -> None:
        self.write("row", row=content)

    @contextmanager
    def task(self, name: str, limit_s: float) -> Iterator[None]:
        """A task that the parent ends after `limit_s`. What it raises is for the caller to record."""
        self.begun.add(name)
        self.is_first = False
        self.write("begin", task=name, limit_s=limit_s)
        yield
        self.write("end", task=name)

    def stage(self, name: str, limit_s: float) -> None:
        """A part of the task at hand, which may take so long from now."""
        self.write("stage", stage=name, limit_s=limit_s)

    def lost(self) -> set[str]:
        """Tasks that were begun and never ended: they took their process along."""
        events = read_events(self.path)
        return self.begun - {event["task"] for event in events if event["event"] == "end"}

    def done(self) -> None:
        self.write("done")


def read_events(path: Path, offset: int = 0) -> list[dict[str, Any]]:
    """The complete lines of the file behind `offset`."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        file.seek(offset)
        complete = file.read().rpartition(b"\n")[0]
        return [json.loads(line) for line in complete.splitlines() if line.strip()]
    return []


# The parent ----------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of the tasks: their rows, those that ended their process, and why not all were reached if so."""

    rows: list[Row] = field(default_factory=list)
    lost: list[Row] = field(default_factory=list)  # {"task", "stage", "problem"}
    is_complete: bool = False
    problem: str = ""


class Process:
    """A child in a process group of its own, with its output in a file."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, cwd: Path | None = None
    ) -> None:
        self.log = log
        with open(log, "ab") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            self.popen = subprocess.Popen(
                list(command),
                env=dict(environment),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def returncode(self) -> int | None:
        return self.popen.poll()

    def kill(self) -> None:
        """Ends the process and what it started, unless it has ended already."""
        if self.popen.poll() is not None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # in an uninterruptible driver call: not ours to wait for
            self.popen.wait(10)

    def wait(self, deadline: float) -> int | None:
        """The exit code; None where the time was up, and the process is killed."""
        try:
            return self.popen.wait(max(0.1, deadline - time.time()))
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def tail(self, characters: int = 2000) -> str:
        with suppress(OSError), open(self.log, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4 * characters))
            return file.read().decode(errors="replace")[-characters:].strip()
        return ""


def run_tasks(
    command: Callable[[Path, float], Sequence[str]],
    environment: Mapping[str, str],
    rows_file: Path,
    log: Path,
    deadline: float,
    grace: float = 5.0,
) -> Outcome:
    """Runs children until all tasks are done, or it is `deadline` (time.time()), which children know and stop at.

    command: of a child, for its file and its deadline.
    """
    outcome = Outcome()
    begun = 0
    for _ in range(MOST_CHILDREN):
        if time.time() >= deadline:
            outcome.problem = outcome.problem or "out of time"
            break
        code, task, stage, problem = _run_child(command, environment, rows_file, log, deadline, grace)
        if task is not None:
            outcome.lost.append({"task": task, "stage": stage, "problem": problem})
            with open(rows_file, "a", encoding="utf-8") as file:  # behind a line that may be incomplete
                file.write("\n")
        events = read_events(rows_file)
        outcome.is_complete = any(event["event"] == "done" for event in events)
        if outcome.is_complete:
            outcome.problem = ""
            break
        outcome.problem = problem or f"the process ended with exit code {code}"
        before, begun = begun, sum(event["event"] == "begin" for event in events)
        if begun == before and code != RESTART:
            break  # it does not even start: another one would not either
    outcome.rows = [event["row"] for event in read_events(rows_file) if event["event"] == "row"]
    return outcome


def _run_child(
    command: Callable[[Path, float], Sequence[str]],
    environment: Mapping[str, str],
    rows_file: Path,
    log: Path,
    deadline: float,
    grace: float,
) -> tuple[int | None, str | None, str, str]:
    """Exit code, the task and stage it was at when it ended early, and why."""
    offset = rows_file.stat().st_size if rows_file.exists() else 0
    process = Process(command(rows_file, deadline), environment, log)
    task: str | None = None
    stage = ""
    limit = START_SECONDS
    since = time.time()
    try:
        while True:
            code = process.returncode()
            for event in read_events(rows_file, offset):
                since = time.time()
                if event["event"] == "begin":
                    task, stage, limit = event["task"], "", event["limit_s"]
                elif event["event"] == "stage":
                    stage, limit = event["stage"], event["limit_s"]
                elif event["event"] == "end":
                    task, limit = None, START_SECONDS
            if rows_file.exists():
                with open(rows_file, "rb") as file:
                    file.seek(offset)
                    offset += file.read().rfind(b"\n") + 1
            if code is not None:
                why = "" if code in (0, RESTART) else f"the process ended with {name_of_exit(code)}"
                return code, task, stage, why if task is None else why or "the process ended in the middle of it"
            if time.time() - since > limit:
                return None, task, stage, f"no end after {limit:.0f} s"
            if time.time() > deadline + grace:
                return None, task, stage, "out of time"
            time.sleep(0.05)
    finally:
        process.kill()


def name_of_exit(code: int) -> str:
    with suppress(ValueError):
        if code < 0:
            return signal.Signals(-code).name
    return f"exit code {code}"


def python(script: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-u", str(script), *arguments]
