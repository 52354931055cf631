"""What a pruning plan must be, and what a network must be that it is applied to."""

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ds_lightning.errors import ConfigError

from ._plan_names import joined

if TYPE_CHECKING:
    from .pruning_plan import PruningPlan

Attribute = int | tuple[int, ...]


def as_value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def checked_value(path: str, key: str, value: Any) -> Attribute:
    checked: Attribute = as_value(value)
    if not all(isinstance(one, int) for one in (checked if isinstance(checked, tuple) else (checked,))):
        raise ConfigError(f"a pruning plan sets {joined(path, key)} to {value!r}; expected an int or a tuple of ints")
    return checked


def check_indices(name: str, shape: tuple[int, ...], dim: int, indices: tuple[int, ...]) -> None:
    if not 0 <= dim < len(shape):
        raise ConfigError(f"a pruning plan cuts {name} along dimension {dim}; expected 0 to {len(shape) - 1}")
    rising = all(a < b for a, b in pairwise(indices))
    if not indices or not rising or not 0 <= indices[0] <= indices[-1] < shape[dim]:
        raise ConfigError(
            f"a pruning plan keeps {str(list(indices[:8]))[:-1]}{', ...' if len(indices) > 8 else ''}] of {name} along "
            f"dimension {dim}; expected at least one index, ascending, from 0 to {shape[dim] - 1}"
        )


def check_module(path: str, module: nn.Module) -> None:
    hooks = module._forward_pre_hooks.values()
    computed = is_parametrized(module) or "parametrizations" in path.split(".")
    if computed or any(isinstance(hook, WeightNorm | SpectralNorm) for hook in hooks):
        raise ConfigError(
            f"the weight of {path or 'the network'} is computed from other tensors (weight_norm, spectral_norm or "
            f"another parametrization), which can't be pruned; remove it from the module before, or exclude the module"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ConfigError(f"{path or 'the network'} is a ScriptModule, which can't be pruned; prune before scripting")


def slot_of(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    if path not in modules:
        raise ConfigError(f"the pruning plan names {name}, but the network has no module {path!r}; use its own plan")
    module = modules[path]
    check_module(path, module)
    tensor = module._parameters.get(key, module._buffers.get(key))
    if tensor is None:
        raise ConfigError(f"the pruning plan names {name}, but {path or 'the network'} has no such parameter or buffer")
    # Not isinstance: distributed, quantised and not yet initialised parameters are subclasses.
    if type(tensor) not in (nn.Parameter, Tensor) or tensor.layout != torch.strided:
        raise ConfigError(f"{name} is a {type(tensor).__name__} ({tensor.layout}); only plain dense tensors are pruned")
    if tensor.grad is not None and tensor.grad.layout != torch.strided:
        raise ConfigError(f"the gradient of {name} is sparse and can't be pruned; set it to None before")
    return module, key


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ConfigError(
            f"the pruning plan expects {name} in the shape {shape}; the network's is {tuple(tensor.shape)}; apply it "
            f"to the network that it was made for, unpruned"
        )


def check_attributes(modules: Mapping[str, nn.Module], path: str, values: Mapping[str, Attribute]) -> None:
    if path not in modules:
        raise ConfigError(
            f"the pruning plan names the module {path}, which the network does not have; use its own plan"
        )
    check_module(path, modules[path])
    for key, value in values.items():
        found = modules[path].__dict__.get(key)
        fits = type(found) in (list, tuple, torch.Size) if isinstance(value, tuple) else isinstance(found, int)
        if not fits:
            raise ConfigError(
                f"the pruning plan sets {joined(path, key)} to {value}; the network has {found!r}; use its own plan"
            )


def check_record(path: str, record: "PruningPlan | None", part: "PruningPlan") -> None:
    """Refuse a plan that keeps other channels of the same unpruned module than those that were kept."""
    for key, shape in part.shapes.items():
        if record and record.shapes.get(key) == shape and record.kept[key] != part.kept[key]:
            raise ConfigError(
                f"{joined(path, key)} has been pruned by another plan to the same shape; apply this plan to a network "
                f"that is not pruned"
            )
