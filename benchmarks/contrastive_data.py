"""Real data for benchmarks/contrastive.py: read once into one file that every process maps, or into text files."""

import functools
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from continual_data import CIFARFile, read_jpegs
from torch import Tensor

from ds_lightning.datamodules import ContrastiveViews, FashionMNIST, InMemoryImageData, MNIST5k, TextFiles
from ds_lightning.datamodules.view_transforms import BatchViews
from ds_lightning.functional.seeds import derived_seed

IMAGES = ("mnist5k", "fashion", "cifar10")
TEXTS = ("sst2", "20newsgroups")
# Digits are no digits in the mirror; grey images have no colours to change.
VIEWS: dict[str, dict[str, Any]] = {
    "mnist5k": {"flip": False, "color": 0.4, "crop_scale": (0.4, 1.0)},
    "fashion": {"flip": True, "color": 0.4, "crop_scale": (0.3, 1.0)},
    "cifar10": {"flip": True, "color": 0.5, "grayscale": 0.2, "crop_scale": (0.2, 1.0)},
    "sst2": {"word_deletion": 0.5, "swap_distance": 0},
    "20newsgroups": {"word_deletion": 0.5, "swap_distance": 0},
}
MAX_LENGTH = {"sst2": 64, "20newsgroups": 256}


class Mapped(InMemoryImageData):
    """Images from a file of tensors, which all processes share."""

    source = "a file of tensors"
    path = ""

    def load(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return mapped(self.path)


@functools.lru_cache(maxsize=1)
def mapped(path: str) -> Any:
    found = torch.load(path, mmap=True, weights_only=True)
    return tuple(found["train"]), tuple(found["test"])


class MappedCIFAR(Mapped):
    class_names, mean, std = CIFARFile.class_names, CIFARFile.mean, CIFARFile.std


class MappedFashion(Mapped):
    class_names, mean, std = FashionMNIST.class_names, FashionMNIST.mean, FashionMNIST.std


class MappedMNIST(Mapped):
    class_names, mean, std = MNIST5k.class_names, MNIST5k.mean, MNIST5k.std


class ViewAugment:
    """A view of each training image, as the pre-training sees it: an augmentation for the supervised baselines."""

    def __init__(self, options: dict[str, Any], seed: int) -> None:
        self.views, self.seed, self.rank, self.batches = BatchViews(**options), seed, 0, 0

    def __call__(self, image: Tensor) -> Tensor:
        seed = derived_seed(self.seed, "supervised view", self.batches)
        self.batches += 1
        draw = self.views.draw(len(image), *image.shape[-2:], seed)
        return self.views.apply(image, draw).mul_(255)

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]


def prepare(name: str, data_dir: str, cache: Path) -> None:
    """Read a set into the cache.

    Args:
        name: of the set.
        data_dir: folder of cifar10_jpeg.npz, sst2_*.txt and 20newsgroups.npz, and of torchvision's FashionMNIST.
        cache: an existing folder.
    """
    folder = Path(data_dir)
    if name == "cifar10":
        images, labels, is_test = read_jpegs(str(folder / "cifar10_jpeg.npz"))
        parts = {"train": [images[~is_test], labels[~is_test]], "test": [images[is_test], labels[is_test]]}
    elif name in IMAGES:
        data = MNIST5k() if name == "mnist5k" else FashionMNIST(data_dir, download=False)
        data.prepare_data()
        parts = dict(zip(("train", "test"), map(list, data.load()), strict=True))
    elif name == "20newsgroups":
        write_newsgroups(folder / "20newsgroups.npz", cache)
        return
    else:
        for split in ("train", "dev", "test"):
            (cache / f"sst2_{split}.txt").write_text((folder / f"sst2_{split}.txt").read_text())
        return
    torch.save({split: [part.clone() for part in pair] for split, pair in parts.items()}, cache / f"{name}.pt")


def write_newsgroups(path: Path, cache: Path) -> None:
    import numpy as np

    with np.load(path, allow_pickle=False) as table:
        for split in ("train", "test"):
            texts = bytes(table[f"text_{split}"]).decode().split("\x00")
            with (cache / f"20newsgroups_{split}.jsonl").open("w") as file:
                for text, label in zip(texts, table[f"y_{split}"].tolist(), strict=True):
                    # A text of spaces alone has no token.
                    file.write(json.dumps({"text": text if text.strip() else "empty", "label": label}) + "\n")


def labelled(
    name: str,
    cache: Path,
    *,
    batch_size: int,
    seed: int,
    train_size: int | None = None,
    augment: str = "none",
    pin_memory: bool = False,
) -> pl.LightningDataModule:
    """Return a set with a tenth of its training samples for validation (SST-2 has its own).

    Args:
        name: of the set.
        cache: where `prepare` put it.
        batch_size: of training.
        seed: of the split and the order.
        train_size: labels to train with.
        augment: of images: `none`, `crop_flip` or `views`.
        pin_memory: whether the batches go to a GPU.
    """
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "train_size": train_size,
        "pin_memory": pin_memory,
    }
    if name in TEXTS:
        end = ".txt" if name == "sst2" else ".jsonl"
        paths = {split: str(cache / f"{name}_{split}{end}") for split in ("train", "test")}
        if name == "sst2":
            paths["val"] = str(cache / "sst2_dev.txt")
        return TextFiles(**paths, max_length=MAX_LENGTH[name], **options)
    kind = {"mnist5k": MappedMNIST, "fashion": MappedFashion, "cifar10": MappedCIFAR}[name]
    crop = augment == "crop_flip"
    # Four of 32 pixels are usual.
    data = kind(crop_padding=4 if crop else 0, horizontal_flip=crop and name != "mnist5k", **options)
    data.path = str(cache / f"{name}.pt")
    if augment == "views":
        data.augment = ViewAugment(VIEWS[name], seed)
    return data


class ViewsToTest(ContrastiveViews):
    """Lets a probe be scored on the test samples, once, after the training."""

    def labelled_loaders(self, split: str = "test") -> Any:
        return super().labelled_loaders(split)


def views(name: str, cache: Path, *, batch_size: int, seed: int, options: dict[str, Any]) -> ContrastiveViews:
    """Return two views of all training samples."""
    data = labelled(name, cache, batch_size=batch_size, seed=seed)
    return ViewsToTest(data, batch_size=batch_size, seed=seed, **{**VIEWS[name], **options})
