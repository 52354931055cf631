"""What killed sweeps left of a study: trials that still say RUNNING, their runs, and checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from ds_lightning.sweeps import retries
from ds_lightning.sweeps.checkpoints import forget, kept_numbers
from ds_lightning.sweeps.processes import end_processes, is_gone, this_process
from ds_lightning.sweeps.runs import StudyRuns
from ds_lightning.sweeps.spec import SweepSpec


def tell(study: optuna.Study, trial: optuna.Trial | int, state: TrialState, values: Sequence[float] = ()) -> bool:
    """Tell a study a trial's end.

    Returns:
        Whether this call ended it. The storage lets one process do so; to the others it is finished already.
    """
    number = trial if isinstance(trial, int) else trial.number
    if study.get_trials(deepcopy=False)[number].state.is_finished():
        return False
    try:
        study.tell(trial, list(values) if state == TrialState.COMPLETE else None, state=state)
    except UpdateFinishedTrialError:
        return False
    except ValueError:
        # Optuna's own look at the state, a moment after ours.
        if study.get_trials(deepcopy=False)[number].state.is_finished():
            return False
        raise
    except (RuntimeError, KeyError):
        # The grid sampler wants to stop `optimize`, which isn't running, after the last point, or misses the point
        # of a trial that was killed before it had one; the state is booked by then.
        if not isinstance(study.sampler, optuna.samplers.GridSampler):
            raise
    return True


def is_replaceable(spec: SweepSpec) -> bool:
    """Tell whether another point can take the place of one that is always killed: a grid has no other."""
    return bool(spec.sampler["name"] != "grid")


def close_left_overs(
    study: optuna.Study,
    runs: StudyRuns,
    spec: SweepSpec,
    gone: Callable[[str], bool] = is_gone,
    folder: Path | None = None,
) -> int:
    """Book what killed sweeps left RUNNING as failed, and remove checkpoints that nobody needs.

    Workers on this host are ended first: one of them might still close a run as if all were well, or make one.
    Several sweeps may do this at the same moment: each trial is booked by one of them.

    Args:
        study: the study.
        runs: its MLflow runs.
        spec: the sweep file.
        gone: tells by its mark whether a process that ran trials has ended.
        folder: the study's folder with the trials' checkpoints.

    Returns:
        How many of the trials that this call has booked do not count: they are tried again, or another takes their
        place.
    """
    dead = retries.dead_sweeps(study) - {this_process()}
    if dead:
        end_processes(lambda owner: owner.rpartition(" #")[0] in dead)
    uncounted = 0
    for trial in study.trials:
        if not retries.is_left_over(trial, study, gone):
            continue
        tags = retry_tags(trial.user_attrs)
        runs.fail(trial.number, trial.params, "left running by a process that was killed", tags=tags)
        counts = not (retries.tries_left(trial.user_attrs, spec.max_retries) or is_replaceable(spec))
        # Before its end, for this process may be killed in between.
        if not counts:
            retries.mark_dead(study, trial.number)
        if tell(study, trial.number, TrialState.FAIL):
            uncounted += not counts
        elif not counts:
            # The mark may have replaced that of the sweep which was faster.
            retries.leave_to_all(study, trial.number)
    if folder is not None and not spec.keep_checkpoints:
        needed: set[int] = set()
        for trial in study.get_trials(deepcopy=False):
            if not trial.state.is_finished():
                needed.update(retries.lineage(study, trial.number))
        for trial in retries.pending(study, spec.max_retries, lambda mark: True):
            needed.update(retries.lineage(study, trial.number))
        forget(folder, set(kept_numbers(folder)) - needed)
    return uncounted


def retry_tags(user_attrs: Mapping[str, Any]) -> dict[str, str]:
    """Return the tag that leads from a trial's run to the killed trial that it repeats."""
    return {retries.RETRY_OF: str(user_attrs[retries.RETRY_OF])} if retries.RETRY_OF in user_attrs else {}
