"""Importing changes nothing; a missing or broken extension means eager execution and one warning."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, run_python

import fastseq

Shadow = Callable[[str | bytes | None], Path]


def check(script: str, cwd: Path = ROOT, **environment: str) -> None:
    """Runs `script` in a new interpreter; the test fails with its words if it does."""
    result = run_python("-c", script, cwd=cwd, **environment)
    assert result.returncode == 0, result.stdout + result.stderr


STATE = """
import os, sys
import torch
def state():
    return {
        "threads of the process": len(os.listdir("/proc/self/task")),
        "thread counts": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "default dtype": torch.get_default_dtype(),
        "generator": torch.get_rng_state().sum().item(),
        "grad": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "cuda": torch.cuda.is_initialized(),
        "environment": dict(os.environ),
    }
before, modules = state(), set(sys.modules)
"""

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="reads Linux's /proc")


@needs_proc
def test_import_is_inert() -> None:
    check(
        STATE
        + """
import fastseq
assert state() == before, (before, state())
new = set(sys.modules) - modules
foreign = {name.split(".")[0] for name in new} - {"fastseq", "torch"} - set(sys.stdlib_module_names)
assert not foreign, foreign
assert not {name for name in new if name.startswith(("torch._dynamo", "torch._inductor", "torch.testing"))}, new
"""
    )


@needs_proc
def test_loading_the_extension_is_inert() -> None:
    check(
        STATE
        + """
import fastseq
assert fastseq.native_available(), fastseq.native_error()
assert fastseq.isa() != "none" and fastseq.kernels()
assert state() == before, (before, state())
"""
    )


@needs_proc
def test_one_openmp_runtime() -> None:
    """Torch's and the extension's OpenMP are the same file: two would be two thread pools on the same cores."""
    check(
        """
import fastseq
from fastseq.__main__ import openmp_libraries
assert fastseq.native_available(), fastseq.native_error()
assert len(openmp_libraries()) == 1, openmp_libraries()
"""
    )


EAGER = """
import warnings
import torch
from torch import nn
import fastseq

model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 4), nn.ReLU()).eval()
x = torch.randn(2, 1, 8, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fast = fastseq.optimize(model)
    fastseq.optimize(model)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
fast(x).sum().backward()
print(fastseq.explain(fast, x))
assert list(fast.state_dict()) == list(model.state_dict())
assert not fastseq.native_available()
assert fastseq.isa() == "none" and fastseq.kernels() == []
assert fastseq.stats(fast)["fused_calls"] == 0
ours = [w for w in caught if "fastseq" in str(w.message)]
"""
WARNED = """
assert len(ours) == 1, [str(w.message) for w in ours]
assert ours[0].category is RuntimeWarning and ours[0].filename == "<string>", ours[0]
assert fastseq.native_error() in str(ours[0].message)
assert REASON in fastseq.native_error(), fastseq.native_error()
assert "pip install --no-build-isolation" in fastseq.native_error()
"""

BROKEN = {
    "missing": (None, "is not built"),
    "garbage": (b"not a shared object", "does not load (ImportError"),
    "empty": (b"", "does not load (ImportError"),
    "undefined symbol": ("raise ImportError('undefined symbol: _ZN3c106detail')", "undefined symbol: _ZN3c106detail"),
    "raises": ("raise RuntimeError('registered twice')", "does not load (RuntimeError: registered twice)"),
    "no version": ("", "does not load (AttributeError"),
    "other torch": ("TORCH_VERSION = '1.13'", "was built with torch 1.13, this is torch 2."),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_extension_runs_eager_with_one_warning(case: str, shadow_package: Shadow) -> None:
    content, reason = BROKEN[case]
    check(f"REASON = {reason!r}" + EAGER + WARNED, shadow_package(content))


@pytest.mark.parametrize("content", [None, b"not a shared object"], ids=["missing", "garbage"])
def test_disabled_is_eager_without_a_warning(content: bytes | None, shadow_package: Shadow) -> None:
    script = EAGER + "assert not ours and fastseq.native_error() == 'FASTSEQ_DISABLE=1'"
    check(script, shadow_package(content), FASTSEQ_DISABLE="1")


def test_disabling_counts_from_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTSEQ_DISABLE", raising=False)
    assert fastseq.native_available(), fastseq.native_error()
    monkeypatch.setenv("FASTSEQ_DISABLE", "1")
    assert not fastseq.native_available()


def test_unwritable_directories_do_not_matter() -> None:
    names = ("HOME", "XDG_CACHE_HOME", "TORCH_HOME", "TORCH_EXTENSIONS_DIR", "TMPDIR")
    check(
        """
import torch
from torch import nn
import fastseq
model = nn.Sequential(nn.Linear(8, 4), nn.ReLU()).eval()
x = torch.randn(3, 8)
fast = fastseq.optimize(model)
with torch.no_grad():
    torch.testing.assert_close(fast(x), model(x))
assert fastseq.stats(fast)["fused_calls"] == 1, fastseq.stats(fast)
""",
        **dict.fromkeys(names, "/dev/null/nowhere"),
    )
