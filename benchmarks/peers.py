"""The engines under comparison, one row each in `PEERS`.

An engine is added in a few lines: a function that prepares `model` for inputs like `x` on `threads` threads and returns
a call without arguments, which does one inference the way a user of that engine writes it, and a row in the table.
Model and input are float32; engines of torch's take both in the type that is measured, others convert by an option.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Call = Callable[[], Any]
Prepare = Callable[[nn.Module, Tensor, int], Call]
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Peer:
    """An engine: `prepare[dtype](model, x, threads)` returns the call that is timed; `packages` is what it needs."""

    name: str
    prepare: dict[str, Prepare]
    packages: tuple[str, ...] = ("torch",)
    environment: dict[str, str] = field(default_factory=dict)

    def missing(self, dtype: str = "float32") -> str | None:
        """Why this engine cannot run here, or None."""
        if dtype not in self.prepare:
            return f"no {dtype}"
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                return f"the package {package} is not installed"
        return None

    def version(self) -> str:
        return importlib.import_module(self.packages[0]).__version__


def eager(model: nn.Module, x: Tensor, threads: int) -> Call:
    return lambda: model(x)


def eager_channels_last(model: nn.Module, x: Tensor, threads: int) -> Call:
    """Weights and input are converted before timing: the layout is taken as the application's own."""
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    return lambda: model(x)


def compile_default(model: nn.Module, x: Tensor, threads: int) -> Call:
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=False)
    return lambda: compiled(x)


def compile_max(model: nn.Module, x: Tensor, threads: int) -> Call:
    """Inductor at its best on a CPU: weights frozen into the graph and packed, GEMMs chosen by trial."""
    from torch._inductor import config, select_algorithm

    config.freezing = True
    config.max_autotune_report_choices_stats = select_algorithm.PRINT_AUTOTUNE = False
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=False, mode="max-autotune")
    return lambda: compiled(x)


def jit_ofi(model: nn.Module, x: Tensor, threads: int) -> Call:
    frozen = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(model, x)))
    return lambda: frozen(x)


def onnxruntime(model: nn.Module, x: Tensor, threads: int) -> Call:
    import onnxruntime as ort

    # The TorchScript exporter, since the newer one needs onnxscript as well; for these models both give the same graph.
    buffer = io.BytesIO()
    torch.onnx.export(model, (x,), buffer, dynamo=False, input_names=["x"], output_names=["y"])
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])
    inputs = {"x": x.numpy()}
    return lambda: session.run(None, inputs)[0]


def openvino(model: nn.Module, x: Tensor, threads: int, precision: str = "f32") -> Call:
    import openvino as ov

    options = {
        "INFERENCE_PRECISION_HINT": precision,  # without it OpenVINO picks bf16 where the CPU has it, and says nothing
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    converted = ov.convert_model(model, example_input=x, input=list(x.shape))
    compiled = ov.Core().compile_model(converted, "CPU", options)
    inputs = x.numpy()
    return lambda: compiled(inputs)[0]


def ncnn(model: nn.Module, x: Tensor, threads: int, in_bfloat16: bool = False) -> Call:
    """ncnn takes one image at a time, so a batch of images is a loop; a batch of vectors is one matrix."""
    import ncnn as ncnn_package

    is_image = x.dim() == 4
    net = ncnn_package.Net()
    net.opt.num_threads = threads
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = in_bfloat16
    with tempfile.TemporaryDirectory() as folder:
        param, weights = _convert_to_ncnn(model, x[:1] if is_image else x, Path(folder))
        if net.load_param(str(param)) or net.load_model(str(weights)):
            raise RuntimeError("ncnn cannot load what pnnx wrote")
    inputs = list(x.numpy()) if is_image or len(x) == 1 else [x.numpy()]

    def infer(array: np.ndarray) -> np.ndarray:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn_package.Mat(array))
        status, output = extractor.extract("out0")
        if status:
            raise RuntimeError(f"ncnn returned status {status}")
        return np.asarray(output)

    if len(inputs) == 1:
        return lambda: infer(inputs[0])
    return lambda: [infer(array) for array in inputs]


def _convert_to_ncnn(model: nn.Module, x: Tensor, folder: Path) -> tuple[Path, Path]:
    """The .param and .bin files of `model`, weights in fp32, by ncnn's own converter.

    Its program is called directly: pnnx.export() goes on to import a Python file that it has generated, which is not
    valid Python when layers have numbers for names, as in every nn.Sequential.
    """
    import pnnx

    traced = folder / "model.pt"
    torch.jit.trace(model, x).save(str(traced))
    shape = ",".join(map(str, x.shape))
    command = [pnnx.EXEC_PATH, str(traced), f"inputshape=[{shape}]", "fp16=0"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    param, weights = folder / "model.ncnn.param", folder / "model.ncnn.bin"
    if result.returncode or not (param.exists() and weights.exists()):
        raise RuntimeError(f"pnnx failed with status {result.returncode}: {result.stderr[-500:]}")
    return param, weights


def fastseq(model: nn.Module, x: Tensor, threads: int, compute_dtype: torch.dtype | None = None) -> Call:
    import fastseq as fastseq_package

    if not fastseq_package.native_available():
        raise RuntimeError(f"the native extension is not available: {fastseq_package.native_error()}")
    fast = fastseq_package.optimize(model, compute_dtype=compute_dtype)
    fast(x)
    stats = fastseq_package.stats(fast)
    if not stats["fused_calls"]:  # its time would be eager's under another name
        raise RuntimeError(f"nothing ran fused: {stats['fallbacks']}")
    return lambda: fast(x)


def every_dtype(prepare: Prepare) -> dict[str, Prepare]:
    """An engine that takes model and input in the type that is measured."""

    def cast(model: nn.Module, x: Tensor, threads: int) -> Call:
        return prepare(copy.deepcopy(model).bfloat16(), x.bfloat16(), threads)

    return {"float32": prepare, "bfloat16": cast}


# One compiler process: Inductor otherwise keeps a pool of them beside each worker.
_INDUCTOR = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("eager", every_dtype(eager)),
        Peer("eager_channels_last", every_dtype(eager_channels_last)),
        Peer("compile", every_dtype(compile_default), environment=_INDUCTOR),
        Peer("compile_max", every_dtype(compile_max), environment=_INDUCTOR),
        Peer("jit_ofi", every_dtype(jit_ofi)),
        Peer("onnxruntime", {"float32": onnxruntime}, packages=("onnxruntime", "onnx")),
        Peer(
            "openvino", {"float32": openvino, "bfloat16": partial(openvino, precision="bf16")}, packages=("openvino",)
        ),
        Peer("ncnn", {"float32": ncnn, "bfloat16": partial(ncnn, in_bfloat16=True)}, packages=("ncnn", "pnnx")),
        Peer("fastseq", every_dtype(fastseq), packages=("fastseq",)),
        # A float32 model that may lose digits: to OpenVINO what `fastseq` is to eager.
        Peer(
            "fastseq_compute_dtype",
            {"bfloat16": partial(fastseq, compute_dtype=torch.bfloat16)},
            packages=("fastseq",),
        ),
    )
}


def as_tensor(output: Any, shape: torch.Size) -> Tensor:
    """Any peer's output as a tensor of `shape`, for checking it; never on the timed path."""
    tensor = output if isinstance(output, Tensor) else torch.from_numpy(np.array(output))
    return tensor.reshape(shape)
