"""A stranger's module, small tasks, and a stream of them, for the tests of elastic weight consolidation."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

SAMPLES, FEATURES = 48, 6


class Stranger(pl.LightningModule):
    """Knows nothing of this package: pairs in, cross-entropy out."""

    def __init__(self, rate=0.05, make=torch.optim.SGD, classes=2, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(8, classes)
        self.rate, self.make = rate, make

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return self.make(self.parameters(), lr=self.rate)


def task(number, classes=2, samples=SAMPLES, first=0):
    """Two clouds, apart along one direction that is the task's own."""
    g = torch.Generator().manual_seed(number)
    y = torch.arange(samples) % classes
    direction = torch.randn(classes, FEATURES, generator=g)
    return direction[y] + 0.5 * torch.randn(samples, FEATURES, generator=g), y + first


def loader(number, batch_size=8, **kwargs):
    return DataLoader(TensorDataset(*task(number, **kwargs)), batch_size=batch_size, shuffle=True)


class Stream(pl.LightningDataModule):
    """What makes a DataModule a stream of tasks, and no more."""

    def __init__(self, tasks=3, epochs_per_task=2, batch_size=8):
        super().__init__()
        self.num_tasks, self.epochs_per_task, self.batch_size = tasks, epochs_per_task, batch_size
        self.asked = []

    def task_of_epoch(self, epoch):
        return min(epoch // self.epochs_per_task, self.num_tasks - 1)

    def task_dataloader(self, number, split):
        self.asked.append((number, split, self.trainer.current_epoch))
        return DataLoader(TensorDataset(*task(number)), batch_size=self.batch_size)

    def train_dataloader(self):
        return loader(self.task_of_epoch(self.trainer.current_epoch), self.batch_size)


def trainer(*callbacks, epochs=2, **options):
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
            "max_epochs": epochs,
            "callbacks": list(callbacks),
            **options,
        }
    )


def stream_fit(ewc, model=None, stream=None, *callbacks, **options):
    """Train on a stream of three tasks; the loaders' order follows the global seed."""
    pl.seed_everything(1, verbose=False)
    model, stream = model or Stranger(), stream or Stream()
    epochs = stream.num_tasks * stream.epochs_per_task
    trainer(ewc, *callbacks, epochs=epochs, reload_dataloaders_every_n_epochs=1, **options).fit(model, stream)
    return model, stream


def fisher_by_loop(model, x, y):
    """The definition: the mean over samples of the squared gradient of each one's own loss."""
    model.eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] += p.grad**2 / len(x)
    model.zero_grad()
    model.train()
    return total


def scaled(fisher):
    count = sum(v.numel() for v in fisher.values())
    mean = sum(v.sum() for v in fisher.values()) / count
    return {name: v / mean for name, v in fisher.items()}


def params(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
