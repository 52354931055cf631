"""Trials that were killed: which they are, and their second chance with the same parameters."""

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ds_lightning.sweeps.processes import is_gone, this_process

RETRY_OF = "retry_of"
_RETRY = "retry"
# What the grid sampler knows its points by.
_GRID = ("grid_id", "search_space")
_SWEEP = "sweep "
_DIED = "died "


def register(study: optuna.Study) -> None:
    """Note in a study that this process runs trials of it."""
    study.set_user_attr(_SWEEP + this_process(), True)


def dead_sweeps(study: optuna.Study) -> set[str]:
    """Return the marks of the processes that ran trials of a study on this host and have ended."""
    return {mark for mark in _sweeps(study) if is_gone(mark)}


def is_left_over(trial: FrozenTrial, study: optuna.Study | None = None) -> bool:
    """Tell whether a trial is RUNNING although the process that ran it, on this host, is gone.

    A sweep that is killed just after it has asked for a trial leaves one without a mark: with the study, it is
    told by no other sweep being alive.
    """
    if trial.state != TrialState.RUNNING:
        return False
    mark = trial.user_attrs.get("process")
    if mark is not None:
        return is_gone(mark)
    others = _sweeps(study) - {this_process()} if study is not None else set()
    return bool(others) and all(is_gone(other) for other in others)


def mark_dead(study: optuna.Study, number: int) -> None:
    """Note that a trial was ended from outside: it doesn't count, and may be tried again."""
    # On the study: a trial of another process can't be written to.
    study.set_user_attr(f"{_DIED}{number}", True)


def tries_left(user_attrs: Mapping[str, Any], max_retries: int) -> bool:
    """Tell by its attributes whether a trial that was killed may be tried again."""
    return int(user_attrs.get(_RETRY, 0)) < max_retries


def counted(study: optuna.Study) -> int:
    """Return how many trials count: all but those that were killed and those that wait."""
    dead = _dead(study)
    trials = study.get_trials(deepcopy=False)
    return sum(trial.state != TrialState.WAITING and trial.number not in dead for trial in trials)


def pending(study: optuna.Study, max_retries: int) -> list[FrozenTrial]:
    """Return the trials that were killed and are to be tried again, oldest first."""
    dead = _dead(study)
    trials = study.get_trials(deepcopy=False)
    again = {trial.user_attrs.get(RETRY_OF) for trial in trials}
    return [
        trial
        for trial in trials
        if trial.number in dead
        and trial.number not in again
        and tries_left(trial.user_attrs, max_retries)
        and _fixed(trial)
    ]


def enqueue(study: optuna.Study, trial: FrozenTrial) -> None:
    """Make a killed trial's parameters those of the next trial that is asked for."""
    tries = int(trial.user_attrs.get(_RETRY, 0)) + 1
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.WAITING,
            user_attrs={RETRY_OF: trial.number, _RETRY: tries, "process": this_process()},
            system_attrs=_fixed(trial),
        )
    )


def _fixed(trial: FrozenTrial) -> dict[str, Any]:
    """Return what makes a trial start from the same point; empty for one that was killed before it had any."""
    system: Mapping[str, Any] = trial.system_attrs
    fixed: dict[str, Any] = {key: system[key] for key in _GRID if key in system}
    # Killed half-way through its parameters, a retry of it had fixed ones already.
    params = {**system.get("fixed_params", {}), **trial.params}
    return {**fixed, "fixed_params": params} if params else fixed


def _dead(study: optuna.Study) -> set[int]:
    # Each look at `user_attrs` copies them.
    notes = study.user_attrs
    trials = study.get_trials(deepcopy=False)
    return {t.number for t in trials if t.state == TrialState.FAIL and f"{_DIED}{t.number}" in notes}


def _sweeps(study: optuna.Study) -> set[str]:
    return {key.removeprefix(_SWEEP) for key in study.user_attrs if key.startswith(_SWEEP)}
