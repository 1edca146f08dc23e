"""The CUDA kernels for chains of Linear layers on the emulated grid: every row of their tables, against torch.

All memory is poisoned with NaNs around and between the rows of a tensor, and must still be after a launch.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from emulation.build import compile_emulated
from emulation.finish import ACTIVATIONS, Epilogue, Finish
from torch import Tensor

FILES = (
    *("tiny_mlp", "tiny_mlp_f32", "tiny_mlp_f16", "tiny_mlp_bf16"),
    *("fused_mlp", "fused_mlp_f32", "fused_mlp_tf32", "fused_mlp_f16", "fused_mlp_bf16"),
    "skinny_linear",
)
SOURCES = ("tests/emulation/linear_harness.cpp", *(f"csrc/kernels/cuda/{name}.cu" for name in FILES))

# The kinds of arithmetic, in the order of kernels.h.
MATHS = ("f32", "tf32", "f16", "bf16")
DTYPES = {"f32": torch.float32, "tf32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Of the norm of a result: about what eager's arithmetic costs in a chain of a few layers.
TOLERANCES = {"f32": 1e-6, "tf32": 1.5e-3, "f16": 2e-3, "bf16": 1.2e-2}
OPS = ("tiny_mlp", "fused_mlp", "skinny_linear")

NAMES = (
    *(f"tiny_mlp_{math}__ffma_{rows}" for math in ("f32", "f16", "bf16") for rows in (1, 2, 4, 8)),
    *(f"fused_mlp_f32__ffma_shared_{width}" for width in (64, 128, 256, 512)),
    *(f"fused_mlp_tf32__mma_{how}" for how in ("registers_64", "registers_128", "shared_256", "shared_512")),
    *(
        f"fused_mlp_{math}__mma_{how}"
        for math in ("f16", "bf16")
        for how in ("registers_64", "registers_128", "registers_256", "shared_512")
    ),
    *(f"skinny_linear_f32__ffma_{rows}" for rows in (1, 2, 4, 8, 16)),
    *(f"skinny_linear_{math}__mma_{rows}" for math in ("f16", "bf16") for rows in (8, 16)),
)
each_kernel = pytest.mark.parametrize("name", NAMES)

POISON = {4: 0x7FDEADBE, 2: 0x7FBE}  # NaNs that nothing computes
BITS = {4: torch.int32, 2: torch.int16}
GUARD = 64  # poisoned elements on either side; keeps the alignment

# Widths of layers, input first.
CHAINS = (
    (1, 1),
    (3, 10),
    (10, 3, 1),
    (31, 33, 31),
    (64, 64, 64, 10),
    (128, 64, 10),
    (33, 128, 31, 100),
    (100, 250, 3),
    (250, 31, 250),
    (260, 300, 1),
)
LAYERS = (
    (1, 1),
    (3, 10),
    (10, 33),
    (31, 5),
    (64, 16),
    (100, 17),
    (250, 31),
    (520, 20),
    (1030, 9),
    (4100, 3),
    (24, 1025),
)
ROWS = (1, 2, 3, 5, 17, 33, 65)


class Layer(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
        ("has_relu", ctypes.c_int),
        ("finish", Finish),
    ]


class ChainArgs(ctypes.Structure):
    _fields_ = [
        ("src", ctypes.c_void_p),
        ("dst", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("src_row_stride", ctypes.c_int64),
        ("dst_row_stride", ctypes.c_int64),
        ("count", ctypes.c_int),
        ("layers", Layer * 8),
    ]


class Kernels:
    """The library and its table."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(compile_emulated(SOURCES, "linear_kernels")))
        for name in ("fastseq_linear_rows", "fastseq_linear_launch", "fastseq_linear_launch_registers"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.library.fastseq_linear_shared_bytes.restype = ctypes.c_int64
        self.table = json.loads(self.library.fastseq_linear_rows())
        self.index = {row["name"]: i for i, row in enumerate(self.table)}

    def seed(self, seed: int) -> None:
        self.library.fastseq_linear_seed(ctypes.c_uint64(seed))

    def math(self, name: str) -> str:
        return MATHS[self.table[self.index[name]]["math"]]

    def shared_bytes(self, name: str, args: ChainArgs) -> int:
        return int(self.library.fastseq_linear_shared_bytes(self.index[name], ctypes.byref(args)))

    def launch(self, name: str, args: ChainArgs) -> None:
        error = self.library.fastseq_linear_launch(self.index[name], ctypes.byref(args))
        assert error is None, f"{name}: {error.decode()}"

    def launch_registers(self, math: str, args: ChainArgs, blocks: int) -> bool:
        is_resident = ctypes.c_bool()
        error = self.library.fastseq_linear_launch_registers(
            MATHS.index(math), ctypes.byref(args), blocks, ctypes.byref(is_resident)
        )
        assert error is None, error.decode()
        return is_resident.value


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# Tensors ------------------------------------------------------------------------------------------------------------


@dataclass
class Placed:
    """A matrix in poisoned memory: `shift` elements behind a multiple of 64 bytes, rows `gap` elements apart."""

    memory: Tensor
    view: Tensor

    @staticmethod
    def empty(rows: int, width: int, dtype: torch.dtype, shift: int = 0, gap: int = 0) -> Placed:
        count = 2 * GUARD + shift + rows * (width + gap) + 64
        memory = torch.empty(count, dtype=dtype)
        memory.view(BITS[memory.element_size()]).fill_(POISON[memory.element_size()])
        first = -memory.data_ptr() % 64 // memory.element_size() + GUARD + shift
        return Placed(memory, memory.as_strided((rows, width), (width + gap, 1), first))

    @staticmethod
    def of(values: Tensor, shift: int = 0, gap: int = 0) -> Placed:
        placed = Placed.empty(*values.shape, values.dtype, shift, gap)
        placed.view.copy_(values)
        return placed

    def is_poisoned_elsewhere(self) -> bool:
        bits = self.memory.view(BITS[self.memory.element_size()]).clone()
        outside = torch.ones_like(bits, dtype=torch.bool)
        outside.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(False)
        return bool((bits[outside] == POISON[self.memory.element_size()]).all())

    def has_no_poison(self) -> bool:
        size = self.memory.element_size()
        bits = self.memory.view(BITS[size]).as_strided(self.view.shape, self.view.stride(), self.view.storage_offset())
        return not bool((bits == POISON[size]).any())


@dataclass(frozen=True)
class Chain:
    """x (rows, k) and, for each layer, weight (n, k), bias (n,) or None, and whether a ReLU follows."""

    x: Tensor
    layers: tuple[tuple[Tensor, Tensor | None, bool], ...]
    shift: int = 0  # of all tensors, in elements
    gap: int = 0  # between rows of x and of the result
    kept: list[Placed] = field(default_factory=list)
    epilogues: tuple[Epilogue | None, ...] = ()  # of the layers, instead of ReLU

    def args(self) -> tuple[ChainArgs, Placed]:
        src = Placed.of(self.x, self.shift, self.gap)
        dst = Placed.empty(len(self.x), len(self.layers[-1][0]), self.x.dtype, self.shift, self.gap)
        self.kept[:] = [src]
        args = ChainArgs(src.view.data_ptr(), dst.view.data_ptr(), len(self.x), src.view.stride(0), dst.view.stride(0))
        args.count = len(self.layers)
        for i, (weight, bias, has_relu) in enumerate(self.layers):
            placed = [Placed.of(weight, self.shift)]
            if bias is not None:
                placed.append(Placed.of(bias[None], self.shift))
            self.kept.extend(placed)
            pointers = [tensor.view.data_ptr() for tensor in placed] + [None]
            args.layers[i] = Layer(pointers[0], pointers[1], *weight.shape, has_relu)
            if epilogue := self.epilogue(i):
                args.layers[i].has_relu = 0
                args.layers[i].finish = epilogue.struct(self.place)
        return args, dst

    def epilogue(self, layer: int) -> Epilogue | None:
        return self.epilogues[layer] if self.epilogues else None

    def place(self, values: Tensor) -> int:
        self.kept.append(Placed.of(values.to(self.x.dtype)[None], self.shift))
        return self.kept[-1].view.data_ptr()

    def run(self, kernels: Kernels, name: str) -> Tensor:
        args, dst = self.args()
        kernels.launch(name, args)
        assert dst.is_poisoned_elsewhere()
        assert dst.has_no_poison()
        return dst.view.clone()


def to_tf32(x: Tensor) -> Tensor:
    """As cvt.rna rounds: to 10 bits of fraction, ties away from zero."""
    rounded = (x.float().contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded.to(x.dtype), x)


def reference(
    chain: Chain, rounds: Callable[[Tensor], Tensor], loads: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """In float64. `loads`: what becomes of factors, `rounds`: of a layer's result."""
    x = chain.x.double()
    for i, (weight, bias, has_relu) in enumerate(chain.layers):
        # Not a matrix product: libraries may skip products with zero, which are NaN for infinities.
        x = torch.stack([(row * loads(weight.double())).sum(1) for row in loads(x)])
        if bias is not None:
            x = x + bias.double()
        if epilogue := chain.epilogue(i):
            x = epilogue.activate(epilogue.norm(x))
        elif has_relu:
            x = x.relu()
        x = rounds(x).double()
    return x


def random_chain(
    widths: Sequence[int], rows: int, math: str, seed: int, has_bias: bool = True, **placing: int
) -> Chain:
    """Normal values; results of layers stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[math]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    layers = [
        ((normal(n, k) * (2 / k) ** 0.5).to(dtype), normal(n).to(dtype) if has_bias else None, i + 2 < len(widths))
        for i, (k, n) in enumerate(itertools.pairwise(widths))
    ]
    return Chain(normal(rows, widths[0]).to(dtype), tuple(layers), **placing)


def integer_chain(
    widths: Sequence[int], rows: int, math: str, seed: int, specials: int = 0, has_bias: bool = True, **placing: int
) -> Chain:
    """Small integers, whose sums are exact in any order; in a third of the tensors `specials` of each special value.

    Long chains have few weights that are not zero, so that their sums stay small.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[math]

    def integers(most: int, *shape: int) -> Tensor:
        values = torch.randint(-most, most + 1, shape, generator=generator).to(dtype)
        for value in (torch.nan, torch.inf, -torch.inf, -0.0)[: specials * 4]:
            for _ in range(specials):
                at = int(torch.randint(values.numel() * 3, (1,), generator=generator))
                if at < values.numel():  # in a third of the tensors
                    values.view(-1)[at] = value
        return values

    def weights(n: int, k: int) -> Tensor:
        values = integers(1, n, k)
        if len(widths) > 4:
            values[torch.rand(n, k, generator=generator) > 12 / k] = 0
        return values

    layers = [
        (weights(n, k), integers(3, n) if has_bias else None, bool((seed + i) % 3 or i + 2 < len(widths)))
        for i, (k, n) in enumerate(itertools.pairwise(widths))
    ]
    return Chain(integers(2, rows, widths[0]), tuple(layers), **placing)


def exact_reference(chain: Chain, math: str) -> Tensor:
    return reference(chain, lambda x: x.to(DTYPES[math]), to_tf32 if math == "tf32" else lambda x: x).to(DTYPES[math])


def cases(name: str, kernels: Kernels) -> list[tuple[tuple[int, ...], int]]:
    """Widths and numbers of rows that this kernel takes: every chain, every number of rows, not all of both."""
    row = kernels.table[kernels.index[name]]
    if OPS[row["op"]] == "skinny_linear":
        chains: Sequence[tuple[int, ...]] = LAYERS
    else:
        chains = [chain for chain in CHAINS if row["max_width"] == 0 or max(chain) <= row["max_width"]]
    rows = [count for count in ROWS if count <= 33 or row["tile_rows"] >= 4]
    return [(chain, rows[(i + j) % len(rows)]) for i, chain in enumerate(chains) for j in (0, 3)]


# Tests --------------------------------------------------------------------------------------------------------------


def test_structs_are_as_in_kernels_h(kernels: Kernels) -> None:
    layout = (ctypes.c_int64 * 4)()
    kernels.library.fastseq_linear_layout(layout)
    expected = [ctypes.sizeof(Layer), Layer.finish.offset, ctypes.sizeof(ChainArgs), ChainArgs.layers.offset]
    assert list(layout) == expected


def test_every_row_is_tested(kernels: Kernels) -> None:
    assert [row["name"] for row in kernels.table] == list(NAMES)
    for row in kernels.table:
        assert row["name"].startswith(f"{OPS[row['op']]}_{MATHS[row['math']]}__")
        assert row["min_arch"] == (80 if MATHS[row["math"]] in ("tf32", "bf16") else 75)


@each_kernel
def test_integers_are_exact(kernels: Kernels, name: str) -> None:
    math = kernels.math(name)
    for i, (widths, rows) in enumerate(cases(name, kernels)):
        kernels.seed(i)
        placing = {"shift": (0, 1, 8, 2)[i % 4], "gap": (0, 8, 3, 2, 16)[i % 5]}
        chain = integer_chain(widths, rows, math, seed=i, has_bias=i % 3 != 1, **placing)
        result = chain.run(kernels, name)
        assert torch.equal(result, exact_reference(chain, math)), f"{widths}, {rows} rows, {placing}"


# Of the layers of a chain, in turns; what they give stays small, and exact.
FINISHED = (
    ("hardtanh", True),
    ("prelu", False),
    ("relu", True),
    ("leaky_relu", True),
    ("hardtanh", False),
    ("none", True),
)


@pytest.mark.parametrize("name", [name for name in NAMES if "fused" not in name])
def test_finished_layers_are_exact(kernels: Kernels, name: str) -> None:
    """BatchNorms and activations whose arithmetic is exact, behind each layer, behind all but the last, and in a chain
    with ReLU."""
    math = kernels.math(name)
    for i, (widths, rows) in enumerate(cases(name, kernels)):
        kernels.seed(i)
        chain = integer_chain(
            widths, rows, math, seed=i, has_bias=i % 3 != 1, specials=i % 4 == 3, shift=(0, 1, 8)[i % 3]
        )
        epilogues = [
            Epilogue.make(n, *FINISHED[(i + j) % len(FINISHED)], is_affine=(i + j) % 5 != 2, seed=j)
            for j, n in enumerate(widths[1:])
        ]
        used = [e if i % 3 != (2 if j + 2 == len(widths) else 1) or i % 2 else None for j, e in enumerate(epilogues)]
        chain = replace(chain, epilogues=tuple(used if any(used) else epilogues), kept=[])
        result, expected = chain.run(kernels, name), exact_reference(chain, math)
        assert torch.equal(result.isnan(), expected.isnan()), f"{widths}, {rows} rows"
        assert torch.equal(result.nan_to_num(7.0), expected.nan_to_num(7.0)), f"{widths}, {rows} rows, {used}"


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kernels: Kernels, kind: str) -> None:
    """The code is test_cuda_conv_values.py's; here, that each kernel gets there."""
    for name in (
        "tiny_mlp_f16__ffma_4",
        "tiny_mlp_f32__ffma_2",
        "skinny_linear_f32__ffma_4",
        "skinny_linear_bf16__mma_8",
    ):
        math = kernels.math(name)
        chain = random_chain((70, 40), 5, math, seed=3)
        chain = replace(chain, epilogues=(Epilogue.make(40, kind),), kept=[])
        expected = reference(chain, lambda x: x)
        result = chain.run(kernels, name).double()
        assert (result - expected).norm() / expected.norm() < TOLERANCES[math], name


@each_kernel
def test_special_values_are_as_in_torch(kernels: Kernels, name: str) -> None:
    math = kernels.math(name)
    for i, (widths, rows) in enumerate(cases(name, kernels)[1::3]):
        kernels.seed(i)
        chain = integer_chain(widths, rows, math, seed=100 + i, specials=1, shift=i % 2)
        result, expected = chain.run(kernels, name), exact_reference(chain, math)
        assert torch.equal(result.isnan(), expected.isnan()), f"{widths}, {rows} rows"
        assert torch.equal(result.nan_to_num(7.0), expected.nan_to_num(7.0)), f"{widths}, {rows} rows"
        if chain.layers[-1][2]:
            assert not result[~result.isnan()].signbit().any(), "ReLU gives +0"


@pytest.mark.parametrize("name", [name for name in NAMES if "skinny" not in name])
def test_infinities_meet_no_padding(kernels: Kernels, name: str) -> None:
    """An infinity times the zeros that pad a layer would be NaN, and then all of the next layer's sums too."""
    math = kernels.math(name)
    for widths in [(5, 7, 3), (33, 50, 9, 2)]:
        chain = integer_chain(widths, 4, math, seed=4)
        for weight, _, _ in chain.layers:
            weight.fill_(1)
        chain.layers[0][0][::2] = -1
        chain.x[1, 2], chain.x[2, 0] = torch.inf, -torch.inf
        result, expected = chain.run(kernels, name), exact_reference(chain, math)
        assert expected[1:3].isinf().all() and expected.isfinite().any() and torch.equal(result, expected)


@each_kernel
def test_error(kernels: Kernels, name: str) -> None:
    math = kernels.math(name)
    for i, (widths, rows) in enumerate(cases(name, kernels)[::4]):
        kernels.seed(i + 1)
        chain = random_chain(widths, rows, math, seed=i, has_bias=i % 2 == 0)
        expected = reference(chain, lambda x: x)
        error = (chain.run(kernels, name).double() - expected).norm() / expected.norm()
        assert error < TOLERANCES[math], f"{widths}, {rows} rows"


@each_kernel
def test_rows_do_not_depend_on_others_alignment_or_order(kernels: Kernels, name: str) -> None:
    math, row = kernels.math(name), kernels.table[kernels.index[name]]
    widths = {"tiny_mlp": (96, 72, 17), "fused_mlp": (48, 64, 40, 24), "skinny_linear": (1504, 9)}[OPS[row["op"]]]
    whole = random_chain(widths, 19, math, seed=5)
    kernels.seed(0)
    expected = whole.run(kernels, name)
    for i, (first, last) in enumerate([(0, 19), (0, 1), (18, 19), (7, 10)]):
        for shift, gap in [(0, 0), (1, 0), (2, 5), (8, 8)][i % 2 :: 2]:
            kernels.seed(shift + 2)
            part = replace(whole, x=whole.x[first:last], shift=shift, gap=gap, kept=[])
            assert torch.equal(part.run(kernels, name), expected[first:last]), f"rows {first} to {last}, {shift}, {gap}"


@pytest.mark.parametrize(
    "start", ["tiny_mlp_f32", "tiny_mlp_f16", "tiny_mlp_bf16", "skinny_linear_f32", "skinny_linear_bf16"]
)
def test_variants_give_the_same_bits(kernels: Kernels, start: str) -> None:
    """So what a row gives does not depend on how many rows there are, while the planner stays in the family."""
    names = [name for name in NAMES if name.startswith(start)]
    widths = (1100, 40) if "skinny" in start else (300, 77, 12)
    chain = random_chain(widths, 5, kernels.math(names[0]), seed=1)
    results = [chain.run(kernels, name) for name in names]
    assert len(results) > 1 and all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("math", ["f16", "bf16", "tf32"])
def test_many_rows(kernels: Kernels, math: str) -> None:
    """Large tiles instead of small ones: the same bits."""
    name = f"fused_mlp_{math}__mma_registers_64"
    chain = random_chain((8, 9, 3), 20000, math, seed=2)
    result = chain.run(kernels, name)
    few = replace(chain, x=chain.x[-100:], kept=[])
    assert torch.equal(few.run(kernels, name), result[-100:])
    few = replace(chain, x=chain.x[:100], kept=[])
    assert torch.equal(few.run(kernels, name), result[:100])


@pytest.mark.parametrize("math", ["f16", "bf16", "tf32"])
@pytest.mark.parametrize("widths", [(24, 40), (100, 128, 128, 120, 128, 97, 65), (128, 5, 128, 128, 128, 128, 128)])
def test_tiles_of_a_block(kernels: Kernels, math: str, widths: tuple[int, ...]) -> None:
    """In registers: a block with several tiles reads the next rows ahead, and weights stay or come round again."""
    results = []
    for seed in range(3):
        kernels.seed(seed)
        chain = integer_chain(widths, 250, math, seed=3, shift=seed % 2)
        args, dst = chain.args()
        is_resident = kernels.launch_registers(math, args, blocks=2)
        assert is_resident == (len(widths) == 2)
        assert dst.is_poisoned_elsewhere()
        results.append(dst.view.clone())
    assert all(torch.equal(result, exact_reference(chain, math)) for result in results)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("tiny")])
def test_sums_are_accurate(kernels: Kernels, name: str) -> None:
    """The longest sums that each takes: no worse than eager by more than a few times."""
    math, row = kernels.math(name), kernels.table[kernels.index[name]]
    chain = random_chain((row["max_width"] or 4096, 24), 4, math, seed=9, has_bias=False)
    weight = chain.layers[0][0]
    factors = (to_tf32(chain.x.double()), to_tf32(weight.double())) if math == "tf32" else (chain.x, weight)
    expected = factors[0].double() @ factors[1].double().T
    eager = (factors[0].to(DTYPES[math]) @ factors[1].to(DTYPES[math]).T).double()
    error = (chain.run(kernels, name).double() - expected).norm() / expected.norm()
    assert error <= max(4 * (eager - expected).norm() / expected.norm(), 5e-7)


@pytest.mark.parametrize("name", [name for name in NAMES if "fused" in name])
def test_shared_memory(kernels: Kernels, name: str) -> None:
    """What kernels.h promises of shared_bytes, for the widest chain that a kernel takes and for one that is wider."""
    width = kernels.table[kernels.index[name]]["max_width"]
    chain: Any = ChainArgs(None, None, 1 << 20, width, width)
    for count in (1, 8):
        chain.count = count
        for i in range(count):
            chain.layers[i] = Layer(None, None, width, width, 1)
        assert 0 < kernels.shared_bytes(name, chain) <= 227 << 10
        if width <= 128:
            assert kernels.shared_bytes(name, chain) <= 99 << 10
    chain.layers[0].n += 1
    assert kernels.shared_bytes(name, chain) > 227 << 10


def test_a_chain_is_not_for_skinny_linear(kernels: Kernels) -> None:
    args, _ = random_chain((8, 8, 8), 1, "f32", seed=0).args()
    assert kernels.shared_bytes("skinny_linear_f32__ffma_1", args) > 227 << 10


def test_random_chains(kernels: Kernels) -> None:
    """Whatever the cases above do not think of."""
    chooser = random.Random(1)
    for seed in range(60):
        row = chooser.choice(kernels.table)
        is_single = OPS[row["op"]] == "skinny_linear"
        most = min(row["max_width"] or 160, 160)
        widths = [chooser.randint(1, most) for _ in range(2 if is_single else chooser.randint(2, 6))]
        chain = integer_chain(
            widths,
            chooser.randint(1, 40),
            MATHS[row["math"]],
            seed,
            specials=chooser.randint(0, 1),
            has_bias=chooser.random() < 0.7,
            shift=chooser.randint(0, 9),
            gap=chooser.randint(0, 9),
        )
        kernels.seed(seed)
        result, expected = chain.run(kernels, row["name"]), exact_reference(chain, MATHS[row["math"]])
        assert torch.equal(result.nan_to_num(7.0), expected.nan_to_num(7.0)), f"{row['name']}: {widths}, seed {seed}"
