"""What the contrastive losses accept."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ds_lightning.errors import NoEffectWarning
from ds_lightning.functional._first_order import first_order


def check_embeddings(first: Tensor, second: Tensor, name: str, other: str) -> None:
    """Two floating matrices of one shape and device, with at least one row."""
    if first.ndim != 2 or first.shape != second.shape or first.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(first.shape)}, {other} {tuple(second.shape)}; expected the same shape (N, D), "
            "with at least one row"
        )
    if not first.is_floating_point() or not second.is_floating_point():
        raise ValueError(f"{name} is {first.dtype}, {other} {second.dtype}; expected floating embeddings")
    if first.device != second.device:
        raise ValueError(f"{name} is on {first.device}, {other} on {second.device}; move one of them")


def check_settings(
    temperature: float | Tensor,
    chunk_size: int | None,
    same: Tensor | None,
    hardness: float,
    gather: bool,
    embeddings: Tensor,
) -> None:
    """Ranges, and the shape of `same`."""
    value = temperature_value(temperature)
    if isinstance(temperature, Tensor) and (temperature.numel() != 1 or not temperature.is_floating_point()):
        raise ValueError(f"temperature has shape {tuple(temperature.shape)}; expected a floating scalar")
    if value is not None and not (0 < value < math.inf):
        raise ValueError(f"temperature is {value}; expected a number greater than 0")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected at least 1, or None")
    if not 0 <= hardness < math.inf:
        raise ValueError(f"hardness is {hardness}; expected a number of at least 0")
    if same is None:
        return
    n = len(embeddings)
    if same.device != embeddings.device:
        raise ValueError(f"same is on {same.device}, the embeddings on {embeddings.device}; move it")
    if same.ndim == 2 and gather:
        raise ValueError("same is a matrix, which knows nothing of other ranks; with gather=True give ids, shape (N,)")
    ids = same.shape == (n,) and not same.is_floating_point() and same.dtype != torch.bool
    if not ids and not (same.shape == (n, n) and same.dtype == torch.bool):
        raise ValueError(
            f"same is {same.dtype} of shape {tuple(same.shape)}; expected ids, int64 ({n},), or bool ({n}, {n})"
        )


def warn_alone(stacklevel: int) -> None:
    """Say that a batch of one has nothing to tell its positive from."""
    warnings.warn(
        "a batch of one sample has no negatives: its contrastive loss is 0 and teaches nothing; set drop_last=True "
        "or a larger batch",
        NoEffectWarning,
        stacklevel=stacklevel + 1,
    )


def temperature_value(temperature: float | Tensor) -> float | None:
    """The value where it costs nothing to know: on a GPU the host would have to wait for it."""
    if isinstance(temperature, Tensor):
        known = temperature.device.type == "cpu" and temperature.numel() == 1
        return float(temperature.detach()) if known else None
    return float(temperature)


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length one, in float32 or float64; a row of zeros stays zero and gets no gradient."""
    unit: Tensor = _UnitRows.apply(x)
    return unit


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # The largest entry first: squares of very small or very large entries would under- or overflow.
        largest = wide.abs().amax(1, keepdim=True)
        unit = wide / torch.where(largest > 0, largest, 1)
        length = torch.linalg.vector_norm(unit, dim=1, keepdim=True).clamp_min_(1)
        unit /= length
        ctx.save_for_backward(unit, largest * length)
        ctx.dtype = x.dtype
        return unit

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        unit, length = ctx.saved_tensors
        along = torch.linalg.vecdot(grad_output, unit).unsqueeze(1)
        gradient = torch.addcmul(grad_output, unit, along, value=-1)
        gradient /= torch.where(length > 0, length, torch.inf)
        return gradient.to(ctx.dtype)
