"""Learning rates layer by layer, from the variance of each layer's gradient."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ds_lightning.errors import ConfigError, NoEffectWarning

from ._layer_fade import check_rates
from ._layer_picture import log_multipliers
from ._layer_rules import FLOOR, ReferenceName, RuleName, VarianceRule, checked_rule, with_start
from ._layer_summary import no_effect, summary
from ._layers import check_patterns, find_layers, find_vectors
from ._linear_optimizers import check_linear, default_alpha, default_reference, default_rule
from ._log_step import log_step
from ._scaled_steps import ScaledSteps
from ._trained_norms import norms_are_trained

_REFUSED = (DeepSpeedStrategy, FSDPStrategy)


class DynamicLayerLR(pl.Callback):
    """Multiply each layer's learning rate by a factor that follows from the variance of its gradient.

    **When it acts.** Around every `optimizer.step`, through the optimizer's own step hooks: after unscaling,
    accumulation and clipping, in automatic and manual optimization, for each optimizer by itself. Every `every` steps
    it reads the gradients' norms; they count at the next reading, so that nothing waits for the device.

    **What it changes.** The step of each layer (a weight with two or more dimensions, and its bias) is multiplied, as
    if its parameter group had the rate `scheduler's rate * multiplier`, decoupled weight decay included. Parameter
    groups, schedulers and optimizer checkpoints stay as they are. Norm layers and other vectors have the multiplier
    `vectors`. Every other layer has 1 at first: the rule fades in from step `every` to step `warmup`, or begins with a
    `slow_start`.

    **What it logs.** `layer_lr/<layer>`, the multiplier, and `layer_lr_variance/<layer>`, the gradient's variance
    averaged over the weights, every `log_every_n_steps`; a picture of all multipliers over the steps on loggers with
    `log_figure`, and a summary, at the end of fit; and a `NoEffectWarning` when no multiplier ever differed from 1 by
    more than 1%, or with rule "article" not in half of the readings.

    **Checkpoint.** Names, averages, counters, multipliers, largest rates, the picture's columns (500 at most) and the
    reading that is under way: a resumed run goes on bit for bit. Layers are matched by name. The checkpoint loads
    without the callback. Another `fit` without `ckpt_path` starts afresh, as its optimizers do, and for rule None from
    a trained network.

    **Limits.** The step must be linear in the rate: LBFGS, schedule-free, D-adaptation and Prodigy are refused, and an
    optimizer that torch does not ship is tried out at the start. FSDPStrategy and DeepSpeed are refused: each rank
    holds parts of a layer that have no name; ModelParallelStrategy with `fully_shard` works. Layers with sparse
    gradients are left out, with a warning. The gain is on deep networks with norm layers and SGD; docs/layer_lr.md
    says when not to use it.

    **Cost.** One copy of the scaled weights (on CUDA made and freed within each step, elsewhere kept), and two passes
    over them.

    Args:
        rule: "variance": noisier layers step less; "trust": so, and layers with larger weights step more (as LARS,
            arXiv 1708.03888); "snr": layers with more signal than noise step more; "article": 1 + 0.5 (1 - exp(-0.1
            Var)) of the last gradient's elements, without averages, bounds and warm-up, to see that it does nothing.
            None: what helps and does no harm: for SGD "trust", where norm layers follow some layers and no norm layer
            beside the layers that are scaled was trained before (as in fine-tuning), else nothing; for other optimizers
            "variance" of the layers that no norm follows, beside all others, which keep 1.
        alpha: strength of the rule, > 0. None: 1 for SGD, 0.5 for others, which normalise their step themselves.
        trust: strength of the weights' size, >= 0, for rule "trust" alone. None: 1.
        bounds: smallest and largest multiplier, 0 < low <= 1 <= high. None: (0.4, 2.3), (0.02, 10) for rule "trust".
            Layers that no norm follows, the head for one, may go down to 0.02 where half of all layers have a norm, and
            with rule "trust" up to 2.3.
        reference: what has multiplier 1, for rule "trust": "mean", the mean over the layers at each reading, so that
            only the layers' shares change; "start", that mean as it was when all layers had a gradient first, at step
            `warmup` at the latest, so that the rate of all layers follows the size of weights over gradients, as in
            LARS; where the size of a layer's weights changes the loss, as without a norm layer behind it, that layer
            follows "variance". None: "start" for SGD, else "mean".
        vectors: multiplier of all norm layers' scales and shifts, and of biases that belong to no layer, > 0.
        every: optimizer steps between two readings, >= 1.
        ema: decay of the averages for each optimizer step, in [0, 1).
        slow_start: read in each of the first steps, later after a quarter of the steps so far, `every` at most; all
            layers of a network with norm layers wait at the lower bound for three steps, until it is known whose size
            counts; where half of all layers have a norm, the others, the head for one, come up from there until step
            `warmup`. For rule None, and "trust" with the reference "start". None: with SGD.
        warmup: optimizer step at which the rule has its full strength, >= 0. None: 40 with a slow start, else 50.
        groups: which layers of one optimizer share a multiplier. "layer": none; "block": those in the same numbered
            module, such as `layer1.0`; or a function from a layer's name to its group's name.
        fade: take multipliers to the power of (rate / largest rate so far), so that they end at 1 with the schedule.
        include: fnmatch patterns on parameter names; only layers whose weight matches one are scaled. None: all.
        exclude: fnmatch patterns on parameter names that are never scaled.

    Raises:
        ConfigError: an argument out of range, or one that the rule does not use; at the start of fit a pattern that
            matches nothing, a group that is no str, or an optimizer or strategy that can't work.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[DynamicLayerLR(exclude=["head.*"])], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        rule: RuleName | None = None,
        alpha: float | None = None,
        trust: float | None = None,
        bounds: tuple[float, float] | None = None,
        reference: ReferenceName | None = None,
        vectors: float = 1.0,
        every: int = 10,
        ema: float = 0.95,
        slow_start: bool | None = None,
        warmup: int | None = None,
        groups: Literal["layer", "block"] | Callable[[str], str] = "layer",
        fade: bool = False,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
    ) -> None:
        checked_rule(rule, alpha, trust, bounds, reference)
        if not 0 < vectors < math.inf:
            raise ConfigError(f"vectors is {vectors}; expected a number > 0")
        if every < 1:
            raise ConfigError(f"every is {every}; expected a number of optimizer steps >= 1")
        if not 0 <= ema < 1:
            raise ConfigError(f"ema is {ema}; expected a decay in [0, 1)")
        if warmup is not None and warmup < 0:
            raise ConfigError(f"warmup is {warmup}; expected a number of optimizer steps >= 0")
        if not callable(groups) and groups not in ("layer", "block"):
            raise ConfigError(f"groups is {groups!r}; expected 'layer', 'block' or a function of a layer's name")
        for name, patterns in (("include", include), ("exclude", exclude)):
            if isinstance(patterns, str):
                raise ConfigError(f"{name} is the string {patterns!r}; expected a list, [{patterns!r}]")
        self.rule = rule
        self.alpha = alpha
        self.trust = trust
        self.bounds = bounds
        self.reference = reference
        self.vectors = float(vectors)
        self.every = every
        self.ema = ema
        self.slow_start = slow_start
        self.warmup = warmup
        self.groups = groups
        self.fade = fade
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
        if isinstance(trainer.strategy, _REFUSED):
            raise ConfigError(
                f"DynamicLayerLR can't work with {type(trainer.strategy).__name__}, which gives each rank parts of a "
                "layer that have no name; expected ddp, or ModelParallelStrategy with fully_shard"
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
            if self.fade:
                check_rates(optimizer.param_groups)
            name = self.rule or default_rule(optimizer)
            trust, bounds = checked_rule(name, self.alpha, self.trust, self.bounds, self.reference)
            reference = self.reference or default_reference(optimizer, name)
            spare, floor = self.rule is None, FLOOR if self.bounds is None else bounds[0]
            rest = (trust, self.fade, reference, self.vectors, spare, floor)
            rule = VarianceRule(alpha, bounds, self.every, self.ema, 0, name, *rest)
            sgd = isinstance(optimizer, torch.optim.SGD)
            rule = with_start(rule, self.slow_start, self.warmup, sgd)
            vectors = partial(find_vectors, pl_module, include=self.include, exclude=self.exclude)
            trained = partial(norms_are_trained, pl_module) if spare and sgd else None
            self._scaled.append(ScaledSteps(optimizer, find, rule, shared, self.groups, vectors, trained))
        self._resume()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log multipliers and variances, which are on the host already."""
        step, due = log_step(trainer)
        if not due or self._logged_at == step or not trainer.is_global_zero:
            return
        self._logged_at = step
        metrics = {f"layer_lr/{name}": m for name, m in self.multipliers.items()}
        for scaled in self._scaled:
            metrics.update({f"layer_lr_variance/{name}": value for name, value in scaled.variances.items()})
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step=step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the multipliers over the steps for the loggers that take figures."""
        if trainer.is_global_zero:
            log_multipliers(trainer, [scaled.history for scaled in self._scaled])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what came out, or that nothing did."""
        if text := summary(self._scaled, pl_module):
            rank_zero_info(text)
        reason = no_effect(self._scaled, trainer)
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
        """Keep the state until the optimizers exist; they do when the strategy restores after setup."""
        self._state = state_dict
        if self._scaled:
            self._resume()

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

    def _remove_hooks(self) -> None:
        for scaled in self._scaled:
            scaled.remove()
