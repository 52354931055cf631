"""A checkpoint of another number of optimizers is not loaded in silence."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ds_lightning.errors import DataError


class OptimizerCount(Callback):
    """Refuse a checkpoint that has more or fewer optimizers than the module: Lightning would drop the rest unsaid.

    When it acts: as the checkpoint is loaded, and at the fit's start. It changes and logs nothing, and has no state.
    """

    def __init__(self) -> None:
        self._count: int | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count what the checkpoint has."""
        self._count = len(checkpoint.get("optimizer_states", ()))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, before their states are loaded."""
        made = len(trainer.optimizers)
        if self._count not in (None, made):
            raise DataError(
                f"checkpoint {trainer.ckpt_path} has the states of {self._count} optimizers, and "
                f"{type(pl_module).__name__} makes {made}; give the options that it was trained with"
            )
