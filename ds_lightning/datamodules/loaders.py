"""Loaders whose order follows from the seed, the epoch and the process, and that leave the global generator alone."""

from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ds_lightning.functional.seeds import derived_seed

from .image_data import as_it_is
from .streams import EpochSampler, next_epoch


def training_order(data: Any, trainer: L.Trainer | None, seed: int, epoch_cell: Tensor | None = None) -> EpochSampler:
    """Return the shuffled order of this process, at the epoch that the trainer is to run next.

    Args:
        data: what is sampled; only its length is used.
        trainer: the Trainer, which says what share this process gets; None is a plain loop.
        seed: the user's seed.
        epoch_cell: an int64 scalar in shared memory that is told each epoch's number, for the workers.
    """
    replicas = (None if trainer is None else trainer.distributed_sampler_kwargs) or {}
    sampler = EpochSampler(data, seed=seed, epoch_cell=epoch_cell, **replicas)
    if trainer is not None:
        sampler.set_epoch(next_epoch(trainer))
    return sampler


def batch_loader(
    data: Any,
    batch_size: int | None,
    *,
    seed: int,
    sampler: Sampler[Any] | None = None,
    num_workers: int = 0,
    drop_last: bool = False,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Return a loader over a data set that gives a whole batch at once; without a sampler in order."""
    return DataLoader(
        data,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=as_it_is,
        drop_last=drop_last,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        # Or the loader would take a number from the global generator, and dropout would depend on it.
        generator=torch.Generator().manual_seed(derived_seed(seed, "loader")),
    )
