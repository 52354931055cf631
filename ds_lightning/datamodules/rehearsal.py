"""A memory of earlier tasks that needs no saved state: it follows from seed, task and epoch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_lightning.functional.seeds import derived_seed

from .streams import EpochSampler


def reservoir(sizes: Sequence[int], memory_size: int, seed: int) -> Tensor:
    """Choose what a reservoir holds after the tasks of the given sizes, uniform over all samples seen.

    Each sample has a random key, and those with the smallest keys stay: a sample is in the memory with
    probability memory_size / seen, and one that has left never comes back, as in a reservoir that is filled
    sample by sample (arXiv 1902.10486).

    Args:
        sizes: the number of samples of each task seen, in order.
        memory_size: the most samples that are held, >= 0.
        seed: of the keys.

    Returns:
        Sorted numbers of the samples, counted through the tasks in order, shape (min(memory_size, seen),), int64.

    Example:
        >>> reservoir([100, 100], 4, seed=0).shape
        torch.Size([4])
    """
    keys = [
        torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(derived_seed(seed, "key", task)))
        for task, size in enumerate(sizes)
    ]
    seen = sum(sizes)
    if seen == 0 or memory_size == 0:
        return torch.empty(0, dtype=torch.int64)
    kept = torch.cat(keys).topk(min(memory_size, seen), largest=False).indices
    return kept.sort().values


class RehearsalSampler(EpochSampler):
    """Shuffles the samples of one task, and puts some of the memory behind each batch of them.

    A loader with the batch size `batch_size + memory_batch_size` gets whole batches of both; the last batch has
    fewer samples of the task and as many of the memory. The memory is gone through in shuffled passes.

    Args:
        samples: the task's samples are numbered from `samples.start` to `samples.stop`.
        memory: the numbers of those in the memory, (M,), int64; none for the first task.
        batch_size: samples of the task in a batch, >= 1.
        memory_batch_size: samples of the memory in a batch, >= 0; cut to M.
        seed: the user's seed.
        num_replicas: how many processes share the data and the draws from the memory.
        rank: which one this is.
        epoch_cells: int64 scalars in shared memory that are told each epoch's number, for the workers.
    """

    def __init__(
        self,
        samples: range,
        memory: Tensor,
        *,
        batch_size: int,
        memory_batch_size: int,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
        epoch_cells: Sequence[Tensor] = (),
    ) -> None:
        super().__init__(samples, seed=seed, num_replicas=num_replicas, rank=rank)
        self.samples = samples
        self.memory = memory
        self.batch_size = batch_size
        self.memory_batch_size = min(memory_batch_size, len(memory))
        self.epoch_cells = epoch_cells

    def __len__(self) -> int:
        return self.num_samples + self._batches * self.memory_batch_size

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's numbers of the current epoch, and move on to the next epoch."""
        for cell in self.epoch_cells:
            cell.fill_(self.epoch)
        drawn = self._draw(self.epoch)
        own = [self.samples[index] for index in super().__iter__()]
        size, extra = self.batch_size, self.memory_batch_size
        order: list[int] = []
        for batch in range(self._batches):
            order += own[batch * size : (batch + 1) * size]
            order += drawn[batch * extra : (batch + 1) * extra]
        return iter(order)

    @property
    def _batches(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def _draw(self, epoch: int) -> list[int]:
        wanted = self._batches * self.memory_batch_size * self.num_replicas
        if wanted == 0:
            return []
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "memory", epoch))
        passes = -(-wanted // len(self.memory))
        order = torch.cat([torch.randperm(len(self.memory), generator=generator) for _ in range(passes)])
        mine: list[int] = self.memory[order[:wanted][self.rank :: self.num_replicas]].tolist()
        return mine
