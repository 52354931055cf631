"""Names of classes as numbers, and a split that holds each class in its share."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ds_lightning.errors import ConfigError
from ds_lightning.functional.seeds import derived_seed

from .streams import stratified_order


def class_names_of(labels: Iterable[Sequence[str]]) -> list[str]:
    """Return the classes of some rows, numbers by their value before all others.

    Example:
        >>> class_names_of([["10"], ["9"], ["cat"]])
        ['9', '10', 'cat']
    """
    found = {name for names in labels for name in names}
    return sorted(found, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))


def label_tensor(labels: Sequence[Sequence[str]], class_names: Sequence[str], *, multilabel: bool) -> Tensor:
    """Return class indices (N,) int64; in multi-label 1 for each class of a row, (N, classes) float32.

    Example:
        >>> label_tensor([["b"], ["a", "b"]], ["a", "b"], multilabel=True).tolist()
        [[0.0, 1.0], [1.0, 1.0]]
    """
    numbers = {name: number for number, name in enumerate(class_names)}
    if not multilabel:
        return torch.tensor([numbers[name] for (name,) in labels], dtype=torch.int64)
    several = torch.zeros(len(labels), len(class_names))
    for row, names in enumerate(labels):
        several[row, [numbers[name] for name in names]] = 1
    return several


def held_out(labels: Tensor, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices for training and for validation, each class in its share.

    Args:
        labels: (N,) int64, or (N, classes) in multi-label, which plays no part.
        val_fraction: in (0, 1).
        seed: the user's seed.

    Raises:
        ConfigError: one of the two would be empty.
    """
    rows = len(labels)
    held = round(val_fraction * rows)
    if not 0 < held < rows:
        raise ConfigError(
            f"val_fraction is {val_fraction}, which leaves {held} of {rows} rows for validation; choose one that "
            "leaves some for both validation and training, or give val_path"
        )
    generator = torch.Generator().manual_seed(derived_seed(seed, "split"))
    order = stratified_order(labels if labels.ndim == 1 else torch.zeros(rows, dtype=torch.int64), generator)
    return order[held:], order[:held]


def held_by_name(names: Sequence[str], val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices for training and for validation by the names alone: a row stays where it is as others come.

    Args:
        names: of the rows.
        val_fraction: in (0, 1).
        seed: the user's seed.
    """
    held = torch.tensor([derived_seed(seed, "split", name) < val_fraction * 2**31 for name in names], dtype=torch.bool)
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]
