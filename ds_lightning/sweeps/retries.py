"""Trials that were killed: which they are, and their second chance with the same parameters."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ds_lightning.sweeps.processes import is_gone, this_process

RETRY_OF = "retry_of"
_RETRY = "retry"
# What the grid sampler knows its points by.
_GRID = ("grid_id", "search_space")
# Before the mark of each process that runs trials; the value is its last sign of life, False at its end.
SWEEP = "sweep "
_DIED = "died "


def register(study: optuna.Study) -> None:
    """Note in a study that this process runs trials of it."""
    study.set_user_attr(SWEEP + this_process(), time.time())


def dead_sweeps(study: optuna.Study) -> set[str]:
    """Return the marks of the processes that ran trials of a study on this host and have ended."""
    return {mark for mark in _sweeps(study) if is_gone(mark)}


def is_left_over(trial: FrozenTrial, study: optuna.Study | None = None, gone: Callable[[str], bool] = is_gone) -> bool:
    """Tell whether a trial is RUNNING although the process that ran it is gone.

    A sweep that is killed just after it has asked for a trial leaves one without a mark: with the study, it is
    told by no other sweep being alive.
    """
    if trial.state != TrialState.RUNNING:
        return False
    mark = trial.user_attrs.get("process")
    if mark is not None:
        return gone(mark)
    others = _sweeps(study) - {this_process()} if study is not None else set()
    return bool(others) and all(gone(other) for other in others)


def mark_dead(study: optuna.Study, number: int) -> None:
    """Note that a trial was ended from outside: it doesn't count, and may be tried again."""
    # On the study: a trial of another process can't be written to.
    # It says who is to give it out again: two sweeps must not both do so.
    study.set_user_attr(f"{_DIED}{number}", this_process())


def leave_to_all(study: optuna.Study, number: int) -> None:
    """Note that any sweep may give out a killed trial again."""
    study.set_user_attr(f"{_DIED}{number}", True)


def is_double(study: optuna.Study, number: int) -> bool:
    """Tell whether a killed trial had been given out again before this retry of it was made.

    Two sweeps that adopt it at the same moment both make one. The storage numbers trials one after the other, so each
    sees which was first.
    """
    trials = study.get_trials(deepcopy=False)
    return _is_double(trials[number], _first_retries(trials))


def tries_left(user_attrs: Mapping[str, Any], max_retries: int) -> bool:
    """Tell by its attributes whether a trial that was killed may be tried again."""
    return int(user_attrs.get(_RETRY, 0)) < max_retries


def counted(study: optuna.Study) -> int:
    """Return how many trials count: all but those that were killed and those that wait."""
    dead = _dead(study)
    trials = study.get_trials(deepcopy=False)
    return sum(trial.state != TrialState.WAITING and trial.number not in dead for trial in trials)


def pending(study: optuna.Study, max_retries: int, gone: Callable[[str], bool] = is_gone) -> list[FrozenTrial]:
    """Return the trials that were killed and are to be tried again by this process, oldest first.

    Those are the ones that it has booked itself, and those of processes that are gone.
    """
    mine = this_process()
    dead = {number for number, by in _dead(study).items() if by in (True, mine) or gone(by)}
    trials = study.get_trials(deepcopy=False)
    again = _first_retries(trials)
    return [
        trial
        for trial in trials
        if trial.number in dead
        and trial.number not in again
        and not _is_double(trial, again)
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


def _first_retries(trials: list[FrozenTrial]) -> dict[int, int]:
    """Return the first retry of each trial that has one."""
    first: dict[int, int] = {}
    for trial in trials:
        if RETRY_OF in trial.user_attrs:
            first.setdefault(trial.user_attrs[RETRY_OF], trial.number)
    return first


def _is_double(trial: FrozenTrial, first: Mapping[int, int]) -> bool:
    return first.get(trial.user_attrs.get(RETRY_OF, -1), trial.number) != trial.number


def _fixed(trial: FrozenTrial) -> dict[str, Any]:
    """Return what makes a trial start from the same point; empty for one that was killed before it had any."""
    system: Mapping[str, Any] = trial.system_attrs
    fixed: dict[str, Any] = {key: system[key] for key in _GRID if key in system}
    # Killed half-way through its parameters, a retry of it had fixed ones already.
    params = {**system.get("fixed_params", {}), **trial.params}
    return {**fixed, "fixed_params": params} if params else fixed


def lineage(study: optuna.Study, number: int) -> list[int]:
    """Return a trial's number, that of the killed trial which it repeats, and so on to the first one."""
    trials = study.get_trials(deepcopy=False)
    numbers = [number]
    while (before := trials[numbers[-1]].user_attrs.get(RETRY_OF)) is not None:
        numbers.append(before)
    return numbers


def _dead(study: optuna.Study) -> dict[int, Any]:
    # Each look at `user_attrs` copies them.
    notes = study.user_attrs
    trials = study.get_trials(deepcopy=False)
    return {
        t.number: notes[f"{_DIED}{t.number}"]
        for t in trials
        if t.state == TrialState.FAIL and f"{_DIED}{t.number}" in notes
    }


def _sweeps(study: optuna.Study) -> set[str]:
    return {key.removeprefix(SWEEP) for key in study.user_attrs if key.startswith(SWEEP)}
