"""Every FASTSEQ_* variable: one table, and one function per variable that reads it when called.

Standard library only, no import from the package: setup.py runs this file by its path.
"""

from __future__ import annotations

import os
from typing import Literal, NamedTuple


class Variable(NamedTuple):
    name: str
    kind: Literal["run", "build"]
    values: tuple[str, ...]  # what it may be set to; empty: any text
    default: str
    meaning: str


ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16", "emulated512", "emulated_amx")

VARIABLES: tuple[Variable, ...] = (
    Variable("FASTSEQ_DISABLE", "run", ("0", "1"), "0", "1 runs everything eager, without a warning"),
    Variable("FASTSEQ_ISA", "run", ISAS, "", "highest instruction set to use"),
    Variable("FASTSEQ_KERNEL", "run", (), "", "prefer kernels whose name contains this text"),
    Variable("FASTSEQ_VERBOSE", "run", ("0", "1"), "0", "1 logs plans and fallbacks to stderr"),
    Variable("FASTSEQ_CHECK", "run", ("0", "1"), "0", "1 compares each fused call with eager and raises on a mismatch"),
    Variable("FASTSEQ_CUDA", "build", ("auto", "0", "1"), "auto", "build CUDA kernels: where possible, never, or fail"),
    Variable("FASTSEQ_DEBUG", "build", ("0", "1"), "0", "1 builds with assertions, -O1 and -g"),
)
_BY_NAME = {variable.name: variable for variable in VARIABLES}


def _read(name: str) -> str:
    """The variable's value, its default when unset or empty; ValueError when it may not have that value."""
    variable = _BY_NAME[name]
    value = os.environ.get(name, "").strip()
    if not value:
        return variable.default
    if variable.values and value not in variable.values:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(variable.values)}, or unset")
    return value


def disabled() -> bool:
    return _read("FASTSEQ_DISABLE") == "1"


def isa_cap() -> str | None:
    return _read("FASTSEQ_ISA") or None


def preferred_kernel() -> str | None:
    return _read("FASTSEQ_KERNEL") or None


def verbose() -> bool:
    return _read("FASTSEQ_VERBOSE") == "1"


def check() -> bool:
    return _read("FASTSEQ_CHECK") == "1"


def cuda() -> str:
    return _read("FASTSEQ_CUDA")


def debug() -> bool:
    return _read("FASTSEQ_DEBUG") == "1"
