"""SpecAugment: bands and stretches of a spectrogram that training doesn't see."""

import torch
from torch import Tensor


class SpecAugment:
    """Puts 0, the mean after standardising, in random bands and frames of a spectrogram (arXiv 1904.08779).

    Args:
        frequency: the most mel bands that a mask covers, >= 0.
        time: the most frames that a mask covers, >= 0; never more than half of a sample's.
        masks: how many of each kind, >= 1.

    Example:
        >>> SpecAugment(frequency=4)(torch.ones(8, 20)).shape
        torch.Size([8, 20])
    """

    def __init__(self, frequency: int = 0, time: int = 0, masks: int = 1) -> None:
        self.frequency = frequency
        self.time = time
        self.masks = masks

    def __call__(self, mel: Tensor) -> Tensor:
        """Return the masked copy of (mels, T); the numbers are of torch's global generator."""
        mel = mel.clone()
        # A short sample would be lost under a mask of its whole length.
        time = min(self.time, mel.shape[1] // 2)
        # All at once: a call of torchaudio's masks a time takes five times as long.
        for draws in torch.rand(self.masks, 4).tolist():
            mel[_stretch(min(self.frequency, mel.shape[0]), mel.shape[0], *draws[:2])] = 0
            mel[:, _stretch(time, mel.shape[1], *draws[2:])] = 0
        return mel


def _stretch(most: int, size: int, width: float, place: float) -> slice:
    """Return 0 to `most` of `size` positions, each number and each place equally likely, from two numbers in [0, 1)."""
    length = int(width * (most + 1))
    start = int(place * (size - length + 1))
    return slice(start, start + length)
