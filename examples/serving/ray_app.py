"""The same network on Ray Serve: batches, several replicas, autoscaling, health, metrics; a local cluster by itself.

    pip install "fastseq[ray]"
    python examples/serving/ray_app.py --port 8000
    head -c 12288 /dev/zero | curl --data-binary @- localhost:8000/predict

On a cluster of many machines, where each has fastseq installed and RAY_AUTH_MODE=token with one and the same token
(https://docs.ray.io/en/latest/ray-security/token-auth.html), two lines start it:

    ray start --head                                   # and `ray start --address=HEAD:6379` on each of the others
    python examples/serving/ray_app.py --address auto --host 0.0.0.0
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray  # noqa: E402
import torch  # noqa: E402
from ray import serve  # noqa: E402
from ray.util import metrics  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import JSONResponse, Response  # noqa: E402

import fastseq  # noqa: E402
from fastseq.serving import Runner  # noqa: E402
from fastseq.testing import MODELS  # noqa: E402

MODEL = MODELS["cifar_vgg_bn"]
MAX_BATCH_SIZE = 16
INPUT_BYTES = 4 * torch.Size(MODEL.input_shape).numel()


# Requests in flight must be able to fill a batch, and the next one.
@serve.deployment(max_ongoing_requests=4 * MAX_BATCH_SIZE, health_check_period_s=10)
class Model:
    def __init__(self) -> None:
        # Ray sets OMP_NUM_THREADS to the replica's CPUs, and shows it its GPU, or its part of one, as cuda:0.
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        model = fastseq.optimize(MODEL.build().to(self.device), inplace=True)
        self.runner = Runner(
            model, torch.zeros(1, *MODEL.input_shape, device=self.device), max_batch_size=MAX_BATCH_SIZE
        )
        self.fallbacks = metrics.Gauge("fastseq_fallbacks", "Runs that stayed eager, by reason", tag_keys=("reason",))
        self.memory = metrics.Gauge("fastseq_memory_bytes", "Memory that the model holds", tag_keys=("kind",))

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        self.runner.selfcheck()
        for reason, count in self.runner.stats()["model"]["fallbacks"].items():
            self.fallbacks.set(count, tags={"reason": reason})
        for kind, count in self.runner.memory_report().items():
            self.memory.set(count, tags={"kind": kind})

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=0.002)
    async def predict(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(self.runner(torch.stack(inputs).to(self.device)).cpu())

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        if len(body) != INPUT_BYTES:
            reason = f"expected {INPUT_BYTES} bytes, float32 of shape {MODEL.input_shape}, got {len(body)}"
            return JSONResponse({"detail": reason}, 422)
        x = torch.frombuffer(bytearray(body), dtype=torch.float32).view(MODEL.input_shape)
        if not x.isfinite().all():
            return JSONResponse({"detail": "inputs must be finite numbers"}, 422)
        return Response((await self.predict(x)).numpy().tobytes(), media_type="application/octet-stream")


def start(arguments: argparse.Namespace) -> None:
    local: dict[str, Any] = {"include_dashboard": False}  # which a cluster that exists has decided already
    ray.init(address=arguments.address, **({} if arguments.address else local))
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    autoscaling = {
        "min_replicas": arguments.replicas,
        "max_replicas": arguments.most_replicas,
        "target_ongoing_requests": 8,
    }
    model = Model.options(
        autoscaling_config=autoscaling,
        # Half a GPU lets two replicas share one; Ray counts, and does not divide the memory.
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        logging_config={"enable_access_log": False},
    )
    serve.run(model.bind(), route_prefix="/predict")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all interfaces")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--address", help="a cluster that runs, such as auto; without it one is started here")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--most-replicas", type=int, default=4)
    parser.add_argument("--cpus", type=float, default=1, help="of each replica")
    parser.add_argument("--gpus", type=float, default=0, help="of each replica, such as 0.5")
    arguments = parser.parse_args()
    start(arguments)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # in the place of Ray's own, which abort
        signal.signal(number, lambda *_: stop.set())
    print(f"ready: http://{arguments.host}:{arguments.port}/predict", flush=True)
    stop.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
