"""All rows of a manifest, decoded once: what is broken is known before training, and the rest is at hand."""

import hashlib
import os
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ds_lightning.errors import DataError

from .image_data import as_it_is
from .manifest_reading import LINE, Row
from .manifest_schema import Schema
from .manifest_values import Decoder, Sample
from .packed_samples import PackedColumn, PackWriter, is_pack, read_pack

_AT_ONCE = 128
_FORMAT = 1
# What is done with a sample after the cache.
_LATER = ("mean", "std", "augment", "spec_augment", "max_length", "tokenizer", "vocab_size", "lower")


class RowDecoder:
    """A row as a sample whose text is still UTF-8, so that it does not depend on a vocabulary.

    Args:
        decoder: of the whole schema.
    """

    def __init__(self, decoder: Decoder) -> None:
        schema = decoder.schema
        rest = {name: column for name, column in schema.columns.items() if column.modality != "text"}
        self.whole = decoder
        self.has_text = len(rest) < len(schema.columns)
        self.rest = Decoder(Schema(rest, schema.label, schema.key, schema.time), decoder.root, name=decoder.name)

    def __call__(self, row: Row) -> Sample:
        """Return the sample of a row, with `text` (bytes,) uint8.

        Raises:
            DataError: an entry that can't be used, or nothing there.
        """
        sample = self.rest.decode(row)
        text = self.whole.text(row) if self.has_text else None
        if text is not None:
            sample["text"] = torch.frombuffer(bytearray(text.encode("utf-8", "surrogatepass")), dtype=torch.uint8)
        if not sample:
            raise DataError(
                f"{self.whole.name}, line {row.get(LINE, '?')}: all of {', '.join(self.whole.schema.columns)} are "
                "empty; expected one entry at least"
            )
        return sample


class Part(NamedTuple):
    """Some rows: `labels` are the names of their classes, `broken` says why a row can't be used."""

    rows: Sequence[Row]
    decoder: RowDecoder
    columns: dict[str, PackedColumn]
    labels: list[list[str]]
    broken: dict[int, str]


class ManifestStore:
    """Decoded rows of one or more manifests, numbered through.

    Args:
        cache: `memory`; `none`, which decodes a row each time that it is wanted; or a folder, whose files are mapped
            into memory, used again by the next run, and shared by the processes of one machine.
        num_workers: processes that decode.
    """

    def __init__(self, cache: str = "memory", num_workers: int = 0) -> None:
        self.cache = cache
        self.num_workers = num_workers
        self.parts: list[Part] = []
        self._starts: list[int] = []
        self.size = 0

    def __len__(self) -> int:
        return self.size

    def add(self, rows: Sequence[Row], decoder: Decoder, *, stop: bool) -> None:
        """Decode rows, or find them in the cache.

        Args:
            rows: from `read_manifest`.
            decoder: for them.
            stop: whether an entry that can't be used is an error, and not only noted.

        Raises:
            DataError: such an entry, with `stop`.
        """
        each = RowDecoder(decoder)
        folder = None if self.cache in ("memory", "none") else Path(self.cache, _digest(rows, decoder))
        if folder is not None:
            if not is_pack(folder):
                self._write(folder, rows, each, stop)
            columns, index = read_pack(folder)
            broken = {int(row): reason for row, reason in index["broken"].items()}
            part = Part(rows, each, columns, index["labels"], broken)
        else:
            writer = PackWriter(keep=self.cache == "memory")
            labels, broken = self._decode(rows, each, writer, stop)
            part = Part(rows, each, writer.finish(), labels, broken)
        if stop and part.broken:
            raise DataError(next(iter(part.broken.values())))
        self.parts.append(part)
        self._starts.append(self.size)
        self.size += len(rows)

    def fetch(self, row: int) -> Sample:
        """Return the sample of a row that isn't broken, with `text` as UTF-8."""
        part, row = self._find(row)
        if self.cache == "none":
            return part.decoder(part.rows[row])
        found = {name: column[row] for name, column in part.columns.items()}
        return {name: value for name, value in found.items() if value is not None}

    def broken(self, row: int) -> str | None:
        """Say why a row can't be used; None when it can."""
        part, row = self._find(row)
        return part.broken.get(row)

    def label(self, row: int) -> list[str]:
        """Return the names of a row's classes."""
        part, row = self._find(row)
        return part.labels[row]

    def row(self, row: int) -> Row:
        """Return a row as it was read."""
        part, row = self._find(row)
        return part.rows[row]

    def line(self, row: int) -> int:
        """Return a row's line in its manifest."""
        return int(self.row(row)[LINE])

    def where(self, row: int) -> str:
        """Return a row's manifest and line, for messages."""
        return f"{self._find(row)[0].decoder.whole.name}, line {self.line(row)}"

    def _find(self, row: int) -> tuple[Part, int]:
        number = bisect_right(self._starts, row) - 1
        return self.parts[number], row - self._starts[number]

    def lengths(self, modality: str) -> Tensor:
        """Return the last size of a modality for each row, 0 where it is absent, (rows,) int64; texts in bytes."""
        nothing = [torch.zeros(len(part.rows), dtype=torch.int64) for part in self.parts]
        columns = [part.columns.get(modality) for part in self.parts]
        return torch.cat([zeros if c is None else c.lengths for zeros, c in zip(nothing, columns, strict=True)])

    def _decode(
        self, rows: Sequence[Row], decoder: RowDecoder, writer: PackWriter, stop: bool
    ) -> tuple[list[list[str]], dict[int, str]]:
        labels: list[list[str]] = []
        broken: dict[int, str] = {}
        for columns, found, wrong in _chunks(_Rows(rows, decoder, writer.keep), self.num_workers):
            broken |= {len(labels) + row: reason for row, reason in wrong.items()}
            if stop and broken:
                raise DataError(next(iter(broken.values())))
            writer.extend(columns, len(found))
            labels += found
        return labels, broken

    def _write(self, folder: Path, rows: Sequence[Row], decoder: RowDecoder, stop: bool) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            writer = PackWriter(made)
            labels, broken = self._decode(rows, decoder, writer, stop)
            writer.write_index({"labels": labels, "broken": broken})
            os.rename(made, folder)
        except OSError:
            # Another process may have been first.
            if not is_pack(folder):
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)


class _Rows(Dataset[Any]):
    """Decodes some rows at a time, in a worker or here; what is wrong is told, not raised."""

    def __init__(self, rows: Sequence[Row], decoder: RowDecoder, keep: bool) -> None:
        self.rows = rows
        self.decoder = decoder
        self.keep = keep

    def __len__(self) -> int:
        return -(-len(self.rows) // _AT_ONCE)

    def __getitem__(self, number: int) -> tuple[dict[str, PackedColumn], list[list[str]], dict[int, str]]:
        writer = PackWriter(keep=self.keep)
        labels: list[list[str]] = []
        broken: dict[int, str] = {}
        for at, row in enumerate(self.rows[number * _AT_ONCE : (number + 1) * _AT_ONCE]):
            sample: Sample = {}
            label: list[str] = []
            try:
                label = list(self.decoder.whole.label(row))
                sample = self.decoder(row)
            except DataError as error:
                broken[at] = str(error)
            labels.append(label)
            writer.add(sample)
        return writer.finish(), labels, broken


def _chunks(rows: _Rows, num_workers: int) -> Iterator[Any]:
    workers = min(num_workers, len(rows))
    yield from DataLoader(
        rows, batch_size=None, num_workers=workers, collate_fn=as_it_is, generator=torch.Generator().manual_seed(0)
    )


def _digest(rows: Sequence[Row], decoder: Decoder) -> str:
    """Return what changes with the schema, the entries, and the size or time of a file that an entry names."""
    schema = decoder.schema
    options = [
        (column.modality, sorted((key, value) for key, value in asdict(column).items() if key not in _LATER))
        for column in schema.columns.values()
    ]
    total = hashlib.sha256(repr((_FORMAT, options, asdict(schema.label), str(decoder.root.resolve()))).encode())
    for row in rows:
        state: list[Any] = [sorted(row.items(), key=lambda entry: entry[0])]
        for name, column in schema.columns.items():
            value = row.get(name)
            paths = column.modality in ("image", "audio", "series") or bool(getattr(column, "file", False))
            if isinstance(value, str) and paths:
                try:
                    found = (decoder.root / value.strip()).stat()
                    state.append((found.st_size, found.st_mtime_ns))
                except (OSError, ValueError):
                    state.append(None)
        total.update(repr(state).encode("utf-8", "surrogatepass"))
    return total.hexdigest()[:16]
