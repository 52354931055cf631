"""ModelCheckpoint whose files are whole after a kill at any moment."""

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT

from ds_lightning.checkpoints import DurableCheckpointIO
from ds_lightning.errors import ConfigError


class DurableCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that always leaves a whole checkpoint behind, and the one before it.

    When it acts: as ModelCheckpoint does. In `setup` it gives the strategy a `DurableCheckpointIO`, which then writes
    every checkpoint of this Trainer: temporary file, fsync, rename. It takes the place of Lightning's default
    ModelCheckpoint.

    What it changes: `save_last` is on; a file that is overwritten stays as `NAME-previous.ckpt`, so after the second
    save there are always two different whole files; a checkpoint is loaded with `weights_only=True`, after its CRC-32
    sums were compared, unless `weights_only=False` is said.

    What it logs: nothing; but a logger with a method `hand_over` (`MLflowTracker`) is asked to get what it holds out of
    the process before a checkpoint is written: a kill loses no metric that the checkpoint is ahead of. In the
    checkpoint: ModelCheckpoint's state, under this class's name.

    Limits: strategies that write folders of shards (FSDP, ModelParallel, DeepSpeed) keep Lightning's way, with a
    warning; so do paths such as `s3://`. `save_last="link"` writes half as much, but replaces the link in two steps:
    a kill between them leaves no `last.ckpt` (the file that it named is whole). A disk that lies about fsync lies here.

    Cost: two fsyncs for each file; a third file on the disk. With `save_top_k=0` and `every_n_train_steps` only
    `last.ckpt` and its previous version are written; without it Lightning then saves at the end of the fit alone.

    Args:
        save_last: as in ModelCheckpoint, but on by default.
        **others: those of ModelCheckpoint, with its defaults.

    Raises:
        ConfigError: at the start, when the Trainer has another checkpoint plugin; pass
            `AsyncCheckpointIO(DurableCheckpointIO())` to have both.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[DurableCheckpoint(every_n_train_steps=100)])
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = True,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            verbose=verbose,
            save_last=save_last,
            save_top_k=save_top_k,
            save_on_exception=save_on_exception,
            save_weights_only=save_weights_only,
            mode=mode,
            auto_insert_metric_name=auto_insert_metric_name,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=save_on_train_epoch_end,
            enable_version_counter=enable_version_counter,
        )

        self._key: tuple[object, str] = (None, "")

    @property
    def state_key(self) -> str:
        """The name of the state in a checkpoint: ModelCheckpoint's, kept, for Lightning asks before every hook."""
        made_of = (
            self.monitor,
            self.mode,
            self._every_n_train_steps,
            self._every_n_epochs,
            self._train_time_interval,
        )
        if self._key[0] != made_of:
            self._key = (made_of, super().state_key)
        return self._key[1]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Save as ModelCheckpoint does; no question is asked in a batch that can't be due."""
        if self._every_n_train_steps > 0 or self._train_time_interval is not None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Get the metrics up to here out of this process: a fit that goes on from the checkpoint won't log them."""
        for logger in trainer.loggers:
            # MLflowTracker's; the room of loggers is above this one.
            if (hand_over := getattr(logger, "hand_over", None)) is not None:
                hand_over()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the strategy the durable writer; called by Lightning before a checkpoint is loaded."""
        super().setup(trainer, pl_module, stage)
        strategy = trainer.strategy
        if type(strategy).save_checkpoint is not Strategy.save_checkpoint:
            rank_zero_warn(
                f"{type(strategy).__name__} writes its checkpoints itself: DurableCheckpoint leaves that as it is, and "
                "a kill while it writes can leave a torn one"
            )
            return
        plugin = strategy.checkpoint_io
        if type(plugin) is TorchCheckpointIO:
            strategy.checkpoint_io = DurableCheckpointIO(keep_previous=True)
        elif not isinstance(getattr(plugin, "checkpoint_io", plugin), DurableCheckpointIO):
            raise ConfigError(
                f"the Trainer writes checkpoints with {type(plugin).__name__}, which DurableCheckpoint can't make "
                "durable; remove that plugin, or ModelCheckpoint instead of DurableCheckpoint, or wrap ours: "
                "Trainer(plugins=[AsyncCheckpointIO(DurableCheckpointIO(keep_previous=True))])"
            )
