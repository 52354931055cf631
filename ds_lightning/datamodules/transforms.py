"""The one place that touches albumentations, which costs seconds to import and asks the network for updates."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ds_lightning.errors import DataError
from ds_lightning.functional.seeds import derived_seed

# At import it would wait up to 2 s for the package index. Set here, before a class path in a YAML imports it.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

Transform = Callable[..., Any]
"""Takes `image=` (H, W, C) uint8 and returns `{"image": ...}`, uint8: what albumentations' classes do."""


def training_transform(size: int) -> Transform:
    """Return a random crop of 25% to 100% of the area, resized to `size` x `size`, and a mirror image or not.

    Args:
        size: side of the result in pixels.
    """
    import albumentations as A

    crop = A.RandomResizedCrop(size=(size, size), scale=(0.25, 1.0), ratio=(3 / 4, 4 / 3))
    pipeline: Transform = A.Compose([crop, A.HorizontalFlip(p=0.5)])
    return pipeline


def evaluation_transform(size: int) -> Transform:
    """Return a resize of the shorter side to `size / 0.875` and the central `size` x `size`: nothing random.

    Args:
        size: side of the result in pixels.
    """
    import albumentations as A

    resize = A.SmallestMaxSize(max_size=round(size / 0.875))
    pipeline: Transform = A.Compose([resize, A.CenterCrop(height=size, width=size)])
    return pipeline


def seed_transform(transform: Transform, seed: int) -> None:
    """Seed a transform that has `set_random_seed`, as albumentations' have; others see to it themselves.

    Args:
        transform: the callable.
        seed: in [0, 2**31).
    """
    set_random_seed = getattr(transform, "set_random_seed", None)
    if set_random_seed is not None:
        set_random_seed(seed)


def apply_transform(transform: Transform, image: NDArray[np.uint8]) -> Tensor:
    """Run a transform on one image.

    Args:
        transform: the callable.
        image: (H, W, C) uint8.

    Returns:
        (C, H, W) uint8.

    Raises:
        DataError: when the result isn't an image of 8 bits.
    """
    result = transform(image=image)["image"]
    if isinstance(result, np.ndarray):
        result = torch.from_numpy(np.ascontiguousarray(np.atleast_3d(result).transpose(2, 0, 1)))
    if not isinstance(result, Tensor) or result.dtype != torch.uint8 or result.ndim != 3:
        kind = str(getattr(result, "dtype", type(result).__name__)).removeprefix("torch.")
        raise DataError(
            f"transform returned {kind}; expected a uint8 image: leave out Normalize and ToFloat, because the "
            "DataModule normalises the whole batch on its device"
        )
    return result


class SeededTransform:
    """A transform whose random numbers depend on the seed, the epoch and the batch, but not on the workers.

    Args:
        transform: the callable.
        seed: the user's seed.
    """

    def __init__(self, transform: Transform, seed: int) -> None:
        self.transform = transform
        self.seed = seed
        # Shared, so that workers that live through all epochs see the number change.
        self.epoch: Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def begin(self, first_index: int) -> None:
        """Seed the batch that starts with the sample `first_index`."""
        seed_transform(self.transform, derived_seed(self.seed, "transform", int(self.epoch), first_index))

    def __call__(self, image: NDArray[np.uint8]) -> Tensor:
        """Return the transformed image, (C, H, W) uint8, from (H, W, C) uint8."""
        return apply_transform(self.transform, image)
