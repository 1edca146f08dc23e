"""The torch.compile backend: `torch.compile(model, backend="fastseq")`.

Dynamo hands over a graph of torch calls. Calls that the patterns know become native runs, everything else stays as the
graph has it. A graph serves every model with the same code and every size that its guards allow, so a run takes its
weights as arguments and asks the engine at each call; what the engine refuses (gradients, autocast, other dtypes) runs
as the calls that the graph had.

What is fusable is the matcher's business: calls are read as layers, and the layers are matched as a Sequential of them.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fastseq import _env, _native
from fastseq.controls import BINDINGS
from fastseq.matcher import KNOWN_LAYERS, EagerSegment, match
from fastseq.optimize import enable_verbose_logging
from fastseq.patterns.activation import ACTIVATIONS
from fastseq.patterns.base import ATTRIBUTES, PARAMETERS
from fastseq.patterns.functional import read_call
from fastseq.plan import CompiledMatch
from fastseq.sequential import KINDS, FusedSequential

log = logging.getLogger(__name__)


def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """The graph with its known runs fused, as a function of the same arguments. `graph_module` is not changed."""
    if _env.verbose():
        enable_verbose_logging()
    _native.warn_once()
    if not _native.native_available():
        return graph_module.forward
    rewritten = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    for i, run in enumerate(list(find_runs(rewritten))):
        replace(rewritten, run, f"fastseq_run_{i}")
    rewritten.graph.lint()
    rewritten.recompile()
    return rewritten.forward


# Calls as layers --------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """A node of the graph as the layer that it computes."""

    node: fx.Node
    layer: nn.Module
    parameters: dict[str, fx.Node] = field(default_factory=dict)  # weight and bias, if they are arguments of the node
    has_effects: bool = False  # it may do more than compute its result

    @property
    def input(self) -> Any:
        return self.node.args[0] if self.node.args else self.node.kwargs.get("input")


RESHAPES = {("call_method", "view"), ("call_method", "reshape"), ("call_function", torch.reshape)}


def read_node(node: fx.Node, root: nn.Module) -> Call | None:
    """The node as a layer, or None."""
    if node.op == "call_module":
        # The module is the layer, with its own parameters; its hooks may do anything.
        layer = root.get_submodule(str(node.target))
        call = Call(node, layer, has_effects=True) if type(layer) in KNOWN_LAYERS and len(node.args) == 1 else None
    elif (node.op, node.target) in RESHAPES:
        reshape = nn.Flatten() if is_flatten(node) else unflatten(node)
        call = Call(node, reshape) if reshape is not None else None
    else:
        call = read_function(node)
    return call if call is not None and isinstance(call.input, fx.Node) else None


def read_function(node: fx.Node) -> Call | None:
    found = read_call(node.target, node.args, node.kwargs) if node.op in ("call_function", "call_method") else None
    if found is None:
        return None
    layer, arguments = found
    parameters = {name: arguments[name] for name in PARAMETERS.get(type(layer), ()) if arguments[name] is not None}
    if not all(map(is_parameter, parameters.values())):
        return None
    return Call(
        node, layer, parameters, has_effects=isinstance(layer, ACTIVATIONS) and bool(getattr(layer, "inplace", False))
    )


def is_parameter(value: Any) -> bool:
    """Whether a weight is a parameter of the model, and no tensor that is computed or given anew for each call."""
    if not isinstance(value, fx.Node):
        return False
    is_given = value.op == "placeholder" and isinstance(value.meta.get("example_value"), nn.Parameter)
    return is_given or value.op == "get_attr"


def is_flatten(node: fx.Node) -> bool:
    """Whether a view or reshape gives (N, rest) of (N, ...), for all the sizes that the graph is guarded for."""
    source = node.args[0] if node.args else None
    before = source.meta.get("example_value") if isinstance(source, fx.Node) else None
    after = node.meta.get("example_value")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.dtype != after.dtype:
        return False
    is_alike = before.dim() >= 2 and after.dim() == 2 and statically_known_true(after.shape[0] == before.shape[0])
    return is_alike and (node.target != "view" or has_contiguous_rows(before))


def unflatten(node: fx.Node) -> nn.Module | None:
    """The layer, if a view or reshape gives (N, C, H, W) or (N, C, L) of (N, features)."""
    source = node.args[0] if node.args else None
    before = source.meta.get("example_value") if isinstance(source, fx.Node) else None
    after = node.meta.get("example_value")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.dtype != after.dtype:
        return None
    sizes = tuple(after.shape[1:])
    is_alike = before.dim() == 2 and len(sizes) in (2, 3) and statically_known_true(after.shape[0] == before.shape[0])
    return nn.Unflatten(1, sizes) if is_alike and all(type(size) is int for size in sizes) else None


def has_contiguous_rows(tensor: Tensor) -> bool:
    """Whether a view may flatten the tensor. Dynamo lets some views pass that raise when they run."""
    expected: Any = 1
    for size, stride in reversed(list(zip(tensor.shape[1:], tensor.stride()[1:], strict=True))):
        if not statically_known_true(stride == expected):
            return False
        expected = expected * torch.sym_max(size, 1)
    return True


# Runs -------------------------------------------------------------------------------------------------------------


def find_runs(graph_module: fx.GraphModule) -> Iterator[list[Call]]:
    """The calls of each native run, in order."""
    read = ((node, read_node(node, graph_module)) for node in graph_module.graph.nodes)
    calls = {node: call for node, call in read if call is not None}
    seen: set[fx.Node] = set()
    for node, call in calls.items():
        if node in seen:
            continue
        chain = chain_from(call, calls)
        seen.update(link.node for link in chain)
        for segment in match(nn.Sequential(*(link.layer for link in chain)), KINDS).segments:
            if isinstance(segment, EagerSegment):
                log.debug("torch.compile: eager: %s: %s", chain[int(segment.leaf.path)].node, segment.reason)
            else:
                run = [chain[int(leaf.path)] for leaf in segment.leaves]
                log.debug("torch.compile: fused: %s", ", ".join(link.node.name for link in run))
                yield run


def chain_from(call: Call, calls: dict[fx.Node, Call]) -> list[Call]:
    """The longest chain in which each call's result is the next one's input and read by nobody else.

    The calls of a run move to the place of its last one, so nothing in between may write to a tensor or switch a mode.
    """
    chain = [call]
    while len(chain[-1].node.users) == 1:
        last = chain[-1].node
        following = calls.get(next(iter(last.users)))
        if following is None or following.input is not last or last in following.parameters.values():
            break
        if not all(has_no_effects(node, calls) for node in nodes_between(last, following.node)):
            break
        chain.append(following)
    return chain


def nodes_between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
SYMBOLIC = {torch.sym_sum, torch.sym_max, torch.sym_min}


def has_no_effects(node: fx.Node, calls: dict[fx.Node, Call]) -> bool:
    if node in calls:
        return not calls[node].has_effects
    if node.op == "call_function":  # with dynamic shapes, the arithmetic of sizes stands between the layers
        is_arithmetic = node.target in SYMBOLIC or getattr(node.target, "__module__", "") == "_operator"
        return is_arithmetic and isinstance(node.meta.get("example_value"), NUMBERS)
    return node.op in ("placeholder", "get_attr")


def replace(graph_module: fx.GraphModule, run: list[Call], name: str) -> None:
    """Puts one call in the place of the run's last one."""
    nodes = [call.node for call in run]
    # The run's input first, then the weights, and the sizes of a view.
    outside = [run[0].input, *(node for inside in nodes for node in inside.all_input_nodes if node not in nodes)]
    arguments = tuple(dict.fromkeys(outside))
    graph_module.add_submodule(name, GraphRun(graph_module, run, arguments))
    with graph_module.graph.inserting_after(nodes[-1]):
        fused = graph_module.graph.call_module(name, arguments)
    fused.meta = dict(nodes[-1].meta)
    nodes[-1].replace_all_uses_with(fused)
    for node in reversed(nodes):
        graph_module.graph.erase_node(node)


def calls_alone(graph_module: fx.GraphModule, run: list[Call], arguments: Sequence[fx.Node]) -> Callable[..., Any]:
    """The calls of the run as the graph has them, as a function of `arguments`."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"argument_{i}") for i, node in enumerate(arguments)}
    for call in run:
        copies[call.node] = graph.node_copy(call.node, copies.__getitem__)
    graph.output(copies[run[-1].node])
    return fx.GraphModule(graph_module, graph).forward


# Of runs that differ in their other parameters only, so many are kept: some of those may have been replaced.
MOST_ALIKE = 8


# At run time ------------------------------------------------------------------------------------------------------


class Binding:
    """The layers of a run with the parameters of one model, and the program that runs them. It never changes."""

    def __init__(self, layers: Sequence[nn.Module], parameters: Sequence[Any]) -> None:
        self.parameters = parameters
        self.sequential = FusedSequential(*layers)
        self.program = CompiledMatch(self.sequential, match(self.sequential, KINDS)).program

    def call(self, input: Any) -> Any:
        return self.program.forward(self.sequential, input)


class Bindings(dict[Any, Binding]):
    """What a parameter carries in its `__dict__`: the bindings of the runs of which it is the first parameter.

    Kept by the graph instead, they would keep the weights of models that are gone, and each graph (of another batch
    size, of another grad mode) would pack its own. Copies and pickles leave them out.
    """

    def __deepcopy__(self, memo: Any) -> Bindings:
        return Bindings()

    def __reduce__(self) -> Any:
        return OrderedDict, ()  # a file with the parameter can be read without fastseq, with weights_only too


def key_of(call: Call) -> Any:
    """The layer, equal for two calls that differ in their parameters only."""
    if call.node.op == "call_module":
        return call.layer
    kind = type(call.layer)
    return kind, *(call.layer.__dict__.get(name) for name in ATTRIBUTES.get(kind, ())), *call.parameters


class GraphRun(nn.Module):
    """The calls of a run as one call: `run(input, *weights and others)`.

    A graph serves every model with the same code, from any thread. So a call's weights come with it, and each model's
    have a binding of their own.
    """

    def __init__(self, graph_module: fx.GraphModule, run: list[Call], arguments: Sequence[fx.Node]) -> None:
        super().__init__()
        positions = {node: i for i, node in enumerate(arguments)}
        # Pairs in a list: these layers are no submodules, a layer that the graph calls as a module has its place there.
        self.layers = [(c.layer, {name: positions[node] for name, node in c.parameters.items()}) for c in run]
        self.parameter_positions = [i for _, parameters in self.layers for i in parameters.values()]
        self.key = tuple(key_of(call) for call in run)
        self.binding_without_parameters: Binding | None = None
        self.calls_alone = calls_alone(graph_module, run, arguments)
        self.refused = _native.module().Refused

    def __call__(self, *arguments: Any) -> Any:
        # Not nn.Module's: a hook for all modules is to hear of the model's modules only.
        output = self.binding(arguments).call(arguments[0])
        return self.calls_alone(*arguments) if output.__class__ is self.refused else output

    def binding(self, arguments: Sequence[Any]) -> Binding:
        parameters = [arguments[i] for i in self.parameter_positions]
        if not parameters:
            if self.binding_without_parameters is None:
                self.binding_without_parameters = self.bind(arguments, parameters)
            return self.binding_without_parameters
        bindings = parameters[0].__dict__.get(BINDINGS)
        if type(bindings) is not Bindings:
            bindings = parameters[0].__dict__[BINDINGS] = Bindings()
        # A binding keeps its parameters, so that their ids mean them.
        key = (self.key, *map(id, parameters[1:]))
        binding = bindings.get(key)
        if binding is None:
            alike = [other for other in bindings if other[0] == self.key]
            for outdated in alike[: 1 - MOST_ALIKE]:
                bindings.pop(outdated, None)
            binding = bindings[key] = self.bind(arguments, parameters)
        return binding

    def bind(self, arguments: Sequence[Any], parameters: Sequence[Any]) -> Binding:
        layers = []
        for layer, positions in self.layers:
            if positions:
                layer = copy.copy(layer)
                given = {name: arguments[i] for name, i in positions.items()}
                layer.__dict__["_parameters"] = {**layer._parameters, **given}
            layers.append(layer)
        return Binding(layers, parameters)
