"""Checks of every kernel, one by one, and what compute-sanitizer is to watch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from gpu_compare import floor_of, kernels_used, norm_error
from gpu_device import Device, arithmetic
from gpu_jobs import Reporter, text_of
from gpu_shapes import laid_out, mode_of, preferring, shapes_of
from gpu_task import TASK_SECONDS, Check, Task

import fastseq
from fastseq import cuda


def kernel_task(kernel: dict[str, Any], most_shapes: int = 99) -> Task:
    """One kernel on the shapes it is for; it must have run in at least one of them."""

    def run(check: Check) -> None:
        mode = mode_of(kernel)
        is_forced = kernel["op"] != "maxpool2d"
        for shape in shapes_of(kernel)[:most_shapes]:
            with preferring(kernel["name"]) if is_forced else contextlib.nullcontext():
                model = check.model(shape.build(), mode)
                x = laid_out(check.random(*shape.size, mode=mode), shape.layout)
                before = set(check.kernels)
                check.kernels.clear()
                check.run(model, x, mode, shape.label, signs=not is_forced)
                if kernel["name"] not in check.kernels:
                    check.notes.append(f"{shape.label}: ran {' '.join(sorted(check.kernels))}")
                check.kernels |= before
        if kernel["name"] not in check.kernels:
            check.fault("the kernel was never chosen: it has not been checked")

    return Task(f"kernel {kernel['name']}", run)


def kernel_tasks(device: Device, is_small: bool) -> Iterator[Task]:
    """For a small run, one kernel of each op and arithmetic."""
    seen = set()
    for kernel in cuda.kernels():
        family = kernel["op"], kernel["math"]
        if kernel["min_arch"] > device.arch or (is_small and family in seen):
            continue
        seen.add(family)
        yield kernel_task(kernel, 2 if is_small else 99)


# For compute-sanitizer -----------------------------------------------------------------------------------------------


def run_sanitized(reporter: Reporter, device: Device, is_small: bool) -> int:
    """Small shapes of every kernel. Data comes from the CPU and goes back there: little else runs on the GPU."""
    kernels = [kernel for kernel in cuda.kernels() if kernel["min_arch"] <= device.arch]
    # One of each family first, so that a time limit leaves the widest view.
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for kernel in kernels:
        families.setdefault((kernel["op"], kernel["math"]), []).append(kernel)
    depth = 1 if is_small else max(map(len, families.values()), default=0)
    for i in range(depth):
        for kernel in (family[i] for family in families.values() if i < len(family)):
            if not reporter.wants(kernel["name"]):
                continue
            with reporter.task(kernel["name"], 3 * TASK_SECONDS * device.patience):
                reporter.row(task=kernel["name"], **sanitized(kernel, device, 1 if is_small else 3))
    for kernel in kernels if not is_small else []:
        if kernel["name"] not in reporter.begun:
            reporter.row(task=kernel["name"], checks=0, problems=[], not_run="out of time")
    reporter.done()
    return 0


def sanitized(kernel: dict[str, Any], device: Device, most_shapes: int) -> dict[str, Any]:
    mode = mode_of(kernel)
    check = Check(device, torch.Generator().manual_seed(7))
    for shape in shapes_of(kernel)[:most_shapes]:
        try:
            with preferring(kernel["name"] if kernel["op"] != "maxpool2d" else ""), torch.no_grad(), arithmetic(mode):
                model = check.model(shape.build(), mode)
                x = laid_out(torch.randn(shape.size).to(mode.dtype), shape.layout)
                storage = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
                fast = fastseq.optimize(model)
                y = fast(storage.to(device.device).as_strided(x.shape, x.stride(), x.storage_offset())).cpu()
                check.kernels.update(name for used in kernels_used(fast) for name in used.split(" + "))
                exact = copy.deepcopy(model).cpu().double()(x.double())
            error, _ = norm_error(y, exact)
            check.checks += 1
            if not error <= 4 * floor_of(model, mode):
                check.fault(f"{shape.label}: error {error:.3g} against float64")
        except Exception as error:
            check.fault(f"{shape.label}: {text_of(error)}")
    if kernel["name"] not in check.kernels:
        check.notes.append("the kernel was not chosen")
    return check.row()
