"""The step that a callback's own metrics of a batch are logged with, and whether it is time to."""

import lightning.pytorch as pl


def log_step(trainer: pl.Trainer) -> tuple[int, bool]:
    """Return, in `on_train_batch_end`, the step of Lightning's own metrics of this batch, and whether they are due."""
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return step, every > 0 and (step + 1) % every == 0
