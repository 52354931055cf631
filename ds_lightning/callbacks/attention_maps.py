"""Which modality attends to which, and what each is worth: pictures, JSON and permutation importance."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from ds_lightning.errors import ConfigError, NoEffectWarning
from ds_lightning.functional.batch import restrict

from ._attention_batches import Seen, checked_batch, copied, look
from ._eval_mode import eval_mode
from ._figures import figure_writers
from ._permuted import permuted_batches


class AttentionMaps(pl.Callback):
    """Show the attention between modalities, and beside it what the predictions lose when one is permuted.

    Attention is not explanation (arXiv 1902.10186): a modality can be attended to and change nothing. So the share of
    right predictions is measured again with each modality's values dealt out anew among the samples that have it
    (arXiv 1801.01489); what is lost is that modality's importance.

    **When it acts.** At the end of a validation, on batches spread over it: in a fit every `every_n_epochs` epochs
    and at `max_epochs` or `max_steps`, and in `trainer.validate`. Not in the sanity check.

    **What it changes.** Nothing: the module goes to eval mode and back, and the generators stay as they were.

    **What it logs.** `attention/importance/<modality>`, the accuracy lost, over all samples of the batches (those
    without the modality lose nothing). To every logger that has `log_figure`, the pictures `attention_epoch_0003`, the
    mean matrix (a row attends, a column is attended to, rows sum to 1; of each row the mean over the samples that have
    its modality), and `attention_samples_epoch_0003`, single samples: their matrix, the image, the words and the sound
    with the attention of the fused token. To every logger that has `log_json`, the same numbers as
    `attention_epoch_0003`. In `trainer.validate` the names end in `_validate`.

    **Checkpoint.** Nothing is kept.

    **Limits.** The module needs `attention_maps(batch)`, as `MultimodalFusion` has: `names` ("fused" and the M
    modalities), `matrix` (B, M+1, M+1) with rows that sum to 1, and `tokens`, modality to (B, N), the fused token's
    attention to each token. For importance `module(batch)` gives logits (B, classes), and the batch has `label` (B,),
    or (B, classes) of 0 and 1, where the accuracy is over all labels. Values are dealt out within a rank. Only the
    first validation loader is used.

    **Cost.** A copy of the batches in the CPU's memory until the validation ends, M + 2 forward passes over them, and
    about a second for the pictures.

    Args:
        every_n_epochs: at least 1.
        samples: drawn one by one, the first of the loader, at least 0.
        batches: the most validation batches of each rank, at least 1.
        importance: whether the permutation importance is measured.

    Raises:
        ConfigError: a number out of its range; at the start a module without `attention_maps`; in a validation maps,
            logits or labels of another form.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[AttentionMaps(every_n_epochs=5)], logger=False, accelerator="cpu")
    """

    def __init__(self, every_n_epochs: int = 1, samples: int = 4, batches: int = 8, importance: bool = True) -> None:
        for name, value, least in (
            ("every_n_epochs", every_n_epochs, 1),
            ("samples", samples, 0),
            ("batches", batches, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} is {value}; expected an integer >= {least}")
        self.every_n_epochs = every_n_epochs
        self.samples = samples
        self.batches = batches
        self.importance = importance
        self._kept: list[dict[str, Any]] = []
        self._measured = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the module, and forget an earlier fit."""
        self._kept, self._measured = [], False
        if stage in ("fit", "validate") and not callable(getattr(pl_module, "attention_maps", None)):
            raise ConfigError(
                f"AttentionMaps needs a module with `attention_maps(batch)`, such as MultimodalFusion; "
                f"{type(pl_module).__name__} has none"
            )
        if stage in ("fit", "validate") and not getattr(pl_module, "has_attention", True):
            raise ConfigError(
                f"AttentionMaps needs attention, and this {type(pl_module).__name__} has none; use fusion='cross', or "
                "leave the callback out"
            )

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of what an interrupted validation left."""
        self._kept = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep batches of a validation that is due, spread over it: the first ones may be of one class."""
        total = trainer.num_val_batches[0]
        step = max(1, int(total) // self.batches) if math.isfinite(total) else 1
        wanted = dataloader_idx == 0 and batch_idx % step == 0 and len(self._kept) < self.batches
        if wanted and self._due(trainer):
            self._kept.append(copied(checked_batch(batch)))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and draw."""
        kept, self._kept = self._kept, []
        if not kept:
            return
        self._measured = True
        with isolate_rng(), eval_mode(pl_module), torch.no_grad(), trainer.precision_plugin.forward_context():
            seen = look(pl_module, kept, self.samples)
            importance, accuracy = self._importances(trainer, pl_module, kept, seen) if self.importance else ({}, None)
        sums = torch.cat([seen.rows_sum.flatten(), seen.rows_count]).to(pl_module.device, torch.float32)
        sums = trainer.strategy.reduce(sums, reduce_op="sum").cpu().double()
        rows = len(seen.names)
        # 0 / 0, NaN, is the row of a modality that no sample has.
        mean = sums[: rows * rows].view(rows, rows) / sums[rows * rows :, None]
        if importance:
            figures = {f"attention/importance/{name}": value for name, value in importance.items()}
            pl_module.log_dict(figures, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        if trainer.is_global_zero:
            self._write(trainer, seen, mean, importance, accuracy)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so when nothing was measured."""
        if not self._measured and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                "AttentionMaps measured nothing: no validation fell on an epoch that is due; set every_n_epochs, or "
                "check_val_every_n_epoch of the Trainer",
                category=NoEffectWarning,
            )

    def _due(self, trainer: pl.Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        if trainer.state.fn == TrainerFn.VALIDATING:
            return True
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return False
        epoch, steps, most = trainer.current_epoch + 1, trainer.max_steps, trainer.max_epochs
        last = trainer.should_stop or epoch == most or 0 <= steps <= trainer.global_step
        return epoch % self.every_n_epochs == 0 or last

    def _importances(
        self, trainer: pl.Trainer, module: pl.LightningModule, kept: list[dict[str, Any]], seen: Seen
    ) -> tuple[dict[str, float], float]:
        """Return the accuracy that each modality's permutation costs, and the accuracy, over all ranks."""
        counts = [_right(module, kept)]
        for column, name in enumerate(seen.names[1:]):
            counts.append(_right(module, permuted_batches(kept, name, column)))
        # Whole numbers up to 16 million fit into 32 bits.
        table = trainer.strategy.reduce(torch.stack(counts).float(), reduce_op="sum").cpu().double()
        accuracy, *others = (table[:, 0] / table[:, 1]).tolist()
        return {name: accuracy - other for name, other in zip(seen.names[1:], others, strict=True)}, accuracy

    def _write(
        self, trainer: pl.Trainer, seen: Seen, mean: Tensor, importance: dict[str, float], accuracy: float | None
    ) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        end = f"epoch_{trainer.current_epoch:04d}" if fitting else "validate"
        content = {
            "names": list(seen.names),
            "rows": "attend, and sum to 1; null: no sample has the modality",
            "matrix": [[None if math.isnan(value) else value for value in row] for row in mean.tolist()],
            "accuracy": accuracy,
            "importance": importance,
            "samples": [sample.as_json() for sample in seen.samples],
        }
        for logger in trainer.loggers:
            if hasattr(logger, "log_json"):
                logger.log_json(content, f"attention_{end}")
        writers = figure_writers(trainer)
        if not writers:
            return
        from ._attention_picture import matrix_figure, samples_figure

        data = getattr(trainer, "datamodule", None)
        figures = {f"attention_{end}": matrix_figure(mean, seen.names, importance)}
        if seen.samples:
            figures[f"attention_samples_{end}"] = samples_figure(seen.samples, data)
        for name, figure in figures.items():
            for log_figure in writers:
                log_figure(figure, name)


def _right(module: pl.LightningModule, batches: list[dict[str, Any]]) -> Tensor:
    """Return how many predictions are right, and how many there are, (2,)."""
    right = torch.zeros(2, device=module.device)
    for held in batches:
        batch = move_data_to_device(held, module.device)
        label, logits = batch.get("label"), module(batch)
        shapes = [tuple(each.shape) if isinstance(each, Tensor) else () for each in (label, logits)]
        if len(shapes[1]) != 2 or shapes[0] not in (shapes[1], shapes[1][:1]):
            raise ConfigError(
                f"AttentionMaps measures importance with label (B,) or (B, classes) and logits (B, classes); the batch "
                f"and {type(module).__name__} gave {shapes[0] or 'no label'} and {shapes[1] or type(logits).__name__}: "
                "give both, or set importance=False"
            )
        one = len(shapes[0]) == 1
        hits = restrict(logits, batch).argmax(dim=1) == label if one else (logits > 0) == (label > 0.5)
        right += torch.stack([hits.sum(), torch.tensor(hits.numel(), device=hits.device)])
    return right
