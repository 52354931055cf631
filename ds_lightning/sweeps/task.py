"""What a process is told to run one trial, and what it answers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ds_lightning.sweeps.spec import Objective


@dataclass(frozen=True)
class TrialTask:
    """Everything that a process needs to run one trial; plain values only.

    Args:
        number: the trial's number in its study.
        study: the study's name.
        configs: the base's configuration files.
        folder: where relative paths are looked for first.
        overrides: dotted key -> value of the base.
        params: dotted key -> value chosen for this trial.
        objectives: as in the sweep file.
        experiment: MLflow experiment.
        store: folder or tracking URI.
        parent_run_id: the study's MLflow run.
        quiet: whether the trial's progress bar stays off even where the base asks for it.
        retry_of: number of the killed trial that this one repeats.
        checkpoints: folder that gets the trial's checkpoints; None: it is not saved.
        checkpoint_seconds: seconds between two of them.
        resume_from: folders with checkpoints to go on from; the first one that has a usable one counts.
    """

    number: int
    study: str
    configs: tuple[str, ...]
    folder: str | None
    overrides: Mapping[str, Any]
    params: Mapping[str, Any]
    objectives: tuple[Objective, ...]
    experiment: str
    store: str
    parent_run_id: str
    quiet: bool = False
    retry_of: int | None = None
    checkpoints: str | None = None
    checkpoint_seconds: float = 0.0
    resume_from: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the task as JSON takes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TrialTask":
        """Rebuild a task from `to_dict`."""
        objectives = tuple(Objective(**each) for each in fields["objectives"])
        tuples = {name: tuple(fields[name]) for name in ("configs", "resume_from")}
        return cls(**{**fields, "objectives": objectives, **tuples})


@dataclass(frozen=True)
class TrialOutcome:
    """How a trial ended.

    Args:
        state: Optuna's word: COMPLETE, PRUNED or FAIL.
        values: the objective values of a complete trial; the last value of a pruned one.
        error: one line for a failed one.
        details: its traceback.
        run_id: the trial's MLflow run; None when it ended before there was one.
        metric_missing: whether it failed because an objective's metric is never logged.
        interrupted: whether it failed because it was told to stop.
        killed: whether its process was killed.
        counts: whether it is one of the trials that were asked for; one that is tried again is not.
    """

    state: str
    values: list[float] = field(default_factory=list)
    error: str = ""
    details: str = ""
    run_id: str | None = None
    metric_missing: bool = False
    interrupted: bool = False
    killed: bool = False
    counts: bool = True

    @property
    def from_outside(self) -> bool:
        """Whether it ended for no reason of its own."""
        return self.killed or self.interrupted
