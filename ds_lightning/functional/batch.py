"""One shape for every batch: a dictionary with one key a modality, and `label`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MODALITIES = ("image", "text", "audio", "series", "table")


def as_batch(batch: Any, modality: str = "image") -> dict[str, Tensor]:
    """Turn what a loader yields into a batch dictionary.

    Args:
        batch: a mapping (passed through as a new dict), a pair `(x, y)`, a single-element sequence `(x,)`,
            or a tensor `x`.
        modality: the key that the input of a pair or a tensor gets.

    Returns:
        The dictionary; `label` is there when the batch has labels.

    Raises:
        TypeError: when the batch has another form.

    Example:
        >>> import torch
        >>> sorted(as_batch((torch.zeros(2, 3), torch.tensor([0, 1])), modality="table"))
        ['label', 'table']
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, Tensor):
        return {modality: batch}
    if isinstance(batch, Sequence) and 1 <= len(batch) <= 2 and all(isinstance(part, Tensor) for part in batch):
        return dict(zip((modality, "label"), batch, strict=False))
    raise TypeError(
        f"batch is a {type(batch).__name__}; expected a dictionary of tensors, a pair (x, y) of tensors or a "
        "tensor; for anything else override the module's training_step or the loader's collate_fn"
    )


def labelled_batch(raw: Any) -> dict[str, Tensor]:
    """Turn what a loader yields into a batch dictionary whose labels are class indices.

    Args:
        raw: as for `as_batch`; a mixed batch has `label`, `label_mixed` (B,) and `mix`.

    Raises:
        TypeError: as `as_batch`.
        ValueError: when there is no `label`, or it holds something else, such as soft targets (B, classes).

    Example:
        >>> import torch
        >>> labelled_batch((torch.zeros(2, 3), torch.tensor([0, 1])))["label"]
        tensor([0, 1])
    """
    batch = as_batch(raw)
    if "label" not in batch:
        raise ValueError(f"the batch has the keys {sorted(batch)}; expected `label` among them")
    for name in ("label", "label_mixed"):
        label = batch.get(name)
        if label is not None and (label.dim() != 1 or label.is_floating_point()):
            raise ValueError(
                f"{name} has the shape {tuple(label.shape)} and type {label.dtype}; expected class indices (B,). "
                "Soft targets make accuracy wrong: give mixed batches as label, label_mixed and mix"
            )
    return batch


def input_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the one input of a single-modality batch.

    Args:
        batch: a batch dictionary with exactly one of the keys image, text, audio, series, table.

    Raises:
        ValueError: when there is no such key, or more than one.
    """
    found = [name for name in MODALITIES if name in batch]
    if len(found) != 1:
        raise ValueError(
            f"batch has the keys {sorted(batch)}; expected exactly one of {', '.join(MODALITIES)} as the input"
        )
    return batch[found[0]]


def restrict(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Put the outputs that a sample's task does not have at minus infinity.

    Args:
        logits: (B, num_classes).
        batch: may have `allowed`, (B, num_classes) bool: the outputs that each sample may get.

    Returns:
        (B, num_classes); `logits` itself when the batch has no `allowed`.

    Raises:
        ValueError: when `allowed` has another type or shape.

    Example:
        >>> restrict(torch.zeros(1, 2), {"allowed": torch.tensor([[True, False]])})
        tensor([[0., -inf]])
    """
    allowed = batch.get("allowed")
    if allowed is None:
        return logits
    if allowed.dtype != torch.bool or allowed.shape != logits.shape:
        raise ValueError(
            f"allowed is {allowed.dtype} of shape {tuple(allowed.shape)}; expected torch.bool of the logits' shape "
            f"{tuple(logits.shape)}: the model needs as many outputs as the data have classes"
        )
    return logits.masked_fill(~allowed, float("-inf"))
