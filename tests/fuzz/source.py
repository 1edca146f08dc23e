"""Where the choices of a random case come from: a seed, a recorded list, or hypothesis. Everything is an integer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from hypothesis import strategies as st

T = TypeVar("T")


class Source:
    """Choices. The smallest answer is the simplest one, so that whoever shrinks a case ends at simple ones."""

    def integer(self, low: int, high: int) -> int:
        """An integer of low..high, both included."""
        raise NotImplementedError

    def pick(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]

    def chance(self, percent: int) -> bool:
        return self.integer(0, 99) >= 100 - percent

    def weighted(self, options: Sequence[tuple[T, int]]) -> T:
        """One of (option, weight) pairs."""
        at = self.integer(0, sum(weight for _, weight in options) - 1)
        for option, weight in options:
            at -= weight
            if at < 0:
                return option
        raise AssertionError


class SeededSource(Source):
    """Choices of a seed, kept in `choices`."""

    def __init__(self, seed: int, index: int) -> None:
        self.random = random.Random(seed * 1_000_003 + index)
        self.choices: list[int] = []

    def integer(self, low: int, high: int) -> int:
        choice = self.random.randint(low, high) - low
        self.choices.append(choice)
        return low + choice


class ReplaySource(Source):
    """Choices of a list, as far as they are possible; the simplest ones behind its end."""

    def __init__(self, choices: Sequence[int]) -> None:
        self.given = list(choices)
        self.choices: list[int] = []

    def integer(self, low: int, high: int) -> int:
        at = len(self.choices)
        choice = min(self.given[at], high - low) if at < len(self.given) else 0
        self.choices.append(choice)
        return low + choice


class HypothesisSource(Source):
    """Choices of hypothesis, which shrinks them and keeps no list."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def integer(self, low: int, high: int) -> int:
        return low if low == high else self.draw(st.integers(low, high))
