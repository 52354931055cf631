"""Few-shot regression of sine waves, as in the paper on MAML."""

import math
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ds_lightning.errors import ConfigError

from .episode_stream import EpisodeBatch, check_counts, episode_loader, training_sampler, uniform_keys

Interval = tuple[float, float]


class SineTasks(Dataset[Any]):
    """Tasks `target = amplitude * sin(table - phase)`, made when they are asked for.

    Args:
        split: tells the tasks of the splits apart.
        count: how many there are.
        shots: support points of a task.
        queries: query points of a task.
        ranges: of amplitude, phase and x, (3, 2) float64.
        seed: the user's seed.
    """

    def __init__(self, split: str, count: int, shots: int, queries: int, ranges: Tensor, seed: int) -> None:
        self.split, self.count, self.shots, self.queries, self.seed = split, count, shots, queries, seed
        self.ranges = ranges

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> EpisodeBatch:
        batch = self.__getitems__([number])
        return {part: {name: tensor[0] for name, tensor in batch[part].items()} for part in batch}

    def __getitems__(self, numbers: list[int]) -> EpisodeBatch:
        keys = uniform_keys(self.seed, self.split, numbers, 2 + self.shots + self.queries)
        low, width = self.ranges[:, 0].tolist(), (self.ranges[:, 1] - self.ranges[:, 0]).tolist()
        amplitude = keys[:, :1] * width[0] + low[0]
        phase = keys[:, 1:2] * width[1] + low[1]
        x = keys[:, 2:] * width[2] + low[2]
        y = amplitude * torch.sin(x - phase)
        parts = {"support": slice(0, self.shots), "query": slice(self.shots, None)}
        return {
            name: {"table": x[:, part, None].contiguous(), "target": y[:, part, None].contiguous()}
            for name, part in parts.items()
        }


class Sinusoids(L.LightningDataModule):
    """Regression of sine waves of any amplitude and phase from a few points (arXiv 1703.03400, section 5.1).

    Batches are `{"support": {"table": (T, shots, 1), "target": (T, shots, 1)}, "query": ...}` float32, with
    `target = amplitude * sin(table - phase)`; amplitude, phase and points are uniform. The paper trains for 70,000
    steps of 25 tasks: 70 epochs of the default length. It evaluates on as many query points as shots; here there are
    100, which measure the same mean with less noise. A training task follows from the seed and its number, which
    counts on over all epochs, so none comes twice; validation and test tasks are always the same. So a resume, also
    inside an epoch with `ExactResume`, needs no saved state, and processes of a distributed run have different tasks.

    Args:
        shots: support points of a task, >= 1; the paper has 5 and 10.
        queries: query points of a training task, >= 1; the paper has as many as shots.
        tasks_per_batch: tasks of a batch and process, >= 1.
        episodes_per_epoch: training tasks of an epoch over all processes, >= 1.
        val_episodes: validation tasks, >= 0; 0 is no validation.
        test_episodes: test tasks, >= 1.
        eval_queries: query points of a validation or test task, >= 1.
        train_tasks: train on so few tasks only, always with the same points, >= 1; None makes new ones for ever.
        amplitude: the range of the amplitude.
        phase: the range of the phase.
        x: the range of the input.
        seed: of the tasks.
        num_workers: processes that make them; 0 is the fastest unless the training step is very short.

    Raises:
        ConfigError: an argument out of its range.

    Example:
        >>> data = Sinusoids(shots=5, queries=5)
        >>> next(iter(data.train_dataloader()))["support"]["table"].shape
        torch.Size([25, 5, 1])
    """

    num_classes = 1

    def __init__(
        self,
        shots: int = 10,
        queries: int = 10,
        tasks_per_batch: int = 25,
        episodes_per_epoch: int = 25_000,
        val_episodes: int = 200,
        test_episodes: int = 600,
        eval_queries: int = 100,
        train_tasks: int | None = None,
        amplitude: Interval = (0.1, 5.0),
        phase: Interval = (0.0, math.pi),
        x: Interval = (-5.0, 5.0),
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_counts(
            shots=(shots, 1),
            queries=(queries, 1),
            tasks_per_batch=(tasks_per_batch, 1),
            episodes_per_epoch=(episodes_per_epoch, 1),
            val_episodes=(val_episodes, 0),
            test_episodes=(test_episodes, 1),
            eval_queries=(eval_queries, 1),
            train_tasks=(train_tasks, 1),
            num_workers=(num_workers, 0),
        )
        for name, interval in (("amplitude", amplitude), ("phase", phase), ("x", x)):
            if len(interval) != 2 or not -math.inf < interval[0] <= interval[1] < math.inf:
                raise ConfigError(f"{name} is {tuple(interval)}; expected a lowest and a highest number")
        self.save_hyperparameters()
        self.shots = shots
        self.queries = queries
        self.tasks_per_batch = tasks_per_batch
        self.episodes_per_epoch = episodes_per_epoch
        self.val_episodes = val_episodes
        self.test_episodes = test_episodes
        self.eval_queries = eval_queries
        self.train_tasks = train_tasks
        self.ranges = (tuple(amplitude), tuple(phase), tuple(x))
        self.seed = seed
        self.num_workers = num_workers

    def dataset_info(self) -> dict[str, Any]:
        """Return `name`, `source`, `digest` and the sizes of the `splits`, for the tracking of a run."""
        splits = {"train": self.episodes_per_epoch, "val": self.val_episodes, "test": self.test_episodes}
        digest = f"{self.shots}-{self.queries}-{self.eval_queries}-{self.seed}"
        return {"name": "Sinusoids", "source": "arXiv 1703.03400", "digest": digest, "splits": splits}

    def train_dataloader(self) -> DataLoader[Any]:
        """New tasks; each process of a distributed run gets its share."""
        sampler = training_sampler(self.trainer, self.episodes_per_epoch, self.seed, self.train_tasks)
        return self._loader(self._tasks("train", self.episodes_per_epoch, self.queries), sampler)

    def val_dataloader(self) -> Any:
        """The validation tasks, in order."""
        return self._loader(self._tasks("val", self.val_episodes, self.eval_queries)) if self.val_episodes else []

    def test_dataloader(self) -> DataLoader[Any]:
        """The test tasks, in order."""
        return self._loader(self._tasks("test", self.test_episodes, self.eval_queries))

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test tasks, in order."""
        return self.test_dataloader()

    def _tasks(self, split: str, count: int, queries: int) -> SineTasks:
        ranges = torch.tensor(self.ranges, dtype=torch.float64)
        return SineTasks(split, count, self.shots, queries, ranges, self.seed)

    def _loader(self, tasks: SineTasks, sampler: Any = None) -> DataLoader[Any]:
        return episode_loader(tasks, self.tasks_per_batch, self.num_workers, self.seed, sampler)
