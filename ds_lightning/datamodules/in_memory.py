"""Image sets that fit in memory: uint8 tensors, a whole batch in one gather."""

import hashlib
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ds_lightning.errors import ConfigError, DataError

from .augment import RandomCropFlip
from .image_data import Batch, ImageData, Splits
from .transforms import SeededTransform, Transform


class ImageTensors(Dataset[Any]):
    """A choice of images from a tensor, given a batch at a time.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        chosen: which of them, (M,) int64; None is all.
        transform: runs on each image.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        chosen: Tensor | None = None,
        transform: SeededTransform | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.chosen = torch.arange(len(images)) if chosen is None else chosen
        self.transform = transform

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Batch:
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        rows = self.chosen[indices]
        images = self.images.index_select(0, rows)
        if self.transform is not None:
            self.transform.begin(indices[0])
            done = [self.transform(image.permute(1, 2, 0).contiguous().numpy()) for image in images]
            shapes = {tuple(image.shape) for image in done}
            if len(shapes) > 1:
                raise DataError(f"transform returned images of the shapes {sorted(shapes)}; expected one shape")
            images = torch.stack(done)
        return {"image": images, "label": self.labels.index_select(0, rows)}


class InMemoryImageData(ImageData):
    """A DataModule for images that fit in memory; a child gives `class_names`, `mean`, `std` and `load()`.

    See `ImageData` for the batches, the mixing and the state; docs/data.md shows a set of your own.

    Args:
        batch_size: samples a batch and process, >= 1.
        num_workers: processes that load; 0 is the fastest unless there is a slow `transform`.
        val_fraction: the share of the training images that is held out for validation, in (0, 1), by class.
        train_size: train on so many images only, each class in its share; None takes all.
        seed: of the split, the order, the augmentation and the mixing.
        mixup_alpha: MixUp's Beta(alpha, alpha); 0 is off.
        cutmix_alpha: CutMix's Beta(alpha, alpha); 0 is off. With both on, a fair coin decides a batch.
        mix_probability: the chance of each sample to be mixed, in [0, 1].
        crop_padding: pad by so many pixels and crop at random, on the device, in training; 0 is off.
        horizontal_flip: mirror half of the images, on the device, in training.
        transform: runs on each training image on the CPU: a callable that takes `image=` (H, W, C) uint8 and
            returns `{"image": ...}`, uint8, such as albumentations' Compose. Far slower than the two above.
        drop_last: leave out the last training batch when it isn't full.
        pin_memory: load into page-locked memory, which a copy to a GPU needs to run beside the training.

    Raises:
        ConfigError: an argument out of its range.
    """

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
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        transform: Transform | None = None,
        drop_last: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            val_fraction=val_fraction,
            train_size=train_size,
            seed=seed,
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            mix_probability=mix_probability,
            drop_last=drop_last,
            pin_memory=pin_memory,
        )
        if crop_padding < 0:
            raise ConfigError(f"crop_padding is {crop_padding}; expected a number of pixels >= 0")
        if crop_padding > 0 or horizontal_flip:
            self.augment = RandomCropFlip(crop_padding, horizontal_flip, seed)
        self.transform = transform
        self._content: tuple[Tensor, ...] = ()

    @abstractmethod
    def load(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return the images (N, C, H, W) uint8 and labels (N,) int64 for training, and those for testing."""

    def load_splits(self) -> Splits:
        """Check what `load()` gave, and split it."""
        (images, labels), (test_images, test_labels) = self.load()
        for split, x, y in (("training", images, labels), ("test", test_images, test_labels)):
            self._check(split, x, y)
        absent = torch.bincount(labels, minlength=self.num_classes) == 0
        if absent.any():
            name = self.class_names[int(absent.nonzero()[0])]
            raise DataError(f"class {name!r} has no training image; expected at least one of each class")
        if test_images.shape[1:] != images.shape[1:]:
            raise DataError(
                f"the test images are {tuple(test_images.shape[1:])}, the training images "
                f"{tuple(images.shape[1:])}; expected the same size"
            )
        channels, height, width = images.shape[1:]
        self.input_shape = (channels, height, width)
        self._content = (images, labels, test_images, test_labels)
        train, val = self.split(labels)
        transform = None if self.transform is None else SeededTransform(self.transform, self.seed)
        return Splits(
            train=ImageTensors(images, labels, train, transform),
            val=ImageTensors(images, labels, val),
            test=ImageTensors(test_images, test_labels),
        )

    def digest(self) -> str:
        """Return the SHA-256 of all images and labels, its first 16 digits."""
        total = hashlib.sha256()
        for tensor in self._content:
            total.update(str(tuple(tensor.shape)).encode())
            total.update(tensor.contiguous().numpy().data)
        return total.hexdigest()[:16]

    def _check(self, split: str, images: Tensor, labels: Tensor) -> None:
        if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0:
            raise DataError(
                f"load() gave {split} images of shape {tuple(images.shape)}, {images.dtype}; "
                "expected (N, C, H, W), uint8, N >= 1"
            )
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise DataError(
                f"load() gave {split} labels of shape {tuple(labels.shape)}, {labels.dtype}; "
                f"expected ({len(images)},), int64"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
            raise DataError(
                f"load() gave {split} labels from {int(labels.min())} to {int(labels.max())}; expected 0 to "
                f"{self.num_classes - 1}, one for each of class_names"
            )
