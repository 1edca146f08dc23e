"""One model behind HTTP, on LitServe: what `python -m fastseq serve` starts.

`POST /predict` takes one or several inputs, as raw float32 bytes (`application/octet-stream`) or as JSON
(`{"inputs": [...]}`), and answers in kind. Requests are checked where they arrive and batched in the worker that holds
the model. `GET /health` is 200 while every worker's self-check passes, `GET /metrics` has Prometheus's text format.

LitServe 0.2.19 (https://lightning.ai/docs/litserve) starts the processes, carries the requests and makes the batches.
Its annotations are read at run time, so this file does not postpone them.
"""

import asyncio
import contextlib
import ctypes
import importlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import litserve as ls
import numpy as np
import torch
from fastapi import Depends, HTTPException, Request, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from torch import Tensor, nn

from fastseq.optimize import optimize
from fastseq.serving.runner import Runner

RAW, JSON = "application/octet-stream", "application/json"
# The wire carries float32, little endian, whatever the model computes in.
WIRE = np.dtype("<f4")
SHAPE_HEADER = "X-Shape"


@dataclass(frozen=True)
class Options:
    """How a model is served.

    `model`: "package.module:function" of a function without arguments that returns the plain model. `shape`: of one
    input without its batch, such as (3, 32, 32). `dtype`: the floating-point type that the model computes in.
    `weights`: a state_dict's file, which is loaded at the start and again whenever it changes. `special_values`:
    whether NaN and infinities in a request are passed on or rejected. `most_inputs`: of one request.
    """

    model: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    weights: str | None = None
    optimize: bool = True
    max_batch_size: int = 16
    batch_timeout: float = 0.001  # seconds that a lone request waits for others
    buckets: tuple[int, ...] | None = None
    most_inputs: int = 64
    special_values: bool = False
    timeout: float = 30.0  # seconds after which a request is answered with 504
    most_waiting: int = 512  # requests, beyond which new ones are answered with 503
    report_seconds: float = 1.0  # between two reports of a worker
    selfcheck_seconds: float = 10.0
    reports: str = field(default="", compare=False)  # the folder of the reports

    @property
    def input_bytes(self) -> int:
        return math.prod(self.shape) * WIRE.itemsize

    @property
    def most_bytes(self) -> int:
        # JSON has up to some 25 characters a number, raw bytes 4.
        return 1024 + self.most_inputs * math.prod(self.shape) * 32


def build_model(options: Options) -> nn.Module:
    """The plain model in eval mode, with its weights.

    Raises:
        ValueError: `options.model` names no function that returns an `nn.Module`.
        Exception: whatever that function, or loading its weights, raises.
    """
    name, _, attribute = options.model.partition(":")
    try:
        make = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"expected package.module:function, got {options.model!r}: {error}") from error
    model = make() if callable(make) else make
    if not isinstance(model, nn.Module):
        raise ValueError(f"{options.model} gives a {type(model).__name__}, expected a torch.nn.Module")
    model = model.to(getattr(torch, options.dtype)).eval()
    if options.weights is not None:
        load_weights(model, options.weights)
    return model


def load_weights(model: nn.Module, path: str) -> None:
    """Load a file of a state_dict, all of it or, if it does not fit the model, nothing.

    Raises:
        ValueError: other names or shapes than the model's.
        Exception: whatever `torch.load` raises.
    """
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    own = model.state_dict()
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, expected a state_dict")
    wrong = sorted(own.keys() ^ loaded.keys())
    wrong += [name for name in own if name in loaded and getattr(loaded[name], "shape", None) != own[name].shape]
    if wrong:
        raise ValueError(f"{path} does not fit the model: {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}")
    model.load_state_dict(loaded)


# Requests ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Payload:
    """A request that was found good: `count` inputs as wire bytes."""

    content_type: str
    count: int
    data: bytes


async def read_payload(request: Request, options: Options) -> Payload:
    """Raises HTTPException with a 4xx status and a reason for whatever is no good request."""
    content_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content_type not in (RAW, JSON):
        raise HTTPException(415, f"expected Content-Type {RAW} or {JSON}, got {content_type or 'none'}")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > options.most_bytes:
            raise HTTPException(413, f"a body has at most {options.most_bytes} bytes")
    array = from_bytes(bytes(body), options) if content_type == RAW else from_json(bytes(body), options)
    if len(array) > options.most_inputs:
        raise HTTPException(413, f"a request has at most {options.most_inputs} inputs, got {len(array)}")
    if not options.special_values and not np.isfinite(array).all():
        raise HTTPException(422, "inputs must be finite float32 numbers, got NaN or infinite ones")
    return Payload(content_type, len(array), array.tobytes())


def shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def from_bytes(body: bytes, options: Options) -> np.ndarray:
    if not body or len(body) % options.input_bytes:
        numbers = f"{shape_text(options.shape)} float32, little endian"
        raise HTTPException(422, f"expected {options.input_bytes} bytes for each input ({numbers}), got {len(body)}")
    return np.frombuffer(body, WIRE).reshape(-1, *options.shape)


def from_json(body: bytes, options: Options) -> np.ndarray:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    if not isinstance(document, dict) or document.keys() != {"inputs"}:
        raise HTTPException(422, 'expected an object with "inputs" and nothing else')
    try:
        array = np.asarray(document["inputs"])
    except (ValueError, OverflowError, RecursionError) as error:
        raise HTTPException(422, f"inputs are no array: {error}") from None
    if array.dtype.kind not in "iuf":
        raise HTTPException(422, "inputs must be numbers, in lists of equal lengths")
    if array.shape == options.shape:
        array = array[None]
    if array.shape[1:] != options.shape or len(array) == 0:
        expected = shape_text(options.shape)
        raise HTTPException(422, f"expected inputs of shape {expected} or Nx{expected}, got {shape_text(array.shape)}")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is rejected as that
        return array.astype(WIRE)


def response_of(content_type: str, outputs: Tensor) -> Response:
    array = outputs.detach().to("cpu", torch.float32).contiguous().numpy()
    if content_type == RAW:
        headers = {SHAPE_HEADER: ",".join(map(str, array.shape))}
        return Response(array.astype(WIRE).tobytes(), media_type=RAW, headers=headers)
    values = array.astype(object)
    values[~np.isfinite(array)] = None  # NaN and infinities are no JSON
    return Response(json.dumps({"outputs": values.tolist()}), media_type=JSON)


# The worker ----------------------------------------------------------------------------------------------------------


class Reporter:
    """A thread of a worker: checks the model, follows its weights file, and writes what there is to tell to a file."""

    def __init__(self, options: Options, worker: str, model: nn.Module, runner: Runner) -> None:
        self.options, self.worker, self.model, self.runner = options, worker, model, runner
        self.path = Path(options.reports) / f"{worker}.json"
        self.weights_error = self.selfcheck_error = ""
        self.weights_loaded = self.trimmed_after = 0
        self.stamp = self._stamp()
        self.next_selfcheck = 0.0
        self.report()
        threading.Thread(target=self._run, daemon=True, name="fastseq-reporter").start()

    def _run(self) -> None:
        while True:
            time.sleep(self.options.report_seconds)
            with contextlib.suppress(OSError):  # the folder goes when the server ends
                self.report()

    def _stamp(self) -> tuple[int, int] | None:
        if self.options.weights is None:
            return None
        try:
            status = os.stat(self.options.weights)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino

    def report(self) -> None:
        stamp = self._stamp()
        if stamp is not None and stamp != self.stamp:
            self.stamp = stamp
            try:
                load_weights(self.model, str(self.options.weights))
                self.weights_loaded, self.weights_error = self.weights_loaded + 1, ""
            except Exception as error:  # whatever is in that file: the old weights go on
                self.weights_error = f"{type(error).__name__}: {error}"
        elif self.trimmed_after < self.weights_loaded:  # a report later, when calls have packed them
            self.trimmed_after = self.weights_loaded
            trim_heaps()
        if time.monotonic() >= self.next_selfcheck:
            try:
                self.runner.selfcheck()
                self.selfcheck_error = ""
            except Exception as error:  # all of them mean that this worker should get no requests
                self.selfcheck_error = f"{type(error).__name__}: {error}"
            self.next_selfcheck = time.monotonic() + self.options.selfcheck_seconds
        text = json.dumps(
            {
                "time": time.time(),
                "process": os.getpid(),
                "selfcheck_error": self.selfcheck_error,
                "weights_error": self.weights_error,
                "weights_loaded": self.weights_loaded,
                "stats": self.runner.stats(),
                "memory": self.runner.memory_report(),
            }
        )
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(text)
        unfinished.replace(self.path)


def trim_heaps() -> None:
    """Give memory that is free back to the system: what loading weights left of its files and copies."""
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def read_reports(folder: str) -> dict[str, dict[str, Any]]:
    """The latest report of each worker."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}


Item = tuple[str, Tensor]  # the content type of a request, and its inputs or outputs


class ModelAPI(ls.LitAPI):  # type: ignore[misc]
    """The model as LitServe runs it. Instances are pickled into the workers, which build the model themselves."""

    def __init__(self, options: Options) -> None:
        super().__init__(max_batch_size=options.max_batch_size, batch_timeout=options.batch_timeout)
        self.options = options
        self.workers = 1

    def setup(self, device: str) -> None:
        self.torch_device = torch.device(device)
        model = build_model(self.options).to(self.torch_device)
        if self.options.optimize:
            model = optimize(model, inplace=True)
        self.dtype = getattr(torch, self.options.dtype)
        example = torch.zeros(1, *self.options.shape, dtype=self.dtype, device=self.torch_device)
        most = max(self.options.max_batch_size, self.options.most_inputs)
        self.runner = Runner(model, example, buckets=self.options.buckets, max_batch_size=most)
        outputs = self.runner(example)
        if not isinstance(outputs, Tensor) or outputs.dim() == 0 or len(outputs) != 1:
            raise TypeError(f"a served model returns one tensor with a batch in dimension 0, got {outputs!r:.200}")
        self.runner.reset_stats()
        Reporter(self.options, os.environ.get("LITSERVE_WORKER_ID", "0"), model, self.runner)

    def decode_request(self, request: Payload) -> Item:
        inputs = torch.frombuffer(bytearray(request.data), dtype=torch.float32)
        return request.content_type, inputs.view(request.count, *self.options.shape)

    def batch(self, inputs: list[Item]) -> list[Item]:
        return list(inputs)

    def predict(self, x: Any) -> Any:
        # LitServe makes no batch where max_batch_size is 1.
        items: list[Item] = x if isinstance(x, list) else [x]
        joined = torch.cat([inputs for _, inputs in items]) if len(items) > 1 else items[0][1]
        outputs = self.runner(joined.to(self.torch_device, self.dtype)).cpu()
        parts = outputs.split([len(inputs) for _, inputs in items])
        answered = [(content_type, part) for (content_type, _), part in zip(items, parts, strict=True)]
        return answered if isinstance(x, list) else answered[0]

    def unbatch(self, output: list[Item]) -> list[Item]:
        return output

    def encode_response(self, output: Item) -> Response:
        return response_of(*output)

    def health(self) -> bool:
        """In the processes that take requests: whether each worker has reported lately that its self-check passes."""
        found = read_reports(self.options.reports)
        # A self-check waits for the interpreter and the cores like any call.
        oldest = time.time() - 10 * self.options.report_seconds - 10
        sound = [report for report in found.values() if report["time"] > oldest and not report["selfcheck_error"]]
        return len(sound) == self.workers


# The server ----------------------------------------------------------------------------------------------------------


class Limits:
    """Answers 503 where too many requests wait already, and 504 where LitServe does not answer, which is so where a
    worker died with the request. An ASGI middleware."""

    def __init__(self, app: Any, seconds: float, most_waiting: int) -> None:
        self.app, self.seconds, self.most_waiting = app, seconds, most_waiting
        self.waiting = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.waiting >= self.most_waiting:
            await self.refuse(503, f"{self.waiting} requests are waiting; try again later", scope, receive, send)
            return
        has_begun = False

        async def noting_send(message: Any) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        self.waiting += 1
        try:
            await asyncio.wait_for(self.app(scope, receive, noting_send), self.seconds)
        except (asyncio.TimeoutError, TimeoutError):
            if not has_begun:
                text = f"no answer within {self.seconds:g} s; the request may be sent again"
                await self.refuse(504, text, scope, receive, send)
        finally:
            self.waiting -= 1

    async def refuse(self, status: int, text: str, scope: Any, receive: Any, send: Any) -> None:
        headers = {"Retry-After": "1"} if status == 503 else None
        answer = Response(json.dumps({"detail": text}), status, headers, media_type=JSON)
        await answer(scope, receive, send)


class ReportCollector:
    """The workers' reports as Prometheus metrics, each with a label for its worker."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def collect(self) -> Iterator[Any]:
        reports = read_reports(self.folder)

        def family(kind: Any, name: str, text: str, read: Callable[[dict[str, Any]], Any], label: str = "") -> Any:
            metric = kind(name, text, labels=["worker", label] if label else ["worker"])
            for worker, report in reports.items():
                value = read(report)
                for key, number in value.items() if label else [("", value)]:
                    metric.add_metric([worker, str(key)] if label else [worker], number)
            return metric

        counter, gauge = CounterMetricFamily, GaugeMetricFamily
        for name, text, key in (
            ("fastseq_batches", "Batches that were answered", "calls"),
            ("fastseq_batch_errors", "Batches at which the model raised", "errors"),
            ("fastseq_batch_splits", "Batches that were split", "splits"),
            ("fastseq_inputs", "Inputs that were answered", "rows"),
            ("fastseq_padded_inputs", "Inputs that were added by padding", "padded_rows"),
        ):
            yield family(counter, name, text, lambda r, key=key: r["stats"][key])  # type: ignore[misc]
        yield family(counter, "fastseq_bucket_hits", "Runs by batch size", lambda r: r["stats"]["buckets"], "bucket")
        yield family(counter, "fastseq_native_calls", "Native runs", lambda r: r["stats"]["model"]["fused_calls"])
        text = "Runs that stayed eager, by reason"
        yield family(counter, "fastseq_fallbacks", text, lambda r: r["stats"]["model"]["fallbacks"], "reason")
        yield family(gauge, "fastseq_memory_bytes", "Memory that the model holds", lambda r: r["memory"], "kind")
        text = "Whether the last self-check passed"
        yield family(gauge, "fastseq_selfcheck_passed", text, lambda r: float(not r["selfcheck_error"]))
        text = "Whether the weights' file could not be loaded"
        yield family(gauge, "fastseq_weights_failed", text, lambda r: float(bool(r["weights_error"])))
        yield family(counter, "fastseq_weights_loaded", "Weights taken from the file", lambda r: r["weights_loaded"])
        yield family(gauge, "fastseq_report_time_seconds", "When the worker last reported", lambda r: r["time"])
        text = "Seconds that a batch took in the runner"
        latency = HistogramMetricFamily("fastseq_batch_seconds", text, labels=["worker"])
        for worker, report in reports.items():
            found = report["stats"]["latency"]
            bounds = [*(f"{bound:g}" for bound in found["bounds"]), "+Inf"]
            counts = np.cumsum(found["counts"]).tolist()
            latency.add_metric([worker], list(zip(bounds, counts, strict=True)), found["sum"])
        yield latency


def make_server(options: Options, workers: int = 1, accelerator: str = "auto") -> ls.LitServer:
    """A LitServe server of `workers` processes with the model in each (on GPUs: for each device)."""

    async def checked(request: Request) -> Payload:
        return await read_payload(request, options)

    # FastAPI reads and checks a request by what the parameter is annotated with.
    ModelAPI.decode_request.__annotations__["request"] = Annotated[Payload, Depends(checked)]
    api = ModelAPI(options)
    server = ls.LitServer(
        api,
        accelerator=accelerator,
        workers_per_device=workers,
        timeout=options.timeout,
        middlewares=[(Limits, {"seconds": options.timeout + 1, "most_waiting": options.most_waiting})],
        restart_workers=True,
    )
    api.workers = workers * len(server.devices)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ReportCollector(options.reports))

    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    server.app.add_api_route("/metrics", metrics, methods=["GET"])
    return server


def serve(
    options: Options,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    workers: int = 1,
    accelerator: str = "auto",
    log_level: str = "warning",
) -> None:
    """Serve until SIGINT or SIGTERM: requests that have begun are answered, and no process is left behind.

    Raises:
        ValueError: what LitServe says of host and port, `options.model` is no such function, or weights do not fit.
    """
    sys.path.insert(0, os.getcwd())  # as python -m does, for the workers too
    build_model(options)  # what is wrong with it is said here, and not by each worker
    # LitServe says SIGTERM is graceful, but it would leave its processes alive; SIGINT ends them all.
    parent = os.getpid()

    def interrupt(number: int, frame: Any) -> None:
        # The process that takes requests, forked from this one, raises the signal again when it has answered them.
        raise KeyboardInterrupt if os.getpid() == parent else SystemExit(0)

    signal.signal(signal.SIGTERM, interrupt)
    folder = tempfile.mkdtemp(prefix="fastseq-serve-")
    try:
        server = make_server(replace(options, reports=folder), workers, accelerator)
        server.run(host=host, port=port, log_level=log_level, generate_client_file=False, num_api_servers=1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
