"""Manifests: the rows of CSV, JSONL and Parquet files."""

import codecs
import csv
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_lightning.errors import ConfigError, DataError, hint

if TYPE_CHECKING:
    from .manifest_schema import Schema

Row = dict[str, Any]
LINE = "line"
"""The key of a row that holds its line in the file, from 1; in a Parquet file its row."""
# The csv module's own limit of 131,072 characters a field is below what letters and inline series have.
_LONGEST_FIELD = 2**31 - 1
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_manifest(path: str | Path, schema: "Schema | None" = None) -> list[Row]:
    r"""Read a manifest: one row a sample.

    A row maps each column to what is written there: texts from CSV, any JSON value from JSONL, and what Parquet holds.
    An empty cell and a missing key are left for the reader of the values. `line` is added: the row's number.

    Args:
        path: `.csv` (comma, quoted as in RFC 4180, with a header), `.jsonl` (one object a line) or `.parquet`. Text is
            UTF-8, with or without a byte-order mark, or UTF-16 with one; anything else is read as Latin-1, with a
            warning.
        schema: every column that it names must be there; None checks nothing.

    Raises:
        DataError: no such file, no rows, a row with more or fewer entries than the header, a column twice, a column
            that is not there, or a file that can't be read; names the file and the line.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp(), "pets.csv")
        >>> _ = path.write_text("photo,y\na.png,cat\n")
        >>> read_manifest(path)
        [{'photo': 'a.png', 'y': 'cat', 'line': 2}]
    """
    path = Path(path)
    readers = {".csv": _table, ".jsonl": _objects, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"manifest {path} is of no known kind; expected a name that ends with {', '.join(readers)}")
    if not path.is_file():
        raise DataError(f"manifest {path} is not there; expected a file")
    try:
        rows = list(readers[path.suffix.lower()](path))
    except OSError as error:
        raise DataError(f"manifest {path} can't be read: {error.strerror or error}") from error
    if not rows:
        raise DataError(f"manifest {path} has no rows; expected one at least")
    if schema is not None:
        check_columns(rows, schema, path)
    return rows


def check_columns(rows: list[Row], schema: "Schema", path: str | Path) -> None:
    """Refuse a manifest that lacks a column of the schema in every row.

    Args:
        rows: from `read_manifest`.
        schema: what is wanted.
        path: of the manifest, for the message.

    Raises:
        DataError: names the column and the nearest that is there.
    """
    missing = set(schema.wanted)
    has: dict[str, None] = {}
    for row in rows:
        missing -= row.keys()
        if not missing:
            return
        has.update(dict.fromkeys(row))
    has.pop(LINE, None)
    name = next(name for name in schema.wanted if name in missing)
    meant = "; it seems to be separated by semicolons: save it with commas" if _semicolons(has) else hint(name, has)
    raise DataError(f"manifest {path} has no column {name!r}, which the schema names{meant}")


def _semicolons(names: dict[str, None]) -> bool:
    return len(names) == 1 and ";" in next(iter(names))


def _text(path: Path) -> str:
    raw = path.read_bytes()
    encoding = "utf-16" if raw.startswith(_UTF16) else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-16":
            raise DataError(f"manifest {path} is no UTF-16 (byte {error.start}); save it as UTF-8") from error
        warnings.warn(
            f"manifest {path} is not UTF-8 (byte {error.start}), and is read as Latin-1; save it as UTF-8 if words "
            "come out wrong",
            UserWarning,
            stacklevel=2,
        )
        text = raw.decode("latin-1")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"manifest {path}, line {line} has a NUL character: it is no text file; save it as UTF-8")
    return text


def _table(path: Path) -> Iterator[Row]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    line = 1
    try:
        # strict: a quote that is never closed would swallow the rest of the file.
        reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
        names = [name.strip() for name in next(reader, [])]
        _check_names(path, names)
        while True:
            line = reader.line_num + 1
            values = next(reader, None)
            if values is None:
                return
            if not values:
                continue
            if len(values) != len(names):
                raise DataError(
                    f"manifest {path}, line {line} has {len(values)} entries; expected {len(names)} as in its header "
                    "(an entry with a comma needs quotes)"
                )
            # A column without a name is the index that spreadsheets and pandas write.
            row: Row = {name: value for name, value in zip(names, values, strict=True) if name}
            row[LINE] = line
            yield row
    except csv.Error as error:
        raise DataError(f"manifest {path}, from line {line} on, can't be read as a table: {error}") from error
    finally:
        csv.field_size_limit(before)


def _check_names(path: Path, names: list[str]) -> None:
    if not any(names):
        raise DataError(f"manifest {path} has no header; expected the names of the columns in its first line")
    for name in names:
        if name and names.count(name) > 1:
            raise DataError(f"manifest {path} has the column {name!r} twice; expected each once")
    if LINE in names:
        raise DataError(f"manifest {path} has a column {LINE!r}, where the line's number is kept; rename the column")


def _objects(path: Path) -> Iterator[Row]:
    # Not splitlines(): JSON texts may hold other line separators, such as U+2028.
    for number, text in enumerate(_text(path).split("\n"), 1):
        if text.strip() == "":
            continue
        where = f"manifest {path}, line {number}"
        try:
            row = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is no JSON: {' '.join(str(error).split())}") from error
        if not isinstance(row, dict):
            raise DataError(f'{where} is a JSON {type(row).__name__}; expected an object such as {{"photo": ...}}')
        if LINE in row:
            raise DataError(f"{where} has a key {LINE!r}, where the line's number is kept; rename the key")
        row[LINE] = number
        yield row


def _once(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return row


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError(f"manifest {path} needs the package pyarrow; pip install pyarrow") from error
    try:
        with pq.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            _check_names(path, names)
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    row[LINE] = number
                    yield row
    except DataError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"manifest {path} can't be read as Parquet: {reason}") from error
