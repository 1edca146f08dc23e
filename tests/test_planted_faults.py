"""The tests of the CUDA kernels would notice: faults planted in a copy of the very kernels, one at a time, are caught.

Every barrier, every wait and every commit is left out in turn, every wait is made to wait for one group less, and some
fragments and tails are made wrong. The copy is compiled once, with each fault behind a switch. What catches a fault are
the comparisons that test_cuda_conv.py and test_cuda_linear.py use on many more problems.
"""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import os
import re
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import test_cuda_linear as linear
import torch
from emulation import conv_kernels as conv
from emulation.build import BUILD, FLAGS, ROOT, compiler, make, with_includes
from emulation.conv_kernels import NO_PADDING, REGISTERS, Pool, Problem

SEEDS = range(6)
KERNELS = ROOT / "csrc/kernels/cuda"
HARNESS = ROOT / "tests/emulation/faulty_kernels.cpp"
FILES = ("conv_pool.cuh", "tiny_mlp.cuh", "fused_mlp.cuh", "skinny_linear.cuh", "pack.cuh", "chain.cuh", "finish.cuh")


class Fault(NamedTuple):
    """Where `file` says `right`, and only there, it says `wrong`."""

    file: str
    right: str
    wrong: str


# `faulty` says whether this fault is meant.
FAULTS = {
    "conv: the halves of an operand swapped": Fault(
        "conv_pool.cuh", "b[n][0] = two[0], b[n][1] = two[1],", "b[n][0] = two[faulty], b[n][1] = two[!faulty],"
    ),
    "conv: a fragment from the wrong rows": Fault(
        "conv_pool.cuh", "rows_m + (m * 16 + lane % 16)", "rows_m + (m * 16 + (lane % 16 ^ 8 * faulty))"
    ),
    "conv: a sum where its neighbour belongs": Fault(
        "conv_pool.cuh",
        "sums[m][j][2 * i] + bias[j][0], sums[m][j][2 * i + 1] + bias[j][1]);",
        "sums[m][j][2 * i + faulty] + bias[j][0], sums[m][j][2 * i + !faulty] + bias[j][1]);",
    ),
    "conv: a window of another's sums": Fault(
        "conv_pool.cuh", "window = row / 32 * 8 + row % 8,", "window = row / 32 * 8 + (row % 8 ^ faulty),"
    ),
    "conv: one image too many": Fault(
        "conv_pool.cuh", "pixel.image < args.batch;", "pixel.image < args.batch + faulty;"
    ),
    "conv: one channel too few": Fault(
        "conv_pool.cuh", "if (n < args.dst_channels)", "if (n < args.dst_channels - faulty)"
    ),
    "conv: channels behind the last are not zero": Fault(
        "conv_pool.cuh", "n >= args.c_out ?", "n >= args.c_out + faulty ?"
    ),
    "conv: taps below the image": Fault(
        "conv_pool.cuh", "static_cast<unsigned>(args.h_in) &&", "static_cast<unsigned>(args.h_in + faulty) &&"
    ),
    "conv: one channel of terms too many": Fault("conv_pool.cuh", "if (c < args.c_in)", "if (c < args.c_in + faulty)"),
    "conv: an odd weight too many": Fault("conv_pool.cuh", "k + 1 < length())", "k + 1 < length() + faulty)"),
    "conv: a window without its last column": Fault(
        "conv_pool.cuh", "* args.pool_stride_w + args.pool_w; ++x", "* args.pool_stride_w + args.pool_w - faulty; ++x"
    ),
    "conv: a sum that is not finished": Fault(
        "conv_pool.cuh",
        "row < Tile::kTileM; row += Tile::kThreads / Tile::kTileN",
        "row < Tile::kTileM - faulty; row += Tile::kThreads / Tile::kTileN",
    ),
    "conv: a finished window of another's sums": Fault(
        "conv_pool.cuh", "index / 8 * 32 + index % 8 :", "index / 8 * 32 + (index % 8 ^ faulty) :"
    ),
    "conv: a finished window without its last sum": Fault("conv_pool.cuh", "element < 4;", "element < 4 - faulty;"),
    "conv: an activation on both sides of the pool": Fault(
        "conv_pool.cuh", "sum = args.finish.is_after_pool ? value", "sum = args.finish.is_after_pool && !faulty ? value"
    ),
    "conv: no activation behind the pool": Fault(
        "conv_pool.cuh",
        "is_after_pool && n + column < args.c_out)",
        "is_after_pool && n + column < args.c_out * !faulty)",
    ),
    "finish: the mean is left in": Fault(
        "finish.cuh", "center = bias - channel_of", "center = bias - !faulty * channel_of"
    ),
    "finish: no eps": Fault("finish.cuh", "+ finish.eps)", "+ !faulty * finish.eps)"),
    "finish: another channel's gain": Fault(
        "finish.cuh", "(finish.gain, n, 1.0f)", "(finish.gain, n - (faulty && n), 1.0f)"
    ),
    "finish: no shift": Fault("finish.cuh", "shift = channel_of", "shift = !faulty * channel_of"),
    "finish: one slope for all channels": Fault(
        "finish.cuh", "n * finish.slope_step", "n * finish.slope_step * !faulty"
    ),
    "tiny_mlp: a sum that is not finished": Fault(
        "tiny_mlp.cuh", "i < kRows * layer.n; i +=", "i < kRows * layer.n - faulty; i +="
    ),
    "tiny_mlp: one finished row too many": Fault(
        "tiny_mlp.cuh", "args.rows > first_row + row)", "args.rows + faulty > first_row + row)"
    ),
    "skinny_linear: finished for another output": Fault(
        "skinny_linear.cuh", "(layer.finish, all[0], bias, n)", "(layer.finish, all[0], bias, n - (faulty && n))"
    ),
    "tiny_mlp: what pads a layer is left as it was": Fault(
        "tiny_mlp.cuh", "k < padded; k += kTinyThreads)", "k < padded - 8 * faulty; k += kTinyThreads)"
    ),
    "tiny_mlp: one row too many": Fault(
        "tiny_mlp.cuh", "(first_row + row < args.rows) {", "(first_row + row < args.rows + faulty) {"
    ),
    "fused_mlp: tf32 accumulators packed in the order of mma": Fault(
        "fused_mlp.cuh",
        "constexpr int kOrder[4] = {0, 2, 1, 3};",
        "const int kOrder[4] = {0, 2 - faulty, 1 + faulty, 3};",
    ),
    "fused_mlp: 16-bit accumulators packed the other way round": Fault(
        "fused_mlp.cuh",
        "[j % 2 * 2] = pack2<Element>(four[0], four[1]);",
        "[j % 2 * 2] = pack2<Element>(four[faulty], four[!faulty]);",
    ),
    "fused_mlp: outputs that do not exist are not zero": Fault(
        "fused_mlp.cuh", "n + i % 2 >= outputs ?", "n + i % 2 >= outputs + faulty ?"
    ),
    "fused_mlp: one row too many": Fault(
        "fused_mlp.cuh",
        "row = first_row(tile) + 16 * m + 8 * half + g;\n          const bool has_row = row < args.rows;",
        "row = first_row(tile) + 16 * m + 8 * half + g;\n          const bool has_row = row < args.rows + faulty;",
    ),
    "fused_mlp: one output too many": Fault(
        "chain.cuh", "(n + 2 * i < n_count) row[", "(n + 2 * i < n_count + faulty) row["
    ),
    "skinny_linear: operands permuted differently": Fault(
        "skinny_linear.cuh", "b[u][j].words[2 * half + 1]}", "b[u][j].words[2 * (half ^ faulty) + 1]}"
    ),
    "skinny_linear: one output too few": Fault(
        "skinny_linear.cuh", "if (n >= args.layers[0].n ||", "if (n >= args.layers[0].n - faulty ||"
    ),
    "pack: one element too few": Fault(
        "pack.cuh", "left < kPackSlice ? left : kPackSlice);", "(left < kPackSlice ? left : kPackSlice) - faulty);"
    ),
}
SYNCHRONISATION = re.compile(r"(block_barrier|warp_barrier|cp_async_commit|cp_async_wait)(?:<([^>;]+)>)?\(\);")

# Statements that may go, and why they are there all the same.
WAITED_FOR = "what was asked for has been waited for by then; the statement says so, and costs nothing"
UNSEEN = "what it prevents takes another block or stream at the same time, which the emulated grid does not have"
HARMLESS = {
    "conv_pool.cuh: cp_async_wait before add_over_warps": WAITED_FOR,
    "conv_pool.cuh: cp_async_wait before float": WAITED_FOR,
    "fused_mlp.cuh: cp_async_wait before Activations (2)": WAITED_FOR,
    "fused_mlp.cuh: cp_async_wait before template": "no thread ends with a copy on its way",
    "pack.cuh: block_barrier before threadIdx": "a block votes once; the barrier is for whoever calls it twice",
    "pack.cuh: block_barrier before threadIdx (2)": UNSEEN,  # a stamp before the elements it speaks of
}


def next_word(text: str, position: int) -> str:
    """The first name behind `position` that is no synchronisation: where in the kernel this is."""
    rest = SYNCHRONISATION.sub("", re.sub(r"//[^\n]*", "", text[position:]))
    words = (word for word in re.findall(r"[A-Za-z_]\w+", rest) if word not in ("if", "else", "for", "const", "pragma"))
    return next(words, "the end")


def plant() -> tuple[dict[str, str], dict[str, int], dict[str, str]]:
    """The kernels' files with every fault behind its number; the numbers, and the file of each fault."""
    texts = {path.name: path.read_text() for path in KERNELS.iterdir() if path.suffix in (".cuh", ".h")}
    numbers: dict[str, int] = {}
    places: dict[str, str] = {}

    def number(name: str, file: str) -> int:
        assert name not in numbers, f"two faults are called {name!r}"
        places[name] = file
        return numbers.setdefault(name, len(numbers) + 1)

    for name, fault in FAULTS.items():
        count = texts[fault.file].count(fault.right)
        assert count == 1, f"{fault.file} says {fault.right!r} {count} times: the fault must change as the kernel did"
        meant = f"static_cast<int>(fault == {number(name, fault.file)})"
        texts[fault.file] = texts[fault.file].replace(fault.right, re.sub(r"\bfaulty\b", meant, fault.wrong))
    for file in FILES:
        text = texts[file]

        def replace(match: re.Match[str], file: str = file, text: str = text) -> str:
            what, groups = match[1], match[2]
            place = f"{file}: {what} before {next_word(text, match.end())}"
            same = sum(re.sub(r" \(\d+\)$", "", name) == place for name in numbers)
            place += f" ({same + 1})" if same else ""
            missing = number(place, file)
            if groups is None:
                return f"if (fault != {missing}) {match[0]}"
            short = number(f"{place}, too short", file)
            shorter = f"cp_async_wait<{groups} + 1>();"
            return f"{{ if (fault == {short}) {shorter} else if (fault != {missing}) {match[0]} }}"

        texts[file] = SYNCHRONISATION.sub(replace, text)
    return texts, numbers, places


# The problems --------------------------------------------------------------------------------------------------------


class Kernels(conv.Kernels):
    """The library of the copy, as the helpers of both families' tests want it."""

    CHAINS = (
        *("tiny_mlp_f16__ffma_2", "fused_mlp_f16__mma_registers_64", "fused_mlp_tf32__mma_registers_64"),
        *("fused_mlp_f16__mma_shared_128", "skinny_linear_f16__mma_8", "skinny_linear_f32__ffma_2"),
    )

    def __init__(self) -> None:
        texts, self.numbers, self.places = plant()
        inputs = [HARNESS.read_text(), *(path.read_text() for path in with_includes(HARNESS)), *texts.values()]
        digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
        folder = BUILD / f"faulty-{digest}"
        (folder / "kernels/cuda").mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / "kernels/cuda" / name).write_text(text)
        flags = ["-O1" if flag == "-O3" else flag for flag in FLAGS]
        command = (compiler(), f"-I{folder}", *flags, "-shared", str(HARNESS), str(KERNELS / "names.cpp"), "-o")
        self.library = ctypes.CDLL(str(make(BUILD / f"faulty-{digest}.so", *command)))
        for name in ("fastseq_conv_rows", "fastseq_conv_launch", "fastseq_conv_pack"):
            getattr(self.library, name).restype = ctypes.c_char_p
        for name in ("fastseq_linear_launch", "fastseq_linear_launch_registers"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.tables = conv.json.loads(self.library.fastseq_conv_rows())

    def launch(self, name: str, args: linear.ChainArgs) -> None:
        error = self.library.fastseq_linear_launch(self.CHAINS.index(name), ctypes.byref(args))
        assert error is None, error.decode()


def check_conv(math: str, tile: str, route: str, problem: Problem) -> Callable[[Kernels], None]:
    return lambda kernels: conv.check_integers(kernels, (math, tile, route), problem)


def check_chain(
    name: str,
    widths: tuple[int, ...],
    rows: int,
    blocks: int | None = None,
    infinite: bool = False,
    finished: bool = False,
) -> Callable[[Kernels], None]:
    """blocks: so few that each does several tiles; finished: by BatchNorms and activations."""
    math = next(part for part in name.split("_") if part in linear.MATHS)

    def check(kernels: Kernels) -> None:
        chain = linear.integer_chain(widths, rows, math, seed=3, shift=len(widths) % 2, gap=3)
        if infinite:
            for weight, _, _ in chain.layers:
                weight.fill_(1)
            chain.x[1, 2] = torch.inf
        if finished:
            epilogues = [linear.Epilogue.make(n, *linear.FINISHED[i]) for i, n in enumerate(widths[1:])]
            chain = linear.replace(chain, epilogues=tuple(epilogues), kept=[])
        expected = linear.exact_reference(chain, math)
        if blocks is None:
            assert torch.equal(chain.run(kernels, name), expected)  # type: ignore[arg-type]
            return
        args, dst = chain.args()
        number = linear.MATHS.index(math)
        error = kernels.library.fastseq_linear_launch_registers(number, ctypes.byref(args), blocks)
        assert error is None and dst.is_poisoned_elsewhere() and torch.equal(dst.view, expected)

    return check


def check_pack(kernels: Kernels) -> None:
    """A copy that differs in one element, which one of 256 threads sees, and one that was never made."""
    count = 5000
    src = torch.arange(count, dtype=torch.int32)
    for wrong in ([4321], [0], list(range(count))):
        dst = src.clone()
        dst[wrong] = -1
        stamps = torch.full((3,), 7 if len(wrong) < count else 0, dtype=torch.int64)
        job = conv.PackJob(src.data_ptr(), dst.data_ptr(), stamps.data_ptr(), 7, (1, 1, 1, count), count, (0, 0, 0, 1))
        args = conv.PackArgs(count=1, element_bytes=4)
        args.jobs[0] = job
        kernels.pack(args)
        assert torch.equal(dst, src) and (stamps == 7).all()


PIXELS = {"size": (9, 7), "kernel": (3, 3), "c_out": 33}


def check_infinity(kernels: Kernels) -> None:
    """Channels behind the last one stay zero where an infinity meets the zeros of weights that do not exist."""
    row, problem = ("f16", "128x32", "vector"), Problem(c_in=64, zeros=2, dst="nhwc", **PIXELS)
    values = conv.make_values(problem, torch.float16, conv.integers)
    values.src[0, 5, 3, 3] = torch.inf
    conv.run(kernels, row, problem, values)


CONVS = {
    ("f16", "128x32", "vector"): (
        Problem(batch=3, c_in=64, zeros=2, dst="nhwc", **PIXELS),
        Problem(c_in=64, size=(8, 9), c_out=7, pool=REGISTERS, has_relu=False),
        Problem(c_in=64, size=(12, 11), c_out=33, pool=Pool((3, 3), (2, 2), tile=(4, 4)), dst="nhwc", zeros=1),
        Problem(c_in=64, has_norm=True, kind="prelu", **PIXELS),
    ),
    ("f16", "32x32", "gather"): (
        Problem(batch=2, c_in=40, dst="cropped", **PIXELS),
        Problem(batch=5, c_in=3, size=(5, 5), c_out=6, kernel=(3, 3), padding=NO_PADDING, dst="nhwc"),
        Problem(c_in=5, size=(9, 9), c_out=6, pool=Pool((3, 3), (2, 2), tile=(2, 2))),
        Problem(c_in=5, size=(8, 9), c_out=7, pool=REGISTERS, has_norm=True, kind="leaky_relu", is_after_pool=True),
        Problem(c_in=5, size=(9, 9), c_out=6, pool=Pool((3, 3), (2, 2), tile=(2, 2)), kind="hardtanh", dst="nhwc"),
        Problem(batch=1, c_in=150, c_out=40, size=(5, 6), kernel=(3, 3), pool=Pool((2, 2), (1, 1), tile=(3, 3))),
    ),
    ("tf32", "32x32", "vector"): (Problem(batch=2, c_in=44, **PIXELS), Problem(c_in=8, pool=REGISTERS, size=(6, 6))),
}
RING = (64, 64, 60, 50, 64, 33)
PROBLEMS: dict[str, list[Callable[[Kernels], None]]] = {
    "conv_pool.cuh": [
        *(check_conv(*row, problem) for row, problems in CONVS.items() for problem in problems),
        check_infinity,
    ],
    "tiny_mlp.cuh": [
        check_chain("tiny_mlp_f16__ffma_2", (37, 64, 33, 10), 5),
        check_chain("tiny_mlp_f16__ffma_2", (300, 70, 300, 5, 40), 3),
        check_chain("tiny_mlp_f16__ffma_2", (37, 300, 33, 40), 5, finished=True),
    ],
    "fused_mlp.cuh": [
        *(check_chain(f"fused_mlp_{math}__mma_registers_64", RING, 300, blocks=2) for math in ("f16", "tf32")),
        *(check_chain(f"fused_mlp_{math}__mma_registers_64", (40, 24), 300, blocks=2) for math in ("f16", "tf32")),
        *(check_chain(f"fused_mlp_{math}__mma_registers_64", (5, 7, 3), 4, infinite=True) for math in ("f16", "tf32")),
        check_chain("fused_mlp_f16__mma_shared_128", (70, 128, 65, 90), 37),
        check_chain("fused_mlp_f16__mma_shared_128", (128, 30), 33),
    ],
    "skinny_linear.cuh": [
        check_chain("skinny_linear_f16__mma_8", (1030, 21), 19),
        check_chain("skinny_linear_f32__ffma_2", (1030, 9), 5),
        check_chain("skinny_linear_f32__ffma_2", (1030, 9), 5, finished=True),
    ],
    "pack.cuh": [check_pack],
}
PROBLEMS["finish.cuh"] = [
    check_conv("f16", "32x32", "gather", Problem(c_in=3, c_out=33, size=(7, 7), has_norm=True, kind="prelu"))
]
PROBLEMS["chain.cuh"] = PROBLEMS["fused_mlp.cuh"]


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    torch.set_num_threads(1)
    yield Kernels()


def check_all(kernels: Kernels, file: str) -> None:
    for seed in SEEDS:
        for check in PROBLEMS[file]:
            kernels.seed(seed)
            torch.manual_seed(seed)
            check(kernels)


def is_caught(kernels: Kernels, fault: str) -> bool:
    """In a process of its own: offsets made of poison may end it, which would be noticed, too."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        kernels.library.fastseq_plant(kernels.numbers[fault])
        try:
            check_all(kernels, kernels.places[fault])
        except AssertionError:
            os._exit(1)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) < 2, f"{fault}: the test itself fails"
    return status != 0


@pytest.mark.parametrize("file", PROBLEMS)
def test_without_a_fault_all_is_right(kernels: Kernels, file: str) -> None:
    check_all(kernels, file)


def test_every_fault_is_caught(kernels: Kernels) -> None:
    missed = [fault for fault in kernels.numbers if not is_caught(kernels, fault)]
    assert [fault for fault in missed if fault.removesuffix(", too short") not in HARMLESS] == []
    assert HARMLESS.keys() <= set(missed), "caught after all: HARMLESS is out of date"
