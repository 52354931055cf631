"""The callback that reads a trial's objective and stops the trial when it is to be pruned."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ds_lightning.errors import ConfigError
from ds_lightning.sweeps.spec import Objective


class MetricNotLogged(ConfigError):
    """The objective's metric is not among what the module logs."""


class Pruned(Exception):
    """The study gave this trial up.

    Args:
        value: the trial's last value.
    """

    def __init__(self, value: float) -> None:
        super().__init__(f"pruned at {value}")
        self.value = value


class ObjectiveObserver(Callback):
    """Collect the objective's values, and end the trial that the study prunes.

    When it acts: after each validation (not the sanity check); for a metric that only the training epoch logs,
    after each training epoch; at the start of a fit that goes on from a checkpoint, when it reports again what was
    reported up to there, and takes no answer: the trial went on then. It changes nothing in the module or the data
    and logs nothing. In the checkpoint: the values so far. Cost: one host copy of each metric a validation.

    Args:
        objectives: what is read; the first one's `step` says how validations are counted.
        report: called with step and value once a validation, only where there is one objective; returns whether
            to prune.

    Raises:
        MetricNotLogged: at the end of the first epoch with a validation, when a metric is not there.
        Pruned: when `report` says so.
        FloatingPointError: when a value is not finite.
    """

    def __init__(self, objectives: Sequence[Objective], report: Callable[[int, float], bool]) -> None:
        self.objectives = tuple(objectives)
        self.report = report
        self.history: list[tuple[float, ...]] = []
        self._reported: list[tuple[int, float]] = []
        self._last_step = -1
        self._validated = False
        self._source: str | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what a killed trial had reported up to its checkpoint, to the trial that goes on from there."""
        for step, value in self._reported:
            self.report(step, value)

    def state_dict(self) -> dict[str, Any]:
        """Return the values so far."""
        return {
            "history": [list(values) for values in self.history],
            "reported": [list(pair) for pair in self._reported],
            "last_step": self._last_step,
            "validated": self._validated,
            "source": self._source,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the values up to the checkpoint."""
        self.history = [tuple(values) for values in state_dict["history"]]
        self._reported = [(step, value) for step, value in state_dict["reported"]]
        self._last_step = state_dict["last_step"]
        self._validated = state_dict["validated"]
        self._source = state_dict["source"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the objective where validation logs it."""
        if trainer.sanity_checking:
            return
        self._validated = True
        # A training metric of the epoch before is still there to be read here: only the place that showed
        # the metric first shows fresh values.
        if self._source != "epoch" and not self.missing(trainer):
            self._source = "validation"
            self._observe(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the objective where only the training epoch logs it."""
        if self._source == "validation":
            return
        if not self.missing(trainer):
            self._source = "epoch"
            self._observe(trainer)
        elif self._validated:
            self.refuse(trainer)

    def missing(self, trainer: Trainer) -> list[str]:
        """Return the objectives' metrics that have not been logged."""
        return [each.metric for each in self.objectives if each.metric not in trainer.callback_metrics]

    def refuse(self, trainer: Trainer) -> None:
        """Say which metric is missing, and which there are.

        Raises:
            MetricNotLogged: always.
        """
        logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
        raise MetricNotLogged(f"objective: metric {self.missing(trainer)[0]!r} is never logged; logged: {logged}")

    def values(self) -> list[float]:
        """Return the trial's objective values: the last ones, or the best one where the objective says so."""
        only = self.objectives[0]
        if only.value == "best":
            best = min if only.direction == "minimize" else max
            return [best(values[0] for values in self.history)]
        return list(self.history[-1])

    def _observe(self, trainer: Trainer) -> None:
        values = tuple(float(trainer.callback_metrics[each.metric]) for each in self.objectives)
        for each, value in zip(self.objectives, values, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"{each.metric} is {value} at step {trainer.global_step}")
        self.history.append(values)
        step = len(self.history) if self.objectives[0].step == "validation" else trainer.global_step
        if len(values) > 1 or step <= self._last_step:
            return
        self._last_step = step
        self._reported.append((step, values[0]))
        if self.report(step, values[0]):
            raise Pruned(values[0])
