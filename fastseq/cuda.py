"""What the CUDA engine would do on a device that need not be there: for planning, tests and dry runs."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastseq import _native
from fastseq.matcher import NativeSegment, match
from fastseq.plan import native_steps
from fastseq.sequential import FusedSequential


@dataclass(frozen=True)
class Device:
    """What the planner asks of a GPU: compute capability, multiprocessors, bytes of shared memory of a block and of L2.

    Values of the table: NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities", and the products' data sheets.
    """

    major: int
    minor: int
    multiprocessors: int
    shared_bytes_per_block: int
    l2_bytes: int


DEVICES: dict[str, Device] = {
    "T4": Device(7, 5, 40, 64 << 10, 4 << 20),
    "A100": Device(8, 0, 108, 163 << 10, 40 << 20),
    "RTX 3090": Device(8, 6, 82, 99 << 10, 6 << 20),
    "RTX 4090": Device(8, 9, 128, 99 << 10, 72 << 20),
    "H200": Device(9, 0, 132, 227 << 10, 60 << 20),
    "B200": Device(10, 0, 148, 227 << 10, 126 << 20),
    "RTX 5090": Device(12, 0, 170, 99 << 10, 96 << 20),
}


def kernels() -> list[dict[str, Any]]:
    """The compiled CUDA kernels: name, op, math, min_arch and sizes; none in a build without CUDA."""
    listed: list[dict[str, Any]] = _native.module().cuda_kernels() if _native.native_available() else []
    return listed


def plan(model: nn.Module, x: Tensor, device: Device, **options: Any) -> list[dict[str, Any]]:
    """The launches of `model(x)` on `device`, for each native run of each Sequential in the order of execution.

    Args:
        model: plain or optimised; it and `x` may be on any device, only shapes, dtypes and strides count.
        x: an input; a meta tensor will do.
        options: `allows_tf32_conv`, `allows_tf32_linear`, `allows_cudnn`, `trusts_cudnn_relu`, `allows_cublas`,
            `kernel`, as `_C.plan_cuda` takes them.

    Returns:
        For each native run {"path", "batch", "steps", "launches", "packs", "packs_before", "packing_launch",
        "arena_bytes", "output"}, or {"path", "refused"} for one that would run eager.

    Raises:
        RuntimeError: the native extension is unavailable.
        Exception: whatever the model raises for such an input.
    """
    module = _native.module()
    meta = copy.deepcopy(model).to("meta")
    plans: list[dict[str, Any]] = []

    def trace(path: str, sequential: nn.Module, value: Tensor) -> None:
        for segment in match(sequential, (nn.Sequential, FusedSequential)).segments:
            if not isinstance(segment, NativeSegment):
                value = segment.leaf.layer(value)
                continue
            steps, layers = native_steps(segment)
            holders = [None if step["layer"] is None else layers[step["layer"]] for step in steps]
            try:
                made = module.plan_cuda(
                    steps,
                    [None if holder is None else holder.weight for holder in holders],
                    [None if holder is None else holder.bias for holder in holders],
                    value,
                    segment.flattens_input,
                    segment.flattens_output,
                    asdict(device),
                    **options,
                )
                plans.append({"path": path, "batch": value.shape[0], **made})
            except ValueError as error:
                plans.append({"path": path, "refused": str(error)})
            for leaf in segment.leaves:
                value = leaf.layer(value)

    inside: set[int] = set()
    handles = []
    for path, child in meta.named_modules():
        if type(child) not in (nn.Sequential, FusedSequential) or id(child) in inside:
            continue
        inside.update(id(nested) for nested in child.modules())

        def before(sequential: nn.Module, inputs: tuple[Any, ...], path: str = path) -> None:
            trace(path, sequential, inputs[0])

        handles.append(child.register_forward_pre_hook(before))
    try:
        with torch.no_grad():
            meta(x.to("meta"))
    finally:
        for handle in handles:
            handle.remove()
    return plans
