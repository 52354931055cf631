"""A folder that fills while one trains: what has been written completely, put together to rows."""

import os
import re
import time
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ds_lightning.errors import ConfigError, DataError

from .image_files import SUFFIXES
from .manifest_columns import Column, TextColumn
from .manifest_reading import LINE, Row, read_manifest
from .manifest_schema import Schema

MANIFESTS = (".csv", ".jsonl", ".parquet")
_UNFINISHED = (".tmp", ".part", ".partial", ".crdownload", ".filepart", "~")
_AUDIO = (".wav", ".flac", ".ogg", ".mp3")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_BETWEEN = re.compile(r"[_\-. ]")


class Arrivals(NamedTuple):
    """Rows of one manifest that are new or have changed, and their names."""

    rows: list[Row]
    names: list[str]


class FolderWatch:
    """Looks for rows and files that have come into a folder since the last look.

    Rows are those of all manifests (`.csv`, `.jsonl`, `.parquet`) in the folder, at any depth. With the schema's `key`,
    rows of the same key are one. A row whose entry for an image, audio, series or text file is empty gets a file of the
    folder of that kind: with `key` the one in whose name the key stands (the whole name, or between `_`, `-`, `.` and
    spaces: `cam_0012.png` for 0012); else with `time` the one whose time (the last number in its name, or its time of
    change where there is none) is nearest, within `tolerance`. A row may come before its files: it is there without
    them, and again with them when they have come. A row that names a file that isn't there yet, and with `key` one
    without a label, waits (`waiting` counts them).

    A file is complete when its size and time of change have stayed for `settle` seconds. Hidden files and names that
    end with .tmp, .part, .partial, .crdownload, .filepart or ~ are left alone until they are renamed. What has been
    taken once is not read again.

    Args:
        folder: is looked at with all folders in it.
        schema: the columns, `key` and `time`.
        tolerance: of times, in seconds, >= 0.
        settle: in seconds, >= 0.
        root: where the paths in the rows start from; None is the folder.

    Raises:
        ConfigError: no such folder.
    """

    def __init__(
        self, folder: str, schema: Schema, tolerance: float = 1.0, settle: float = 2.0, root: str | None = None
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ConfigError(f"path is {folder!r}; with watch expected a folder that manifests and files come into")
        self.schema = schema
        self.tolerance = tolerance
        self.settle = settle
        self.root = self.folder if root is None else Path(root)
        self.waiting = 0
        self.broken: dict[str, str] = {}
        self._seen: dict[Path, tuple[tuple[int, int], float]] = {}
        self._complete: dict[Path, float] = {}
        self._manifests: dict[Path, list[Row]] = {}
        self._unreadable: dict[str, str] = {}
        self._taken: dict[str, Row] = {}

    def look(self) -> dict[Path, Arrivals]:
        """Return what is new since the last look; why a manifest or a row can't be used is in `broken`."""
        self._find_complete()
        for path in sorted(self._complete):
            if path.suffix.lower() in MANIFESTS and path not in self._manifests and str(path) not in self._unreadable:
                try:
                    self._manifests[path] = read_manifest(path)
                except DataError as error:
                    self._unreadable[str(path)] = str(error)
        self.broken = dict(self._unreadable)
        matches = {
            name: FileMatch(self._of_kind(column), self.tolerance)
            for name, column in self.schema.columns.items()
            if _kinds(column)
        }
        self.waiting = 0
        found: dict[Path, Arrivals] = {}
        for name, (path, row) in self._records().items():
            try:
                whole = self._with_files(row, matches)
            except DataError as error:
                self.broken[name] = f"manifest {path}, line {row[LINE]}: {error}"
                continue
            if whole is None:
                self.waiting += 1
            elif self._taken.get(name) != whole:
                self._taken[name] = whole
                arrivals = found.setdefault(path, Arrivals([], []))
                arrivals.rows.append(whole)
                arrivals.names.append(name)
        return found

    def _find_complete(self) -> None:
        now, here = time.time(), time.monotonic()
        for folder, inner, names in os.walk(self.folder):
            inner[:] = [name for name in inner if not name.startswith(".")]
            for name in names:
                path = Path(folder, name)
                if path in self._complete or name.startswith(".") or name.lower().endswith(_UNFINISHED):
                    continue
                try:
                    found = path.stat()
                except OSError:  # it is gone again
                    continue
                state = (found.st_size, found.st_mtime_ns)
                before, since = self._seen.setdefault(path, (state, here))
                if before != state:
                    self._seen[path] = (state, here)
                elif here - since >= self.settle or 0 <= self.settle <= now - found.st_mtime:
                    self._complete[path] = found.st_mtime
                    del self._seen[path]

    def _records(self) -> dict[str, tuple[Path, Row]]:
        """Return each row by its name: its key, or the place where it stands."""
        records: dict[str, tuple[Path, Row]] = {}
        for path, rows in self._manifests.items():
            for row in rows:
                key = None if self.schema.key is None else row.get(self.schema.key)
                if self.schema.key is not None and _empty(key):
                    where = f"manifest {path}, line {row[LINE]}"
                    self.broken[where] = f"{where}: there is no {self.schema.key!r}; give one"
                    continue
                name = f"{path.relative_to(self.folder)}:{row[LINE]}" if key is None else str(key)
                earlier = records.get(name, (path, {}))
                more = {column: value for column, value in row.items() if not _empty(value)}
                records[name] = (path, {**earlier[1], **more})
        return records

    def _with_files(self, row: Row, matches: Mapping[str, "FileMatch"]) -> Row | None:
        whole = dict(row)
        if self.schema.key is not None and _empty(row.get(self.schema.label.column)):
            return None
        for name, match in matches.items():
            value = row.get(name)
            if _empty(value):
                file = match.of(row, self.schema)
                if file is not None:
                    whole[name] = str(file.resolve())
            elif isinstance(value, str) and not value.lstrip().startswith("["):
                path = self.root / value.strip()
                # Outside of the folder nobody has looked whether it is complete.
                if path not in self._complete and (path.is_relative_to(self.folder) or not path.exists()):
                    return None
        return whole

    def _of_kind(self, column: Column) -> dict[Path, float]:
        kinds = _kinds(column)
        return {path: changed for path, changed in self._complete.items() if path.suffix.lower() in kinds}


class FileMatch:
    """Finds the file that belongs to a row.

    Args:
        files: path -> when it was changed, in seconds.
        tolerance: of times, in seconds.
    """

    def __init__(self, files: Mapping[Path, float], tolerance: float) -> None:
        self.tolerance = tolerance
        self._by_stem: dict[str, list[Path]] = {}
        self._by_piece: dict[str, list[Path]] = {}
        times = []
        for path, changed in sorted(files.items()):
            self._by_stem.setdefault(path.stem, []).append(path)
            for piece in _pieces(path.stem):
                self._by_piece.setdefault(piece, []).append(path)
            numbers = _NUMBER.findall(path.stem)
            times.append((float(numbers[-1]) if numbers else changed, path))
        self._times = sorted(times)

    def of(self, row: Row, schema: Schema) -> Path | None:
        """Return the file of a row, by its key, else by its time; None where there is none.

        Raises:
            DataError: more than one file has the key in its name, or the time is no number.
        """
        if schema.key is not None:
            return self.by_key(str(row[schema.key]))
        if schema.time is not None:
            value = row.get(schema.time)
            try:
                return self.by_time(float(value))  # type: ignore[arg-type]  # what is none is caught
            except (TypeError, ValueError) as error:
                raise DataError(f"column {schema.time!r} has {value!r}, which is no time; expected seconds") from error
        return None

    def by_key(self, key: str) -> Path | None:
        """Return the file whose name is `key`, else the one that has it between signs."""
        found = self._by_stem.get(key) or self._by_piece.get(key, [])
        if len(found) > 1:
            raise DataError(
                f"key {key!r} stands in the names of {found[0].name} and {found[1].name}; expected one file of a kind"
            )
        return found[0] if found else None

    def by_time(self, seconds: float) -> Path | None:
        """Return the file that is nearest in time, within the tolerance."""
        at = bisect_left(self._times, seconds, key=lambda entry: entry[0])
        near = sorted((abs(when - seconds), path) for when, path in self._times[max(0, at - 1) : at + 1])
        return near[0][1] if near and near[0][0] <= self.tolerance else None


def _pieces(stem: str) -> set[str]:
    """Return all parts of a name that begin and end at a sign."""
    starts = [0, *(sign.end() for sign in _BETWEEN.finditer(stem))]
    ends = [*(sign.start() for sign in _BETWEEN.finditer(stem)), len(stem)]
    return {stem[start:end] for start in starts for end in ends if start < end}


def _kinds(column: Column) -> frozenset[str]:
    if column.modality == "image":
        return SUFFIXES
    if column.modality == "audio":
        return frozenset(_AUDIO)
    if column.modality == "series":
        return frozenset((".npy",))
    return frozenset((".txt",)) if isinstance(column, TextColumn) and column.file else frozenset()


def _empty(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and value.strip() == "")
