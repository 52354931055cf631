"""Two views of each sample, for pre-training without labels."""

import hashlib
import warnings
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ds_lightning.errors import ConfigError, DataError, NoEffectWarning

from .image_data import ImageData
from .loaders import batch_loader, training_order
from .text_files import TextFiles
from .text_views import TokenViews
from .transforms import Transform
from .view_samples import NumberedSamples, ViewSamples
from .view_sources import ViewSources, check_source, view_sources
from .view_transforms import BatchViews, as_unit

_NO_DATA = "ContrastiveViews has no data yet; call prepare_data() and setup() first"


class ContrastiveViews(L.LightningDataModule):
    """Two random views of each sample: what contrastive pre-training learns to match.

    Batches are `{"first": {...}, "second": {...}, "index": int64 (B,)}`, with `{"image": float32 (B, C, H, W),
    normalised}` or `{"text": int64 (B, L)}` in each view, and `label` (B,) with `use_labels`. The training samples are
    all those of `data`'s training split. Images travel to the device once, as uint8, and both views are made there, for
    the whole batch at once (`BatchViews`, SimCLR's augmentation); with a `transform` of yours they are made one by one
    in the loading process. `predict` gives samples as they are.

    A view follows from the seed, the epoch and the batch's first sample; those of validation and test are the same in
    every epoch. So a resume, also inside an epoch with `ExactResume`, needs no saved state, and the number of workers
    plays no part. The crops and mirror images of `data` itself are not used, nor is its training transform.

    Args:
        data: an image DataModule of ours or `TextFiles`; or a map-style data set of images (C, H, W), of pairs (image,
            label), or of dictionaries: uint8, which become 0 to 1, or floats from 0 to 1, which stay.
        transform: for images: takes `image=` (H, W, C) uint8 and returns `{"image": ...}`, uint8, such as
            albumentations' Compose, in the place of the augmentation below. Called twice for each image, which it gets
            from `data` as it is there: an `ImageFolder` gives whole files.
        crop_scale: the least and the greatest share of the area that a crop has; see `BatchViews` for all of these.
        flip: mirror half of the views; false for digits and letters.
        color: strength of the colour jitter, in [0, 2.5].
        grayscale: the chance to lose the colours, in [0, 1].
        blur: the chance to be blurred, in [0, 1]; for images of 64 pixels and more.
        word_deletion: for texts: the chance of each token to be left out, in [0, 1).
        swap_distance: for texts: tokens change place by so many at most, >= 0. With both 0 the two views are the same,
            and the encoder's dropout makes the difference.
        use_labels: pass the labels on.
        batch_size: samples a batch and process, >= 2: the others are the negatives.
        val_fraction: the share that is held out for validation of a map-style data set, in (0, 1); a DataModule has
            its own.
        seed: of the views, the order and that split.
        num_workers: processes that load; 0 is the fastest for images in memory.
        drop_last: leave out the last training batch when it isn't full, as it has fewer negatives.
        pin_memory: load into page-locked memory, which a copy to a GPU needs to run beside the training.

    Raises:
        ConfigError: an argument out of its range, or data that mixes its images.
        DataError: from `setup()` or a loader: too few samples, or images of another form.

    Example:
        >>> from ds_lightning.datamodules import MNIST5k
        >>> data = ContrastiveViews(MNIST5k(), batch_size=8, flip=False)
        >>> data.setup()
        >>> batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
        >>> batch["second"]["image"].shape
        torch.Size([8, 1, 28, 28])
    """

    def __init__(
        self,
        data: ImageData | TextFiles | Dataset[Any],
        transform: Transform | None = None,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        flip: bool = True,
        color: float = 0.5,
        grayscale: float = 0.2,
        blur: float = 0.0,
        word_deletion: float = 0.1,
        swap_distance: int = 3,
        use_labels: bool = False,
        batch_size: int = 256,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = True,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 2), ("num_workers", num_workers, 0)):
            if value < least:
                raise ConfigError(f"{name} is {value}; expected an integer >= {least}")
        if not 0 < val_fraction < 1:
            raise ConfigError(f"val_fraction is {val_fraction}; expected a number in (0, 1)")
        check_source(data, transform)
        self.views = BatchViews(crop_scale, flip=flip, color=color, grayscale=grayscale, blur=blur)
        self.token_views = TokenViews(word_deletion, swap_distance)
        # Callables and DataModules would make the checkpoint need pickle.
        self.save_hyperparameters(ignore=["data", "transform"])
        self.data = data
        self.transform = transform
        self.use_labels = use_labels
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.num_workers = num_workers
        self.drop_last = drop_last
        self.pin_memory = pin_memory
        self._sources: ViewSources | None = None
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def sources(self) -> ViewSources:
        """The samples of each split, as they are and for views; there after `setup()`."""
        if self._sources is None:
            raise DataError(_NO_DATA)
        return self._sources

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, where `data` has them; there after `setup()`."""
        return self.sources.class_names

    @property
    def num_classes(self) -> int:
        """The number of classes, 0 without labels; there after `setup()`."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W) of images; there after `setup()`, and empty for texts."""
        return self.sources.input_shape

    @property
    def vocab_size(self) -> int:
        """The number of token ids that a model of texts needs."""
        if not isinstance(self.data, TextFiles):
            raise DataError(f"{type(self.data).__name__} has no texts, so no vocab_size")
        return self.data.vocab_size

    def dataset_info(self) -> dict[str, Any]:
        """Return `name`, `source`, `digest` and the sizes of the `splits`, for the tracking of a run."""
        name = type(self.data).__name__
        info: dict[str, Any] = {"name": name, "source": name, "digest": ""}
        if isinstance(self.data, (ImageData, TextFiles)):
            info = self.data.dataset_info()
        sizes = {split: len(self.sources.plain.get(split, ())) for split in ("train", "val", "test")}
        settings = (info["digest"], sizes, self.val_fraction, self.seed)
        return {
            "name": f"ContrastiveViews-{info['name']}",
            "source": info["source"],
            "digest": hashlib.sha256(repr(settings).encode()).hexdigest()[:16],
            "splits": sizes,
        }

    def prepare_data(self) -> None:
        """Let the DataModule fetch what it needs."""
        if isinstance(self.data, L.LightningDataModule):
            self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Read the data."""
        if isinstance(self.data, L.LightningDataModule):
            self.data.trainer = self.trainer
            self.data.setup(stage)
        if self._sources is not None:
            return
        jitter = self.views.color > 0 or self.views.grayscale > 0
        self._sources = view_sources(self.data, self.transform, self.seed, self.val_fraction, any_range=not jitter)
        if self._sources.modality == "image" and self.transform is None and self.views.changes_nothing:
            warnings.warn(
                "crop_scale, flip, color, grayscale and blur are all off: the two views of an image are the same; turn "
                "one on, unless the encoder's dropout is to make the difference",
                NoEffectWarning,
                stacklevel=2,
            )

    def teardown(self, stage: str) -> None:
        """Let the DataModule leave the trainer as it was."""
        if isinstance(self.data, L.LightningDataModule):
            self.data.teardown(stage)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of `data`, such as the vocabulary of texts; the views need none."""
        return {"data": self.data.state_dict() if isinstance(self.data, L.LightningDataModule) else {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        if isinstance(self.data, L.LightningDataModule):
            self.data.load_state_dict(state_dict["data"])

    def train_dataloader(self) -> DataLoader[Any]:
        """The shuffled training samples; each process of a distributed run gets its share."""
        data = self._views("train")
        sampler = training_order(data, self.trainer, self.seed, data.epoch)
        if self.drop_last and sampler.num_samples < self.batch_size:
            raise DataError(
                f"a process has {sampler.num_samples} training samples, too few for one batch of batch_size "
                f"{self.batch_size}; make it smaller, or set drop_last to false"
            )
        return self._loader(data, sampler=sampler, drop_last=self.drop_last)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation samples, in order, with the same views in each epoch."""
        return self._loader(self._views("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        """The test samples, in order, with the same views each time."""
        return self._loader(self._views("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test samples as they are, in order."""
        return self._loader(self._plain("test"))

    def labelled_loaders(self, split: str = "val") -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Return loaders of the training samples and of those of `split`, as they are, in order, with labels.

        Their batches are `{"image" or "text", "label", "index"}`; `plain` makes them ready for a model.

        Args:
            split: val or test: what a probe is scored on.

        Raises:
            DataError: the data have no labels.
        """
        loaders = []
        for name in ("train", split):
            data = NumberedSamples(self._plain(name).data, use_labels=True)
            if "label" not in data.__getitems__([0]):
                raise DataError(f"{type(self.data).__name__} gives no labels; expected labelled data for a probe")
            loaders.append(self._loader(data))
        return loaders[0], loaders[1]

    def plain(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch of `labelled_loaders` or `predict`, on any device, with its images normalised there."""
        return {**batch, "image": self._normalize(batch["image"])} if "image" in batch else dict(batch)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Make the views of images and normalise them, on the batch's device."""
        batch = dict(batch)
        if "seed" in batch:
            # A Python number: nothing waits for the device, and no precision touches it on the way.
            views = self.views.pair(batch.pop("image"), batch.pop("seed"))
            batch["first"], batch["second"] = ({"image": self._normalize(view)} for view in views)
        elif "first" in batch:
            batch["first"], batch["second"] = (self.plain(batch[name]) for name in ("first", "second"))
        else:
            return self.plain(batch)
        # Two views first, then what belongs to both.
        return {"first": batch.pop("first"), "second": batch.pop("second"), **batch}

    def _normalize(self, image: Tensor) -> Tensor:
        if image.device not in self._tables:
            scale, shift = self.sources.normalization
            self._tables[image.device] = ((255 * scale).to(image.device), shift.to(image.device))
        scale, shift = self._tables[image.device]
        image = as_unit(image) * scale + shift
        # Lightning converts a batch to the run's precision before it is here, while it is uint8.
        return image if self.trainer is None else self.trainer.precision_plugin.convert_input(image)

    def _views(self, split: str) -> ViewSamples:
        self._check(split)
        return self.sources.samples(split, self.token_views, self.use_labels, self.seed)

    def _plain(self, split: str) -> NumberedSamples:
        self._check(split)
        return NumberedSamples(self.sources.plain[split], self.use_labels)

    def _check(self, split: str) -> None:
        if split not in self.sources.plain:
            has = ", ".join(self.sources.plain)
            raise DataError(f"{type(self.data).__name__} has no samples for {split!r}; it has {has}")

    def _loader(self, data: NumberedSamples, **options: Any) -> DataLoader[Any]:
        return batch_loader(
            data,
            self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            **options,
        )
