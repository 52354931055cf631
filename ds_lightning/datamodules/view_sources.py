"""What two views are made from: the splits of a DataModule of ours, or of a map-style data set."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_lightning.errors import ConfigError, DataError, NoEffectWarning
from ds_lightning.functional.seeds import derived_seed

from .episode_samples import EpisodeTransform
from .image_data import ImageData
from .text_files import TextFiles
from .text_views import TokenViews
from .transforms import SeededTransform, Transform
from .view_samples import BatchSource, MapImages, TextPairs, TransformedViews, ViewSamples, with_transform


@dataclass
class ViewSources:
    """The samples of each split: `plain` as they are, `transformed` with the user's transform where there is one.

    `normalization` is a factor and a summand for uint8 images, (C, 1, 1).
    """

    modality: str
    plain: dict[str, BatchSource]
    transformed: dict[str, BatchSource] = field(default_factory=dict)
    transform: EpisodeTransform | None = None
    class_names: list[str] = field(default_factory=list)
    input_shape: tuple[int, ...] = ()
    normalization: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.tensor(1 / 255), torch.tensor(0.0)))

    def samples(self, split: str, token_views: TokenViews, use_labels: bool, seed: int) -> ViewSamples:
        """Return the data set of views of a split."""
        if self.modality == "text":
            return TextPairs(self.plain[split], token_views, use_labels, seed, split)
        if self.transform is not None:
            return TransformedViews(self.transformed[split], self.transform, use_labels, seed, split)
        return ViewSamples(self.plain[split], use_labels, seed, split)


def check_source(data: Any, transform: Transform | None) -> None:
    """Refuse what views can't be made from.

    Raises:
        ConfigError: neither a DataModule of ours nor a data set with a length, or a DataModule that mixes images.
    """
    if isinstance(data, ImageData):
        if data.mixer is not None:
            raise ConfigError(
                "data mixes its images (mixup_alpha, cutmix_alpha); expected both 0: two views show the same image"
            )
    elif isinstance(data, TextFiles):
        if transform is not None:
            raise ConfigError("transform is for images; for texts set word_deletion and swap_distance")
    elif not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise ConfigError(
            f"data is a {type(data).__name__}; expected an image DataModule such as MNIST5k, TextFiles, or a data set "
            "of images with a length"
        )


def view_sources(
    data: Any, transform: Transform | None, seed: int, val_fraction: float, any_range: bool = False
) -> ViewSources:
    """Return the samples of a DataModule, after its setup, or of a data set.

    Args:
        data: the source.
        transform: runs on single images to make a view of them.
        seed: the user's seed, for the transform and the split of a data set.
        val_fraction: the share of a data set that is held out.
        any_range: accept floats outside of 0 to 1.

    Raises:
        ConfigError: a split would be empty.
        DataError: images of another form.
    """
    if isinstance(data, TextFiles):
        plain: dict[str, BatchSource] = dict(data.splits)
        return ViewSources("text", plain, class_names=list(data.class_names))
    seeded = None if transform is None else EpisodeTransform(SeededTransform(transform, seed))
    if isinstance(data, ImageData):
        return _of_module(data, seeded)
    return _of_set(data, seeded, seed, val_fraction, any_range)


def _of_module(data: ImageData, transform: EpisodeTransform | None) -> ViewSources:
    if data.augment is not None or getattr(data, "transform", None) is not None:
        warnings.warn(
            f"the transform, crop_padding and horizontal_flip of {type(data).__name__} are not used; set the views' "
            "own transform, crop_scale and flip",
            NoEffectWarning,
            stacklevel=3,
        )
    parts = {split: part for split, part in data.splits._asdict().items() if part is not None}
    look = data.splits.val.transform
    return ViewSources(
        "image",
        {split: with_transform(part, look) for split, part in parts.items()},
        {} if transform is None else {split: with_transform(part, transform) for split, part in parts.items()},
        transform,
        list(data.class_names),
        data.input_shape,
        data.scale_and_shift(),
    )


def _of_set(
    data: Any, transform: EpisodeTransform | None, seed: int, val_fraction: float, any_range: bool
) -> ViewSources:
    held = round(val_fraction * len(data))
    if not 0 < held < len(data):
        raise ConfigError(
            f"val_fraction is {val_fraction}, which leaves {held} of {len(data)} samples for validation; choose one "
            "that leaves some for both validation and training"
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(derived_seed(seed, "split")))
    rows = {"train": order[held:], "val": order[:held]}
    plain = {split: MapImages(data, row, any_range=any_range or transform is not None) for split, row in rows.items()}
    first = plain["train"].__getitems__([0])
    if transform is not None and first["image"].dtype != torch.uint8:
        raise DataError(
            f"the data set gives images of {first['image'].dtype}; expected uint8, which transform is made for"
        )
    names = getattr(data, "classes", None) or getattr(data, "class_names", None) or []
    return ViewSources(
        "image",
        dict(plain),
        {} if transform is None else {split: MapImages(data, row, transform) for split, row in rows.items()},
        transform,
        list(map(str, names)),
        tuple(first["image"].shape[1:]),
    )
