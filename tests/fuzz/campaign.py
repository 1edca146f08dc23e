"""Many cases in worker processes: what fails is reduced and reported, and so is a case that kills its worker."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from . import plants
from .case import Case
from .lockstep import Result, run_case
from .reduce import reduce, replay
from .source import SeededSource
from .strategies import make_case

ROOT = Path(__file__).resolve().parents[2]
MOST_REDUCED = 5  # failures that one worker makes small


@dataclass
class Failure:
    where: str  # arguments that reproduce it
    message: str
    reduced: str = ""


@dataclass
class Summary:
    cases: int = 0
    features: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)


def outcome(case: Case) -> Result:
    """`run_case`, with an error of the fuzzer or of fastseq's own functions as a failure."""
    try:
        return run_case(case)
    except Exception:
        return Result(failure=f"not a difference but an error\n{traceback.format_exc()}")


def signature(failure: str) -> str:
    """Failures that read alike but for numbers count as the same."""
    return re.sub(r"[-\d.e+\[\], ]+", "#", failure)[:60]


def describe(case: Case, choices: Sequence[int], failure: str) -> str:
    return f"{failure}\n{case}\n--replay {','.join(map(str, choices)) or 0}"


# The worker -----------------------------------------------------------------------------------------------------------


def work(seed: int, indices: range, plant: str, seconds: float) -> None:
    """Runs cases; writes one JSON line before each and one behind it."""
    with plants.planted(plant):
        work_through(seed, indices, seconds)


def work_through(seed: int, indices: range, seconds: float) -> None:
    torch.set_num_threads(1)
    reduced: set[str] = set()
    for index in indices:
        print(json.dumps({"start": index}), flush=True)
        source = SeededSource(seed, index)
        result = outcome(make_case(source))
        line: dict[str, Any] = {"done": index, "features": result.features, "failure": result.failure}
        kind = signature(result.failure)
        if result.failure and kind not in reduced and len(reduced) < MOST_REDUCED:
            reduced.add(kind)
            case, choices = reduce(source.choices, lambda trial: bool(outcome(trial).failure), seconds)
            line["reduced"] = describe(case, choices, outcome(case).failure)
        print(json.dumps(line), flush=True)


class Worker:
    """A process with the rest of its share of the cases."""

    def __init__(self, seed: int, indices: range, plant: str, seconds: float, inbox: queue.Queue[Any]) -> None:
        self.indices = indices
        self.at: int | None = None
        self.heard = time.monotonic()
        text = f"{seed},{indices.start},{indices.stop},{indices.step},{seconds}"
        command = [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz", "--work", text, "--plant", plant]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.stderr: list[str] = []
        assert self.process.stdout is not None and self.process.stderr is not None
        self.reader = threading.Thread(target=self.read, args=(self.process.stdout, inbox), daemon=True)
        self.listener = threading.Thread(target=self.listen, args=(self.process.stderr,), daemon=True)
        self.reader.start()
        self.listener.start()

    def read(self, stream: TextIO, inbox: queue.Queue[Any]) -> None:
        for line in stream:
            inbox.put((self, line))
        inbox.put((self, None))

    def listen(self, stream: TextIO) -> None:
        for line in stream:
            self.stderr = [*self.stderr[-60:], line]

    def last_words(self) -> str:
        self.listener.join(timeout=10)
        return "".join(self.stderr)


# The campaign ---------------------------------------------------------------------------------------------------------


def run(
    seed: int,
    indices: range,
    jobs: int = 1,
    plant: str = "",
    seconds: float = 20.0,
    patience: float = 120.0,
    progress: bool = True,
) -> Summary:
    """Runs the cases `indices` of `seed` in `jobs` processes.

    seconds: how long to reduce a failure; patience: how long a single case may take before its worker is killed.
    """
    summary = Summary()
    inbox: queue.Queue[Any] = queue.Queue()
    shares = [indices[job :: max(jobs, 1)] for job in range(max(jobs, 1))]
    workers = {Worker(seed, share, plant, seconds, inbox) for share in shares if len(share)}
    started = shown = time.monotonic()
    try:
        while workers:
            try:
                worker, text = inbox.get(timeout=1)
            except queue.Empty:
                worker, text = None, ""
            now = time.monotonic()
            for silent in workers:
                if now - silent.heard > patience + 2 * seconds:
                    silent.process.kill()  # its reader then reports the end
                    silent.stderr.append(f"killed: no answer for {patience:.0f} s")
                    silent.heard = now
            if worker is not None and text is None:
                workers.remove(worker)
                rest = after_death(worker, seed, summary)
                if len(rest):
                    workers.add(Worker(seed, rest, plant, seconds, inbox))
            elif worker is not None:
                worker.heard = now
                take(worker, json.loads(text), seed, summary)
            if progress and now - shown > 10:
                shown = now
                rate = summary.cases / (now - started)
                print(
                    f"{summary.cases}/{len(indices)} cases, {len(summary.failures)} failures, {rate:.0f} cases/s",
                    flush=True,
                )
    finally:
        for worker in workers:
            worker.process.kill()
    return summary


def take(worker: Worker, line: dict[str, Any], seed: int, summary: Summary) -> None:
    if "start" in line:
        worker.at = line["start"]
        return
    worker.at = None
    done = worker.indices.index(line["done"]) + 1
    worker.indices = worker.indices[done:]
    summary.cases += 1
    summary.features.update(line["features"])
    if line["failure"]:
        where = f"--seed {seed} --case {line['done']}"
        summary.failures.append(Failure(where, line["failure"], line.get("reduced", "")))
        print(f"FAILED {where}\n    {line['failure'].splitlines()[0]}", flush=True)


def after_death(worker: Worker, seed: int, summary: Summary) -> range:
    """Reports the case a worker died in; the cases that are left to do."""
    code = worker.process.wait()
    if code == 0 and worker.at is None:
        return worker.indices
    if worker.at is None:
        raise RuntimeError(f"a worker ended with {code} outside of any case:\n{worker.last_words()}")
    where = f"--seed {seed} --case {worker.at}"
    message = f"the process ended with {code}\n{worker.last_words()}"
    summary.cases += 1
    summary.failures.append(Failure(where, message))
    print(f"CRASHED {where}: the process ended with {code}", flush=True)
    return worker.indices[worker.indices.index(worker.at) + 1 :]


def report(summary: Summary) -> Iterator[str]:
    """The lines of a summary."""
    groups: dict[str, list[str]] = {}
    for name, count in sorted(summary.features.items()):
        group, _, rest = name.partition(" ")
        groups.setdefault(group, []).append(f"{rest or group} {count}")
    for group, entries in groups.items():
        yield f"{group}: {', '.join(entries)}"
    for failure in summary.failures:
        yield f"FAILED python -m tests.fuzz {failure.where}"
        yield "    " + (failure.reduced or failure.message).replace("\n", "\n    ")
    yield f"{summary.cases} cases, {len(summary.failures)} failures"


def show(case: Case, choices: Sequence[int], seconds: float) -> bool:
    """Runs one case here, prints it, and reduces it if it fails."""
    failure = outcome(case).failure
    print(describe(case, choices, failure or "passed"))
    if failure and seconds:
        case, choices = reduce(choices, lambda trial: bool(outcome(trial).failure), seconds)
        print(f"\nreduced:\n{describe(case, choices, outcome(case).failure)}")
    return not failure


def seeded(seed: int, index: int) -> tuple[Case, list[int]]:
    source = SeededSource(seed, index)
    return make_case(source), source.choices


def replayed(text: str) -> tuple[Case, list[int]]:
    return replay([int(choice) for choice in text.split(",") if choice])
