"""What each method forgets on streams of five tasks: fine-tuning, EWC, rehearsal, both, and all tasks together.

MNIST5k (3,990 digits to train on, 1,000 to test), MLP 784-256-256-n, Adam 1e-3, batch 64, 10 epochs a task. `shifts`
is CIFAR-10 under clear, blur, noise and contrast with a ResNet-8; it needs `--data-dir` with cifar10_jpeg.npz (`jpeg`:
all files' bytes, `offset`, `y`, `is_test`, `classes`).

Prints JSON; `--write docs/` puts pictures into docs/figures. Times are comparable within a run with `--jobs 1`.
Run: `OMP_NUM_THREADS=1 python benchmarks/continual.py --seeds 5 --write docs/`.
"""

import argparse
import functools
import json
import logging
import math
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from continual_data import CIFARFile
from continual_pictures import write_pictures
from continual_rivals import BatchFisherEWC, FisherBatches, Joint, ResetOptimizer
from gpu_processes import training_processes
from torch import nn

from ds_lightning.callbacks import ContinualMetrics
from ds_lightning.datamodules import MNIST5k
from ds_lightning.functional.continual import average_accuracy, forgetting, largest_drop
from ds_lightning.modules import Classifier

STREAMS: dict[str, dict[str, Any]] = {
    "permuted": {"kind": "permuted"},
    "known": {"kind": "split", "labels": "known"},
    "domain": {"kind": "split", "labels": "domain"},
    "class": {"kind": "split", "labels": "class"},
    "shifts": {"kind": "domain", "shifts": ["clear", "blur", "noise", "contrast"]},
}
METHODS = (
    "naive",
    "ewc",
    "ewc_unmerged",
    "ewc_tuned",
    "fisher_batch",
    "rehearsal",
    "ewc+rehearsal",
    "batch_fisher",
    "joint",
)
MEMORIES = (200, 500)
FISHER_BATCHES = (8, 32, 256)
# Where the decade grids begin; they grow until the best strength has a worse one on both sides.
EWC_START = 0.01
BATCH_FISHER_START = {"permuted": 1e3, "known": 1e6, "domain": 1e6, "class": 1e6, "shifts": 1e4}
MOST_STRENGTHS = 10


@dataclass(frozen=True)
class Run:
    """One fit. `ewc` and `batch_fisher` are strengths; None is off, NaN the callback's default."""

    stream: str
    seed: int
    ewc: float | None = None
    merge: bool = True
    batch_fisher: float | None = None
    memory: int = 0
    reset: bool = False
    joint: bool = False
    fisher_batch_size: int | None = None
    epochs: int = 10
    device: str = "auto"
    data_dir: str = ""
    train_size: int | None = None
    test_size: int | None = None
    norm: str = "batch"
    severity: float = 1.0


def fit(run: Run) -> dict[str, Any]:
    """Return the accuracy matrix of a run and its seconds."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(run.seed, verbose=False)
    natural = run.stream == "shifts"
    if natural:
        data = CIFARFile(batch_size=128, val_fraction=0.001, train_size=run.train_size, seed=run.seed)
        data.path, data.test_size = str(Path(run.data_dir) / "cifar10_jpeg.npz"), run.test_size
    else:
        data = MNIST5k(batch_size=64, val_fraction=0.0025, seed=run.seed)
    options = {**STREAMS[run.stream], "epochs_per_task": run.epochs, "memory_size": run.memory, "seed": run.seed}
    if natural:
        options["severity"] = run.severity
    stream = (Joint if run.joint else FisherBatches)(data, **options)
    if isinstance(stream, FisherBatches):
        stream.fisher_batch_size = run.fisher_batch_size
    stream.prepare_data()
    stream.setup()
    optimizer = functools.partial(torch.optim.Adam, lr=1e-3)
    if natural:
        module = Classifier("resnet8", 10, in_channels=3, network_options={"norm": run.norm}, optimizer=optimizer)
    else:
        hidden = (nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        classes = stream.num_classes
        net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, classes))
        module = Classifier(net, classes, optimizer=optimizer)
    metrics = ContinualMetrics()
    trainer = pl.Trainer(
        accelerator=run.device,
        devices=1,
        max_epochs=stream.num_tasks * run.epochs,
        callbacks=[*callbacks_of(run), metrics],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    start = time.perf_counter()
    trainer.fit(module, stream)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"matrix": metrics.matrix.tolist(), "seconds": time.perf_counter() - start, "tasks": stream.task_names}


def callbacks_of(run: Run) -> list[pl.Callback]:
    found: list[pl.Callback] = []
    if run.ewc is not None:
        from ds_lightning.callbacks import ElasticWeightConsolidation

        options: dict[str, Any] = {} if math.isnan(run.ewc) else {"strength": run.ewc}
        found.append(ElasticWeightConsolidation(**options, **({} if run.merge else {"merge": None})))
    if run.batch_fisher is not None:
        found.append(BatchFisherEWC(run.batch_fisher))
    if run.reset:
        found.append(ResetOptimizer())
    return found


def spread(values: list[float]) -> dict[str, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    found = {"median": statistics.median(values), "mean": statistics.fmean(values), "standard_error": error}
    return {name: round(value, 4) for name, value in {**found, "min": min(values), "max": max(values)}.items()}


class Bench:
    """Runs each method over the seeds, and keeps the matrices for the pictures."""

    def __init__(self, base: Run, seeds: int, pool: ProcessPoolExecutor | None) -> None:
        self.base = base
        self.seeds = seeds
        self.pool = pool
        self.rows: dict[str, dict[str, Any]] = {}
        self.matrices: dict[str, torch.Tensor] = {}
        self.task_names: list[str] = []

    def over_seeds(self, **change: Any) -> list[dict[str, Any]]:
        runs = [replace(self.base, seed=seed, **change) for seed in range(self.seeds)]
        return list(self.pool.map(fit, runs) if self.pool else map(fit, runs))

    def add(self, name: str, found: list[dict[str, Any]] | None = None, **change: Any) -> None:
        found = self.over_seeds(**change) if found is None else found
        matrices = [torch.tensor(result["matrix"], dtype=torch.float64) for result in found]
        self.task_names = found[0]["tasks"]
        self.matrices[name] = torch.stack(matrices)
        self.rows[name] = {
            "average_accuracy": spread([average_accuracy(matrix) for matrix in matrices]),
            "forgetting": spread([forgetting(matrix) for matrix in matrices]),
            "largest_drop": spread([largest_drop(matrix) for matrix in matrices]),
            "new_task_accuracy": spread([matrix.diagonal().mean().item() for matrix in matrices]),
            "seconds_a_task": round(statistics.median(result["seconds"] for result in found) / len(matrices[0]), 3),
        }
        # The whole takes an hour: say what is known already.
        accuracy = self.rows[name]["average_accuracy"]
        print(f"{self.base.stream} {name}: {accuracy['mean']} +- {accuracy['standard_error']}", file=sys.stderr)

    def tune(self, name: str, field: str, start: float) -> None:
        """Take the best strength of a decade grid, by average accuracy over these very seeds: an upper bound."""
        tried: dict[int, list[dict[str, Any]]] = {}
        mean: dict[int, float] = {}
        wanted = [0, -1, 1]
        while wanted and len(tried) < MOST_STRENGTHS:
            decade = wanted.pop(0)
            tried[decade] = self.over_seeds(**{field: start * 10.0**decade})
            mean[decade] = statistics.fmean(
                average_accuracy(torch.tensor(result["matrix"])) for result in tried[decade]
            )
            if not wanted:
                best = max(mean, key=lambda key: mean[key])
                wanted = [edge for edge in (best - 1, best + 1) if edge not in tried]
        best = max(mean, key=lambda key: mean[key])
        self.add(name, tried[best])
        self.rows[name]["strength"] = start * 10.0**best
        self.rows[name]["grid"] = {f"{start * 10.0**key:g}": round(mean[key], 4) for key in sorted(mean)}
        self.rows[name]["bracketed"] = best - 1 in tried and best + 1 in tried

    def run(self, methods: list[str]) -> dict[str, Any]:
        default = math.nan
        if "naive" in methods:
            self.add("naive")
            self.add("naive_reset", reset=True)
        if "ewc" in methods or "fisher_batch" in methods:
            self.add("ewc", ewc=default)
        if "ewc_unmerged" in methods:
            self.add("ewc_unmerged", ewc=default, merge=False)
        if "ewc_tuned" in methods:
            self.tune("ewc_tuned", "ewc", EWC_START)
        if "rehearsal" in methods:
            for memory in MEMORIES:
                self.add(f"rehearsal_{memory}", memory=memory)
        if "ewc+rehearsal" in methods:
            for memory in MEMORIES:
                self.add(f"ewc+rehearsal_{memory}", memory=memory, ewc=default)
        if "batch_fisher" in methods:
            self.tune("batch_fisher", "batch_fisher", BATCH_FISHER_START[self.base.stream])
        if "joint" in methods:
            self.add("joint", joint=True)
        result: dict[str, Any] = {"methods": self.rows}
        if "naive" in self.rows:
            result["against_naive"] = {name: self.against_naive(row) for name, row in self.rows.items()}
        if "fisher_batch" in methods:
            result["fisher_batch_sizes"] = self.batch_sizes()
        return result

    def against_naive(self, row: dict[str, Any]) -> dict[str, float]:
        naive = self.rows["naive"]
        drops = naive["largest_drop"]["median"], row["largest_drop"]["median"]
        return {
            "largest_drop_divided_by": round(drops[0] / drops[1], 2) if drops[1] > 0 else math.inf,
            "new_task_accuracy_difference": round(
                row["new_task_accuracy"]["median"] - naive["new_task_accuracy"]["median"], 4
            ),
            "more_seconds_a_task": round(row["seconds_a_task"] - naive["seconds_a_task"], 3),
        }

    def batch_sizes(self) -> dict[str, Any]:
        """Mean average accuracy by the batch size of the Fisher: the default strength, and the peers' tuned one."""
        found: dict[str, Any] = {}
        settings = {"ewc": {"ewc": math.nan}}
        if "batch_fisher" in self.rows:
            settings["batch_fisher"] = {"batch_fisher": self.rows["batch_fisher"]["strength"]}
        for name, change in settings.items():
            means = {
                size: statistics.fmean(
                    average_accuracy(torch.tensor(result["matrix"]))
                    for result in self.over_seeds(**change, fisher_batch_size=size)
                )
                for size in FISHER_BATCHES
            }
            found[name] = {size: round(value, 4) for size, value in means.items()}
            found[name]["spread"] = round(max(means.values()) - min(means.values()), 4)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=[s for s in STREAMS if s != "shifts"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10, help="a task")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--jobs", type=int, default=1, help="processes; more than one spoils the times")
    parser.add_argument("--data-dir", default="", help="folder of cifar10_jpeg.npz, for the stream shifts")
    parser.add_argument("--train-size", type=int, help="training images of the stream shifts; all when left out")
    parser.add_argument("--test-size", type=int, help="test images of the stream shifts; all when left out")
    parser.add_argument("--norm", choices=("batch", "group"), default="batch", help="of the network of shifts")
    parser.add_argument("--severity", type=float, default=1.0, help="of the shifts")
    parser.add_argument("--write", type=Path, help="folder of docs: pictures go into its figures/")
    options = parser.parse_args()
    if "shifts" in options.streams and not (Path(options.data_dir) / "cifar10_jpeg.npz").is_file():
        parser.error(f"the stream shifts needs --data-dir with cifar10_jpeg.npz; it is not in {options.data_dir!r}")
    pool = None
    if options.jobs > 1:
        pool = training_processes(options.jobs, options.device)
    result: dict[str, Any] = {"torch": torch.__version__, "device": options.device, "seeds": options.seeds}
    for name in options.streams:
        base = Run(
            stream=name,
            seed=0,
            epochs=options.epochs,
            device=options.device,
            data_dir=options.data_dir if name == "shifts" else "",
            train_size=options.train_size if name == "shifts" else None,
            test_size=options.test_size if name == "shifts" else None,
            norm=options.norm,
            severity=options.severity,
        )
        bench = Bench(base, options.seeds, pool)
        result[name] = {"setting": asdict(base), **bench.run(options.methods)}
        if options.write is not None:
            write_pictures(options.write / "figures", name, bench.matrices, bench.task_names)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
