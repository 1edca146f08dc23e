"""The oracle: the same model in plain torch."""

from __future__ import annotations

import copy

from torch import nn

from fastseq.controls import restore


def plain_copy(model: nn.Module) -> nn.Module:
    """An independent copy of an optimised model, plain again."""
    return restore(copy.deepcopy(model))
