"""How embeddings lie, and whether they have all become the same."""

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_lightning.errors import CollapseWarning
from ds_lightning.functional.embedding_quality import alignment, effective_rank, uniformity

# At the start embeddings lie close together: what counts is that training does not spread them.
_FIRST_STEP = 50
_LEAST_SPREAD, _LEAST_RANK = 0.05, 1.5
# Fewer say nothing about a rank.
_LEAST_SAMPLES = 4


class CollapseWatch:
    """Keep the last figures of the embeddings, and warn once when they have collapsed."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None
        self._warned = False

    @torch.no_grad()
    def update(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        """Return the figures of both sides' embeddings (B, D), of any length, without waiting for the device.

        Returns:
            `alignment` of the sides; `uniformity`, `effective_rank` and `spread` of the first.
        """
        first, second = first.detach().float(), second.detach().float()
        figures = {
            "alignment": alignment(first, second),
            "uniformity": uniformity(first),
            "effective_rank": effective_rank(first),
            "spread": spread(first),
        }
        if min(first.shape) >= _LEAST_SAMPLES:
            self._last = (figures["spread"], figures["effective_rank"])
        return figures

    def check(self, step: int) -> None:
        """Warn when the figures are those of a collapse; this waits for the device.

        Args:
            step: optimizer steps so far; the first 50 are let pass.
        """
        if self._warned or self._last is None or step < _FIRST_STEP:
            return
        wide, rank = (float(value) for value in self._last)
        if wide < _LEAST_SPREAD or rank < _LEAST_RANK:
            self._warned = True
            warnings.warn(
                f"the embeddings have collapsed: spread {wide:.3g} (1 is even on the sphere, below {_LEAST_SPREAD} is "
                f"one point), effective rank {rank:.3g}; try a lower learning rate, another temperature, larger "
                "batches or stronger views",
                CollapseWarning,
                stacklevel=2,
            )


def spread(embeddings: Tensor) -> Tensor:
    """Return how far embeddings lie apart: 0 when all show the same way, 1 when they are even on the sphere.

    Args:
        embeddings: (B, D), of any length.
    """
    rows = F.normalize(embeddings.detach().float(), dim=1)
    return (rows - rows.mean(dim=0)).square().sum(dim=1).mean().sqrt() if len(rows) > 1 else torch.ones_like(rows[0, 0])
