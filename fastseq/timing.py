"""optimize(example_input=...): kernels chosen by timing them instead of by a cost model, and runs against eager."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastseq.plan import SLOWER, TIMED, TIMING
from fastseq.sequential import COMPILED, compiled_of


def time_kernels(model: nn.Module, example_input: Any) -> None:
    """Calls an optimised model once with `example_input`, times each layer's kernels and then each run against eager,
    and keeps what was found.

    The call is made in eval mode and without gradients; the modules' modes are as before afterwards.
    """
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.__dict__[TIMING] = True
    try:
        for module, is_training in modes:
            if is_training:
                module.training = False
        with torch.inference_mode():
            model(*arguments)
    finally:
        for module, is_training in modes:
            if is_training:
                module.training = True
            module.__dict__.pop(TIMING, None)
            if (compiled := compiled_of(module)) is None:
                continue
            for key, found in zip((TIMED, SLOWER), compiled.timed(), strict=True):
                if found:
                    module.__dict__[key] = found
            del module.__dict__[COMPILED]  # its calls are timed
