"""Labels from the model's own distribution, for the true Fisher information."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._fisher_generic import PerSampleLoss


def model_labels(
    module: torch.nn.Module,
    batches: Iterable[Any],
    logits_of: Callable[[Any, Any], Tensor],
    *,
    generator: torch.Generator | None,
    draws: int | None = 1,
) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Give every batch labels from the model's own distribution, which makes the Fisher `true`, not `empirical`.

    The labels are fixed before any gradient is taken, so that all methods see the same ones. Use with `label_loss`.

    Args:
        module: the classifier, in eval mode.
        batches: as in `fisher_diagonal`; labels in them are not used.
        logits_of: `(module, batch) -> (B, C)`.
        generator: where the labels are drawn; its device may differ from the module's. Not used when draws is None.
        draws: labels drawn for each sample, >= 1. None: the exact expectation over all C classes, at C times the cost
            of one draw.

    Yields:
        `(batch, labels, scale)`, the last two (B,): one for each draw or class. The loss is multiplied by the scale
        (1 for a draw, `sqrt(C p)` for a class), and the mean over all that is yielded is the true Fisher.

    Raises:
        ValueError: when draws is below 1, the generator is missing, or the logits are not (B, C).

    Example:
        >>> from ds_lightning.functional import fisher_diagonal
        >>> net, logits = torch.nn.Linear(2, 3).eval(), lambda m, x: m(x)
        >>> labelled = model_labels(net, [torch.ones(4, 2)], logits, generator=None, draws=None)
        >>> fisher_diagonal(net, labelled, label_loss(logits))["bias"].shape
        torch.Size([3])
    """
    if draws is not None and draws < 1:
        raise ValueError(f"draws is {draws}; expected a whole number >= 1, or None for all classes")
    if draws is not None and generator is None:
        raise ValueError(
            "generator is None; expected a torch.Generator, since labels are drawn (draws=None draws none)"
        )
    for batch in batches:
        with torch.no_grad():
            logits = logits_of(module, batch)
            if logits.ndim != 2:
                raise ValueError(f"logits_of returned {tuple(logits.shape)}; expected logits, (B, C)")
            p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
        if draws is None:
            for c in range(p.shape[1]):
                scale = (p[:, c] * p.shape[1]).sqrt()
                yield batch, torch.full((len(p),), c, device=p.device), scale
            continue
        assert generator is not None
        drawn = torch.multinomial(p.to(generator.device), draws, replacement=True, generator=generator).to(p.device)
        for labels in drawn.unbind(1):
            yield batch, labels, torch.ones_like(p[:, 0])


def label_loss(logits_of: Callable[[Any, Any], Tensor]) -> PerSampleLoss:
    """Return the loss of what `model_labels` yields: the scaled cross-entropy of each sample.

    Args:
        logits_of: `(module, batch) -> (B, C)`, with the batch as it was given to `model_labels`.

    Returns:
        `(module, (batch, labels, scale)) -> (B,)`, for `fisher_diagonal`.
    """

    def loss(module: torch.nn.Module, labelled: tuple[Any, Tensor, Tensor]) -> Tensor:
        batch, labels, scale = labelled
        return scale * F.cross_entropy(logits_of(module, batch), labels, reduction="none")

    return loss
