"""A served network under load: the server in processes of its own, and a client that asks and notes what it got.

The client and the server share the machine's cores. Requests are raw bytes of one input.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch
from cases import CASES
from torch import Tensor

from fastseq.testing import MODELS

HEADERS = {"Content-Type": "application/octet-stream"}
CONNECTIONS = 8  # of the closed loop
INPUTS = 16  # that requests are drawn from
SECONDS_TO_START, SECONDS_TO_ANSWER = 120, 60


def __getattr__(name: str) -> Any:
    """`serving_load:seed2` for the server's workers."""
    if name in MODELS:
        return MODELS[name].build
    raise AttributeError(name)


class Server:
    """`python -m fastseq serve` for one of fastseq's test networks; `options` are that command's."""

    def __init__(self, case: str, threads: int, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        shape = ",".join(map(str, CASES[case].input_shape))
        command = [sys.executable, "-m", "fastseq", "serve", f"serving_load:{case}", "--shape", shape]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), *options],
            cwd=Path(__file__).parent,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,
        )
        self.url = f"http://127.0.0.1:{self.port}"

    def resident_bytes(self) -> int:
        """Of all its processes; what they share counts for each."""
        pages = 0
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # it may end meanwhile
                    if os.getsid(int(entry.name)) == self.process.pid:
                        pages += int((entry / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


@dataclass
class Answers:
    """What became of some requests: seconds from when each was due to its answer, and what was wrong, by reason."""

    seconds: list[float] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def quantiles(self) -> dict[str, float | None]:
        shares = (("p50_ms", 0.5), ("p99_ms", 0.99), ("p999_ms", 0.999))
        return {name: 1e3 * self.quantile(share) if self.seconds else None for name, share in shares}


class Client:
    """Asks one server. `check` says of an input's number and its answer what is wrong, or nothing."""

    def __init__(self, server: Server, case: str, check: Callable[[int, bytes], str | None] | None = None) -> None:
        self.server, self.check = server, check
        self.inputs: Tensor = CASES[case].example(INPUTS)
        self.bodies = [x.numpy().tobytes() for x in self.inputs]
        timeout = aiohttp.ClientTimeout(SECONDS_TO_ANSWER)
        # Let go of idle connections before the server does, which may do so just when one is used again.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        self.session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        self.draw = random.Random(0)

    async def __aenter__(self) -> Client:
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline and self.server.process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with self.session.get(f"{self.server.url}/health") as response:
                    if response.status == 200:
                        return self
            await asyncio.sleep(0.1)
        await self.session.close()
        raise RuntimeError("the server does not become healthy")

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def counters(self) -> dict[str, float]:
        """Sums over the workers, once they have reported."""
        await asyncio.sleep(1.5)
        async with self.session.get(f"{self.server.url}/metrics") as response:
            text = await response.text()
        found: dict[str, float] = {}
        for name, value in re.findall(r"^(fastseq_\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    async def ask(self, answers: Answers, due: float) -> None:
        number = self.draw.randrange(INPUTS)
        try:
            body = self.bodies[number]
            async with self.session.post(f"{self.server.url}/predict", data=body, headers=HEADERS) as response:
                answer = await response.read()
            problem = f"status {response.status}: {answer[:100]!r}" if response.status != 200 else None
            if problem is None and self.check is not None:
                problem = self.check(number, answer)
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            problem = f"{type(error).__name__}: {error}"
        answers.seconds.append(time.monotonic() - due)
        if problem is not None:
            answers.problems[problem] += 1

    async def closed_loop(self, seconds: float) -> Answers:
        """A few connections that ask again at once: as many requests as the server answers."""
        answers = Answers()
        end = time.monotonic() + seconds

        async def one() -> None:
            while (now := time.monotonic()) < end:
                await self.ask(answers, now)

        await asyncio.gather(*(one() for _ in range(CONNECTIONS)))
        return answers

    async def open_loop(self, rate: float, seconds: float) -> Answers:
        """Requests at the times of a Poisson process of `rate` a second, whether earlier ones are answered or not: a
        slow server gets a queue and not fewer requests."""
        answers = Answers()
        tasks: set[asyncio.Task[None]] = set()
        due = begin = time.monotonic()
        while (due := due + self.draw.expovariate(rate)) < begin + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self.ask(answers, due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        return answers


def expected_answers(model: torch.nn.Module, inputs: Tensor) -> Tensor:
    """In float64, of a plain float32 model."""
    with torch.no_grad():
        return model.double()(inputs.double())
