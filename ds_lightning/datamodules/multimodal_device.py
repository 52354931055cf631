"""What is done with a batch of several modalities on its device: images augmented and normalised, samples mixed."""

from typing import Any

import torch
from torch import Tensor

from .augment import RandomCropFlip
from .manifest_columns import ImageColumn
from .multimodal_batches import Batch
from .multimodal_mixing import MultimodalMixer


class DeviceStep:
    """Augments, normalises and mixes; the counters of its random numbers are its state.

    Args:
        image: what the schema says about the images; None where there are none.
        place: the number of `image` among the modalities.
        mix_alpha: of MixUp's Beta(alpha, alpha); 0 is off.
        seed: of the random numbers.
    """

    def __init__(self, image: ImageColumn | None, place: int, mix_alpha: float, seed: int) -> None:
        self.image = image
        self.place = place
        self.mixer = MultimodalMixer(mix_alpha, seed) if mix_alpha > 0 else None
        self.augment = RandomCropFlip(**image.augment, seed=seed) if image and image.augment else None
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def set_rank(self, rank: int) -> None:
        """Tell the random streams which process this is."""
        for stream in (self.mixer, self.augment):
            if stream is not None:
                stream.rank = rank

    def before(self, batch: Batch) -> Batch:
        """Draw, still on the CPU, who is mixed with whom; for training."""
        return batch if self.mixer is None else self.mixer.draw(batch)

    def after(self, batch: Batch, *, training: bool) -> Batch:
        """Return the batch that a model gets, from uint8 images (B, C, H, W)."""
        batch = dict(batch)
        if self.image is not None:
            image = batch["image"]
            if training and self.augment is not None:
                image = self.augment(image)
            scale, shift = self._scale_and_shift(image.device)
            there = batch["present"][:, self.place, None, None, None]
            batch["image"] = torch.where(there, image * scale + shift, 0)
        return self.mixer.mix(batch) if training and self.mixer is not None else batch

    def state_dict(self) -> dict[str, Any]:
        """Return the counters."""
        streams = {"mixer": self.mixer, "augment": self.augment}
        return {name: stream.state_dict() for name, stream in streams.items() if stream is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; a stream that it doesn't know starts anew."""
        for name, stream in {"mixer": self.mixer, "augment": self.augment}.items():
            if stream is not None and name in state:
                stream.load_state_dict(state[name])

    def _scale_and_shift(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            assert self.image is not None
            mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (self.image.mean, self.image.std))
            self._tables[device] = ((1 / (255 * std)).to(device), (-mean / std).to(device))
        return self._tables[device]
