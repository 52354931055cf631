"""How often the right partner of a pair is found."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ds_lightning.functional.embedding_quality import recall_at


class RetrievalRecall(Metric):
    """Recall at k over all pairs of an epoch and all ranks: how often the partner is among the k nearest.

    Args:
        ks: the k's, at least 1 each.
        limit: pairs that each rank keeps, the first ones; more would need memory and time by their square.

    Example:
        >>> metric = RetrievalRecall(ks=(1,))
        >>> metric.update(torch.eye(3), torch.eye(3))
        >>> metric.compute()
        {'recall_at_1': tensor(1.), 'recall_at_1_reverse': tensor(1.)}
    """

    full_state_update = False
    first: list[Tensor]
    second: list[Tensor]

    def __init__(self, ks: Sequence[int] = (1, 5, 10), limit: int = 5000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ks, self.limit = tuple(ks), limit
        self._kept = 0
        self.add_state("first", default=[], dist_reduce_fx="cat")
        self.add_state("second", default=[], dist_reduce_fx="cat")

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add pairs.

        Args:
            first: (B, D) embeddings of one side, of any length.
            second: (B, D) of the other side.
        """
        room = self.limit - self._kept
        if room > 0:
            self.first.append(first[:room].detach().float())
            self.second.append(second[:room].detach().float())
            self._kept += min(room, len(first))

    def compute(self) -> dict[str, Tensor]:
        """Return `recall_at_K`, from the first side to the second, and `recall_at_K_reverse`; K below the pairs."""
        first, second = (
            torch.cat(list(side)) if isinstance(side, list) else side for side in (self.first, self.second)
        )
        found = {}
        for k in self.ks:
            if k <= len(first):
                found[f"recall_at_{k}"] = recall_at(first, second, k)
                found[f"recall_at_{k}_reverse"] = recall_at(second, first, k)
        return found

    def reset(self) -> None:
        """Forget all pairs."""
        super().reset()
        self._kept = 0
