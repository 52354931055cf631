"""What `configure_optimizers` returns, from what the command line can say."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from ds_lightning.errors import ConfigError


def make_optimizers(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    optimizer: OptimizerCallable,
    lr_scheduler: Literal["cosine"] | LRSchedulerCallable | None,
    total_steps: Callable[[], float],
) -> OptimizerLRScheduler:
    """Make the optimizer and its scheduler.

    Args:
        parameters: what is trained, or groups of it.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes a scheduler from the optimizer, stepped every epoch; `cosine` anneals to zero over all
            steps, stepped every step; None keeps the rate.
        total_steps: number of optimizer steps of the whole training; only asked for by `cosine`.

    Raises:
        ConfigError: when the optimizer or the scheduler refuses an argument, such as a learning rate below 0.
    """
    try:
        made = optimizer(parameters)
    except ValueError as error:
        raise ConfigError(f"model.optimizer: {error}") from error
    if lr_scheduler is None:
        return made
    if lr_scheduler == "cosine":
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(made, T_max=max(int(total_steps()), 1))
        return {"optimizer": made, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}
    try:
        scheduler = lr_scheduler(made)
    except ValueError as error:
        raise ConfigError(f"model.lr_scheduler: {error}") from error
    if isinstance(scheduler, ReduceLROnPlateau):
        # Lightning's own ReduceLROnPlateau names the metric that it watches; torch's does not.
        return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
    return {"optimizer": made, "lr_scheduler": scheduler}
