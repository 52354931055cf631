"""A small module with an embedding, and data with labels, that the tests of the probe and of the map share."""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

CLASSES, SIDE = 3, 4


def pictures(samples: int, seed: int, noise: float = 0.3) -> list[dict[str, Tensor]]:
    """Return images whose class is where they are bright."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(samples):
        image = noise * torch.rand(1, SIDE, SIDE, generator=generator)
        image[:, index % CLASSES] += 1
        rows.append({"image": image, "label": torch.tensor(index % CLASSES)})
    return rows


class Labels(pl.LightningDataModule):
    """Offers labelled samples, as ContrastiveViews does; its own batches have none."""

    class_names = ("first", "second", "third")

    def __init__(self, train: int = 60, held: int = 30, noise: float = 0.3) -> None:
        super().__init__()
        self.rows = pictures(train, 1, noise)
        self.held = pictures(held, 2, noise)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([{"image": row["image"]} for row in self.rows], batch_size=10, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader([{"image": row["image"]} for row in self.held], batch_size=10)

    def labelled_loaders(self) -> tuple[Iterable[Any], Iterable[Any]]:
        return DataLoader(self.rows, batch_size=7), DataLoader(self.held, batch_size=7)

    def plain(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**batch, "image": batch["image"] * 2 - 1}


class Owned(Labels):
    """The same samples as a DataModule of a callback's own: labels in its batches, and a shuffled order."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=9, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.held, batch_size=9)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert self.trainer is None
        return self.plain(batch)


class Autoencoder(pl.LightningModule):
    """Has dropout, running statistics and `embed`; trained without labels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
        self.decoder = nn.Linear(8, SIDE * SIDE)
        self.asked = 0

    def embed(self, x: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.asked += len(x)
        torch.rand(1)
        return self.encoder(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.training
        loss = (self(batch["image"]) - batch["image"].flatten(1)).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", (self(batch["image"]) - batch["image"].flatten(1)).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def trainer(tmp_path: Any, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    base = {"max_epochs": 2, "accelerator": "cpu", "default_root_dir": tmp_path, "logger": False}
    return pl.Trainer(**{**base, **quiet, **options}, callbacks=list(callbacks))
