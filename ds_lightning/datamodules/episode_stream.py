"""Episodes by number: which numbers an epoch has, and the loader that asks for them."""

from collections.abc import Iterator
from typing import Any, Protocol

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from ds_lightning.errors import ConfigError
from ds_lightning.functional.seeds import derived_seed

from .loaders import batch_loader
from .streams import next_epoch

EpisodeBatch = dict[str, Any]
"""`support` and `query`, each a dictionary of tensors (T, N, ...); for images also `classes` (T, ways) int64."""


class EpisodeSet(Protocol):
    """A data set whose episodes follow from their numbers alone, given a batch at a time."""

    def __len__(self) -> int: ...

    def __getitems__(self, numbers: list[int]) -> EpisodeBatch: ...


class EpisodeSampler(DistributedSampler[Any]):
    """Counts through the training episodes, so that none comes twice in any epoch or process.

    The number of an episode follows from the epoch and the place in it. Lightning tells `set_epoch`; in a plain loop
    each pass counts one epoch.

    Args:
        episodes: in an epoch, over all processes, >= 1; rounded up to a multiple of the processes.
        seed: the user's seed, for the order of a pool.
        pool: go through the episodes 0 to pool - 1 again and again instead, each pass in another order; None is off.
        num_replicas: how many processes share the episodes.
        rank: which one this is.
    """

    def __init__(
        self, episodes: int, *, seed: int, pool: int | None = None, num_replicas: int = 1, rank: int = 0
    ) -> None:
        super().__init__(
            range(episodes),  # type: ignore[arg-type]  # only its length is used
            num_replicas=num_replicas,
            rank=rank,
            shuffle=False,
            seed=derived_seed(seed, "episodes"),
        )
        self.pool = pool

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's numbers of the current epoch, and move on to the next epoch."""
        start = self.epoch * self.total_size
        self.epoch += 1
        places = range(start + self.rank, start + self.total_size, self.num_replicas)
        return iter(places) if self.pool is None else self._pooled(places, self.pool)

    def _pooled(self, places: range, pool: int) -> Iterator[int]:
        current, order = -1, torch.empty(0)
        for place in places:
            turn, offset = divmod(place, pool)
            if turn != current:
                generator = torch.Generator().manual_seed(derived_seed(self.seed, "pool", turn))
                current, order = turn, torch.randperm(pool, generator=generator)
            yield int(order[offset])


def check_counts(**counts: tuple[int | None, int]) -> None:
    """Refuse counts below their least value.

    Args:
        counts: argument -> its value, and the least; None is allowed and says nothing.

    Raises:
        ConfigError: names the argument.
    """
    for name, (value, least) in counts.items():
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; expected an integer >= {least}")


def uniform_keys(seed: int, split: str, numbers: list[int], count: int) -> Tensor:
    """Return the random numbers of some episodes, which depend on the seed, the split and the episode's number alone.

    Args:
        seed: the user's seed.
        split: what the episodes are for.
        numbers: of the T episodes.
        count: how many random numbers each gets.

    Returns:
        (T, count) float32 in [0, 1).
    """
    keys = torch.empty(len(numbers), count)
    generator = torch.Generator()
    for row, number in zip(keys, numbers, strict=True):
        generator.manual_seed(derived_seed(seed, "episode", split, number))
        torch.rand(count, generator=generator, out=row)
    return keys


def training_sampler(trainer: L.Trainer | None, episodes: int, seed: int, pool: int | None) -> EpisodeSampler:
    """Return the sampler of this process, at the epoch that the trainer is to run next."""
    replicas = (None if trainer is None else trainer.distributed_sampler_kwargs) or {}
    sampler = EpisodeSampler(episodes, seed=seed, pool=pool, **replicas)
    if trainer is not None:
        sampler.set_epoch(next_epoch(trainer))
    return sampler


def episode_loader(
    episodes: EpisodeSet,
    tasks_per_batch: int,
    num_workers: int,
    seed: int,
    sampler: EpisodeSampler | None = None,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Return a loader of batches of episodes; without a sampler of all of them, in order."""
    return batch_loader(
        episodes, tasks_per_batch, seed=seed, sampler=sampler, num_workers=num_workers, pin_memory=pin_memory
    )
