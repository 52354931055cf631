"""Embeddings of a large batch that need the activations of one micro-batch at a time."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def cached_embeddings(
    network: Callable[[Tensor], Tensor], x: Tensor, chunk_size: int, *, owner: nn.Module | None = None
) -> Tensor:
    """Embed a batch in micro-batches, so that a contrastive loss sees all of it (GradCache, arXiv 2101.06983).

    The forward pass keeps the embeddings only. The backward pass runs each micro-batch forward again, with the
    same random numbers (dropout) and under the same autocast, and then backward. So a step costs one more
    forward pass, and its gradient is exactly that of the micro-batches run without the cache.

    BatchNorm normalises each micro-batch by its own statistics, and counts it once in the running ones: the
    second forward pass works on copies of the module's buffers. A layer whose output depends on a buffer that it
    changes itself (spectral normalisation) gives another gradient than without the cache.

    Args:
        network: a module, a method of one, or any function with its module as `owner`.
        x: a batch, shape (B, ...).
        chunk_size: samples in a micro-batch, at least 1. No less than B: one plain call, nothing recomputed.
        owner: the module whose layers `network` runs; needed for a plain function only.

    Returns:
        The embeddings, shape (B, D), in the order of `x`.

    Raises:
        ValueError: `chunk_size` is under 1, `x` is empty, or the module of a function is not known.

    Example:
        >>> network = nn.Linear(3, 2)
        >>> cached_embeddings(network, torch.ones(5, 3), chunk_size=2).shape
        torch.Size([5, 2])
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected at least 1")
    if len(x) == 0:
        raise ValueError("x has no rows; expected a batch of at least one sample")
    module = owner if owner is not None else network if isinstance(network, nn.Module) else _owner(network)
    if len(x) <= chunk_size:
        return network(x)
    parts = torch.split(x, chunk_size)
    if not torch.is_grad_enabled():
        return torch.cat([network(part) for part in parts])
    contexts = partial(_contexts, module)
    return torch.cat([checkpoint(network, part, use_reentrant=False, context_fn=contexts) for part in parts])


def _owner(network: Callable[[Tensor], Tensor]) -> nn.Module:
    owner = getattr(network, "__self__", None)
    if not isinstance(owner, nn.Module):
        raise ValueError(
            f"network is {type(network).__name__}, not a module or a method of one; give its module as owner=, whose "
            "batch norms must not count a micro-batch twice"
        )
    return owner


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _on_copied_buffers(module)


@contextmanager
def _on_copied_buffers(module: nn.Module) -> Iterator[None]:
    """What the forward pass does to buffers here is forgotten: the first forward pass has done it already."""
    originals = [(m, name, buffer) for m in module.modules() for name, buffer in m.named_buffers(recurse=False)]
    for owner, name, buffer in originals:
        setattr(owner, name, buffer.clone())
    try:
        yield
    finally:
        for owner, name, buffer in originals:
            setattr(owner, name, buffer)
