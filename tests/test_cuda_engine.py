"""The CUDA engine as a whole on the emulated grid: its own suite, and those of the CPU engine that hold for any engine.

Each runs in a Python of its own, whose fastseq is linked with the emulated kernels: every CPU tensor there takes the
path of a CUDA tensor, through the same gate, planner, executor and kernel sources.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from emulation.extension import build_package
from torch import nn

from fastseq.patterns.activation import ACTIVATIONS

# What is the CPU engine's own: its kernels by name, float32 only, the same bits for every layout and batch.
ONE_ISA = "not avx512 and not avx2 and not emulated512"
# Runs with these are refused on CUDA: a test that wants a fused call has none there.
NOT_ON_CUDA = [
    *("avgpool2d", "adaptive", "average", "dilated", "conv1d", "pool1d", "pad2d"),
    *("upsampl", "pixel", "groupnorm", "layernorm", "softmax"),
]
# Of patterns with an activation, two: all activations are in test_finished_networks.
OTHERS = [kind.__name__.lower() for kind in ACTIVATIONS if kind not in (nn.ReLU, nn.PReLU, nn.GELU)]
LEFT_OUT = " or ".join((*NOT_ON_CUDA, *(f"{before}{name}" for name in OTHERS for before in ("_", "[", "-"))))
SHAPES = "padding or pad2d or upsample or pixel or unflatten"
SUITES: dict[str, tuple[str, ...]] = {
    "on_emulated_grid": (),
    "test_fallback_errors.py": ("-k", "not average and not avgpool2d and not adaptive"),
    "test_liveness.py": ("-k", "not dtype_there_and_back and not dilated and not (padding and mode)"),
    # Statistics that are not finite: test_statistics_of_any_size. Activations: test_finished_networks, too.
    "test_activations.py": (
        "-k",
        f"{ONE_ISA} and not bits_do_not_depend and not (test_numbers and not (PReLU or Tanh))",
    ),
    "test_batchnorm.py": ("-k", f"{ONE_ISA} and not linear_in_place and not special_statistics"),
    "test_maxpool2d.py": ("-k", f"{ONE_ISA} and not dilated"),
    "test_memory_format.py": (
        "-k",
        f"not average and not adaptive and not groupnorm and not (flatten and norm) and not ({SHAPES})",
    ),
    "test_optimize.py": (),
    "test_patterns.py": ("-k", f"not ({LEFT_OUT})"),
    "test_sequential.py": (),
    "test_serialization.py": ("-k", "not float_copy_of_a_half_model and not spawned_process"),
    # ReLU on CUDA gives +0.0 for -0.0.
    "test_special_values.py": ("-k", f"{ONE_ISA} and not average and not signed_zeros_through_a_pool"),
    "test_gate.py": ("-k", "not half and not bfloat16 and not another_dtype"),
    "test_conv2d.py": ("-k", f"{ONE_ISA} and not bits_do_not_depend_on_the_format"),
}


@pytest.fixture(scope="session")
def package() -> Path:
    return build_package()


@pytest.mark.parametrize("suite", SUITES)
def test_suite(suite: str, package: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTSEQ_")}
    # Not from the root: the package there would come first.
    options = ("-q", "--tb=short", "-p", "emulation.ieee", "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(ROOT / "tests" / suite), *SUITES[suite]],
        cwd=package,
        env={**environment, "PYTHONPATH": os.pathsep.join((str(package), str(ROOT / "tests")))},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert passed and int(passed[1]) > 20, done.stdout[-2000:]
