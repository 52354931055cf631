"""Random views of a batch of images on its device: one draw for each sample, and no loop over samples."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_lightning.errors import ConfigError
from ds_lightning.functional.seeds import derived_seed

from .view_colors import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation, mix_grey

_ATTEMPTS = 10
_ADJUST = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


class ViewDraw(NamedTuple):
    """What is random in one view of B images.

    `numbers` is (B, 11) float32 on the CPU: top, left, height and width of the crop in pixels; 1 if mirrored; factors
    of brightness, contrast and saturation; turn of the hue; 1 if grey; sigma of the blur in pixels, 0 for none.
    `order` is that of the four colour changes, one for the batch.
    """

    numbers: Tensor
    order: tuple[int, ...]


class BatchViews:
    """Random resized crop, mirror image, colour jitter, grey and blur: SimCLR's augmentation (arXiv 2002.05709).

    The same distributions and formulas as torchvision's, with one grid for the whole batch. A draw depends on the
    seed alone. Images with 1 channel get brightness and contrast only; those with another number than 1 or 3, too.

    Args:
        crop_scale: the least and the greatest share of the area that a crop has, 0 < least <= greatest <= 1. SimCLR
            takes (0.08, 1); (0.2, 1) is usual for small images.
        crop_ratio: the least and the greatest width / height of a crop, > 0.
        flip: mirror each view with probability one half.
        color: strength s of the colour jitter, in [0, 2.5]: brightness, contrast and saturation change by factors of
            1 - 0.8 s to 1 + 0.8 s, the hue by up to 0.2 s of the circle. SimCLR takes 0.5 for CIFAR, 1 for ImageNet.
        color_probability: the chance of a view to be jittered, in [0, 1].
        grayscale: the chance to lose the colours, in [0, 1].
        blur: the chance to be blurred, in [0, 1]; SimCLR takes 0.5 for ImageNet and 0 for CIFAR.
        blur_sigma: the least and the greatest sigma of the blur in pixels, > 0; the kernel is a tenth of the shorter
            side, at least 3 and odd.

    Raises:
        ConfigError: an argument out of its range.

    Example:
        >>> views = BatchViews(blur=0.5)
        >>> first, second = views.pair(torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), seed=0)
        >>> first.shape, first.dtype
        (torch.Size([4, 3, 32, 32]), torch.float32)
    """

    def __init__(
        self,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        color: float = 0.5,
        color_probability: float = 0.8,
        grayscale: float = 0.2,
        blur: float = 0.0,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
    ) -> None:
        for name, value, most in (
            ("crop_scale", crop_scale, 1.0),
            ("crop_ratio", crop_ratio, math.inf),
            ("blur_sigma", blur_sigma, math.inf),
        ):
            if len(value) != 2 or not (0 < value[0] <= value[1] <= most and math.isfinite(value[1])):
                end = "1" if most == 1 else "any number"
                raise ConfigError(f"{name} is {list(value)}; expected two numbers, 0 < least <= greatest <= {end}")
        if not 0 <= color <= 2.5:
            raise ConfigError(f"color is {color}; expected a strength in [0, 2.5], where 0 is off")
        for name, chance in (("color_probability", color_probability), ("grayscale", grayscale), ("blur", blur)):
            if not 0 <= chance <= 1:
                raise ConfigError(f"{name} is {chance}; expected a probability in [0, 1]")
        self.crop_scale = crop_scale
        self.crop_ratio = crop_ratio
        self.flip = flip
        self.color = color
        self.color_probability = color_probability
        self.grayscale = grayscale
        self.blur = blur
        self.blur_sigma = blur_sigma

    @property
    def changes_nothing(self) -> bool:
        """Whether every view is the image itself."""
        whole = self.crop_scale[0] == 1
        jitter = self.color > 0 and self.color_probability > 0
        return whole and not (self.flip or jitter or self.grayscale or self.blur)

    def pair(self, image: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return two views of each image, independent of each other.

        Args:
            image: (B, C, H, W), uint8, or a float type with values from 0 to 1.
            seed: of both views.

        Returns:
            Two tensors (B, C, H, W), float32, 0 to 1.
        """
        image = as_unit(image)
        batch, _, height, width = image.shape
        first, second = (self.draw(batch, height, width, derived_seed(seed, "view", view)) for view in (0, 1))
        return self.apply(image, first), self.apply(image, second)

    def draw(self, batch: int, height: int, width: int, seed: int) -> ViewDraw:
        """Draw one view of `batch` images of `height` x `width` pixels."""
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.zeros(batch, 11)
        numbers[:, :4] = self._boxes(batch, height, width, generator)
        chance = torch.rand(batch, 4, generator=generator)
        if self.flip:
            numbers[:, 4] = (chance[:, 0] < 0.5).float()
        reach = torch.tensor([0.8, 0.8, 0.8, 0.2]) * self.color
        middle = torch.tensor([1.0, 1.0, 1.0, 0.0])
        low = (middle - reach).clamp_min(torch.tensor([0.0, 0.0, 0.0, -0.5]))
        jitter = low + (middle + reach - low) * torch.rand(batch, 4, generator=generator)
        numbers[:, 5:9] = torch.where(chance[:, 1:2] < self.color_probability, jitter, middle)
        order = tuple(torch.randperm(4, generator=generator).tolist())
        numbers[:, 9] = (chance[:, 2] < self.grayscale).float()
        least, greatest = self.blur_sigma
        sigma = least + (greatest - least) * torch.rand(batch, generator=generator)
        numbers[:, 10] = torch.where(chance[:, 3] < self.blur, sigma, 0)
        return ViewDraw(numbers, order)

    def apply(self, image: Tensor, draw: ViewDraw) -> Tensor:
        """Return the view (B, C, H, W), float32, 0 to 1, of images as for `pair`, which stay as they are."""
        image = as_unit(image)
        numbers = draw.numbers
        if image.is_cuda:
            # From pageable memory the copy would make the host wait.
            numbers = numbers.pin_memory()
        numbers = numbers.to(image.device, non_blocking=True)
        view = crop_and_resize(image, numbers[:, :4], numbers[:, 4])
        colors = image.shape[1] == 3
        if self.color > 0 and self.color_probability > 0:
            for kind in draw.order:
                if colors or kind < 2:
                    view = _ADJUST[kind](view, numbers[:, 5 + kind].view(-1, 1, 1, 1))
        if self.grayscale > 0 and colors:
            view = mix_grey(view, numbers[:, 9].view(-1, 1, 1, 1))
        return gaussian_blur(view, numbers[:, 10]) if self.blur > 0 else view

    def _boxes(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Draw crops as torchvision does: the first of ten attempts that fits, or else the largest central one."""
        least, greatest = self.crop_scale
        low, high = (math.log(ratio) for ratio in self.crop_ratio)
        uniform = torch.rand(batch, _ATTEMPTS, 2, generator=generator, dtype=torch.float64)
        area = height * width * (least + (greatest - least) * uniform[..., 0])
        ratio = torch.exp(low + (high - low) * uniform[..., 1])
        sizes = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], dim=-1).round()
        limit = torch.tensor([height, width])
        fits = ((sizes > 0) & (sizes <= limit)).all(-1)
        first = fits.float().argmax(1)
        size = sizes[torch.arange(batch), first]
        place = ((limit - size + 1) * torch.rand(batch, 2, generator=generator, dtype=torch.float64)).floor()
        central = torch.tensor(self._central(height, width), dtype=torch.float64)
        box = torch.where(fits.any(1, keepdim=True), torch.cat([place, size], dim=1), central)
        return box.float()

    def _central(self, height: int, width: int) -> tuple[int, int, int, int]:
        least, greatest = self.crop_ratio
        rows, columns = height, width
        if width / height < least:
            rows = max(1, round(width / least))
        elif width / height > greatest:
            columns = max(1, round(height * greatest))
        return (height - rows) // 2, (width - columns) // 2, rows, columns


def as_unit(image: Tensor) -> Tensor:
    """Return images as float32 from 0 to 1: uint8 is divided by 255, a float type only converted."""
    return image.float() if image.is_floating_point() else image.to(torch.float32).div_(255)


def crop_and_resize(image: Tensor, box: Tensor, mirror: Tensor) -> Tensor:
    """Cut a box out of each image and stretch it to the image's size, linearly between pixels.

    As `torchvision.transforms.v2.functional.resized_crop`, one box for each sample. Pixels beside the box play no part.

    Args:
        image: (B, C, H, W), a float type.
        box: (B, 4): top, left, height and width in whole pixels, inside the image.
        mirror: (B,): 1 mirrors the result, 0 doesn't.

    Returns:
        (B, C, H, W), memory of its own.
    """
    height, width = image.shape[-2:]
    top, left, rows, columns = box.unbind(1)
    y = _places(height, rows, top, torch.zeros_like(mirror))
    x = _places(width, columns, left, mirror)
    # The grid goes from -1 to 1, from the outer edge of the first pixel to that of the last.
    y, x = (2 * y + 1) / height - 1, (2 * x + 1) / width - 1
    grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)


def gaussian_blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image with a sigma of its own, mirrored at the edges.

    Args:
        image: (B, C, H, W), a float type.
        sigma: (B,) in pixels; 0 leaves the image as it is.

    Returns:
        (B, C, H, W).
    """
    batch, channels, height, width = image.shape
    reach = min(blur_reach(height, width), height - 1, width - 1)
    if reach < 1 or batch == 0:
        return image
    offset = torch.arange(-reach, reach + 1, device=image.device)
    # At sigma 0 all but the middle vanish.
    kernel = torch.exp(-0.5 * (offset / sigma.clamp_min(1e-3)[:, None]).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    maps = F.pad(image, (reach, reach, reach, reach), mode="reflect").view(1, batch * channels, -1, width + 2 * reach)
    maps = F.conv2d(maps, kernel[:, None, :, None], groups=batch * channels)
    return F.conv2d(maps, kernel[:, None, None, :], groups=batch * channels).view_as(image)


def blur_reach(height: int, width: int) -> int:
    """Return how many pixels the blur's kernel reaches to each side: its size is a tenth of the shorter side."""
    return max(1, min(height, width) // 20)


def _places(size: int, length: Tensor, start: Tensor, mirror: Tensor) -> Tensor:
    """Return where the `size` pixels of a line come from, (B, size), in pixels of the image."""
    pixel = torch.arange(size, device=length.device, dtype=length.dtype).expand(len(length), -1)
    pixel = torch.where(mirror[:, None] > 0, size - 1 - pixel, pixel)
    inside = (pixel + 0.5) * (length / size)[:, None] - 0.5
    return start[:, None] + torch.minimum(inside.clamp_min(0), (length - 1)[:, None])
