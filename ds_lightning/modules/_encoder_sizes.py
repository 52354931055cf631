"""The option of an encoder given by name that has no good default, and is read from the data."""

from collections.abc import Callable
from typing import Any

from torch import nn

from ds_lightning.errors import ConfigError

_SIZES = {"image": "in_channels", "text": "vocab_size", "audio": "mels", "series": "channels", "table": "columns"}


def _option(modality: str, encoder: str | nn.Module | None) -> str:
    return "width_in" if encoder == "features" else _SIZES[modality]


def size_is_known(modality: str, encoder: str | nn.Module | None, options: dict[str, Any]) -> bool:
    """Return whether an encoder can be built without asking the DataModule.

    Args:
        modality: its modality.
        encoder: a name, a module, or None for the usual one.
        options: the user's.
    """
    return isinstance(encoder, nn.Module) or _option(modality, encoder) in options


def sizes_in_data(
    modality: str, encoder: str | nn.Module | None, attribute: Callable[[str], Any | None]
) -> dict[str, int]:
    """Return the options of an encoder that the DataModule says.

    Args:
        modality: its modality.
        encoder: a name, or None for the usual one.
        attribute: gives the DataModule's attribute of a name, or None.

    Raises:
        ConfigError: when it does not say.
    """
    option = _option(modality, encoder)
    shape = (attribute("input_shapes") or {}).get(modality)
    found = attribute("vocab_size") if option == "vocab_size" else shape and shape[0]
    if found is None:
        raise ConfigError(
            f"{option} of the {modality} encoder is neither given nor known from the DataModule; give "
            f"encoder_options={{{modality!r}: {{{option!r}: ...}}}}"
        )
    sizes = {option: int(found)}
    if option == "in_channels" and shape is not None and len(shape) == 3:
        sizes["image_size"] = int(shape[1])
    return sizes
