"""What is left of a sweep: the best configuration, the table of trials, pictures and metrics."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from ds_lightning.sweeps import pictures
from ds_lightning.sweeps.runs import StudyRuns
from ds_lightning.sweeps.spec import SweepSpec
from ds_lightning.sweeps.trial import trial_config


@dataclass(frozen=True)
class TrialResult:
    """One trial of the best.

    Args:
        number: its number in the study.
        params: dotted key -> value.
        values: one value an objective.
        run_id: its MLflow run.
        config: file with its complete configuration, for `ds-lightning fit --config`.
    """

    number: int
    params: Mapping[str, Any]
    values: list[float]
    run_id: str | None
    config: Path


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended.

    Args:
        study: the study's name, for `--study`.
        best: the best trial; with several objectives the Pareto front; empty when no trial was completed.
        parent_run_id: the study's MLflow run.
        counts: Optuna's state -> number of trials, over the whole study.
        exit_code: 0; 130 after Ctrl-C, 143 after SIGTERM; 1 when no trial was completed.
        error: what the first trial of this sweep that failed said; empty when none did.
    """

    study: str
    best: list[TrialResult]
    parent_run_id: str
    counts: Mapping[str, int] = field(default_factory=dict)
    exit_code: int = 0
    error: str = ""


def best_results(study: optuna.Study, spec: SweepSpec, folder: Path) -> list[TrialResult]:
    """Write the best trials' configurations into a folder.

    `best.yaml` for one objective; `best-trial-<number>.yaml` for each trial of a Pareto front.
    """
    if not pictures.complete_trials(study):
        return []
    single = len(spec.objectives) == 1
    trials: list[FrozenTrial] = [study.best_trial] if single else list(study.best_trials)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("best-trial-*.yaml"):
        old.unlink()
    results = []
    for trial in trials:
        params = spec.space.decode(trial.params)
        config = trial_config(spec.configs, spec.folder, spec.overrides, params)
        path = folder / ("best.yaml" if single else f"best-trial-{trial.number}.yaml")
        head = f"# Trial {trial.number} of study {study.study_name}: {_values(spec, trial)}\n"
        path.write_text(head + yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        results.append(
            TrialResult(trial.number, params, list(trial.values), trial.user_attrs.get("mlflow.run_id"), path)
        )
    return results


def trials_table(study: optuna.Study) -> list[dict[str, Any]]:
    """Return all trials as plain dictionaries, by number."""
    return [
        {
            "number": trial.number,
            "state": trial.state.name,
            "values": trial.values,
            "params": trial.params,
            "intermediate_values": {str(step): value for step, value in trial.intermediate_values.items()},
            "seconds": trial.duration.total_seconds() if trial.duration else None,
            "run_id": trial.user_attrs.get("mlflow.run_id"),
            "error": trial.user_attrs.get("error"),
        }
        for trial in study.get_trials(deepcopy=False)
    ]


def count_states(study: optuna.Study) -> dict[str, int]:
    """Return how many trials are in each state."""
    return dict(Counter(trial.state.name for trial in study.get_trials(deepcopy=False)))


def log_summary(study: optuna.Study, spec: SweepSpec, runs: StudyRuns, best: list[TrialResult]) -> None:
    """Put everything that sums the study up on the parent run."""
    runs.text(json.dumps(trials_table(study), indent=1), "trials.json")
    complete = pictures.complete_trials(study)
    step = len(study.trials)
    states = count_states(study)
    runs.metrics({f"trials/{state.name.lower()}": states.get(state.name, 0) for state in _ENDS}, step)
    if not complete:
        return
    runs.picture(pictures.history(study, spec.objectives), "history")
    shares = pictures.importance(study, spec.objectives)
    if shares is not None:
        runs.picture(shares, "importance")
    if len(spec.objectives) > 1:
        runs.picture(pictures.pareto(study, spec.objectives), "pareto")
    else:
        runs.metrics({f"best/{spec.objectives[0].metric}": best[0].values[0]}, step)
    for result in best:
        runs.file(result.config)


_ENDS = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def _values(spec: SweepSpec, trial: FrozenTrial) -> str:
    pairs = zip(spec.objectives, trial.values, strict=True)
    return ", ".join(f"{objective.metric} {value:.6g}" for objective, value in pairs)
