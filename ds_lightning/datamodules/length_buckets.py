"""Batches of samples that are about as long, so that little of a batch is padding."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from ds_lightning.functional.seeds import derived_seed

# So many batches are sorted together: the more, the less padding, and the less chance who meets whom.
_SORTED_TOGETHER = 50


class LengthBuckets(DistributedSampler[Any]):
    """Yields whole batches, as lists of indices, of samples of like length, in a random order.

    The samples are shuffled, sorted by length in stretches of 50 batches, and cut into batches, which are shuffled too.
    All follows from the seed and the epoch. In a distributed run each process gets its share of every batch, so that
    all have as many batches and as many samples in each; where the last batch does not divide, some samples come
    twice. It takes the place of a sampler, with `batch_size=None` for the loader: Lightning and `ExactResume` then tell
    it the epoch and the position, as they do any `DistributedSampler`.

    Args:
        lengths: of the samples, (N,), any unit.
        batch_size: samples a batch and process, >= 1.
        seed: the user's seed.
        num_replicas: how many processes share the data.
        rank: which one this is.
        drop_last: leave out the last batch when it isn't full.
        epoch_cell: an int64 scalar in shared memory that is told each epoch's number, for the workers.

    Example:
        >>> order = LengthBuckets(torch.tensor([9, 1, 8, 2, 1, 9]), batch_size=2, seed=0)
        >>> sorted(sorted(batch) for batch in order)
        [[0, 5], [1, 4], [2, 3]]
    """

    def __init__(
        self,
        lengths: Tensor,
        batch_size: int,
        *,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
        drop_last: bool = False,
        epoch_cell: Tensor | None = None,
    ) -> None:
        super().__init__(
            lengths,  # type: ignore[arg-type]  # only its length is used
            num_replicas=num_replicas,
            rank=rank,
            seed=derived_seed(seed, "order"),
            drop_last=drop_last,
        )
        self.lengths = lengths
        self.batch_size = batch_size
        self.epoch_cell = epoch_cell

    def __len__(self) -> int:
        """The number of batches, the same for each process."""
        together = self.batch_size * self.num_replicas
        return len(self.lengths) // together if self.drop_last else -(-len(self.lengths) // together)

    def __iter__(self) -> Iterator[list[int]]:
        """Return this process's batches of the current epoch, and move on to the next epoch."""
        if self.epoch_cell is not None:
            self.epoch_cell.fill_(self.epoch)
        batches = self._batches()
        self.epoch += 1
        return iter(batches)

    def _batches(self) -> list[list[int]]:
        if len(self) == 0:
            return []
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        together = self.batch_size * self.num_replicas
        shuffled = torch.randperm(len(self.lengths), generator=generator)
        kept = shuffled[: len(self) * together]
        stretches = torch.split(kept, _SORTED_TOGETHER * together)
        order = torch.cat([part[self.lengths[part].argsort(stable=True)] for part in stretches])
        batches = list(torch.split(order, together))
        missing = -len(batches[-1]) % self.num_replicas
        if missing:
            batches[-1] = torch.cat([batches[-1], order[torch.arange(missing) % len(order)]])
        turn = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[number][self.rank :: self.num_replicas].tolist() for number in turn]


def relative_lengths(lengths: Mapping[str, Tensor]) -> Tensor | None:
    """Return one length for each sample: the sum of those of its modalities, each as a share of the longest.

    Args:
        lengths: of each modality (N,), 0 where a sample hasn't got it: it then counts as the mean of the others, or
            the samples without it would always come together.

    Returns:
        (N,) float64; None when no modality has samples of different lengths.

    Example:
        >>> relative_lengths({"text": torch.tensor([2, 4, 0])})
        tensor([0.5000, 1.0000, 0.7500], dtype=torch.float64)
    """
    total: Tensor | None = None
    for length in lengths.values():
        there = length[length > 0].double()
        if len(there) and there.min() < there.max():
            share = torch.where(length > 0, length.double(), there.mean()) / there.max()
            total = share if total is None else total + share
    return total
