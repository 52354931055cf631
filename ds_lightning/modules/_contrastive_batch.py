"""The two sides of a contrastive batch, and which of its samples show the same thing."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_lightning.errors import ConfigError
from ds_lightning.functional.batch import as_batch, input_of

#: The key of the one encoder that sees both views.
VIEWS = "views"


def two_sides(batch: Any, modalities: tuple[str, ...] | None) -> tuple[Tensor, Tensor]:
    """Return what the loss compares, row by row: two tensors (B, ...).

    Args:
        batch: `first` and `second`, a batch each; for pairs, a batch with both modalities.
        modalities: the two of pairs; None: views.

    Raises:
        ConfigError: when it holds something else.
    """
    keys = sorted(batch) if isinstance(batch, Mapping) else f"of a {type(batch).__name__}"
    wanted = modalities or ("first", "second")
    if not isinstance(batch, Mapping) or not set(wanted) <= set(batch):
        hint = "Pairs" if modalities else "ContrastiveViews; for two modalities give two encoders"
        raise ConfigError(f"the batch has the keys {keys}; expected `{wanted[0]}` and `{wanted[1]}`: use {hint}")
    first, second = (batch[name] if modalities else single_input(batch[name]) for name in wanted)
    if len(first) != len(second):
        raise ConfigError(f"the batch has {len(first)} of `{wanted[0]}` and {len(second)} of `{wanted[1]}`")
    return first, second


def single_input(batch: Any) -> Tensor:
    """Return the one input (B, ...) of a batch, also of `(x, y)`."""
    return input_of(as_batch(batch))


def sample_ids(batch: Mapping[str, Any], size: int, device: torch.device, rank: int = 0) -> Tensor:
    """Return a number for each sample (B,), the same for those that show the same thing.

    Args:
        batch: has `group` or `label`, (B,) int64; negative numbers are unknown, and get one of their own.
        size: B.
        device: of the result.
        rank: of this process, when ids of several are compared.

    Raises:
        ConfigError: when it has neither.
    """
    ids = batch.get("group", batch.get("label"))
    if ids is None:
        raise ConfigError(f"the batch has the keys {sorted(batch)}; mask_same needs `group` or `label` among them")
    own = -1 - (rank * size + torch.arange(size, device=device))
    return torch.where(ids < 0, own, ids)
