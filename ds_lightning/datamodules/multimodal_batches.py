"""From decoded samples of any lengths to padded batches that say what is real and what is there."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ds_lightning.functional.seeds import derived_seed

from .manifest_columns import AudioColumn, ImageColumn, TableColumn, TextColumn
from .manifest_schema import Schema
from .manifest_statistics import Statistics
from .manifest_store import ManifestStore
from .transforms import Transform, apply_transform, seed_transform

Batch = dict[str, Tensor]
Sample = dict[str, Tensor]
Augment = Callable[[Tensor], Tensor]


def collate(samples: Sequence[Mapping[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]) -> Batch:
    """Put samples into one batch.

    Args:
        samples: each has some of the modalities of `shapes`: image (C, H, W), text (L,), audio (mels, T), series
            (channels, T), table (F,).
        shapes: the modalities in their order, with the shape of a sample; the lengths of text, audio and series play
            no part.

    Returns:
        Each modality padded at the end with 0 to the longest of the batch, all 0 where a sample hasn't got it;
        `audio_mask` and `series_mask` (B, T) bool, true for real frames; `present` (B, modalities) bool.

    Example:
        >>> batch = collate([{"text": torch.tensor([3, 4])}, {}], {"text": (8,)})
        >>> batch["text"].tolist(), batch["present"].tolist()
        ([[3, 4], [0, 0]], [[True], [False]])
    """
    batch: Batch = {}
    for name, shape in shapes.items():
        found = [sample.get(name) for sample in samples]
        there = [value for value in found if value is not None]
        dtype = there[0].dtype if there else {"image": torch.uint8, "text": torch.int64}.get(name, torch.float32)
        ragged = name in ("text", "audio", "series")
        if len(there) == len(found) and not (ragged and len({value.shape for value in there}) > 1):
            batch[name] = torch.stack(there)
        else:
            # One frame at least, or a network would get an empty tensor.
            longest = max([1, *(value.shape[-1] for value in there)]) if ragged else shape[-1]
            batch[name] = torch.zeros(len(samples), *shape[:-1], longest, dtype=dtype)
            for row, value in enumerate(found):
                if value is not None:
                    batch[name][row, ..., : value.shape[-1]] = value
        if name in ("audio", "series"):
            lengths = torch.tensor([0 if value is None else value.shape[-1] for value in found])
            batch[f"{name}_mask"] = torch.arange(batch[name].shape[-1]) < lengths[:, None]
    batch["present"] = torch.tensor([[name in sample for name in shapes] for sample in samples])
    return batch


def sample_shapes(schema: Schema, store: ManifestStore, statistics: Statistics) -> dict[str, tuple[int, ...]]:
    """Return the shape of a sample of each modality, with the longest audio and series and the most tokens."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in schema.modalities:
        column = schema.column_of(name)
        if isinstance(column, ImageColumn):
            shapes[name] = (column.channels, column.size, column.size)
        elif isinstance(column, TextColumn):
            shapes[name] = (column.max_length,)
        elif isinstance(column, TableColumn):
            shapes[name] = (len(schema.table_columns) + len(statistics.indicators),)
        else:
            rows = column.mels if isinstance(column, AudioColumn) else column.channels
            shapes[name] = (rows, max(1, int(store.lengths(name).max())))
    return shapes


class MultimodalSamples(Dataset[Any]):
    """Some samples of a manifest, a batch at a time: standardised, in training augmented, and padded.

    Args:
        fetch: gives the decoded sample of a row, with text as UTF-8 (bytes,) uint8.
        rows: which rows, (N,) int64.
        labels: (N,) int64, or (N, classes) float32; None without labels.
        shapes: as for `collate`.
        statistics: what standardises audio, series and tables.
        encode: turns a text into token ids; None where there are no texts.
        transform: for the images, in training.
        spec_augment: for a sample's log-mel, in training.
        seed: of the augmentation.
    """

    def __init__(
        self,
        fetch: Callable[[int], Sample],
        rows: Tensor,
        labels: Tensor | None,
        shapes: Mapping[str, tuple[int, ...]],
        statistics: Statistics,
        encode: Callable[[str], list[int]] | None = None,
        transform: Transform | None = None,
        spec_augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        self.fetch = fetch
        self.rows = rows
        self.labels = labels
        self.shapes = dict(shapes)
        self.statistics = statistics
        self.encode = encode
        self.transform = transform
        self.spec_augment = spec_augment
        self.seed = seed
        # Shared, so that workers that live through all epochs see the number change.
        self.epoch: Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: int | list[int]) -> Batch:
        """Return a batch of several samples; or one sample, as it is in a batch."""
        if isinstance(indices, int):
            return {name: value[0] for name, value in self.__getitems__([indices]).items()}
        return self.__getitems__(indices)

    def __getitems__(self, indices: list[int]) -> Batch:
        rows = self.rows[indices]
        samples = [self.fetch(row) for row in rows.tolist()]
        seed = derived_seed(self.seed, "augment", int(self.epoch), int(rows[0]))
        if self.transform is not None:
            seed_transform(self.transform, seed)
        # Also without workers the training's own random numbers stay as they would be.
        with torch.random.fork_rng(devices=(), enabled=self.spec_augment is not None):
            if self.spec_augment is not None:
                torch.manual_seed(seed)
            batch = collate([self._ready(sample) for sample in samples], self.shapes)
        if self.labels is not None:
            batch["label"] = self.labels[indices]
        return batch

    def _ready(self, sample: Sample) -> Sample:
        ready = dict(sample)
        for name in ("audio", "series", "table"):
            if name in ready:
                ready[name] = self.statistics.apply(name, ready[name])
        if self.encode is not None and "text" in ready:
            ready["text"] = torch.tensor(self.encode(as_text(ready["text"])))
        if self.transform is not None and "image" in ready:
            image = ready["image"]
            ready["image"] = apply_transform(self.transform, image.permute(1, 2, 0).contiguous().numpy())
        if self.spec_augment is not None and "audio" in ready:
            ready["audio"] = self.spec_augment(ready["audio"])
        return ready


def as_text(raw: Tensor) -> str:
    """Return the text of its UTF-8 bytes (bytes,) uint8."""
    return raw.numpy().tobytes().decode("utf-8", "surrogatepass")
