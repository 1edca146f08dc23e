"""`python -m fastseq`: what one pastes into a bug report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastseq
from fastseq import _env, _native, cuda


def cpu_model() -> str:
    """The CPU's marketing name where Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def openmp_libraries() -> list[str]:
    """Paths of the OpenMP runtimes in this process. More than one means thread pools that compete for the cores."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp")))


def gpus() -> list[str]:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def cuda_kernels(build: dict[str, Any]) -> str:
    """What build_info() says of the CUDA kernels."""
    if not build.get("cuda"):
        return f"none ({build.get('cuda_note') or 'no extension'})"
    return f"for {build['cuda_architectures']}, built by nvcc {build['cuda']}; not yet run on hardware"


def collect() -> dict[str, Any]:
    """Everything the report prints, as JSON-able data."""
    available = fastseq.native_available()
    return {
        "fastseq": fastseq.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native": available,
        "native_error": fastseq.native_error(),
        "extension": _native.module().__file__ if available else None,
        "build": _native.module().build_info() if available else {},
        "isa": fastseq.isa(),
        "kernels": fastseq.kernels(),
        "cuda_kernels": cuda.kernels(),
        "openmp": openmp_libraries(),
        "torch_cuda": torch.version.cuda,
        "gpus": gpus(),
        "environment": {v.name: os.environ[v.name] for v in _env.VARIABLES if os.environ.get(v.name)},
    }


def render(info: dict[str, Any]) -> str:
    """The report as text, one fact per line."""
    supported = {kernel["isa"]: kernel["supported"] for kernel in info["kernels"]}
    torch_cuda = f"for CUDA {info['torch_cuda']}" if info["torch_cuda"] else "without CUDA"
    gpu = ", ".join(info["gpus"]) or f"none (torch is built {torch_cuda})"
    rows = [
        ("fastseq", info["fastseq"]),
        ("torch", info["torch"]),
        ("python", info["python"]),
        ("os", info["os"]),
        ("cpu", f"{info['cpu']}, {info['cores']} cores"),
        ("threads", str(info["threads"])),
        ("extension", info["extension"] or f"unusable, models run eager: {info['native_error']}"),
        ("build", ", ".join(f"{key} {info['build'][key]}" for key in info["build"] if "cuda" not in key) or "none"),
        ("cuda kernels", cuda_kernels(info["build"])),
        ("isa", info["isa"]),
        *((f"- {isa}", "this CPU runs it" if ok else "this CPU does not run it") for isa, ok in supported.items()),
        ("openmp", f"{len(info['openmp'])} mapped: {', '.join(info['openmp']) or 'none'}"),
        ("gpu", gpu),
        ("environment", " ".join(f"{key}={value}" for key, value in info["environment"].items()) or "no FASTSEQ_*"),
        ("kernels", str(len(info["kernels"]) + len(info["cuda_kernels"]))),
    ]
    lines = [f"{key:<15}{value}" for key, value in rows]
    for isa in supported:
        names = " ".join(kernel["name"] for kernel in info["kernels"] if kernel["isa"] == isa)
        lines.append(textwrap.fill(names, 118, initial_indent="  ", subsequent_indent="  "))
    if info["cuda_kernels"]:
        names = " ".join(kernel["name"] for kernel in info["cuda_kernels"])
        lines.append(textwrap.fill(names, 118, initial_indent="  ", subsequent_indent="  "))
    return "\n".join(lines)


def add_serve(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP (needs the extra fastseq[serve])",
        description="Serve a model over HTTP, optimised, with batching, health and metrics; see docs/serving.md.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODULE:FUNCTION", help="a function without arguments that returns the plain model"
    )
    parser.add_argument("--shape", type=sizes, required=True, help="of one input without its batch, such as 3,32,32")
    parser.add_argument("--weights", metavar="FILE", help="a state_dict, loaded again whenever the file changes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all interfaces")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1, help="processes that hold the model, on GPUs for each device")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--max-batch-size", type=int, default=16, help="requests that run together")
    parser.add_argument(
        "--batch-timeout", type=float, default=0.001, help="seconds that a lone request waits for others"
    )
    parser.add_argument("--buckets", type=sizes, help="batch sizes to pad to, such as 1,2,4,8")
    parser.add_argument("--most-inputs", type=int, default=64, help="of one request")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds after which a request is given up")
    parser.add_argument("--most-waiting", type=int, default=512, help="requests, beyond which new ones get a 503")
    parser.add_argument("--report-seconds", type=float, default=1.0, help="between two reports of a worker")
    parser.add_argument("--selfcheck-seconds", type=float, default=10.0, help="between two self-checks of a worker")
    parser.add_argument("--special-values", action="store_true", help="accept NaN and infinities")
    parser.add_argument(
        "--no-optimize", dest="optimize", action="store_false", help="serve the plain model, to compare"
    )


def sizes(text: str) -> tuple[int, ...]:
    """Positive ints with commas between them."""
    found = tuple(int(part) for part in text.split(","))
    if min(found) < 1:
        raise ValueError
    return found


def serve(arguments: argparse.Namespace) -> None:
    try:
        from fastseq.serving import server
    except ModuleNotFoundError as error:
        raise SystemExit(f"python -m fastseq serve needs {error.name}: pip install 'fastseq[serve]'") from None
    options = vars(arguments).copy()
    for name in ("command", "json"):
        del options[name]
    how = {name: options.pop(name) for name in ("host", "port", "workers", "accelerator")}
    try:
        server.serve(server.Options(**options), **how)
    except (ValueError, OSError) as error:
        raise SystemExit(f"python -m fastseq serve: {error}") from None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastseq",
        description="Print versions, instruction sets, compiled kernels and threads: what a bug report needs.",
    )
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    parser.add_argument("--version", action="version", version=f"fastseq {fastseq.__version__}")
    add_serve(parser.add_subparsers(dest="command", metavar="COMMAND", title="commands"))
    arguments = parser.parse_args(argv)
    if arguments.command == "serve":
        serve(arguments)
        return 0
    info = collect()
    print(json.dumps(info, indent=2) if arguments.json else render(info))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
