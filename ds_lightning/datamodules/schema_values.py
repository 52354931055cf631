"""Checks of single values of a schema; each names the key, what is there and what was expected."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ds_lightning.errors import ConfigError, hint


def options(value: Any, where: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    """Return a mapping as a dict; refuse anything else, and keys that are not known (None: any text)."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}; expected a mapping of keys to values")
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{where} has the key {key!r}; expected a text, so put it in quotes")
        if known is not None and key not in known:
            raise ConfigError(f"{where} has the unknown key {key!r}{hint(key, known)}")
    return dict(value)


def whole(value: Any, where: str, least: int, most: int) -> None:
    """Refuse what is no integer in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        expected = f"{least}" if least == most else f"an integer from {least} to {most}"
        raise ConfigError(f"{where} is {value!r}; expected {expected}")


def number(value: Any, where: str, least: float, most: float) -> None:
    """Refuse what is no number in [least, most]."""
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not right or not least <= value <= most:
        raise ConfigError(f"{where} is {value!r}; expected a number from {least:g} to {most:g}")


def switch(value: Any, where: str) -> None:
    """Refuse what is neither true nor false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{where} is {value!r}; expected true or false")


def one_of(value: Any, where: str, known: Sequence[Any]) -> None:
    """Refuse what is not among the known values."""
    if isinstance(value, bool) or value not in known:
        meant = hint(value, known) if isinstance(value, str) and value and isinstance(known[0], str) else ""
        raise ConfigError(f"{where} is {value!r}; expected {' or '.join(map(str, known))}{meant}")
