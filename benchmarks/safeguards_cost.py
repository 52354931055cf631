"""What the callbacks that keep a run from being lost cost a training step.

Run: OMP_NUM_THREADS=1 python benchmarks/safeguards_cost.py [--steps 2000] [--repeats 5] [--device cpu]

Trains a small MLP without and with ExactResume, Preemption, DurableCheckpoint (which saves outside the timed steps) and
FiniteGuard, one at a time and all together, in turns. Prints JSON: microseconds a step over the plain fit, the median
of the repeats and their range, where a repeat's figure is the median of its steps.
"""

import argparse
import itertools
import json
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


def step_time(callbacks: list[Callback], steps: int, device: str, folder: str) -> float:
    """Return the median microseconds of a step."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32 * steps, 64), torch.randint(0, 10, (32 * steps,)))
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
    ends = watch.ends[100:]
    return statistics.median(b - a for a, b in itertools.pairwise(ends)) * 1e6


def main() -> None:
    """Print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    made: dict[str, Callable[[], list[Callback]]] = {
        "plain": list,
        "exact_resume": lambda: [ExactResume()],
        "preemption": lambda: [Preemption()],
        "durable_checkpoint": lambda: [DurableCheckpoint()],
        "finite_guard": lambda: [FiniteGuard()],
        "all": lambda: [ExactResume(), DurableCheckpoint(), FiniteGuard(), Preemption()],
    }
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(arguments.repeats):
        for name, make in made.items():
            with tempfile.TemporaryDirectory() as folder:
                times[name].append(step_time(make(), arguments.steps, arguments.device, folder))
    over = {
        name: [round(with_it - plain, 1) for with_it, plain in zip(values, times["plain"], strict=True)]
        for name, values in times.items()
    }
    rows = {
        name: {"over_plain_us": statistics.median(values), "range_us": [min(values), max(values)]}
        for name, values in over.items()
        if name != "plain"
    }
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
                "plain_step_us": round(statistics.median(times["plain"]), 1),
                "rows": rows,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
