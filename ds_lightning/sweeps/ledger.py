"""The book of a running sweep: which trials were given out, how each ended, and when to stop."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from textwrap import shorten
from typing import Any, Protocol

import optuna
from optuna.trial import TrialState

from ds_lightning.errors import ConfigError
from ds_lightning.sweeps import retries
from ds_lightning.sweeps.processes import end_processes, this_process
from ds_lightning.sweeps.retries import RETRY_OF, is_left_over
from ds_lightning.sweeps.runs import StudyRuns
from ds_lightning.sweeps.spec import SweepSpec
from ds_lightning.sweeps.trial import TrialOutcome, TrialTask

GIVE_UP_AFTER = 3


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
    ) -> None:
        self.spec, self.study, self.runs = spec, study, runs
        self.stop_reason: ConfigError | None = None
        self._store, self._quiet, self._reporter = store, quiet, reporter
        self._left = trials
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._open: dict[int, tuple[optuna.Trial, dict[str, Any], float]] = {}
        self._ends: list[TrialOutcome] = []

    @property
    def wants_more(self) -> bool:
        """Whether there are trials and time left."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        return self._left != 0 and not late

    def open_trial(self) -> TrialTask | None:
        """Give out the next trial; None when there is none to give."""
        if self.stop_reason is not None or not self.wants_more:
            return None
        if killed := retries.pending(self.study, self.spec.max_retries):
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
        )

    def report(self, number: int, step: int, value: float) -> bool:
        """Book a running trial's value; returns whether to prune it."""
        trial = self._open[number][0]
        trial.report(value, step)
        self._reporter.report(number, step, value)
        return bool(trial.should_prune())

    def close_trial(self, number: int, outcome: TrialOutcome) -> bool:
        """Book a trial's end; returns whether it will be tried again."""
        trial, params, started = self._open[number]
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
        counts = not again and not (outcome.killed and _replaceable(self.spec))
        if not counts:
            retries.mark_dead(self.study, number)
        tell(self.study, trial, TrialState[outcome.state], outcome.values)
        del self._open[number]
        if not counts and self._left is not None:
            self._left += 1
        self._reporter.finished(number, replace(outcome, counts=counts), params, time.monotonic() - started)
        if not again and not outcome.interrupted:
            self._ends.append(outcome)
            self._consider_stopping(number, outcome)
        return again

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


def tell(study: optuna.Study, trial: optuna.Trial | int, state: TrialState, values: Sequence[float] = ()) -> None:
    """Tell a study a trial's end."""
    try:
        study.tell(trial, list(values) if state == TrialState.COMPLETE else None, state=state, skip_if_finished=True)
    except (RuntimeError, KeyError):
        # The grid sampler wants to stop `optimize`, which isn't running, after the last point, or misses the point
        # of a trial that was killed before it had one; the state is booked by then.
        if not isinstance(study.sampler, optuna.samplers.GridSampler):
            raise


def _replaceable(spec: SweepSpec) -> bool:
    """Tell whether another point can take the place of one that is always killed: a grid has no other."""
    return bool(spec.sampler["name"] != "grid")


def close_left_overs(study: optuna.Study, runs: StudyRuns, spec: SweepSpec) -> int:
    """Book what a killed sweep of this host left RUNNING as failed; returns how many there were.

    Its workers are ended first: one of them might still close a run as if all were well, or make one.
    """
    dead = retries.dead_sweeps(study) - {this_process()}
    if dead:
        end_processes(lambda owner: owner.rpartition(" #")[0] in dead)
    left = [trial for trial in study.trials if is_left_over(trial, study)]
    for trial in left:
        tags = retry_tags(trial.user_attrs)
        runs.fail(trial.number, trial.params, "left running by a process that was killed", tags=tags)
        if retries.tries_left(trial.user_attrs, spec.max_retries) or _replaceable(spec):
            retries.mark_dead(study, trial.number)
        tell(study, trial.number, TrialState.FAIL)
    return len(left)


def retry_tags(user_attrs: Mapping[str, Any]) -> dict[str, str]:
    """Return the tag that leads from a trial's run to the killed trial that it repeats."""
    return {RETRY_OF: str(user_attrs[RETRY_OF])} if RETRY_OF in user_attrs else {}
