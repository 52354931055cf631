"""Names and values that MLflow takes: flattened parameters, metric names, plain YAML."""

import dataclasses
import posixpath
import re
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_PARAM_LENGTH = 6000
MAX_NAME_LENGTH = 250
BATCH = 100

_FORBIDDEN = re.compile(r"[^/\w.\- :]+")


def clean_name(name: str) -> str:
    """Turn a name into one that MLflow takes: letters, digits, `_`, `-`, `.`, `/`, space and `:`.

    Other characters are left out, as Lightning's MLFlowLogger does.

    Args:
        name: name of a metric or parameter.

    Example:
        >>> clean_name("val/acc@5")
        'val/acc5'
    """
    # MLflow takes a name for a path and refuses one that would resolve to another (`a//b`, `../a`).
    path = posixpath.normpath("/" + _FORBIDDEN.sub("", name)).lstrip("/")
    return path[:MAX_NAME_LENGTH] or "unnamed"


class Params:
    """The parameters that a run has: MLflow forbids to change one.

    Args:
        known: what the run has already, when it is resumed.
    """

    def __init__(self, known: Mapping[str, str] | None = None) -> None:
        self._known = dict(known or {})

    def add(self, params: Mapping[str, Any]) -> tuple[list[tuple[str, str]], dict[str, str]]:
        """Take parameters.

        Args:
            params: values by (dotted) name; a text longer than 6,000 characters is cut, with a warning.

        Returns:
            Those to be logged, and tags `changed.<name>` for those that the run has with another value.
        """
        new: list[tuple[str, str]] = []
        changed: dict[str, str] = {}
        for raw, value in params.items():
            name, text = clean_name(raw), str(value)
            if len(text) > MAX_PARAM_LENGTH:
                warnings.warn(
                    f"parameter {name!r} has {len(text):,} characters; the first {MAX_PARAM_LENGTH:,} are logged",
                    RuntimeWarning,
                    stacklevel=4,
                )
                text = text[:MAX_PARAM_LENGTH]
            if name not in self._known:
                self._known[name] = text
                new.append((name, text))
            elif self._known[name] != text:
                changed[f"changed.{name}"[:MAX_NAME_LENGTH]] = text
        return new, changed


def flatten(params: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into dotted keys.

    Args:
        params: mapping, Namespace or dataclass. Lists that hold mappings are numbered; other lists are leaves.
        prefix: put before each key.

    Example:
        >>> flatten({"model": {"lr": 0.1}, "callbacks": [{"class_path": "EWC"}], "sizes": [1, 2]})
        {'model.lr': 0.1, 'callbacks.0.class_path': 'EWC', 'sizes': [1, 2]}
    """
    children = _children(params)
    if children is None:
        return {prefix: params}
    flat: dict[str, Any] = {}
    for key, value in children.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        # An empty dictionary is a value too.
        flat.update(flatten(value, name) or {name: "{}"})
    return flat


def _children(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, Namespace):
        return vars(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple) and any(_children(item) is not None for item in value):
        return dict(enumerate(value))
    return None


def plain(value: Any) -> Any:
    """Turn a configuration into what YAML can hold: numbers, strings, lists and dictionaries."""
    if value is None or isinstance(value, bool | int | float | str):
        # Subclasses (an Enum of str, a numpy float) have YAML tags of their own.
        return value if type(value) in (type(None), bool, int, float, str) else plain_scalar(value)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    children = None if isinstance(value, list | tuple) else _children(value)
    if children is not None:
        return {str(key): plain(item) for key, item in children.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return str(value)


def plain_scalar(value: Any) -> bool | int | float | str:
    """Return the builtin that a subclass of a builtin stands for."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value.value if hasattr(value, "value") else value)
    raise TypeError(f"{type(value).__name__} is no number or string")
