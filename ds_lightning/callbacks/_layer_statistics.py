"""Norms of gradients and momenta, read one period late, and their averages for each layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_lightning.functional.gradient_statistics import ema_update, layer_gradient_moments

from ._layers import Layer
from ._linear_optimizers import coupled_decay, momentum_of

_SETTLED = 1_000_000  # gradients seen by a momentum that is older than the callback


@dataclass
class Reading:
    """The norms of one step on their way to the host, one entry a layer.

    `norms` is (2, L): of the gradient (NaN where there is none) and of the momentum buffer. It lies in pinned memory
    on CUDA and is valid once `copied` has happened.
    """

    names: list[str]
    norms: Tensor
    scale: list[float]
    beta: list[float]
    seen: list[int]
    copied: torch.cuda.Event | None = None

    def moments(self) -> Tensor:
        """Return the estimates of `||E g||^2` and `E ||g||^2`, (2, L), float64 on the host."""
        if self.copied is not None:
            # A period old, so this seldom waits. Asking `query()` instead would let ranks read at different steps.
            self.copied.synchronize()
        norms = self.norms.double()
        momentum = norms[1] * torch.tensor(self.scale, dtype=torch.float64)
        step = torch.tensor(self.seen, dtype=torch.float64) + 1
        beta = torch.tensor(self.beta, dtype=torch.float64)
        return torch.stack(layer_gradient_moments(norms[0] ** 2, momentum**2, beta, step))

    def state_dict(self) -> dict[str, Any]:
        if self.copied is not None:
            self.copied.synchronize()
        return {
            "names": list(self.names),
            "norms": self.norms.clone(),
            "scale": list(self.scale),
            "beta": list(self.beta),
            "seen": list(self.seen),
        }


@dataclass
class LayerStatistics:
    """What is known of each layer: averages of its moments, gradients seen, and the multiplier in use."""

    names: list[str] = field(default_factory=list)
    moments: Tensor = field(default_factory=lambda: torch.zeros(2, 0, dtype=torch.float64))
    weight: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    seen: list[int] = field(default_factory=list)
    multipliers: list[float] = field(default_factory=list)

    def aligned(self, names: Sequence[str]) -> "LayerStatistics":
        """Return the statistics of these layers, matched by name; a new layer starts from nothing, at 1."""
        at = {name: i for i, name in enumerate(self.names)}
        rows = [at.get(name) for name in names]
        return LayerStatistics(
            list(names),
            take(self.moments, rows, 0.0),
            take(self.weight, rows, 0.0),
            [0 if i is None else self.seen[i] for i in rows],
            [1.0 if i is None else self.multipliers[i] for i in rows],
        )

    def add(self, reading: Reading, decay: float) -> list[bool]:
        """Take a reading into the averages; say for each layer whether it had a finite value."""
        at = {name: i for i, name in enumerate(reading.names)}
        value = take(reading.moments(), [at.get(name) for name in self.names], float("nan"))
        self.moments, self.weight = ema_update(self.moments, self.weight, value, decay)
        return [bool(ok) for ok in torch.isfinite(value).all(dim=0)]

    def state_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "moments": self.moments.clone(),
            "weight": self.weight.clone(),
            "seen": list(self.seen),
            "multipliers": list(self.multipliers),
        }


def take(values: Tensor, rows: Sequence[int | None], fill: float) -> Tensor:
    """Return the columns of the last dimension in this order, `fill` where there is none."""
    padded = torch.cat([values, values.new_full((*values.shape[:-1], 1), fill)], dim=-1)
    return padded[..., [values.shape[-1] if i is None else i for i in rows]]


def read_norms(optimizer: Optimizer, layers: Sequence[Layer], statistics: LayerStatistics, broadcast: bool) -> Reading:
    """Start to read the norms of the weights' gradients and momenta, without waiting for the device.

    Args:
        optimizer: holds the momenta; its gradients are final (reduced, accumulated, clipped).
        layers: the layers, at least one, in the order of `statistics.names`.
        statistics: gives, and gets, the number of gradients that each momentum has seen.
        broadcast: send rank 0's norms to all ranks.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    grads: dict[int, Tensor] = {}
    buffers: dict[int, Tensor] = {}
    scale, beta, decay = [0.0] * len(layers), [0.0] * len(layers), [0.0] * len(layers)
    for i, layer in enumerate(layers):
        group = group_of[id(layer.weight)]
        if layer.weight.grad is not None:
            grads[i] = layer.weight.grad
        momentum = momentum_of(optimizer, group, layer.weight)
        if momentum is None:
            continue
        if statistics.seen[i] == 0:
            statistics.seen[i] = _SETTLED
        buffers[i], scale[i], beta[i] = momentum
        if momentum.scale > 0:
            decay[i] = coupled_decay(optimizer, group) * (1 - beta[i] ** statistics.seen[i]) / momentum.scale
    if any(decay):
        # L2 decay enters the momentum but not the gradient: without it, the mean would count the weights as signal.
        pulls = torch._foreach_mul([layers[i].weight.detach() for i in buffers], [decay[i] for i in buffers])
        torch._foreach_sub_(pulls, list(buffers.values()))
        buffers = dict(zip(buffers, pulls, strict=True))

    device = layers[0].weight.device
    absent = torch.full((), float("nan"), device=device)
    nothing = torch.zeros((), device=device)
    grad_norms, buffer_norms = _norms(grads, device), _norms(buffers, device)
    gradient = torch.stack([grad_norms.get(i, absent) for i in range(len(layers))])
    loss_scale = getattr(optimizer, "grad_scale", None)
    if isinstance(loss_scale, Tensor):
        # A fused optimizer unscales inside its kernel: here the gradients are still scaled.
        gradient = gradient / loss_scale.to(device, non_blocking=True)
    norms = torch.stack([gradient, torch.stack([buffer_norms.get(i, nothing) for i in range(len(layers))])])
    if broadcast:
        # All-reduced gradients are the same bits on all ranks, but nothing promises that of a norm on another kind of
        # processor or with another number of threads; a last bit would let the replicas drift apart for ever. One
        # broadcast of 2 L numbers a period makes it certain.
        torch.distributed.broadcast(norms, src=0)
    reading = Reading(statistics.names, norms, scale, beta, list(statistics.seen))
    if norms.is_cuda:
        reading.norms = torch.empty(norms.shape, dtype=norms.dtype, pin_memory=True)
        reading.norms.copy_(norms, non_blocking=True)
        reading.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        reading.copied.record(torch.cuda.current_stream(norms.device))
    else:
        reading.norms = norms.cpu()
    return reading


def _norms(tensors: dict[int, Tensor], device: torch.device) -> dict[int, Tensor]:
    """Norms of tensors as float32 scalars (float64 where they are that) on one device."""
    if not tensors:
        return {}
    values = list(tensors.values())
    # Half precision would overflow or lose digits; a wider type than asked for is refused by the kernel.
    dtype = None if any(value.dtype == torch.float64 for value in values) else torch.float32
    norms = torch._foreach_norm(values, 2, dtype)
    return {i: n.to(device, torch.float32, non_blocking=True) for i, n in zip(tensors, norms, strict=True)}
