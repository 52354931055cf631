"""What changes between the tasks of a stream, on whole uint8 batches: pixel order, angle, blur, noise, light."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_lightning.functional.seeds import derived_seed

_OFFSETS = 1 << 20


class Shift(Protocol):
    """A fixed change of images."""

    def __call__(self, images: Tensor, rows: Tensor, salt: int) -> Tensor:
        """Return changed images.

        Args:
            images: (B, C, H, W) uint8; not written to.
            rows: which samples they are, (B,) int64.
            salt: tells the splits apart, for noise.
        """


class PixelPermutation:
    """Puts the pixels in a fixed random order, the same for all channels (arXiv 1312.6211).

    Args:
        height: of the images in pixels.
        width: of the images in pixels.
        seed: of the order.
    """

    def __init__(self, height: int, width: int, seed: int) -> None:
        self.source = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))

    def __call__(self, images: Tensor, rows: Tensor, salt: int) -> Tensor:
        """Return the images in the new order of pixels."""
        return images.flatten(2).index_select(2, self.source).view_as(images)


class Rotation:
    """Turns counter-clockwise about the centre, bilinear, black outside.

    Args:
        height: of the images in pixels.
        width: of the images in pixels.
        angle: in degrees.
    """

    def __init__(self, height: int, width: int, angle: float) -> None:
        turn = math.radians(angle)
        y = torch.arange(height, dtype=torch.float64)[:, None] - (height - 1) / 2
        x = torch.arange(width, dtype=torch.float64)[None, :] - (width - 1) / 2
        # Where each pixel comes from; y points down. In pixels, so that images that aren't square keep their shapes.
        row = math.cos(turn) * y + math.sin(turn) * x + (height - 1) / 2
        column = math.cos(turn) * x - math.sin(turn) * y + (width - 1) / 2
        grid = torch.stack([column / max(width - 1, 1), row / max(height - 1, 1)], dim=-1) * 2 - 1
        self.grid = grid.float()[None]

    def __call__(self, images: Tensor, rows: Tensor, salt: int) -> Tensor:
        """Return the turned images."""
        grid = self.grid.expand(len(images), -1, -1, -1)
        turned = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=True)
        return _to_bytes(turned)


class GaussianBlur:
    """Blurs with a Gaussian, the border repeated: one product of matrices for each axis.

    Args:
        height: of the images in pixels.
        width: of the images in pixels.
        sigma: in pixels, > 0.
    """

    def __init__(self, height: int, width: int, sigma: float) -> None:
        self.over_rows = _blur_matrix(height, sigma)
        self.over_columns = _blur_matrix(width, sigma).T

    def __call__(self, images: Tensor, rows: Tensor, salt: int) -> Tensor:
        """Return the blurred images."""
        planes = images.flatten(0, 1).float()
        # One product for each plane, so that no sample's result depends on the others in its batch.
        over_rows, over_columns = (matrix.expand(len(planes), -1, -1) for matrix in (self.over_rows, self.over_columns))
        return _to_bytes(over_rows.bmm(planes).bmm(over_columns).view(images.shape))


class GaussianNoise:
    """Adds noise that belongs to the sample: the same in every epoch, batch and process.

    A sample's noise is a stretch of one long random sequence, at a place that follows from its number and split.

    Args:
        channels: of the images.
        height: of the images in pixels.
        width: of the images in pixels.
        deviation: standard deviation, on the scale of 0 to 255.
        seed: of the noise.
    """

    def __init__(self, channels: int, height: int, width: int, deviation: float, seed: int) -> None:
        size = channels * height * width
        generator = torch.Generator().manual_seed(derived_seed(seed, "noise"))
        sequence = torch.randn(_OFFSETS + size, generator=generator).mul_(deviation)
        self.stretches = sequence.unfold(0, size, 1)
        self.seed = seed

    def __call__(self, images: Tensor, rows: Tensor, salt: int) -> Tensor:
        """Return the noisy images."""
        start = derived_seed(self.seed, "noise", salt)
        # An odd multiplier maps the numbers of up to a million samples to places of their own.
        places = (rows * 2654435761 + start) % _OFFSETS
        return _to_bytes(self.stretches[places].view(images.shape).add_(images))


class LookUp:
    """Replaces each grey value by another.

    Args:
        values: of what replaces 0 to 255: a function of a float32 tensor.
    """

    def __init__(self, values: Callable[[Tensor], Tensor]) -> None:
        self.table = _to_bytes(values(torch.arange(256, dtype=torch.float32)))

    def __call__(self, images: Tensor, rows: Tensor, salt: int) -> Tensor:
        """Return the images with the new values."""
        # NumPy's indexing takes bytes; torch's wants them as int64, which takes six times as long.
        return torch.from_numpy(self.table.numpy()[images.numpy()])


class Pixelate:
    """Gives square blocks their mean.

    Args:
        side: of a block in pixels, >= 2; blocks at the right and lower border may be smaller.
    """

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, images: Tensor, rows: Tensor, salt: int) -> Tensor:
        """Return the coarse images."""
        small = F.avg_pool2d(images.float(), self.side, ceil_mode=True)
        large = small.repeat_interleave(self.side, 2).repeat_interleave(self.side, 3)
        return _to_bytes(large[:, :, : images.shape[2], : images.shape[3]])


DOMAINS = ("clear", "blur", "noise", "contrast", "bright", "dark", "pixelate", "invert")


def domain_shift(name: str, shape: tuple[int, int, int], severity: float, seed: int) -> Shift | None:
    """Return the shift that a name of `DOMAINS` stands for; None changes nothing.

    Args:
        name: one of `DOMAINS`.
        shape: (C, H, W) of the images.
        severity: > 0; 1 is plain to see, and lets most of the picture be recognised.
        seed: of the noise.
    """
    side = min(shape[1:])
    if name == "blur":
        return GaussianBlur(*shape[1:], sigma=0.05 * severity * side)
    if name == "noise":
        return GaussianNoise(*shape, deviation=50 * severity, seed=seed)
    if name == "contrast":
        return LookUp(lambda value: 127.5 + (value - 127.5) / (1 + 2 * severity))
    if name == "bright":
        return LookUp(lambda value: value + 90 * severity)
    if name == "dark":
        return LookUp(lambda value: value / (1 + 2 * severity))
    if name == "pixelate":
        return Pixelate(max(2, round(0.1 * severity * side)))
    if name == "invert":
        return LookUp(lambda value: 255 - value)
    return None


def _to_bytes(values: Tensor) -> Tensor:
    return values.round_().clamp_(0, 255).to(torch.uint8)


def _blur_matrix(size: int, sigma: float) -> Tensor:
    radius = max(1, math.ceil(3 * sigma))
    place = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (place / sigma) ** 2)
    source = (torch.arange(size)[:, None] + place).clamp(0, size - 1)
    return torch.zeros(size, size).scatter_add_(1, source, (weights / weights.sum()).expand(size, -1))
