"""Which images each episode has: a draw that follows from the seed, the split and the episode's number alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ds_lightning.errors import DataError
from ds_lightning.functional.seeds import derived_seed

from .episode_samples import EpisodeSource
from .episode_stream import EpisodeBatch, uniform_keys


class ClassTable:
    """The images of some classes, by class and by unit.

    Args:
        source: has the images.
        classes: their numbers.
        split: for the errors.
        ways: classes of an episode.
        samples: images that an episode has of each of them.

    Raises:
        DataError: too few classes, or a class with too few images.
    """

    def __init__(self, source: EpisodeSource, classes: list[int], split: str, ways: int, samples: int) -> None:
        if len(classes) < ways:
            raise DataError(
                f"the {split} split has {len(classes)} classes; expected {ways} (its ways) or more: lower the ways, "
                f"change splits, name the classes, or have none by {split}_classes=[]"
            )
        labels = source.labels
        units = torch.arange(len(labels)) if source.units is None else source.units
        # Sorted by class, then unit: each unit of a class is a run of images.
        order = torch.argsort(units, stable=True)
        order = order[torch.argsort(labels[order], stable=True)]
        pairs = torch.stack([labels[order], units[order]], 1)
        runs, sizes = torch.unique_consecutive(pairs, dim=0, return_counts=True)
        starts = sizes.cumsum(0) - sizes
        counts = torch.bincount(runs[:, 0], minlength=len(source.class_names))
        firsts = counts.cumsum(0) - counts
        chosen = torch.tensor(classes, dtype=torch.int64)
        self.counts = counts[chosen]
        self.rows = order
        for number, count in zip(classes, self.counts.tolist(), strict=True):
            if count < samples:
                what = "samples" if source.units is None else "different units"
                raise DataError(
                    f"class {source.class_names[number]!r} of the {split} split has {count} {what}; expected shots + "
                    f"queries = {samples} or more: lower one of them, or leave the class out"
                )
        self.most = int(self.counts.max())
        places = torch.arange(self.most) + firsts[chosen, None]
        places.clamp_(max=len(starts) - 1)
        self.starts, self.sizes = starts[places], sizes[places]

    def __len__(self) -> int:
        return len(self.counts)


class EpisodeSize(NamedTuple):
    """How many classes, and how many support and query images of each."""

    ways: int
    shots: int
    queries: int


class ImageEpisodes(Dataset[Any]):
    """Episodes of one split, a batch at a time.

    Args:
        source: has the images.
        split: train, val or test.
        classes: the split's classes.
        count: how many episodes there are.
        size: of each.
        seed: of the draws.
        turned: numbers that the classes have when turned by 90, 180 and 270 degrees, one list each.
        augment: use the source's training transform.
    """

    def __init__(
        self,
        source: EpisodeSource,
        split: str,
        classes: list[int],
        count: int,
        size: EpisodeSize,
        *,
        seed: int,
        turned: Sequence[list[int]] = (),
        augment: bool = False,
    ) -> None:
        self.ways, self.shots, self.queries = size
        needed = -(-self.ways // 4) if turned else self.ways
        self.table = ClassTable(source, classes, split, needed, self.shots + self.queries)
        self.source, self.split, self.count, self.seed, self.augment = source, split, count, seed, augment
        self.numbers = torch.tensor([classes, *turned])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> EpisodeBatch:
        batch = self.__getitems__([number])
        parts = {part: {name: tensor[0] for name, tensor in batch[part].items()} for part in ("support", "query")}
        return {**parts, "classes": batch["classes"][0]}

    def __getitems__(self, numbers: list[int]) -> EpisodeBatch:
        classes, turns, rows = self.draw(numbers)
        parts = {"support": rows[:, :, : self.shots], "query": rows[:, :, self.shots :]}
        batch: EpisodeBatch = {name: self._load(part, turns, numbers[0], name) for name, part in parts.items()}
        return {**batch, "classes": classes}

    def draw(self, numbers: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the images of T episodes; all classes are equally likely, and all units of a class.

        Returns:
            The classes' numbers (T, ways), their quarter turns (T, ways), and the images (T, ways, shots + queries).
        """
        table, tasks, ways, samples = self.table, len(numbers), self.ways, self.shots + self.queries
        widths = [self.numbers.numel(), ways * table.most, ways * samples]
        keys = uniform_keys(self.seed, self.split, numbers, sum(widths))
        class_keys, unit_keys, member_keys = torch.split(keys, widths, 1)
        # The smallest of random keys, in their order: a draw without replacement, shuffled.
        chosen = class_keys.topk(ways, largest=False).indices
        place, turns = chosen % len(table), chosen // len(table)
        unit_keys = unit_keys.reshape(tasks, ways, table.most)
        absent = torch.arange(table.most) >= table.counts[place, None]
        units = unit_keys.masked_fill(absent, 2.0).topk(samples, largest=False).indices
        size = table.sizes[place[:, :, None], units]
        member = (member_keys.reshape(tasks, ways, samples) * size).long().minimum(size - 1)
        rows = table.rows[table.starts[place[:, :, None], units] + member]
        return self.numbers.flatten()[chosen], turns, rows

    def _load(self, rows: Tensor, turns: Tensor, first: int, name: str) -> dict[str, Tensor]:
        tasks, ways, samples = rows.shape
        seed = derived_seed(self.seed, "episode transform", first, name) if self.augment else None
        image = self.source.load(rows.flatten(), seed)
        for turn in (1, 2, 3) if len(self.numbers) > 1 else ():
            here = (turns == turn)[:, :, None].expand_as(rows).flatten().nonzero()[:, 0]
            image[here] = torch.rot90(image[here], turn, dims=(-2, -1))
        label = torch.arange(ways).repeat_interleave(samples).repeat(tasks, 1)
        return {"image": image.view(tasks, ways * samples, *image.shape[1:]), "label": label}


def turned_classes(source: EpisodeSource, classes: list[int]) -> list[list[int]]:
    """Return the numbers of the classes when turned by 90, 180 and 270 degrees: those behind the source's.

    Raises:
        DataError: the images are not square.
    """
    if source.input_shape[1] != source.input_shape[2]:
        raise DataError(
            f"rotations is true and the images are {source.input_shape}; expected square ones (C, H, H): resize "
            "them, or leave rotations off"
        )
    start, count = len(source.class_names), len(classes)
    return [list(range(start + turn * count, start + (turn + 1) * count)) for turn in range(3)]
