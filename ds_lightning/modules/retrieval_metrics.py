"""How often the right partner of a pair is found."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler
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
        if len(self.first) == 0:
            return {}
        first, second = (
            torch.cat(list(side)) if isinstance(side, list) else side for side in (self.first, self.second)
        )
        found = {}
        for k in self.ks:
            if k <= len(first):
                found[f"recall_at_{k}"] = recall_at(first, second, k)
                found[f"recall_at_{k}_reverse"] = recall_at(second, first, k)
        return found

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # torchmetrics can't gather from a rank that has no row: it doesn't know how long one is.
        width = torch.tensor([rows.shape[1] for rows in self.first][:1] or [1], device=self.device)
        torch.distributed.all_reduce(width, torch.distributed.ReduceOp.MAX)
        if not self.first:
            self.first, self.second = ([torch.zeros(0, int(width), device=self.device)] for _ in range(2))
        super()._sync_dist(*args, **kwargs)

    def reset(self) -> None:
        """Forget all pairs."""
        super().reset()
        self._kept = 0


def unpadded(trainer: pl.Trainer, batch_idx: int, size: int) -> int:
    """Return how many of a validation batch's rows, the first ones, are not there for a second time.

    A DistributedSampler gives the ranks one sample after the other in turn, and repeats some at the end, so that all
    ranks have as many. A pair that is there twice would find itself instead of its partner.

    Args:
        trainer: with one validation loader.
        batch_idx: of the batch in it.
        size: its rows.
    """
    loader: Any = trainer.val_dataloaders
    loader = loader[0] if isinstance(loader, list | tuple) and loader else loader
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or loader.batch_size is None:
        return size
    samples, ranks, rank = len(sampler.dataset), sampler.num_replicas, sampler.rank  # type: ignore[arg-type]
    mine = len(range(rank, samples, ranks))
    before: int = batch_idx * loader.batch_size
    return max(0, min(size, mine - before))
