"""A running trial's checkpoint: where it is, when it is written, and whether a retry can go on from it."""

import shutil
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from ds_lightning.checkpoint_reader import read_outline
from ds_lightning.checkpoints import DurableCheckpointIO, newest_checkpoint


class TrialCheckpoint(Checkpoint):
    """Save a trial at a validation or an epoch's end, once enough time has passed since the last save or the start.

    When it acts: after all other callbacks at the end of a validation and of an epoch: there the study knows the
    objective. What it changes: the strategy's plain writer is replaced by a `DurableCheckpointIO`, as by
    `DurableCheckpoint`. It logs nothing, and has nothing in the checkpoint.

    Limits: a trial whose Trainer has a checkpoint plugin of its own is not saved. A disk that is full costs a
    warning. Cost: one write with two fsyncs each time; two files on the disk.

    Args:
        folder: where `last.ckpt` and its previous version are.
        every_seconds: seconds >= 0 between two saves; 0: each time.
    """

    def __init__(self, folder: Path, every_seconds: float) -> None:
        self._path = folder / "last.ckpt"
        self._every = every_seconds
        self._since = 0.0
        self._durable = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the strategy the durable writer; called by Lightning before a checkpoint is loaded."""
        strategy = trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = DurableCheckpointIO(keep_previous=True)
        self._durable = isinstance(strategy.checkpoint_io, DurableCheckpointIO)
        self._since = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, when it is time."""
        if not trainer.sanity_checking:
            self._save_in_time(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, when it is time."""
        self._save_in_time(trainer)

    def _save_in_time(self, trainer: Trainer) -> None:
        if not self._durable or time.monotonic() - self._since < self._every:
            return
        try:
            trainer.save_checkpoint(self._path)
        except OSError as error:
            warnings.warn(
                f"the trial's checkpoint {self._path} was not written ({error}); training goes on, and a retry would "
                "go on from the one before, or start again",
                RuntimeWarning,
                stacklevel=2,
            )
        self._since = time.monotonic()


def trial_folder(folder: Path, number: int) -> Path:
    """Return where a trial's checkpoints are, below the study's folder."""
    return folder / "checkpoints" / f"trial-{number}"


def find_usable(folders: Sequence[str]) -> tuple[Path, int] | None:
    """Return the first folder's newest whole checkpoint that loads safely, and its global step; None without one."""
    for folder in folders:
        path = newest_checkpoint(folder)
        if path is None:
            continue
        outline = read_outline(path)
        if not outline.refused:
            return path, int(outline.content["global_step"])
        warnings.warn(
            f"checkpoint {path} holds pickled {', '.join(outline.refused)} and is not loaded, so the trial starts "
            "again; keep tensors and plain Python only in hyperparameters and state",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


def forget(folder: Path, numbers: Iterable[int]) -> None:
    """Remove trials' checkpoints."""
    for number in numbers:
        shutil.rmtree(trial_folder(folder, number), ignore_errors=True)


def kept_numbers(folder: Path) -> list[int]:
    """Return the trials that have checkpoints."""
    names = (path.name.removeprefix("trial-") for path in (folder / "checkpoints").glob("trial-*"))
    return sorted(int(name) for name in names if name.isdigit())
