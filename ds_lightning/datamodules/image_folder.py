"""A DataModule for any folder of class folders."""

import hashlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ds_lightning.errors import ConfigError, DataError

from .image_data import ImageData, Splits
from .image_files import ImageFiles, find_classes
from .transforms import SeededTransform, Transform, evaluation_transform, training_transform


class ImageFolder(ImageData):
    """Images in one folder for each class, with or without `train/`, `val/` and `test/` above them.

    With `train/`, its images are for training; `val/` is for validation when it is there, otherwise
    `val_fraction` of the training images are. Without `train/`, `data_dir` itself holds the class folders.
    The test set is `test/`; without it `test` and `predict` raise. Grey, palette, RGBA and CMYK images become
    RGB, and are turned as their EXIF data say. A file that can't be read raises a `DataError` with its name,
    also from a worker process. See `ImageData` for the batches, the mixing and the state.

    Args:
        data_dir: the folder.
        image_size: side of the square images in pixels, >= 1.
        batch_size: samples a batch and process, >= 1.
        num_workers: processes that load.
        val_fraction: the share of the training images that is held out for validation, in (0, 1), by class;
            not used when there is a `val/`.
        train_size: train on so many images only, each class in its share; None takes all.
        seed: of the split, the order, the augmentation and the mixing.
        mixup_alpha: MixUp's Beta(alpha, alpha); 0 is off.
        cutmix_alpha: CutMix's Beta(alpha, alpha); 0 is off. With both on, a fair coin decides a batch.
        mix_probability: the chance of each sample to be mixed, in [0, 1].
        transform: for training: a callable that takes `image=` (H, W, 3) uint8 and returns `{"image": ...}`,
            uint8 with sides of `image_size`, such as albumentations' Compose. None is a random crop of 25% to
            100% of the area and a mirror image or not. Validation resizes and takes the centre.
        mean: of each channel, on the scale of 0 to 1; the default is ImageNet's.
        std: of each channel, on the scale of 0 to 1, > 0.
        drop_last: leave out the last training batch when it isn't full.
        pin_memory: load into page-locked memory, which a copy to a GPU needs to run beside the training.

    Raises:
        ConfigError: an argument out of its range.
        DataError: from `setup()`, when a folder is missing or has no images.

    Example:
        >>> data = ImageFolder("photos", image_size=64, val_fraction=0.2, mixup_alpha=0.2)
        >>> data.image_size
        64
    """

    def __init__(
        self,
        data_dir: str,
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        train_size: int | None = None,
        seed: int = 0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        mix_probability: float = 1.0,
        transform: Transform | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
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
        if image_size < 1:
            raise ConfigError(f"image_size is {image_size}; expected a number of pixels >= 1")
        if len(mean) != 3 or len(std) != 3 or not all(0 < value < math.inf for value in std):
            raise ConfigError(f"mean is {mean} and std {std}; expected three numbers each, std > 0")
        self.data_dir = data_dir
        self.image_size = image_size
        self.transform = transform
        self.mean = mean
        self.std = std
        self.source = str(data_dir)
        self._files: list[Path] = []

    def load_splits(self) -> Splits:
        """Find the files, split them, and make the data sets."""
        root = Path(self.data_dir)
        nested = (root / "train").is_dir()
        found = find_classes(root / "train" if nested else root)
        self.class_names = list(found)
        self.input_shape = (3, self.image_size, self.image_size)
        parts = {"train": self._label(found)}
        for name in ("val", "test"):
            if nested and (root / name).is_dir():
                parts[name] = self._label(find_classes(root / name), root / name)
        self._files = sorted(itertools.chain.from_iterable(files for files, _ in parts.values()))

        train_files, train_labels = parts["train"]
        train, val = self.split(train_labels, hold_out="val" not in parts)
        fit = SeededTransform(self.transform or training_transform(self.image_size), self.seed)
        look = SeededTransform(evaluation_transform(self.image_size), self.seed)

        def data(files: list[Path], labels: Tensor, transform: SeededTransform) -> ImageFiles:
            return ImageFiles(files, labels, transform, self.image_size)

        held: tuple[list[Path], Tensor] = ([train_files[i] for i in val.tolist()], train_labels[val])
        return Splits(
            train=data([train_files[i] for i in train.tolist()], train_labels[train], fit),
            val=data(*parts.get("val", held), look),
            test=data(*parts["test"], look) if "test" in parts else None,
        )

    def digest(self) -> str:
        """Return the SHA-256 of all relative paths and file sizes, its first 16 digits."""
        total = hashlib.sha256()
        for file in self._files:
            name = file.relative_to(self.data_dir).as_posix()
            total.update(f"{name}\0{file.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        return total.hexdigest()[:16]

    def _label(self, classes: dict[str, list[Path]], where: Path | None = None) -> tuple[list[Path], Tensor]:
        unknown = sorted(set(classes) - set(self.class_names))
        if unknown:
            raise DataError(
                f"{where} has the class folders {', '.join(unknown)}, which train/ lacks; expected only classes "
                f"of the training images: {', '.join(self.class_names)}"
            )
        numbers = {name: number for number, name in enumerate(self.class_names)}
        labels = [numbers[name] for name, files in classes.items() for _ in files]
        return list(itertools.chain.from_iterable(classes.values())), torch.tensor(labels, dtype=torch.int64)
