"""A small user's module, data and trainer for the tests of DynamicLayerLR."""

from functools import partial

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning.callbacks import DynamicLayerLR

LAYERS = ("net.0", "net.4", "net.7")


SGD_MOMENTUM = partial(SGD, lr=0.05, momentum=0.9)


# 6 batches an epoch: a reading is under way at each epoch's end.
RULE = {"rule": "variance", "every": 4, "warmup": 12, "ema": 0.9}


ONE_CYCLE = partial(OneCycleLR, max_lr=0.1, total_steps=40, cycle_momentum=False)


class User(pl.LightningModule):
    """A module that knows nothing of the callback."""

    def __init__(self, optimizer=SGD_MOMENTUM, scheduler=None, norm=nn.BatchNorm2d):
        super().__init__()
        torch.manual_seed(0)
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            norm(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 8),
            nn.LayerNorm(8),
            nn.Tanh(),
            nn.Linear(8, 3),
        )

    def loss(self, batch):
        return cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_scheduler(optimizer), "interval": "step"}]


class Recorder(pl.Callback):
    """What other callbacks see in each batch."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.multipliers: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, *_):
        (callback,) = (c for c in trainer.callbacks if isinstance(c, DynamicLayerLR))
        self.multipliers.append(callback.multipliers)


def images(batch_size: int = 4, count: int = 24) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(count) % 3
    x = torch.randn(count, 1, 8, 8, generator=generator) + y.view(-1, 1, 1, 1) / 2
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def trainer_of(*callbacks, epochs: int = 5, **kwargs) -> pl.Trainer:
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    }
    return pl.Trainer(callbacks=list(callbacks), max_epochs=epochs, **{**options, **kwargs})


def rates_of(scheduler, steps: int) -> list[float]:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    schedule = scheduler(optimizer) if scheduler else None
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if schedule:
            schedule.step()
    return rates


def same_state(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b
