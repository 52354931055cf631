"""Image files: finding them, opening any kind as RGB, and a data set that names the file that is broken."""

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ds_lightning.errors import DataError

from .image_data import Batch
from .transforms import SeededTransform

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))


class BrokenImageError(DataError):
    """An image that can't be read; its text is one line, also when it comes out of a worker process."""

    def __init__(self, message: str) -> None:
        # DataLoader raises a worker's error anew with the worker's traceback as its text, our line last.
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.BrokenImageError: "))


def find_classes(folder: Path) -> dict[str, list[Path]]:
    """Find the images of each class: the sub-folders of `folder`, and what is in them at any depth.

    Args:
        folder: has one sub-folder for each class. Names that start with a dot are left out.

    Returns:
        Class name -> sorted files, sorted by class name.

    Raises:
        DataError: no such folder, no class folder, or one without images.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected a folder with one sub-folder of images a class")
    classes: dict[str, list[Path]] = {}
    for child in sorted(folder.iterdir()):
        if not child.is_dir() or child.name.startswith("."):
            continue
        files = [Path(path, name) for path, _, names in os.walk(child, followlinks=True) for name in names]
        images = sorted(f for f in files if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
        if not images:
            raise DataError(
                f"class folder {child} has no images; expected files that end in "
                f"{', '.join(sorted(SUFFIXES))}: add some or remove the folder"
            )
        classes[child.name] = images
    if not classes:
        raise DataError(f"{folder} has no class folders; expected one sub-folder of images for each class")
    return classes


def open_image(path: Path) -> NDArray[np.uint8]:
    """Read an image of any mode (grey, palette, RGBA, CMYK, 16 bits) as RGB, turned as its EXIF data say.

    Args:
        path: of the file.

    Returns:
        (H, W, 3) uint8.

    Raises:
        BrokenImageError: names the file.
    """
    try:
        # Opening a pipe would wait for its writer for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is no regular file")
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers of unknown range")
            if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would clip at 255
                grey = np.asarray(image).astype(np.float64) / 257
                image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
            return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise BrokenImageError(f"image {path} can't be read ({reason}); replace the file or remove it") from error


class ImageFiles(Dataset[Any]):
    """Images that are read from files, a batch at a time.

    Args:
        files: their paths.
        labels: (N,) int64.
        transform: makes every image `size` x `size`.
        size: side in pixels.
    """

    def __init__(self, files: list[Path], labels: Tensor, transform: SeededTransform, size: int) -> None:
        # One tensor and one array of bytes: a list of a million objects is copied into each worker.
        self.files = np.array([os.fsencode(file) for file in files], dtype=np.bytes_)
        self.labels = labels
        self.transform: SeededTransform | None = transform
        self.size = size

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        assert self.transform is not None
        self.transform.begin(indices[0])
        images = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        for row, index in enumerate(indices):
            image = self.transform(open_image(Path(os.fsdecode(self.files[index]))))
            if image.shape != images.shape[1:]:
                raise DataError(
                    f"transform returned an image of shape {tuple(image.shape)}; expected "
                    f"{tuple(images.shape[1:])}: end it with a crop or resize to image_size"
                )
            images[row] = image
        return {"image": images, "label": self.labels[indices]}
