"""The suite that runs in a Python whose fastseq is the emulated package: see tests/emulation/extension.py."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastseq import _native


class Grid:
    """Controls and statistics of the emulated grid."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(_native.module().__file__)
        self._library.fastseq_emulation_launches.restype = ctypes.c_char_p

    def seed(self, seed: int) -> None:
        self._library.fastseq_emulation_seed(ctypes.c_uint64(seed))

    def capture(self, is_captured: bool) -> None:
        self._library.fastseq_emulation_capture(int(is_captured))

    def fail_after(self, launches: int) -> None:
        self._library.fastseq_emulation_error(launches)

    def limit_shared_memory(self, shared_bytes: int) -> None:
        arguments = (9, 0, 132, shared_bytes, ctypes.c_int64(60 << 20))
        self._library.fastseq_emulation_device(*arguments)

    def reset(self) -> None:
        self._library.fastseq_emulation_reset()

    def launches(self) -> list[dict[str, Any]]:
        """The launches since the last reset."""
        found: list[dict[str, Any]] = json.loads(self._library.fastseq_emulation_launches())
        return found


@pytest.fixture
def grid() -> Iterator[Grid]:
    grid = Grid()
    grid.reset()
    yield grid
    grid.seed(1)
    grid.capture(False)
    grid.fail_after(-1)
    grid.limit_shared_memory(227 << 10)


@pytest.fixture(autouse=True)
def ieee() -> Iterator[None]:
    """float32 means float32, unless a test asks for TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
