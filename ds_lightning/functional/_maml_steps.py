"""Gradient steps of one task, or of many at once, on parameters that stay in the graph."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ds_lightning.functional._maml_checkpoint import checkpointed

Loss = Callable[[Tensor, Tensor], Tensor]
Parameters = dict[str, Tensor]


class Steps(NamedTuple):
    """How to adapt.

    Attributes:
        network: the module whose parameters are replaced.
        loss: of one task's outputs and labels, a scalar.
        names: the parameters that adapt.
        inner_lr: one rate, or a tensor for each name.
        number: of steps.
        order: 1 or 2.
        checkpoint: make each step's graph again in the backward pass.
        many: the parameters that adapt, inputs and labels have a leading dimension of tasks.
        detach: keep no graph at all.
    """

    network: nn.Module
    loss: Loss
    names: tuple[str, ...]
    inner_lr: float | Mapping[str, Tensor]
    number: int
    order: int
    checkpoint: bool = False
    many: bool = False
    detach: bool = False

    def outputs(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Map inputs (N, ...), or (T, N, ...) of many tasks, to outputs with those parameters."""
        return self._each(self._call, parameters, x)

    def losses(self, parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss (), or the losses (T,) of many tasks."""
        return self._each(self._loss, parameters, x, y)

    def _call(self, parameters: Parameters, x: Tensor) -> Tensor:
        outputs: Tensor = functional_call(self.network, parameters, (x,))
        return outputs

    def _loss(self, parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
        outputs = self._call(parameters, x)
        return self.loss(outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs, y)

    def _each(self, function: Callable[..., Tensor], parameters: Parameters, *data: Tensor) -> Tensor:
        if not self.many:
            return function(parameters, *data)
        dimensions = {name: 0 if name in self.names else None for name in parameters}
        each = vmap(function, in_dims=(dimensions, *[0] * len(data)), randomness="different")
        found: Tensor = each(parameters, *data)
        return found

    def trajectory(self, parameters: Parameters, x: Tensor, y: Tensor) -> Iterator[Parameters]:
        """Yield all parameters after 0, 1, ..., `number` steps.

        Args:
            parameters: all of the network's; of many tasks, (T, ...) each that adapts.
            x: inputs of the support set, (N, ...) or (T, N, ...).
            y: its labels.
        """
        now = {name: self._start(name, value) for name, value in parameters.items()}
        yield now
        for step in range(self.number):
            now = self._step(now, self._rates(step), x, y)
            yield now

    def _start(self, name: str, value: Tensor) -> Tensor:
        if self.detach:
            return value.detach().requires_grad_(name in self.names)
        if name in self.names and not value.requires_grad:
            return value.detach().requires_grad_()
        return value

    def _rates(self, step: int) -> list[float | Tensor]:
        if not isinstance(self.inner_lr, Mapping):
            return [self.inner_lr] * len(self.names)
        rates: list[float | Tensor] = []
        for name in self.names:
            rate = self.inner_lr[name]
            # One dimension more than the parameter is a rate for each step; later steps keep the last.
            if rate.dim() > self._dimensions(name):
                rate = rate[min(step, len(rate) - 1)]
            rates.append(rate.detach() if self.detach else rate)
        return rates

    def _dimensions(self, name: str) -> int:
        return self.network.get_parameter(name).dim()

    def _step(self, now: Parameters, rates: list[float | Tensor], x: Tensor, y: Tensor) -> Parameters:
        others = [name for name in now if name not in self.names]
        tensors = [now[name] for name in (*self.names, *others)]
        fixed = [None if isinstance(rate, Tensor) else rate for rate in rates]
        learned = [rate for rate in rates if isinstance(rate, Tensor)]
        adapting = len(self.names)

        # It uses nothing but its arguments, so that gradients get through a checkpoint.
        def step(create_graph: bool, x: Tensor, y: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            values, left, rates = tensors[:adapting], tensors[adapting : len(now)], iter(tensors[len(now) :])
            parameters = dict(zip((*self.names, *others), (*values, *left), strict=True))
            # The gradient of the sum is every task's own, as tasks share no parameters here. It is taken outside
            # the vmap: torch.func.grad inside gives wrong second derivatives through BatchNorm.
            loss = self.losses(parameters, x, y).sum()
            gradients = torch.autograd.grad(loss, values, create_graph=create_graph, materialize_grads=True)
            return tuple(
                value - (next(rates) if rate is None else rate) * gradient
                for value, rate, gradient in zip(values, fixed, gradients, strict=True)
            )

        if self.checkpoint and self.order == 2 and not self.detach:
            moved = checkpointed(step, x, y, *tensors, *learned)
        else:
            moved = step(self.order == 2 and not self.detach, x, y, *tensors, *learned)
        if self.detach:
            moved = tuple(value.detach().requires_grad_() for value in moved)
        return {**now, **dict(zip(self.names, moved, strict=True))}
