"""All labelled images of a source, whatever its own splits are, to be gathered by number."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ds_lightning.errors import ConfigError, DataError, NoEffectWarning

from .image_data import ImageData, ImageDataset
from .image_files import ImageFiles
from .in_memory import ImageTensors
from .task_samples import labels_of
from .transforms import SeededTransform, seed_transform


class EpisodeSource(Protocol):
    """The images that episodes are made from.

    `labels` is the class of each image, (N,) int64. `units` says which images show the same thing, (N,) int64, or is
    None when all differ. `normalization` is a factor and a summand for uint8 images, (C, 1, 1).
    """

    labels: Tensor
    units: Tensor | None
    class_names: list[str]
    input_shape: tuple[int, int, int]
    normalization: tuple[Tensor, Tensor]

    def load(self, rows: Tensor, seed: int | None) -> Tensor:
        """Return the images `rows`, (B,) int64, as (B, C, H, W); a seed asks for the training transform."""


class EpisodeTransform(SeededTransform):
    """A training transform that is seeded by the episodes it works for."""

    def __init__(self, transform: SeededTransform) -> None:
        super().__init__(transform.transform, transform.seed)
        self.episode_seed = 0

    def begin(self, first_index: int) -> None:
        """Seed the images of some episodes."""
        seed_transform(self.transform, self.episode_seed)


class ModuleImages:
    """The images of all splits of an image DataModule, in an order that does not depend on how it splits them.

    Sets in memory become one tensor. A data set of the DataModule may have `units`, a number for each image: images
    of one number never meet in an episode.

    Args:
        data: after its setup.
        augment: have the training transform ready.
    """

    def __init__(self, data: ImageData, augment: bool) -> None:
        self.class_names = list(data.class_names)
        self.input_shape = data.input_shape
        self.normalization = data.scale_and_shift()
        found = [part for part in data.splits if part is not None]
        places = [(*_key(part, found, i), number, i) for number, part in enumerate(found) for i in range(len(part))]
        places.sort()
        self._part = torch.tensor([place[-2] for place in places])
        self._index = torch.tensor([place[-1] for place in places])
        order = torch.tensor([len(part) for part in found]).cumsum(0)[self._part] + self._index
        order -= torch.tensor([len(part) for part in found])[self._part]
        self.labels = torch.cat([labels_of(part) for part in found])[order]
        units = [_units(part) for part in found]
        self.units = None if any(unit is None for unit in units) else torch.cat(units)[order]  # type: ignore[arg-type]

        look = data.splits.val.transform
        self._parts = [_with(part, look) for part in found]
        fit = data.splits.train.transform
        self._fit = EpisodeTransform(fit) if augment and fit is not None else None
        self._fit_parts = [_with(part, self._fit) for part in found]
        self._images, self._rows = _one_tensor(found, self._part, self._index) if look is None else (None, self._index)

    def load(self, rows: Tensor, seed: int | None) -> Tensor:
        """Return the images `rows`."""
        parts = self._parts
        if seed is not None and self._fit is not None:
            self._fit.episode_seed, parts = seed, self._fit_parts
        elif self._images is not None:
            return self._images.index_select(0, self._rows[rows])
        owner, index = self._part[rows], self._index[rows]
        images: Tensor | None = None
        for number, part in enumerate(parts):
            here = (owner == number).nonzero()[:, 0]
            if len(here) == 0:
                continue
            loaded = part.__getitems__(index[here].tolist())["image"]
            if images is None:
                images = loaded.new_empty((len(rows), *loaded.shape[1:]))
            images[here] = loaded
        assert images is not None
        return images


class DatasetImages:
    """The images of any map-style data set that gives pairs (image, label), or dictionaries with these.

    Args:
        data: its images are (C, H, W) tensors of one shape: uint8, which become 0 to 1, or floats, which stay. The
            labels are taken from `targets` or `labels` where it has them, the names of the classes from `classes` or
            `class_names`; otherwise all samples are read once.

    Raises:
        DataError: another form, several labels an image, or labels without a class.
    """

    units: Tensor | None = None

    def __init__(self, data: Dataset[Any]) -> None:
        self._data: Any = data
        image, _ = self._sample(0)
        if image.ndim != 3:
            raise DataError(f"the data set gives images of shape {tuple(image.shape)}; expected (C, H, W)")
        channels, height, width = image.shape
        self.input_shape = (channels, height, width)
        self.normalization = (torch.full((channels, 1, 1), 1 / 255), torch.zeros(channels, 1, 1))
        self.labels = self._labels()
        names = getattr(data, "classes", None) or getattr(data, "class_names", None)
        self.class_names = list(map(str, names or range(int(self.labels.max()) + 1)))

    def load(self, rows: Tensor, seed: int | None) -> Tensor:
        """Return the images `rows`, one after the other."""
        images = [self._sample(row)[0] for row in rows.tolist()]
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise DataError(f"the data set gives images of the shapes {sorted(shapes)}; expected one shape")
        return torch.stack(images)

    def _labels(self) -> Tensor:
        for name in ("targets", "labels"):
            if (found := getattr(self._data, name, None)) is not None and len(found) == len(self._data):
                return torch.as_tensor(found)
        return torch.stack([torch.as_tensor(self._sample(row)[1]) for row in range(len(self._data))])

    def _sample(self, row: int) -> tuple[Tensor, Any]:
        sample = self._data[row]
        if not isinstance(sample, Mapping) and len(sample) >= 2:
            sample = {"image": sample[0], "label": sample[1]}
        if not isinstance(sample, Mapping) or "label" not in sample or not isinstance(sample.get("image"), Tensor):
            raise DataError(
                f"the data set gives a {type(self._data[row]).__name__}; expected pairs of an image (C, H, W), a "
                "tensor, and a label: use a transform that ends with torchvision's PILToTensor"
            )
        return sample["image"], sample["label"]


def check_data(data: Any) -> None:
    """Refuse what episodes can't be made from.

    Raises:
        ConfigError: no DataModule of ours nor a data set with a length, or a DataModule that mixes images.
    """
    if isinstance(data, ImageData):
        if data.mixer is not None:
            raise ConfigError(
                "data mixes its images (mixup_alpha, cutmix_alpha); expected both 0: an episode's images have one "
                "class each"
            )
    elif not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise ConfigError(
            f"data is a {type(data).__name__}; expected an image DataModule such as MNIST5k, or a data set of pairs "
            "(image, label) with a length"
        )


def episode_source(data: ImageData | Dataset[Any], augment: bool) -> EpisodeSource:
    """Return the images of a DataModule, after its setup, or of a data set.

    Args:
        data: the source.
        augment: whether the training transform is wanted; warns when there is nothing random in it.

    Raises:
        DataError: labels that are no class indices.
    """
    if augment and not (isinstance(data, ImageData) and (data.augment or data.splits.train.transform)):
        warnings.warn(
            f"augment is true and {type(data).__name__} has nothing random in training; set its transform, "
            "crop_padding or horizontal_flip, or leave augment off",
            NoEffectWarning,
            stacklevel=2,
        )
    source: EpisodeSource = ModuleImages(data, augment) if isinstance(data, ImageData) else DatasetImages(data)
    labels = source.labels
    if labels.ndim != 1 or labels.is_floating_point():
        raise DataError(
            f"the labels have the shape {tuple(labels.shape)} and type {labels.dtype}; expected one class index an "
            "image (N,): episodes need images of one class each"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= len(source.class_names):
        raise DataError(
            f"the labels go from {int(labels.min())} to {int(labels.max())}; expected 0 to "
            f"{len(source.class_names) - 1}, one for each of the classes"
        )
    source.labels = labels.to(torch.int64)
    return source


def _key(part: ImageDataset, parts: list[ImageDataset], index: int) -> tuple[Any, ...]:
    if isinstance(part, ImageFiles):
        return (0, bytes(part.files[index]))
    if isinstance(part, ImageTensors):
        first = next(n for n, other in enumerate(parts) if getattr(other, "images", None) is part.images)
        return (1, first, int(part.chosen[index]))
    return (2,)


def _units(part: ImageDataset) -> Tensor | None:
    units: Tensor | None = getattr(part, "units", None)
    if units is None or len(units) == len(part):
        return units
    chosen: Tensor | None = getattr(part, "chosen", None)
    if chosen is None:
        raise DataError(f"units has {len(units)} numbers; expected one for each of {len(part)} images")
    return units[chosen]


def _with(part: ImageDataset, transform: SeededTransform | None) -> ImageDataset:
    part = copy.copy(part)
    part.transform = transform
    return part


def _one_tensor(parts: list[ImageDataset], part: Tensor, index: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return all images in one tensor, and where each sample's is; None when they are not in memory."""
    tensors: list[Tensor] = []
    rows = torch.empty_like(index)
    for number, data in enumerate(parts):
        if not isinstance(data, ImageTensors):
            return None, index
        if not any(data.images is tensor for tensor in tensors):
            tensors.append(data.images)
        before = 0
        for tensor in tensors:
            if tensor is data.images:
                break
            before += len(tensor)
        mine = part == number
        rows[mine] = data.chosen[index[mine]] + before
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)), rows
