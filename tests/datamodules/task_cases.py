"""A made-up image set of classes of different sizes, and a module that writes down what it is shown."""

import lightning.pytorch as pl
import torch
from torch import nn

from ds_lightning.datamodules import InMemoryImageData

PER_CLASS = (40, 24, 16, 10, 12, 8)


class Ramps(InMemoryImageData):
    """Every pixel of an image has a value of its own, and the first one says which image it is."""

    class_names = tuple("abcdef")
    source = "made up"
    mean, std = (0.25,), (0.5,)

    def load(self):
        labels = torch.arange(6).repeat_interleave(torch.tensor(PER_CLASS))
        images = torch.arange(len(labels)).view(-1, 1, 1, 1) + torch.arange(30).view(1, 1, 5, 6)
        images = images.to(torch.uint8)
        return (images, labels), (images[::2] + 1, labels[::2])


def ready(stream):
    stream.prepare_data()
    stream.setup()
    return stream


def whole(loader):
    """Concatenate all batches of a loader."""
    batches = list(loader)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def as_bytes(image, data=Ramps):
    """Undo the normalisation, (N, C, H, W)."""
    return ((image.double() * data.std[0] + data.mean[0]) * 255).round().to(torch.uint8)


class Writes(pl.LightningModule):
    """A small network with dropout that notes the images, labels and tasks of each step."""

    def __init__(self, classes=6):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(30, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, classes))
        self.steps, self.validations = [], []

    def training_step(self, batch, batch_idx):
        numbers = batch["image"][:, 0].flatten(1).sum(1).tolist()
        self.steps.append((self.current_epoch, batch_idx, numbers, batch["label"].tolist(), batch["task"].tolist()))
        return nn.functional.cross_entropy(self.net(batch["image"]), batch["label"])

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.validations.append((self.current_epoch, batch["task"].tolist()))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def trainer(root, *callbacks, **options):
    return pl.Trainer(
        **{
            "max_epochs": 6,
            "default_root_dir": root,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(item, pl.callbacks.ModelCheckpoint) for item in callbacks),
            "callbacks": list(callbacks),
            **options,
        }
    )
