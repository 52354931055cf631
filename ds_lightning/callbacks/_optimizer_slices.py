"""An optimizer's parameters and what it remembers of them, when channels leave the network."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from ds_lightning.errors import ConfigError
from ds_lightning.networks.pruning_plan import PruningPlan

State = dict[str, Any]
# Neither square nor equal to one another, so that no state fits by chance.
_TRIAL_SHAPES = ((6, 4), (5,))


class OptimizerSlices:
    """The states of the parameters that are about to change, sliced before anything is touched.

    Every tensor of a state is sliced where its dimensions are the parameter's; those of one element (`step`) and
    dimensions of size 1 (Adafactor's row and column factors) stay.

    Args:
        optimizers: torch optimizers, each with any parameter groups.
        names: the name in the plan of each parameter that changes.
        plan: what is kept.

    Raises:
        ConfigError: a state that does not have the parameter's dimensions.
    """

    def __init__(self, optimizers: Iterable[Optimizer], names: Mapping[nn.Parameter, str], plan: PruningPlan) -> None:
        self._sliced: list[tuple[Optimizer, dict[nn.Parameter, State]]] = []
        for optimizer in optimizers:
            states = {}
            for parameter in _parameters(optimizer):
                name = names.get(parameter)
                if name is not None and parameter in optimizer.state:
                    state = optimizer.state[parameter]
                    _check_state(optimizer, name, parameter, state)
                    states[parameter] = {key: _sliced(plan, name, value) for key, value in state.items()}
            self._sliced.append((optimizer, states))

    def replace(self, replaced: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Put the new parameters into the groups of the old ones, with the sliced states."""
        for optimizer, states in self._sliced:
            for group in optimizer.param_groups:
                group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
            for old, state in states.items():
                del optimizer.state[old]
                optimizer.state[replaced[old]] = state


def check_optimizers(optimizers: Iterable[Optimizer]) -> None:
    """Refuse an optimizer whose state can't be sliced; what is not torch's own is tried out on small weights.

    Raises:
        ConfigError: names the optimizer and the reason.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise _refusal(optimizer, "its history is one vector over all parameters")
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            raise _refusal(optimizer, "each rank holds the states of some parameters only")
        if type(optimizer).__module__.startswith("torch.optim"):
            continue
        try:
            trial = _trial(optimizer)
        except Exception:  # a foreign constructor or step may ask for anything; its real state is checked before use
            continue
        for parameter in _parameters(trial):
            _check_state(optimizer, "a test weight", parameter, trial.state.get(parameter, {}))


def _trial(optimizer: Optimizer) -> Optimizer:
    kind = type(optimizer)
    accepted = inspect.signature(kind.__init__).parameters
    group = optimizer.param_groups[0]
    options = {key: value for key, value in group.items() if key in accepted and key != "params"}
    # The test weights are on the CPU, whatever the model is on.
    options.update({key: False for key in ("fused", "capturable", "foreach") if options.get(key)})
    options["lr"] = float(group["lr"])  # a tensor would be shared with the user's own group
    weights = [nn.Parameter(torch.ones(shape)) for shape in _TRIAL_SHAPES]
    trial = kind(weights, **options)
    for weight in weights:
        weight.grad = torch.linspace(0.5, 1.0, weight.numel()).reshape(weight.shape)
    trial.step()
    return trial


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check_state(optimizer: Optimizer, name: str, parameter: Tensor, state: State) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor):
            fits = value.numel() == 1 or (
                value.ndim == parameter.ndim
                and all(a in (1, b) for a, b in zip(value.shape, parameter.shape, strict=True))
            )
            shown = f"of shape {tuple(value.shape)}"
        else:
            fits = not any(isinstance(leaf, Tensor) and leaf.numel() > 1 for leaf in tree_leaves(value))
            shown = f"a {type(value).__name__} of tensors"
        if not fits:
            what = f"its state {key!r} of {name} {tuple(parameter.shape)} is {shown}"
            raise _refusal(optimizer, f"{what}, which can't be matched with channels")


def _sliced(plan: PruningPlan, name: str, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value
    shape = plan.shapes[name]
    if tuple(value.shape) == shape:
        return plan.slice(name, value)
    for dimension, indices in plan.kept[name].items():
        if value.shape[dimension] == shape[dimension]:
            value = value.index_select(dimension, torch.tensor(indices, device=value.device))
    return value


def _refusal(optimizer: Optimizer, reason: str) -> ConfigError:
    return ConfigError(
        f"ProgressivePruning can't work with {type(optimizer).__name__}: {reason}. Expected an optimizer that keeps "
        "tensors of each parameter's shape, such as SGD, Adam or AdamW"
    )
