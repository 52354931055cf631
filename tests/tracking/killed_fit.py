"""A fit that logs at every step; as a process it kills itself.

`killed_fit.py STORE CHECKPOINTS` does it after 27 steps, `killed_fit.py STORE CHECKPOINTS AT` at the checkpoint of step
20 or 21: AT is `file` (its file is there, no callback knows yet), `saved` (its callback has returned), `logged` (in an
epoch, and its step's metrics are logged) or `validated` (in the last batch of an epoch, before a validation).
"""

import os
import signal
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning.callbacks import DurableCheckpoint
from ds_lightning.checkpoints import DurableCheckpointIO
from ds_lightning.tracking import MLflowTracker, outbox


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
            die()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class KillWithFile(DurableCheckpointIO):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path, storage_options)
        if checkpoint["global_step"] == 20:
            die()


class KillWhenSaved(ModelCheckpoint):
    def on_train_epoch_end(self, trainer, module):
        super().on_train_epoch_end(trainer, module)
        if trainer.global_step == 20:
            die()


class KillWhenLogged(ModelCheckpoint):
    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == 21:
            die()


class KillWhenValidated(ModelCheckpoint):
    def on_train_epoch_start(self, trainer, module):
        if trainer.global_step == 20:
            die()


def fit(store, folder, run_id=None, resume="step=10.ckpt", callbacks=(), plugins=None):
    folder.mkdir(exist_ok=True)
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x), batch_size=4)
    tracker = MLflowTracker("x", store=store, run_id=run_id, log_checkpoint=False)
    trainer = Trainer(
        max_epochs=4,
        logger=tracker,
        callbacks=list(callbacks),
        plugins=plugins,
        log_every_n_steps=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Deterministic(), loader, loader, ckpt_path=folder / resume if run_id else None)


if __name__ == "__main__":
    # A busy machine may take longer than the second of training.
    outbox._HAND_OVER_SECONDS = 60.0
    store, folder, at = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if sys.argv[3:] else ""
    if at == "file":
        fit(store, folder, callbacks=[DurableCheckpoint(folder, "{step}", save_top_k=-1)], plugins=[KillWithFile()])
    elif at == "saved":
        fit(store, folder, callbacks=[KillWhenSaved(folder, "{step}", save_top_k=-1)])
    elif at == "logged":
        fit(store, folder, callbacks=[KillWhenLogged(folder, "{step}", save_top_k=-1, every_n_train_steps=7)])
    elif at == "validated":
        fit(store, folder, callbacks=[KillWhenValidated(folder, "{step}", save_top_k=-1, every_n_train_steps=20)])
    else:
        fit(store, folder, callbacks=[ModelCheckpoint(folder, "{step}", save_top_k=-1), Kill(folder / "logged", 27)])
