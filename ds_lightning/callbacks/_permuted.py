"""Batches in which one modality's values are dealt out anew."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_lightning.errors import ConfigError
from ds_lightning.functional.seeds import derived_seed


def permuted_batches(batches: list[dict[str, Any]], name: str, column: int) -> list[dict[str, Any]]:
    """Return the batches with one modality permuted among all their samples that have it; who has it stays.

    The permutation is the same at every call with as many samples, so that epochs can be compared.

    Args:
        batches: dictionaries on the CPU, with `name` (B, ...), `<name>_mask` (B, T) and `present` where they have it.
        name: of the modality.
        column: of `present`.

    Raises:
        ConfigError: images or tables of several shapes.
    """
    holders = [batch for batch in batches if name in batch]
    if len(holders) < len(batches):
        changed_holders = iter(permuted_batches(holders, name, column) if holders else ())
        return [next(changed_holders) if name in batch else batch for batch in batches]
    if name in ("image", "table") and len({batch[name].shape[1:] for batch in batches}) > 1:
        raise ConfigError(
            f"AttentionMaps deals {name} out among batches, and their shapes differ; expected one size, or "
            "importance=False"
        )
    have = torch.cat([_present(batch, name, column) for batch in batches])
    owners = have.nonzero()[:, 0]
    generator = torch.Generator().manual_seed(derived_seed(0, "permuted", name))
    source = torch.arange(len(have))
    source[owners] = owners[torch.randperm(len(owners), generator=generator)]
    sizes = [len(batch[name]) for batch in batches]

    def dealt(parts: list[Tensor]) -> Sequence[Tensor]:
        return torch.split(torch.cat(_even(parts))[source], sizes)

    changed = {name: dealt([batch[name] for batch in batches])}
    masked = any(batch.get(f"{name}_mask") is not None for batch in batches)
    if name in ("audio", "series") and (masked or len({batch[name].shape[-1] for batch in batches}) > 1):
        changed[f"{name}_mask"] = dealt([_mask(batch, name) for batch in batches])
    return [{**batch, **{key: parts[number] for key, parts in changed.items()}} for number, batch in enumerate(batches)]


def _present(batch: dict[str, Any], name: str, column: int) -> Tensor:
    present: Tensor | None = batch.get("present")
    return torch.ones(len(batch[name]), dtype=torch.bool) if present is None else present[:, column]


def _mask(batch: dict[str, Any], name: str) -> Tensor:
    mask: Tensor | None = batch.get(f"{name}_mask")
    return torch.ones(len(batch[name]), batch[name].shape[-1], dtype=torch.bool) if mask is None else mask


def _even(parts: list[Tensor]) -> list[Tensor]:
    """Pad the last dimension with zeros to the longest."""
    longest = max(part.shape[-1] for part in parts)
    return [F.pad(part, (0, longest - part.shape[-1])) for part in parts]
