"""Loaders of a manifest's rows: in batches of like length or shuffled for training, else in order."""

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ds_lightning.errors import DataError

from .length_buckets import LengthBuckets, relative_lengths
from .loaders import batch_loader, training_order
from .manifest_data import Split
from .manifest_schema import Schema
from .manifest_statistics import Statistics
from .manifest_store import ManifestStore
from .manifest_text import ManifestText
from .multimodal_batches import Augment, MultimodalSamples, sample_shapes
from .streams import next_epoch
from .transforms import Transform


def replicas_of(trainer: L.Trainer | None) -> dict[str, int]:
    """Return `num_replicas`, how many processes share the data, and `rank`, which one this is."""
    found = None if trainer is None else trainer.distributed_sampler_kwargs
    return found or {"num_replicas": 1, "rank": 0}


@dataclass(frozen=True)
class ManifestLoaders:
    """Makes the loaders of splits.

    Args:
        schema: what the columns are.
        store: holds the decoded rows.
        statistics: what standardises audio, series and tables.
        text: turns texts into numbers; None where there are none.
        batch_size: samples a batch and process, >= 1.
        num_workers: processes that load.
        seed: of the order and the augmentation.
        pin_memory: load into page-locked memory.
    """

    schema: Schema
    store: ManifestStore
    statistics: Statistics
    text: ManifestText | None
    batch_size: int
    num_workers: int = 0
    seed: int = 0
    pin_memory: bool = False

    def in_order(self, split: Split) -> DataLoader[Any]:
        """Return a loader of all rows, as they stand."""
        return self._loader(self._samples(split), self.batch_size)

    def training(
        self,
        split: Split,
        trainer: L.Trainer | None,
        *,
        bucket: bool,
        drop_last: bool,
        transform: Transform | None,
        spec_augment: Augment | None,
    ) -> DataLoader[Any]:
        """Return a loader of this process's share of the rows, in the order of the epoch that is to come.

        Args:
            split: the rows.
            trainer: says what the share is, and which epoch; None is a plain loop.
            bucket: put samples of like length into a batch.
            drop_last: leave out the last batch when it isn't full.
            transform: for the images.
            spec_augment: for a sample's log-mel.

        Raises:
            DataError: with `drop_last`, too few rows for one batch.
        """
        replicas = replicas_of(trainer)
        if drop_last and len(split.rows) // replicas["num_replicas"] < self.batch_size:
            raise DataError(
                f"{len(split.rows)} training rows are too few for a batch of batch_size {self.batch_size} a process; "
                "make it smaller, or set drop_last to false"
            )
        data = self._samples(split, transform=transform, spec_augment=spec_augment)
        lengths = relative_lengths({name: self._lengths(name, split) for name in ("text", "audio", "series")})
        # Lightning puts an order of single samples in the place of ours to overfit.
        if not bucket or lengths is None or getattr(trainer, "overfit_batches", 0) > 0:
            sampler = training_order(data, trainer, self.seed, data.epoch)
            return self._loader(data, self.batch_size, sampler=sampler, drop_last=drop_last)
        buckets = LengthBuckets(
            lengths, self.batch_size, seed=self.seed, drop_last=drop_last, epoch_cell=data.epoch, **replicas
        )
        if trainer is not None:
            buckets.set_epoch(next_epoch(trainer))
        return self._loader(data, None, sampler=buckets)

    def _lengths(self, name: str, split: Split) -> Tensor:
        """Return the lengths of a modality, of texts about those in tokens."""
        if name not in self.schema.modalities:
            return torch.zeros(len(split.rows))
        length = self.store.lengths(name)[split.rows]
        return length if name != "text" or self.text is None else self.text.lengths(length)

    def _samples(self, split: Split, **options: Any) -> MultimodalSamples:
        return MultimodalSamples(
            self.store.fetch,
            split.rows,
            split.labels,
            sample_shapes(self.schema, self.store, self.statistics),
            self.statistics,
            encode=None if self.text is None else self.text.encode,
            seed=self.seed,
            **options,
        )

    def _loader(self, data: MultimodalSamples, batch_size: int | None, **options: Any) -> DataLoader[Any]:
        return batch_loader(
            data, batch_size, seed=self.seed, num_workers=self.num_workers, pin_memory=self.pin_memory, **options
        )
