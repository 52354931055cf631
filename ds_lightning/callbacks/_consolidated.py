"""What elastic weight consolidation remembers of the tasks that have ended, and its pull on the parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_lightning.errors import ConfigError
from ds_lightning.functional.consolidation import (
    add_penalty_gradients,
    merge_quadratics,
    quadratic_penalty,
    weighted_mean,
)
from ds_lightning.networks.pruning_plan import PruningPlan

from ._layers import plain_names

Tensors = dict[str, Tensor]
_GROUPS = ("importance", "anchor", "start")


class Consolidated:
    """All tasks so far as one quadratic: an importance and an anchor for each element of each parameter.

    Tensors are replaced and never changed in place, so a checkpoint that is being written keeps its own.

    Args:
        keeps_start: whether to keep the parameters as they were after the last task.
    """

    def __init__(self, keeps_start: bool) -> None:
        self.keeps_start = keeps_start
        self.importance: Tensors = {}
        self.anchor: Tensors = {}
        self.start: Tensors = {}
        self.constant = torch.zeros((), dtype=torch.float64)
        self.tasks = 0
        self._bound: dict[int, _Bound] = {}

    @torch.no_grad()
    def align(self, parameters: Mapping[str, nn.Parameter], everything: Mapping[str, nn.Parameter]) -> None:
        """Fit the memory to parameters that are new, have more rows or are on another device.

        What is new has no importance, and itself as anchor.

        Args:
            parameters: those to consolidate, by name.
            everything: all of the module's.

        Raises:
            ConfigError: a parameter of an earlier task is gone, or changed other than by more rows.
        """
        if self.tasks == 0:
            return
        gone = [name for name in self.anchor if name not in everything]
        if gone:
            raise ConfigError(
                f"the module has no parameter {', '.join(gone[:3])}, which an earlier task was consolidated with; "
                "expected the same module, or a new ElasticWeightConsolidation"
            )
        for name, theta in parameters.items():
            value = theta.detach()
            wide = value.to(torch.promote_types(value.dtype, torch.float32))
            old = self.anchor.get(name)
            same = old is not None and old.shape == value.shape
            if not same:
                rows = 0 if old is None else len(old)
                if old is not None and (
                    old.ndim == 0 or old.shape[1:] != value.shape[1:] or value.ndim == 0 or len(value) < rows
                ):
                    raise ConfigError(
                        f"{name} is of shape {tuple(value.shape)} and was {tuple(old.shape)} when an earlier task was "
                        "consolidated; expected the same, or more rows (outputs for new classes)"
                    )
                self.importance[name] = _grown(self.importance.get(name), torch.zeros_like(wide), rows)
                self.anchor[name] = _grown(old, wide, rows)
            else:
                self.importance[name] = self.importance[name].to(value.device)
                self.anchor[name] = self.anchor[name].to(value.device)
            if self.keeps_start:
                before = self.start.get(name)
                if before is None or before.shape != value.shape:
                    self.start[name] = _grown(before, wide, 0 if before is None else len(before))
                else:
                    self.start[name] = before.to(value.device)

    def add(self, fisher: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], decay: float | None) -> None:
        """Take a task in, at the parameters as they are.

        Args:
            fisher: normalised, by name.
            parameters: of the same names.
            decay: None adds the quadratics up; a number lets the earlier ones fade and moves the anchor.
        """
        with torch.inference_mode(False), torch.no_grad():
            constant = torch.zeros((), dtype=torch.float64)
            for name, new in fisher.items():
                theta = _copy(parameters[name])
                if name not in self.anchor:
                    self.importance[name], self.anchor[name] = new.clone(), theta
                elif decay is None:
                    self.importance[name], self.anchor[name], rest = merge_quadratics(
                        self.importance[name], self.anchor[name], new, theta
                    )
                    constant = constant + rest.cpu()
                else:
                    self.importance[name], self.anchor[name] = decay * self.importance[name] + new, theta
                if self.keeps_start:
                    self.start[name] = theta.clone()
            self.constant = self.constant + constant
            self.tasks += 1
            self._bound.clear()

    def move_between(
        self, fisher: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], weight: float
    ) -> float:
        """Move the parameters to the mean of old and new, weighted by `weight * importance` and `fisher`.

        Returns:
            How much of the way from the parameters to the anchor they went, in [0, 1].
        """
        moved = whole = 0.0
        with torch.inference_mode(False), torch.no_grad():
            for name, new in fisher.items():
                theta, anchor = _copy(parameters[name]), self.anchor[name]
                mean = weighted_mean(anchor, weight * self.importance[name], theta, new)
                moved += float((mean - theta).square().sum(dtype=torch.float64))
                whole += float((anchor - theta).square().sum(dtype=torch.float64))
                parameters[name].copy_(mean)
        return (moved / whole) ** 0.5 if whole else 0.0

    def pull(self, optimizer: Optimizer, names: "Names", strength: float, scale: float) -> None:
        """Add the penalty's gradient to those of the parameters that an optimizer steps."""
        bound = self._bound.get(id(optimizer))
        if bound is None or not bound.still(optimizer):
            bound = self._bound[id(optimizer)] = _Bound(optimizer, names, self)
        for group, entries in zip(optimizer.param_groups, bound.groups, strict=True):
            stepped = [(theta, name) for theta, name in entries if theta.grad is not None]
            for theta, name in stepped:
                if theta.grad.layout != torch.strided:
                    raise ConfigError(
                        f"{name} has a sparse gradient, to which a penalty on every element can't be added; expected "
                        "sparse=False, or its name in exclude"
                    )
            add_penalty_gradients(
                [theta.grad for theta, _ in stepped],
                [theta.detach() for theta, _ in stepped],
                [self.importance[name] for _, name in stepped],
                [self.anchor[name] for _, name in stepped],
                strength,
                group.get("lr", 0.0),
                scale,
            )

    def penalty(self, parameters: Mapping[str, nn.Parameter]) -> float:
        """Return the sum of the tasks' quadratics at the parameters, without the strength."""
        names = [name for name in self.anchor if name in parameters]
        values = [parameters[name] for name in names]
        importance = [self.importance[name] for name in names]
        return float(quadratic_penalty(values, importance, [self.anchor[name] for name in names], self.constant))

    def remove_channels(self, plan: PruningPlan) -> None:
        """Keep what the plan keeps of each tensor; the rest that merging left is a number and stays."""
        for group in _GROUPS:
            setattr(self, group, {name: plan.slice(name, tensor) for name, tensor in getattr(self, group).items()})
        self._bound.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and a count."""
        groups = {group: dict(getattr(self, group)) for group in _GROUPS}
        return {**groups, "constant": self.constant, "tasks": self.tasks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take tensors over; `align` brings them to the device."""
        for group in _GROUPS:
            setattr(self, group, dict(state[group]))
        self.constant = state["constant"].cpu()
        self.tasks = state["tasks"]
        self._bound.clear()

    def release(self) -> None:
        """Let go of the optimizers' parameters."""
        self._bound.clear()


class Names:
    """The parameters to consolidate of a module, looked up when an optimizer's parameters change."""

    def __init__(self, module: nn.Module, select: Any) -> None:
        self.module, self._select = module, select

    def everything(self) -> dict[str, nn.Parameter]:
        """Return all parameters by name."""
        return plain_names(self.module)

    def selected(self) -> dict[str, nn.Parameter]:
        """Return the trainable ones that are not left out."""
        return {name: p for name, p in self.everything().items() if p.requires_grad and self._select(name)}


class _Bound:
    """The parameters of an optimizer with their names, and whether they are still the same."""

    def __init__(self, optimizer: Optimizer, names: Names, memory: Consolidated) -> None:
        selected = names.selected()
        memory.align(selected, names.everything())
        by_id = {id(p): name for name, p in selected.items() if name in memory.anchor}
        self._all = [p for group in optimizer.param_groups for p in group["params"]]
        self._shapes = [p.shape for p in self._all]
        self.groups = [
            [(p, by_id[id(p)]) for p in group["params"] if id(p) in by_id] for group in optimizer.param_groups
        ]

    def still(self, optimizer: Optimizer) -> bool:
        now = [p for group in optimizer.param_groups for p in group["params"]]
        return len(now) == len(self._all) and all(
            a is b and a.shape == shape for a, b, shape in zip(now, self._all, self._shapes, strict=True)
        )


def _grown(old: Tensor | None, like: Tensor, rows: int) -> Tensor:
    """Return a copy of `like` whose first rows are the old ones."""
    grown = like.clone()
    if old is not None:
        grown[:rows] = old.to(grown.device)
    return grown


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
