"""Fixed sine and cosine positions, which fit any length."""

import math

import torch
from torch import Tensor


def line_positions(length: int, width: int, like: Tensor) -> Tensor:
    """Return (length, width): sines, then cosines, of wavelengths from 2 pi to 10,000 times that (arXiv:1706.03762).

    Args:
        length: number of places, at least 1.
        width: features of a place, at least 1.
        like: gives the device and type.
    """
    half = (width + 1) // 2
    place = torch.arange(length, device=like.device, dtype=torch.float32)
    rate = torch.exp(torch.arange(half, device=like.device, dtype=torch.float32) * (-math.log(10_000.0) / half))
    angle = place[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width].to(like.dtype)


def grid_positions(height: int, width: int, features: int, like: Tensor) -> Tensor:
    """Return (height * width, features): the first half of the features tells the row, the second the column."""
    first = (features + 1) // 2
    rows = line_positions(height, first, like)[:, None].expand(-1, width, -1)
    columns = line_positions(width, first, like)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)[:, :features]
