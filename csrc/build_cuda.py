"""Compiles csrc/kernels/cuda/*.cu with nvcc into objects for the extension: needs no GPU, no driver and no CUDA torch.

The extension carries the CUDA runtime as a static library, so one binary loads beside any torch. Each object has beside
it what ptxas said of its kernels (.log) and what it was made from (.d); tests/test_cuda_build.py reads both.

Standard library only: setup.py and the tests load this file by its path. `python csrc/build_cuda.py [NAME...]` compiles
all files, or those of these names.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc/kernels/cuda"

OLDEST_NVCC = (12, 0)
OLDEST_ARCH = 75
# Each in machine code, the newest that nvcc knows in PTX too.
DEFAULT_ARCHS = (75, 80, 86, 89, 90, 100, 120)
# What torch.utils.cpp_extension understands in TORCH_CUDA_ARCH_LIST.
NAMED_ARCHS = {
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}

FLAGS = ("-std=c++17", "-O3", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")
RELEASE_FLAGS = ("-DNDEBUG",)
DEBUG_FLAGS = ("-lineinfo", "-Xcompiler=-g")
# A seventh of the size. Older drivers than nvcc 13 asks for anyway could not read it, so older compilers go without.
NVCC_13_FLAGS = ("--compress-mode=size",)
# Lines of a log that say nothing new to who builds.
QUIET_LINES = r"^ptxas info|bytes stack frame, .* bytes spill"


class CannotBuild(Exception):
    """Why the CUDA kernels were not built, in words for the user."""


class Nvcc(NamedTuple):
    path: str
    version: str  # such as 13.0.88
    archs: tuple[int, ...]  # what it compiles for, ascending
    runtime: Path  # libcudart_static.a
    ninja: str


class Targets(NamedTuple):
    """Architectures as nvcc writes them: "90" or "90a" for machine code, "90+PTX" for PTX."""

    names: tuple[str, ...]
    left_out: tuple[str, ...]  # sentences


class Plan(NamedTuple):
    nvcc: Nvcc
    targets: Targets
    folder: Path
    is_debug: bool

    def describe(self) -> str:
        nvcc = f"nvcc {self.nvcc.version} ({self.nvcc.path})"
        return f"{len(sources())} CUDA files for {' '.join(self.targets.names)}, with {nvcc}"

    def warnings(self) -> list[str]:
        warnings = list(self.targets.left_out)
        driver = driver_version()
        if driver is not None and driver < int(self.nvcc.version.split(".")[0]):
            newer = f"nvcc {self.nvcc.version} is newer than this machine's driver, which runs CUDA {driver}"
            warnings.append(f"{newer}: the kernels will not run here")
        return warnings


# The compiler -----------------------------------------------------------------------------------------------------


def sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cu"))


def find_nvcc(environ: Mapping[str, str] = os.environ, usual: Sequence[str] = ("/usr/local/cuda",)) -> Nvcc:
    """The first nvcc of CUDA_HOME, CUDA_PATH, PATH and the usual places, with everything it needs."""
    homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    places = [str(Path(home) / "bin") for home in homes] + [environ.get("PATH", ""), *(f"{home}/bin" for home in usual)]
    found = (shutil.which("nvcc", path=place) for place in places if place)
    path = next((path for path in found if path), None)
    if path is None:
        looked = ", ".join(f"{name}={environ[name]}" for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name))
        raise CannotBuild(f"no nvcc found ({looked + ', ' if looked else ''}PATH, {', '.join(usual)}); set CUDA_HOME")

    release = re.search(r"release ([\d.]+), V([\d.]+)", ask(path, "--version", environ=environ))
    if release is None:
        raise CannotBuild(f"{path} --version names no version")
    if tuple(map(int, release[1].split("."))) < OLDEST_NVCC:
        raise CannotBuild(f"{path} is version {release[1]}; {'.'.join(map(str, OLDEST_NVCC))} or newer is needed")
    archs = {int(number) for number in re.findall(r"compute_(\d+)\b", ask(path, "--list-gpu-arch", environ=environ))}

    # Asked for its steps nvcc says where its libraries are, through wrappers too and wherever a distribution put them.
    steps = ask(path, "--dryrun", "-c", "x.cu", environ=environ)
    top = re.search(r"^#\$ TOP=(.*)$", steps, re.MULTILINE)
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", steps, re.MULTILINE)
    folders = [flag[2:] for flag in shlex.split(libraries[1] if libraries else "") if flag.startswith("-L")]
    folders += [f"{top[1].strip()}/{name}" for name in ("lib64", "lib") if top]
    folders += [f"/usr/lib/{os.uname().machine}-linux-gnu", "/usr/lib64"]
    runtimes = [Path(folder) / "libcudart_static.a" for folder in folders]
    runtime = next((path.resolve() for path in runtimes if path.is_file()), None)
    if runtime is None:
        raise CannotBuild(f"{path} has no libcudart_static.a in {', '.join(folders)}")

    # The one beside the interpreter first, whether its environment is activated or not: ninjas of different versions do
    # not read each other's logs, and would compile all again.
    ninja = shutil.which("ninja", path=os.pathsep.join([os.path.dirname(sys.executable), environ.get("PATH", "")]))
    if ninja is None:
        raise CannotBuild("no ninja found; pip install ninja")
    return Nvcc(path, release[2], tuple(sorted(archs)), runtime, ninja)


def ask(nvcc: str, *arguments: str, environ: Mapping[str, str]) -> str:
    """What nvcc prints."""
    try:
        result = subprocess.run([nvcc, *arguments], env=dict(environ), capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{nvcc} does not run: {error}") from None
    if result.returncode:
        raise CannotBuild(f"{nvcc} {' '.join(arguments)} fails: {(result.stderr or result.stdout).strip()}")
    return result.stdout + result.stderr


def driver_version() -> int | None:
    """The major CUDA version that the installed driver runs; None without one."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value // 1000


# Architectures ----------------------------------------------------------------------------------------------------


def number_of(target: str) -> int:
    return int(re.match(r"\d+", target)[0])  # type: ignore[index]


def default_targets(known: Sequence[int]) -> Targets:
    chosen = [arch for arch in DEFAULT_ARCHS if arch in known]
    missing = [arch for arch in DEFAULT_ARCHS if arch not in known]
    if not chosen:
        raise CannotBuild(f"nvcc knows none of sm_{', sm_'.join(map(str, DEFAULT_ARCHS))}")
    left_out = [f"this nvcc does not know sm_{', sm_'.join(map(str, missing))}: left out"] if missing else []
    return Targets((*map(str, chosen), f"{chosen[-1]}+PTX"), tuple(left_out))


def parse_targets(text: str, known: Sequence[int]) -> Targets:
    """What TORCH_CUDA_ARCH_LIST asks for: "8.0;9.0+PTX", "8.6 9.0a", "Hopper"; the defaults if it is empty."""
    words = text.replace(",", " ").replace(";", " ").split()
    if not words:
        return default_targets(known)
    by_name = {name.lower(): archs.split(";") for name, archs in NAMED_ARCHS.items()}
    archs = [arch for word in words for arch in by_name.get(word.lower(), [word])]
    chosen, too_old = set(), []
    given = f"TORCH_CUDA_ARCH_LIST is {text!r}"
    for word in archs:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if match is None:
            raise CannotBuild(f"{given}; {word!r} is no architecture; expected text such as '8.0;9.0+PTX' or 'Hopper'")
        number, name = int(match[1] + match[2]), match[1] + match[2] + match[3]
        if number < OLDEST_ARCH:
            too_old.append(word)
            continue
        if number not in known:
            raise CannotBuild(f"{given}; this nvcc does not know {word}, only {' '.join(map(str, known))}")
        chosen.add(name)
        if match[4]:
            chosen.add(f"{name}+PTX")
    oldest = f"{OLDEST_ARCH / 10}"
    if not chosen:
        raise CannotBuild(f"{given}; the kernels need {oldest} or newer")
    left_out = [f"the kernels need compute capability {oldest}: {' '.join(too_old)} left out"] if too_old else []
    return Targets(tuple(sorted(chosen, key=lambda target: (number_of(target), target))), tuple(left_out))


def min_arch(source: Path) -> int:
    """What a line `// fastseq-min-arch: 80` at the top of a file says: its kernels are never chosen for less."""
    head = "\n".join(source.read_text(encoding="utf-8").splitlines()[:20])
    if "fastseq-min-arch" not in head:
        return OLDEST_ARCH
    match = re.search(r"^// fastseq-min-arch: (\d\d+)$", head, re.MULTILINE)
    if match is None:
        raise CannotBuild(f"{source.name}: write '// fastseq-min-arch: 80' on a line of its own")
    return int(match[1])


def targets_of(source: Path, targets: Sequence[str], known: Sequence[int]) -> list[str]:
    """Those of `targets` that a file is compiled for: never none, because its launchers are linked anyway."""
    lowest = min_arch(source)
    allowed = [target for target in targets if number_of(target) >= lowest]
    if allowed:
        return allowed
    possible = [arch for arch in known if arch >= lowest]
    if not possible:
        raise CannotBuild(f"{source.name} needs sm_{lowest}, which this nvcc does not know")
    return [str(possible[0])]


def gencode(targets: Iterable[str]) -> list[str]:
    flags = []
    for target in targets:
        arch, plus, _ = target.partition("+")
        flags.append(f"-gencode=arch=compute_{arch},code={'compute' if plus else 'sm'}_{arch}")
    return flags


# The build --------------------------------------------------------------------------------------------------------


def plan(wanted: str, is_debug: bool = False, environ: Mapping[str, str] = os.environ) -> tuple[Plan | None, str]:
    """What FASTSEQ_CUDA=`wanted` means here: a plan and "", or None and why not; CannotBuild if there must be one."""
    if wanted == "0":
        return None, "built with FASTSEQ_CUDA=0"
    try:
        if not (SOURCES / "engine.cu").exists():
            raise CannotBuild("this version has no CUDA kernels")
        nvcc = find_nvcc(environ)
    except CannotBuild as error:
        if wanted == "1":
            raise CannotBuild(f"FASTSEQ_CUDA=1, but {error}") from None
        return None, str(error)
    return plan_with(nvcc, parse_targets(environ.get("TORCH_CUDA_ARCH_LIST", ""), nvcc.archs), is_debug), ""


def plan_with(nvcc: Nvcc, targets: Targets, is_debug: bool = False) -> Plan:
    # A folder for each set of flags: who builds with the same ones again, a test for instance, finds everything done.
    archs = "" if targets.names == default_targets(nvcc.archs).names else "-" + "_".join(targets.names)
    folder = ROOT / f"build/cuda{nvcc.version}-{'debug' if is_debug else 'release'}{archs}"
    return Plan(nvcc, targets, folder, is_debug)


def object_of(plan: Plan, source: Path) -> Path:
    return plan.folder / f"{source.stem}.o"


def log_of(plan: Plan, source: Path) -> Path:
    return plan.folder / f"{source.stem}.log"


def depfile_of(plan: Plan, source: Path) -> Path:
    return plan.folder / f"{source.stem}.d"


def ninja_text(plan: Plan) -> str:
    def path(value: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(value))

    def word(value: str) -> str:
        return shlex.quote(value).replace("$", "$$")

    flags = [*FLAGS, *(DEBUG_FLAGS if plan.is_debug else RELEASE_FLAGS), f"-I{ROOT / 'csrc'}"]
    flags += NVCC_13_FLAGS if int(plan.nvcc.version.split(".")[0]) >= 13 else []
    compile_command = f"{word(plan.nvcc.path)} {' '.join(map(word, flags))} $flags -MD -MF $dep -c $in -o $out"
    lines = [
        "ninja_required_version = 1.7",
        "rule nvcc",
        # The log stays; what a person should read of it is printed.
        f"  command = {compile_command} > $log 2>&1; code=$$?; grep -Ev {word(QUIET_LINES)} $log; exit $$code",
        "  depfile = $dep",
        "  description = $what",
    ]
    for source in sources():
        targets = targets_of(source, plan.targets.names, plan.nvcc.archs)
        own = gencode(targets)
        if source.name == "engine.cu":
            own.append(f'-DFS_CUDA_ARCHITECTURES="{" ".join(plan.targets.names)}"')
        log, dep = log_of(plan, source), depfile_of(plan, source)
        lines += [
            f"build {path(object_of(plan, source))} | {path(log)}: nvcc {path(source)}",
            f"  flags = {' '.join(map(word, own))}",
            f"  log = {word(str(log))}",
            f"  dep = {word(str(dep))}",
            f"  what = {source.relative_to(ROOT)} for {' '.join(targets)}",
        ]
    return "\n".join(lines) + "\n"


def cores(environ: Mapping[str, str]) -> int:
    if environ.get("MAX_JOBS", "").isdigit():  # torch's variable for the same
        return max(1, int(environ["MAX_JOBS"]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_objects(plan: Plan, names: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Compiles what is out of date, showing ninja's lines; returns the objects. CannotBuild after nvcc's message."""
    wanted = [source for source in sources() if not names or source.stem in names]
    text = ninja_text(plan)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with open(plan.folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a test and a build may come here at once
        ninja_file = plan.folder / "build.ninja"
        if not ninja_file.exists() or ninja_file.read_text() != text:
            ninja_file.write_text(text)
        jobs = cores(environ)
        # The architectures of a file in parallel too. Not in the command: another number would compile all again.
        threads = f"{environ.get('NVCC_APPEND_FLAGS', '')} --threads {min(jobs, 4)}".strip()
        objects = [object_of(plan, source) for source in wanted]
        result = subprocess.run(
            [plan.nvcc.ninja, "-f", ninja_file.name, "-j", str(jobs), *map(str, objects)],
            cwd=plan.folder,
            env={**environ, "NVCC_APPEND_FLAGS": threads},
            stdout=2,  # stderr
        )
    if result.returncode:
        raise CannotBuild("nvcc failed, see its message above")
    return objects


def link_flags(plan: Plan) -> list[str]:
    """The runtime inside the extension and invisible outside: torch may hold another one in the same process."""
    return [str(plan.nvcc.runtime), f"-Wl,--exclude-libs,{plan.nvcc.runtime.name}", "-ldl", "-lrt", "-lpthread"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels, as a build of fastseq would.")
    parser.add_argument("names", nargs="*", help="files without .cu; all if none is named")
    parser.add_argument("--debug", action="store_true", help="with assertions and line numbers")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {source.stem for source in sources()}
    if unknown:
        parser.error(f"no such file: {', '.join(sorted(unknown))}")
    try:
        nvcc = find_nvcc()
        chosen = plan_with(nvcc, parse_targets(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), nvcc.archs), arguments.debug)
        print("\n".join([chosen.describe(), *chosen.warnings()]), file=sys.stderr)
        compile_objects(chosen, arguments.names)
    except CannotBuild as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
