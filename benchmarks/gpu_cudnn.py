"""Asks cuDNN, by its backend interface, whether it has an engine that pools behind a convolution. Nothing is timed.

torch's own libcudnn is asked through ctypes: the Python frontend has no operation for pooling. Names and numbers are
those of cudnn_graph.h of cuDNN 9.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from typing import Any

from gpu_jobs import text_of

LIBRARIES = ("libcudnn.so.9", "libcudnn_graph.so.9")

# cudnnBackendDescriptorType_t
POINTWISE, CONVOLUTION, ENGINE_CONFIG, HEURISTIC, EXECUTION_PLAN = 0, 1, 3, 4, 5
CONVOLUTION_FORWARD, OPERATION_POINTWISE, OPERATION_GRAPH, TENSOR = 10, 13, 15, 17
RESAMPLE, RESAMPLE_FORWARD = 24, 25

# cudnnBackendAttributeType_t, with the C type of an element
HANDLE, DATA_TYPE, BOOLEAN, INT64, FLOAT, DOUBLE = 0, 1, 2, 3, 4, 5
CONVOLUTION_MODE, HEURISTIC_MODE, POINTWISE_MODE, DESCRIPTOR = 7, 8, 14, 15
RESAMPLE_MODE, PADDING_MODE, FRACTION = 21, 22, 26


class Fraction(ctypes.Structure):
    _fields_ = [("numerator", ctypes.c_int64), ("denominator", ctypes.c_int64)]


ELEMENTS: dict[int, Any] = {
    **dict.fromkeys((HANDLE, DESCRIPTOR), ctypes.c_void_p),
    **dict.fromkeys((DATA_TYPE, CONVOLUTION_MODE, HEURISTIC_MODE, POINTWISE_MODE), ctypes.c_int),
    **dict.fromkeys((RESAMPLE_MODE, PADDING_MODE), ctypes.c_int),
    BOOLEAN: ctypes.c_bool,
    INT64: ctypes.c_int64,
    FLOAT: ctypes.c_float,
    DOUBLE: ctypes.c_double,
    FRACTION: Fraction,
}

DATA_FLOAT, DATA_HALF = 0, 2
CROSS_CORRELATION, RELU_FWD, ADD, MAXPOOL, NEG_INF_PAD = 1, 100, 0, 3, 1
HEURISTIC_MODES = {"A": 3, "fallback": 2}
NOT_SUPPORTED = range(3000, 4000)


class CudnnError(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Cudnn:
    """The few calls of the backend interface that describe a graph and ask for plans."""

    def __init__(self, library: str | None = None) -> None:
        errors = []
        for name in (library,) if library else LIBRARIES:
            try:
                self.lib = ctypes.CDLL(name)
                self.lib.cudnnBackendCreateDescriptor  # noqa: B018
                break
            except (OSError, AttributeError) as error:
                errors.append(str(error))
        else:
            raise RuntimeError(f"no libcudnn: {'; '.join(errors)}")
        self.lib.cudnnGetErrorString.restype = ctypes.c_char_p
        self.lib.cudnnGetVersion.restype = ctypes.c_size_t
        self.made: list[int] = []
        self.handle = ctypes.c_void_p()
        self.check(self.lib.cudnnCreate(ctypes.byref(self.handle)), "cudnnCreate")
        self.tensors = 0

    def close(self) -> None:
        for descriptor in reversed(self.made):
            self.lib.cudnnBackendDestroyDescriptor(ctypes.c_void_p(descriptor))
        self.lib.cudnnDestroy(self.handle)

    def check(self, status: int, what: str) -> None:
        if status == 0:
            return
        words = (self.lib.cudnnGetErrorString(status) or b"").decode()
        message = ctypes.create_string_buffer(300)
        with contextlib.suppress(AttributeError):
            self.lib.cudnnGetLastErrorString(message, ctypes.c_size_t(len(message)))
        raise CudnnError(status, f"{what}: {words} {message.value.decode(errors='replace')}".strip())

    def create(self, kind: int) -> int:
        descriptor = ctypes.c_void_p()
        self.check(self.lib.cudnnBackendCreateDescriptor(kind, ctypes.byref(descriptor)), f"create {kind}")
        assert descriptor.value
        self.made.append(descriptor.value)
        return descriptor.value

    def make(self, kind: int, *attributes: tuple[int, int, Any]) -> int:
        """A finalized descriptor. attributes: name, type and one value or several."""
        descriptor = self.create(kind)
        for name, type_, value in attributes:
            values = list(value) if isinstance(value, (list, tuple)) else [value]
            array = (ELEMENTS[type_] * len(values))(*values)
            status = self.lib.cudnnBackendSetAttribute(
                ctypes.c_void_p(descriptor), name, type_, ctypes.c_int64(len(values)), array
            )
            self.check(status, f"attribute {name} of descriptor {kind}")
        self.check(self.lib.cudnnBackendFinalize(ctypes.c_void_p(descriptor)), f"finalize descriptor {kind}")
        return descriptor

    # Tensors and operations. Numbers: CUDNN_ATTR_*.

    def tensor(self, n: int, c: int, h: int, w: int, is_virtual: bool = False) -> int:
        """NHWC, fp16; float between operations."""
        self.tensors += 1
        dtype = DATA_FLOAT if is_virtual else DATA_HALF
        strides = [h * w * c, 1, w * c, c]
        attributes = [(906, INT64, self.tensors), (901, DATA_TYPE, dtype), (900, INT64, 16)]
        return self.make(
            TENSOR, *attributes, (902, INT64, [n, c, h, w]), (903, INT64, strides), (907, BOOLEAN, is_virtual)
        )

    def convolution(self, x: int, weight: int, y: int) -> int:
        """3x3, padding 1."""
        described = self.make(
            CONVOLUTION,
            *((106, INT64, 2), (100, DATA_TYPE, DATA_FLOAT), (101, CONVOLUTION_MODE, CROSS_CORRELATION)),
            *((105, INT64, [1, 1]), (104, INT64, [1, 1]), (102, INT64, [1, 1]), (103, INT64, [1, 1])),
        )
        tensors = ((704, DESCRIPTOR, x), (703, DESCRIPTOR, weight), (705, DESCRIPTOR, y))
        scales = ((700, FLOAT, 1.0), (701, FLOAT, 0.0))
        return self.make(CONVOLUTION_FORWARD, (702, DESCRIPTOR, described), *tensors, *scales)

    def pointwise(self, mode: int, x: int, y: int, b: int | None = None) -> int:
        described = self.make(POINTWISE, (0, POINTWISE_MODE, mode), (1, DATA_TYPE, DATA_FLOAT))
        second = [] if b is None else [(752, DESCRIPTOR, b)]
        return self.make(
            OPERATION_POINTWISE, (750, DESCRIPTOR, described), (751, DESCRIPTOR, x), *second, (753, DESCRIPTOR, y)
        )

    def max_pool(self, x: int, y: int) -> int:
        """2x2, stride 2."""
        two, none = [Fraction(2, 1)] * 2, [Fraction(0, 1)] * 2
        described = self.make(
            RESAMPLE,
            *((1700, RESAMPLE_MODE, MAXPOOL), (1701, DATA_TYPE, DATA_FLOAT), (1708, PADDING_MODE, NEG_INF_PAD)),
            *((1702, INT64, 2), (1706, FRACTION, two), (1705, FRACTION, two)),
            *((1704, FRACTION, none), (1703, FRACTION, none)),
        )
        scales = ((1713, DOUBLE, 1.0), (1714, DOUBLE, 0.0))
        return self.make(
            RESAMPLE_FORWARD, (1716, DESCRIPTOR, described), (1710, DESCRIPTOR, x), (1711, DESCRIPTOR, y), *scales
        )

    def engine_that_takes(self, operations: Sequence[int]) -> str:
        """ "yes" if a plan can be made for the operations as one graph; otherwise "no: " and why not."""
        why = "no engine is proposed"
        try:
            graph = self.make(OPERATION_GRAPH, (800, HANDLE, self.handle.value), (801, DESCRIPTOR, list(operations)))
        except CudnnError as error:
            if error.status in NOT_SUPPORTED:
                return f"no: {error}"
            raise
        for mode in HEURISTIC_MODES.values():
            try:
                heuristic = self.make(HEURISTIC, (201, DESCRIPTOR, graph), (200, HEURISTIC_MODE, mode))
                configs = self.results(heuristic)
            except CudnnError as error:
                if error.status not in NOT_SUPPORTED:
                    raise
                why = str(error)
                continue
            for config in configs:
                try:
                    self.make(EXECUTION_PLAN, (400, HANDLE, self.handle.value), (401, DESCRIPTOR, config))
                    return "yes"
                except CudnnError as error:
                    why = str(error)
        return f"no: {why}"

    def results(self, heuristic: int) -> list[int]:
        """The engine configurations that a heuristic proposes, best first."""
        count = ctypes.c_int64()
        get, source = self.lib.cudnnBackendGetAttribute, ctypes.c_void_p(heuristic)
        self.check(get(source, 202, DESCRIPTOR, ctypes.c_int64(0), ctypes.byref(count), None), "number of engines")
        if count.value < 1:
            return []
        configs = [self.create(ENGINE_CONFIG) for _ in range(min(count.value, 50))]
        array = (ctypes.c_void_p * len(configs))(*configs)
        status = get(source, 202, DESCRIPTOR, ctypes.c_int64(len(configs)), ctypes.byref(count), array)
        self.check(status, "engines")
        return configs[: count.value]


N, C, SIZE = 8, 64, 32


def probe_pool_fusion(library: str | None = None) -> dict[str, Any]:
    """What cuDNN says to a convolution, to a pool, and to both in one graph, and what follows from that."""
    found: dict[str, Any] = {}
    try:
        cudnn = Cudnn(library)
    except Exception as error:
        return {"answer": f"not asked: {text_of(error)}"}
    try:
        found["cudnn"] = int(cudnn.lib.cudnnGetVersion())

        def image(is_virtual: bool, size: int = SIZE) -> int:
            return cudnn.tensor(N, C, size, size, is_virtual)

        def convolution(y: int) -> list[int]:
            x, weight, bias = image(False), cudnn.tensor(C, C, 3, 3), cudnn.tensor(1, C, 1, 1)
            sums, biased = image(True), image(True)
            multiplied = cudnn.convolution(x, weight, sums)
            return [multiplied, cudnn.pointwise(ADD, sums, biased, bias), cudnn.pointwise(RELU_FWD, biased, y)]

        between = image(True)
        graphs = {
            "convolution, bias, ReLU": lambda: convolution(image(False)),
            "max-pool": lambda: [cudnn.max_pool(image(False), image(False, SIZE // 2))],
            "both": lambda: [*convolution(between), cudnn.max_pool(between, image(False, SIZE // 2))],
        }
        for name, make in graphs.items():
            try:
                found[name] = cudnn.engine_that_takes(make())
            except CudnnError as error:
                found[name] = f"error: {error}"
    except Exception as error:
        found["error"] = text_of(error)
    finally:
        cudnn.close()
    found["answer"] = conclusion(found)
    return found


def conclusion(found: dict[str, Any]) -> str:
    """Only where each half alone is taken does a refusal of both say something about pools behind convolutions."""
    controls = {name: str(found.get(name)) for name in ("convolution, bias, ReLU", "max-pool")}
    both = str(found.get("both"))
    if both == "yes":
        return "cuDNN fuses them"
    failed = [f"{name}: {answer}" for name, answer in controls.items() if answer != "yes"]
    if failed or not both.startswith("no"):
        return f"no answer: {'; '.join(failed) or found.get('error') or both}"
    return f"not fused: {both.removeprefix('no: ')}"
