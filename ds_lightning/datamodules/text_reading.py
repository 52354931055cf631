"""Texts, with or without labels, from CSV, TSV, JSONL and plain text files."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ds_lightning.errors import DataError

# Numbers first, or a command line would make names of them.
Column = int | str
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")
# The csv module's own limit of 131,072 characters a field is below what letters and articles have.
_LONGEST_FIELD = 2**31 - 1


class TextsRead(NamedTuple):
    """Texts in the order of the file, and their labels as they are written there; None without labels."""

    texts: list[str]
    labels: list[str] | None


def read_texts(path: str | Path, text_column: Column = "text", label_column: Column | None = "label") -> TextsRead:
    """Read a file of texts, UTF-8.

    Args:
        path: `.csv` (quoted as in RFC 4180), `.tsv` (nothing is quoted), `.jsonl` (one object a line), or `.txt` (one
            text a line: its first word is the label, unless `label_column` is None).
        text_column: the column or key of the text. A number counts columns from 0 in a file without a header.
        label_column: that of the label; None reads no labels.

    Raises:
        DataError: no such file, no such column, a row without a text or a label, or bytes that are not UTF-8.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path} is no text file that is known; expected a name that ends with {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"{path} is not there; expected a file of texts")
    rows = {".jsonl": _objects, ".txt": _lines}.get(path.suffix, _table)
    texts: list[str] = []
    labels: list[str] = []
    try:
        for number, text, label in rows(path, text_column, label_column):
            if not isinstance(text, str):
                raise DataError(f"{path}, line {number}: the text is {text!r}; expected a string")
            if label_column is not None and (label is None or str(label).strip() == ""):
                raise DataError(f"{path}, line {number} has no label; give each row one, or set label_column to null")
            texts.append(text)
            labels.append(str(label).strip())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it, for instance with iconv") from error
    except csv.Error as error:
        raise DataError(f"{path} can't be read as a table: {error}") from error
    if not texts:
        raise DataError(f"{path} has no texts; expected one at least")
    return TextsRead(texts, None if label_column is None else labels)


def _lines(path: Path, _: Column, label_column: Column | None) -> Iterator[tuple[int, Any, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if line == "":
                continue
            if label_column is None:
                yield number, line, None
                continue
            label, _, text = line.partition("\t") if "\t" in line else line.partition(" ")
            yield number, text.strip(), label


def _objects(path: Path, text_column: Column, label_column: Column | None) -> Iterator[tuple[int, Any, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip() == "":
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number} is no JSON: {error}") from error
            wanted = (text_column,) if label_column is None else (text_column, label_column)
            absent = [key for key in wanted if not isinstance(row, dict) or key not in row]
            if absent:
                has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise DataError(f"{path}, line {number} has no key {absent[0]!r}; it has {has}")
            yield number, row[text_column], None if label_column is None else row[label_column]


def _table(path: Path, text_column: Column, label_column: Column | None) -> Iterator[tuple[int, Any, Any]]:
    tabs = path.suffix == ".tsv"
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file)
            header = next(reader, []) if isinstance(text_column, str) else None
            text = _place(path, header, text_column)
            label = None if label_column is None else _place(path, header, label_column)
            most = max(text, -1 if label is None else label)
            for row in reader:
                if not row:
                    continue
                if len(row) <= most:
                    raise DataError(f"{path}, line {reader.line_num} has {len(row)} columns; expected {most + 1}")
                yield reader.line_num, row[text], None if label is None else row[label]
    finally:
        csv.field_size_limit(before)


def _place(path: Path, header: list[str] | None, column: Column) -> int:
    if isinstance(column, int) and header is None and column >= 0:
        return column
    if isinstance(column, int) or header is None:
        raise DataError(f"the column {column!r} of {path}: expected two names, or two numbers >= 0 (no header then)")
    names = [name.strip().lstrip("\ufeff") for name in header]
    if column not in names:
        raise DataError(f"{path} has no column {column!r}; its first line has {', '.join(names) or 'nothing'}")
    return names.index(column)
