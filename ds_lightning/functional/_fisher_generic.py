"""Sums of squared per-sample gradients of any parameters: by vmap over the samples, or one sample after the other."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

PerSampleLoss = Callable[[Any, Any], Tensor]
VMAP_BYTES = 2**26  # of per-sample gradients at a time, where the caller gives no chunk size


class LossOf(nn.Module):
    """The caller's loss as a module, so that its parameters can be swapped for a call."""

    def __init__(self, module: nn.Module, per_sample_loss: PerSampleLoss) -> None:
        super().__init__()
        self.module = module
        self.per_sample_loss = per_sample_loss
        # Those not asked for must not draw a graph of their own.
        self.constants = {f"module.{name}": p.detach() for name, p in module.named_parameters()}

    def forward(self, batch: Any, samples: int, use: Callable[[Tensor], Any]) -> Any:
        """Compute the loss of each sample, (B,), and return what is made of it."""
        losses = self.per_sample_loss(self.module, batch)
        if not isinstance(losses, Tensor) or losses.shape != (samples,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"per_sample_loss returned {got}; expected one loss a sample, ({samples},): use reduction='none' "
                "and sum over everything but the sample axis"
            )
        return use(losses)

    def with_parameters(
        self, leaves: Mapping[str, Tensor], batch: Any, samples: int, use: Callable[[Tensor], Any]
    ) -> Any:
        """Call it with other tensors in the place of the named parameters.

        The backward pass belongs into `use`: activation checkpoints compute again there, with the same tensors.
        """
        swapped = {f"module.{name}": leaf for name, leaf in leaves.items()}
        return functional_call(self, {**self.constants, **swapped}, (batch, samples, use))


def accumulation_type(parameter: Tensor) -> torch.dtype:
    """Return the type in which squares are summed: at least float32."""
    return torch.promote_types(parameter.dtype, torch.float32)


def vmap_squares(loss: LossOf, batch: Any, samples: int, leaves: Mapping[str, Tensor], chunk: int) -> dict[str, Tensor]:
    """Sum the squared per-sample gradients of `leaves` over a batch, `chunk` samples at a time."""

    def single(leaves: dict[str, Tensor], sample: Any) -> Tensor:
        only: Tensor = loss.with_parameters(leaves, tree_map(lambda x: x.unsqueeze(0), sample), 1, lambda x: x[0])
        return only

    of_samples = vmap(grad(single), in_dims=(None, 0))
    total = {name: torch.zeros_like(leaf, dtype=accumulation_type(leaf)) for name, leaf in leaves.items()}
    for start in range(0, samples, chunk):
        part = tree_map(lambda x, start=start: x[start : start + chunk], batch)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule
            found = of_samples(dict(leaves), part)
        for name, gradients in found.items():
            total[name].add_(gradients.to(total[name].dtype).square().sum(0))
    return total


def loop_squares(loss: LossOf, batch: Any, samples: int, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum the squared per-sample gradients of `leaves` over a batch, one backward pass a sample."""
    tracked = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}

    def gradients(single: Tensor) -> tuple[Tensor | None, ...]:
        if not single.requires_grad:
            return (None,) * len(tracked)
        return torch.autograd.grad(single, list(tracked.values()), torch.ones_like(single), allow_unused=True)

    total = {name: torch.zeros_like(leaf, dtype=accumulation_type(leaf)) for name, leaf in leaves.items()}
    # cuDNN has no backward pass for recurrent layers in eval mode.
    recurrent = any(isinstance(layer, nn.RNNBase) for layer in loss.modules())
    with torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext():
        for i in range(samples):
            part = tree_map(lambda x, i=i: x[i : i + 1], batch)
            found = loss.with_parameters(tracked, part, 1, gradients)
            for name, gradient in zip(tracked, found, strict=True):
                if gradient is not None:
                    gradient = (gradient.to_dense() if gradient.is_sparse else gradient).to(total[name].dtype)
                    total[name].addcmul_(gradient, gradient)
    return total


def vmap_chunk(leaves: Mapping[str, Tensor]) -> int:
    """Return how many samples' gradients fit into the storage set aside for them, 1 to 32."""
    size = sum(leaf.numel() * accumulation_type(leaf).itemsize for leaf in leaves.values())
    return min(32, max(1, VMAP_BYTES // max(1, size)))
