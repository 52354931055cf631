"""Pairs of two modalities, such as pictures and their captions."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ds_lightning.errors import ConfigError, DataError
from ds_lightning.functional.batch import MODALITIES
from ds_lightning.functional.seeds import derived_seed

from .loaders import batch_loader, training_order
from .view_transforms import as_unit

_SPLITS = ("train", "val", "test")


class Pairs(L.LightningDataModule):
    """Samples that show one thing in two modalities, split so that no group is in two splits.

    Batches are `{one modality: ..., the other: ..., "index": int64 (B,)}`, `label` (B,) where the samples have it, and
    with `groups` also `group` (B,) int64, the same number for samples of one group.
    uint8 images become float32 from 0 to 1, on the device, normalised by `mean` and `std`; token ids (`text`) are
    padded at the end with 0 to the longest of the batch; all else is stacked as it is. `index` counts through the whole
    of `data`. Which group is in which split, and the order of an epoch, follow from the seed: no state is saved.

    Args:
        data: two aligned columns, such as `{"image": (N, C, H, W) uint8, "text": (N, L) int64 or a list of N lists of
            ids}`, maybe with `label`; or a map-style data set whose samples are such dictionaries. The modalities are
            two of image, text, audio, series, table.
        groups: the group of each sample, N of any values, such as who made it or which recording it is from; or the
            name of a key of `data` that says so. None makes each sample one.
        splits: the shares of the groups for training, validation and test, with sum 1; the last two may be 0.
        mean: of the image channels, for images of 0 to 1.
        std: their standard deviation, > 0.
        batch_size: pairs a batch and process, >= 2: the others are the negatives.
        seed: of the split and the order.
        num_workers: processes that load.
        drop_last: leave out the last training batch when it isn't full.
        pin_memory: load into page-locked memory.

    Raises:
        ConfigError: an argument out of its range.
        DataError: from `setup()` or a loader: columns of different lengths, not two modalities, an empty split.

    Example:
        >>> images = torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
        >>> data = Pairs({"image": images, "text": [[2, 3]] * 20}, groups=list(range(10)) * 2, batch_size=4)
        >>> data.setup()
        >>> sorted(next(iter(data.train_dataloader())))
        ['group', 'image', 'index', 'text']
    """

    def __init__(
        self,
        data: Dataset[Any] | dict[str, Any],
        groups: Sequence[Any] | str | None = None,
        splits: tuple[float, float, float] = (0.8, 0.1, 0.1),
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = True,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 2), ("num_workers", num_workers, 0)):
            if value < least:
                raise ConfigError(f"{name} is {value}; expected an integer >= {least}")
        if len(splits) != 3 or min(splits) < 0 or splits[0] == 0 or abs(sum(splits) - 1) > 1e-6:
            raise ConfigError(f"splits is {list(splits)}; expected three shares >= 0 with sum 1, the first > 0")
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ConfigError(f"mean is {list(mean)} and std {list(std)}; expected as many numbers, std > 0")
        self.save_hyperparameters(ignore=["data", "groups"])
        self.data: Any = data
        self.groups = groups
        self.splits = splits
        self.mean = mean
        self.std = std
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.drop_last = drop_last
        self.pin_memory = pin_memory
        self.modalities: tuple[str, ...] = ()
        self._parts: dict[str, PairSamples] = {}
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Check the samples and split the groups."""
        if self._parts:
            return
        columns = _Columns(self.data) if isinstance(self.data, Mapping) else self.data
        self.modalities = tuple(name for name in MODALITIES if name in columns[0])
        if len(self.modalities) != 2:
            raise DataError(
                f"a sample has the keys {sorted(columns[0])}; expected two of {', '.join(MODALITIES)} among them"
            )
        groups = self._groups(columns)
        names = list(dict.fromkeys(groups))
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(derived_seed(self.seed, "split")))
        first = round(self.splits[0] * len(names))
        second = first if self.splits[1] == 0 else max(first + 1, round((self.splits[0] + self.splits[1]) * len(names)))
        if self.splits[2] == 0:
            second = len(names)
        place = {name: number for number, name in enumerate(names)}
        numbers = None if self.groups is None else torch.tensor([place[group] for group in groups])
        owner = {names[n]: (at >= first) + (at >= second) for at, n in enumerate(order.tolist())}
        for number, split in enumerate(_SPLITS):
            rows = [row for row, group in enumerate(groups) if owner[group] == number]
            if not rows and self.splits[number] > 0:
                raise DataError(f"{split} gets none of {len(names)} groups; give it a greater share in splits, or 0")
            if rows:
                self._parts[split] = PairSamples(columns, rows, self.modalities, numbers)

    def dataset_info(self) -> dict[str, Any]:
        """Return `name`, `source`, `digest` (of the split) and the sizes of the `splits`, for the tracking of a run."""
        name = type(self.data).__name__
        sizes = {split: len(self._parts.get(split, ())) for split in _SPLITS}
        rows = {split: part.rows for split, part in self._parts.items()}
        digest = hashlib.sha256(repr((name, self.modalities, rows)).encode()).hexdigest()[:16]
        return {"name": f"Pairs-{'-'.join(self.modalities)}", "source": name, "digest": digest, "splits": sizes}

    def train_dataloader(self) -> DataLoader[Any]:
        """The shuffled training pairs; each process of a distributed run gets its share."""
        data = self._part("train")
        sampler = training_order(data, self.trainer, self.seed)
        if self.drop_last and sampler.num_samples < self.batch_size:
            raise DataError(
                f"a process has {sampler.num_samples} training pairs, too few for one batch of batch_size "
                f"{self.batch_size}; make it smaller, or set drop_last to false"
            )
        return self._loader(data, sampler=sampler, drop_last=self.drop_last)

    def val_dataloader(self) -> Any:
        """The validation pairs, in order."""
        return self._loader(self._part("val")) if self.splits[1] > 0 else []

    def test_dataloader(self) -> DataLoader[Any]:
        """The test pairs, in order."""
        return self._loader(self._part("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test pairs, in order."""
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Normalise uint8 images on the batch's device."""
        image = batch.get("image")
        if image is None or image.is_floating_point():
            return batch
        if image.device not in self._tables:
            mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (self.mean, self.std))
            self._tables[image.device] = (mean.to(image.device), std.to(image.device))
        mean, std = self._tables[image.device]
        image = (as_unit(image) - mean) / std
        if self.trainer is not None:
            image = self.trainer.precision_plugin.convert_input(image)
        return {**batch, "image": image}

    def _groups(self, data: Any) -> list[Any]:
        if self.groups is None:
            return list(range(len(data)))
        found = [data[row][self.groups] for row in range(len(data))] if isinstance(self.groups, str) else self.groups
        groups = [value.item() if isinstance(value, Tensor) else value for value in found]
        if len(groups) != len(data):
            raise DataError(f"groups has {len(groups)} values; expected one for each of {len(data)} samples")
        return groups

    def _part(self, split: str) -> "PairSamples":
        if split not in self._parts:
            absent = f"there are no pairs for {split}; give it a share in splits"
            raise DataError(absent if self._parts else "Pairs has no data yet; call setup() first")
        return self._parts[split]

    def _loader(self, data: "PairSamples", **options: Any) -> DataLoader[Any]:
        return batch_loader(
            data,
            self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            **options,
        )


class PairSamples(Dataset[Any]):
    """A choice of pairs, a batch at a time.

    Args:
        data: gives dictionaries.
        rows: which of them.
        modalities: the two keys that a batch has, next to `index`, `label` and `group`.
        groups: the number of each sample's group, for all of `data`, (N,) int64; None is no `group`.
    """

    def __init__(self, data: Any, rows: list[int], modalities: tuple[str, ...], groups: Tensor | None = None) -> None:
        self.data = data
        self.rows = rows
        self.modalities = modalities
        self.groups = groups

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        rows = [self.rows[index] for index in indices]
        samples = [self.data[row] for row in rows]
        batch = {}
        for name in (*self.modalities, "label"):
            if name in samples[0]:
                values = [torch.as_tensor(sample[name]) for sample in samples]
                batch[name] = _padded(values) if name == "text" else _stacked(name, values)
        if self.groups is not None:
            batch["group"] = self.groups[rows]
        return {**batch, "index": torch.tensor(rows)}


class _Columns:
    """Aligned columns as a data set of dictionaries."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise DataError(f"the columns have the lengths {lengths}; expected the same for all, > 0")
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: column[row] for name, column in self.columns.items()}


def _padded(values: list[Tensor]) -> Tensor:
    if any(value.ndim != 1 or value.is_floating_point() or len(value) == 0 for value in values):
        raise DataError("a text is no list of token ids; expected one id at least for each, integers")
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True).to(torch.int64)


def _stacked(name: str, values: list[Tensor]) -> Tensor:
    shapes = sorted({tuple(value.shape) for value in values})
    if len(shapes) > 1:
        raise DataError(f"{name} has the shapes {shapes} in a batch; expected one shape")
    return torch.stack(values)
