"""A small fit with every kind of randomness, for the tests of ExactResume."""

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torchmetrics import MeanMetric

from ds_lightning.callbacks import DurableCheckpoint, ExactResume
from ds_lightning.checkpoints import newest_checkpoint

SAMPLES, BATCH = 20, 4
STEPS = SAMPLES // BATCH


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Sample i is i, with noise of all three generators."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + np.random.rand() + torch.rand(3)
        return torch.tensor([float(index), 1.0, 0.5]) / SAMPLES + noise, torch.tensor(index)


class Records(pl.LightningModule):
    """Trains with dropout, and keeps what it saw: (epoch, batch, indices, sum of the inputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.mean_input = MeanMetric()
        self.seen: list[tuple[int, int, tuple[int, ...], float]] = []
        self.reported: list[tuple[float, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, index = batch
        self.seen.append((self.current_epoch, batch_idx, tuple(index.tolist()), float(x.sum())))
        loss = self.net(x).square().mean()
        self.mean_input.update(x)
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.log("top", loss, on_step=False, on_epoch=True, reduce_fx=torch.max)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.net(batch[0]).mean())

    def on_train_epoch_end(self) -> None:
        self.reported.append((float(self.mean_input.compute()), float(torch.rand(()))))
        self.mean_input.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def loader(kind: str, workers: int) -> DataLoader[Any]:
    options: dict[str, Any] = {"batch_size": BATCH, "num_workers": workers, "persistent_workers": workers > 0}
    if kind == "shuffle":
        options["shuffle"] = True
    elif kind == "weighted":
        options["sampler"] = WeightedRandomSampler([1.0 + i for i in range(SAMPLES)], SAMPLES)
    elif kind == "generator":
        options.update(shuffle=True, generator=torch.Generator().manual_seed(3))
    return DataLoader(Noisy(), **options)


def trainer(root: Path, *callbacks: pl.Callback, epochs: int = 3, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=options.pop("max_epochs", epochs),
        accelerator="cpu",
        devices=options.pop("devices", 1),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        default_root_dir=root,
        callbacks=list(callbacks),
        num_sanity_val_steps=options.pop("num_sanity_val_steps", 0),
        **options,
    )


def every_step(root: Path) -> ModelCheckpoint:
    return ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def main(root: Path, seed: int, workers: int) -> None:
    pl.seed_everything(seed, verbose=False)
    model = Records()
    saver = DurableCheckpoint(root, filename="{step}", every_n_train_steps=1)
    fit = trainer(root, ExactResume(), saver, epochs=8)
    # Not last.ckpt: a death may come between the file of a step and that one.
    fit.fit(model, loader("shuffle", workers), ckpt_path=newest_checkpoint(root), weights_only=True)
    torch.save(weights(model), root / "weights.pt")
