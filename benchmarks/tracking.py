"""What logging five metrics at every step costs: no logger, MLFlowLogger, and MLflowTracker.

Run: OMP_NUM_THREADS=1 python benchmarks/tracking.py [--steps 600] [--repeats 3] [--step-ms 2.1]

Prints JSON: for each logger the ms a step over no logger (median of the repeats), of the training loop alone, of
the whole `fit` (with the run's start and finalize, which waits until all is written) and of the CPU time of the
training thread in the loop (which a busy machine disturbs less), and whether all rows arrived. And what a checkpoint
adds: the ms in which MLflowTracker gets 200 steps' rows out of the process, while its writer starts and later.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning.tracking import MLflowTracker, default_store
from ds_lightning.tracking.store import experiment_id

METRICS = 5


class FiveMetrics(LightningModule):
    """An MLP that logs five metrics at every step."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        layers = [layer for _ in range(depth) for layer in (nn.Linear(256, 256), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(256, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        for number in range(METRICS):
            self.log(f"train/metric{number}", loss * number)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Stopwatch(Callback):
    """Time from the 20th to the last step."""

    def __init__(self) -> None:
        self.first = self.last = self.first_cpu = self.last_cpu = 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.last, self.last_cpu = time.perf_counter(), time.thread_time()
        # The first steps warm up the allocator and open the run.
        if trainer.global_step == 20:
            self.first, self.first_cpu = self.last, self.last_cpu


def fit(logger: Logger | None, depth: int, steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64 * steps, 256), torch.randint(0, 10, (64 * steps,)))
    watch = Stopwatch()
    trainer = Trainer(
        logger=logger or False,
        callbacks=[watch],
        max_epochs=1,
        log_every_n_steps=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(FiveMetrics(depth), DataLoader(data, batch_size=64))
    ended = time.perf_counter()
    return {
        "loop": (watch.last - watch.first) / (steps - 20) * 1e3,
        "whole_fit": (ended - started) / steps * 1e3,
        "thread_cpu": (watch.last_cpu - watch.first_cpu) / (steps - 20) * 1e3,
    }


def depth_for(step_ms: float) -> int:
    """Find the depth whose step, without a logger, takes about this long."""
    found = {depth: fit(None, depth, 150)["thread_cpu"] for depth in (1, 9)}
    slope = (found[9] - found[1]) / 8
    return max(1, round(1 + (step_ms - found[1]) / slope))


def rows(client: Any, run: str) -> int:
    return sum(len(client.get_metric_history(run, f"train/metric{n}")) for n in range(METRICS))


def hand_over_ms(folder: Path, repeats: int = 20) -> dict[str, float]:
    tracker = MLflowTracker("benchmark", store=folder, system_metrics=False)
    tracker.log_metrics({"first": 0.0})
    outbox = tracker._run.outbox
    found: dict[str, list[float]] = {"while_the_writer_starts": [], "later": []}
    for repeat in range(repeats + 1):
        for step in range(200):
            tracker.log_metrics({f"train/metric{n}": step * 0.1 for n in range(METRICS)}, 200 * repeat + step)
        started = time.perf_counter()
        tracker.hand_over()
        found["later" if repeat else "while_the_writer_starts"].append((time.perf_counter() - started) * 1e3)
        while outbox._child is None or not outbox._child.ready:
            time.sleep(0.01)
    tracker.finalize()
    return {when: round(statistics.median(times), 2) for when, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=2.1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        store = default_store(Path(folder, "store"))
        experiment_id(store, "benchmark")
        makers = {
            "none": lambda: None,
            "MLFlowLogger": lambda: MLFlowLogger("benchmark", tracking_uri=store.uri),
            "MLFlowLogger(synchronous=False)": lambda: MLFlowLogger(
                "benchmark", tracking_uri=store.uri, synchronous=False
            ),
            "MLflowTracker": lambda: MLflowTracker("benchmark", store=Path(folder, "store")),
        }
        depth = depth_for(arguments.step_ms)
        # Pays for all imports. In a store of its own: the writer of this one would be started already.
        handed = hand_over_ms(Path(folder, "other"))
        fit(makers["MLflowTracker"](), depth, 30)
        times: dict[str, list[dict[str, float]]] = {name: [] for name in makers}
        arrived: dict[str, list[int]] = {name: [] for name in makers}
        # Interleaved, so that a busy moment of the machine hits all of them, and in turns: whoever always came
        # right after the asynchronous logger measured slower.
        names = list(makers)
        for repeat in range(arguments.repeats):
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                logger = makers[name]()
                times[name].append(fit(logger, depth, arguments.steps))
                if logger is not None:
                    arrived[name].append(rows(logger.experiment, logger.run_id))
                print(f"repeat {repeat}: {name}: {times[name][-1]}", file=sys.stderr)

    def median(name: str, what: str) -> float:
        return statistics.median(time[what] for time in times[name])

    result: dict[str, Any] = {
        "steps": arguments.steps,
        "metrics_a_step": METRICS,
        "repeats": arguments.repeats,
        "step_ms_without_logger": round(median("none", "loop"), 3),
        "hand_over_of_1000_rows_ms": handed,
        "over_no_logger": {},
    }
    for name in list(makers)[1:]:
        over = {
            f"{what}_ms_a_step": round(median(name, what) - median("none", what), 3)
            for what in ("loop", "whole_fit", "thread_cpu")
        }
        complete = arrived[name] == [METRICS * arguments.steps] * arguments.repeats
        result["over_no_logger"][name] = {**over, "all_rows_arrived": complete}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
