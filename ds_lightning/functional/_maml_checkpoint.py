"""Inner steps whose graph is made again in the backward pass, so that memory does not grow with their number."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Step = Callable[..., tuple[Tensor, ...]]


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Step, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        ctx.device = tensors[0].device
        ctx.random = _random_state(ctx.device)
        ctx.autocast = autocast_state(ctx.device)
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            outputs = step(False, *_leaves(tensors, [tensor.requires_grad for tensor in tensors]))
        return tuple(output.detach() for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        leaves = _leaves(ctx.saved_tensors, needed)
        with _replayed(ctx), torch.enable_grad():
            outputs = ctx.step(True, *leaves)
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        return (None, *(next(found) if need else None for need in needed))


def autocast_state(device: torch.device) -> dict[str, Any]:
    """Return the arguments of `torch.autocast` that say what holds now, without its cache of cast weights.

    The cache would keep a copy of every step's parameters, and a weight first cast without gradients would have
    none afterwards.
    """
    return {
        "device_type": device.type,
        "enabled": torch.is_autocast_enabled(device.type),
        "dtype": torch.get_autocast_dtype(device.type),
        "cache_enabled": False,
    }


def checkpointed(step: Step, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Call `step(create_graph, *tensors)` keeping its inputs alone; the backward pass calls it again.

    Args:
        step: a function of the tensors and of nothing else that needs a gradient: gradients reach `tensors` only.
            Its first argument says whether the outcome must be differentiable (twice, then, inside).
        tensors: inputs, at least one; the random state and autocast are those of this call in both passes.
    """
    outputs: tuple[Tensor, ...] = _Checkpointed.apply(step, *tensors)
    return outputs


def _leaves(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    return [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), own


@contextmanager
def _replayed(ctx: Any) -> Iterator[None]:
    """The random state and the autocast of the forward pass."""
    shared, own = ctx.random
    devices = [] if own is None else [ctx.device]
    with torch.random.fork_rng(devices=devices, device_type=ctx.device.type), torch.autocast(**ctx.autocast):
        torch.set_rng_state(shared)
        if own is not None:
            torch.get_device_module(ctx.device).set_rng_state(own, ctx.device)
        yield
