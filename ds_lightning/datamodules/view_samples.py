"""Data sets for two views: numbered samples, and what a view's random numbers follow from."""

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ds_lightning.errors import DataError
from ds_lightning.functional.seeds import derived_seed

from .episode_samples import EpisodeTransform
from .text_views import TokenViews


class BatchSource(Protocol):
    """A data set that gives a whole batch at once: `image` or `text`, and `label` where it has labels."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]: ...


class NumberedSamples(Dataset[Any]):
    """The samples of a source as they are, with `index` (B,) int64.

    Args:
        data: the source.
        use_labels: whether to pass `label` on.
    """

    def __init__(self, data: BatchSource, use_labels: bool) -> None:
        self.data = data
        self.use_labels = use_labels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise DataError("samples come in batches only; ask for a list of indices")

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return self._numbered(self.data.__getitems__(indices), indices)

    def _numbered(self, batch: Mapping[str, Any], indices: list[int]) -> dict[str, Any]:
        kept = {name: value for name, value in batch.items() if name != "label" or self.use_labels}
        return {**kept, "index": torch.tensor(indices)}


class ViewSamples(NumberedSamples):
    """Samples with the seed of their views, a Python number that follows from seed, split, epoch and first sample.

    So views need no saved state, are the same for any number of workers, and the same in each epoch where nothing
    tells `epoch`, as in validation. The views themselves are made on the device.

    Args:
        data: the source.
        use_labels: whether to pass `label` on.
        seed: the user's seed.
        split: what the samples are for.
    """

    def __init__(self, data: BatchSource, use_labels: bool, seed: int, split: str) -> None:
        super().__init__(data, use_labels)
        self.seed = seed
        self.split = split
        # Shared, so that workers that live through all epochs see the number change.
        self.epoch: Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return {**super().__getitems__(indices), "seed": self._seed(indices)}

    def _seed(self, indices: list[int]) -> int:
        return derived_seed(self.seed, "views", self.split, int(self.epoch), indices[0])


class TransformedViews(ViewSamples):
    """`first` and `second`, made by a callable on single images in the loading process.

    Args:
        data: a source whose `transform` is the callable; read twice for each batch.
        transform: that of `data`.
        use_labels: whether to pass `label` on.
        seed: the user's seed.
        split: what the samples are for.
    """

    def __init__(self, data: BatchSource, transform: EpisodeTransform, use_labels: bool, seed: int, split: str) -> None:
        super().__init__(data, use_labels, seed, split)
        self.transform = transform

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        seed = self._seed(indices)
        found: list[dict[str, Tensor]] = []
        for view in (0, 1):
            self.transform.episode_seed = derived_seed(seed, "view", view)
            found.append(self.data.__getitems__(indices))
        first, second = ({"image": batch.pop("image")} for batch in found)
        return {"first": first, "second": second, **self._numbered(found[0], indices)}


class TextPairs(ViewSamples):
    """`first` and `second`, two views of texts, made where the texts are loaded: each has a length of its own.

    Args:
        data: the texts.
        views: makes them.
        use_labels: whether to pass `label` on.
        seed: the user's seed.
        split: what the samples are for.
    """

    def __init__(self, data: BatchSource, views: TokenViews, use_labels: bool, seed: int, split: str) -> None:
        super().__init__(data, use_labels, seed, split)
        self.views = views

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        batch = self.data.__getitems__(indices)
        first, second = self.views.pair(batch.pop("text"), self._seed(indices))
        return {"first": {"text": first}, "second": {"text": second}, **self._numbered(batch, indices)}


class MapImages(Dataset[Any]):
    """Images of any map-style data set, with or without labels, a batch at a time.

    Args:
        data: gives images (C, H, W), pairs (image, label), or dictionaries with `image` and maybe `label`. Images are
            uint8, or floats from 0 to 1, all of one shape.
        rows: which of them, (M,) int64.
        transform: runs on each image, which is uint8 then.
        any_range: accept floats outside of 0 to 1.

    Raises:
        DataError: another form.
    """

    def __init__(
        self, data: Any, rows: Tensor, transform: EpisodeTransform | None = None, any_range: bool = False
    ) -> None:
        self.data = data
        self.rows = rows
        self.transform = transform
        self.any_range = any_range

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        samples = [self._sample(row) for row in self.rows[indices].tolist()]
        images = [image for image, _ in samples]
        if self.transform is not None:
            self.transform.begin(indices[0])
            images = [self.transform(image.permute(1, 2, 0).contiguous().numpy()) for image in images]
        shapes = sorted({tuple(image.shape) for image in images})
        if len(shapes) > 1 or len(shapes[0]) != 3:
            raise DataError(f"the data set gives images of the shapes {shapes}; expected one shape (C, H, W)")
        batch = {"image": torch.stack(images)}
        self._check_range(batch["image"])
        if all(label is not None for _, label in samples):
            batch["label"] = torch.stack([torch.as_tensor(label) for _, label in samples]).to(torch.int64)
        return batch

    def _check_range(self, image: Tensor) -> None:
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise DataError(f"the data set gives images of {image.dtype}; expected uint8, or floats from 0 to 1")
        if self.any_range or not image.is_floating_point():
            return
        least, most = float(image.min()), float(image.max())
        if not (least >= 0 and most <= 1):
            raise DataError(
                f"the data set gives images from {least:g} to {most:g}; expected uint8, or floats from 0 to 1 (or set "
                "color, grayscale to 0: crops, mirror images and blur take any range)"
            )

    def _sample(self, row: int) -> tuple[Tensor, Any]:
        sample = self.data[row]
        image, label = sample, None
        if isinstance(sample, Mapping):
            image, label = sample.get("image"), sample.get("label")
        elif isinstance(sample, (tuple, list)) and sample:
            image, label = sample[0], sample[1] if len(sample) > 1 else None
        if not isinstance(image, Tensor):
            raise DataError(
                f"the data set gives a {type(sample).__name__} with an image of {type(image).__name__}; expected an "
                "image (C, H, W), a tensor: use a transform that ends with torchvision's PILToTensor"
            )
        return image, label


def with_transform(data: Any, transform: Any) -> Any:
    """Return the data set with another transform on its images; the one given stays as it is."""
    data = copy.copy(data)
    data.transform = transform
    return data
