"""What a few-shot method saw and said in a few episodes, as pictures."""

from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from ds_lightning.errors import ConfigError, NoEffectWarning

from ._eval_mode import eval_mode
from ._figures import figure_writers
from ._strategies import SHARDED

_Stage = Literal["val", "test"]


class EpisodePictures(pl.Callback):
    """Show support and query sets with the predictions, and the accuracy by adaptation step.

    **When it acts.** On the first batch of a validation or a test it asks the module for its predictions again; the
    pictures of the last validation are drawn when the fit ends, those of a test when the test ends.

    **What it changes.** Nothing: the generators stay as they were.

    **What it logs.** Two pictures to every logger that has `log_figure`: `episodes_val` (`episodes_test`): a row for
    each class with its support samples, then its query samples, framed green where the prediction is right and red,
    with the class predicted, where it is wrong; of regression, the curves before and after adaptation. And
    `adaptation_val` (`adaptation_test`): the accuracy over all episodes after each step, when the module logs
    `val/accuracy_after_K` (or `mse_after_K`).

    **Checkpoint.** Nothing is kept.

    **Limits.** The module needs `predictions(batch)`, as `MAML`, `PrototypicalNetwork` and `TransferLearning` have:
    outputs (S, T, M, ways) of the query sets. Images, or regression of one variable. Loggers without `log_figure`
    get nothing.

    **Cost.** The predictions of `episodes` tasks more in each validation, and about half a second for the pictures.

    Args:
        episodes: the first tasks of the batch are shown, at least 1.
        shots: samples shown of each class's support set, at least 1.
        queries: samples shown of each class's query set, at least 1.

    Raises:
        ConfigError: when a number is below 1; at the start a module without `predictions`.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[EpisodePictures(episodes=2)], logger=False, accelerator="cpu")
    """

    def __init__(self, episodes: int = 3, shots: int = 5, queries: int = 10) -> None:
        for name, value in (("episodes", episodes), ("shots", shots), ("queries", queries)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1")
        self.episodes = episodes
        self.shots = shots
        self.queries = queries
        self._forget()

    def _forget(self) -> None:
        self._seen: dict[str, tuple[dict[str, Any], Tensor]] = {}
        self._by_step: dict[str, dict[int, float]] = {}
        self._score = "accuracy"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the module, and forget an earlier run."""
        self._forget()
        if not callable(getattr(pl_module, "predictions", None)):
            raise ConfigError(
                f"EpisodePictures needs a module with `predictions(batch)`, such as MAML or PrototypicalNetwork; "
                f"{type(pl_module).__name__} has none"
            )

    # ---------------------------------------------------------------- what is seen

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Predict the first tasks of the first batch."""
        if not trainer.sanity_checking:
            self._look(trainer, pl_module, batch, batch_idx, dataloader_idx, "val")

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Predict the first tasks of the first batch."""
        self._look(trainer, pl_module, batch, batch_idx, dataloader_idx, "test")

    def _look(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int, dataloader_idx: int, stage: _Stage
    ) -> None:
        if batch_idx or dataloader_idx or not figure_writers(trainer):
            return
        # Sharded weights are gathered in a forward pass, which therefore is the same on all ranks.
        if not trainer.is_global_zero and not isinstance(trainer.strategy, SHARDED):
            return
        with isolate_rng(), eval_mode(module), torch.inference_mode(False), torch.enable_grad():
            few = _first(batch, self.episodes)
            with trainer.precision_plugin.forward_context():
                outputs = module.predictions(few)
        # Labels and images are small; the loader may use its own tensors again.
        self._seen[stage] = (_on_cpu(few), outputs.detach().float().cpu())

    # ---------------------------------------------------------------- what is drawn

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the figures by step; draw when this is no part of a fit."""
        if not trainer.sanity_checking:
            self._keep_steps(trainer, "val")
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._draw(trainer, "val")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the last validation."""
        self._draw(trainer, "val")
        if not self._seen and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                "EpisodePictures drew nothing: there was no validation, or no logger with `log_figure`",
                category=NoEffectWarning,
            )

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the test."""
        self._keep_steps(trainer, "test")
        self._draw(trainer, "test")

    def _keep_steps(self, trainer: pl.Trainer, stage: _Stage) -> None:
        if not trainer.is_global_zero or not figure_writers(trainer):
            return
        for score in ("accuracy", "mse"):
            start = f"{stage}/{score}_after_"
            found = {
                int(name[len(start) :]): float(value)
                for name, value in trainer.callback_metrics.items()
                if name.startswith(start) and name[len(start) :].isdigit()
            }
            if found:
                self._score, self._by_step[stage] = score, found

    def _draw(self, trainer: pl.Trainer, stage: _Stage) -> None:
        writers = figure_writers(trainer)
        if stage not in self._seen or not writers or not trainer.is_global_zero:
            return
        from ._episode_picture import curves, episode_grid, score_by_step

        batch, outputs = self._seen[stage]
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        figures = {}
        if "image" in batch["query"] and "label" in batch["query"]:
            figures[f"episodes_{stage}"] = episode_grid(batch, outputs[-1], names, self.shots, self.queries)
        elif "target" in batch["query"] and "table" in batch["query"] and batch["query"]["table"].shape[-1] == 1:
            figures[f"episodes_{stage}"] = curves(batch, outputs)
        if len(self._by_step.get(stage, ())) > 1:
            figures[f"adaptation_{stage}"] = score_by_step(self._by_step[stage], self._score)
        for name, figure in figures.items():
            for log_figure in writers:
                log_figure(figure, name)
        if not figures:
            rank_zero_warn(
                "EpisodePictures drew nothing: it shows images, and regression of one variable",
                category=NoEffectWarning,
            )


def _first(batch: Mapping[str, Any], tasks: int) -> dict[str, Any]:
    """Return a copy of the first tasks, which may take part in a graph."""
    return {
        key: _first(value, tasks)
        if isinstance(value, Mapping)
        else value[:tasks].clone()
        if isinstance(value, Tensor)
        else value
        for key, value in batch.items()
    }


def _on_cpu(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _on_cpu(value) if isinstance(value, Mapping) else value.cpu() if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
