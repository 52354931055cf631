"""What a multimodal batch holds: an input and a mask for each modality, which of them are there, and labels."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_lightning.errors import ConfigError

#: Modalities that are padded, and the key of the mask of their real frames; a text's padding is token 0.
_MASKS = {"audio": "audio_mask", "series": "series_mask"}


def presence(
    batch: Mapping[str, Tensor], modalities: Sequence[str], used: Sequence[str]
) -> tuple[Tensor, Tensor | None]:
    """Return which of the used modalities each sample has, (B, U) bool, on the batch's device and on the CPU.

    Args:
        batch: has a key for each used modality, and may have `present`; without it all are there, and the second
            result is None.
        modalities: names of the columns of `present`.
        used: those that are looked at.

    Raises:
        ConfigError: when `present` has another form, a modality that is present has no key, or sizes differ.
    """
    given = [name for name in used if name in batch]
    if not given:
        raise ConfigError(f"the batch has the keys {sorted(batch)}; expected {', '.join(used)} among them")
    size, device = len(batch[given[0]]), batch[given[0]].device
    present, on_host = batch.get("present"), None
    if present is None:
        present = torch.ones(size, len(used), dtype=torch.bool, device=device)
    else:
        if present.dtype != torch.bool or present.shape != (size, len(modalities)):
            raise ConfigError(
                f"present is {present.dtype} of shape {tuple(present.shape)}; expected torch.bool of shape "
                f"{(size, len(modalities))}, with the columns {', '.join(modalities)}"
            )
        columns = [modalities.index(name) for name in used]
        if len(columns) < len(modalities):
            present = present[:, columns]
        on_host = present.cpu()
    for column, name in enumerate(used):
        if name in batch and len(batch[name]) != size:
            raise ConfigError(f"the batch has {size} of {given[0]} and {len(batch[name])} of {name}; expected as many")
        if name not in batch and (on_host is None or bool(on_host[:, column].any())):
            raise ConfigError(
                f"the batch has no {name}, only {', '.join(given)}; give it, or `present` (B, {len(modalities)}) bool "
                f"with False for {name}"
            )
    return present, on_host


def mask_of(batch: Mapping[str, Tensor], modality: str) -> Tensor | None:
    """Return which frames or tokens of a modality are real, (B, T) bool; None: all of them.

    Raises:
        ConfigError: when the mask has another form.
    """
    if modality == "text":
        text = batch["text"]
        # Features that were computed before have no padding.
        return None if text.is_floating_point() else text != 0
    key = _MASKS.get(modality, "")
    mask = batch.get(key)
    if mask is None:
        return None
    frames = batch[modality].shape[-1]
    if mask.dtype != torch.bool or mask.shape != (len(batch[modality]), frames):
        raise ConfigError(
            f"{key} is {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of shape "
            f"{(len(batch[modality]), frames)}, True for a real frame"
        )
    return mask


def check_labels(batch: Mapping[str, Tensor], size: int, num_classes: int, multilabel: bool) -> None:
    """Refuse labels that are not class indices (B,), or with `multilabel` not 0 to 1 for each class (B, C) float.

    Args:
        batch: has `label`, and when it is mixed `label_mixed` and `mix`.
        size: B.
        num_classes: C.
        multilabel: whether a sample can have several classes.

    Raises:
        ConfigError: one line that says what they are.
    """
    if "label" not in batch:
        raise ConfigError(f"the batch has the keys {sorted(batch)}; expected `label` among them")
    if ("mix" in batch) != ("label_mixed" in batch):
        raise ConfigError(f"the batch has the keys {sorted(batch)}; a mixed batch needs `mix` and `label_mixed`")
    if "mix" in batch and batch["mix"].shape != (size,):
        raise ConfigError(f"mix has the shape {tuple(batch['mix'].shape)}; expected one weight a sample, {(size,)}")
    shape = (size, num_classes) if multilabel else (size,)
    expected = f"float {shape}, 1 for each class that a sample has" if multilabel else f"class indices {shape}"
    hint = "" if multilabel else "; several classes a sample need multilabel=True"
    for name in ("label", "label_mixed"):
        label = batch.get(name)
        if label is None:
            continue
        if label.shape != shape or label.is_floating_point() != multilabel:
            raise ConfigError(f"{name} is {label.dtype} of shape {tuple(label.shape)}; expected {expected}{hint}")
        # Elsewhere this would wait for the accelerator, which refuses a wrong class by itself.
        if label.device.type == "cpu" and len(label):
            low, high, most = label.min().item(), label.max().item(), 1 if multilabel else num_classes - 1
            if not (low >= 0 and high <= most):
                raise ConfigError(f"{name} goes from {low} to {high}; expected 0 to {most}")
