"""Making a failing case small: fewer and smaller choices that still fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from .case import Case
from .source import ReplaySource
from .strategies import make_case


def replay(choices: Sequence[int]) -> tuple[Case, list[int]]:
    """The case of these choices, and the choices that it really took."""
    source = ReplaySource(choices)
    return make_case(source), source.choices


def reduce(choices: Sequence[int], fails: Callable[[Case], bool], seconds: float = 20.0) -> tuple[Case, list[int]]:
    """Deletes blocks of choices, then lowers single ones, for as long as something helps or time is left."""
    until = time.monotonic() + seconds
    best, kept = replay(choices)
    tried = {repr(best)}

    def attempt(trial: list[int]) -> bool:
        nonlocal best, kept
        case, used = replay(trial)
        while used and used[-1] == 0:
            used.pop()  # what is missing reads as 0
        if (len(used), used) >= (len(kept), kept):
            return False
        if repr(case) != repr(best):
            if repr(case) in tried or time.monotonic() > until:
                return False
            tried.add(repr(case))
            if not fails(case):
                return False
        best, kept = case, used
        return True

    while time.monotonic() < until:
        before = list(kept)
        sizes = [len(kept) >> shift for shift in range(1, 12) if len(kept) >> shift > 24]
        for size in (*sizes, *range(24, 0, -1)):
            start = 0
            while start < len(kept) and time.monotonic() < until:
                if not attempt(kept[:start] + kept[start + size :]):
                    start += max(1, size // 24)
        for index in range(len(kept)):
            if index >= len(kept):  # it has become shorter
                break
            for lower in (0, kept[index] // 2, kept[index] - 1):
                while index < len(kept) and 0 <= lower < kept[index]:
                    if not attempt([*kept[:index], lower, *kept[index + 1 :]]):
                        break
        if kept == before:
            break
    return best, kept
