"""Correctness on a GPU, through the public API: every kernel, every layout, and what graphs, streams and threads do.

Each task is one row with the largest errors and everything that was wrong. The same tasks run on the emulated package
with CPU tensors, which is what `gpu_check.py --dry-run` does; those that need real streams or graphs name themselves.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from gpu_device import Device
from gpu_jobs import LOST_DEVICE, RESTART, Reporter, text_of
from gpu_kernels import kernel_tasks
from gpu_models import NETS, activations, layouts, poisoned, special_values, zoo_tasks
from gpu_streams import (
    current_device,
    first_call_in_capture,
    graph_outlives_plans,
    graph_replay,
    many_graphs,
    no_synchronisation,
    several_threads,
    two_streams,
)
from gpu_task import TASK_SECONDS, Check, Skip, Task
from gpu_weights import live_weights, outputs_are_kept

import fastseq
from fastseq import cuda


def tasks_of(device: Device, is_small: bool) -> list[Task]:
    """The fresh processes first, since they must be; then what is most likely to be wrong."""
    tasks = [
        *(Task(f"first call of a process in a capture, {name}", first_call_in_capture(name), True) for name in NETS),
        Task("graph replay, changed inputs and weights", graph_replay),
        Task("special values", special_values),
        Task("activations", activations),
        Task("layouts and strides", layouts),
        Task("poisoned memory", poisoned),
        Task("live weights", live_weights),
        Task("outputs are kept", outputs_are_kept),
        Task("two streams", two_streams),
        Task("several threads", several_threads),
        Task("many graphs", many_graphs),
        Task("a graph outlives its plans", graph_outlives_plans),
        Task("no synchronisation", no_synchronisation),
        Task("current device", current_device),
    ]
    if is_small:
        left_out = {"special values", "layouts and strides", "live weights"}
        tasks = [task for task in tasks if task.name not in left_out]
    kernels = list(kernel_tasks(device, is_small))
    zoo = list(zoo_tasks(is_small, device.is_stand_in))
    return [*tasks[:2], *kernels, *tasks[2:], *zoo]


def run_task(task: Task, device: Device, is_small: bool, perturbs: str | None) -> dict[str, Any]:
    """The task's row. What it raises is a problem, too."""
    seed = random.SystemRandom().randrange(1 << 31)
    check = Check(device, torch.Generator().manual_seed(seed), is_small, perturbs is not None and perturbs in task.name)
    skipped = None
    try:
        task.run(check)
        device.synchronize()
    except Skip as reason:
        skipped = str(reason)
    except Exception as error:
        check.fault(text_of(error))
    return {"task": task.name, **check.row(), "seed": seed, "skipped": skipped}


def is_device_lost(device: Device) -> bool:
    """Whether a kernel's error has ended the process's use of the GPU."""
    try:
        device.synchronize()
        torch.ones(1, device=device.device).add_(1).item()
    except Exception:
        return True
    return False


def run_correctness(
    reporter: Reporter, device: Device, is_small: bool, perturbs: str | None = None, only: str = ""
) -> int:
    """All tasks, or those whose names contain `only`; the exit code of the process."""
    if not cuda.kernels():
        error = fastseq.native_error() or "this build of fastseq has no CUDA kernels"
        reporter.row(task="kernels", problems=[], checks=0, skipped=None, not_run=error)
        reporter.done()
        return 0
    tasks = [task for task in tasks_of(device, is_small) if only in task.name]
    for task in tasks:
        if not reporter.wants(task.name):
            continue
        if task.needs_new_process and not reporter.is_first:
            return RESTART
        with reporter.task(task.name, TASK_SECONDS * device.patience):
            reporter.row(**run_task(task, device, is_small, perturbs))
        if is_device_lost(device):
            return LOST_DEVICE
        if task.needs_new_process and not device.is_stand_in:
            return RESTART
    for task in tasks:
        if task.name not in reporter.begun:
            reporter.row(task=task.name, problems=[], checks=0, skipped=None, not_run="out of time")
    reporter.done()
    return 0
