"""A small user's modules, poisoned data and hand-written loops for the tests of FiniteGuard."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


class User(pl.LightningModule):
    """A module that knows nothing of the callback; a batch whose x is NaN gives NaN."""

    def __init__(self, make, schedule=None):
        super().__init__()
        self.net, self.make, self.schedule = net(), make, schedule

    def training_step(self, batch, batch_idx):
        return mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


class Two(pl.LightningModule):
    """Manual optimization: each optimizer has a net of its own; the second's loss reads x shifted by one column."""

    def __init__(self, make):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b, self.make = net(), net(), make

    def training_step(self, batch, batch_idx):
        for optimizer, model, x in zip(self.optimizers(), (self.a, self.b), (batch[0], batch[2]), strict=True):
            optimizer.zero_grad()
            self.manual_backward(mse_loss(model(x), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return self.make(self.a.parameters()), self.make(self.b.parameters())


def batches(count=8, poison=(), value=float("nan")):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 2, 3, generator=generator)
    y = torch.randn(count, 2, 1, generator=generator)
    z = x.clone()
    for k in poison:
        x[k, 0, 1] = value
    return [(x[i], y[i], z[i]) for i in range(count)]


def loader(data):
    flat = [torch.cat(column) for column in zip(*data, strict=True)]
    return DataLoader(TensorDataset(*flat), batch_size=2)


def by_hand(make, data, left_out=(), accumulate=1, clip=None, schedule=None):
    """Train without Lightning; a group of micro-batches that holds one of `left_out` makes no step."""
    model = net()
    optimizer = make(model.parameters())
    scheduler = schedule(optimizer) if schedule else None
    for first in range(0, len(data), accumulate):
        group = range(first, first + accumulate)
        if not set(group) & set(left_out):
            optimizer.zero_grad()
            for i in group:
                (mse_loss(model(data[i][0]), data[i][1]) / accumulate).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        if scheduler:
            scheduler.step()
    return model, optimizer


def trainer_of(*callbacks, epochs=1, **kwargs):
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(callbacks=list(callbacks), max_epochs=epochs, **{**options, **kwargs})


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
