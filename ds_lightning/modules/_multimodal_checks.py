"""What `MultimodalFusion` refuses in its arguments."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from ds_lightning.errors import ConfigError
from ds_lightning.functional.batch import MODALITIES


def check_encoders(
    encoders: Mapping[str, str | nn.Module | None],
    options: Mapping[str, Mapping[str, Any]],
    freeze: Sequence[str],
    fusion: str,
    single: str | None,
) -> None:
    """Refuse modalities that are unknown or not there.

    Raises:
        ConfigError: one line that names the argument.
    """
    if not isinstance(encoders, Mapping):
        raise ConfigError(f"encoders is a {type(encoders).__name__}; expected a dictionary, modality -> encoder")
    if isinstance(freeze, str):
        raise ConfigError(f"freeze is {freeze!r}; expected a list, [{freeze!r}]")
    if not encoders:
        raise ConfigError(f"encoders is empty; expected a dictionary with keys among {', '.join(MODALITIES)}")
    _check_names("encoders", encoders, MODALITIES)
    _check_names("encoder_options", options, encoders)
    _check_names("freeze", freeze, encoders)
    if fusion not in ("cross", "late", "single"):
        raise ConfigError(f"fusion is {fusion!r}; expected 'cross', 'late' or 'single'")
    if fusion != "single":
        if single is not None:
            raise ConfigError(f"single is {single!r} and fusion {fusion!r}; it needs fusion='single'")
        return
    if single is None and len(encoders) > 1:
        raise ConfigError(f"fusion is 'single', and single is not given; expected one of {', '.join(encoders)}")
    if single is not None:
        _check_names("single", (single,), encoders)


def _check_names(argument: str, names: Collection[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected some of {', '.join(known)}"
            raise ConfigError(f"{argument} has {name!r}; {hint}")


def check_classes(num_classes: int, multilabel: bool) -> None:
    """Refuse less than 2 classes, or with `multilabel` less than 1.

    Raises:
        ConfigError: one line.
    """
    least = 1 if multilabel else 2
    if num_classes < least:
        raise ConfigError(f"num_classes is {num_classes}; expected at least {least}")


def check_numbers(width: int, heads: int, depth: int, auxiliary: float, shares: Mapping[str, float]) -> None:
    """Refuse numbers outside their range.

    Args:
        width: a multiple of `heads`.
        heads: at least 1.
        depth: at least 1.
        auxiliary: at least 0.
        shares: name -> probability in [0, 1).

    Raises:
        ConfigError: one line that names the argument.
    """
    for name, value in (("width", width), ("heads", heads), ("depth", depth)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} is {value!r}; expected at least 1, a whole number")
    if width % heads:
        raise ConfigError(f"width is {width}; expected a multiple of heads, {heads}")
    if not 0.0 <= auxiliary < float("inf"):
        raise ConfigError(f"auxiliary is {auxiliary}; expected a weight of at least 0")
    for name, share in shares.items():
        if not 0.0 <= share < 1.0:
            raise ConfigError(f"{name} is {share}; expected a probability in [0, 1)")
