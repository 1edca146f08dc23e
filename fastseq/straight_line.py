"""Is a module's own forward a straight line through its children and functional calls, and if so, which?

A forward is traced once with `torch.fx`, and only if the trace is provably what it will do at every call: its code has
no branch, loop or store outside of local variables, and runs here with stand-ins for everything it can reach: a proxy
for its one argument, recorders for its children and for torch's modules, nothing else. What the stand-ins were asked
for is what the result depends on, and is watched from then on. Nothing is patched and no real layer runs.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import fx, nn

from fastseq.matcher import KNOWN_LAYERS, Leaf, flatten, is_excluded, is_plain_sequential
from fastseq.patterns.functional import read_call


class NotStraight(Exception):
    """Why a forward is not a straight line, in words for `explain`."""


@dataclass
class Container:
    """A module whose children the leaves are. `attributes`: what its forward reads from its `__dict__`; `children`: the
    names of the children it calls."""

    module: nn.Module
    attributes: list[str] = field(default_factory=list)
    children: list[str] = field(default_factory=list)


@dataclass
class TracedForward:
    """A forward that was traced. `names`: (dictionary or class, key, value) of each global name, torch function and
    class attribute that it depends on; None of a class for an attribute that it must not have."""

    function: FunctionType
    names: list[tuple[Any, str, Any]] = field(default_factory=list)


@dataclass
class StraightLine:
    """What a forward does: `leaves` in order. It holds as long as `containers` and `forwards` are what they were."""

    leaves: list[Leaf]
    containers: list[Container]  # the module itself first
    forwards: list[TracedForward]


class Call:
    """A functional step as eager runs it: `function(x, *args, **kwargs)`, or the method of that name."""

    def __init__(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.target = target
        self.args = args
        self.kwargs = kwargs
        self.name = target if isinstance(target, str) else getattr(target, "__name__", str(target))

    def __call__(self, x: Any) -> Any:
        function = getattr(x, self.target) if isinstance(self.target, str) else None
        return function(*self.args, **self.kwargs) if function else self.target(x, *self.args, **self.kwargs)


class ViewAsRows:
    """`x.view(x.shape[0], -1)`, `x.reshape(-1, 750)` and their like, as eager runs them."""

    def __init__(self, method: str, features: int) -> None:
        self.name = method
        self.features = features

    def __call__(self, x: Any) -> Any:
        return getattr(x, self.name)(*((-1, self.features) if self.features else (x.shape[0], -1)))


class ViewAsMaps:
    """`x.view(x.shape[0], 8, 7, 7)`, `x.reshape(-1, 8, 49)` and their like, as eager runs them."""

    def __init__(self, method: str, sizes: tuple[int, ...], is_of_batch: bool) -> None:
        self.name = method
        self.sizes = sizes
        self.is_of_batch = is_of_batch

    def __call__(self, x: Any) -> Any:
        return getattr(x, self.name)(x.shape[0] if self.is_of_batch else -1, *self.sizes)


# Instructions, of whichever Python from 3.10 on, that neither branch nor store outside of local variables. What is not
# listed, such as instructions of a later Python, means no trace: a missing name costs speed, never a wrong result.
PLAIN_INSTRUCTIONS = {
    "CACHE", "NOP", "RESUME", "EXTENDED_ARG", "POP_TOP", "PUSH_NULL", "COPY", "SWAP", "DUP_TOP", "ROT_TWO", "ROT_THREE",
    "LOAD_FAST", "LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_BORROW_LOAD_FAST_BORROW", "LOAD_FAST_CHECK",
    "STORE_FAST", "STORE_FAST_STORE_FAST", "STORE_FAST_LOAD_FAST", "LOAD_CONST", "LOAD_SMALL_INT", "LOAD_GLOBAL",
    "LOAD_ATTR", "LOAD_METHOD", "PRECALL", "CALL", "CALL_KW", "KW_NAMES", "CALL_METHOD", "CALL_FUNCTION",
    "CALL_FUNCTION_KW", "BINARY_SUBSCR", "BINARY_OP", "BINARY_ADD", "BINARY_SUBTRACT", "BINARY_MULTIPLY",
    "BINARY_TRUE_DIVIDE", "BINARY_FLOOR_DIVIDE", "UNARY_NEGATIVE", "BUILD_TUPLE", "RETURN_VALUE", "RETURN_CONST",
}  # fmt: skip
CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.memory_format)
TORCH_MODULES = (torch, torch.nn, torch.nn.functional)


def class_attribute(kind: type, name: str) -> Any:
    """What the class or a base has by that name, as it is; None for nothing."""
    return next((base.__dict__[name] for base in kind.__mro__ if name in base.__dict__), None)


def user_class(kind: type) -> type:
    """The user's class behind one that `optimize` made, or any other class itself."""
    names = [(base.__module__, base.__name__) for base in kind.__mro__]
    mixin = ("fastseq.module", "FusedModule")
    return kind.__mro__[names.index(mixin) + 1] if mixin in names else kind


# What nn.Module runs for a call and for an attribute, under which a forward alone says what a module does.
CALLING = [(name, class_attribute(nn.Module, name)) for name in ("__call__", "_call_impl")]
LOOKING_UP = [(name, class_attribute(nn.Module, name)) for name in ("__getattr__", "__getattribute__")]


def is_constant(value: Any) -> bool:
    return type(value) in CONSTANTS or (type(value) is tuple and all(map(is_constant, value)))


def forward_of(module: nn.Module) -> FunctionType:
    """The forward that calling `module` runs, once it is sure that the call runs nothing else and the code is plain."""
    kind = type(module)
    forward = kind.forward
    if not isinstance(forward, FunctionType) or "forward" in module.__dict__:
        raise NotStraight("its forward is no plain function of its class")
    if (forward.__module__ or "").split(".")[0] == "torch":
        raise NotStraight("its forward is torch's own")
    if any(class_attribute(user_class(kind), name) is not value for name, value in CALLING):
        raise NotStraight("its class has a __call__ of its own")
    if any(class_attribute(kind, name) is not value for name, value in LOOKING_UP):
        raise NotStraight("its class looks up attributes in its own way")
    code = forward.__code__
    takes_one = code.co_argcount == 2 and not code.co_kwonlyargcount and not forward.__defaults__
    if not takes_one or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
        raise NotStraight("its forward takes other arguments than one input")
    has_handlers = bool(getattr(code, "co_exceptiontable", None))  # from Python 3.11 on; before, an instruction tells
    if code.co_freevars or code.co_cellvars or has_handlers:
        raise NotStraight("its forward uses super(), an inner function, or a try or with block")
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise NotStraight("its forward is a generator or coroutine")
    for instruction in dis.get_instructions(code):
        is_in_place = instruction.opname == "BINARY_OP" and instruction.argrepr.endswith("=")
        if instruction.opname not in PLAIN_INSTRUCTIONS or is_in_place:
            raise NotStraight(f"its forward branches, loops or stores outside of its variables ({instruction.opname})")
    return forward


class _Function:
    """Stands for a function of torch, or a child: called with the value that flows through, it becomes a node."""

    def __init__(self, tracer: fx.proxy.TracerBase, kind: str, target: Any, text: str) -> None:
        self._trace = (tracer, kind, target, text)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracer, kind, target, text = self._trace
        if not args or not isinstance(args[0], fx.Proxy):
            raise NotStraight(f"its forward calls {text} on something else than the value that flows through")
        return tracer.create_proxy(kind, target, args, kwargs)


class _TorchModule:
    """Stands for torch, torch.nn or torch.nn.functional."""

    def __init__(self, tracer: fx.proxy.TracerBase, module: ModuleType, traced: TracedForward) -> None:
        self._parts = (tracer, module, traced)

    def __getattr__(self, name: str) -> Any:
        tracer, module, traced = self._parts
        if name not in module.__dict__:
            raise NotStraight(f"its forward reads {module.__name__}.{name}")
        value = module.__dict__[name]
        traced.names.append((module.__dict__, name, value))
        return _stand_in(tracer, value, f"{module.__name__}.{name}", traced)


def _stand_in(tracer: fx.proxy.TracerBase, value: Any, text: str, traced: TracedForward) -> Any:
    if any(value is module for module in TORCH_MODULES):
        return _TorchModule(tracer, value, traced)
    if is_constant(value):
        return value
    name = getattr(value, "__name__", "")
    is_torch_function = isinstance(value, (FunctionType, BuiltinFunctionType)) and any(
        module.__dict__.get(name) is value for module in TORCH_MODULES
    )
    if not is_torch_function:
        raise NotStraight(f"its forward reads {text}, which is no function or module of torch")
    return _Function(tracer, "call_function", value, text)


class _Self:
    """Stands for the module itself: gives its children, and constants from its `__dict__`."""

    def __init__(self, tracer: fx.proxy.TracerBase, container: Container, traced: TracedForward) -> None:
        object.__setattr__(self, "_parts", (tracer, container, traced))

    def __getattribute__(self, name: str) -> Any:
        tracer, container, traced = object.__getattribute__(self, "_parts")
        module = container.module
        if class_attribute(type(module), name) is not None:
            raise NotStraight(f"its forward reads self.{name}, an attribute of its class")
        traced.names.append((type(module), name, None))
        if name in module.__dict__:
            value = module.__dict__[name]
            if not is_constant(value):
                raise NotStraight(f"its forward reads self.{name}, which is no child and no constant")
            container.attributes.append(name)
            return value
        if not isinstance(module._modules.get(name), nn.Module) or name in module._parameters | module._buffers:
            raise NotStraight(f"its forward reads self.{name}, which is no child and no constant")
        container.children.append(name)
        return _Function(tracer, "call_module", name, f"self.{name}")


def _globals(tracer: fx.proxy.TracerBase, forward: FunctionType, traced: TracedForward) -> dict[str, Any]:
    """Stand-ins for the global names of `forward`, and no builtins."""
    given: dict[str, Any] = {"__builtins__": {}}
    for instruction in dis.get_instructions(forward.__code__):
        name = instruction.argval
        if instruction.opname != "LOAD_GLOBAL" or name in given:
            continue
        if name not in forward.__globals__:
            raise NotStraight(f"its forward reads the global name {name}")
        value = forward.__globals__[name]
        traced.names.append((forward.__globals__, name, value))
        given[name] = _stand_in(tracer, value, name, traced)
    return given


def trace(container: Container) -> tuple[fx.Graph, TracedForward]:
    """The graph of the module's forward. NotStraight if it cannot be known."""
    forward = forward_of(container.module)
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    kind = type(container.module)
    traced = TracedForward(forward, [(user_class(kind), *pair) for pair in CALLING] + [(kind, *p) for p in LOOKING_UP])
    code = forward.__code__
    function = FunctionType(code, _globals(tracer, forward, traced), forward.__name__)
    x = tracer.create_proxy("placeholder", code.co_varnames[1], (), {})
    try:
        output = function(_Self(tracer, container, traced), x)
        if not isinstance(output, fx.Proxy):
            raise NotStraight("its forward does not return what flows through it")
        tracer.create_proxy("output", "output", (output,), {})
    except NotStraight:
        raise
    except Exception as error:  # whatever a proxy or stand-in is not able to do
        raise NotStraight(f"its forward cannot be traced: {error}") from error
    return graph, traced


class _Batches:
    """The nodes that are `x.shape`, or its first number, of some value x."""

    def __init__(self) -> None:
        self._shapes: dict[fx.Node, fx.Node] = {}
        self._sizes: dict[fx.Node, fx.Node] = {}

    def take(self, node: fx.Node) -> bool:
        """Whether `node` is one of them."""
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node) or node.kwargs:
            return False
        rest = node.args[1:]
        if (node.target is getattr and rest == ("shape",)) or (node.target == "size" and not rest):
            self._shapes[node] = first
        elif node.target == "size" and rest == (0,):
            self._sizes[node] = first
        elif getattr(node.target, "__name__", "") == "getitem" and rest == (0,) and first in self._shapes:
            self._sizes[node] = self._shapes[first]
        else:
            return False
        return True

    def are_used(self) -> bool:
        """Whether each of them is read by a view in the end: eager might raise for one that nobody else looks at."""
        return all(node.users for node in (*self._shapes, *self._sizes))

    def source(self, value: Any) -> fx.Node | None:
        """The value whose first size `value` is."""
        return self._sizes.get(value) if isinstance(value, fx.Node) else None


def _viewed(node: fx.Node, current: fx.Node) -> tuple[str, Any]:
    """ "view" or "reshape" of `current` and the sizes it is given; no sizes for anything else."""
    target = "reshape" if node.target is torch.reshape else node.target
    if target not in ("view", "reshape") or node.kwargs or node.args[0] is not current:
        return "", ()
    sizes: Any = node.args[1:]
    return str(target), sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple) else sizes


def _view_as_rows(node: fx.Node, current: fx.Node, batches: _Batches) -> Leaf | None:
    """`view` or `reshape` of `current` to (its batch, -1) or (-1, features), as a Flatten; None for anything else."""
    target, sizes = _viewed(node, current)
    if len(sizes) != 2:
        return None
    rows, columns = sizes
    source = batches.source(rows)
    if source is not None and columns == -1:
        features = 0
    elif type(rows) is int and rows == -1 and type(columns) is int and columns > 0:
        features = columns
    else:
        return None
    # The batch of an earlier value is this one's as well, except for unbatched inputs, which only a native run refuses.
    return Leaf(
        target,
        nn.Flatten(),
        call=ViewAsRows(target, features),
        is_view=target == "view",
        rows_features=features,
        needs_native=source is not None and source is not current,
    )


def _view_as_maps(node: fx.Node, current: fx.Node, batches: _Batches) -> Leaf | None:
    """`view` or `reshape` of `current` to (its batch, C, H, W) or (-1, C, H, W), as an Unflatten; None for others."""
    target, sizes = _viewed(node, current)
    if len(sizes) not in (3, 4) or not all(type(size) is int and size > 0 for size in sizes[1:]):
        return None
    source = batches.source(sizes[0])
    if source is None and not (type(sizes[0]) is int and sizes[0] == -1):
        return None
    maps = tuple(sizes[1:])
    return Leaf(
        target,
        nn.Unflatten(1, maps),
        call=ViewAsMaps(target, maps, source is not None),
        needs_native=source is not None and source is not current,
    )


def _is_only_current(node: fx.Node, current: fx.Node) -> bool:
    """Whether the node takes `current` first and no other value, nor `current` again."""
    if not node.args or node.args[0] is not current:
        return False
    others: list[fx.Node] = []
    fx.map_arg((node.args[1:], node.kwargs), others.append)
    return not others


def _leaves(
    prefix: str, container: Container, graph: fx.Graph, line: StraightLine, kinds: tuple[type, ...], inside: list[int]
) -> Iterator[Leaf]:
    """The graph's nodes as leaves, children that are Sequentials or straight lines themselves taken apart."""
    batches = _Batches()
    current: Any = None
    for node in graph.nodes:
        if node.op == "placeholder":
            current = node
            continue
        if node.op == "output":
            if node.args[0] is not current:
                raise NotStraight("its forward returns something else than its last value")
            if not batches.are_used():
                raise NotStraight("its forward reads a size that it does not use")
            return
        if batches.take(node):
            continue
        leaf = _view_as_rows(node, current, batches) or _view_as_maps(node, current, batches)
        if leaf is None and not _is_only_current(node, current):
            raise NotStraight(f"its forward is no straight line: {node.target} takes other values than the last one")
        current = node
        if leaf is not None:
            yield leaf
        elif node.op == "call_module":
            if len(node.args) != 1 or node.kwargs:
                raise NotStraight(f"its forward calls self.{node.target} with more than one argument")
            yield from _child_leaves(
                f"{prefix}{node.target}", container.module._modules[node.target], line, kinds, inside
            )
        else:
            if node.op == "call_method":
                method = class_attribute(torch.Tensor, node.target)
                line.forwards[0].names.append((torch.Tensor, node.target, method))
            call = Call(node.target, tuple(node.args[1:]), dict(node.kwargs))
            known = read_call(node.target, node.args, node.kwargs)
            yield Leaf(call.name, call if known is None else known[0], call=call)


def _child_leaves(
    path: str, child: Any, line: StraightLine, kinds: tuple[type, ...], inside: list[int]
) -> Iterator[Leaf]:
    if is_plain_sequential(child, kinds):
        leaves, nested = flatten(child, kinds, f"{path}.")
        line.containers += [Container(child), *map(Container, nested)]
        yield from leaves
        return
    if type(child) in KNOWN_LAYERS or is_excluded(child) or id(child) in inside:
        yield Leaf(path, child)
        return
    try:
        inner = _straight_line(child, kinds, f"{path}.", [*inside, id(child)])
    except NotStraight:
        yield Leaf(path, child)
        return
    line.containers += inner.containers
    line.forwards += inner.forwards
    yield from inner.leaves


def _straight_line(module: nn.Module, kinds: tuple[type, ...], prefix: str, inside: list[int]) -> StraightLine:
    container = Container(module)
    graph, traced = trace(container)
    line = StraightLine([], [container], [traced])
    line.leaves = list(_leaves(prefix, container, graph, line, kinds, inside))
    return line


def straight_line(module: nn.Module, kinds: tuple[type, ...]) -> StraightLine | str:
    """What `module.forward` does, or the reason why that is not known for every call.

    `kinds`: the container types that are flattened for execution.
    """
    try:
        return _straight_line(module, kinds, "", [id(module)])
    except NotStraight as reason:
        return str(reason)
