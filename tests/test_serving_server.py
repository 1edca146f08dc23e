"""fastseq.serving.server: good requests are answered, bad ones get a 4xx with a reason, workers and weights change."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers import in_threads
from torch import nn

from fastseq.testing import assert_matches

pytest.importorskip("litserve", reason="needs the extra fastseq[serve]")
httpx = pytest.importorskip("httpx")

RAW = {"Content-Type": "application/octet-stream"}
SHAPE = (3, 8, 8)
# What is served: a module that the workers import.
MODEL = """
from torch import nn
import torch

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 4))

def two():
    class Two(nn.Module):
        def forward(self, x):
            return x, x
    return Two()
"""


def make() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 4)
    return nn.Sequential(*layers).eval()


class Server:
    """`python -m fastseq serve` in a process of its own."""

    def __init__(self, folder: Path, *arguments: str, model: str = "served:make") -> None:
        (folder / "served.py").write_text(MODEL)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "fastseq", "serve", model, "--shape", "3,8,8", "--port", str(self.port)]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [*command, *arguments],
            cwd=folder,
            env=environment,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def text(self) -> str:
        self.log.flush()
        self.log.seek(0)
        return self.log.read()

    def wait_until(self, is_so: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if is_so():
                    return
            except httpx.TransportError:
                assert self.process.poll() is None, self.text()
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds} s:\n{self.text()}")

    def is_healthy(self) -> bool:
        return bool(self.client.get("/health").status_code == 200)

    def processes(self) -> list[int]:
        """All of its session that run."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if fields[3] == str(self.process.pid) and fields[0] != "Z":
                    found.append(int(entry.name))
        return found

    def metrics(self) -> dict[str, float]:
        lines = self.client.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}

    def predict(self, x: torch.Tensor) -> Any:
        response = self.client.post("/predict", content=x.numpy().tobytes(), headers=RAW)
        assert response.status_code == 200, response.text
        return torch.frombuffer(bytearray(response.content), dtype=torch.float32).view(
            *map(int, response.headers["X-Shape"].split(","))
        )

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def close(self) -> None:
        self.client.close()
        for process in self.processes():
            os.kill(process, signal.SIGKILL)
        self.process.wait(10)
        self.log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    torch.save(make().state_dict(), folder / "weights.pt")
    options = ("--weights", "weights.pt", "--timeout", "5", "--report-seconds", "0.2", "--selfcheck-seconds", "0.5")
    started = Server(folder, *options, "--most-inputs", "8")
    try:
        started.wait_until(started.is_healthy)
        yield started
    finally:
        started.close()


@pytest.mark.parametrize("count", [1, 3, 8])
def test_raw_bytes(server: Server, count: int) -> None:
    x = torch.randn(count, *SHAPE)
    assert_matches(server.predict(x), make(), x)


@pytest.mark.parametrize("shape", [SHAPE, (1, *SHAPE), (4, *SHAPE)])
def test_json(server: Server, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    response = server.client.post("/predict", json={"inputs": x.tolist()})
    assert response.status_code == 200 and response.headers["Content-Type"] == "application/json"
    batch = x if x.dim() == 4 else x[None]
    assert_matches(torch.tensor(response.json()["outputs"]), make(), batch)


def test_whole_numbers_are_numbers(server: Server) -> None:
    x = torch.ones(1, *SHAPE)
    response = server.client.post("/predict", json={"inputs": torch.ones(SHAPE, dtype=torch.int64).tolist()})
    assert_matches(torch.tensor(response.json()["outputs"]), make(), x)


ONE = torch.zeros(SHAPE).tolist()


def filled(number: str) -> bytes:
    """An input all of whose numbers are this."""
    return json.dumps({"inputs": ONE}).replace("0.0", number).encode()


@pytest.mark.parametrize(
    ("status", "reason", "headers", "body"),
    [
        (415, "got none", {}, b"x"),
        (415, "got text/plain", {"Content-Type": "text/plain"}, b"x"),
        (415, "got multipart/form-data", {"Content-Type": "multipart/form-data; boundary=x"}, b"--x--"),
        (422, "expected 768 bytes for each input (3x8x8 float32, little endian), got 0", RAW, b""),
        (422, "got 767", RAW, bytes(767)),
        (422, "NaN or infinite", RAW, b"\xff" * 768),
        (413, "at most 8 inputs, got 9", RAW, bytes(768 * 9)),
        (413, "a body has at most", RAW, bytes(1 << 20)),
        (400, "not JSON", None, b""),
        (400, "not JSON", None, b'{"inputs": [1, 2'),
        (400, "not JSON", None, b"\xff\xfe\x00"),
        (400, "not JSON", None, b"[" * 30000),
        (422, 'an object with "inputs"', None, b"[1, 2]"),
        (422, 'an object with "inputs"', None, b'{"input": []}'),
        (422, 'an object with "inputs"', None, json.dumps({"inputs": ONE, "x": 1}).encode()),
        (422, "got 3x8", None, json.dumps({"inputs": ONE[0][:3]}).encode()),
        (422, "got 0", None, b'{"inputs": []}'),
        (422, "no array", None, b'{"inputs": [[1, 2], [3]]}'),
        (422, "must be numbers", None, b'{"inputs": "text"}'),
        (422, "must be numbers", None, b'{"inputs": null}'),
        (422, "must be numbers", None, b'{"inputs": {"a": 1}}'),
        (
            422,
            "must be numbers",
            None,
            filled("true"),
        ),
        (422, "must be numbers", None, filled('"1"')),
        (422, "NaN or infinite", None, filled("NaN")),
        (422, "NaN or infinite", None, filled("1e39")),
        (422, "must be numbers", None, filled("1" + "0" * 30)),
    ],
)
def test_bad_requests(server: Server, status: int, reason: str, headers: dict[str, str] | None, body: bytes) -> None:
    headers = {"Content-Type": "application/json"} if headers is None else headers
    response = server.client.post("/predict", content=body, headers=headers)
    assert response.status_code == status, response.text
    assert reason in response.json()["detail"]


def test_a_fuzz_of_bodies(server: Server) -> None:
    """Parts of good bodies put together otherwise: never a 5xx, and the server goes on."""
    generator = torch.Generator().manual_seed(0)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    good = [torch.randn(2, *SHAPE).numpy().tobytes(), json.dumps({"inputs": ONE}).encode()]
    for _ in range(150):
        body = bytearray(good[below(2)])
        for _ in range(below(4)):
            first, second = sorted((below(len(body) + 1), below(len(body) + 1)))
            match below(4):
                case 0:
                    del body[first:second]
                case 1:
                    body[first:first] = body[first:second][:2000]
                case 2 if body:
                    body[below(len(body))] = below(256)
                case _:
                    body[first:first] = [b"[", b"}", b'"', b"e999", b"-", b"null", b"\x00", b"NaN"][below(8)]
        kind = ("application/json", "application/octet-stream")[below(2)]
        response = server.client.post("/predict", content=bytes(body), headers={"Content-Type": kind})
        assert response.status_code == 200 or 400 <= response.status_code < 500, (response.text, bytes(body))
        assert response.status_code == 200 or response.json()["detail"]
    assert server.is_healthy()


def test_too_many_at_once_are_refused() -> None:
    from fastseq.serving.server import Limits

    release, answers = asyncio.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ask(limits: Limits, method: str) -> None:
        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answers.append((message["status"], dict(message["headers"]).get(b"retry-after")))

        await limits({"type": "http", "method": method}, None, send)

    async def work() -> None:
        limits = Limits(app, seconds=0.5, most_waiting=2)
        waiting = [asyncio.create_task(ask(limits, "POST")) for _ in range(2)]
        await asyncio.sleep(0)
        await ask(limits, "POST")
        assert answers == [(503, b"1")]
        read = asyncio.create_task(ask(limits, "GET"))  # health and metrics
        await asyncio.gather(*waiting)  # for which it takes too long
        assert answers[1:] == [(504, None)] * 2 and limits.waiting == 0
        release.set()
        await asyncio.gather(read, ask(limits, "POST"))
        assert answers[3:] == [(200, None)] * 2 and limits.waiting == 0

    asyncio.run(work())


def test_paths_and_methods(server: Server) -> None:
    assert server.client.get("/predict").status_code == 405
    assert server.client.post("/nothing", content=b"").status_code == 404


def test_metrics_count(server: Server) -> None:
    before = server.metrics()
    for count in (1, 2):
        server.predict(torch.randn(count, *SHAPE))
    name = 'fastseq_inputs_total{worker="0"}'
    server.wait_until(lambda: server.metrics()[name] >= before[name] + 3, 20)
    after = server.metrics()
    assert after['fastseq_selfcheck_passed{worker="0"}'] == 1.0 and after['fastseq_batch_errors_total{worker="0"}'] == 0
    assert (
        after['fastseq_batch_seconds_bucket{le="+Inf",worker="0"}'] == after['fastseq_batch_seconds_count{worker="0"}']
    )
    assert after['fastseq_memory_bytes{kind="weights",worker="0"}'] == sum(p.nbytes for p in make().parameters())


def test_requests_at_once_are_batched(server: Server) -> None:
    model, failures = make(), []

    def work(seed: int) -> None:
        x = torch.randn(1 + seed % 2, *SHAPE, generator=torch.Generator().manual_seed(seed))
        for _ in range(10):
            try:
                assert_matches(server.predict(x), model, x)
            except Exception as error:
                failures.append(error)

    in_threads(work, 6)
    assert not failures


def test_new_weights_without_a_restart(server: Server, tmp_path: Path) -> None:
    """Under load: each answer is that of the old or the new weights, and a file that does not fit changes nothing."""
    x, path = torch.randn(2, *SHAPE), Path(server.log.name).parent / "weights.pt"
    old, new = make(), make()
    with torch.no_grad():
        new[4].bias += 10
    answers: list[torch.Tensor] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            answers.append(server.predict(x))

    def put(state: Any) -> None:
        torch.save(state, tmp_path / "new.pt")
        (tmp_path / "new.pt").replace(path)

    worker = threading.Thread(target=load)
    worker.start()
    try:
        for state in ({"0.weight": torch.ones(1)}, [1, 2]):
            put(state)
            server.wait_until(lambda: server.metrics()['fastseq_weights_failed{worker="0"}'] == 1.0, 20)
            put(old.state_dict())
            server.wait_until(lambda: server.metrics()['fastseq_weights_failed{worker="0"}'] == 0.0, 20)
        put(new.state_dict())
        server.wait_until(lambda: bool((server.predict(x) > 4).all()), 20)
        put(old.state_dict())
        server.wait_until(lambda: bool((server.predict(x) < 4).all()), 20)
    finally:
        stop.set()
        worker.join()
    with torch.no_grad():
        expected = [model(x) for model in (old, new)]
    assert len(answers) > 10
    for answer in answers:
        assert any(torch.allclose(answer, one, rtol=1e-4, atol=1e-5) for one in expected)
    assert server.is_healthy()


def test_a_killed_worker_is_replaced(server: Server) -> None:
    """Its requests are answered or refused with a reason; afterwards all is as before."""
    folder = Path(server.log.name).parent
    found = server.client.get("/metrics").text
    assert "fastseq_report_time_seconds" in found and folder.exists()
    workers = [p for p in server.processes() if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    x, statuses, reasons = torch.randn(1, *SHAPE), [], []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            response = server.client.post("/predict", content=x.numpy().tobytes(), headers=RAW)
            statuses.append(response.status_code)
            if response.status_code != 200:
                reasons.append(response.text)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    before = server.metrics()['fastseq_report_time_seconds{worker="0"}']
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(statuses) <= {200, 500, 503, 504}, statuses
    assert all(json.loads(reason)["detail"] for reason in reasons), reasons
    server.wait_until(lambda: server.metrics()['fastseq_report_time_seconds{worker="0"}'] > before + 5, 60)
    server.wait_until(server.is_healthy)
    assert_matches(server.predict(x), make(), x)


def test_sigterm_ends_all_of_it(server: Server) -> None:
    """The last test of this server."""
    assert len(server.processes()) > 1
    server.stop(signal.SIGTERM)
    deadline = time.monotonic() + 20
    while server.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.processes() == []
    assert "Traceback" not in server.text(), server.text()


@pytest.mark.parametrize(
    ("model", "arguments", "reason"),
    [
        ("served:nothing", (), "has no attribute 'nothing'"),
        ("nowhere:make", (), "No module named 'nowhere'"),
        ("served", (), "expected package.module:function"),
        ("served:torch", (), "gives a module"),
        ("served:make", ("--weights", "nothing.pt"), "nothing.pt"),
        ("served:two", (), "one tensor with a batch"),
        ("served:make", ("--shape", "5,8,8"), "5 channels"),
    ],
)
def test_what_cannot_be_served(tmp_path: Path, model: str, arguments: tuple[str, ...], reason: str) -> None:
    started = Server(tmp_path, *arguments, model=model)
    try:
        assert started.process.wait(120) != 0
        assert reason in started.text()
    finally:
        started.close()
