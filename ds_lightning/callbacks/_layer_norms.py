"""Norms of gradients, momenta and weights of each layer, read without waiting for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._layer_shards import local_part, norms_over_shards, reading_device
from ._layer_statistics import LayerStatistics, Reading
from ._layers import Layer
from ._linear_optimizers import coupled_decay, momentum_of

_SETTLED = 1_000_000  # gradients seen by a momentum that is older than the callback


def read_norms(
    optimizer: Optimizer,
    layers: Sequence[Layer],
    statistics: LayerStatistics,
    broadcast: bool,
    extra: Sequence[str] = (),
) -> Reading:
    """Start to read the norms of the weights' gradients and momenta, without waiting for the device.

    Args:
        optimizer: holds the momenta; its gradients are final (reduced, accumulated, clipped).
        layers: the layers, at least one, in the order of `statistics.names`.
        statistics: gives, and gets, the number of gradients that each momentum has seen.
        broadcast: send rank 0's norms to all ranks.
        extra: more rows to read, of `weight`, `sum` and `inner`.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    grads: dict[int, Tensor] = {}
    buffers: dict[int, Tensor] = {}
    scale, beta, decay = [0.0] * len(layers), [0.0] * len(layers), [0.0] * len(layers)
    for i, layer in enumerate(layers):
        group = group_of[id(layer.weight)]
        if layer.weight.grad is not None:
            grads[i] = local_part(layer.weight.grad, layer.weight)
        momentum = momentum_of(optimizer, group, layer.weight)
        if momentum is None:
            continue
        if statistics.seen[i] == 0:
            statistics.seen[i] = _SETTLED
        buffers[i], scale[i], beta[i] = local_part(momentum.buffer, layer.weight), momentum.scale, momentum.beta
        if momentum.scale > 0:
            decay[i] = coupled_decay(optimizer, group) * (1 - beta[i] ** statistics.seen[i]) / momentum.scale
    weights = [local_part(layer.weight.detach()) for layer in layers]
    if any(decay):
        # L2 decay enters the momentum but not the gradient: without it, the mean would count the weights as signal.
        pulls = torch._foreach_mul([weights[i] for i in buffers], [decay[i] for i in buffers])
        torch._foreach_sub_(pulls, list(buffers.values()))
        buffers = dict(zip(buffers, pulls, strict=True))

    device = reading_device(layers[0].weight)
    dtype = _wide(*weights)
    absent = torch.full((), float("nan"), device=device, dtype=dtype)
    nothing = torch.zeros((), device=device, dtype=dtype)
    grad_norms, buffer_norms = _norms(grads, device, dtype), _norms(buffers, device, dtype)
    rows = {
        "gradient": torch.stack([grad_norms.get(i, absent) for i in range(len(layers))]),
        "momentum": torch.stack([buffer_norms.get(i, nothing) for i in range(len(layers))]),
    }
    if "weight" in extra:
        weight_norms = _norms(dict(enumerate(weights)), device, dtype)
        rows["weight"] = torch.stack([weight_norms[i] for i in range(len(layers))])
    if "sum" in extra:
        sums = {i: grad.sum(dtype=dtype).to(device, non_blocking=True) for i, grad in grads.items()}
        rows["sum"] = torch.stack([sums.get(i, absent) for i in range(len(layers))])
    if "inner" in extra:
        inner = {i: (weights[i] * grad).sum(dtype=dtype).to(device, non_blocking=True) for i, grad in grads.items()}
        rows["inner"] = torch.stack([inner.get(i, absent) for i in range(len(layers))])
    loss_scale = getattr(optimizer, "grad_scale", None)
    if isinstance(loss_scale, Tensor):
        # A fused optimizer unscales inside its kernel: here the gradients are still scaled.
        loss_scale = loss_scale.to(device, non_blocking=True)
        rows.update({name: rows[name] / loss_scale for name in ("gradient", "sum", "inner") if name in rows})
    rows = norms_over_shards(rows, [layer.weight for layer in layers])
    norms = torch.stack(list(rows.values()))
    if broadcast:
        # All-reduced gradients are the same bits on all ranks, but nothing promises that of a norm on another kind of
        # processor or with another number of threads; a last bit would let the replicas drift apart for ever. One
        # broadcast of 2 or 3 L numbers a period makes it certain.
        torch.distributed.broadcast(norms, src=0)
    reading = Reading(statistics.names, norms, scale, beta, list(statistics.seen), list(rows))
    if norms.is_cuda:
        reading.norms = torch.empty(norms.shape, dtype=norms.dtype, pin_memory=True)
        reading.norms.copy_(norms, non_blocking=True)
        reading.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        reading.copied.record(torch.cuda.current_stream(norms.device))
    else:
        reading.norms = norms.cpu()
    return reading


def _wide(*tensors: Tensor) -> torch.dtype:
    """Return float32, in which half precision would not overflow; float64 where a tensor is that."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _norms(tensors: dict[int, Tensor], device: torch.device, dtype: torch.dtype) -> dict[int, Tensor]:
    """Norms of tensors as scalars of one type on one device."""
    if not tensors:
        return {}
    values = list(tensors.values())
    # A wider type than asked for is refused by the kernel.
    norms = torch._foreach_norm(values, 2, None if _wide(*values) == torch.float64 else torch.float32)
    return {i: norm.to(device, dtype, non_blocking=True) for i, norm in zip(tensors, norms, strict=True)}
