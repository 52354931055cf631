"""The entries of a manifest's row as tensors; one that can't be used is an error that names the row and the column."""

import json
import math
import os
import stat
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ds_lightning.errors import ConfigError, DataError

from .audio_features import LogMel, check_soundfile, read_audio
from .image_files import open_image
from .manifest_columns import AudioColumn, Column, ImageColumn, LabelColumn, SeriesColumn, TableColumn, TextColumn
from .manifest_reading import LINE, Row
from .manifest_schema import Schema
from .series_values import read_series

Sample = dict[str, Tensor]
"""Modality -> tensor, without a batch axis; a modality that is absent has no key."""
_LARGEST_TEXT = 16 * 2**20


class Tokenizer(Protocol):
    """What turns a text into numbers > 0, as `Vocabulary` does."""

    def __len__(self) -> int:
        """The number of ids, with padding."""

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Return the numbers of the first `max_length` tokens, at least one."""


class BrokenEntryError(DataError):
    """An entry of a manifest that can't be used; its text is one line, also when it comes out of a worker process."""

    def __init__(self, message: str) -> None:
        # DataLoader raises a worker's error anew with the worker's traceback as its text, our line last.
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.BrokenEntryError: "))


class Decoder:
    """Turns rows of a manifest into samples, always the same one for the same row and files.

    A sample has, for each modality that the row has: `image` (C, size, size) uint8; `text` (L,) int64; `audio`
    (mels, T) float32, the log-mel spectrogram; `series` (channels, T) float32; `table` (F,) float32 in the order of
    `schema.table_columns`, where NaN stands for a number that is missing. Absent are an empty cell, a missing key,
    null and a NaN that is no text.

    Args:
        schema: what the columns are.
        root: the folder that relative paths start from; absolute ones are taken as they are.
        tokenizer: gives the tokens of texts their numbers, such as `Vocabulary`; None takes that of the folder which
            the schema names, where it names one.
        name: of the manifest, for messages.

    Raises:
        ConfigError: the tokenizer's folder can't be used, or a package that the audio needs is not installed.

    Example:
        >>> schema = Schema.from_any({"columns": {"age": "table", "height": "table"}, "label": "y"})
        >>> Decoder(schema, ".").decode({"age": "7", "height": "", "y": "child", "line": 2})
        {'table': tensor([7., nan])}
    """

    def __init__(
        self,
        schema: Schema,
        root: str | os.PathLike[str],
        tokenizer: Tokenizer | None = None,
        name: str | os.PathLike[str] = "the manifest",
    ) -> None:
        self.schema = schema
        self.root = Path(root)
        self.tokenizer = tokenizer
        self.name = os.fspath(name)
        self._log_mel: LogMel | None = None
        for column in schema.columns.values():
            if isinstance(column, TextColumn) and tokenizer is None and column.tokenizer not in ("word", "char"):
                from .tokenizer_folder import FolderTokenizer

                self.tokenizer = FolderTokenizer(column.tokenizer)
            if isinstance(column, AudioColumn):
                check_soundfile()
                self._log_mel = LogMel(column.sample_rate, column.mels, column.window_ms, column.hop_ms)

    def decode(self, row: Row) -> Sample:
        """Return the modalities that a row of the manifest has.

        Args:
            row: column -> entry, with its `line`.

        Raises:
            BrokenEntryError: an entry that can't be used; names the line and the column.
            ConfigError: a text, and no tokenizer.
        """
        sample: Sample = {}
        for name, column in self.schema.columns.items():
            value = self._value(row, name, partial(self._decode, column))
            if isinstance(column, TableColumn):
                sample.setdefault("table", torch.full((len(self.schema.table_columns),), math.nan))
                if value is not None:
                    sample["table"][self.schema.table_columns.index(name)] = value
            elif value is not None:
                sample[column.modality] = value
        if "table" in sample and bool(sample["table"].isnan().all()):
            del sample["table"]
        return sample

    def text(self, row: Row) -> str | None:
        """Return the text of a row, from which a vocabulary can be counted; None where there is none.

        Raises:
            BrokenEntryError: what is there is no text, or a file that can't be read.
            ConfigError: the schema has no column of text.
        """
        column = self.schema.column_of("text")
        assert isinstance(column, TextColumn)
        found: str | None = self._value(row, column.name, partial(self._text, column))
        return found

    def label(self, row: Row) -> tuple[str, ...]:
        """Return the names of a row's classes: exactly one, or any number in multi-label.

        Raises:
            BrokenEntryError: no class, or more than one, where there should be one; or what is no class's name.
        """
        label = self.schema.label
        found: tuple[str, ...] | None = self._value(row, label.column, partial(_labels, label))
        if found is None and label.kind == "class":
            raise BrokenEntryError(f"{self._where(row, label.column)}: there is no label; give the row one")
        return found or ()

    def _value(self, row: Row, name: str, use: Callable[[Any], Any]) -> Any:
        value = row.get(name)
        if value is None or (isinstance(value, str) and value.strip() == ""):
            return None
        if isinstance(value, float) and math.isnan(value):
            return None
        try:
            return use(value)
        except ConfigError:
            raise
        # Readers of damaged files raise nearly anything; running out of memory is one of the ways.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BrokenEntryError(f"{self._where(row, name)}: {reason}") from error

    def _where(self, row: Row, name: str) -> str:
        return f"{self.name}, line {row.get(LINE, '?')}, column {name!r}"

    def _decode(self, column: Column, value: Any) -> Any:
        if isinstance(column, ImageColumn):
            return _image(column, self._file(value))
        if isinstance(column, TextColumn):
            if self.tokenizer is None:
                raise ConfigError(f"column {column.name!r} has texts, and there is no tokenizer; give Decoder one")
            return torch.tensor(self.tokenizer.encode(self._text(column, value), column.max_length))
        if isinstance(column, AudioColumn):
            return self._audio(column, self._file(value))
        if isinstance(column, SeriesColumn):
            return read_series(value if _inline(value) else self._file(value), column.channels, column.length)
        return _number(value)

    def _file(self, value: Any) -> Path:
        if not isinstance(value, str):
            raise ValueError(f"{_short(value)} is no path; expected the path of a file")
        path = self.root / value.strip()
        try:
            mode = path.stat().st_mode
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ValueError(f"file {_short(str(path), 300)} is not to be had ({reason}); expected a file") from error
        # Opening a pipe would wait for its writer for ever.
        if not stat.S_ISREG(mode):
            raise ValueError(f"{str(path)!r} is no regular file; expected one")
        return path

    def _text(self, column: TextColumn, value: Any) -> str:
        if column.file:
            path = self._file(value)
            if path.stat().st_size > _LARGEST_TEXT:
                raise ValueError(f"text {str(path)!r} is larger than 16 MiB; expected a shorter one")
            try:
                return path.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"text {str(path)!r} is not UTF-8 (byte {error.start}); convert it") from error
        if not isinstance(value, str):
            raise ValueError(f"{_short(value)} is no text; expected one, in quotes in JSON")
        return value

    def _audio(self, column: AudioColumn, path: Path) -> Tensor:
        assert self._log_mel is not None
        try:
            features = self._log_mel(read_audio(path, column.sample_rate, column.max_seconds))
        except ValueError as error:
            raise ValueError(f"audio {str(path)!r} can't be read ({error}); replace the file") from error
        if not bool(features.isfinite().all()):
            raise ValueError(f"audio {str(path)!r} has samples too large for a spectrum; expected about -1 to 1")
        return features


def _image(column: ImageColumn, path: Path) -> Tensor:
    # Its size is in the header: looked at before anything is unpacked.
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            Image.open(path).close()
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(
                f"image {str(path)!r} is a giant: {error}; shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS"
            ) from error
        except Exception:  # open_image says what is wrong
            pass
        pixels = open_image(path)
    image = Image.fromarray(pixels)
    size = (column.size, column.size)
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    if column.channels == 1:
        return torch.from_numpy(np.array(image.convert("L")))[None]
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _inline(value: Any) -> bool:
    return not isinstance(value, str) or value.lstrip().startswith("[")


def _number(value: Any) -> float:
    if isinstance(value, bool):
        return float(value)
    try:
        # A text such as 1_000 or ١ is a number to Python, and hardly to who wrote it.
        if isinstance(value, str) and ("_" in value or not value.isascii()):
            raise ValueError
        found = float(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{_short(value)} is no number; expected one, or nothing where it is missing") from error
    if not math.isfinite(found) or abs(found) > torch.finfo(torch.float32).max:
        raise ValueError(f"{_short(value)} is no finite number of 32 bits; expected one, or nothing if missing")
    return found


def _labels(label: LabelColumn, value: Any) -> tuple[str, ...]:
    if label.kind == "class":
        return (_class_name(value),)
    if isinstance(value, str):
        text = value.strip()
        value = (
            json.loads(text) if text.startswith("[") else [part for part in text.split(label.separator) if part.strip()]
        )
    names = [_class_name(part) for part in (value if isinstance(value, list) else [value])]
    return tuple(dict.fromkeys(names))


def _class_name(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, int):
        return str(value)
    # Numbers with gaps are floats to pandas: class 3 comes out of it as 3.0.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    raise ValueError(f"{_short(value)} is no name of a class; expected a text or an integer")


def _short(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
