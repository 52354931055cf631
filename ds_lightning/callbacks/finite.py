"""Steps with NaN or inf are left out, counted, and stop the training when they do not end."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from ds_lightning.errors import ConfigError

from ._finite_check import FiniteCheck
from ._finite_words import described, limit_reached, listed
from ._guarded_step import GuardedStep
from ._log_step import log_step

_EVENTS_KEPT = 20


class FiniteGuard(pl.Callback):
    """Leave out every optimizer step whose loss or gradient is NaN or inf, on all ranks together.

    **When it acts.** In `optimizer.step`, after backward, accumulation, unscaling, other callbacks' gradients and
    clipping, and before the update; in automatic and manual optimization, for each optimizer by itself.

    **What it changes.** Nothing, while all is finite. Otherwise the update is not made: weights, momentum and step
    counters stay bit-equal, the gradients are zeroed, and one warning names the step, the batch and the parameters.
    After `max_consecutive` such steps of one optimizer in a row, or `max_total` in all, it raises
    `FloatingPointError`. `trainer.global_step` and the schedulers go on as Lightning moves them: the schedule stays
    tied to the batches seen. Buffers (running statistics of BatchNorm) change in forward and are not put back.

    **What it logs.** `finite/skipped`, the steps left out so far, every `log_every_n_steps` and when one is left out,
    then with `finite/batch`, the batch; with a GradScaler `finite/scaler_skipped`.

    **Checkpoint.** The counters and the last 20 events (`events`: epoch, batches, step, optimizer, parameters). A
    resumed run goes on bit for bit.

    **Limits.** A GradScaler leaves steps out by itself while it looks for its scale: these are counted apart and only
    count towards the stop when the loss itself is not finite, or the scale is below 1. With several optimizers only
    their gradients decide, for a loss can't be told apart. An optimizer that evaluates several times in a step (LBFGS)
    is guarded at the first evaluation; NaN at a later one stops training, for a step under way can't be undone.
    DeepSpeed steps by itself and is refused.

    **Cost.** A pass over the gradients (two with clipping), which writes the same bits back, and one read of a flag,
    which makes the host wait for backward; on several ranks one small all-reduce. See docs/finite.md.

    Args:
        max_consecutive: steps left out in a row, of one optimizer, at which training stops, >= 1.
        max_total: steps left out in all at which training stops, >= 1; None: no limit.

    Raises:
        ConfigError: an argument out of range; at the start of fit a strategy that steps by itself.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[FiniteGuard(max_consecutive=3)], logger=False, accelerator="cpu")
    """

    def __init__(self, max_consecutive: int = 3, max_total: int | None = 100) -> None:
        if max_consecutive < 1:
            raise ConfigError(f"max_consecutive is {max_consecutive}; expected a number of steps >= 1")
        if max_total is not None and max_total < 1:
            raise ConfigError(f"max_total is {max_total}; expected a number of steps >= 1, or None for no limit")
        self.max_consecutive = max_consecutive
        self.max_total = max_total
        self.skipped = 0
        self.scaler_skipped = 0
        self.events: list[dict[str, Any]] = []
        self._consecutive: list[int] = []
        self._guards: list[GuardedStep] = []
        self._losses: list[tuple[int, Tensor]] = []
        self._batch = 0
        self._skipped_here = False
        self._logged_at = -1
        # Of the fit under way; Any, for it is there whenever a step is.
        self._trainer: Any = None
        self._check: Any = None
        self._device = torch.device("cpu")
        self._ranks, self._on_host = 1, True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit; a checkpoint's state is loaded after this."""
        if stage == "fit":
            self._remove()
            self.skipped, self.scaler_skipped, self.events, self._consecutive = 0, 0, [], []
            self._losses, self._logged_at, self._skipped_here = [], -1, False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Guard the optimizers."""
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ConfigError(
                "FiniteGuard can't work with DeepSpeedStrategy, whose engine makes the step; expected another "
                "strategy, such as ddp or fsdp"
            )
        self._guard(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the batch; guard optimizers that were replaced since."""
        if [guard.optimizer for guard in self._guards] != trainer.optimizers:
            self._guard(trainer)
        self._batch = batch_idx
        for guard in self._guards:
            if guard.first_batch is None or guard.first_batch > batch_idx:
                guard.first_batch = batch_idx

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep the loss until the step; nothing waits for the device."""
        if len(self._guards) == 1:
            self._losses.append((self._batch, loss.detach()))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look before clipping, which spreads one NaN over all gradients and turns inf into a number."""
        for guard in self._guards:
            if guard.optimizer is optimizer:
                guard.waits = True
                # On a CPU a look costs nothing; elsewhere it would wait for the device.
                if _clips(trainer, pl_module) and (not self._on_host or self._any_raised(guard)):
                    guard.before_clipping = guard.flags(self._device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the steps that a GradScaler left out, and log."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for guard in self._guards:
            # Without a loss `training_step` returned None, and nobody stepped.
            if guard.waits and scaler is not None and (self._losses or len(self._guards) > 1):
                guard.waits = False
                self._left_out_by_scaler(guard, scaler.get_scale())
        step, due = log_step(trainer)
        if (due or self._skipped_here) and self._logged_at != step and trainer.is_global_zero:
            self._logged_at = step
            metrics = {"finite/skipped": float(self.skipped)}
            if self._skipped_here:
                metrics["finite/batch"] = float(self.events[-1]["batches"][-1])
            if scaler is not None:
                metrics["finite/scaler_skipped"] = float(self.scaler_skipped)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
        self._skipped_here = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the optimizers' own steps back; the counters stay, for a checkpoint that is written now."""
        self._remove()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the optimizers' own steps back; the counters stay."""
        if stage == "fit":
            self._remove()

    def state_dict(self) -> dict[str, Any]:
        """Return plain Python."""
        return {
            "skipped": self.skipped,
            "scaler_skipped": self.scaler_skipped,
            "consecutive": [guard.consecutive for guard in self._guards] or list(self._consecutive),
            "events": [dict(event) for event in self.events],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counters over."""
        self.skipped = state_dict["skipped"]
        self.scaler_skipped = state_dict["scaler_skipped"]
        self.events = [dict(event) for event in state_dict["events"]]
        self._consecutive = list(state_dict["consecutive"])

    def _guard(self, trainer: pl.Trainer) -> None:
        self._remove()
        self._trainer, self._device, self._ranks = trainer, trainer.strategy.root_device, trainer.world_size
        self._check, self._on_host = FiniteCheck(self._device), self._device.type == "cpu"
        self._guards = [GuardedStep(optimizer, self._decide, self._check_again) for optimizer in trainer.optimizers]
        for guard, consecutive in zip(self._guards, self._consecutive, strict=False):
            guard.consecutive = consecutive

    def _remove(self) -> None:
        if self._guards:
            self._consecutive = [guard.consecutive for guard in self._guards]
        for guard in self._guards:
            guard.remove()
        self._guards, self._trainer, self._check = [], None, None

    def _decide(self, guard: GuardedStep) -> bool:
        # A fused optimizer with a GradScaler: gradients are still scaled, and the step looks at this flag by itself.
        found = getattr(guard.optimizer, "found_inf", None)
        before, guard.before_clipping = guard.before_clipping, None
        raised = self._check([] if found is not None else guard.gradients())
        if self._all_finite(raised if before is None else raised + before.sum()):
            guard.consecutive = 0
            self._losses, guard.first_batch = [], None
            if found is not None and found.item():
                self.scaler_skipped += 1
            return True
        self._check.lower()
        if found is not None:
            gradients = torch.zeros(len(guard.parameters()), device=self._device)
        else:
            gradients = guard.flags(self._device)
        if before is not None and len(before) == len(gradients):
            # Where all was finite before clipping, and not after, a callback that comes later added it.
            gradients = torch.where(before.any(), before, gradients)
        flags, _ = self._reduced(gradients)
        bad = flags.tolist()
        self._leave_out(
            guard, guard.names(self._trainer.lightning_module, bad[: len(gradients)]), bad[len(gradients) :]
        )
        return False

    def _any_raised(self, guard: GuardedStep) -> bool:
        raised = bool(self._check(guard.gradients()).item())
        if raised:
            self._check.lower()
        return raised

    def _all_finite(self, raised: Tensor) -> bool:
        """Read one number: whether no flag is raised on any rank, and all losses are finite."""
        if self._ranks == 1 and self._on_host:
            return not raised.item() and all(math.isfinite(loss.item()) for _, loss in self._losses)
        for _, loss in self._losses:
            # Nothing, unless the loss is not finite: then NaN.
            raised = torch.add(raised, loss.to(self._device), alpha=0)
        if self._ranks > 1:
            raised = self._trainer.strategy.reduce(raised.ne(0).float(), reduce_op="sum")
        return raised.item() == 0

    def _check_again(self, guard: GuardedStep) -> None:
        self._losses = self._losses[-1:]
        flags, lost = self._reduced(guard.flags(self._device))
        self._losses = []
        if lost:
            names = guard.names(self._trainer.lightning_module, flags.tolist()[: -self._ranks])
            raise FloatingPointError(
                f"FiniteGuard: {listed(names)} became NaN or inf at a further evaluation inside a step of "
                f"{type(guard.optimizer).__name__}, which can't be undone; go on from the last checkpoint with a "
                "smaller learning rate"
            )

    def _reduced(self, gradients: Tensor) -> tuple[Tensor, bool]:
        """Append a flag of each rank's loss, add up over the ranks, and read whether any is set."""
        of_ranks = torch.zeros(self._ranks, device=gradients.device)
        if self._losses:
            losses = torch.stack([loss.to(gradients.device) for _, loss in self._losses])
            of_ranks[self._trainer.global_rank] = losses.isfinite().all().logical_not().to(of_ranks)
        flags = torch.cat([gradients, of_ranks])
        if self._ranks > 1:
            flags = self._trainer.strategy.reduce(flags, reduce_op="sum")
        return flags, bool(flags.any().item())

    def _left_out_by_scaler(self, guard: GuardedStep, scale: float) -> None:
        """Tell a search for the scale, which is normal, from a loss or weights that are NaN."""
        guard.before_clipping = None
        flags, lost = self._reduced(torch.zeros(0, device=self._device))
        if lost or scale < 1:
            names = [] if lost else [f"gradients at a GradScaler's scale of {scale:g}"]
            self._leave_out(guard, names, flags.tolist())
        else:
            self.scaler_skipped += 1
            self._losses, guard.first_batch = [], None

    def _leave_out(self, guard: GuardedStep, names: list[str], ranks: list[float]) -> None:
        guard.consecutive += 1
        self.skipped += 1
        self._skipped_here = True
        own = sorted({batch for batch, loss in self._losses if not loss.isfinite().item()})
        # Which micro-batch it was is known from its loss; on other ranks, or without one, it is any of them.
        first = self._batch if guard.first_batch is None else guard.first_batch
        batches = own or list(range(first, self._batch + 1))
        self._losses, guard.first_batch = [], None
        event = {
            "epoch": self._trainer.current_epoch,
            "batches": batches,
            "step": self._trainer.global_step,
            "optimizer": self._guards.index(guard),
            "parameters": names,
            "loss_on_ranks": [rank for rank, flag in enumerate(ranks) if flag],
        }
        self.events = [*self.events, event][-_EVENTS_KEPT:]
        said = described(event, type(guard.optimizer).__name__, self._ranks)
        limit = limit_reached(guard.consecutive, self.max_consecutive, self.skipped, self.max_total)
        if limit:
            raise FloatingPointError(
                f"FiniteGuard stopped the training: {limit}; last: {said}. The weights are those from before it. "
                "Look at that batch's data, lower the learning rate, clip gradients or use bf16 or 32-bit precision"
            )
        rank_zero_warn(f"FiniteGuard left a step out: {said}; {self.skipped} so far")


def _clips(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    own = type(module).configure_gradient_clipping is not pl.LightningModule.configure_gradient_clipping
    return module.automatic_optimization and bool(own or trainer.gradient_clip_val)
