"""What happens to a model between two calls. Each is done to the plain model and to the optimised one alike.

A mutation gets the model, picks its victim by `target` and what to do by `choice`, both modulo what there is, and
returns the model to go on with. One that finds no victim does nothing.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrizations, prune, vector_to_parameters

import fastseq

from .case import Hook, Mutation
from .layers import BFLOAT16
from .recording import add_hook, remove_hooks

T = TypeVar("T")
Change = Callable[[nn.Module, Mutation], "nn.Module | None"]
MUTATIONS: dict[str, Change] = {}

ATTRIBUTES: list[tuple[type[nn.Module], str, tuple[Any, ...]]] = [
    (nn.Conv2d, "stride", ((2, 2), (1, 1), 1, 2, (2, 1), [1, 1], (3, 3), 0)),
    (nn.Conv2d, "padding", ((1, 1), (0, 0), 1, "same", "valid", (0, 2), [1, 1], -1)),
    (nn.Conv2d, "dilation", ((2, 2), (1, 1), 1)),
    (nn.Conv2d, "padding_mode", ("reflect", "zeros", "circular")),
    (nn.Conv2d, "groups", (2, 1, True)),
    (nn.Conv2d, "out_channels", (77,)),
    (nn.Linear, "out_features", (77,)),
    (nn.MaxPool2d, "kernel_size", (1, 2, (2, 1), 3, [2, 2], (1, 2))),
    (nn.MaxPool2d, "stride", (1, 2, None, (1, 2), 3, [], 0)),
    (nn.MaxPool2d, "padding", (1, 0, (0, 1), [0, 0], 2)),
    (nn.MaxPool2d, "ceil_mode", (True, False, 1)),
    (nn.MaxPool2d, "dilation", (2, 1, (1, 1))),
    (nn.MaxPool2d, "return_indices", (True, False)),
    (nn.AvgPool2d, "kernel_size", (1, 2, (2, 1), 3, [2, 2])),
    (nn.AvgPool2d, "stride", (1, 2, None, (1, 2), 0)),
    (nn.AvgPool2d, "padding", (1, 0, (0, 1), 2)),
    (nn.AvgPool2d, "count_include_pad", (True, False)),
    (nn.AvgPool2d, "divisor_override", (None, 3, -2, 0)),
    (nn.AdaptiveAvgPool2d, "output_size", (1, 2, (None, 2), (3, 1), [2, 2])),
    (nn.AdaptiveMaxPool2d, "output_size", (1, 2, (None, 2), (3, 1), [2, 2])),
    (nn.ZeroPad2d, "padding", ((1, 0, 0, 0), (0, 1, 2, 1), (0, 0, 0, 0), (1, -1, 0, 0), [1, 1, 1, 1])),
    (nn.Upsample, "scale_factor", (2.0, 3.0, (1.0, 2.0), 2, None)),
    (nn.Upsample, "mode", ("nearest", "bilinear", "bicubic")),
    (nn.Unflatten, "unflattened_size", ((1, -1, 1), (1, 1, 1))),
    (nn.ReLU, "inplace", (True, False, 1, 0, "yes")),
    (nn.Flatten, "start_dim", (0, 1, 2, -1)),
    (nn.Flatten, "end_dim", (-1, 1, -2, 2)),
    (nn.Dropout, "p", (0.0, 0.5, 1.0, 1, 2.0)),
    (nn.Dropout, "training", (True, False, 0)),
    (nn.Dropout, "inplace", (True, False)),
    (nn.BatchNorm2d, "eps", (0.1, 1e-5)),
    (nn.BatchNorm2d, "training", (True, False)),
    (nn.LeakyReLU, "negative_slope", (0.5, 0.0)),
    (nn.Softmax, "dim", (-1, 1, 0, 2)),
    (nn.LogSoftmax, "dim", (1, -1, -2)),
    (nn.LayerNorm, "eps", (0.1, 1e-5, 0.0)),
    (nn.GroupNorm, "num_groups", (1, 2, 3, True)),
    (nn.GroupNorm, "eps", (0.1, 1e-5)),
]


def mutation(change: Change) -> Change:
    MUTATIONS[change.__name__] = change
    return change


def at(options: list[T], number: int) -> T | None:
    return options[number % len(options)] if options else None


def modules(model: nn.Module, *kinds: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kinds or (nn.Module,))]


def sequentials(model: nn.Module) -> list[nn.Sequential]:
    """Those whose children can be exchanged."""
    return modules(model, nn.Sequential)


def parameters(model: nn.Module) -> list[Any]:
    return [p for p in model.parameters() if not isinstance(p, nn.parameter.UninitializedTensorMixin)]


def slots(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where parameters are registered."""
    return [
        (module, name)
        for module in model.modules()
        for name, value in module._parameters.items()
        if value is not None and not isinstance(value, nn.parameter.UninitializedTensorMixin)
    ]


def new_values(like: Tensor) -> Tensor:
    """Other values for a parameter: small integers where it holds integers."""
    with torch.no_grad():
        if like.is_floating_point() and like.numel() and bool((like == like.round()).all()):
            return torch.randint(-1, 2, like.shape).to(like.dtype)
        return (torch.randn(like.shape) * 0.3).to(like.dtype)


def new_layer(choice: int) -> nn.Module:
    """A layer that takes any shape and keeps it."""
    kinds: list[Callable[[], nn.Module]] = [
        nn.ReLU,
        lambda: nn.ReLU(inplace=True),
        nn.Identity,
        nn.Tanh,
        lambda: nn.Dropout(0.5).eval(),
        lambda: nn.Sequential(nn.ReLU(), nn.Identity()),
        lambda: nn.MaxPool2d(1),
        nn.Flatten,
        nn.Sequential,
        nn.LazyBatchNorm2d,
        lambda: nn.Sequential(nn.MaxPool2d(2, 1, 1)),
    ]
    return kinds[choice % len(kinds)]()


# Weights ------------------------------------------------------------------------------------------------------------


def new_state(model: nn.Module) -> dict[str, Any]:
    return {
        key: value if key.endswith(("running_var", "num_batches_tracked")) else new_values(value)
        for key, value in copy.deepcopy(model.state_dict()).items()
        if not isinstance(value, nn.parameter.UninitializedTensorMixin)
    }


@mutation
def load_state_dict(model: nn.Module, how: Mutation) -> None:
    model.load_state_dict(new_state(model))


@mutation
def load_state_dict_assign(model: nn.Module, how: Mutation) -> None:
    model.load_state_dict(new_state(model), assign=True)


@mutation
def load_some_state(model: nn.Module, how: Mutation) -> None:
    state = new_state(model)
    model.load_state_dict({key: state[key] for i, key in enumerate(state) if (i + how.choice) % 2}, strict=False)


@mutation
def load_wrong_state(model: nn.Module, how: Mutation) -> None:
    """Loads what fits and raises at the rest."""
    state = new_state(model)
    key = at(list(state), how.target)
    if key is not None:
        state[key] = torch.zeros(tuple(state[key].shape) + (2,))
    model.load_state_dict(state)


@mutation
def write_data(model: nn.Module, how: Mutation) -> None:
    """Behind the version counter."""
    parameter = at(parameters(model), how.target)
    if parameter is not None:
        parameter.data.copy_(new_values(parameter))


@mutation
def scale_data(model: nn.Module, how: Mutation) -> None:
    for parameter in parameters(model):
        parameter.data.mul_(-1)


@mutation
def write_numpy(model: nn.Module, how: Mutation) -> None:
    parameter = at(parameters(model), how.target)
    if parameter is not None and parameter.dtype != torch.bfloat16:
        parameter.detach().numpy()[...] = new_values(parameter).numpy()


@mutation
def write_no_grad(model: nn.Module, how: Mutation) -> None:
    parameter = at(parameters(model), how.target)
    if parameter is not None:
        with torch.no_grad():
            parameter.copy_(new_values(parameter))


@mutation
def write_one_element(model: nn.Module, how: Mutation) -> None:
    """One element, behind the version counter; of a large weight the documented `refresh` is needed too."""
    parameter = at(parameters(model), how.target)
    if parameter is None or parameter.numel() == 0:
        return
    parameter.data[(-(how.choice % 2),) * parameter.dim()] = 3.0  # the first or the last
    if parameter.numel() * parameter.element_size() > 64 * 1024:
        fastseq.refresh(model)


@mutation
def new_parameter(model: nn.Module, how: Mutation) -> None:
    slot = at(slots(model), how.target)
    if slot is not None:
        module, name = slot
        old = module._parameters[name]
        setattr(module, name, nn.Parameter(new_values(old), requires_grad=old.requires_grad))


@mutation
def new_parameter_layout(model: nn.Module, how: Mutation) -> None:
    """The same values with other strides, or some other shape or dtype."""
    # Not of a parametrized layer: torch._weight_norm writes out of bounds where its two parameters do not fit.
    slot = at([s for s in slots(model) if not isinstance(s[0], nn.utils.parametrize.ParametrizationList)], how.target)
    if slot is None:
        return
    module, name = slot
    value = module._parameters[name].detach()
    layouts: list[Callable[[], Tensor]] = [
        lambda: value.clone().t().contiguous().t(),
        lambda: torch.cat([value, value], dim=-1)[..., : value.shape[-1]],
        lambda: value[:1].clone().expand(value.shape),
        lambda: value.clone().to(memory_format=torch.channels_last),
        lambda: torch.cat([value, value]),
        lambda: value.double(),
        lambda: torch.cat([value.flatten()[:1], value.flatten()])[1:].view(value.shape),
        lambda: value[..., :0].clone(),
    ]
    made = layouts[how.choice % len(layouts)]()
    setattr(module, name, nn.Parameter(made, requires_grad=module._parameters[name].requires_grad))


@mutation
def replace_data(model: nn.Module, how: Mutation) -> None:
    parameter = at(parameters(model), how.target)
    if parameter is not None:
        parameter.data = new_values(parameter)


@mutation
def share_parameter(model: nn.Module, how: Mutation) -> None:
    """Ties two weights of the same shape."""
    all_slots = slots(model)
    first = at(all_slots, how.target)
    if first is None:
        return
    value = first[0]._parameters[first[1]]
    for module, name in all_slots:
        if module._parameters[name].shape == value.shape:
            setattr(module, name, value)


@mutation
def drop_bias(model: nn.Module, how: Mutation) -> None:
    layer = at(modules(model, nn.Linear, nn.Conv2d), how.target)
    if layer is not None:
        layer.bias = None


@mutation
def vector_roundtrip(model: nn.Module, how: Mutation) -> None:
    if parameters(model) and len(parameters(model)) == len(list(model.parameters())):
        vector = parameters_to_vector(model.parameters()).detach()
        vector_to_parameters(-vector, model.parameters())


@mutation
def swap_tensors(model: nn.Module, how: Mutation) -> None:
    parameter = at(parameters(model), how.target)
    if parameter is not None:
        torch.utils.swap_tensors(parameter, nn.Parameter(new_values(parameter), requires_grad=parameter.requires_grad))


@mutation
def optimizer_step(model: nn.Module, how: Mutation) -> None:
    trained = [p for p in parameters(model) if p.requires_grad]
    if trained:
        for parameter in trained:
            parameter.grad = new_values(parameter)
        torch.optim.SGD(trained, lr=1.0).step()
        for parameter in trained:
            parameter.grad = None


@mutation
def set_requires_grad(model: nn.Module, how: Mutation) -> None:
    parameter = at(parameters(model), how.target)
    if how.choice % 3 == 0:
        model.requires_grad_(how.choice % 2 == 0)
    elif parameter is not None:
        parameter.requires_grad_(not parameter.requires_grad)


@mutation
def prune_layer(model: nn.Module, how: Mutation) -> None:
    layer = at(modules(model, nn.Linear, nn.Conv2d), how.target)
    if layer is None:
        return
    if prune.is_pruned(layer):
        prune.remove(layer, "weight")
    else:
        prune.l1_unstructured(layer, "weight", amount=0.5)


@mutation
def parametrize_layer(model: nn.Module, how: Mutation) -> None:
    layer = at(modules(model, nn.Linear, nn.Conv2d), how.target)
    if layer is None:
        return
    if nn.utils.parametrize.is_parametrized(layer):
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
    else:
        parametrizations.weight_norm(layer)


# Structure ----------------------------------------------------------------------------------------------------------


@mutation
def append(model: nn.Module, how: Mutation) -> None:
    sequential = at(sequentials(model), how.target)
    if sequential is not None:
        sequential.append(new_layer(how.choice))


@mutation
def insert(model: nn.Module, how: Mutation) -> None:
    sequential = at(sequentials(model), how.target)
    if sequential is not None:
        sequential.insert(how.seed % (len(sequential) + 1), new_layer(how.choice))


@mutation
def extend(model: nn.Module, how: Mutation) -> None:
    sequential = at(sequentials(model), how.target)
    if sequential is not None:
        sequential.extend([new_layer(how.choice), new_layer(how.seed)])


@mutation
def delete(model: nn.Module, how: Mutation) -> None:
    """Rather a layer that keeps the shape."""
    sequential = at(sequentials(model), how.target)
    if not sequential:
        return
    harmless = [i for i, child in enumerate(sequential) if isinstance(child, (nn.ReLU, nn.Dropout, nn.Identity))]
    del sequential[at(harmless or list(range(len(sequential))), how.choice)]  # type: ignore[arg-type]


@mutation
def replace_child(model: nn.Module, how: Mutation) -> None:
    """By a copy with other weights, by Identity, by another layer, or by one of an earlier place."""
    sequential = at(sequentials(model), how.target)
    if not sequential:
        return
    index = how.seed % len(sequential)
    if how.choice % 3 == 0:
        sequential[index] = nn.Identity()
    elif how.choice % 3 == 1:
        child = copy.deepcopy(sequential[index])
        with torch.no_grad():
            for parameter in parameters(child):
                parameter.copy_(new_values(parameter))
        sequential[index] = child
    else:
        sequential[index] = new_layer(how.choice // 3)


@mutation
def move_child(model: nn.Module, how: Mutation) -> None:
    sequential = at(sequentials(model), how.target)
    if sequential:
        sequential.append(sequential.pop(how.choice % len(sequential)))


@mutation
def multiply(model: nn.Module, how: Mutation) -> None:
    sequential = at(sequentials(model), how.target)
    if sequential and len(sequential) < 8 and sequential is not model:
        sequential *= 2


@mutation
def clear_name(model: nn.Module, how: Mutation) -> None:
    """Sets a child to None, which eager cannot call, or brings it back."""
    sequential = at(sequentials(model), how.target)
    if sequential and how.choice % 4 == 0:
        name = list(sequential._modules)[how.seed % len(sequential)]
        setattr(sequential, name, None)


@mutation
def slice_model(model: nn.Module, how: Mutation) -> nn.Module | None:
    return model[: max(1, len(model) - 1)] if isinstance(model, nn.Sequential) and len(model) > 1 else None


@mutation
def own_forward(model: nn.Module, how: Mutation) -> None:
    """An instance's own forward, or its class's again."""
    victim = at(modules(model), how.target)
    if victim is None:
        return
    if "forward" in victim.__dict__:
        del victim.forward
    else:
        victim.forward = Negated(victim)


class Negated:
    """A forward that negates the class's one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Any) -> Any:
        return -type(self.module).forward(self.module, x)


# State --------------------------------------------------------------------------------------------------------------


@mutation
def train(model: nn.Module, how: Mutation) -> None:
    model.train()


@mutation
def eval(model: nn.Module, how: Mutation) -> None:
    model.eval()


@mutation
def train_one(model: nn.Module, how: Mutation) -> None:
    victim = at(modules(model), how.target)
    if victim is not None:
        victim.train(not victim.training)


@mutation
def toggle_flag(model: nn.Module, how: Mutation) -> None:
    if hasattr(model, "flag"):
        model.flag = not model.flag


@mutation
def to_dtype(model: nn.Module, how: Mutation) -> None:
    model.to((torch.float64, torch.float32, BFLOAT16, torch.float16)[how.choice % 4])


@mutation
def to_dtype_and_back(model: nn.Module, how: Mutation) -> None:
    model.double()
    model.float()


@mutation
def part_to_dtype(model: nn.Module, how: Mutation) -> None:
    victim = at(modules(model), how.target)
    if victim is not None:
        victim.to((torch.float64, torch.float32)[how.choice % 2])


@mutation
def to_memory_format(model: nn.Module, how: Mutation) -> None:
    model.to(memory_format=(torch.channels_last, torch.contiguous_format)[how.choice % 2])


@mutation
def set_attribute(model: nn.Module, how: Mutation) -> None:
    options = [
        (module, name, values)
        for module in modules(model)
        for kind, name, values in ATTRIBUTES
        if isinstance(module, kind) and name in module.__dict__
    ]
    chosen = at(options, how.target + 7 * how.seed)
    if chosen is not None:
        module, name, values = chosen
        setattr(module, name, values[how.choice % len(values)])


@mutation
def hook(model: nn.Module, how: Mutation) -> None:
    kinds = ("forward", "forward_pre", "full_backward", "forward_kwargs")
    add_hook(model, Hook(kinds[how.choice % 4], how.target, how.choice % 3 == 0))


@mutation
def unhook(model: nn.Module, how: Mutation) -> None:
    remove_hooks(model)


# Copies -------------------------------------------------------------------------------------------------------------


@mutation
def deepcopy(model: nn.Module, how: Mutation) -> nn.Module:
    return copy.deepcopy(model)


@mutation
def shallow_copy(model: nn.Module, how: Mutation) -> nn.Module:
    return copy.copy(model)


@mutation
def pickle_roundtrip(model: nn.Module, how: Mutation) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


@mutation
def optimize_again(model: nn.Module, how: Mutation) -> nn.Module:
    return fastseq.optimize(model)


@mutation
def optimize_in_place(model: nn.Module, how: Mutation) -> nn.Module:
    return fastseq.optimize(model, inplace=True)


@mutation
def optimize_without(model: nn.Module, how: Mutation) -> nn.Module:
    path = at([path for path, _ in model.named_modules() if path], how.target)
    return fastseq.optimize(model, exclude=[] if path is None else [path])


@mutation
def restore(model: nn.Module, how: Mutation) -> nn.Module:
    return fastseq.restore(model)


# What the plain model gets where the optimised one is optimised.
PLAIN: dict[str, Change] = {
    "optimize_again": deepcopy,
    "optimize_in_place": lambda model, how: None,
    "optimize_without": deepcopy,
}


@mutation
def refresh(model: nn.Module, how: Mutation) -> None:
    fastseq.refresh(model)


@mutation
def look(model: nn.Module, how: Mutation) -> None:
    """What reads must not change anything."""
    repr(model)
    fastseq.explain(model)
    fastseq.stats(model)
