"""What a manifest's schema may say about a column, by its modality."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .schema_values import number, one_of, options, switch, whole


@dataclass(frozen=True)
class ImageColumn:
    """Paths of images: each is cut to a square about its centre and resized.

    Args:
        name: the column's.
        size: side in pixels, >= 1.
        channels: 1 (grey) or 3 (RGB).
        mean: taken off, on the scale of 0 to 1: one number, or one a channel.
        std: divided by, on the scale of 0 to 1, > 0: one number, or one a channel.
        augment: of training batches: `crop_padding` in pixels, >= 0, and `horizontal_flip`; None is off.
    """

    name: str
    size: int = 32
    channels: int = 3
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5
    augment: Mapping[str, Any] | None = None
    modality: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        where = f"schema column {self.name!r}"
        whole(self.size, f"{where}: size", 1, 16_384)
        one_of(self.channels, f"{where}: channels", (1, 3))
        for key, least in (("mean", 0.0), ("std", 1e-6)):
            given = getattr(self, key)
            numbers = given if isinstance(given, list | tuple) else [given] * self.channels
            for value in numbers:
                number(value, f"{where}: {key}", least, 1.0)
            whole(len(numbers), f"{where}: how many numbers {key} has", self.channels, self.channels)
            object.__setattr__(self, key, tuple(map(float, numbers)))
        if self.augment is not None:
            known = options(self.augment, f"{where}: augment", ("crop_padding", "horizontal_flip"))
            whole(known.get("crop_padding", 0), f"{where}: augment.crop_padding", 0, self.size)
            switch(known.get("horizontal_flip", False), f"{where}: augment.horizontal_flip")


@dataclass(frozen=True)
class TextColumn:
    """Texts, or paths of UTF-8 text files, as token ids.

    Args:
        name: the column's.
        max_length: tokens of a text that are kept, >= 1.
        tokenizer: `word`, `char`, or the folder of a Hugging Face tokenizer with its `tokenizer.json`.
        vocab_size: ids that may occur, with padding and unknown, >= 3; rarer words are unknown. Plays no part with a
            tokenizer from a folder.
        lower: ignore case. Plays no part with a tokenizer from a folder.
        file: the entries are paths of text files.
    """

    name: str
    max_length: int = 64
    tokenizer: str = "word"
    vocab_size: int = 20_000
    lower: bool = True
    file: bool = False
    modality: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        where = f"schema column {self.name!r}"
        whole(self.max_length, f"{where}: max_length", 1, 1_000_000)
        whole(self.vocab_size, f"{where}: vocab_size", 3, 100_000_000)
        switch(self.lower, f"{where}: lower")
        switch(self.file, f"{where}: file")
        if not isinstance(self.tokenizer, str) or self.tokenizer.strip() == "":
            one_of(self.tokenizer, f"{where}: tokenizer", ("word", "char", "the folder of a tokenizer"))


@dataclass(frozen=True)
class AudioColumn:
    """Paths of audio files (WAV, FLAC, OGG, MP3) as log-mel spectrograms of one channel.

    Args:
        name: the column's.
        sample_rate: in Hz, to which every file is resampled, 1,000 to 192,000.
        mels: bands, 1 to 512.
        max_seconds: what comes later in a file is cut off, > 0.
        window_ms: length of the Hann window in milliseconds, 1 to 1,000.
        hop_ms: time between frames in milliseconds, 1 to 1,000.
        spec_augment: of training batches (arXiv 1904.08779): `frequency`, the most bands that a mask covers; `time`,
            the most frames; `masks`, how many of each kind (1). None is off.
    """

    name: str
    sample_rate: int = 16_000
    mels: int = 40
    max_seconds: float = 10.0
    window_ms: float = 25.0
    hop_ms: float = 10.0
    spec_augment: Mapping[str, Any] | None = None
    modality: ClassVar[str] = "audio"

    def __post_init__(self) -> None:
        where = f"schema column {self.name!r}"
        whole(self.sample_rate, f"{where}: sample_rate", 1000, 192_000)
        whole(self.mels, f"{where}: mels", 1, 512)
        number(self.max_seconds, f"{where}: max_seconds", 0.001, 86_400.0)
        number(self.window_ms, f"{where}: window_ms", 1.0, 1000.0)
        number(self.hop_ms, f"{where}: hop_ms", 1.0, 1000.0)
        if self.spec_augment is not None:
            known = options(self.spec_augment, f"{where}: spec_augment", ("frequency", "time", "masks"))
            whole(known.get("frequency", 0), f"{where}: spec_augment.frequency", 0, self.mels)
            whole(known.get("time", 0), f"{where}: spec_augment.time", 0, 1_000_000)
            whole(known.get("masks", 1), f"{where}: spec_augment.masks", 1, 100)


@dataclass(frozen=True)
class SeriesColumn:
    """Series of numbers: paths of `.npy` or `.csv` files, or JSON lists in the manifest itself.

    Args:
        name: the column's.
        channels: of each series, >= 1.
        length: time steps that are kept, >= 1.
    """

    name: str
    channels: int = 1
    length: int = 1000
    modality: ClassVar[str] = "series"

    def __post_init__(self) -> None:
        where = f"schema column {self.name!r}"
        whole(self.channels, f"{where}: channels", 1, 1_000_000)
        whole(self.length, f"{where}: length", 1, 100_000_000)


@dataclass(frozen=True)
class TableColumn:
    """One number a row; all such columns make one tensor.

    Args:
        name: the column's.
    """

    name: str
    modality: ClassVar[str] = "table"


@dataclass(frozen=True)
class LabelColumn:
    """What is to be predicted.

    Args:
        column: its name.
        kind: `class` (one class a row) or `multilabel` (a list of any number of classes).
        separator: stands between the classes of an entry that is a text, in multi-label.
    """

    column: str
    kind: str = "class"
    separator: str = "|"

    def __post_init__(self) -> None:
        if not isinstance(self.column, str) or self.column == "":
            one_of(self.column, "schema label: column", ("the name of a column",))
        one_of(self.kind, "schema label: kind", ("class", "multilabel"))
        if not isinstance(self.separator, str) or self.separator == "":
            one_of(self.separator, "schema label: separator", ("a sign such as |",))


Column = ImageColumn | TextColumn | AudioColumn | SeriesColumn | TableColumn
KINDS: dict[str, type[Column]] = {
    kind.modality: kind for kind in (ImageColumn, TextColumn, AudioColumn, SeriesColumn, TableColumn)
}
