"""Fashion-MNIST and CIFAR-10, read by torchvision."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_lightning.errors import DataError

from .in_memory import InMemoryImageData
from .transforms import Transform


class TorchvisionImageData(InMemoryImageData):
    """Base of the sets that torchvision downloads and reads; see `InMemoryImageData` for the other arguments.

    Args:
        data_dir: the folder that holds the set's own folder.
        download: fetch the set in `prepare_data()` when it isn't there.
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
            returns `{"image": ...}`, uint8, such as albumentations' Compose.
        drop_last: leave out the last training batch when it isn't full.
        pin_memory: load into page-locked memory, which a copy to a GPU needs to run beside the training.

    Raises:
        ConfigError: an argument out of its range.
        DataError: from `prepare_data()` or `setup()`, when the files are not there or damaged.
    """

    folder: str
    files: Sequence[str]

    def __init__(
        self,
        data_dir: str = "data",
        download: bool = True,
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
            crop_padding=crop_padding,
            horizontal_flip=horizontal_flip,
            transform=transform,
            drop_last=drop_last,
            pin_memory=pin_memory,
        )
        self.data_dir = data_dir
        self.download = download

    @abstractmethod
    def read(self, train: bool, download: bool) -> tuple[Tensor, Tensor]:
        """Read the training or test images (N, C, H, W) uint8 and labels (N,) int64 through torchvision."""

    def prepare_data(self) -> None:
        """Download the set when it isn't there; Lightning calls this on one process a node."""
        if self.download and not all((self._root / file).is_file() for file in self.files):
            try:
                self.read(train=True, download=True)
            # torchvision raises RuntimeError; urllib and the archive's reader raise children of OSError.
            except (RuntimeError, OSError, EOFError) as error:
                raise DataError(self._absent(f"could not be downloaded ({_first_line(error)})")) from error

    def load(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Read both parts."""
        missing = [file for file in self.files if not (self._root / file).is_file()]
        if missing:
            raise DataError(self._absent(f"lacks {', '.join(missing)}"))
        try:
            return self.read(train=True, download=False), self.read(train=False, download=False)
        except (RuntimeError, OSError, EOFError, ValueError, AssertionError) as error:
            raise DataError(self._absent(f"is damaged ({_first_line(error)})")) from error

    @property
    def _root(self) -> Path:
        return Path(self.data_dir) / self.folder

    def _absent(self, what: str) -> str:
        return (
            f"{type(self).__name__} in {self._root} {what}; expected the files {', '.join(self.files)} there: "
            "copy them from a machine that has them, run once with network and download=true, or set data_dir"
        )


class FashionMNIST(TorchvisionImageData):
    """Fashion-MNIST (arXiv 1708.07747): 60,000 + 10,000 grey images of clothes, 28 x 28, 10 classes.

    The arguments are those of `TorchvisionImageData`; the batches are described at `ImageData`.

    Example:
        >>> data = FashionMNIST(data_dir="data", horizontal_flip=True)
        >>> data.num_classes
        10
    """

    source = "torchvision.datasets.FashionMNIST"
    folder = "FashionMNIST/raw"
    files = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )
    class_names = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    mean = (0.2860,)
    std = (0.3530,)

    def read(self, train: bool, download: bool) -> tuple[Tensor, Tensor]:
        """Read one part."""
        from torchvision.datasets import FashionMNIST as Source

        data: Any = Source(self.data_dir, train=train, download=download)
        return data.data.unsqueeze(1), data.targets.to(torch.int64)


class CIFAR10(TorchvisionImageData):
    """CIFAR-10: 50,000 + 10,000 colour images, 32 x 32, 10 classes.

    The arguments are those of `TorchvisionImageData`; the batches are described at `ImageData`.

    Example:
        >>> data = CIFAR10(data_dir="data", crop_padding=4, horizontal_flip=True, cutmix_alpha=1.0)
        >>> data.class_names[0]
        'airplane'
    """

    source = "torchvision.datasets.CIFAR10"
    folder = "cifar-10-batches-py"
    files = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")
    class_names = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)

    def read(self, train: bool, download: bool) -> tuple[Tensor, Tensor]:
        """Read one part."""
        from torchvision.datasets import CIFAR10 as Source

        data: Any = Source(self.data_dir, train=train, download=download)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor(data.targets, dtype=torch.int64)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
