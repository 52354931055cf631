"""What elastic weight consolidation can't work with, said before it costs a training."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_map

from ds_lightning.errors import ConfigError

from ._eval_mode import eval_mode
from ._strategies import SHARDED
from ._task_fisher import classified, labels_in, logits_of


def check_arguments(
    strength: float,
    mode: str,
    decay: float,
    fisher: str,
    merge: float | None,
    samples: int | None,
    chunk_size: int | None,
    loss_fn: Any,
    optimizer_state: str,
    exclude: Any,
) -> None:
    """Check the constructor's arguments.

    Raises:
        ConfigError: names the argument, the range and the value.
    """
    if not 0 < strength < math.inf:
        raise ConfigError(f"strength is {strength}; expected a number > 0")
    for name, value, known in (
        ("mode", mode, ("separate", "online")),
        ("fisher", fisher, ("true", "empirical")),
        ("optimizer_state", optimizer_state, ("keep", "reset")),
    ):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}; expected {' or '.join(map(repr, known))}")
    if not 0 <= decay <= 1:
        raise ConfigError(f"decay is {decay}; expected a number in [0, 1]")
    if merge is not None and not 0 < merge < math.inf:
        raise ConfigError(f"merge is {merge}; expected a number > 0, or None, which is off")
    for name, count in (("samples", samples), ("chunk_size", chunk_size)):
        if count is not None and count < 1:
            raise ConfigError(f"{name} is {count}; expected a whole number >= 1, or None")
    if loss_fn is not None and (fisher != "empirical" or merge is not None):
        raise ConfigError(
            f"loss_fn is given with fisher={fisher!r} and merge={merge}, which both need logits; expected "
            "fisher='empirical' and merge=None"
        )
    if isinstance(exclude, str):
        raise ConfigError(f"exclude is the string {exclude!r}; expected a list, [{exclude!r}]")


def check_fit(trainer: pl.Trainer, module: pl.LightningModule, loss_fn: Any) -> None:
    """Check the strategy, the Trainer's epochs and the module at the start of a fit.

    Raises:
        ConfigError: says what can't work.
    """
    if isinstance(trainer.strategy, SHARDED):
        raise ConfigError(
            f"ElasticWeightConsolidation can't work with {type(trainer.strategy).__name__}, which gives each rank "
            "parts of a parameter; expected a strategy with whole parameters, such as ddp"
        )
    _check_not_over(trainer)
    if loss_fn is None and type(module).forward is pl.LightningModule.forward:
        raise ConfigError(
            f"{type(module).__name__} has no forward, which ElasticWeightConsolidation takes logits from; "
            "expected forward(x) -> (B, C), or loss_fn=(module, batch) -> (B,) with fisher='empirical' and "
            "merge=None"
        )


def _check_not_over(trainer: pl.Trainer) -> None:
    """Refuse a fit whose Trainer has trained all its epochs: Lightning would train nothing, without a word.

    Raises:
        ConfigError: says what to do.
    """
    if trainer.ckpt_path is not None:  # the counters are yet to be restored
        return
    done, limit = trainer.current_epoch, trainer.max_epochs
    if limit is not None and 0 <= limit <= done and done:
        raise ConfigError(
            f"this Trainer has trained {done} of max_epochs={limit} epochs, so this fit would train nothing; expected "
            "a new Trainer for each fit, or a larger trainer.fit_loop.max_epochs"
        )
    if 0 < trainer.max_steps <= trainer.global_step:
        raise ConfigError(
            f"this Trainer has made {trainer.global_step} of max_steps={trainer.max_steps} steps, so this fit would "
            "train nothing; expected a new Trainer for each fit"
        )


def check_first_batch(module: pl.LightningModule, batch: Any) -> None:
    """Try whether logits come out of a batch, on two of its samples; nothing of the module changes.

    Raises:
        ConfigError: what does not fit, and that `loss_fn` helps.
    """
    few = tree_map(lambda x: x[:2] if isinstance(x, Tensor) and x.ndim else x, classified(batch))
    with isolate_rng(include_cuda=module.device.type == "cuda"), eval_mode(module), torch.no_grad():
        logits_of(module, few)


def new_classes_only(trainer: pl.Trainer, batch: Any, seen: Tensor) -> bool:
    """Tell whether a task's first batch has none of the classes seen, in a head that all classes share."""
    label = labels_in(batch)
    datamodule = getattr(trainer, "datamodule", None)
    if label is None or len(seen) == 0 or getattr(datamodule, "memory_size", None):
        return False
    if isinstance(batch, dict) and "allowed" in batch:
        return False
    return not bool(torch.isin(label.cpu(), seen).any())
