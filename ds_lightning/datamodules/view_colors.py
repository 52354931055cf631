"""Brightness, contrast, saturation and hue of a batch, a factor for each sample, as torchvision changes one image.

All functions take images of shape (B, C, H, W), float32, 0 to 1, and overwrite them.
"""

import torch
from torch import Tensor

# ITU-R BT.601, with the digits of torchvision and PIL.
_RED, _GREEN, _BLUE = 0.2989, 0.587, 0.114


def grey_of(image: Tensor) -> Tensor:
    """Return the brightness of each pixel, (B, 1, H, W): weighted for 3 channels, the mean of any other number."""
    if image.shape[1] != 3:
        return image.mean(1, keepdim=True)
    return (image[:, 0:1] * _RED).add_(image[:, 1:2], alpha=_GREEN).add_(image[:, 2:3], alpha=_BLUE)


def adjust_brightness(image: Tensor, factor: Tensor) -> Tensor:
    """Multiply by a factor >= 0 of shape (B, 1, 1, 1) and cut to 0..1."""
    return image.mul_(factor).clamp_(0, 1)


def adjust_contrast(image: Tensor, factor: Tensor) -> Tensor:
    """Move all pixels away from the image's mean brightness by a factor >= 0 of shape (B, 1, 1, 1)."""
    mean = grey_of(image).mean((1, 2, 3), keepdim=True)
    return image.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)


def adjust_saturation(image: Tensor, factor: Tensor) -> Tensor:
    """Move the colours (B, 3, H, W) away from grey by a factor >= 0 of shape (B, 1, 1, 1)."""
    grey = grey_of(image).mul_(1 - factor)
    return image.mul_(factor).add_(grey).clamp_(0, 1)


def adjust_hue(image: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of (B, 3, H, W) by a part of the circle in [-0.5, 0.5] of shape (B, 1, 1, 1)."""
    red, green, blue = image.unbind(1)
    most = torch.maximum(red, green)
    torch.maximum(most, blue, out=most)
    chroma = torch.minimum(red, green)
    torch.minimum(chroma, blue, out=chroma)
    torch.sub(most, chroma, out=chroma)
    # A grey pixel has no hue: any will do, and it stays grey as its chroma is 0.
    inverse = chroma.clamp_min(1e-8).reciprocal_()
    sector = (red - green).mul_(inverse).add_(4)
    other = (blue - red).mul_(inverse).add_(2)
    # Fresh memory and torch.where cost several times as much as the arithmetic.
    chosen = torch.empty_like(sector)
    sector.lerp_(other, torch.eq(most, green, out=chosen))
    torch.sub(green, blue, out=other).mul_(inverse)
    sector.lerp_(other, torch.eq(most, red, out=chosen)).add_(6 * turn.view(-1, 1, 1))
    away, circles = other, chosen
    # Each channel is `most`, less the chroma by how far its own colour is away on the circle of six sectors.
    for channel, start in enumerate((3, 1, -1)):
        torch.add(sector, start, out=away)
        # Rounding is many times faster than a remainder.
        away.sub_(torch.mul(away, 1 / 6, out=circles).round_(), alpha=6).abs_().neg_().add_(2).clamp_(0, 1)
        torch.addcmul(most, away, chroma, value=-1, out=image[:, channel])
    return image.clamp_(0, 1)


def mix_grey(image: Tensor, share: Tensor) -> Tensor:
    """Replace the colours (B, 3, H, W) of the samples whose share (B, 1, 1, 1) is 1 by grey; 0 leaves them."""
    grey = grey_of(image).mul_(share)
    return image.mul_(1 - share).add_(grey)
