"""What the shifts of a TaskStream cost: milliseconds a batch in the data set, and images a second of an epoch.

CPU time, medians. Prints JSON. One thread: `OMP_NUM_THREADS=1 python benchmarks/task_stream.py`.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch

from ds_lightning.datamodules import InMemoryImageData, MNIST5k, TaskStream

ROUNDS = 15


class Noise(InMemoryImageData):
    """Colour images of 224 pixels."""

    source = "random"
    class_names = ("one", "other")

    def load(self):
        images = torch.randint(0, 256, (200, 3, 224, 224), dtype=torch.uint8)
        labels = torch.arange(200) % 2
        return (images, labels), (images[:64], labels[:64])


def median_of(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def batch_costs(make: Callable[[], InMemoryImageData]) -> dict[str, float]:
    """Milliseconds for a batch of 64, by task."""
    found = {}
    for kind, tasks in (("permuted", 2), ("rotated", 2), ("domain", 8)):
        stream = TaskStream(make(), kind=kind, tasks=tasks)
        stream.setup()
        for task in range(0 if kind == "domain" else 1, tasks):
            samples = stream._table.part(task, "test")
            found[f"{kind}: {stream.task_names[task]}"] = 1000 * median_of(
                lambda samples=samples: samples.load(torch.arange(64))
            )
    return {name: round(value, 3) for name, value in found.items()}


def epochs() -> dict[str, float]:
    """Images a second of an epoch of MNIST5k, batch 64, without training."""
    found = {}
    plain = MNIST5k()
    plain.setup()
    found["MNIST5k"] = 3600 / median_of(lambda: list(plain.train_dataloader()))
    for name, options, task in (
        ("first permuted task", {}, 0),
        ("second permuted task", {}, 1),
        ("second permuted task, memory of 500", {"memory_size": 500}, 1),
    ):
        stream = TaskStream(MNIST5k(), tasks=2, **options)
        stream.setup()
        stream.task_of_epoch = lambda epoch, task=task: task
        type(stream).current_task = property(lambda self: self.task_of_epoch(0))
        images = sum(len(batch["label"]) for batch in stream.train_dataloader())
        found[name] = images / median_of(lambda stream=stream: list(stream.train_dataloader()))
    return {name: round(value) for name, value in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(
        json.dumps(
            {
                "ms a batch of 64, 1 x 28 x 28": batch_costs(MNIST5k),
                "ms a batch of 64, 3 x 224 x 224": batch_costs(Noise),
                "images a second": epochs(),
            },
            indent=2,
        )
    )
