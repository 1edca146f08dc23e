"""docs/semantics.md lists every numbered behaviour, and each has tests that carry its number.

The files here are ordered by number: structure (1-10), hooks (11-15), in-place and aliasing (16-18), arguments (19-24),
shapes (25-28), strides (29-32), numbers (33-37), autograd and modes (38-47), weights (48-52), tracers and packaging
(53-56), how the fast path is installed (57-60), corners found by fuzzing (61-64).
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

HERE = Path(__file__).parent
NUMBERS = list(range(1, 65))


def section() -> str:
    page = (ROOT / "docs" / "semantics.md").read_text()
    return page.partition("## The numbered behaviours\n")[2].partition("\n## ")[0]


def numbers_by_file() -> dict[str, list[int]]:
    return {
        path.name: [int(number) for number in re.findall(r"^def test_(\d\d)_", path.read_text(), re.MULTILINE)]
        for path in sorted(HERE.glob("test_[0-9]*.py"))
    }


def test_the_page_lists_every_number_once_and_in_order() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", section(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == NUMBERS
    assert len({text for _, text in rows}) == len(rows)


def test_every_number_has_a_test() -> None:
    count = Counter(number for numbers in numbers_by_file().values() for number in numbers)
    assert sorted(count) == NUMBERS


@pytest.mark.parametrize("name", numbers_by_file())
def test_a_file_holds_the_numbers_of_its_name(name: str) -> None:
    first, last = map(int, re.findall(r"\d\d", name)[:2])
    numbers = numbers_by_file()[name]
    assert numbers == sorted(numbers) and set(numbers) == set(range(first, last + 1))
    # No test without a number, nor two of one name, of which Python would keep the last.
    names = re.findall(r"^def (test_\w+)", (HERE / name).read_text(), re.MULTILINE)
    assert len(names) == len(numbers) == len(set(names))


def test_what_does_not_hold_is_listed_with_a_reason() -> None:
    listed = re.findall(r"^- ([\d, ]+): (.+)", section(), re.MULTILINE)
    numbers = [int(number) for group, _ in listed for number in group.split(", ")]
    assert numbers == sorted(set(numbers)) and set(numbers) <= set(NUMBERS)
    assert len(numbers) <= 10, "the few"
