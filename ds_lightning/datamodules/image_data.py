"""What every image DataModule of ours shares: arguments, loaders, normalising and mixing on the device."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ds_lightning.errors import ConfigError, DataError
from ds_lightning.functional.seeds import derived_seed

from .augment import RandomCropFlip
from .mixer import BatchMixer, check_mixing
from .streams import EpochSampler, next_epoch, stratified_order
from .transforms import SeededTransform

Batch = dict[str, Tensor]


class ImageDataset(Protocol):
    """A data set that gives a whole batch at once: `image` (B, C, H, W) uint8 and `label` (B,) int64."""

    transform: SeededTransform | None

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> Batch: ...


class Splits(NamedTuple):
    """The data sets of the three splits; `test` is None where the source has none."""

    train: ImageDataset
    val: ImageDataset
    test: ImageDataset | None


class ImageData(L.LightningDataModule, ABC):
    """Base of the image DataModules: a child says where the images come from (`load_splits`).

    After `setup()` there are `num_classes`, `class_names`, `input_shape` and `dataset_info()`. Batches are
    `{"image": float32 (B, C, H, W), normalised; "label": int64 (B,)}`. Images travel to the device as uint8
    and are normalised there. MixUp and CutMix run there too, in training only, and add `label_mixed` and `mix`
    (see `BatchMixer`). `predict` reads the test set. The order of an epoch, crops, flips and mixing depend on
    `seed`, the process's rank and counters that are in the checkpoint, so a run that is resumed at the end of
    an epoch goes on as one that never stopped. In a loop without a Trainer nothing is normalised or mixed.

    Args:
        batch_size: samples a batch and process, >= 1.
        num_workers: processes that load; 0 loads in the training process.
        val_fraction: the share of the training images that is held out for validation, in (0, 1), by class.
        train_size: train on so many images only, each class in its share; None takes all.
        seed: of the split, the order, the augmentation and the mixing.
        mixup_alpha: MixUp's Beta(alpha, alpha); 0 is off.
        cutmix_alpha: CutMix's Beta(alpha, alpha); 0 is off. With both on, a fair coin decides a batch.
        mix_probability: the chance of each sample to be mixed, in [0, 1].
        drop_last: leave out the last training batch when it isn't full.
        pin_memory: load into page-locked memory, which a copy to a GPU needs to run beside the training.

    Raises:
        ConfigError: an argument out of its range.
    """

    name: str = ""
    source: str = ""
    class_names: Sequence[str] = ()
    mean: Sequence[float] = (0.5,)
    std: Sequence[float] = (0.5,)
    input_shape: tuple[int, int, int]

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        train_size: int | None = None,
        seed: int = 0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        mix_probability: float = 1.0,
        drop_last: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise ConfigError(f"{name} is {value}; expected an integer >= {least}")
        if not 0 < val_fraction < 1:
            raise ConfigError(f"val_fraction is {val_fraction}; expected a number in (0, 1)")
        if train_size is not None and train_size < 1:
            raise ConfigError(f"train_size is {train_size}; expected an integer >= 1, or null for all images")
        check_mixing(mixup_alpha, cutmix_alpha, mix_probability)
        # Takes the arguments of the child's constructor too. Callables would make the checkpoint need pickle.
        self.save_hyperparameters(ignore=["transform"])
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.train_size = train_size
        self.seed = seed
        self.drop_last = drop_last
        self.pin_memory = pin_memory
        self.mixer: BatchMixer | None = None
        if mixup_alpha > 0 or cutmix_alpha > 0:
            self.mixer = BatchMixer(mixup_alpha, cutmix_alpha, mix_probability, seed)
        self.augment: RandomCropFlip | None = None
        self._splits: Splits | None = None
        self._digest = ""
        self._scale_and_shift: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def load_splits(self) -> Splits:
        """Read the data, set `class_names` and `input_shape`, and return the three data sets."""

    @abstractmethod
    def digest(self) -> str:
        """Return what tells this content from any other: the first 16 hexadecimal digits of a SHA-256."""

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def splits(self) -> Splits:
        """The data sets; there after `setup()`."""
        if self._splits is None:
            raise DataError(f"{type(self).__name__} has no data yet; call prepare_data() and setup() first")
        return self._splits

    def dataset_info(self) -> dict[str, Any]:
        """Return `name`, `source`, `digest` and the sizes of the `splits`, for the tracking of a run."""
        self._digest = self._digest or self.digest()
        sizes = {split: 0 if data is None else len(data) for split, data in self.splits._asdict().items()}
        name = self.name or type(self).__name__
        return {"name": name, "source": self.source, "digest": self._digest, "splits": sizes}

    def setup(self, stage: str | None = None) -> None:
        """Read the data once, and tell the random streams which process this is."""
        if self._splits is None:
            self._splits = self.load_splits()
        rank = self._replicas()["rank"]
        for stream in (self.mixer, self.augment):
            if stream is not None:
                stream.rank = rank

    def train_dataloader(self) -> DataLoader[Any]:
        """The shuffled training images; each process of a distributed run gets its share."""
        data = self.splits.train
        sampler = EpochSampler(
            data,
            seed=self.seed,
            epoch_cell=None if data.transform is None else data.transform.epoch,
            **self._replicas(),
        )
        if self.trainer is not None:
            sampler.set_epoch(next_epoch(self.trainer))
        return self._loader(data, sampler=sampler, drop_last=self.drop_last)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation images, in order."""
        return self._loader(self.splits.val)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test images, in order."""
        if self.splits.test is None:
            raise DataError(f"{self.source} has no test images; add a test/ folder, or use `validate`")
        return self._loader(self.splits.test)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test images, in order."""
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment (training), normalise, and mix (training), on the batch's device."""
        training = self.trainer is not None and self.trainer.training
        image = batch["image"]
        if training and self.augment is not None:
            image = self.augment(image)
        batch = {**batch, "image": self.normalize(image)}
        if training and self.mixer is not None:
            # normalize() made this memory, so nobody else sees it.
            batch = self.mixer(batch, inplace=True)
        if self.trainer is not None:
            # Lightning converts a batch to the run's precision before it is here, while it is uint8.
            batch["image"] = self.trainer.precision_plugin.convert_input(batch["image"])
        return batch

    def normalize(self, image: Tensor) -> Tensor:
        """Return `(image / 255 - mean) / std` as a fresh float32 tensor.

        Args:
            image: (B, C, H, W), values in [0, 255].
        """
        if image.device not in self._scale_and_shift:
            scale, shift = self.scale_and_shift()
            self._scale_and_shift[image.device] = (scale.to(image.device), shift.to(image.device))
        scale, shift = self._scale_and_shift[image.device]
        return image.to(torch.float32, copy=True).mul_(scale).add_(shift)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return what normalises images of 0 to 255: a factor and a summand, (C, 1, 1) float32."""
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (self.mean, self.std))
        return 1 / (255 * std), -mean / std

    def state_dict(self) -> dict[str, Any]:
        """Return the counters of the random streams; the order of an epoch follows the trainer's epoch."""
        streams = {"mixer": self.mixer, "augment": self.augment}
        return {name: stream.state_dict() for name, stream in streams.items() if stream is not None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; a stream that it doesn't know starts anew."""
        for name, stream in {"mixer": self.mixer, "augment": self.augment}.items():
            if stream is not None and name in state_dict:
                stream.load_state_dict(state_dict[name])

    def split(self, labels: Tensor, hold_out: bool = True) -> tuple[Tensor, Tensor]:
        """Choose the training and validation images by class.

        Args:
            labels: of the images that are not for testing, shape (N,), int64.
            hold_out: False when the source has validation images of its own.

        Returns:
            The indices of the training images, cut to `train_size`, and of the validation images.

        Raises:
            ConfigError: when a split would be empty, or `train_size` does not fit.
        """
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "split"))
        order = stratified_order(labels, generator)
        held = round(self.val_fraction * len(labels)) if hold_out else 0
        if hold_out and not 0 < held < len(labels):
            raise ConfigError(
                f"val_fraction is {self.val_fraction}, which leaves {held} of {len(labels)} images for "
                "validation; choose one that leaves some for both validation and training"
            )
        most = len(labels) - held
        if self.train_size is not None and not self.num_classes <= self.train_size <= most:
            raise ConfigError(
                f"train_size is {self.train_size}; expected {self.num_classes} (one image a class) to {most} "
                "(all but the validation images)"
            )
        return order[held:][: self.train_size], order[:held]

    def _replicas(self) -> dict[str, int]:
        found = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return found or {"num_replicas": 1, "rank": 0}

    def _loader(
        self, data: ImageDataset, sampler: EpochSampler | None = None, drop_last: bool = False
    ) -> DataLoader[Any]:
        return DataLoader(
            data,  # type: ignore[arg-type]  # the fetcher wants __getitems__ and __len__
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=as_it_is,
            drop_last=drop_last,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            # Or the loader would take a number from the global generator, and dropout would depend on it.
            generator=torch.Generator().manual_seed(derived_seed(self.seed, "loader")),
        )


def as_it_is(batch: Any) -> Any:
    """Return the batch: the data set has already made one of its samples."""
    return batch
