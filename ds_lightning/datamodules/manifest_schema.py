"""The schema of a manifest: which column is which modality, and the label."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ds_lightning.errors import ConfigError, hint
from ds_lightning.yaml_check import check_yaml

from .manifest_columns import KINDS, Column, LabelColumn
from .manifest_reading import LINE
from .schema_values import one_of, options

_KEYS = ("columns", "label", "key", "time")


@dataclass(frozen=True)
class Schema:
    """The columns of a manifest that are read, in the order of the schema.

    Args:
        columns: name -> what the schema says; at most one a modality, any number for `table`.
        label: what is to be predicted.
        key: the column that tells which files of a watched folder belong together; None is none.
        time: the column with a row's time in seconds, for a watched folder; None is none.

    Example:
        >>> schema = Schema.from_any(
        ...     {"columns": {"photo": {"modality": "image", "size": 28}, "age": {"modality": "table"}}, "label": "y"}
        ... )
        >>> schema.modalities, schema.columns["photo"].size, schema.label.kind
        (('image', 'table'), 28, 'class')
    """

    columns: Mapping[str, Column]
    label: LabelColumn
    key: str | None = None
    time: str | None = None

    @classmethod
    def from_any(cls, source: "Schema | Mapping[str, Any] | str | os.PathLike[str]") -> "Schema":
        """Make a schema of a mapping, or of a YAML file with one.

        The mapping has `columns` (name -> `modality` and the options of that kind of column, see
        `manifest_columns.py`) and `label` (`column` and `kind`, or the column's name alone); `key` and `time` may be
        added.

        Args:
            source: the mapping or the path; a schema is returned as it is.

        Raises:
            ConfigError: a file that can't be read, a key that is unknown, or a value out of its range.
        """
        if isinstance(source, Schema):
            return source
        if isinstance(source, str | os.PathLike):
            source = _read(Path(source))
        content = options(source, "the schema", _KEYS)
        for key in ("columns", "label"):
            if key not in content:
                raise ConfigError(f"the schema has no key {key!r}; expected one such as {_EXAMPLES[key]}")
        given = options(content["columns"], "schema columns")
        if not given:
            raise ConfigError(f"the schema has no columns; expected one at least, such as {_EXAMPLES['columns']}")
        columns = {name: _column(name, entry) for name, entry in given.items()}
        label = content["label"]
        if not isinstance(label, str):
            label = options(label, "schema label", [part.name for part in fields(LabelColumn)])
            if "column" not in label:
                raise ConfigError(f"schema label has no key 'column'; expected {_EXAMPLES['label']}")
        return cls(
            columns,
            LabelColumn(label) if isinstance(label, str) else LabelColumn(**label),
            key=content.get("key"),
            time=content.get("time"),
        )

    def __post_init__(self) -> None:
        first: dict[str, str] = {}
        for name, column in self.columns.items():
            earlier = first.setdefault(column.modality, name)
            if earlier != name and column.modality != "table":
                raise ConfigError(
                    f"schema columns {earlier!r} and {name!r} are both {column.modality}; expected one column a "
                    "modality (any number for table): leave one out"
                )
        for what, used in (("label", self.label.column), ("key", self.key), ("time", self.time)):
            if used is not None and (not isinstance(used, str) or used == ""):
                raise ConfigError(f"schema {what} is {used!r}; expected the name of a column")
        if self.label.column in self.columns:
            raise ConfigError(
                f"schema label is the column {self.label.column!r}, which is among the inputs too; expected another"
            )
        if LINE in self.wanted:
            raise ConfigError(f"the schema names a column {LINE!r}, where the line's number is kept; rename the column")

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities in the order of the schema, each once."""
        return tuple(dict.fromkeys(column.modality for column in self.columns.values()))

    @property
    def table_columns(self) -> tuple[str, ...]:
        """The names of the columns of numbers, in the order of the `table` tensor."""
        return tuple(name for name, column in self.columns.items() if column.modality == "table")

    @property
    def wanted(self) -> tuple[str, ...]:
        """All columns that a manifest must have."""
        extra = [name for name in (self.key, self.time) if name is not None]
        return tuple(dict.fromkeys([*self.columns, self.label.column, *extra]))

    def column_of(self, modality: str) -> Column:
        """Return the column of a modality; the first one for `table`.

        Raises:
            ConfigError: the schema has none.
        """
        for column in self.columns.values():
            if column.modality == modality:
                return column
        raise ConfigError(f"the schema has no {modality} column; it has {', '.join(self.modalities)}")


_EXAMPLES = {
    "columns": "columns: {photo: {modality: image, size: 28}}",
    "label": "label: {column: y, kind: class}",
}


def _read(path: Path) -> Any:
    check_yaml(path, "schema file")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"schema {str(path)!r} is no YAML: {' '.join(str(error).split())}") from error


def _column(name: str, entry: Any) -> Column:
    where = f"schema column {name!r}"
    entry = {"modality": entry} if isinstance(entry, str) else options(entry, where)
    if "modality" not in entry:
        meant = next((key for key in entry if hint(key, ["modality"]).startswith("; did")), None)
        raise ConfigError(
            f"{where} has no key 'modality'{'' if meant is None else f', but {meant!r}'}; expected modality: with one "
            f"of {', '.join(KINDS)}"
        )
    modality = entry.pop("modality")
    one_of(modality, f"{where}: modality", tuple(KINDS))
    kind = KINDS[modality]
    known = [part.name for part in fields(kind) if part.name != "name"]
    return kind(name, **options(entry, f"{where} ({modality})", known or ["modality"]))
