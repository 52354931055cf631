"""Elastic weight consolidation: earlier tasks hold on to the parameters that they need."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from ds_lightning.errors import ConfigError, NoEffectWarning
from ds_lightning.functional.consolidation import normalised
from ds_lightning.networks.pruning_plan import PruningPlan

from ._consolidated import Consolidated, Names
from ._ewc_checks import check_arguments, check_first_batch, check_fit, new_classes_only
from ._importance_picture import log_importance
from ._layers import check_patterns, matches
from ._log_step import log_step
from ._task_fisher import TaskFisher, seed_of_task
from ._tasks import current_task, ends_task, stream_of, task_batches

# Where the diagonal is nearly right moving costs accuracy and gains none, however little the old importance counts.
_QUIET = 6


class ElasticWeightConsolidation(pl.Callback):
    """Train task after task, and forget less: a quadratic penalty holds what earlier tasks need where it was.

    **When it acts.** A task ends with its last epoch where the DataModule is a stream of tasks (`TaskStream`); with
    other data each `fit` is one task, early stopping included, and the next fit, with a new Trainer and this same
    callback (or its checkpoint), is the next task. Then the exact diagonal Fisher information of the task is computed
    and divided by its mean. In later tasks, `on_before_optimizer_step` adds the penalty's gradient in closed form:
    after unscaling and accumulation, before clipping.

    **What it changes.** Gradients, by `min(strength * importance, 0.5 / lr) * (theta - anchor)`: the bound keeps the
    step stable at any strength and rate. After each task but the first the parameters themselves may move towards
    the anchor, to the mean of old and new weighted by importance (`merge`). `training_step` stays as it is.

    **What it logs.** `ewc/penalty` every `log_every_n_steps`; when a task ends `ewc/curvature_ratio` (the curvature
    along the task's path over what the diagonal predicts), `ewc/merged_share` (how much of the way back to the anchor
    the parameters moved) and, to loggers with `log_figure`, a picture of the importance of each parameter.

    **Checkpoint.** Importance, anchor and start of each parameter, the rest that merging left, counts, the classes
    seen. A resumed run goes on bit for bit. Memory does not grow with the number of tasks: three times the parameters.

    **Limits.** On heads where each task brings new classes it does not keep the old ones: use rehearsal
    (`TaskStream(memory_size=...)`). Buffers, such as running statistics of BatchNorm, stay the last task's. Sparse
    gradients, and strategies that hold parts of a parameter (FSDP, DeepSpeed, ModelParallel), are refused. A stream
    that stops inside a task, and an exception, end no task. What is kept ends with the processes of `ddp_spawn`.

    **Cost.** Three passes over the parameters a step; two Fisher passes over the training data a task, each about an
    epoch, one where `merge` is None. See docs/continual.md.

    Args:
        strength: of the penalty, > 0; the importance has mean 1, so it is in units of curvature for any model.
        mode: `separate`: the sum of all tasks' penalties, merged exactly; `online`: one penalty around the last
            task's parameters, whose importance is `decay` times the old one plus the new.
        decay: of older importance in mode `online`, in [0, 1].
        fisher: `true`: labels drawn from the model; `empirical`: the labels of the data.
        merge: the curvature ratio at which old and new importance count alike when the parameters move at a task's
            end, > 0: the old one counts `(ratio / merge)^2` times. Below a sixth of it, and with None
            or with a stream that has a memory, nothing moves.
        samples: of each task for the Fisher information, spread evenly, >= 1; None: all.
        chunk_size: of them at a time, >= 1; None: a batch.
        loss_fn: `(module, batch) -> (B,)`, the negative log-likelihood of each sample, for modules whose output is
            not logits; needs `fisher="empirical"` and `merge=None`.
        optimizer_state: what becomes of momenta when a task ends: `keep` or `reset`.
        exclude: fnmatch patterns on names of parameters that are left free.
        seed: of the drawn labels.

    Raises:
        ConfigError: an argument out of range; at the start of fit a strategy, pattern, module or Trainer that can't
            work; in fit batches or outputs that are not a classifier's, where no `loss_fn` is given.

    Paper: Kirkpatrick et al. 2017, arXiv 1612.00796; Huszar 2017, arXiv 1712.03847; online: Schwarz et al. 2018, arXiv
    1805.06370, Chaudhry et al. 2018, arXiv 1801.10112; merging: Lee et al. 2017, arXiv 1703.08475.

    Example:
        >>> import lightning.pytorch as pl
        >>> ewc = ElasticWeightConsolidation(exclude=["head.*"])
        >>> trainer = pl.Trainer(callbacks=[ewc], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        strength: float = 0.01,
        mode: Literal["separate", "online"] = "separate",
        decay: float = 1.0,
        fisher: Literal["true", "empirical"] = "true",
        merge: float | None = 300.0,
        samples: int | None = None,
        chunk_size: int | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        optimizer_state: Literal["keep", "reset"] = "keep",
        exclude: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        check_arguments(strength, mode, decay, fisher, merge, samples, chunk_size, loss_fn, optimizer_state, exclude)
        self.strength = strength
        self.mode = mode
        self.decay = decay
        self.fisher: Literal["true", "empirical"] = fisher
        self.merge = merge
        self.samples = samples
        self.chunk_size = chunk_size
        self.loss_fn = loss_fn
        self.optimizer_state = optimizer_state
        self.exclude = exclude
        self.seed = seed
        self._memory = Consolidated(keeps_start=merge is not None)
        self._labels = torch.zeros(0, dtype=torch.long)
        self._names: Names | None = None
        self._ended_at = -1
        self._logged_at = -1
        self._new_task = self._checked = self._warned = self._pulled = False

    @property
    def tasks(self) -> int:
        """The number of tasks that are consolidated."""
        return self._memory.tasks

    @property
    def importance(self) -> Mapping[str, Tensor]:
        """The importance of each element of each parameter, by name; empty before the first task's end."""
        return self._memory.importance

    @property
    def anchor(self) -> Mapping[str, Tensor]:
        """Where each element is held, by name."""
        return self._memory.anchor

    def penalty(self, pl_module: pl.LightningModule) -> float:
        """Return the penalty at the module's parameters; the sum of all tasks' in mode `separate`."""
        return self.strength * self._memory.penalty(Names(pl_module, self._selects).everything())

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a fit; what earlier ones consolidated stays, and a checkpoint's state is loaded after this."""
        if stage == "fit":
            self._ended_at = self._logged_at = -1
            self._checked = self._pulled = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what can't work."""
        check_fit(trainer, pl_module, self.loss_fn)
        check_patterns(pl_module, "exclude", self.exclude)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the state to the parameters' device, and to heads that have grown."""
        self._names = Names(pl_module, self._selects)
        self._memory.align(self._names.selected(), self._names.everything())
        self._new_task = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the first batch: better now than at the end of a task."""
        if not self._checked and self.loss_fn is None:
            check_first_batch(pl_module, batch)
        self._checked = True
        if self._new_task and not self._warned and new_classes_only(trainer, batch, self._labels):
            self._warned = True
            rank_zero_warn(
                "ElasticWeightConsolidation has no effect on the forgetting of classes here: this task's classes are "
                "all new, and its batches do not say which outputs are `allowed`, so nothing keeps the old outputs "
                "from falling behind; keep samples of earlier tasks (TaskStream: memory_size), or tell the tasks apart "
                "(labels: known)",
                category=NoEffectWarning,
            )
        self._new_task = False

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the penalty's gradient."""
        if self._memory.tasks == 0 or self._names is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # A fused optimizer unscales in its step, which comes after this.
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        scale = scaler.get_scale() if scaler is not None and fused else 1.0
        self._memory.pull(optimizer, self._names, self.strength, scale)
        self._pulled = True

    def on_channels_removed(self, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: PruningPlan) -> None:
        """Forget the importance, anchor and start of channels that ProgressivePruning removed."""
        self._memory.remove_channels(plan)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the penalty."""
        step, due = log_step(trainer)
        if due and self._logged_at != step and self._pulled and trainer.is_global_zero and trainer.loggers:
            self._logged_at = step
            self._log(trainer, {"ewc/penalty": self.penalty(pl_module)}, step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End a task of a stream; Lightning calls checkpoints after this."""
        # A resume at the end of an epoch comes here once more.
        if ends_task(trainer) and self._ended_at != trainer.global_step:
            self._end_task(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the task that a fit without a stream is."""
        if stream_of(trainer) is None and self._ended_at != trainer.global_step:
            self._end_task(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so when no step of this fit had a penalty."""
        if not self._pulled and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                "ElasticWeightConsolidation changed no step of this fit: there was no earlier task. "
                f"{self.tasks} consolidated now, for the next fit with this callback or its checkpoint",
                category=NoEffectWarning,
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the module; the state stays."""
        if stage == "fit":
            self._memory.release()
            self._names = None

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and counts."""
        return {**self._memory.state_dict(), "labels": self._labels, "ended_at": self._ended_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state over; tensors go to the device when training starts."""
        self._memory.load_state_dict(state_dict)
        self._labels = state_dict["labels"].cpu()
        self._ended_at = state_dict["ended_at"]

    def _selects(self, name: str) -> bool:
        return not matches(name, self.exclude or ())

    def _end_task(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        names, memory, task = Names(module, self._selects), self._memory, current_task(trainer)
        parameters = names.selected()
        if not parameters:
            raise ConfigError("no parameter is both trainable and not in exclude; expected at least one to consolidate")
        memory.align(parameters, names.everything())
        work = TaskFisher(
            trainer,
            module,
            parameters,
            lambda: task_batches(trainer, module, task, "train", self.samples),
            self.loss_fn,
            self.chunk_size,
            seed_of_task(self.seed, memory.tasks),
        )
        raw = work.diagonal(self.fisher)
        fisher, metrics = normalised(raw), {}
        # Samples of earlier tasks hold more than the mean of old and new weights does, which keeps new classes out.
        rehearses = getattr(stream_of(trainer), "memory_size", 0) > 0
        if fisher is not None and memory.tasks and self.merge is not None and not rehearses:
            metrics = self._merge(work, raw, fisher)
            if metrics["ewc/merged_share"] > 0:
                fisher = normalised(work.diagonal(self.fisher))
        self._ended_at, self._new_task = trainer.global_step, True
        self._labels = torch.unique(torch.cat([self._labels, work.labels]))
        if self.optimizer_state == "reset":
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
        if fisher is None:
            rank_zero_warn(
                "ElasticWeightConsolidation keeps nothing of this task: its Fisher information is 0 everywhere, as "
                "when the model is certain of all samples or its output does not depend on its parameters",
                category=NoEffectWarning,
            )
            return
        memory.add(fisher, parameters, self.decay if self.mode == "online" else None)
        rank_zero_info(f"ElasticWeightConsolidation: task {memory.tasks} consolidated, {len(fisher)} parameters")
        if trainer.is_global_zero:
            step = max(trainer.fit_loop.epoch_loop._batches_that_stepped - 1, 0)
            self._log(trainer, metrics, step)
            log_importance(trainer, memory.importance, memory.tasks)

    def _merge(self, work: TaskFisher, raw: dict[str, Tensor], fisher: dict[str, Tensor]) -> dict[str, float]:
        """Move the parameters to the mean of old and new, weighted by importance; return what to log."""
        assert self.merge is not None
        memory = self._memory
        true = raw if self.fisher == "true" else work.diagonal("true")
        path = {name: work.parameters[name].detach() - memory.start[name] for name in fisher}
        predicted = sum(float((true[name] * v.square()).sum(dtype=torch.float64)) for name, v in path.items())
        if predicted <= 0:  # nothing moved that matters
            return {"ewc/curvature_ratio": math.nan, "ewc/merged_share": 0.0}
        ratio = work.curvature(path) / predicted
        share = 0.0
        if ratio > self.merge / _QUIET:
            share = memory.move_between(fisher, work.parameters, (ratio / self.merge) ** 2)
        return {"ewc/curvature_ratio": ratio, "ewc/merged_share": share}

    @staticmethod
    def _log(trainer: pl.Trainer, metrics: dict[str, float], step: int) -> None:
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step=step)
