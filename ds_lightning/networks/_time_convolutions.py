"""Strided convolutions over time that padding can't reach."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_lightning.networks._positions import line_positions


class TimeConvolutions(nn.Module):
    """(B, channels, T) -> tokens (B, ceil(T / 2**depth), width), each a window of 2**depth frames.

    A stage is a convolution that halves the time and one that is added to what it gets; norms are over the channels
    of one frame. Frames that are not real are zero before each convolution, as what lies past the end is.

    Args:
        channels: of the input, at least 1.
        width: features of a token, at least 1.
        depth: stages, at least 1.
        dropout: probability of dropping a feature after a stage, in [0, 1).
        name: what the input is called in messages.
    """

    def __init__(self, channels: int, width: int, depth: int, dropout: float, name: str) -> None:
        super().__init__()
        self.channels, self.name = channels, name
        inputs = [channels, *[width] * (depth - 1)]
        self.halving = nn.ModuleList(nn.Conv1d(fan_in, width, 3, stride=2, padding=1) for fan_in in inputs)
        self.halving_norms = nn.ModuleList(nn.LayerNorm(width) for _ in inputs)
        self.mixing = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in inputs)
        self.mixing_norms = nn.ModuleList(nn.LayerNorm(width) for _ in inputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return tokens and their mask (B, N) bool; a token is real where its window has a real frame."""
        if x.dim() != 3 or x.shape[1] != self.channels or x.shape[2] < 1 or not x.is_floating_point():
            raise ValueError(
                f"{self.name} has the shape {tuple(x.shape)} and type {x.dtype}; "
                f"expected float (B, {self.channels}, T) with T at least 1"
            )
        check_mask(mask, (x.shape[0], x.shape[2]), self.name)
        layers = zip(self.halving, self.halving_norms, self.mixing, self.mixing_norms, strict=True)
        for halving, halving_norm, mixing, mixing_norm in layers:
            x = F.gelu(_normed(halving_norm, halving(_zeroed(x, mask))))
            if mask is not None:
                mask = F.max_pool1d(mask[:, None].float(), 2, ceil_mode=True)[:, 0] > 0
            x = self.dropout(x + F.gelu(_normed(mixing_norm, mixing(_zeroed(x, mask)))))
        tokens = x.transpose(1, 2)
        return tokens + line_positions(tokens.shape[1], tokens.shape[2], tokens), mask


def check_mask(mask: Tensor | None, shape: tuple[int, int], name: str) -> None:
    """Raise ValueError when a mask is there and is not bool of this shape."""
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != shape):
        raise ValueError(
            f"the mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of shape {shape}"
        )


def _zeroed(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask[:, None], 0.0)


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = norm(x.transpose(1, 2)).transpose(1, 2)
    return out
