"""The samples of one task or more, numbered through, each changed and labelled as its task says."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ds_lightning.errors import ConfigError, DataError

from .image_data import Batch, ImageData, ImageDataset
from .task_kinds import Task
from .task_shifts import Shift

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class TaskPart:
    """What one task takes from a data set.

    Args:
        task: its number.
        data: where the images are.
        rows: which of them, (N,) int64.
        labels: label of the data set -> label of the stream, int64.
        salt: tells the splits apart, for noise.
        shift: changes the images; None leaves them.
        allowed: outputs that the task permits, (num_classes,) bool; None says nothing about it.
        normalize: scale and shift of each channel, (C, 1, 1) float32; None leaves the images uint8.
    """

    task: int
    data: ImageDataset
    rows: Tensor
    labels: Tensor
    salt: int
    shift: Shift | None = None
    allowed: Tensor | None = None
    normalize: tuple[Tensor, Tensor] | None = None

    def load(self, places: Tensor) -> Batch:
        """Return the samples at these places of `rows`."""
        rows = self.rows[places]
        batch = self.data.__getitems__(rows.tolist())
        image = batch["image"]
        if self.shift is not None:
            image = self.shift(image, rows, self.salt)
        if self.normalize is not None:
            image = image.to(torch.float32).mul_(self.normalize[0]).add_(self.normalize[1])
        label = self.labels[batch["label"]]
        loaded = {**batch, "image": image, "label": label, "task": torch.full_like(label, self.task)}
        if self.allowed is not None:
            loaded["allowed"] = self.allowed.expand(len(rows), -1).clone()
        return loaded


class TaskSamples(Dataset[Any]):
    """The samples of the parts one after the other, given a batch at a time.

    Args:
        parts: at least one; all have images of one shape.
    """

    def __init__(self, parts: list[TaskPart]) -> None:
        self.parts = parts
        self.ends = torch.tensor([len(part.rows) for part in parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Batch:
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def span(self, part: int) -> range:
        """Return the numbers of the samples of a part."""
        end = int(self.ends[part])
        return range(end - len(self.parts[part].rows), end)

    def __getitems__(self, indices: list[int]) -> Batch:
        wanted = torch.tensor(indices)
        owner = torch.searchsorted(self.ends, wanted, right=True)
        present = sorted(set(owner.tolist()))
        if len(present) == 1:
            only: Batch = self.parts[present[0]].load(wanted - self.span(present[0]).start)
            return only
        whole: Batch = {}
        for number in present:
            here = (owner == number).nonzero()[:, 0]
            for name, tensor in self.parts[number].load(wanted[here] - self.span(number).start).items():
                if name not in whole:
                    whole[name] = tensor.new_empty((len(indices), *tensor.shape[1:]))
                whole[name][here] = tensor
        return whole


class TaskTable:
    """Which samples each task has in each split.

    Args:
        data: the DataModules, after their setup.
        tasks: made from them.

    Raises:
        DataError: a task has no sample for training or validation.
    """

    def __init__(self, data: Sequence[ImageData], tasks: Sequence[Task]) -> None:
        self.data = data
        self.tasks = tasks
        self.rows: dict[str, list[Tensor]] = {}
        for split in SPLITS:
            sets: list[ImageDataset | None] = [getattr(module.splits, split) for module in data]
            labels = [None if samples is None else labels_of(samples) for samples in sets]
            self.rows[split] = [self._choose(task, labels[task.source], split) for task in tasks]

    def _choose(self, task: Task, labels: Tensor | None, split: str) -> Tensor:
        if labels is None:
            return torch.empty(0, dtype=torch.int64)
        rows = (task.labels[labels] >= 0).nonzero()[:, 0]
        if len(rows) == 0 and split != "test":
            raise DataError(f"task {task.name} has no {split} samples; take more images, or fewer tasks")
        return rows

    def part(self, number: int, split: str, ready: bool = False) -> TaskPart:
        """Return one task's samples of a split.

        Args:
            number: of the task, 0 to tasks - 1.
            split: train, val or test.
            ready: give images that are normalised and have nothing random.
        """
        if not 0 <= number < len(self.tasks):
            raise ConfigError(f"task is {number}; expected 0 to {len(self.tasks) - 1}")
        if split not in SPLITS:
            raise ConfigError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
        task = self.tasks[number]
        module = self.data[task.source]
        data = getattr(module.splits, split)
        if data is None or len(self.rows[split][number]) == 0:
            raise DataError(
                f"task {task.name} of {module.source} has no {split} images; add some, or use another split"
            )
        if ready and split == "train":
            data = copy.copy(data)
            data.transform = module.splits.val.transform
        return TaskPart(
            task=number,
            data=data,
            rows=self.rows[split][number],
            labels=task.labels,
            salt=SPLITS.index(split),
            shift=task.shift,
            allowed=task.allowed,
            normalize=module.scale_and_shift() if ready else None,
        )


def labels_of(data: ImageDataset) -> Tensor:
    """Return the labels of a data set, (N,) int64, without loading images where it can be avoided."""
    labels, chosen = getattr(data, "labels", None), getattr(data, "chosen", None)
    if isinstance(labels, Tensor):
        labels = labels if chosen is None else labels[chosen]
        if len(labels) == len(data):
            return labels
    chunks = [list(range(start, min(start + 256, len(data)))) for start in range(0, len(data), 256)]
    return torch.cat([data.__getitems__(chunk)["label"] for chunk in chunks])
