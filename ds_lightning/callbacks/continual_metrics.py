"""How much a model forgets along a stream of tasks."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from ds_lightning.errors import ConfigError, DataError, NoEffectWarning
from ds_lightning.functional.batch import as_batch, input_of, restrict
from ds_lightning.functional.continual import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    largest_drop,
)

from ._eval_mode import eval_mode
from ._figures import figure_writers
from ._order import apply_order
from ._strategies import SHARDED
from ._tasks import ends_task, stream_of, task_batches


class ContinualMetrics(pl.Callback):
    """Measure the accuracy on every task after each task, and what was forgotten.

    **When it acts.** Once before the first step, and in `on_train_epoch_end` when a task of a stream ends, after
    `ElasticWeightConsolidation` has set the weights: a wrong order of the callbacks is put right at the start of fit.

    **What it changes.** Nothing: modules go to eval mode and back, and the generators stay as they were.

    **What it logs.** At each task's end, `continual/accuracy/<task>` for every task, and over the finished ones
    `continual/average_accuracy`; from the second task on also `continual/forgetting` (arXiv 1801.10112),
    `continual/backward_transfer`, `continual/forward_transfer` (arXiv 1706.08840) and `continual/largest_drop`. A
    logger that has `log_figure` gets the matrix as the picture `continual_accuracy`.

    **Checkpoint.** The matrix, the accuracies before the first step, and the names of the tasks: a resumed fit goes
    on with them. The checkpoint loads without the callback. Another `fit` without `ckpt_path` starts afresh.

    **Limits.** The data must be one stream, such as `TaskStream` (also of a list of DataModules): in several fits the
    earlier tasks' data are gone. A task cut short by `max_steps` or an early stop is not measured. Weights that another
    callback averages (EMA) are measured as they are in the module.

    **Cost.** A pass over all tasks' samples at each task's end, shared out over the ranks; strategies that shard the
    weights run all of them on each rank.

    Args:
        split: the samples that are measured, `test` or `val`.
        score_fn: takes the module and a batch on its device, and returns a score of each sample, (B,) of 0 or 1. None:
            whether the largest output of `module(input)` that the batch's `allowed` permits is at `label`.

    Raises:
        ConfigError: another split; at the start of fit data that are no stream, a task without such samples, or a
            checkpoint of other tasks; in a fit a module or score_fn that gives something else.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[ContinualMetrics()], logger=False, accelerator="cpu")
    """

    runs_after: ClassVar[tuple[str, ...]] = ("ElasticWeightConsolidation",)

    def __init__(
        self,
        split: Literal["test", "val"] = "test",
        score_fn: Callable[[pl.LightningModule, Any], Tensor] | None = None,
    ) -> None:
        if split not in ("test", "val"):
            raise ConfigError(f"split is {split!r}; expected test or val")
        self.split = split
        self.score_fn = score_fn
        self._forget()

    def _forget(self) -> None:
        self._matrix = torch.empty(0, 0, dtype=torch.float64)
        self._untrained = torch.empty(0, dtype=torch.float64)
        self._names: list[str] = []
        self._measured = False

    @property
    def matrix(self) -> Tensor:
        """(T, T) float64: row i has the accuracies after task i; NaN for tasks to come, (0, 0) before a fit."""
        return self._matrix.clone()

    @property
    def untrained(self) -> Tensor:
        """(T,) float64, the accuracies before the first step."""
        return self._untrained.clone()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit, and put the callbacks in order; a checkpoint's state is loaded after this."""
        if stage == "fit":
            self._forget()
            apply_order(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that each task can be measured."""
        stream = stream_of(trainer)
        if stream is None:
            raise ConfigError(
                f"ContinualMetrics needs the data of all tasks; expected a stream such as TaskStream, got "
                f"{type(getattr(trainer, 'datamodule', None)).__name__}: for tasks that are DataModules or folders of "
                "their own, use one fit with TaskStream([first, second, ...])"
            )
        for task in range(stream.num_tasks):
            try:
                stream.task_dataloader(task, self.split)
            except DataError as error:
                raise ConfigError(_no_samples(self.split, task)) from error
        names = [str(name) for name in getattr(stream, "task_names", range(stream.num_tasks))]
        if self._names and self._names != names:
            raise ConfigError(
                f"the checkpoint's tasks are {', '.join(self._names)}, the stream's {', '.join(names)}; resume with "
                "the stream that the checkpoint was made with, or without ckpt_path"
            )
        if not self._names:
            self._names = names
            self._matrix = torch.full((len(names), len(names)), torch.nan, dtype=torch.float64)
            self._untrained = torch.full((len(names),), torch.nan, dtype=torch.float64)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the untrained module, which forward transfer needs."""
        if trainer.global_step == 0 and trainer.current_epoch == 0:
            self._untrained = self._accuracies(trainer, pl_module)
        elif self._untrained.isnan().any():
            rank_zero_warn(
                "ContinualMetrics resumes from a checkpoint without its state: the earlier tasks' rows are missing, so "
                "only accuracies are logged"
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure all tasks when one ends."""
        if not ends_task(trainer):
            return
        task = int(stream_of(trainer).task_of_epoch(trainer.current_epoch))  # type: ignore[union-attr]
        self._matrix[task] = self._accuracies(trainer, pl_module)
        self._measured = True
        pl_module.log_dict(self._figures(task), on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        writers = figure_writers(trainer)
        if writers and trainer.is_global_zero:
            from ._continual_picture import accuracy_heat_map

            for log_figure in writers:
                log_figure(accuracy_heat_map(self._matrix, self._names), "continual_accuracy")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so when no task was measured."""
        if not self._measured and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn("ContinualMetrics measured nothing: no task ended in this fit", category=NoEffectWarning)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain Python; empty before the first fit."""
        if not self._names:
            return {}
        return {"matrix": self.matrix, "untrained": self.untrained, "tasks": list(self._names)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the rows of a checkpoint."""
        self._matrix, self._untrained = state_dict["matrix"].clone(), state_dict["untrained"].clone()
        self._names = list(state_dict["tasks"])

    def _figures(self, task: int) -> dict[str, float]:
        accuracies = zip(self._names, self._matrix[task].tolist(), strict=True)
        figures = {f"continual/accuracy/{name}": value for name, value in accuracies}
        so_far = self._matrix[: task + 1]
        if so_far.isnan().any() or self._untrained.isnan().any():
            return figures
        figures["continual/average_accuracy"] = average_accuracy(self._matrix)
        if task > 0:
            figures["continual/forgetting"] = forgetting(self._matrix)
            figures["continual/backward_transfer"] = backward_transfer(self._matrix)
            figures["continual/forward_transfer"] = forward_transfer(self._matrix, self._untrained)
            figures["continual/largest_drop"] = largest_drop(self._matrix)
        return figures

    def _accuracies(self, trainer: pl.Trainer, module: pl.LightningModule) -> Tensor:
        """Return the accuracy on each task, (T,) float64 on the CPU, the same on all ranks."""
        # Sharded weights are gathered in a forward pass, which therefore is the same on all ranks.
        together = isinstance(trainer.strategy, SHARDED)
        score_fn = self.score_fn or _is_right
        # Scores and samples; 32 bits hold whole numbers up to 16 million.
        counts = torch.zeros(len(self._names), 2, device=module.device, dtype=torch.float32)
        with isolate_rng(), eval_mode(module), torch.no_grad(), trainer.precision_plugin.forward_context():
            for task in range(len(self._names)):
                for number, batch in enumerate(task_batches(trainer, module, task, self.split)):
                    mine = number % trainer.world_size == trainer.global_rank
                    if not mine and not together:
                        continue
                    scores = score_fn(module, batch)
                    if not isinstance(scores, Tensor) or scores.dim() != 1:
                        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                        raise ConfigError(f"score_fn gave {got}; expected a tensor (B,), one score a sample")
                    if mine:
                        counts[task, 0] += scores.float().sum()
                        counts[task, 1] += len(scores)
        reduced: Tensor = trainer.strategy.reduce(counts, reduce_op="sum")
        right, seen = reduced.double().cpu().unbind(dim=1)
        if (seen == 0).any():
            raise ConfigError(_no_samples(self.split, int((seen == 0).nonzero()[0])))
        return right / seen


def _no_samples(split: str, task: int) -> str:
    other = "val" if split == "test" else "test"
    return f"task {task} has no {split} samples for ContinualMetrics; add some, or set its split={other!r}"


def _is_right(module: pl.LightningModule, raw: Any) -> Tensor:
    try:
        batch = as_batch(raw)
        given = input_of(batch)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"ContinualMetrics can't read the batch: {error}. Or give it a score_fn") from error
    output, label = module(given), batch.get("label")
    if label is None or label.dim() != 1 or not isinstance(output, Tensor) or output.dim() != 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        found = "no label" if label is None else f"label of shape {tuple(label.shape)}"
        raise ConfigError(
            f"{type(module).__name__} gave {got}, and the batch has {found}; expected outputs (B, classes) and label "
            "(B,): for anything else give ContinualMetrics a score_fn"
        )
    return restrict(output, batch).argmax(dim=1) == label
