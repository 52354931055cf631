"""What a module attends to in validation batches: the sums of its matrices, and single samples."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from ds_lightning.errors import ConfigError
from ds_lightning.functional.batch import MODALITIES

# Half precision sums up to 1 only so far.
_TOLERANCE = 0.02


@dataclass
class Sample:
    """One sample with its attention, on the CPU.

    `inputs` has a row of each modality that the sample has, `masks` the real frames where they are known, `tokens` the
    fused token's attention (N,).
    """

    names: tuple[str, ...]
    matrix: Tensor
    inputs: dict[str, Tensor]
    masks: dict[str, Tensor]
    tokens: dict[str, Tensor]
    label: int | list[int] | None

    def as_json(self) -> dict[str, Any]:
        """Return the attention as plain Python; rows of absent modalities are None."""
        present = ["fused", *self.inputs]
        matrix = self.matrix.tolist()
        return {
            "label": self.label,
            "present": list(self.inputs),
            "matrix": [row if name in present else None for name, row in zip(self.names, matrix, strict=True)],
            "tokens": {name: values.tolist() for name, values in self.tokens.items()},
        }


@dataclass
class Seen:
    """Over the samples: the rows' sums (M+1, M+1) and in how many samples each row counts (M+1,), float64."""

    names: tuple[str, ...]
    rows_sum: Tensor
    rows_count: Tensor
    samples: list[Sample]


def checked_batch(batch: Any) -> dict[str, Any]:
    """Return the batch as a new dictionary; refuse another form."""
    if not isinstance(batch, Mapping) or not any(name in batch for name in MODALITIES):
        got = f"the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise ConfigError(f"AttentionMaps got {got}; expected a dictionary with keys among {', '.join(MODALITIES)}")
    return dict(batch)


def copied(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy on the CPU: the loader may use its own tensors again."""
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def present_of(batch: Mapping[str, Any], modalities: int) -> Tensor:
    """Return which modalities each sample has, (B, M) bool; all where the batch doesn't say."""
    present: Tensor | None = batch.get("present")
    if present is None:
        first = next(batch[name] for name in MODALITIES if name in batch)
        return torch.ones(len(first), modalities, dtype=torch.bool, device=first.device)
    if present.dtype != torch.bool or present.dim() != 2 or present.shape[1] != modalities:
        raise ConfigError(
            f"present is {present.dtype} of shape {tuple(present.shape)}; expected torch.bool (B, {modalities}), a "
            "column for each modality of attention_maps"
        )
    return present


def look(module: Any, batches: list[dict[str, Any]], samples: int) -> Seen:
    """Ask the module for its attention to the batches; keep the first samples.

    Raises:
        ConfigError: `attention_maps` gave something else than the callback's docstring asks for.
    """
    seen: Seen | None = None
    for held in batches:
        found = module.attention_maps(move_data_to_device(held, module.device))
        names, matrix, tokens = _checked(found, held)
        rows = len(names)
        if seen is None:
            seen = Seen(names, torch.zeros(rows, rows).double(), torch.zeros(rows).double(), [])
        present = present_of(held, rows - 1)
        # A modality of which a sample has nothing but padding attends to nothing.
        attends = present & (matrix[:, 1:] != 0).any(dim=2)
        counts = torch.cat([torch.ones(len(present), 1, dtype=torch.bool), attends], dim=1)
        # What an absent modality's row holds is of no interest, and may be NaN.
        matrix = torch.where(counts[:, :, None], matrix, 0.0)
        off = (matrix.sum(dim=2) - 1).abs()[counts].max()
        if not off <= _TOLERANCE:
            raise ConfigError(
                f"attention_maps of {type(module).__name__} has a row whose sum is {float(off):.3g} off 1; expected "
                "rows of present modalities that sum to 1"
            )
        seen.rows_sum += matrix.sum(dim=0)
        seen.rows_count += counts.sum(dim=0)
        for index in range(min(samples - len(seen.samples), len(matrix))):
            seen.samples.append(_sample(held, names, matrix, tokens, present, index))
    assert seen is not None
    return seen


def _checked(found: Any, batch: Mapping[str, Any]) -> tuple[tuple[str, ...], Tensor, dict[str, Tensor]]:
    wanted = 'names ("fused", *modalities), matrix (B, M+1, M+1) and tokens {modality: (B, N)}'
    try:
        names, matrix = tuple(found.names), found.matrix.detach().cpu().double()
        tokens = {name: values.detach().cpu().float() for name, values in found.tokens.items()}
    except AttributeError as error:
        raise ConfigError(f"attention_maps gave a {type(found).__name__}; expected {wanted}") from error
    size = len(next(batch[name] for name in MODALITIES if name in batch))
    there = present_of(batch, len(names) - 1).any(dim=0).tolist()
    missing = [name for name, is_there in zip(names[1:], there, strict=True) if is_there and name not in batch]
    fit = all(values.dim() == 2 and len(values) == size for values in tokens.values())
    if matrix.shape != (size, len(names), len(names)) or missing or not fit:
        shapes = {name: tuple(values.shape) for name, values in tokens.items()}
        raise ConfigError(
            f"attention_maps gave names {names}, a matrix {tuple(matrix.shape)} and tokens {shapes} for {size} "
            f"samples with the keys {sorted(batch)}; expected {wanted}"
        )
    return names, matrix, tokens


def _sample(
    batch: Mapping[str, Any],
    names: tuple[str, ...],
    matrix: Tensor,
    tokens: Mapping[str, Tensor],
    present: Tensor,
    index: int,
) -> Sample:
    there = [name for name, is_there in zip(names[1:], present[index].tolist(), strict=True) if is_there]
    label = batch.get("label")
    return Sample(
        names,
        matrix[index],
        {name: batch[name][index] for name in there},
        {name: batch[f"{name}_mask"][index] for name in there if batch.get(f"{name}_mask") is not None},
        {name: tokens[name][index] for name in there if name in tokens},
        label[index].long().tolist() if isinstance(label, Tensor) else None,
    )
