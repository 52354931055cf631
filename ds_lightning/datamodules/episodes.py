"""Few-shot tasks from any labelled images."""

import hashlib
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ds_lightning.errors import ConfigError, DataError

from .episode_classes import SPLITS, check_splits, split_classes
from .episode_draws import EpisodeSize, ImageEpisodes, turned_classes
from .episode_samples import EpisodeSource, check_data, episode_source
from .episode_stream import EpisodeBatch, check_counts, episode_loader, training_sampler
from .image_data import ImageData

_NO_DATA = "Episodes has no data yet; call prepare_data() and setup() first"


class Episodes(L.LightningDataModule):
    """Few-shot tasks: `ways` classes with `shots` labelled images each, and `queries` more to be told apart.

    Batches hold T tasks: `support` and `query`, each `{"image": (T, N, C, H, W) float32, normalised; "label": (T, N)
    int64 in 0..ways-1}`, sorted by label, with N = ways * shots and ways * queries; and `classes` (T, ways) int64, what
    the labels stand for among `class_names`. Which class gets which label is random. All images of a class count,
    whatever split of `data` they are in; the classes are split into those for training, validation and test.

    A training episode follows from the seed and its number, which counts on over all epochs and processes, so none
    comes twice. Validation and test episodes are the same in every epoch and run, for any number of workers. So a
    resume, also inside an epoch with `ExactResume`, needs no saved state but that of the augmentation. Images travel
    to the device as uint8 and are normalised there by a hook of the Trainer; `batch()` gives episodes that are ready.

    After `setup()` there are `class_names` (of all classes, those that are turned last), `train_classes`,
    `val_classes` and `test_classes` (numbers among them), `input_shape` and `source`.

    Args:
        data: an image DataModule of ours; or a map-style data set of pairs (image (C, H, W), label): uint8, which
            become 0 to 1, or floats, which stay.
        ways: classes of an episode, >= 2.
        shots: support images of a class, >= 1.
        queries: query images of a class, >= 1.
        tasks_per_batch: episodes of a batch and process, >= 1.
        episodes_per_epoch: training episodes of an epoch over all processes, >= 1.
        val_episodes: validation episodes, >= 0; 0 is no validation.
        test_episodes: test episodes, >= 1; 600 and more are usual.
        groups: class name -> group, such as the alphabet of a character: a dictionary, a callable on the name, or a
            list with the group of each class. Two splits never share a group. None makes each class one.
        splits: the shares of the classes for training, validation and test, with sum 1; a share of 0 is none.
        train_classes: names or numbers of the training classes; None takes a share of those that no list names.
        val_classes: those for validation.
        test_classes: those for the test.
        eval_ways: ways in validation and test, >= 2; None is as in training.
        eval_shots: shots in validation and test, >= 1; None is as in training.
        eval_queries: queries in validation and test, >= 1; None is as in training.
        rotations: in training each class turned by 90, 180 and 270 degrees is a class of its own (arXiv 1605.06065);
            needs square images.
        augment: use the training transform, crops and mirror images of `data` in training.
        train_tasks: train on so few episodes only, always with the same images, >= 1; each pass has another order.
            None makes new ones for ever.
        seed: of the classes' split and the episodes.
        num_workers: processes that load; 0 is the fastest for images in memory.
        pin_memory: load into page-locked memory, which a copy to a GPU needs to run beside the training.

    Raises:
        ConfigError: an argument out of its range; from `setup()` an unknown class, or one in two splits.
        DataError: from `setup()`: too few classes in a split, or too few images in a class.

    Example:
        >>> from ds_lightning.datamodules import MNIST5k
        >>> data = Episodes(MNIST5k(), ways=2, shots=5, splits=(0.6, 0.2, 0.2))
        >>> data.setup()
        >>> data.batch("test", [0])["support"]["image"].shape
        torch.Size([1, 10, 1, 28, 28])
    """

    def __init__(
        self,
        data: ImageData | Dataset[Any],
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        tasks_per_batch: int = 4,
        episodes_per_epoch: int = 1000,
        val_episodes: int = 200,
        test_episodes: int = 600,
        groups: dict[str, str] | list[str] | Callable[[str], str] | None = None,
        splits: tuple[float, float, float] = (0.64, 0.16, 0.20),
        train_classes: list[str | int] | None = None,
        val_classes: list[str | int] | None = None,
        test_classes: list[str | int] | None = None,
        eval_ways: int | None = None,
        eval_shots: int | None = None,
        eval_queries: int | None = None,
        rotations: bool = False,
        augment: bool = False,
        train_tasks: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        check_counts(
            ways=(ways, 2),
            shots=(shots, 1),
            queries=(queries, 1),
            tasks_per_batch=(tasks_per_batch, 1),
            episodes_per_epoch=(episodes_per_epoch, 1),
            val_episodes=(val_episodes, 0),
            test_episodes=(test_episodes, 1),
            eval_ways=(eval_ways, 2),
            eval_shots=(eval_shots, 1),
            eval_queries=(eval_queries, 1),
            train_tasks=(train_tasks, 1),
            num_workers=(num_workers, 0),
        )
        check_splits(splits)
        check_data(data)
        # Groups may be a callable, which would make the checkpoint need pickle.
        self.save_hyperparameters(ignore=["data", "groups"])
        self.data = data
        self.ways, self.shots, self.queries = ways, shots, queries
        self.size = EpisodeSize(ways, shots, queries)
        self.eval_size = EpisodeSize(eval_ways or ways, eval_shots or shots, eval_queries or queries)
        self.tasks_per_batch = tasks_per_batch
        self.counts = {"train": episodes_per_epoch, "val": val_episodes, "test": test_episodes}
        self.groups = groups
        self.splits = splits
        self.wanted = {"train": train_classes, "val": val_classes, "test": test_classes}
        self.rotations = rotations
        self.augment = augment
        self.train_tasks = train_tasks
        self.seed = seed
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.class_names: list[str] = []
        self.train_classes: list[int] = []
        self.val_classes: list[int] = []
        self.test_classes: list[int] = []
        self._source: EpisodeSource | None = None
        self._sets: dict[str, ImageEpisodes] = {}
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def num_classes(self) -> int:
        """The number of outputs that a model needs: the ways of training."""
        return self.ways

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images; there after `setup()`."""
        return self.source.input_shape

    @property
    def source(self) -> EpisodeSource:
        """All images; there after `setup()`."""
        if self._source is None:
            raise DataError(_NO_DATA)
        return self._source

    def dataset_info(self) -> dict[str, Any]:
        """Return `name`, `source`, `digest` and the sizes of the `splits`, in classes, for the tracking of a run."""
        info: dict[str, Any] = {"name": type(self.data).__name__, "source": type(self.data).__name__, "digest": ""}
        if isinstance(self.data, ImageData):
            info = self.data.dataset_info()
        classes = {split: self.classes_of(split) for split in SPLITS}
        settings = (info["digest"], classes, tuple(self.size), tuple(self.eval_size), self.train_tasks, self.seed)
        return {
            "name": f"Episodes-{info['name']}",
            "source": info["source"],
            "digest": hashlib.sha256(repr(settings).encode()).hexdigest()[:16],
            "splits": {split: len(names) for split, names in classes.items()},
        }

    def classes_of(self, split: str) -> list[str]:
        """Return the names of the classes of a split: train, val or test; there after `setup()`."""
        return [self.class_names[number] for number in getattr(self, f"{split}_classes")]

    def prepare_data(self) -> None:
        """Let the DataModule fetch what it needs."""
        if isinstance(self.data, ImageData):
            self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Read the data and split the classes."""
        if isinstance(self.data, ImageData):
            self.data.trainer = self.trainer
            self.data.setup(stage)
        if self._source is not None:
            return
        source = episode_source(self.data, self.augment)
        names = source.class_names
        classes = split_classes(names, self.splits, self.seed, self.groups, self.wanted)
        turned = turned_classes(source, classes["train"]) if self.rotations else []
        sets = {}
        for split in SPLITS:
            if self.counts[split] and (classes[split] or self._expected(split)):
                options: dict[str, Any] = {"turned": turned, "augment": self.augment} if split == "train" else {}
                size = self.size if split == "train" else self.eval_size
                sets[split] = ImageEpisodes(
                    source, split, classes[split], self.counts[split], size, seed=self.seed, **options
                )
        angles = (90, 180, 270)[: len(turned)]
        self.class_names = [*names, *(f"{names[n]} turned {angle}" for angle in angles for n in classes["train"])]
        self.train_classes = [*classes["train"], *(number for numbers in turned for number in numbers)]
        self.val_classes, self.test_classes = classes["val"], classes["test"]
        self._source, self._sets = source, sets

    def teardown(self, stage: str) -> None:
        """Let the DataModule leave the trainer as it was."""
        if isinstance(self.data, ImageData):
            self.data.teardown(stage)

    def batch(self, split: str, numbers: list[int]) -> EpisodeBatch:
        """Return episodes that are normalised and so ready for a model, in a Trainer or not.

        Args:
            split: train, val or test.
            numbers: of the episodes, >= 0; those of the training count on over the epochs.
        """
        batch = self._episodes(split).__getitems__(list(numbers))
        return self._with_images(batch, self._normalize)

    def on_after_batch_transfer(self, batch: EpisodeBatch, dataloader_idx: int) -> EpisodeBatch:
        """Augment (training with `augment`) and normalise, on the batch's device."""
        training = self.augment and self.trainer is not None and self.trainer.training
        return self._with_images(batch, self._augment_and_normalize if training else self._normalize)

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the training classes, and the counters of the augmentation."""
        data = self.data.state_dict() if isinstance(self.data, ImageData) else {}
        return {"train_classes": self.classes_of("train"), "data": data}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; refuse to test on a class that was trained on."""
        trained = set(state_dict["train_classes"])
        for split in ("val", "test"):
            seen = [name for name in self.classes_of(split) if name in trained]
            if seen:
                raise ConfigError(
                    f"class {seen[0]!r} is for {split} here, and the checkpoint was trained on it; expected the same "
                    "seed, groups, splits and lists of classes"
                )
        if isinstance(self.data, ImageData):
            self.data.load_state_dict(state_dict["data"])

    def train_dataloader(self) -> DataLoader[Any]:
        """New episodes; each process of a distributed run gets its share."""
        episodes = self._episodes("train")
        return self._loader(episodes, training_sampler(self.trainer, len(episodes), self.seed, self.train_tasks))

    def val_dataloader(self) -> Any:
        """The validation episodes, in order."""
        return self._loader(self._episodes("val")) if "val" in self._sets else []

    def test_dataloader(self) -> DataLoader[Any]:
        """The test episodes, in order."""
        return self._loader(self._episodes("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test episodes, in order."""
        return self.test_dataloader()

    def _loader(self, episodes: ImageEpisodes, sampler: Any = None) -> DataLoader[Any]:
        return episode_loader(episodes, self.tasks_per_batch, self.num_workers, self.seed, sampler, self.pin_memory)

    def _episodes(self, split: str) -> ImageEpisodes:
        if split not in SPLITS:
            raise ConfigError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
        if split not in self._sets:
            absent = f"there are no {split} episodes; give {split} a share in splits, or {split}_classes"
            raise DataError(_NO_DATA if self._source is None else absent)
        return self._sets[split]

    def _expected(self, split: str) -> bool:
        wanted = self.wanted[split]
        return self.splits[SPLITS.index(split)] > 0 if wanted is None else len(wanted) > 0

    def _with_images(self, batch: EpisodeBatch, change: Callable[[Tensor], Tensor]) -> EpisodeBatch:
        parts = {part: {**batch[part], "image": change(batch[part]["image"])} for part in ("support", "query")}
        return {**batch, **parts}

    def _augment_and_normalize(self, image: Tensor) -> Tensor:
        augment = self.data.augment if isinstance(self.data, ImageData) else None
        if augment is not None:
            image = augment(image.flatten(0, 1)).view_as(image)
        return self._normalize(image)

    def _normalize(self, image: Tensor) -> Tensor:
        if not image.is_floating_point():
            if image.device not in self._tables:
                scale, shift = self.source.normalization
                self._tables[image.device] = (scale.to(image.device), shift.to(image.device))
            scale, shift = self._tables[image.device]
            image = image.to(torch.float32).mul_(scale).add_(shift)
        # Lightning converts a batch to the run's precision before it is here, while it is uint8.
        return image if self.trainer is None else self.trainer.precision_plugin.convert_input(image)
