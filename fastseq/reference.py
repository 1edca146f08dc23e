"""The oracle: the same model in plain torch."""

from __future__ import annotations

import copy

from torch import nn

from fastseq.sequential import FusedSequential


def plain_copy(model: nn.Module) -> nn.Module:
    """An independent copy of an optimised model with every FusedSequential a plain nn.Sequential again."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if type(module) is FusedSequential:
            object.__setattr__(module, "__class__", nn.Sequential)
    return copied
