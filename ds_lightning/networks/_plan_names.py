"""Paths of modules and names of tensors, of which a network may have several for one."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from ds_lightning.errors import ConfigError

Entry = TypeVar("Entry")


def plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod") if "_orig_mod" in name else name


def joined(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)


def modules_of(network: nn.Module) -> dict[str, nn.Module]:
    """Return every path -> its module; a compiled module's path leads to what it wraps, which comes after it."""
    return {plain(path): module for path, module in network.named_modules(remove_duplicate=False)}


def for_all_names(things: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    names: dict[int, list[str]] = {}
    for name, thing in things.items():
        names.setdefault(id(thing), []).append(name)
    out: dict[str, Entry] = {}
    for name, entry in entries.items():
        for other in names[id(things[name])] if name in things else [name]:
            if out.setdefault(other, entry) != entry:
                raise ConfigError(
                    f"the pruning plan has different entries for {name} and {other}, which are one and the same in "
                    f"this network; expected equal ones"
                )
    return out
