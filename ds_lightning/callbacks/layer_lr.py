"""Learning rates layer by layer, from the variance of each layer's gradient."""

import math
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ds_lightning.errors import ConfigError, NoEffectWarning

from ._layers import check_patterns, find_layers
from ._linear_optimizers import check_linear, default_alpha
from ._log_step import log_step
from ._scaled_steps import ScaledSteps, VarianceRule
from ._strategies import SHARDED

_UNCHANGED = 0.01


class DynamicLayerLR(pl.Callback):
    """Multiply each layer's learning rate by a factor that falls with the variance of its gradient.

    **When it acts.** Around every `optimizer.step`, through the optimizer's own step hooks: after unscaling,
    accumulation and clipping, in automatic and manual optimization, for each optimizer by itself. Every `every` steps
    it reads the gradients' norms; they count one period later, so that nothing waits for the device.

    **What it changes.** The step of each layer (a weight with two or more dimensions, and its bias) is multiplied, as
    if its parameter group had the rate `scheduler's rate * multiplier`, decoupled weight decay included. Parameter
    groups, schedulers and optimizer checkpoints stay as they are. Norm layers and other vectors keep multiplier 1,
    and so does every layer at first: the rule fades in from step `every` to step `warmup`.

    **What it logs.** `layer_lr/<layer>`, the multiplier, every `log_every_n_steps`; a summary at the end of fit; and a
    `NoEffectWarning` when no multiplier ever differed from 1 by more than 1%.

    **Checkpoint.** Names, averages, counters, multipliers and the reading that is under way: a resumed run goes on
    bit for bit. Layers are matched by name. The checkpoint loads without the callback. Another `fit` without
    `ckpt_path` starts afresh, as its optimizers do.

    **Limits.** The step must be linear in the rate: LBFGS, schedule-free, D-adaptation and Prodigy are refused, and an
    optimizer that torch does not ship is tried out at the start. FSDP, DeepSpeed and ModelParallelStrategy are
    refused: each rank holds only parts of a layer. Layers with sparse gradients are left out, with a warning. The
    gain is in short trainings; see docs/layer_lr.md before use in long ones.

    **Cost.** One copy of the scaled weights (on CUDA made and freed within each step, elsewhere kept), and two passes
    over them.

    Args:
        alpha: strength of the rule, > 0. None: 1 for SGD, 0.5 for others, which normalise their step themselves.
        bounds: smallest and largest multiplier, 0 < low <= 1 <= high.
        every: optimizer steps between two readings, >= 1.
        ema: decay of the averages for each optimizer step, in [0, 1); a reading weighs `1 - ema ** every`.
        warmup: optimizer step at which the rule has its full strength, >= 0.
        include: fnmatch patterns on parameter names; only layers whose weight matches one are scaled. None: all.
        exclude: fnmatch patterns on parameter names that are never scaled.

    Raises:
        ConfigError: an argument out of range; at the start of fit a pattern that matches nothing, or an optimizer or
            strategy that can't work.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[DynamicLayerLR(exclude=["head.*"])], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        alpha: float | None = None,
        bounds: tuple[float, float] = (0.4, 2.3),
        every: int = 10,
        ema: float = 0.95,
        warmup: int = 50,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
    ) -> None:
        if alpha is not None and not 0 < alpha < math.inf:
            raise ConfigError(f"alpha is {alpha}; expected a number > 0, or None for the optimizer's default")
        if len(bounds) != 2 or not 0 < bounds[0] <= 1 <= bounds[1] < math.inf:
            raise ConfigError(f"bounds is {bounds}; expected (low, high) with 0 < low <= 1 <= high")
        if every < 1:
            raise ConfigError(f"every is {every}; expected a number of optimizer steps >= 1")
        if not 0 <= ema < 1:
            raise ConfigError(f"ema is {ema}; expected a decay in [0, 1)")
        if warmup < 0:
            raise ConfigError(f"warmup is {warmup}; expected a number of optimizer steps >= 0")
        for name, patterns in (("include", include), ("exclude", exclude)):
            if isinstance(patterns, str):
                raise ConfigError(f"{name} is the string {patterns!r}; expected a list, [{patterns!r}]")
        self.alpha = alpha
        self.bounds = (float(bounds[0]), float(bounds[1]))
        self.every = every
        self.ema = ema
        self.warmup = warmup
        self.include = include
        self.exclude = exclude
        self._scaled: list[ScaledSteps] = []
        self._state: dict[str, Any] = {}
        self._logged_at = -1

    @property
    def multipliers(self) -> dict[str, float]:
        """The multipliers in use, by layer; empty outside of fit."""
        return {name: m for scaled in self._scaled for name, m in scaled.multipliers.items()}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit; a checkpoint's state is loaded after this."""
        if stage == "fit":
            self._remove_hooks()
            self._scaled, self._state, self._logged_at = [], {}, -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the optimizers can be scaled, and put the hooks on them."""
        if isinstance(trainer.strategy, SHARDED):
            raise ConfigError(
                f"DynamicLayerLR can't work with {type(trainer.strategy).__name__}, which gives each rank parts of a "
                "layer; expected a strategy with whole layers, such as ddp"
            )
        check_patterns(pl_module, "include", self.include)
        check_patterns(pl_module, "exclude", self.exclude)
        find = partial(find_layers, pl_module, include=self.include, exclude=self.exclude)
        shared = trainer.world_size > 1 and torch.distributed.is_available() and torch.distributed.is_initialized()
        for optimizer in trainer.optimizers:
            stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            if not find(stepped):
                continue
            check_linear(optimizer)
            alpha = default_alpha(optimizer) if self.alpha is None else self.alpha
            rule = VarianceRule(alpha, self.bounds, self.every, self.ema, self.warmup)
            self._scaled.append(ScaledSteps(optimizer, find, rule, broadcast=shared))
        self._resume()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the multipliers, which are on the host already."""
        step, due = log_step(trainer)
        if not due or self._logged_at == step or not trainer.is_global_zero:
            return
        self._logged_at = step
        metrics = {f"layer_lr/{name}": m for name, m in self.multipliers.items()}
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step=step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what came out, or that nothing did."""
        multipliers = self.multipliers
        if multipliers:
            low, high = min(multipliers, key=multipliers.__getitem__), max(multipliers, key=multipliers.__getitem__)
            rank_zero_info(
                f"DynamicLayerLR: {len(multipliers)} layers, multipliers from {multipliers[low]:.3g} ({low}) to "
                f"{multipliers[high]:.3g} ({high})"
            )
        reason = self._no_effect(trainer)
        if reason and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(f"DynamicLayerLR had no effect: {reason}", category=NoEffectWarning)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the hooks off; the state stays, for a checkpoint that is written now."""
        self._remove_hooks()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the hooks off and let go of the model; the state stays."""
        if stage == "fit" and self._scaled:
            self._remove_hooks()
            self._state = self.state_dict()
            self._scaled = []

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain Python; empty before the first fit."""
        if not self._scaled:
            return self._state
        return {"optimizers": [scaled.state_dict() for scaled in self._scaled]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the optimizers exist."""
        self._state = state_dict

    def _resume(self) -> None:
        saved = self._state.get("optimizers", []) if self._state else []
        if not saved:
            return
        new = sum(len(scaled.layers) for scaled in self._scaled[len(saved) :])
        gone = sum(len(state["layers"]["names"]) for state in saved[len(self._scaled) :])
        for scaled, state in zip(self._scaled, saved, strict=False):
            added, lost = scaled.load_state_dict(state)
            new, gone = new + added, gone + lost
        if new or gone:
            rank_zero_warn(
                f"DynamicLayerLR resumes with other layers than the checkpoint's: {new} new, which start at "
                f"multiplier 1, and {gone} gone; the others were matched by name"
            )

    def _no_effect(self, trainer: pl.Trainer) -> str | None:
        if not self._scaled:
            return "no optimizer holds a weight with two or more dimensions that include and exclude let through"
        if all(len(scaled.layers) == 1 for scaled in self._scaled):
            return "there is one layer, and multipliers are relative to the mean over the layers"
        if max(scaled.largest_change for scaled in self._scaled) > _UNCHANGED:
            return None
        steps = max(scaled.steps for scaled in self._scaled)
        if steps == 0 and trainer.global_step > 0:
            return "the optimizer's step hooks never ran; it replaces torch.optim.Optimizer.step"
        if steps <= 2 * self.every:
            return f"multipliers first change after {2 * self.every} optimizer steps, and there were {steps}"
        return f"every multiplier stayed within {_UNCHANGED:.0%} of 1 for {steps} optimizer steps"

    def _remove_hooks(self) -> None:
        for scaled in self._scaled:
            scaled.remove()
