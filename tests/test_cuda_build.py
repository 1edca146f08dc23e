"""The build of the CUDA kernels: how it decides, and what nvcc and ptxas say of every kernel for every architecture.

No GPU is needed. `python tests/test_cuda_build.py --record` writes the registers of each kernel to cuda_registers.json.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT, run_python

from fastseq import _native
from fastseq.__main__ import cuda_kernels

RECORD = ROOT / "tests/cuda_registers.json"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_cuda", ROOT / "csrc/build_cuda.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a cache in csrc/ would set off `make build`
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


build_cuda = load()
CannotBuild = build_cuda.CannotBuild


# What nvcc makes of the kernels -------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    file: str
    name: str
    arch: str
    registers: int
    memory: str  # on the stack: "" if none


def demangle(name: str) -> str:
    """As a person would call it; `name` itself where the C++ runtime cannot tell."""
    runtime = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    runtime.restype, runtime.argtypes = ctypes.c_void_p, [ctypes.c_char_p] * 4
    text = runtime(name.encode(), None, None, None)
    full = ctypes.string_at(text).decode() if text else name
    short = full.removeprefix("void ").replace("fastseq::cuda::", "").replace("(anonymous namespace)::", "")
    return re.sub(r"\(\w+\)$", "", short)


def read_log(file: str, text: str) -> Iterator[Kernel]:
    """The kernels in what `ptxas -v` printed; every line must be understood."""
    entry = re.compile(r"ptxas info +: Compiling entry function '(\S+)' for 'sm_(\w+)'")
    frame = re.compile(r" +(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
    used = re.compile(r"ptxas info +: Used (\d+) registers(.*)")
    other = re.compile(r"ptxas info +: (\d+ bytes gmem|Function properties for|Compile time =|Overriding)|\s*$")
    current: tuple[str, str] | None = None
    frames: list[str] = []
    for line in text.splitlines():
        if match := entry.match(line):
            assert current is None, f"{file}: no registers of {current} before {line}"
            current, frames = (match[1], match[2]), []
        elif match := frame.match(line):
            frames += [line.strip()] if any(int(count) for count in match.groups()) else []
            assert current or not frames, f"{file}: whose stack frame is {line}"
        elif match := used.match(line):
            assert current, f"{file}: whose registers are {line}"
            frames += [match[2]] if re.search(r"[1-9]\d* bytes cumulative stack", match[2]) else []
            yield Kernel(file, demangle(current[0]), current[1], int(match[1]), "; ".join(frames))
            current = None
        else:
            assert other.match(line), f"{file}: {line}"
    assert current is None, f"{file}: no registers of {current}"


class Compiled(NamedTuple):
    plan: Any
    kernels: list[Kernel]


def compile_all() -> Compiled:
    """Every kernel for the default architectures, in the folder that a build uses: done already if there was one."""
    nvcc = build_cuda.find_nvcc()
    plan = build_cuda.plan_with(nvcc, build_cuda.default_targets(nvcc.archs))
    build_cuda.compile_objects(plan)
    kernels = []
    for source in build_cuda.sources():
        kernels += read_log(source.name, build_cuda.log_of(plan, source).read_text())
    return Compiled(plan, kernels)


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    if not build_cuda.sources():
        pytest.skip("this version has no CUDA kernels")
    try:
        build_cuda.find_nvcc()
    except CannotBuild as error:
        pytest.skip(str(error))
    return compile_all()


def test_every_kernel_is_compiled_for_every_architecture(compiled: Compiled) -> None:
    """And is seen here: a gate that sees nothing would let everything through."""
    assert compiled.kernels
    assert "120" in compiled.plan.targets.names or compiled.plan.targets.left_out
    for source in build_cuda.sources():
        targets = build_cuda.targets_of(source, compiled.plan.targets.names, compiled.plan.nvcc.archs)
        found: dict[str, set[str]] = {arch: set() for arch in targets if "+" not in arch}
        for kernel in compiled.kernels:
            if kernel.file == source.name:
                found[kernel.arch].add(kernel.name)
        # A file of tables only has no kernel, but ptxas says so once for each architecture.
        heads = re.findall(r"bytes gmem", build_cuda.log_of(compiled.plan, source).read_text())
        assert len(heads) == len(found), f"{source.name}: ptxas was not heard for each of {' '.join(found)}"
        for arch, names in found.items():
            assert names == next(iter(found.values())), f"{source.name} has other kernels for sm_{arch}"


def test_no_kernel_spills_or_has_a_stack(compiled: Compiled) -> None:
    bad = [f"{k.file} {k.name} sm_{k.arch}: {k.memory}" for k in compiled.kernels if k.memory]
    assert not bad, "\n".join(bad)


def test_no_kernel_takes_more_registers_than_recorded(compiled: Compiled) -> None:
    record = json.loads(RECORD.read_text())
    if record["nvcc"] != compiled.plan.nvcc.version:
        pytest.skip(f"recorded with nvcc {record['nvcc']}, this is {compiled.plan.nvcc.version}")
    measured, known = table(compiled.kernels), record["registers"]
    again = f"python tests/test_cuda_build.py --record, and look at the difference of {RECORD.name}"
    for file in sorted(measured.keys() | known.keys()):
        new, old = measured.get(file, {}), known.get(file, {})
        assert new.keys() == old.keys(), f"{file}: kernels {sorted(new.keys() ^ old.keys())} came or went; {again}"
        for name, registers in new.items():
            assert registers.keys() == old[name].keys(), f"{file}: {name} is compiled for other architectures; {again}"
            more = {arch: (count, old[name][arch]) for arch, count in registers.items() if count > old[name][arch]}
            assert not more, f"{file}: {name} takes more registers (measured, recorded): {more}; {again}"


def test_kernels_include_no_torch_header(compiled: Compiled) -> None:
    for source in build_cuda.sources():
        text = build_cuda.depfile_of(compiled.plan, source).read_text().replace("\\\n", " ")
        headers = [Path(word) for word in text.split()[2:]]
        assert any(header.name == "kernels.h" for header in headers), f"{source.name}: not a list of headers"
        for header in headers:
            foreign = {"torch", "ATen", "c10", "pybind11", "Python.h"} & set(header.parts)
            assert not foreign, f"{source.name} includes {header}"


def table(kernels: list[Kernel]) -> dict[str, dict[str, dict[str, int]]]:
    """File, kernel, architecture: registers."""
    result: dict[str, dict[str, dict[str, int]]] = {}
    for kernel in sorted(kernels, key=lambda k: (k.file, k.name, int(re.sub(r"\D", "", k.arch)))):
        row = result.setdefault(kernel.file, {}).setdefault(kernel.name, {})
        row[kernel.arch] = max(kernel.registers, row.get(kernel.arch, 0))
    return result


def record_text(compiled: Compiled) -> str:
    """JSON with a line for each kernel."""
    files = []
    for file, kernels in table(compiled.kernels).items():
        rows = ",\n".join(f"   {json.dumps(name)}: {json.dumps(registers)}" for name, registers in kernels.items())
        files.append(f"  {json.dumps(file)}: {{\n{rows}\n  }}")
    body = ",\n".join(files)
    return f'{{\n "nvcc": "{compiled.plan.nvcc.version}",\n "registers": {{\n{body}\n }}\n}}\n'


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7fastseq4cuda4fastILi3EEEvNS0_4ArgsE' for 'sm_90'
ptxas info    : Function properties for _ZN7fastseq4cuda4fastILi3EEEvNS0_4ArgsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers, 376 bytes cmem[0]
ptxas info    : Compile time = 1.209 ms
ptxas info    : Compiling entry function 'slow' for 'sm_75'
ptxas info    : Function properties for slow
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, 8 bytes cumulative stack size
"""


def test_logs_are_understood() -> None:
    fast, slow = read_log("x.cu", LOG)
    assert fast == ("x.cu", "fast<3>", "90", 18, "")
    assert slow[:4] == ("x.cu", "slow", "75", 255) and "12 bytes spill loads" in slow.memory
    warned = LOG + "x.cu(3): warning #177-D: unused\n"
    for damaged in (LOG[: LOG.rindex("ptxas")], LOG.replace("Compiling", "Having"), warned):
        with pytest.raises(AssertionError, match="x.cu"):
            list(read_log("x.cu", damaged))


# Architectures ----------------------------------------------------------------------------------------------------

KNOWN = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "75 80 86 89 90 100 120 120+PTX"),
        (" ; ", "75 80 86 89 90 100 120 120+PTX"),
        ("8.0;9.0+PTX", "80 90 90+PTX"),
        ("9.0 8.6 8.6", "86 90"),
        ("9.0a;10.0f;9.0", "90 90a 100f"),
        ("Hopper", "90 90+PTX"),
        ("Ampere;hopper", "80 86 86+PTX 90 90+PTX"),
        ("Ampere+Tegra Blackwell", "87 100 103 120 121 121+PTX"),
    ],
)
def test_architecture_lists(text: str, expected: str) -> None:
    assert build_cuda.parse_targets(text, KNOWN) == (tuple(expected.split()), ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8", "'8' is no architecture; expected text such as '8.0;9.0"),
        ("sm_90", "'sm_90' is no arch"),
        ("Hoper", "'Hoper' is no arch"),
        ("native", "'native' is no arch"),
        ("9.0+ptx", r"'9.0\+ptx' is no arch"),
        ("8.0;13.0", "this nvcc does not know 13.0, only 75 80"),
        ("6.0 7.0", "the kernels need 7.5 or newer"),
    ],
)
def test_bad_architecture_lists(text: str, message: str) -> None:
    with pytest.raises(CannotBuild, match=f"^TORCH_CUDA_ARCH_LIST is {text!r}".replace("+", r"\+") + f".*{message}"):
        build_cuda.parse_targets(text, KNOWN)


def test_what_is_left_out_is_said() -> None:
    names, left_out = build_cuda.parse_targets("7.0;8.0", KNOWN)
    assert names == ("80",) and left_out == ("the kernels need compute capability 7.5: 7.0 left out",)
    names, left_out = build_cuda.default_targets((75, 80, 86, 89, 90))
    assert names == ("75", "80", "86", "89", "90", "90+PTX")
    assert left_out == ("this nvcc does not know sm_100, sm_120: left out",)
    with pytest.raises(CannotBuild, match="knows none of sm_75"):
        build_cuda.default_targets((50, 60))


def test_lowest_architecture_of_a_file(tmp_path: Path) -> None:
    source = tmp_path / "a.cu"
    targets = ("75", "80", "90", "90+PTX")
    for text, expected in (
        ("// Nothing.\n", ["75", "80", "90", "90+PTX"]),
        ("// fastseq-min-arch: 80\n", ["80", "90", "90+PTX"]),
        ("// A kernel.\n// fastseq-min-arch: 90\n", ["90", "90+PTX"]),
        ("// fastseq-min-arch: 100\n", ["100"]),
        ("\n" * 30 + "// fastseq-min-arch: 80\n", ["75", "80", "90", "90+PTX"]),
    ):
        source.write_text(text)
        assert build_cuda.targets_of(source, targets, KNOWN) == expected
    source.write_text("// fastseq-min-arch: 130\n")
    with pytest.raises(CannotBuild, match="a.cu needs sm_130, which this nvcc does not know"):
        build_cuda.targets_of(source, targets, KNOWN)
    for text in ("// fastseq-min-arch: 8.0\n", "// fastseq-min-arch 80\n", "int x;  // fastseq-min-arch: 80\n"):
        source.write_text(text)
        with pytest.raises(CannotBuild, match="a.cu: write '// fastseq-min-arch: 80'"):
            build_cuda.min_arch(source)


def test_nvcc_flags() -> None:
    flags = ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_120,code=compute_120"]
    assert build_cuda.gencode(["90a", "120+PTX"]) == flags


# The compiler, as a script that acts like one ---------------------------------------------------------------------

FAKE_NVCC = r"""#!/bin/sh
echo "$*" >> "$0.calls"
case "$*" in
  *--version*) echo "Cuda compilation tools, release VERSION, VVERSION.88"; exit 0 ;;
  *--list-gpu-arch*) printf 'compute_75\ncompute_80\ncompute_90\n'; exit 0 ;;
  *--dryrun*) echo "#$ TOP=HOME"; echo '#$ LIBRARIES=  "-LHOME/lib/stubs" "-LHOME/lib"' >&2; exit 0 ;;
esac
while [ $# -gt 0 ]; do
  case "$1" in -o) out=$2 ;; -MF) dep=$2 ;; -c) src=$2 ;; esac
  shift
done
if grep -q wrong "$src"; then echo "$src(1): error: this is wrong"; exit 2; fi
echo "ptxas info    : 0 bytes gmem"
echo "$out : $src $(dirname "$src")/shared.cuh" > "$dep"
echo object > "$out"
"""


def fake_toolkit(home: Path, version: str = "12.8", has_runtime: bool = True) -> Path:
    for folder in ("bin", "lib"):
        (home / folder).mkdir(parents=True)
    nvcc = home / "bin/nvcc"
    nvcc.write_text(FAKE_NVCC.replace("HOME", str(home)).replace("VERSION", version))
    nvcc.chmod(0o755)
    if has_runtime:
        (home / "lib/libcudart_static.a").touch()
    return home


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Where ninja is, and no nvcc: a PATH with the tools of a shell script."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "grep", "dirname", "cat", "ninja"):
        found = [Path(folder) / name for folder in (*os.environ["PATH"].split(":"), str(Path(sys.executable).parent))]
        path = next((path for path in found if path.exists()), None)
        if path is None:
            pytest.skip(f"no {name}")
        (tools / name).symlink_to(path)
    return {"PATH": str(tools)}


def test_nvcc_is_found(tmp_path: Path, environ: dict[str, str]) -> None:
    homes = {name: fake_toolkit(tmp_path / name) for name in ("usual", "path", "CUDA_PATH", "CUDA_HOME")}
    usual = (str(homes["usual"]),)
    for name in homes:  # each later one comes first
        if name == "path":
            # A wrapper elsewhere: what belongs to nvcc is not beside it.
            wrapper = tmp_path / "tools/nvcc"
            wrapper.write_text(f'#!/bin/sh\nexec {homes[name]}/bin/nvcc "$@"\n')
            wrapper.chmod(0o755)
        elif name != "usual":
            environ[name] = str(homes[name])
        nvcc = build_cuda.find_nvcc(environ, usual)
        assert nvcc.path == str(tmp_path / "tools/nvcc" if name == "path" else homes[name] / "bin/nvcc")
        assert nvcc.runtime == homes[name] / "lib/libcudart_static.a"
        assert nvcc.version == "12.8.88" and nvcc.archs == (75, 80, 90)


def test_nvcc_is_not_found(tmp_path: Path, environ: dict[str, str]) -> None:
    with pytest.raises(CannotBuild, match=r"^no nvcc found \(PATH, /nowhere\); set CUDA_HOME"):
        build_cuda.find_nvcc(environ, ("/nowhere",))
    with pytest.raises(CannotBuild, match=r"^no nvcc found \(CUDA_HOME=/nix, PATH, /nowhere\)"):
        build_cuda.find_nvcc({**environ, "CUDA_HOME": "/nix"}, ("/nowhere",))
    for message, home in (
        ("is version 11.5; 12.0 or newer is needed", fake_toolkit(tmp_path / "old", version="11.5")),
        ("has no libcudart_static.a in", fake_toolkit(tmp_path / "bare", has_runtime=False)),
    ):
        with pytest.raises(CannotBuild, match=message):
            build_cuda.find_nvcc({**environ, "CUDA_HOME": str(home)}, ())
    broken = fake_toolkit(tmp_path / "broken")
    (broken / "bin/nvcc").write_text("#!/bin/sh\necho no licence >&2; exit 3\n")
    with pytest.raises(CannotBuild, match="nvcc --version fails: no licence"):
        build_cuda.find_nvcc({**environ, "CUDA_HOME": str(broken)}, ())


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree with two files that include a header, for the fake compiler."""
    sources = tmp_path / "tree/csrc/kernels/cuda"
    sources.mkdir(parents=True)
    for name in ("engine.cu", "one.cu", "shared.cuh"):
        (sources / name).write_text("// fastseq-min-arch: 80\n" if name == "one.cu" else "// Nothing.\n")
    monkeypatch.setattr(build_cuda, "ROOT", tmp_path / "tree")
    monkeypatch.setattr(build_cuda, "SOURCES", sources)
    return sources


def test_only_what_changed_is_compiled(tmp_path: Path, environ: dict[str, str], tree: Path) -> None:
    environ["CUDA_HOME"] = str(fake_toolkit(tmp_path / "cuda"))
    calls = tmp_path / "cuda/bin/nvcc.calls"

    def build(**more: str) -> list[str]:
        plan, why = build_cuda.plan("auto", environ={**environ, **more})
        assert plan and not why
        calls.write_text("")
        objects = build_cuda.compile_objects(plan, environ={**environ, **more})
        assert [path.name for path in objects] == ["engine.o", "one.o"] and all(path.exists() for path in objects)
        assert all(build_cuda.log_of(plan, source).read_text().startswith("ptxas info") for source in tree.glob("*.cu"))
        return sorted(line for line in calls.read_text().splitlines() if " -c " in line)

    engine, one = build()
    assert '-DFS_CUDA_ARCHITECTURES="75 80 90 90+PTX"' in engine and "code=sm_75" in engine and "-DNDEBUG" in engine
    assert "FS_CUDA_ARCHITECTURES" not in one and "code=sm_75" not in one and "code=sm_80" in one
    assert build() == [] and build(MAX_JOBS="1") == []
    assert len(build(TORCH_CUDA_ARCH_LIST="8.0")) == 2, "in a folder of its own"
    assert build() == []
    time.sleep(0.05)  # the clock of a file system has ticks
    (tree / "shared.cuh").touch()
    assert len(build()) == 2
    time.sleep(0.05)
    (tree / "one.cu").touch()
    assert build() == [one]
    (tree / "one.cu").write_text("// Also for less.\n")
    (again,) = build()
    assert "code=sm_75" in again and "one.cu" in again


def test_a_file_that_does_not_compile(
    tmp_path: Path, environ: dict[str, str], tree: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    environ["CUDA_HOME"] = str(fake_toolkit(tmp_path / "cuda"))
    (tree / "one.cu").write_text("wrong\n")
    plan, _ = build_cuda.plan("1", environ=environ)
    with pytest.raises(CannotBuild, match="^nvcc failed, see its message above$"):
        build_cuda.compile_objects(plan, environ=environ)
    printed = capfd.readouterr()
    assert "one.cu(1): error: this is wrong" in printed.err and "ptxas info  " not in printed.err and printed.out == ""
    build_cuda.compile_objects(plan, ["engine"], environ=environ)


# FASTSEQ_CUDA ---------------------------------------------------------------------------------------------------------


def test_without_nvcc(environ: dict[str, str], tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = build_cuda.find_nvcc
    monkeypatch.setattr(build_cuda, "find_nvcc", lambda environ: find(environ, ()))
    plan, why = build_cuda.plan("auto", environ=environ)
    assert plan is None and why.startswith("no nvcc found")
    with pytest.raises(CannotBuild, match="^FASTSEQ_CUDA=1, but no nvcc found"):
        build_cuda.plan("1", environ=environ)
    assert build_cuda.plan("0", environ=environ) == (None, "built with FASTSEQ_CUDA=0")
    (tree / "engine.cu").unlink()
    with pytest.raises(CannotBuild, match="^FASTSEQ_CUDA=1, but this version has no CUDA kernels"):
        build_cuda.plan("1", environ=environ)


@pytest.mark.parametrize("wanted", ["auto", "1", "0"])
def test_setup_says_what_it_builds(wanted: str) -> None:
    """Up to the point where it would compile, on a machine without nvcc."""
    script = """
    import runpy, sys
    run = runpy.run_path
    def run_path(path, **options):
        names = run(path, **options)
        if path.endswith("build_cuda.py"):
            def find_nvcc(environ):
                raise names["CannotBuild"]("no nvcc found")
            names["plan"].__globals__["find_nvcc"] = find_nvcc
        return names
    runpy.run_path = run_path
    sys.argv = ["setup.py", "--name"]
    run("setup.py", run_name="__main__")
    """
    result = run_python("-c", textwrap.dedent(script), FASTSEQ_CUDA=wanted)
    assert "Traceback" not in result.stderr, result.stderr
    has_kernels = (ROOT / "csrc/kernels/cuda/engine.cu").exists()
    reason = "no nvcc found" if has_kernels else "this version has no CUDA kernels"
    if wanted == "1":
        assert result.returncode == 1
        assert f"fastseq build: FASTSEQ_CUDA=1, but {reason}\n" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        reason = "built with FASTSEQ_CUDA=0" if wanted == "0" else reason
        assert f"fastseq build: building CPU only: {reason}\n" in result.stderr


def test_a_driver_older_than_nvcc_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = build_cuda.Nvcc("/nvcc", "13.0.88", KNOWN, Path("/libcudart_static.a"), "/ninja")
    plan = build_cuda.plan_with(nvcc, build_cuda.default_targets(KNOWN))
    for driver, expected in ((None, 0), (13, 0), (14, 0), (12, 1)):
        monkeypatch.setattr(build_cuda, "driver_version", lambda driver=driver: driver)
        assert len(plan.warnings()) == expected
    assert "runs CUDA 12: the kernels will not run here" in plan.warnings()[0]


# What was built ---------------------------------------------------------------------------------------------------

needs_extension = pytest.mark.skipif(not _native.native_available(), reason="the extension is not built")


@needs_extension
def test_build_info_has_the_kernels_or_the_reason() -> None:
    build = _native.module().build_info()
    assert bool(build["cuda"]) == bool(build["cuda_architectures"]) != bool(build["cuda_note"])


def test_the_report_has_the_kernels_or_the_reason() -> None:
    assert cuda_kernels({}) == "none (no extension)"
    assert cuda_kernels({"cuda": "", "cuda_note": "built with FASTSEQ_CUDA=0"}) == "none (built with FASTSEQ_CUDA=0)"
    built = {"cuda": "13.0.88", "cuda_note": "", "cuda_architectures": "80 90+PTX"}
    assert cuda_kernels(built) == "for 80 90+PTX, built by nvcc 13.0.88; not yet run on hardware"


@needs_extension
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch brings the names into the process itself")
def test_the_cuda_runtime_is_inside_and_hidden() -> None:
    """One binary for every torch: no libcudart to load, and none that another in the process is mixed up with."""
    path = _native.module().__file__
    assert path and b"libcudart.so" not in Path(path).read_bytes()
    with pytest.raises(AttributeError):
        ctypes.CDLL(path).cudaLaunchKernel  # noqa: B018


def main() -> int:
    parser = argparse.ArgumentParser(description="Registers of the CUDA kernels, as ptxas says.")
    parser.add_argument("--record", action="store_true", help=f"write them to {RECORD.relative_to(ROOT)}")
    arguments = parser.parse_args()
    text = record_text(compile_all())
    if arguments.record:
        RECORD.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
