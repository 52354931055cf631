"""A small encoder of time series."""

from torch import Tensor, nn

from ds_lightning.networks._ranges import check_ranges
from ds_lightning.networks._time_convolutions import TimeConvolutions


class SeriesEncoder(nn.Module):
    """Strided convolutions over time; padding changes nothing.

    Args:
        channels: of the series, at least 1.
        width: features of a token, at least 1.
        depth: stages, at least 1; each halves the time.
        dropout: probability of dropping a feature after a stage, in [0, 1).

    Attributes:
        num_features: `width`.

    Raises:
        ValueError: when an argument is outside its range; in `forward`, when the input has another shape.

    Example:
        >>> import torch
        >>> tokens, mask = SeriesEncoder(3)(torch.zeros(2, 3, 50))
        >>> tokens.shape
        torch.Size([2, 13, 128])
    """

    def __init__(self, channels: int, width: int = 128, depth: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        check_ranges({"channels": channels, "width": width, "depth": depth}, dropout)
        self.num_features = width
        self.stages = TimeConvolutions(channels, width, depth, dropout, "series")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Map series (B, channels, T) to tokens (B, N, width) and their mask (B, N), or None without a mask.

        Args:
            x: the series.
            mask: (B, T) bool, True for a real frame; None when all are.
        """
        out: tuple[Tensor, Tensor | None] = self.stages(x, mask)
        return out
