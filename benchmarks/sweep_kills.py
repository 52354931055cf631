"""SIGKILL a sweep at random moments, go on with its study, and compare Optuna's book with MLflow's.

Run: OMP_NUM_THREADS=1 python benchmarks/sweep_kills.py [--kills 50] [--trials 30] [--workers 2]
     [--storage journal|sqlite|postgresql]

PostgreSQL is a private server in a temporary folder, from the `initdb` and `pg_ctl` on the PATH (or in Debian's
folder); as root it runs as the user `postgres` or `nobody`, for the server refuses root.

Half of the kills hit the sweep with all its processes, as a machine that goes down does; a quarter the parent alone,
whose workers and writers live on for a while; a quarter one worker alone. A sweep that is through is followed by
another one, until there were so many kills. Trials are saved at each validation, so that a killed one goes on from
there. Prints JSON: the kills, the trials, how many retries went on from a checkpoint, and every disagreement found.
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

import optuna
import psutil
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from storage_server import postgresql, storage_of
from sweep_books import BATCHES, EPOCHS, disagreements, study_of
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning.allowlist import allow_packages
from ds_lightning.sweeps import Sweep
from ds_lightning.sweeps.spec import SweepSpec

STEP_SECONDS = 0.2
MOST_KILLS_OF_ONE = 25


class Slope(LightningModule):
    """Logs `train/x` = x + step and `val/loss` = (x - 3)^2 + 10 / epoch, and takes three seconds."""

    def __init__(self, x: float = 0.0) -> None:
        super().__init__()
        self.x = x
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.log("train/x", self.x + self.global_step)
        time.sleep(STEP_SECONDS)
        return (self.weight * batch[0]).mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", (self.x - 3) ** 2 + 10 / (self.current_epoch + 1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Ones(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.ones(BATCHES, 1)), batch_size=1)

    val_dataloader = train_dataloader


def content(trials: int, storage: str | None) -> dict[str, Any]:
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
        "storage": storage,
        "checkpoint_seconds": 0,
    }


def sweep(store: Path, storage: str | None, trials: int, workers: int, study: str | None) -> None:
    """Run the sweep, or go on with it, in this process."""
    warnings.simplefilter("ignore")
    allow_packages(["sweep_kills"])
    with (store / "out.txt").open("a") as out, contextlib.redirect_stderr(out):
        spec = SweepSpec.from_dict(content(trials, storage), name="kills")
        result = Sweep(spec, store).run(workers=workers, study=study)
    sys.exit(result.exit_code)


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


def wait_for_moment(process: Any, store: Path, storage: str | None, dice: random.Random) -> None:
    """Wait for a random moment: while the sweep starts, after it has given out a trial, or after one was saved."""
    kind = dice.choices(["start", "trial", "checkpoint"], [1, 1, 2])[0]
    if kind == "start":
        process.join(dice.uniform(0.0, 8.0))
    elif kind == "trial":
        before = count(store, storage)
        while process.exitcode is None and count(store, storage) <= before:
            process.join(0.1)
        process.join(dice.uniform(0.0, 4.0))
    else:
        now = time.time()
        while process.exitcode is None and last_saved(store) < now:
            process.join(0.05)
        # Two validations are 0.6 s apart.
        process.join(dice.uniform(0.0, 1.0))


def last_saved(store: Path) -> float:
    """Return when a trial was saved for the last time; 0 without a checkpoint."""
    latest = 0.0
    for path in (store / "sweeps").glob("*/checkpoints/trial-*/last.ckpt"):
        with contextlib.suppress(FileNotFoundError):
            latest = max(latest, path.stat().st_mtime)
    return latest


def count(store: Path, storage: str | None) -> int:
    """Return how many trials there are."""
    # A journal may end in half a line.
    with contextlib.suppress(KeyError, ValueError):
        study = study_of(store, storage)
        return len(study.trials) if study else 0
    return 0


def disturbed(
    context: Any, store: Path, storage: str | None, dice: random.Random, kills: int, trials: int, workers: int
) -> Counter[str]:
    """Run one sweep to its end with up to `kills` kills; return how many of each kind."""
    done: Counter[str] = Counter()
    while True:
        process = context.Process(target=sweep, args=(store, storage, trials, workers, name_of(store, storage)))
        process.start()
        parent = psutil.Process(process.pid)
        while process.exitcode is None and sum(done.values()) < kills:
            wait_for_moment(process, store, storage, dice)
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


def name_of(store: Path, storage: str | None) -> str | None:
    """Return the study's name; that of a journal without a study is its file's."""
    if storage is None:
        return next((path.stem for path in (store / "optuna").glob("*.journal")), None)
    study = study_of(store, storage)
    return study.study_name if study else None


def main() -> None:
    """Print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--storage", choices=["journal", "sqlite", "postgresql"], default="journal")
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
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        kind = arguments.storage
        server = stack.enter_context(postgresql(Path(folder))) if kind == "postgresql" else ""
        while sum(kills.values()) < arguments.kills:
            store = Path(folder) / str(sweeps)
            store.mkdir()
            storage = storage_of(kind, server, store)
            most = min(MOST_KILLS_OF_ONE, arguments.kills - sum(kills.values()))
            kills += disturbed(context, store, storage, dice, most, arguments.trials, arguments.workers)
            found, states = disagreements(store, storage, arguments.trials)
            wrong += [f"sweep {sweeps}: {text}" for text in found]
            # `+=` would drop what is zero.
            trials.update(states)
            sweeps += 1
    figures = {"kills": dict(kills), "sweeps": sweeps, "trials": dict(trials), "disagreements": wrong}
    print(
        json.dumps(
            {"storage": kind, "seed": arguments.seed, "seconds": round(time.perf_counter() - start), **figures},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
