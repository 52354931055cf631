"""A small encoder of log-mel spectrograms."""

from torch import Tensor, nn

from ds_lightning.networks._ranges import check_ranges
from ds_lightning.networks._time_convolutions import TimeConvolutions


class AudioEncoder(nn.Module):
    """Strided convolutions over the time of a log-mel spectrogram; padding changes nothing.

    Args:
        mels: mel bands of the spectrogram, at least 1.
        width: features of a token, at least 1.
        depth: stages, at least 1; each halves the time.
        dropout: probability of dropping a feature after a stage, in [0, 1).

    Attributes:
        num_features: `width`.

    Raises:
        ValueError: when an argument is outside its range; in `forward`, when the input has another shape.

    Example:
        >>> import torch
        >>> tokens, mask = AudioEncoder()(torch.zeros(2, 40, 100))
        >>> tokens.shape
        torch.Size([2, 13, 128])
    """

    def __init__(self, mels: int = 40, width: int = 128, depth: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        check_ranges({"mels": mels, "width": width, "depth": depth}, dropout)
        self.num_features = width
        self.stages = TimeConvolutions(mels, width, depth, dropout, "audio")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Map spectrograms (B, mels, T) to tokens (B, N, width) and their mask (B, N), or None without a mask.

        Args:
            x: the log-mel spectrograms.
            mask: (B, T) bool, True for a real frame; None when all are.
        """
        out: tuple[Tensor, Tensor | None] = self.stages(x, mask)
        return out
