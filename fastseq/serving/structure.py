"""What a model returns: tensors, and tuples, lists and dicts of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: mapped(function, entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        entries = [mapped(function, entry) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for entry in value:
            yield from leaves(entry)
    else:
        yield value


def is_batched(result: Any, size: int) -> bool:
    """Whether all that the model returned can be cut and joined: tensors with a batch in dimension 0."""
    return all(isinstance(y, Tensor) and y.dim() > 0 and len(y) == size for y in leaves(result))


def joined(parts: list[Any]) -> Any:
    """What `is_batched` of several calls, one behind the other."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return {key: joined([part[key] for part in parts]) for key in first}
    if isinstance(first, (tuple, list)):
        entries = [joined(list(column)) for column in zip(*parts, strict=True)]
        return type(first)(*entries) if hasattr(first, "_fields") else type(first)(entries)
    raise AssertionError("is_batched lets nothing else pass")
