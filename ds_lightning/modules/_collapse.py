"""How embeddings lie, and whether they have all become the same."""

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_lightning.errors import CollapseWarning
from ds_lightning.functional.embedding_quality import alignment, effective_rank, uniformity

# At the start embeddings lie close together: what counts is that training does not spread them.
_FIRST_STEP = 50
# Healthy fits of digits and pairs had a spread of 0.017 and more (pairs in a narrow cone, for 100 steps) and, around
# their mean, a rank of 2.4 and more; rates far too high gave a spread of 0.003 and less, or a rank of 1.4 to 2.0.
_LEAST_SPREAD, _LEAST_RANK = 0.01, 2.0
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
            rows = F.normalize(first, dim=1)
            # Around the mean: in a narrow cone, where embeddings may lie for long, they still differ in all directions.
            self._last = (figures["spread"], effective_rank(rows - rows.mean(dim=0)))
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
                f"one point), effective rank around their mean {rank:.3g} (below {_LEAST_RANK:g} is one line); try a "
                "lower learning rate, another temperature, larger batches or stronger views",
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
