"""Random cases: layers that fit each other (mostly), inputs that fit them (mostly), and what happens in between.

`make_case` takes its choices from a `Source`; `cases()` is the same for hypothesis.
"""

from __future__ import annotations

from math import gcd, prod
from typing import Any

from hypothesis import strategies as st

from .case import Call, Case, Group, Hook, Input, Layer, Mutation
from .layers import DTYPES, SPECIAL_WEIGHTS, walk
from .mutations import MUTATIONS
from .source import HypothesisSource, Source

Shape = tuple[int, ...]  # without the batch dimension: (C, H, W), (T, F) or (F,)

CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 20, 31, 33, 48, 65)
FEATURES = (1, 2, 3, 5, 7, 8, 10, 13, 16, 17, 31, 33, 64, 65, 100)
LARGE_FEATURES = (130, 257, 600)  # weights that are read or packed in other ways
LARGEST_MAP = 6000
NAMES = ("", "", "", "conv", "relu1", "layer", "0_1", "größe", "weight", "x", "10", "7")
TRANSPOSED = {"ConvTranspose2d"}
LAYOUTS = (
    *("contiguous",) * 8,
    *("channels_last", "permuted", "transposed", "batch_last", "sliced", "cropped", "channel_slice"),
    *("expanded", "offset", "negated", "parameter"),
)
VALUES = (*("normal",) * 10, "special", "special", "nan", "infinite", "zeros", "denormal", "huge")
ISAS = ("", "", "portable", "avx2", "avx512", "avx512_bf16", "amx_bf16", "emulated512", "emulated_amx")
KERNELS = ("8x16", "12x16", "9x48", "7x64", "4x64", "8x32", "6x16", "4x24", "3x32", "8x4", "6x8", "3x16", "8x8", "1x")
OPS = ("conv2d_winograd", "conv2d_winograd", "conv2d_plane", "linear_in_place", "conv2d_f32")
STYLES = ("keyword", "two", "none", "forward", "functional", "vmap", "jvp", "subclass", "disabled")
HOOKS = ("forward", "forward_pre", "forward_kwargs", "always_call", "full_backward", "full_backward_pre")
PADDINGS = ("ReflectionPad2d", "ReplicationPad2d", "CircularPad2d", "ConstantPad2d")
ACTIVATIONS = (
    *("LeakyReLU", "Sigmoid", "Tanh", "GELU", "SiLU", "ELU", "ReLU6", "Hardtanh", "Hardswish", "Softplus", "Mish"),
    *("PReLU", "Softsign", "LogSigmoid", "SELU", "Softshrink", "Scale", "Doubles", "SubReLU", "CELU", "Hardsigmoid"),
)


def cases() -> st.SearchStrategy[Case]:
    return st.composite(lambda draw: make_case(HypothesisSource(draw)))()


def pool_size(size: int, kernel: int, stride: int, padding: int, ceil: bool, dilation: int = 1) -> int:
    span = size + 2 * padding - dilation * (kernel - 1) - 1 + (stride - 1 if ceil else 0)
    out = span // stride + 1
    return out - 1 if ceil and (out - 1) * stride >= size + padding else out


def two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


class Architect:
    """Makes layers one behind the other, and knows the shape between them."""

    def __init__(self, source: Source, shape: Shape) -> None:
        self.source = source
        self.shape = shape
        self.made: list[tuple[Shape, Layer | Group, Shape]] = []
        self.budget = 15

    def key(self) -> int:
        return len(self.made) + 1

    def add(self, kind: str, *args: Any, to: Shape | None = None, **kwargs: Any) -> Layer:
        layer = Layer(kind, args, kwargs, self.key())
        before = self.shape
        if to is not None:
            self.shape = to
        self.made.append((before, layer, self.shape))
        return layer

    def goes_on(self, most: int) -> bool:
        """Whether there is another layer, of at most `most`. A question before each can be taken out with its layer."""
        most = min(most, self.budget)
        return most > 0 and self.source.integer(0, most) > 0

    def group(self, depth: int = 0) -> Group:
        """A Sequential of up to as many layers as the budget has, 4 if it is a nested one."""
        source = self.source
        children: list[tuple[str, Layer | Group]] = []
        before, names = self.shape, source.chance(25)
        while (depth == 0 and not children) or self.goes_on(4 - len(children) if depth else self.budget):
            self.budget -= 1
            name = source.pick(NAMES) if names else ""
            if name in [taken or str(number) for number, (taken, _) in enumerate(children)] or name.isdigit():
                name = f"n{len(children)}_{name}"
            children.append((name, self.child(depth)))
        kind = source.weighted([("Sequential", 36), ("SubSequential", 2), ("NegatingSequential", 2)])
        group = Group(children, kind if depth > 0 or kind == "SubSequential" else "Sequential", 1000 + self.key())
        self.made.append((before, group, self.shape))
        return group

    def child(self, depth: int) -> Layer | Group:
        source = self.source
        if depth < 3 and source.chance(8):
            return self.group(depth + 1)
        if source.chance(8):
            again = [entry for entry in self.made if entry[0] == self.shape]
            if again:
                _, part, self.shape = source.pick(again)
                return part
        return self.layer()

    def layer(self) -> Layer:
        if len(self.shape) == 3:
            return self.image_layer()
        return self.row_layer()

    def image_layer(self) -> Layer:
        source = self.source
        c, h, w = self.shape
        choice = source.weighted(
            [
                ("conv", 34),
                ("relu", 26),
                ("pool", 20),
                ("flatten", 9),
                ("free", 7),
                ("batchnorm", 5),
                ("activation", 6),
                ("average", 6),
                ("norm", 4),
                ("other", 5),
                ("resized", 4),
                ("transposed", 2),
                ("linear", 1),
                ("subclass", 2),
                ("illegal", 1),
            ]
        )
        return getattr(self, f"image_{choice}")(c, h, w)

    def image_conv(self, c: int, h: int, w: int, kind: str = "Conv2d") -> Layer:
        source = self.source
        out = source.pick(CHANNELS if source.chance(30) else CHANNELS[:9])
        kernel = source.pick((1, 3, 2, 3, 5, (1, 3), (3, 2), 4, (2, 1), 7))
        stride = source.pick((1, 1, 1, 2, (2, 1), 3))
        padding = source.pick((0, 1, 0, 2, (1, 0), "same", "valid", (0, 3)))
        dilation = source.pick((2, 3, (1, 2))) if source.chance(8) else 1
        d_h, d_w = two(dilation)
        if padding == "same":
            stride = 1
        pad_h, pad_w = (0, 0) if isinstance(padding, str) else two(padding)
        fits = (99, 99) if padding == "same" else ((h + 2 * pad_h - 1) // d_h + 1, (w + 2 * pad_w - 1) // d_w + 1)
        k_h, k_w = (min(k, most) for k, most in zip(two(kernel), fits, strict=True))
        if (k_h, k_w) != two(kernel):
            kernel = (k_h, k_w)
        s_h, s_w = two(stride)
        if padding == "same":
            out_h, out_w = h, w
        else:
            out_h = (h + 2 * pad_h - d_h * (k_h - 1) - 1) // s_h + 1
            out_w = (w + 2 * pad_w - d_w * (k_w - 1) - 1) // s_w + 1
        if out * out_h * out_w > LARGEST_MAP:
            out = 3
        options: dict[str, Any] = {}
        if stride != 1:
            options["stride"] = stride
        if padding != 0:
            options["padding"] = padding
        if dilation != 1:
            options["dilation"] = dilation
        if source.chance(15):
            # A filter for each channel or several, and other groups.
            out = c * source.pick((1, 1, 2, 3)) if source.chance(50) and c * out_h * out_w * 3 <= LARGEST_MAP else out
            groups = source.pick((c, gcd(c, out), 2))
            if groups > 1 and not c % groups and not out % groups:
                options["groups"] = groups
        if source.chance(20):
            options["bias"] = False
        if (
            source.chance(8)
            and (pad_h < h and pad_w < w)
            and (padding != "same" or max(k_h * d_h, k_w * d_w) <= min(h, w))
        ):
            options["padding_mode"] = source.pick(("reflect", "replicate", "circular"))
        if source.chance(2):
            self.add("LazyConv2d", out, kernel, to=(out, out_h, out_w), **options)
            return self.made[-1][1]  # type: ignore[return-value]
        return self.add(kind, c, out, kernel, to=(out, out_h, out_w), **options)

    def image_relu(self, c: int, h: int, w: int) -> Layer:
        return self.add("ReLU", inplace=True) if self.source.chance(40) else self.add("ReLU")

    def image_pool(self, c: int, h: int, w: int, kind: str = "MaxPool2d") -> Layer:
        source = self.source
        kernel = source.pick((2, 2, 2, 3, (2, 3), 1, (3, 2), 4, 5))
        stride = source.pick((None, None, None, 2, 1, 3, (2, 1)))
        dilation = 2 if source.chance(4) else 1
        k_h, k_w = two(kernel)
        padding = (source.integer(0, k_h // 2), source.integer(0, k_w // 2)) if source.chance(35) else 0
        p_h, p_w = two(padding)
        ceil = source.chance(30)
        # A window of a single element fits everything.
        if dilation * (k_h - 1) + 1 > h + 2 * p_h or dilation * (k_w - 1) + 1 > w + 2 * p_w:
            kernel, padding, dilation, k_h, k_w, p_h, p_w = 1, 0, 1, 1, 1, 0, 0
        s_h, s_w = (k_h, k_w) if stride is None else two(stride)
        to = (c, pool_size(h, k_h, s_h, p_h, ceil, dilation), pool_size(w, k_w, s_w, p_w, ceil, dilation))
        options: dict[str, Any] = {}
        if stride is not None:
            options["stride"] = stride
        if padding != 0:
            options["padding"] = padding
        if dilation != 1:
            options["dilation"] = dilation
        if ceil:
            options["ceil_mode"] = True
        if source.chance(1):
            options["return_indices"] = True
        return self.add(kind, kernel, to=to, **options)

    def image_flatten(self, c: int, h: int, w: int) -> Layer:
        if self.source.chance(6):
            return self.add("Flatten", 2, to=(c, h * w))
        if self.source.chance(10):
            return self.add("Flatten", *self.source.pick(((-3, -1), (1, 3), (-3, 3))), to=(c * h * w,))
        return self.add("Flatten", to=(c * h * w,))

    def image_free(self, *_: int) -> Layer:
        source = self.source
        kind = source.pick(("Dropout", "Identity", "Dropout", "Dropout2d", "AlphaDropout"))
        if kind == "Identity":
            return self.add(kind)
        p = source.pick((0.5, 0.1, 0.0, 1.0))
        return self.add(kind, p, inplace=True) if source.chance(15) else self.add(kind, p)

    def image_batchnorm(self, c: int, *_: int) -> Layer:
        options = {"affine": False} if self.source.chance(10) else {}
        if self.source.chance(10):
            options["track_running_stats"] = False
        return self.add("BatchNorm2d", c, **options)

    def image_activation(self, *_: int) -> Layer:
        return self.add(self.source.pick(ACTIVATIONS))

    def image_average(self, c: int, h: int, w: int) -> Layer:
        kind = self.source.pick(("AdaptiveAvgPool2d", "AvgPool2d", "AdaptiveMaxPool2d"))
        if kind == "AvgPool2d":
            k = min(self.source.pick((2, 2, 3, 4)), h, w)
            padding = self.source.integer(0, k // 2) if self.source.chance(35) else 0
            stride = self.source.pick((k, k, 1, 2))
            ceil = self.source.chance(30)
            options: dict[str, Any] = {"stride": stride} if stride != k else {}
            options |= {"padding": padding} if padding else {}
            options |= {"ceil_mode": True} if ceil else {}
            options |= {"count_include_pad": False} if self.source.chance(30) else {}
            options |= {"divisor_override": self.source.pick((1, 7, -3))} if self.source.chance(15) else {}
            return self.add(kind, k, to=(c, *(pool_size(n, k, stride, padding, ceil, 1) for n in (h, w))), **options)
        out = self.source.pick((1, 2, (3, 2), (None, 2), (5, None), (1, 1)))
        out_h, out_w = two(out)
        return self.add(kind, out, to=(c, h if out_h is None else out_h, w if out_w is None else out_w))

    def image_norm(self, c: int, h: int, w: int) -> Layer:
        kind = self.source.pick(("LayerNorm", "GroupNorm", "InstanceNorm2d", "LocalResponseNorm", "Softmax2d"))
        if kind == "LayerNorm":
            return self.add(kind, (c, h, w))
        if kind == "GroupNorm":
            options: dict[str, Any] = {"affine": False} if self.source.chance(20) else {}
            return self.add(kind, self.source.pick((gcd(c, 4), 1, c)), c, **options)
        if kind == "InstanceNorm2d":
            return self.add(kind, c)
        return self.add(kind, 3) if kind == "LocalResponseNorm" else self.add(kind)

    def image_other(self, c: int, h: int, w: int) -> Layer:
        kind = self.source.pick(("ZeroPad2d", "Softmax", "Upsample", "ChannelShuffle", *PADDINGS))
        grown = c * (h + 2) * (w + 3) <= LARGEST_MAP
        if kind == "ZeroPad2d" and grown:
            return self.add(kind, (1, 2, 0, 2), to=(c, h + 2, w + 3))
        if kind in PADDINGS and grown and h > 1 and w > 1:
            value = (self.source.pick((0.5, -1, 0.0)),) if kind == "ConstantPad2d" else ()
            left, right, top, bottom = padding = self.source.pick(((1, 1, 1, 1), (1, 0, 0, 1), (0, 1, 0, 0)))
            return self.add(kind, padding, *value, to=(c, h + top + bottom, w + left + right))
        if kind == "Upsample" and 4 * c * h * w <= LARGEST_MAP:
            return self.add(kind, scale_factor=2, to=(c, 2 * h, 2 * w))
        if kind == "ChannelShuffle" and c % 2 == 0:
            return self.add(kind, 2)
        return self.add("Softmax", dim=1)

    def image_resized(self, c: int, h: int, w: int) -> Layer:
        source = self.source
        r = source.pick((2, 3))
        if c % (r * r) == 0 and source.chance(60):
            return self.add("PixelShuffle", r, to=(c // (r * r), h * r, w * r))
        if h % r == 0 and w % r == 0 and source.chance(30):
            return self.add("PixelUnshuffle", r, to=(c * r * r, h // r, w // r))
        options: dict[str, Any] = {}
        if source.chance(50):
            options = {"mode": "bilinear"} | ({"align_corners": True} if source.chance(40) else {})
        if source.chance(40):
            out = source.pick((1, 2, 5, (7, 3), (2, 9)))
            out_h, out_w = two(out)
            return self.add("Upsample", out, to=(c, out_h, out_w), **options)
        factor = source.pick((2, 2, 2, 1.5, 0.6, (2, 1), 3))
        factors = factor if isinstance(factor, tuple) else (factor, factor)
        out_h, out_w = (max(1, int(n * f)) for n, f in zip((h, w), factors, strict=True))
        if c * out_h * out_w > LARGEST_MAP or min(h, w) < 2:
            return self.add("Upsample", (h, w), **options)
        options |= {"recompute_scale_factor": True} if source.chance(20) else {}
        return self.add("Upsample", scale_factor=factor, to=(c, out_h, out_w), **options)

    def image_transposed(self, c: int, h: int, w: int) -> Layer:
        if 3 * (2 * h + 1) * (2 * w + 1) > LARGEST_MAP:
            return self.image_relu(c, h, w)
        return self.add("ConvTranspose2d", c, 3, 3, stride=2, to=(3, 2 * h + 1, 2 * w + 1))

    def image_linear(self, c: int, h: int, w: int) -> Layer:
        out = self.source.pick(FEATURES[:8])
        return self.add("Linear", w, out, to=(c, h, out))

    def image_subclass(self, c: int, h: int, w: int) -> Layer:
        if self.source.chance(50):
            return self.image_conv(c, h, w, "SubConv2d")
        return self.image_pool(c, h, w, "SubMaxPool2d")

    def image_illegal(self, c: int, h: int, w: int) -> Layer:
        """What eager rejects when it is called."""
        return self.source.pick(
            (
                lambda: self.add("Conv2d", c + 1, 3, 3),
                lambda: self.add("Conv2d", c, 3, max(h, w) + 3),
                lambda: self.add("MaxPool2d", max(h, w) + 1),
                lambda: self.add("Linear", w + 1, 2),
                lambda: self.add("MaxPool2d", 2, padding=2),
                lambda: self.add("BatchNorm2d", c + 2),
                lambda: self.add("Unflatten", 1, (c, 3)),
                lambda: self.add("MaxPool2d", 2, stride=0),
                lambda: self.add("Conv2d", c, 2, 1, padding=-1),
            )
        )()

    def row_layer(self) -> Layer:
        source = self.source
        choice = source.weighted(
            [
                ("linear", 36),
                ("relu", 26),
                ("free", 7),
                ("activation", 5),
                ("norm", 7),
                ("flatten", 4),
                ("softmax", 4),
                ("unflatten", 4),
                ("subclass", 2),
                ("lazy", 1),
                ("illegal", 1),
            ]
        )
        return getattr(self, f"row_{choice}")()

    def row_linear(self, kind: str = "Linear") -> Layer:
        source = self.source
        out = source.pick(FEATURES if source.chance(50) else FEATURES[:8])
        if source.chance(3):
            out = source.pick(LARGE_FEATURES)
        options = {"bias": False} if source.chance(20) else {}
        return self.add(kind, self.shape[-1], out, to=(*self.shape[:-1], out), **options)

    def row_relu(self) -> Layer:
        return self.image_relu(0, 0, 0)

    def row_free(self) -> Layer:
        return self.image_free()

    def row_activation(self) -> Layer:
        return self.image_activation()

    def row_norm(self) -> Layer:
        if self.source.chance(60):
            options = self.source.pick(({}, {}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}))
            return self.add("LayerNorm", self.shape[-1], **options)
        return self.add("BatchNorm1d", self.shape[0])

    def row_flatten(self) -> Layer:
        return self.add("Flatten", to=(prod(self.shape),))

    def row_softmax(self) -> Layer:
        return self.add(self.source.pick(("Softmax", "LogSoftmax")), dim=self.source.pick((-1, -1, 1, 0)))

    def row_unflatten(self) -> Layer:
        if len(self.shape) > 1:
            return self.row_flatten()
        features = self.shape[0]
        channels = next(c for c in (3, 5, 2, 1) if features % c == 0)
        rest = features // channels
        height = next(n for n in (4, 3, 2, 1) if rest % n == 0)
        to = (channels, height, rest // height)
        return self.add("Unflatten", 1, to, to=to)

    def row_subclass(self) -> Layer:
        return self.row_linear("SubLinear")

    def row_lazy(self) -> Layer:
        out = self.source.pick(FEATURES)
        if any(isinstance(part, Layer) and part.args[1:] == (0,) for _, part, _ in self.made):
            return self.row_linear()  # eager leaves the parameters of a lazy layer without features uninitialised
        return self.add("LazyLinear", out, to=(*self.shape[:-1], out))

    def row_illegal(self) -> Layer:
        features = self.shape[-1]
        return self.source.pick(
            (
                lambda: self.add("Linear", features + 1, 3),
                lambda: self.add("BatchNorm1d", features + 1),
                lambda: self.add("Flatten", 4),
                lambda: self.add("Linear", features, 0),
                lambda: self.add("Softmax", dim=7),
                lambda: self.add("Conv2d", 3, 3, 1),
                lambda: self.add("MaxPool2d", 2),
            )
        )()


def holder(source: Source, architect: Architect) -> tuple[list[Layer | Group], list[str]]:
    """Parts, and the lines of a forward that runs them with functional operations in between."""
    parts: list[Layer | Group] = []
    lines: list[str] = []
    straight = source.chance(60)
    while not parts or (len(parts) < 3 and source.integer(0, 3 - len(parts)) > 0):
        before = architect.shape
        architect.budget = 6
        parts.append(architect.group() if source.chance(85) else architect.layer())
        run = f"self.p{len(parts) - 1}(x)"
        if straight:
            lines.append(f"x = {run}")
        else:
            lines += odd_lines(source, run, before == architect.shape)
        for most in (2, 1):
            if not source.integer(0, most):
                break
            lines.append(functional(source, architect))
    results = ("return x, x + 1", "return {'x': x}", "return [x]", "return x.sum(), x")
    lines.append(source.pick(results) if not straight and source.chance(30) else "return x")
    return parts, lines


def odd_lines(source: Source, run: str, keeps_shape: bool) -> list[str]:
    options = [
        [f"x = {run}"],
        [f"y = {run}", "x = y + y.mean()"],
        ["if x.sum() > 0:", f"    x = {run}", "else:", f"    x = {run} * 2"],
        ["if self.flag:", "    x = x * 2", f"x = {run}"],
        ["if self.training:", "    x = x + 1", f"x = {run}"],
        ["self.calls += 1", f"x = {run}", "x = x + self.calls"],
        ["if x.shape[0] > 1:", "    x = x + 1", f"x = {run}"],
        ["x = x + torch.randn(1)", f"x = {run}"],
        ["x.add_(1)", f"x = {run}"],
        ["for _ in range(2):", f"    y = {run}", "x = y"],
        [f"with torch.no_grad():\n            x = {run}"],
        [f"y = {run}", "F.relu_(y)", "x = y"],
        [f"y = {run}", f"x = {run}", "x = x + y"],
    ]
    if keeps_shape:
        options += [[f"x = x + {run}"], ["y = x", f"x = {run}", "x = x + y"], [f"x = {run}", f"x = {run}"]]
    return source.pick(options)


def functional(source: Source, architect: Architect) -> str:
    shape = architect.shape
    everywhere = (
        *("x = F.relu(x)", "x = torch.relu(x)", "x = x.relu()", "x = F.relu(x, inplace=True)", "x = x.clone()"),
        *("x = F.dropout(x, 0.3, self.training)", "x = x.contiguous()", "x = F.gelu(x)", "x = x * 2", "x = x.relu_()"),
        *("x = F.softmax(x, -1)", "x = x.log_softmax(1)"),
    )
    if len(shape) == 3 and source.chance(70):
        c, h, w = shape
        if h >= 2 and w >= 2 and source.chance(50):
            architect.shape = (c, h // 2, w // 2)
            return source.pick(("x = F.max_pool2d(x, 2)", "x = F.max_pool2d(x, kernel_size=(2, 2))"))
        if 4 * prod(shape) <= LARGEST_MAP and source.chance(20):
            architect.shape = (c, 2 * h, 2 * w)
            return source.pick(
                ("x = F.interpolate(x, scale_factor=2)", "x = F.interpolate(x, scale_factor=(2, 2.0), mode='bilinear')")
            )
        architect.shape = (prod(shape),)
        return source.pick(
            (
                "x = x.view(x.shape[0], -1)",
                "x = torch.flatten(x, 1)",
                "x = x.flatten(1)",
                "x = x.reshape(x.size(0), -1)",
                "x = x.view(x.size(0), -1)",
                "x = torch.flatten(x, start_dim=1)",
                "x = torch.reshape(x, (x.shape[0], -1))",
            )
        )
    return source.pick(everywhere)


def make_input(source: Source, shape: Shape, case_dtype: str, integers: bool) -> Input:
    batch = source.pick((2, 1, 3, 5, 7, 1, 2, 0, 16, 33))
    if prod(shape) * batch > 8 * LARGEST_MAP:
        batch = 2
    full = (batch, *shape)
    if source.chance(7):
        full = source.pick((shape, (batch, 2, *shape), shape[1:] or (), (batch, shape[0] + 1, *shape[1:])))
    elif len(shape) == 3 and source.chance(5):  # another size of image, which some models take
        full = (batch, shape[0], shape[1] + source.integer(0, 4), shape[2] + source.integer(0, 3))
    dtype = source.pick(tuple(DTYPES)) if source.chance(3) else case_dtype
    layout = source.pick(LAYOUTS)
    values = "integers" if integers else source.pick(VALUES)
    return Input(full, dtype, layout, values, source.chance(10))


def make_call(source: Source, shape: Shape, case_dtype: str, integers: bool) -> Call:
    given = make_input(source, shape, case_dtype, integers)
    mode = source.weighted([("no_grad", 60), ("inference", 20), ("grad", 20), ("autocast", 3)])
    global_hook = source.pick(("forward", "forward_pre", "full_backward")) if source.chance(3) else ""
    style = source.pick(STYLES) if source.chance(4) else "positional"
    threads = source.pick((1, 1, 1, 1, 1, 1, 2, 3))
    return Call(given, mode, source.integer(0, 9999), threads, global_hook, style)


def pads(parts: list[Layer | Group], script: list[Call | Mutation]) -> bool:
    """Whether weights meet zeros of the padding, where eager's code paths differ if a weight is not finite."""
    kinds = {part.kind for part in walk(parts) if "padding" in getattr(part, "kwargs", {}) or part.kind in TRANSPOSED}
    changes = {step.name for step in script if isinstance(step, Mutation)}
    return bool(kinds & {"Conv2d", "SubConv2d", "LazyConv2d", *TRANSPOSED}) or "set_attribute" in changes


def make_case(source: Source) -> Case:
    if source.chance(65):
        shape: Shape = (
            source.pick((1, 2, 3, 4, 5, 8, 17)),
            source.pick((4, 5, 6, 7, 8, 9, 11, 12, 13, 17, 3, 2, 1)),
            source.pick((4, 5, 6, 7, 8, 9, 11, 12, 13, 17, 3, 2, 1)),
        )
    else:
        shape = (source.pick(FEATURES),) if source.chance(80) else (source.pick((2, 3, 1)), source.pick(FEATURES))
    architect = Architect(source, shape)
    lines: list[str] = []
    if source.chance(25):
        parts, lines = holder(source, architect)
    else:
        parts = [architect.group()]
    integers = source.chance(20)
    dtype = source.pick(("float64", "bfloat16", "float16")) if source.chance(8) else "float32"
    hooks = []
    if source.chance(12):
        hooks = [
            Hook(source.pick(HOOKS), source.integer(0, 30), source.chance(30)) for _ in range(source.integer(1, 2))
        ]
    script: list[Call | Mutation] = [make_call(source, shape, dtype, integers)]
    while len(script) < 12 and source.integer(0, 4) > 0:
        if source.chance(55):
            name = source.pick(tuple(MUTATIONS))
            script.append(Mutation(name, source.integer(0, 30), source.integer(0, 30), source.integer(0, 9999)))
        elif source.chance(40):
            script.append([step for step in script if isinstance(step, Call)][-1])
        else:
            script.append(make_call(source, shape, dtype, integers))
    if isinstance(script[-1], Mutation):
        script.append([step for step in script if isinstance(step, Call)][-1])
    weights = "integers" if integers else source.pick(("normal", "normal", "normal", "sparse"))
    if source.chance(6) and not pads(parts, script):
        weights = source.pick(tuple(SPECIAL_WEIGHTS))
    return Case(
        parts,
        script,
        lines,
        hooks,
        weights=weights,
        seed=source.integer(0, 9999),
        training=source.chance(15),
        frozen=source.chance(20),
        dtype=dtype,
        channels_last=source.chance(10),
        isa=source.pick(ISAS),
        kernel=source.pick(KERNELS) if source.chance(10) else source.pick(OPS) if source.chance(15) else "",
        winograd="off" if source.chance(20) else "auto",
        checked=source.chance(2),
    )
