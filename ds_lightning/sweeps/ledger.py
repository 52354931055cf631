"""The book of a running sweep: which trials were given out, how each ended, and when to stop."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from ds_lightning.errors import ConfigError
from ds_lightning.sweeps import retries
from ds_lightning.sweeps.checkpoints import forget, trial_folder
from ds_lightning.sweeps.left_overs import close_left_overs, is_replaceable, retry_tags, tell
from ds_lightning.sweeps.processes import is_gone, this_process
from ds_lightning.sweeps.retries import RETRY_OF, is_left_over
from ds_lightning.sweeps.runs import StudyRuns
from ds_lightning.sweeps.spec import SweepSpec
from ds_lightning.sweeps.task import TrialOutcome, TrialTask

GIVE_UP_AFTER = 3
_DOUBLE = "another sweep gave the same killed trial out again at the same moment, and was first"
_TAKEN = "another sweep took this one for dead and booked its trial; it gave no sign of life for too long"


class Reporter(Protocol):
    """What shows a sweep's progress."""

    def started(self, number: int) -> None:
        """A trial begins."""

    def report(self, number: int, step: int, value: float) -> None:
        """A running trial has a new value."""

    def finished(self, number: int, outcome: TrialOutcome, params: Mapping[str, Any], seconds: float) -> None:
        """A trial has ended."""


class Ledger:
    """Give out trials and book their ends, in Optuna and MLflow alike.

    One process, the sweep's parent, asks the sampler and the pruner and writes to the study. Workers only
    train: so the number of trials is exact, no two workers draw the same point from one seed, and a killed
    worker leaves no lock behind.

    Args:
        spec: the sweep file.
        study: the Optuna study.
        runs: the study's MLflow runs, opened.
        store: folder or tracking URI, for the trials.
        trials: how many to give out; None: no limit.
        timeout: seconds from now after which none is given out; None: no limit.
        quiet: whether trials show no progress bar of their own.
        reporter: told of each value and end.
        folder: the study's folder, for trials' checkpoints; None: none are written.
        gone: tells by its mark whether another process that runs trials has ended.
    """

    def __init__(
        self,
        spec: SweepSpec,
        study: optuna.Study,
        runs: StudyRuns,
        store: str,
        trials: int | None,
        timeout: float | None,
        quiet: bool,
        reporter: Reporter,
        folder: Path | None = None,
        gone: Callable[[str], bool] = is_gone,
    ) -> None:
        self.spec, self.study, self.runs = spec, study, runs
        self.stop_reason: ConfigError | None = None
        self._store, self._quiet, self._reporter = store, quiet, reporter
        self._folder = folder if spec.checkpoint_seconds is not None else None
        self._gone = gone
        self._left = trials
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._open: dict[int, tuple[optuna.Trial, dict[str, Any], float]] = {}
        self._ends: list[TrialOutcome] = []

    @property
    def first_error(self) -> str:
        """What the first trial that failed said, in a line; empty when none did."""
        return next((shorten(end.error, 300, placeholder=" ...") for end in self._ends if end.error), "")

    @property
    def wants_more(self) -> bool:
        """Whether there are trials and time left."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        return self._left != 0 and not late

    def open_trial(self) -> TrialTask | None:
        """Give out the next trial; None when there is none to give."""
        if self.stop_reason is not None:
            return None
        self._take_over()
        if not self.wants_more:
            return None
        trial, params = self._ask()
        if self._left is not None:
            self._left -= 1
        self._open[trial.number] = (trial, params, time.monotonic())
        self._reporter.started(trial.number)
        return TrialTask(
            number=trial.number,
            study=self.study.study_name,
            configs=self.spec.configs,
            folder=str(self.spec.folder) if self.spec.folder else None,
            overrides=self.spec.overrides,
            params=params,
            objectives=self.spec.objectives,
            experiment=self.spec.experiment,
            store=self._store,
            parent_run_id=self.runs.parent_id,
            quiet=self._quiet,
            retry_of=trial.user_attrs.get(RETRY_OF),
            **self._checkpoints(trial.number),
        )

    def _ask(self) -> tuple[optuna.Trial, dict[str, Any]]:
        """Ask for a killed trial again, or for a new point."""
        while True:
            if killed := retries.pending(self.study, self.spec.max_retries, self._gone):
                retries.enqueue(self.study, killed[0])
            trial = self.study.ask()
            trial.set_user_attr("process", this_process())
            try:
                params = self.spec.space.suggest(trial)
            except ValueError as error:
                self.study.tell(trial, state=TrialState.FAIL)
                raise ConfigError(
                    f"study {self.study.study_name!r} was made with another search space ({error}); start a new one"
                ) from error
            if not retries.is_double(self.study, trial.number):
                return trial, params
            self.runs.fail(trial.number, params, _DOUBLE, tags=retry_tags(trial.user_attrs))
            retries.mark_dead(self.study, trial.number)
            tell(self.study, trial, TrialState.FAIL)

    def _checkpoints(self, number: int) -> dict[str, Any]:
        if self._folder is None:
            return {}
        own, *before = [str(trial_folder(self._folder, each)) for each in retries.lineage(self.study, number)]
        seconds = self.spec.checkpoint_seconds
        return {"checkpoints": own, "checkpoint_seconds": seconds, "resume_from": tuple(before)}

    def _take_over(self) -> None:
        """Book the trials of sweeps that have died since this one began."""
        if any(is_left_over(trial, None, self._gone) for trial in self.study.get_trials(deepcopy=False)):
            again = close_left_overs(self.study, self.runs, self.spec, self._gone, self._folder)
            if self._left is not None:
                self._left += again

    def report(self, number: int, step: int, value: float) -> bool:
        """Book a running trial's value; returns whether to prune it."""
        trial = self._open[number][0]
        try:
            trial.report(value, step)
        except UpdateFinishedTrialError:
            # Not ours any more; `close_trial` says so.
            return True
        self._reporter.report(number, step, value)
        return bool(trial.should_prune())

    def close_trial(self, number: int, outcome: TrialOutcome) -> bool:
        """Book a trial's end; returns whether it will be tried again."""
        trial, params, started = self._open[number]
        if self.study.get_trials(deepcopy=False)[number].state.is_finished():
            return self._lose_trial(number, outcome.run_id)
        run_id = outcome.run_id
        if run_id is None or outcome.state == "FAIL":
            # Also where the trial has closed its run: an interrupt may have come before its parameters.
            run_id = self.runs.fail(number, params, outcome.error, run_id, retry_tags(trial.user_attrs))
        if outcome.details:
            self.runs.text(outcome.details, "error.txt", run_id)
        trial.set_user_attr("mlflow.run_id", run_id)
        if outcome.error:
            trial.set_user_attr("error", outcome.error)
        again = outcome.from_outside and retries.tries_left(trial.user_attrs, self.spec.max_retries)
        counts = not again and not (outcome.killed and is_replaceable(self.spec))
        if not counts:
            retries.mark_dead(self.study, number)
        if not tell(self.study, trial, TrialState[outcome.state], outcome.values):
            if not counts:
                retries.leave_to_all(self.study, number)
            return self._lose_trial(number, run_id)
        del self._open[number]
        if not again and self._folder is not None and not self.spec.keep_checkpoints:
            forget(self._folder, retries.lineage(self.study, number))
        if not counts and self._left is not None:
            self._left += 1
        self._reporter.finished(number, replace(outcome, counts=counts), params, time.monotonic() - started)
        if not again and not outcome.interrupted:
            self._ends.append(outcome)
            self._consider_stopping(number, outcome)
        return again

    def _lose_trial(self, number: int, run_id: str | None) -> bool:
        """Book that another sweep has ended a trial of this one."""
        trial, params, started = self._open.pop(number)
        self.runs.fail(number, params, _TAKEN, run_id, retry_tags(trial.user_attrs))
        lost = TrialOutcome("FAIL", error=_TAKEN, counts=False)
        self._reporter.finished(number, lost, params, time.monotonic() - started)
        return False

    def abandon(self, number: int, reason: str, interrupted: bool = False) -> bool:
        """Book the end of a trial that can't speak for itself any more, such as a killed worker's.

        Returns:
            Whether it will be tried again.
        """
        outcome = TrialOutcome("FAIL", error=reason, interrupted=interrupted, killed=not interrupted)
        return self.close_trial(number, outcome)

    def abandon_all(self, reason: str) -> None:
        """Book the end of every trial that is still open."""
        for number in list(self._open):
            self.abandon(number, reason, interrupted=True)

    def _consider_stopping(self, number: int, outcome: TrialOutcome) -> None:
        if self.stop_reason is not None:
            return
        if outcome.metric_missing and not any(t.intermediate_values or t.values for t in self.study.trials):
            self.stop_reason = ConfigError(outcome.error)
        elif len(self._ends) == GIVE_UP_AFTER and all(end.state == "FAIL" for end in self._ends):
            self.stop_reason = ConfigError(
                f"the first {GIVE_UP_AFTER} trials all failed, so the sweep stopped; the first one: "
                f"{shorten(self._ends[0].error, 300, placeholder=' ...')}"
            )
