"""Small networks, plans made by hand and a plain loop, for the tests of ProgressivePruning."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning.networks import PruningPlan

SAMPLES, BATCH, CLASSES, WIDTH = 32, 8, 3, 16


def convolutions(first=WIDTH, second=WIDTH):
    """Two convolutions with batch norm, and a classifier."""
    return nn.Sequential(
        nn.Conv2d(2, first, 3, padding=1, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.BatchNorm2d(second),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(second, CLASSES),
    )


def macs_of(first, second, size=6):
    """Multiply-accumulates of a sample, by definition."""
    return size * size * 9 * (2 * first + first * second) + second * CLASSES


class Images(pl.LightningModule):
    """A stranger's module: pairs in, cross-entropy out."""

    def __init__(self, make=torch.optim.SGD, rate=0.05, seed=0, **options):
        super().__init__()
        torch.manual_seed(seed)
        self.net = convolutions()
        self.make, self.rate, self.options = make, rate, options

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return self.make(self.parameters(), lr=self.rate, **self.options)


def samples(count=SAMPLES, size=6):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(count) % CLASSES
    return torch.randn(count, 2, size, size, generator=generator) + y[:, None, None, None], y


def loader(batch_size=BATCH, shuffle=False, count=SAMPLES):
    return DataLoader(TensorDataset(*samples(count)), batch_size=batch_size, shuffle=shuffle)


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


def plan_keeping(first, second, before=(WIDTH, WIDTH), prefix="net"):
    """The plan that keeps the given channels of the two convolutions, written out by hand."""
    a, b = tuple(first), tuple(second)
    tensors = {
        "0.weight": ((before[0], 2, 3, 3), {0: a}),
        "3.weight": ((before[1], before[0], 3, 3), {0: b, 1: a}),
        "3.bias": ((before[1],), {0: b}),
        "8.weight": ((CLASSES, before[1]), {1: b}),
    }
    for layer, size, kept in (("1", before[0], a), ("4", before[1], b)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{layer}.{name}"] = ((size,), {0: kept})
    attributes = {
        "0": {"out_channels": len(a)},
        "1": {"num_features": len(a)},
        "3": {"in_channels": len(a), "out_channels": len(b)},
        "4": {"num_features": len(b)},
        "8": {"in_features": len(b)},
    }
    plan = PruningPlan({n: s for n, (s, _) in tensors.items()}, {n: k for n, (_, k) in tensors.items()}, attributes)
    return plan.under(prefix) if prefix else plan


def widths(module):
    return module.net[0].out_channels, module.net[3].out_channels


def tensors(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class FixedPlans:
    """Stands in for the decision: the plans of its removals, in order, in the network's names."""

    def __init__(self, *plans):
        self.plans = list(plans)

    def into(self, monkeypatch):
        rule = "ds_lightning.callbacks._pruning_decision.PruningRule"
        monkeypatch.setattr(f"{rule}.graph", lambda *_: self)
        monkeypatch.setattr(f"{rule}.check_reachable", lambda *_: None)
        monkeypatch.setattr(f"{rule}.decide", lambda *_: self.plans.pop(0))
