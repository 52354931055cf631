"""Orders that need no saved state: they follow from a seed and the epoch's number."""

from collections.abc import Iterator, Sized
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from ds_lightning.functional.seeds import derived_seed


def next_epoch(trainer: L.Trainer) -> int:
    """Return the epoch that a trainer is to run next, for a loader that is made now.

    On resume Lightning tells samplers the epoch too late for workers, which have begun by then. And after a checkpoint
    from an epoch's end, `trainer.current_epoch` is still that epoch while the loaders are made.
    """
    # Typed as the base class of what it is.
    progress: Any = trainer.fit_loop.epoch_progress.current
    return int(progress.processed)


class EpochSampler(DistributedSampler[Any]):
    """Shuffles anew each epoch, with an order that depends on the seed and the epoch's number alone.

    Lightning calls `set_epoch` with the trainer's epoch, which is in every checkpoint: so a resumed run goes on
    with the order of an uninterrupted one. In a plain loop each pass counts one epoch.

    Args:
        dataset: what is sampled.
        seed: the user's seed.
        num_replicas: how many processes share the data.
        rank: which one this is.
        epoch_cell: an int64 scalar in shared memory that is told each epoch's number, for the workers.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Sized,
        *,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
        epoch_cell: Tensor | None = None,
    ) -> None:
        super().__init__(
            dataset,  # type: ignore[arg-type]  # only its length is used
            num_replicas=num_replicas,
            rank=rank,
            shuffle=True,
            seed=derived_seed(seed, "order"),
        )
        self.epoch_cell = epoch_cell

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's indices of the current epoch, and move on to the next epoch."""
        order = super().__iter__()
        if self.epoch_cell is not None:
            self.epoch_cell.fill_(self.epoch)
        self.epoch += 1
        return order


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random order of the samples in which every stretch holds each class in its share.

    The first n of it are a stratified sample of size n, the next m another one, with no overlap; the sample of
    size n is part of the one of size n + 1. Each class's count is within one of its share.

    Args:
        labels: class numbers, shape (N,), int64.
        generator: on the CPU.

    Returns:
        A permutation, shape (N,), int64.

    Example:
        >>> labels = torch.tensor([0] * 8 + [1] * 4)
        >>> order = stratified_order(labels, torch.Generator().manual_seed(0))
        >>> labels[order[:3]].bincount(), labels[order[3:6]].bincount()
        (tensor([2, 1]), tensor([2, 1]))
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    counts = torch.bincount(labels)
    # Group by class, keeping the shuffled order inside each, and spread every class evenly over (0, 1).
    grouped = shuffled[torch.argsort(labels[shuffled], stable=True)]
    kind = labels[grouped]
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[kind]
    phase = torch.rand(len(counts), generator=generator, dtype=torch.float64)[kind]
    return grouped[torch.argsort((place + phase) / counts[kind], stable=True)]
