"""SIGKILL a sweep at random moments, go on with its study, and compare Optuna's book with MLflow's.

Run: OMP_NUM_THREADS=1 python benchmarks/sweep_kills.py [--kills 50] [--trials 30] [--workers 2]

Half of the kills hit the sweep with all its processes, as a machine that goes down does; a quarter the parent alone,
whose workers and writers live on for a while; a quarter one worker alone. A sweep that is through is followed by
another one, until there were so many kills. Prints JSON: the kills, the trials, and every disagreement found.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import mlflow
import optuna
import psutil
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning.allowlist import allow_packages
from ds_lightning.sweeps import Sweep
from ds_lightning.sweeps.spec import SweepSpec

EPOCHS, BATCHES = 5, 3
STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
MOST_KILLS_OF_ONE = 25


class Slope(LightningModule):
    """Logs `train/x` = x + step and `val/loss` = (x - 3)^2 + 10 / epoch, and takes about a second."""

    def __init__(self, x: float = 0.0) -> None:
        super().__init__()
        self.x = x
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.log("train/x", self.x + self.global_step)
        time.sleep(0.06)
        return (self.weight * batch[0]).mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", (self.x - 3) ** 2 + 10 / (self.current_epoch + 1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Ones(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.ones(BATCHES, 1)), batch_size=1)

    val_dataloader = train_dataloader


def content(trials: int) -> dict[str, Any]:
    """Return the sweep file."""
    trainer = {"max_epochs": EPOCHS, "accelerator": "cpu", "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    return {
        "base": {
            "overrides": {
                "model": {"class_path": "sweep_kills.Slope"},
                "data": {"class_path": "sweep_kills.Ones"},
                "trainer": trainer,
                "trainer.logger.system_metrics": False,
            }
        },
        "space": {"model.x": {"type": "float", "low": -5, "high": 5}},
        "objective": {"metric": "val/loss", "direction": "minimize"},
        "sampler": {"name": "random", "seed": 1},
        "pruner": {"name": "median", "n_startup_trials": 4},
        "trials": trials,
    }


def sweep(store: Path, trials: int, workers: int, study: str | None) -> None:
    """Run the sweep, or go on with it, in this process."""
    warnings.simplefilter("ignore")
    allow_packages(["sweep_kills"])
    with (store / "out.txt").open("a") as out, contextlib.redirect_stderr(out):
        result = Sweep(SweepSpec.from_dict(content(trials), name="kills"), store).run(workers=workers, study=study)
    sys.exit(result.exit_code)


def journal(store: Path) -> Path | None:
    """Return the study's journal, None when there is none yet."""
    return next((store / "optuna").glob("*.journal"), None)


def victims(parent: psutil.Process, dice: random.Random) -> tuple[str, list[psutil.Process]]:
    """Choose what is killed."""
    below = parent.children(recursive=True)
    trainers = [each for each in below if "ds_lightning.sweeps.worker" in _command(each)]
    kind = dice.choice(["all", "all", "parent", "worker"])
    if kind == "worker" and trainers:
        return kind, [dice.choice(trainers)]
    return ("parent", [parent]) if kind == "parent" else ("all", [parent, *below])


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def wait_for_moment(process: Any, store: Path, dice: random.Random) -> None:
    """Wait for a random moment: while the sweep starts, or after it has given out a trial."""
    if dice.random() < 0.25:
        process.join(dice.uniform(0.0, 8.0))
        return
    path = journal(store)
    before = len(load(path).trials) if path else 0
    while process.exitcode is None:
        path = journal(store)
        with contextlib.suppress(KeyError, ValueError):
            if path and len(load(path).trials) > before:
                break
        process.join(0.1)
    process.join(dice.uniform(0.0, 4.0))


def load(path: Path) -> optuna.Study:
    return optuna.load_study(study_name=path.stem, storage=JournalStorage(JournalFileBackend(str(path))))


def disturbed(context: Any, store: Path, dice: random.Random, kills: int, trials: int, workers: int) -> Counter[str]:
    """Run one sweep to its end with up to `kills` kills; return how many of each kind."""
    done: Counter[str] = Counter()
    while True:
        path = journal(store)
        process = context.Process(target=sweep, args=(store, trials, workers, path.stem if path else None))
        process.start()
        parent = psutil.Process(process.pid)
        while process.exitcode is None and sum(done.values()) < kills:
            wait_for_moment(process, store, dice)
            if process.exitcode is not None:
                break
            with contextlib.suppress(psutil.NoSuchProcess):
                kind, chosen = victims(parent, dice)
                for each in chosen:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
                done[kind] += 1
                print(f"kill {sum(done.values())}: {kind}", file=sys.stderr, flush=True)
                if kind != "worker":
                    process.join()
        process.join()
        if process.exitcode == 0:
            return done
        if process.exitcode != -9:
            raise RuntimeError(f"the sweep ended with {process.exitcode}; see {store / 'out.txt'}")


def disagreements(store: Path, trials: int) -> tuple[list[str], Counter[str]]:
    """Compare the study with MLflow and with what each trial must have logged."""
    path = journal(store)
    assert path is not None
    study = load(path)
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
    return wrong, Counter({**states, "retries": sum("retry_of" in trial.user_attrs for trial in study.trials)})


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


def main() -> None:
    """Print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    # Imports are done once, in the server that forks the sweeps; workers are new processes all the same.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "ds_lightning.sweeps.sweep"])
    warm = context.Process(target=os.getpid)
    warm.start()
    warm.join()
    dice = random.Random(arguments.seed)
    kills: Counter[str] = Counter()
    trials: Counter[str] = Counter()
    wrong: list[str] = []
    sweeps = 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        while sum(kills.values()) < arguments.kills:
            store = Path(folder) / str(sweeps)
            store.mkdir()
            most = min(MOST_KILLS_OF_ONE, arguments.kills - sum(kills.values()))
            kills += disturbed(context, store, dice, most, arguments.trials, arguments.workers)
            found, states = disagreements(store, arguments.trials)
            wrong += [f"sweep {sweeps}: {text}" for text in found]
            trials += states
            sweeps += 1
    figures = {"kills": dict(kills), "sweeps": sweeps, "trials": dict(trials), "disagreements": wrong}
    print(json.dumps({"seed": arguments.seed, "seconds": round(time.perf_counter() - start), **figures}, indent=1))


if __name__ == "__main__":
    main()
