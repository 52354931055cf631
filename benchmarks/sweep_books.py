"""Whether Optuna's book of a killed sweep and MLflow's agree, with each other and with what each trial logs."""

from collections import Counter
from pathlib import Path
from typing import Any

import mlflow
import optuna

from ds_lightning.sweeps.study import open_storage

EPOCHS, BATCHES = 5, 3
STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}


def study_of(store: Path, storage: str | None) -> optuna.Study | None:
    """Return the study, None when there is none yet."""
    place = storage or next(map(str, (store / "optuna").glob("*.journal")), None)
    if place is None:
        return None
    opened = open_storage(place)
    names = optuna.get_all_study_names(opened)
    return optuna.load_study(study_name=names[0], storage=opened) if names else None


def disagreements(store: Path, storage: str | None, trials: int) -> tuple[list[str], Counter[str]]:
    """Compare the study with MLflow and with what each trial must have logged."""
    study = study_of(store, storage)
    assert study is not None
    client = mlflow.MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("kills")
    runs = client.search_runs([experiment.experiment_id], max_results=5000)
    parents = [run for run in runs if "optuna.sweep" in run.data.tags]
    wrong = []
    if [run.info.status for run in parents] != ["FINISHED"]:
        wrong.append(f"parent runs: {[run.info.status for run in parents]}")
    states = Counter(trial.state.name for trial in study.trials)
    if states["COMPLETE"] + states["PRUNED"] != trials or set(states) - set(STATUS):
        wrong.append(f"states: {dict(states)}")
    of_trial: dict[int, list[Any]] = {}
    for run in runs:
        if "optuna.trial" in run.data.tags:
            of_trial.setdefault(int(run.data.tags["optuna.trial"]), []).append(run)
        elif run not in parents:
            wrong.append(f"run {run.info.run_name} belongs to no trial")
    if strange := set(of_trial) - {trial.number for trial in study.trials}:
        wrong.append(f"runs of no trial: {strange}")
    for trial in study.trials:
        own = of_trial.get(trial.number, [])
        seen = [(run.info.status, run.data.tags.get("optuna.state")) for run in own]
        if seen != [(STATUS[trial.state.name], trial.state.name)]:
            wrong.append(f"trial {trial.number} is {trial.state.name}, its runs are {seen}")
        elif trial.state.name != "FAIL":
            wrong += [f"trial {trial.number}: {text}" for text in metrics_wrong(client, own[0], trial)]
        if "retry_of" in trial.user_attrs:
            first = study.trials[trial.user_attrs["retry_of"]]
            if first.state.name != "FAIL" or not first.params.items() <= trial.params.items():
                wrong.append(f"trial {trial.number} does not repeat trial {first.number}")
            if [run.data.tags.get("retry_of") for run in own] != [str(first.number)]:
                wrong.append(f"trial {trial.number}: the tag retry_of is not {first.number}")
    if left := [str(path) for path in (store / "sweeps").glob("*/checkpoints/trial-*")]:
        wrong.append(f"checkpoints are left: {left}")
    resumed = sum("resumed_from_step" in run.data.tags for run in runs)
    again = sum("retry_of" in trial.user_attrs for trial in study.trials)
    return wrong, Counter({**states, "retries": again, "resumed": resumed})


def metrics_wrong(client: Any, run: Any, trial: optuna.trial.FrozenTrial) -> list[str]:
    """Compare a trial's metrics with what it must have logged."""
    x = trial.params["model.x"]
    epochs = EPOCHS if trial.state.name == "COMPLETE" else len(trial.intermediate_values)
    must = {
        "train/x": [(step, x + step) for step in range(epochs * BATCHES)],
        "val/loss": [(BATCHES * k - 1, (x - 3) ** 2 + 10 / k) for k in range(1, epochs + 1)],
    }
    wrong = []
    if len(trial.intermediate_values) != epochs:
        wrong.append(f"{len(trial.intermediate_values)} of {epochs} values in the study")
    for key, expected in must.items():
        found = sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))
        close = all(abs(a[1] - b[1]) < 1e-4 for a, b in zip(found, expected, strict=False))
        if [step for step, _ in found] != [step for step, _ in expected] or not close:
            wrong.append(f"{key} is {found}, not {expected}")
    return wrong
