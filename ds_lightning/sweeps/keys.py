"""Unknown keys are named, with the key that was probably meant."""

from collections.abc import Iterable, Mapping
from typing import Any

from ds_lightning.errors import ConfigError, hint


def as_mapping(value: Any, where: str, known: Iterable[str] | None = None) -> dict[str, Any]:
    """Return a mapping with string keys as a dict.

    Args:
        value: what the file says.
        where: how an error calls it.
        known: the allowed keys; None allows any.

    Raises:
        ConfigError: when it is no mapping, has a key that is not a string, or one that is not allowed.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping of keys to values, got {value!r}")
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{where}: key {key!r} must be a string")
        if known is not None and key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{hint(key, known)}")
    return dict(value)
