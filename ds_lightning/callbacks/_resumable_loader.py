"""Loaders whose order, augmentation and position depend on (seed, epoch, batch) alone."""

import copy
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from ds_lightning.functional.seeds import derived_seed

from ._epoch_pass import Pass, Place, sized, start_pass
from ._rng_state import Stream, seed_cpu

# All of these draw at their first index, or from a generator that they make or are given.
_DRAW_AT_ONCE = (DistributedSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)
# One seed by itself meets cold caches and costs ten times as much as one of many.
_SEEDS_AT_ONCE = 64


class Draw(NamedTuple):
    """What goes to a worker for a batch: its indices and its seed."""

    seed: int
    index: Any


class SeededData(Dataset[Any]):
    """A data set that seeds the global generators for each batch, loads it and collates it.

    Args:
        data: the user's data set, whose attributes are seen and set through this.
        collate: the user's collate function, which may be random too.
    """

    def __init__(self, data: Any, collate: Any) -> None:
        self.__dict__.update(_data=data, _collate=collate, _stream=Stream(goes_on=False))

    def __getattr__(self, name: str) -> Any:
        if name in ("_data", "_collate", "_stream"):
            raise AttributeError(name)
        return getattr(self._data, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # A worker_init_fn that opens a file writes it to the data set.
        setattr(self._data, name, value)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, draw: Draw) -> Any:
        return self._seeded(draw, lambda: self._data[draw.index])

    def __getitems__(self, draw: Draw) -> Any:
        return self._seeded(draw, lambda: self._load(draw.index))

    def _load(self, indices: Any) -> Any:
        if getattr(self._data, "__getitems__", None):
            return self._data.__getitems__(indices)
        return [self._data[index] for index in indices]

    def _seeded(self, draw: Draw, load: Any) -> Any:
        if get_worker_info() is None:
            with self._stream.restarted(draw.seed):
                return self._collate(load())
        seed_cpu(draw.seed)
        return self._collate(load())


def as_it_is(batch: Any) -> Any:
    """Return the batch, which is collated already."""
    return batch


class SeededOrder:
    """A sampler's or batch sampler's order under a seed of its own, from a position on.

    Args:
        sampler: the user's, whose attributes are seen through this.
        loader: the number of its loader.
        place: where the fit is.
        current: the running pass, which the loader writes.
        generators: explicit generators that the order or the loader draws from.
    """

    def __init__(
        self, sampler: Any, loader: int, place: Place, current: Pass, generators: list[torch.Generator]
    ) -> None:
        self._sampler, self._loader, self._place, self._current = sampler, loader, place, current
        self._generators = generators

    def __getattr__(self, name: str) -> Any:
        if name == "_sampler":
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Draw]:
        place, now = self._place, self._current
        key = (self._loader, now.epoch, now.number)
        skip = now.skip
        seed = derived_seed(place.seed, "order", *key)
        for generator in self._generators:
            generator.manual_seed(seed)
        stream = Stream(seed)
        with stream:
            order = iter(self._sampler)
            index = next(order, None)
        number = 0
        seeds = _batch_seeds(place, key, skip)
        draws_later = not _draws_at_once(self._sampler)
        while index is not None:
            if number >= skip:
                yield Draw(next(seeds), index)
            number += 1
            if draws_later:
                with stream:
                    index = next(order, None)
            else:
                index = next(order, None)


def _batch_seeds(place: Place, key: tuple[int, int, int], first: int) -> Iterator[int]:
    """Go through the seeds of a pass's batches, from batch `first` on."""
    for start in count(first, _SEEDS_AT_ONCE):
        numbers = range(start, start + _SEEDS_AT_ONCE)
        yield from [derived_seed(place.seed, "data", place.rank, *key, number) for number in numbers]


def _draws_at_once(sampler: Any) -> bool:
    if type(sampler) is BatchSampler:
        return _draws_at_once(sampler.sampler)
    return type(sampler) in _DRAW_AT_ONCE


def _iterate(loader: Any) -> Iterator[Any]:
    # Lazy: Lightning makes iterators before it knows the epoch and the position.
    place, now = loader._place, loader._current
    start_pass(now, place, sized(loader))
    loader.generator.manual_seed(derived_seed(place.seed, "workers", place.rank, loader._number, now.epoch, now.number))
    yield from loader._iterate_as_before(loader)
    now.exhausted = True


class Replayed:
    """An iterable that can't skip: after a resume its batches are drawn again and dropped.

    Args:
        loader: any iterable, whose attributes are seen through this.
        number: which loader it is.
        place: where the fit is.
    """

    def __init__(self, loader: Any, number: int, place: Place) -> None:
        if isinstance(loader, DataLoader):
            loader = copy.copy(loader)
            loader.__dict__.update(generator=torch.Generator(), _iterator=None)
        self._loader, self._number, self._place = loader, number, place
        self._current = Pass()

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    @property
    def _iterator(self) -> Any:
        return getattr(self._loader, "_iterator", None)

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        if isinstance(self._loader, DataLoader):
            self._loader._iterator = value

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        now = self._current
        start_pass(now, self._place, sized(self._loader))
        seed = derived_seed(self._place.seed, "replay", self._place.rank, self._number, now.epoch, now.number)
        if isinstance(self._loader, DataLoader):
            self._loader.generator.manual_seed(seed)
        stream = Stream(seed)
        with stream:
            iterator = iter(self._loader)
        if now.skip:
            rank_zero_warn(
                f"ExactResume: the train loader is a {type(self._loader).__name__} that can't jump to a position, so "
                f"{now.skip} batches are loaded and dropped; to avoid it use a map-style dataset, or a loader with "
                "state_dict and load_state_dict such as torchdata's StatefulDataLoader"
            )
        dropped = 0
        while True:
            with stream:
                try:
                    batch = next(iterator)
                except StopIteration:
                    now.exhausted = True
                    return
            if dropped < now.skip:
                dropped += 1
            else:
                yield batch


def make_resumable(loader: Any, number: int, place: Place) -> Iterable[Any]:
    """Return a loader of the same batches whose order, randomness and position follow the fit.

    Args:
        loader: any iterable of batches; it is not changed, but its explicit generators are seeded.
        number: which of the fit's loaders it is.
        place: where the fit is.

    Returns:
        For a DataLoader of a map-style data set a copy of the same class; a loader that has `state_dict` and
        `load_state_dict` itself; else a `Replayed`.
    """
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        rank_zero_warn(
            f"ExactResume: the train loader is a {type(loader).__name__} that saves its own position; it is left as "
            "it is, and whether its order and augmentation resume exactly is up to it"
        )
        return loader  # type: ignore[no-any-return]
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return Replayed(loader, number, place)
    resumable = copy.copy(loader)
    current = Pass()
    by_batch = loader.batch_sampler is not None
    sampler: Any = loader.batch_sampler if by_batch else loader.sampler
    owners: tuple[Any, ...] = (loader, sampler, getattr(sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    generators = [generator for generator in found if isinstance(generator, torch.Generator)]
    for owner in owners:
        if isinstance(owner, DistributedSampler):
            # Lightning makes one from the seed of this process's start, which may be another than the first fit's.
            owner.seed = place.sampler_seeds.setdefault(number, owner.seed)
    order = SeededOrder(sampler, number, place, current, generators)
    # Past DataLoader.__setattr__, which lets nobody set these later; a copy keeps what a subclass has beside them.
    resumable.__dict__.update(
        {"batch_sampler" if by_batch else "sampler": order},
        dataset=SeededData(loader.dataset, loader.collate_fn),
        collate_fn=as_it_is,
        generator=torch.Generator(),
        _iterator=None,
        _place=place,
        _current=current,
        _number=number,
        _iterate_as_before=type(loader).__iter__,
    )
    # A class, because Python looks for __iter__ there; that of a subclass which does more is still called.
    resumable.__class__ = type(f"Resumable{type(loader).__name__}", (type(loader),), {"__iter__": _iterate})
    return resumable
