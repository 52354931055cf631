"""A module and data small enough for a trial in a fraction of a second, found by class path in the tests."""

import os
import signal
import time
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset


class Bowl(LightningModule):
    """Logs `val/loss` = (x - 3)^2 + 10 / (validations so far) and `val/size` = |x|; trains one unused weight.

    Args:
        x: what is searched.
        trouble: what goes wrong: "", "raise", "nan", "die", "interrupt", "sleep" or "five" (raise where x is 5).
        train_metric: log `train/x` over the epoch.
    """

    def __init__(
        self, x: float = 0.0, y: float = 0.0, trouble: str = "", train_metric: bool = False, block: str = "a"
    ) -> None:
        super().__init__()
        self.x, self.y, self.trouble, self.train_metric = x, y, trouble, train_metric
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.validations = 0

    def training_step(self, batch, index):
        if self.train_metric:
            self.log("train/x", self.x * (self.current_epoch + 1), on_epoch=True, on_step=False)
        return (self.weight * batch[0]).mean()

    def validation_step(self, batch, index):
        if index == 0 and not self.trainer.sanity_checking:
            self.validations += 1
            self.act()
        loss = (self.x - 3) ** 2 + 10 / max(self.validations, 1)
        self.log("val/loss", float("nan") if self.trouble == "nan" else loss)
        self.log("val/size", abs(self.x))

    def act(self):
        if self.trouble == "raise" or (self.trouble == "five" and self.x == 5):
            raise RuntimeError("out of\nmemory")
        if self.trouble == "die" and self.x > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "interrupt" and self.x > 0:
            raise KeyboardInterrupt
        if self.trouble == "sleep":
            time.sleep(0.5)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class FourBatches(LightningDataModule):
    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(8, 1)), batch_size=self.batch_size)

    val_dataloader = train_dataloader


class Walk(LightningModule):
    """A walk that depends on every batch, its order and the noise; each step leaves a line with the process in a file.

    Args:
        x: what is searched: the rate.
        steps: the file.
        die_at: the global step in which the process kills itself, if none has done so.
    """

    def __init__(self, x: float = 0.0, steps: str = "", die_at: int = -1) -> None:
        super().__init__()
        self.x, self.steps, self.die_at = x, Path(steps), die_at
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, index):
        if self.global_step == self.die_at and not self.steps.with_suffix(".dead").exists():
            self.steps.with_suffix(".dead").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with self.steps.open("a") as file:
            file.write(f"{os.getpid()} {self.global_step}\n")
        loss = ((self.weight - batch[0] - torch.rand(())) ** 2).mean()
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, index):
        self.log("val/loss", self.weight.sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=abs(self.x) / 100)


class Shuffled(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(6.0)[:, None]), batch_size=1, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(1, 1)), batch_size=1)
