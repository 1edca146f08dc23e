"""`python -m fastseq`: the report, its JSON, and both without an extension."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import run_python

import fastseq
from fastseq import cuda
from fastseq.__main__ import collect, main, render


def test_report_names_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    for fact in (fastseq.__version__, torch.__version__, fastseq.isa(), "threads", "openmp", "gpu"):
        assert fact in out
    for kernel in (*fastseq.kernels(), *cuda.kernels()):
        assert kernel["name"] in out


def test_json_is_the_same_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads(json.dumps(collect()))
    assert data["native"] and data["kernels"] and data["build"] and data["extension"].endswith(".so")


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--version", "--help"):
        with pytest.raises(SystemExit) as stopped:
            main([flag])
        assert stopped.value.code == 0
    assert f"fastseq {fastseq.__version__}" in capsys.readouterr().out


def test_set_variables_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_ISA", "portable")
    info = collect()
    assert info["environment"]["FASTSEQ_ISA"] == "portable"
    assert "FASTSEQ_ISA=portable" in render(info)


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_without_an_extension(flags: list[str], shadow_package: Callable[[None], Path]) -> None:
    result = run_python("-m", "fastseq", *flags, cwd=shadow_package(None))
    assert result.returncode == 0, result.stderr
    assert "is not built" in result.stdout
    if flags:
        assert json.loads(result.stdout)["native"] is False
