"""Preemption: SIGTERM and SIGINT save at the next batch boundary and end the process with a code that is not 0."""

import os
import shutil
import signal
import subprocess
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_info

from ds_lightning.errors import Preempted

FILE_NAME = "preempted.ckpt"


class Preemption(Callback):
    """Save and stop when the machine is taken away: SIGTERM, or Ctrl-C.

    When it acts: the signal's handler only notes the signal. After the optimizer step of the batch in hand, all
    ranks agree that one of them got it, save one checkpoint and stop. A validation that is due or going is dropped
    (several ranks finish the one that is going) and done again, whole, on resume. A second Ctrl-C stops at once.

    What it changes: nothing in training. `Trainer.fit` raises `Preempted`, a SystemExit, when callbacks and loggers
    are done: the process ends with 143 for SIGTERM and 130 for SIGINT, also when the signal came in the very last
    batch. The handlers that were there are back after `fit`, and are not called during it; Lightning's SLURM signal
    is left alone. `MLflowTracker` ends the run as KILLED with the tag `ds_lightning.preempted=SIGTERM`.

    What it logs: nothing. What is in the checkpoint: nothing of its own; `preempted.ckpt` is an ordinary one.

    Limits: signal handlers need Python's main thread (elsewhere it warns and does nothing). A batch that never ends
    is never interrupted. Processes started by `ddp_spawn` and `ddp_notebook` save too, but their parent ends with
    torch's ProcessExitedException instead of 143. Epoch averages of training metrics cover, after a resume in
    mid-epoch, the batches since then: Lightning does not save them.

    Cost: a comparison a batch; with several ranks an all-reduce of one number a batch.

    Args:
        folder: where `preempted.ckpt` goes; None means beside the Trainer's other checkpoints.
        signals: names of the signals to act on, such as `SIGTERM`, `SIGINT` or `SIGUSR2`.

    Raises:
        ValueError: when a name is no signal that a process can handle.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[Preemption()], logger=False)
    """

    def __init__(self, folder: str | None = None, signals: Sequence[str] = ("SIGTERM", "SIGINT")) -> None:
        for name in signals:
            if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
                raise ValueError(f"signals has {name!r}; expected names of signals such as SIGTERM, SIGINT, SIGUSR2")
        self.folder = folder
        self.signals = tuple(signals)
        self._received = 0
        self._agreed = 0
        self._installed = False
        self._alone = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Come last, so that the checkpoint has what every other callback did after the batch."""
        # A new list: Lightning is going through the old one.
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the handlers in place of Lightning's."""
        self._agreed, self._alone = 0, trainer.world_size == 1
        self._install()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a signal in the sanity check too; it is acted on at the first batch."""
        self._install()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop once Lightning has logged the metrics of the epoch that was saved."""
        if self._agreed:
            self._stop(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop once Lightning has logged the metrics of the batch that was saved."""
        if self._agreed:
            self._stop(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, unless an epoch's end, a validation or the rest of an accumulated step comes first."""
        if self._alone and not self._received:
            return
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches or _validation_is_next(trainer):
            return
        if self._agree(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch."""
        if self._agree(trainer):
            self._save(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before a validation."""
        if _in_fit(trainer) and self._agree(trainer):
            self._save(trainer)
            self._stop(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop in a validation; ranks may have different numbers of batches, so several ranks go on."""
        if self._received and trainer.world_size == 1 and _in_fit(trainer):
            self._agreed = self._received
            self._save(trainer)
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the last epoch: what would follow `fit` must not swallow the signal."""
        if self._agreed:
            self._stop(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make a checkpoint that is saved in a validation say that this validation has yet to be done."""
        if self._agreed and _in_fit(trainer):
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            done = progress["total"]["completed"] - progress["current"]["completed"]
            # Lightning goes back to a validation in which one batch was begun and not ended.
            progress["total"] = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
            progress["current"] = dict.fromkeys(progress["current"], 0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop for a signal that came after the end of training, when all is saved that will be."""
        self._installed = False
        if self._received:
            raise Preempted(self._received)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the handlers: Lightning puts back what was there, when the loggers are done."""
        self._installed = False

    def _install(self) -> None:
        if self._installed:
            return
        self._received = 0
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "Preemption acts on no signal here: Python lets only the main thread handle signals",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self._installed = True
        # Lightning noted all handlers before it set its own, and puts them back however fit ends.
        for name in self.signals:
            signal.signal(signal.Signals[name], self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or number

    def _agree(self, trainer: Trainer) -> bool:
        """Tell whether any rank got a signal; the same answer on all of them."""
        if trainer.world_size == 1:
            self._agreed = self._received
        elif not self._agreed:
            mine = torch.tensor(self._received, dtype=torch.int32, device=trainer.strategy.root_device)
            self._agreed = int(trainer.strategy.reduce(mine, reduce_op="max"))
        return self._agreed != 0

    def _save(self, trainer: Trainer) -> None:
        folder = Path(trainer.strategy.broadcast(str(self._folder(trainer))))
        target, part = folder / FILE_NAME, folder / f"{FILE_NAME}.part"
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            _put(part, target)
        trainer.strategy.barrier("preempted")
        rank_zero_info(f"{signal.Signals(self._agreed).name}: saved {target}, stopping")

    def _folder(self, trainer: Trainer) -> Path:
        if self.folder is not None:
            return Path(self.folder)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath:
                return Path(callback.dirpath)
        if trainer.logger is None:
            return Path(trainer.default_root_dir, "checkpoints")
        version = trainer.logger.version
        part = version if isinstance(version, str) else f"version_{version}"
        return Path(trainer.logger.save_dir or trainer.default_root_dir, str(trainer.logger.name), part, "checkpoints")

    def _stop(self, trainer: Trainer) -> None:
        procs = getattr(trainer.strategy.launcher, "procs", [])
        if all(isinstance(process, subprocess.Popen) for process in procs):
            # Lightning kills rank 0 when another rank ends first, even while rank 0's loggers still write.
            procs.clear()
        raise Preempted(self._agreed)


def _in_fit(trainer: Trainer) -> bool:
    return bool(trainer.state.fn == "fit" and trainer.validating)


def _validation_is_next(trainer: Trainer) -> bool:
    """Ask Lightning: a checkpoint of this moment would skip the validation on resume."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def _put(part: Path, target: Path) -> None:
    """Give a complete checkpoint its name, after it has reached the disk."""
    if target.is_dir():
        shutil.rmtree(target)
    for path in [part, *part.rglob("*")] if part.is_dir() else [part]:
        _flush(path)
    os.replace(part, target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
