"""Which task of a stream a fit is at, when a task ends, and the samples of any task on the device."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, Subset, SubsetRandomSampler

from ds_lightning.errors import ConfigError

from ._resumable_loader import Replayed, SeededData

_STREAM = ("num_tasks", "epochs_per_task", "task_of_epoch", "task_dataloader")


def stream_of(trainer: pl.Trainer) -> Any | None:
    """Return the DataModule when it is a stream of tasks, such as `TaskStream`.

    It has `num_tasks`, `epochs_per_task`, `task_of_epoch(epoch)` and `task_dataloader(task, split)`, which gives every
    rank all samples in the same order.
    """
    datamodule = getattr(trainer, "datamodule", None)
    return datamodule if all(hasattr(datamodule, name) for name in _STREAM) else None


def current_task(trainer: pl.Trainer) -> int | None:
    """Return the number of the task that the trainer is at; None without a stream."""
    stream = stream_of(trainer)
    return None if stream is None else int(stream.task_of_epoch(trainer.current_epoch))


def ends_task(trainer: pl.Trainer) -> bool:
    """Tell, in `on_train_epoch_end`, whether the epoch just trained was the last one of its task in a stream.

    An epoch that was broken off (`max_steps`, `should_stop`) ends no task. The last task ends with the fit where that
    is longer than the stream.
    """
    stream = stream_of(trainer)
    if stream is None or not trainer.is_last_batch:
        return False
    done = trainer.current_epoch + 1
    task = stream.task_of_epoch(done - 1)
    if task < stream.num_tasks - 1:
        return bool(stream.task_of_epoch(done) != task)
    return bool(done == max(stream.num_tasks * stream.epochs_per_task, trainer.max_epochs or 0))


def task_batches(
    trainer: pl.Trainer, module: pl.LightningModule, task: int | None, split: str, limit: int | None = None
) -> Iterator[Any]:
    """Yield the samples of a task in order, on the device, as a validation would see them: nothing is augmented.

    Every rank gets all of them. `fast_dev_run` has as many batches as elsewhere.

    Args:
        trainer: in a fit.
        module: what is trained; its transfer hooks are run, or the DataModule's.
        task: its number; not used without a stream.
        split: train, val or test; without a stream train alone.
        limit: the most samples, >= 1, spread evenly over the task; None: all.

    Raises:
        ConfigError: without a stream another split than train, or training data that can't be read again.
    """
    stream = stream_of(trainer)
    loader = _training_loader(trainer, split) if stream is None else stream.task_dataloader(task, split)
    # A stream's own sampler says which samples the task has.
    if stream is None or (limit is not None and isinstance(getattr(loader, "sampler", None), SequentialSampler)):
        loader = in_order(loader, limit)
    elif limit is not None:
        loader = _cut(loader, limit)
    for batch in islice(loader, int(trainer.fast_dev_run) or None):  # type: ignore[attr-defined]
        with in_stage(trainer, RunningStage.VALIDATING):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        yield batch


def _training_loader(trainer: pl.Trainer, split: str) -> DataLoader[Any]:
    """Return the loader of the training data."""
    if split != "train":
        raise ConfigError(
            f"split is {split!r} and the data are no stream of tasks; expected 'train', or a DataModule with "
            f"{', '.join(_STREAM)}, such as TaskStream"
        )
    loader = trainer.train_dataloader
    if isinstance(loader, (list, tuple)) and len(loader) == 1:
        loader = loader[0]
    if isinstance(loader, Replayed):
        loader = loader._loader
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            f"the training data come from a {type(loader).__name__}; expected one torch DataLoader, which can be read "
            "again in order, or a DataModule such as TaskStream"
        )
    if isinstance(loader.dataset, IterableDataset) and trainer.world_size > 1:
        raise ConfigError(
            f"the training data are a {type(loader.dataset).__name__} on {trainer.world_size} ranks, where it is not "
            "known which samples a rank has; expected a data set with a length"
        )
    return loader


def in_order(loader: Any, limit: int | None) -> Iterator[Any]:
    """Read a loader's data without its sampler: all of them, or some that are spread evenly over them."""
    data, size, collate = loader.dataset, loader.batch_size, loader.collate_fn
    if isinstance(data, SeededData):  # of ExactResume, whose samplers give more than an index
        data, collate = data._data, data._collate
    iterable = isinstance(data, IterableDataset)
    if isinstance(loader.sampler, SubsetRandomSampler):
        data = Subset(data, list(loader.sampler.indices))
    if limit is not None and not iterable and size is not None and limit < len(data):
        # The first ones would be of one class where the data are sorted.
        data = Subset(data, [i * len(data) // limit for i in range(limit)])
    if size is None and loader.batch_sampler is not None:
        size = getattr(loader.batch_sampler, "batch_size", 64)
    again = DataLoader(
        data,
        batch_size=size,
        num_workers=loader.num_workers,
        collate_fn=collate,
        # Or the loader would take a number from the global generator, and dropout would depend on it.
        generator=torch.Generator().manual_seed(0),
    )
    yield from again if limit is None else _cut(again, limit)


def _cut(batches: Iterable[Any], limit: int) -> Iterator[Any]:
    """Yield the first samples."""
    left = limit
    for batch in batches:
        batch, left = _first(batch, left)
        yield batch
        if left <= 0:
            return


def _first(batch: Any, most: int) -> tuple[Any, int]:
    """Cut a batch, and return it with what is left to take."""
    size = next((len(x) for x in tree_leaves(batch) if isinstance(x, torch.Tensor) and x.ndim), 1)
    if size > most:
        batch = tree_map(lambda x: x[:most] if isinstance(x, torch.Tensor) and x.ndim else x, batch)
    return batch, most - size


@contextmanager
def in_stage(trainer: pl.Trainer, stage: RunningStage) -> Iterator[None]:
    """Let the hooks see another stage for a while."""
    before, trainer.state.stage = trainer.state.stage, stage
    try:
        yield
    finally:
        trainer.state.stage = before
