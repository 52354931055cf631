"""Episodes of classes that a template and noise make, small enough for every test."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

CLASSES, SIZE = 6, 16
# Patches of 4 pixels, which a convolution can tell from the noise.
TEMPLATES = torch.randn(CLASSES, 1, 4, 4, generator=torch.Generator().manual_seed(7)).repeat_interleave(4, 2)
TEMPLATES = TEMPLATES.repeat_interleave(4, 3)


class Patterns(Dataset[Any]):
    """Tasks of `ways` classes; the same for the same index."""

    def __init__(
        self, tasks: int = 4, ways: int = 3, shots: int = 2, queries: int = 3, noise: float = 1.0, first: int = 0
    ) -> None:
        self.tasks, self.ways, self.shots, self.queries, self.noise = tasks, ways, shots, queries, noise
        self.first = first

    def __len__(self) -> int:
        return self.tasks

    def __getitem__(self, task: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1000 + self.first + task)
        classes = torch.randperm(CLASSES, generator=generator)[: self.ways]

        def part(samples: int) -> dict[str, Tensor]:
            label = torch.arange(self.ways).repeat_interleave(samples)
            noise = torch.randn(len(label), 1, SIZE, SIZE, generator=generator)
            return {"image": TEMPLATES[classes[label]] + self.noise * noise, "label": label}

        return {"support": part(self.shots), "query": part(self.queries), "classes": classes}


def batch(**options: Any) -> dict[str, Any]:
    """Return all tasks of `Patterns` as one batch."""
    data = Patterns(**options)
    (found,) = DataLoader(data, batch_size=len(data))
    return found


class Patterned(L.LightningDataModule):
    """What a DataModule of episodes tells the modules."""

    input_shape = (1, SIZE, SIZE)
    train_classes = tuple(range(CLASSES))
    class_names = tuple(f"kind {number}" for number in range(CLASSES))

    def __init__(self, ways: int = 3, batch_size: int = 2, test_ways: int | None = None, **options: Any) -> None:
        super().__init__()
        self.save_hyperparameters("ways")
        self.ways, self.batch_size, self.test_ways, self.options = ways, batch_size, test_ways or ways, options

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Patterns(ways=self.ways, **self.options), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Patterns(ways=self.test_ways, first=500, **self.options), batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


def trainer(tmp_path: Any, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(**{"max_epochs": 1, "default_root_dir": tmp_path, "accelerator": "cpu", **quiet, **options})
