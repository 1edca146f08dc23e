"""examples/serving/ray_app.py on a cluster that it starts itself; `make test-serving` installs what it needs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from fastseq.testing import MODELS, assert_matches

pytest.importorskip("ray", reason="needs the extra fastseq[ray]")
httpx = pytest.importorskip("httpx")

CASE = MODELS["cifar_vgg_bn"]
SECONDS = 180


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("ray") / "log").open("w+")
    command = [sys.executable, str(ROOT / "examples/serving/ray_app.py"), "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--replicas", "2", "--most-replicas", "2", "--cpus", "0.5"], env=environment, stdout=log, stderr=log
    )
    try:
        deadline = time.monotonic() + SECONDS
        while "ready: " not in Path(log.name).read_text():
            assert process.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.2)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield process, client
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(SECONDS)
        log.close()


def test_it_answers(app: tuple[subprocess.Popen[bytes], httpx.Client]) -> None:
    _, client = app
    for _ in range(5):
        x = CASE.example(1)
        response = client.post("/predict", content=x.numpy().tobytes())
        assert response.status_code == 200, response.text
        assert_matches(torch.frombuffer(bytearray(response.content), dtype=torch.float32)[None], CASE.build(), x)


@pytest.mark.parametrize("body", [b"", bytes(12287), b"\xff" * 12288])
def test_bad_requests(app: tuple[subprocess.Popen[bytes], httpx.Client], body: bytes) -> None:
    response = app[1].post("/predict", content=body)
    assert response.status_code == 422 and response.json()["detail"]


def test_a_fuzz_of_bodies(app: tuple[subprocess.Popen[bytes], httpx.Client]) -> None:
    """Never a 5xx: an answer, or a reason."""
    generator = torch.Generator().manual_seed(0)
    good = CASE.example(1).numpy().tobytes()
    statuses = set()
    for number in range(60):
        body = bytearray(good)
        at = int(torch.randint(len(good), (), generator=generator))
        if number % 3 == 0:
            del body[at:]
        elif number % 3 == 1:
            body[at:at] = bytes(torch.randint(256, (at % 50,), generator=generator).tolist())
        else:  # of the same size
            body[at : at + 4] = bytes(torch.randint(256, (4,), generator=generator).tolist())
            del body[len(good) :]
            body += bytes(len(good) - len(body))
        response = app[1].post("/predict", content=bytes(body))
        statuses.add(response.status_code)
        assert response.status_code == 200 or (response.status_code == 422 and response.json()["detail"]), response.text
    assert statuses == {200, 422}


def test_ray_says_it_is_well(app: tuple[subprocess.Popen[bytes], httpx.Client]) -> None:
    assert app[1].get("/-/healthz").status_code == 200


def test_sigterm_ends_it(app: tuple[subprocess.Popen[bytes], httpx.Client]) -> None:
    """The last test of this app."""
    app[0].send_signal(signal.SIGTERM)
    assert app[0].wait(SECONDS) == 0
