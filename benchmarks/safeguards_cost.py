"""What the callbacks that keep a run from being lost cost a training step.

Run: OMP_NUM_THREADS=1 python benchmarks/safeguards_cost.py [--steps 150] [--repeats 30] [--device cpu]

Trains a small MLP without and with ExactResume, Preemption, DurableCheckpoint (which saves outside the timed steps) and
FiniteGuard, one at a time and all together, in short fits that take turns, so that a change of the machine's load meets
all of them. Prints JSON, microseconds a step over the plain fit: the quartiles over the turns of the paired
differences, where a fit's figure is once the median and once the lower quartile of its steps; and the difference of
the fastest twentieth of all steps, which a machine that others use too disturbs least.
"""

import argparse
import itertools
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning.callbacks import DurableCheckpoint, ExactResume, FiniteGuard, Preemption

_WARM_UP = 30


class Mlp(LightningModule):
    """Three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Stopwatch(Callback):
    """The time from the end of each step to the end of the next, loading included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


def step_times(callbacks: list[Callback], data: TensorDataset, device: str, folder: str) -> list[float]:
    """Return the microseconds of each step of a fit."""
    torch.manual_seed(0)
    watch = Stopwatch()
    trainer = Trainer(
        max_epochs=1,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=any(isinstance(callback, DurableCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*callbacks, watch],
    )
    trainer.fit(Mlp(), DataLoader(data, batch_size=32, shuffle=True))
    return [(b - a) * 1e6 for a, b in itertools.pairwise(watch.ends[_WARM_UP:])]


def quartiles(values: list[float]) -> list[float]:
    """Return lower quartile, median and upper quartile."""
    return [round(value, 1) for value in statistics.quantiles(values)]


def paired(fits: list[list[float]], plain: list[list[float]], quartile: int) -> list[float]:
    """Return the quartiles over the turns of the difference of one quartile of the steps."""
    ours, theirs = ([statistics.quantiles(steps)[quartile] for steps in group] for group in (fits, plain))
    return quartiles([a - b for a, b in zip(ours, theirs, strict=True)])


def fastest(fits: list[list[float]]) -> float:
    """Return the limit of the fastest twentieth of all steps."""
    return statistics.quantiles([step for fit in fits for step in fit], n=20)[0]


def main() -> None:
    """Print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of a fit; the first 30 are not timed")
    parser.add_argument("--repeats", type=int, default=30, help="turns, >= 2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    made: dict[str, Callable[[], list[Callback]]] = {
        "plain": list,
        "exact_resume": lambda: [ExactResume()],
        "preemption": lambda: [Preemption()],
        "durable_checkpoint": lambda: [DurableCheckpoint()],
        "finite_guard": lambda: [FiniteGuard()],
        "all": lambda: [ExactResume(), DurableCheckpoint(), FiniteGuard(), Preemption()],
    }
    samples = 32 * arguments.steps
    data = TensorDataset(torch.randn(samples, 64), torch.randint(0, 10, (samples,)))
    times: dict[str, list[list[float]]] = {name: [] for name in made}
    with tempfile.TemporaryDirectory() as folder:
        step_times([], data, arguments.device, folder)
    for turn in range(arguments.repeats):
        order = list(made)
        for name in order if turn % 2 == 0 else reversed(order):
            with tempfile.TemporaryDirectory() as folder:
                times[name].append(step_times(made[name](), data, arguments.device, folder))
    plain = times.pop("plain")
    rows = {
        name: {
            "over_plain_us_by_median_step": paired(fits, plain, 1),
            "over_plain_us_by_lower_quartile_step": paired(fits, plain, 0),
            "over_plain_us_by_fastest_steps": round(fastest(fits) - fastest(plain), 1),
        }
        for name, fits in times.items()
    }
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
                "plain_step_us": {
                    "median_step": quartiles([statistics.median(fit) for fit in plain]),
                    "fastest_steps": round(fastest(plain), 1),
                },
                "rows": rows,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
