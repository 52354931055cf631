"""Random crop and flip for a batch of small images, on its device, one draw for each sample."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_lightning.functional.seeds import derived_seed


class RandomCropFlip:
    """Pads, crops back to the original size at a random place, and mirrors half of the images.

    One gather for the batch, no loop over samples. Numbers are drawn on the CPU as in `BatchMixer`: they depend
    on `seed`, `rank` and the number of batches so far, which is the whole state.

    Args:
        crop_padding: zeros around the image before the crop, in pixels, >= 0 (4 is usual for 32 px).
        horizontal_flip: mirror each image with probability one half.
        seed: of the random numbers.
        rank: the process's number among those that share the data.

    Example:
        >>> augment = RandomCropFlip(crop_padding=2, horizontal_flip=True)
        >>> augment(torch.ones(4, 1, 8, 8, dtype=torch.uint8)).shape
        torch.Size([4, 1, 8, 8])
    """

    def __init__(self, crop_padding: int = 0, horizontal_flip: bool = False, seed: int = 0, rank: int = 0) -> None:
        if crop_padding < 0:
            raise ValueError(f"crop_padding is {crop_padding}; expected a number of pixels >= 0")
        self.crop_padding = crop_padding
        self.horizontal_flip = horizontal_flip
        self.seed = seed
        self.rank = rank
        self.batches = 0

    def __call__(self, image: Tensor) -> Tensor:
        """Return the augmented copy of images of shape (B, C, H, W), any dtype."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "augment", self.rank, self.batches))
        self.batches += 1
        batch, channels, height, width = image.shape
        padding = self.crop_padding
        offset = torch.randint(2 * padding + 1, (batch, 2), generator=generator)
        rows = offset[:, :1] + torch.arange(height)
        columns = offset[:, 1:] + torch.arange(width)
        if self.horizontal_flip:
            flip = torch.rand(batch, 1, generator=generator) < 0.5
            columns = torch.where(flip, columns.flip(1), columns)
        rows, columns = rows.to(image.device), columns.to(image.device)
        padded = F.pad(image, (padding, padding, padding, padding))
        source = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
        source = source.view(batch, 1, -1).expand(-1, channels, -1)
        return padded.flatten(2).gather(2, source).view_as(image)

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches so far."""
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches of `state`."""
        self.batches = int(state["batches"])
