"""A fit that logs at every step; as a process (`killed_fit.py STORE CHECKPOINTS`) it kills itself after 27 steps."""

import os
import signal
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning.tracking import MLflowTracker


class Deterministic(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch, index):
        loss = self.layer(batch[0]).square().mean()
        self.log_dict({"train/loss": loss, "train/nan": float("nan")})
        return loss

    def validation_step(self, batch, index):
        self.log("val/loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Kill(Callback):
    """Log what this process saw; kill it when the server has most of it."""

    def __init__(self, seen, at):
        self.seen, self.at = seen, at

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        with self.seen.open("a") as file:
            file.write(f"{trainer.global_step - 1}\n")
        if trainer.global_step == self.at - 4:
            trainer.logger._monitor._sample()
            assert trainer.logger._run.outbox.flush(None, 60)
        if trainer.global_step == self.at:
            # Some of it is on its way to the writer, and outlives us there.
            trainer.logger._run.outbox._wake.set()
            os.kill(os.getpid(), signal.SIGKILL)


def fit(store, folder, run_id=None, kill_at=0):
    folder.mkdir(exist_ok=True)
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x), batch_size=4)
    tracker = MLflowTracker("x", store=store, run_id=run_id, log_checkpoint=False)
    trainer = Trainer(
        max_epochs=4,
        logger=tracker,
        callbacks=[ModelCheckpoint(folder, "{step}", save_top_k=-1), Kill(folder / "logged", kill_at)],
        log_every_n_steps=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Deterministic(), loader, loader, ckpt_path=folder / "step=10.ckpt" if run_id else None)


if __name__ == "__main__":
    fit(Path(sys.argv[1]), Path(sys.argv[2]), kill_at=27)
