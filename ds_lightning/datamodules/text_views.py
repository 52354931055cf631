"""Random views of texts: words left out, and words that change place with near ones."""

import torch
from torch import Tensor

from ds_lightning.errors import ConfigError
from ds_lightning.functional.seeds import derived_seed


class TokenViews:
    """Leaves out words and shuffles near ones: the noise of arXiv 1711.00043 for a batch of token ids.

    With both off a view is the text itself, and the encoder's dropout makes the difference (SimCSE, arXiv 2104.08821).

    Args:
        word_deletion: the chance of each token to be left out, in [0, 1); one stays at least.
        swap_distance: tokens change place by so many at most, >= 0; 0 leaves the order.

    Raises:
        ConfigError: an argument out of its range.

    Example:
        >>> text = torch.tensor([[5, 6, 7, 8], [9, 3, 0, 0]])
        >>> TokenViews(word_deletion=0.0, swap_distance=0)(text, seed=1)
        tensor([[5, 6, 7, 8],
                [9, 3, 0, 0]])
    """

    def __init__(self, word_deletion: float = 0.1, swap_distance: int = 3) -> None:
        if not 0 <= word_deletion < 1:
            raise ConfigError(f"word_deletion is {word_deletion}; expected a probability in [0, 1)")
        if swap_distance < 0:
            raise ConfigError(f"swap_distance is {swap_distance}; expected an integer >= 0, where 0 is off")
        self.word_deletion = word_deletion
        self.swap_distance = swap_distance

    def pair(self, text: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return two views of each text, independent of each other, as `__call__`."""
        first, second = (self(text, derived_seed(seed, "view", view)) for view in (0, 1))
        return first, second

    def __call__(self, text: Tensor, seed: int) -> Tensor:
        """Return one view of each text.

        Args:
            text: token ids (B, L), int64; 0 is padding, at the end only.
            seed: of the random numbers.

        Returns:
            (B, M) int64, padded at the end with 0, with M <= L the length of the longest view.
        """
        generator = torch.Generator().manual_seed(seed)
        real = text != 0
        noise = torch.rand(2, *text.shape, generator=generator)
        keep = real & (noise[0] >= self.word_deletion)
        # The token with the greatest number stays when no other does.
        spared = torch.where(real, noise[0], -1).argmax(1, keepdim=True) if text.shape[1] else text.new_empty(0)
        if text.shape[1]:
            keep = keep.scatter(1, spared, real.gather(1, spared))
        # Counted among those that stay, so that a gap brings no two words nearer.
        place = (keep.cumsum(1) - 1).float() + (self.swap_distance + 1) * noise[1] * (self.swap_distance > 0)
        place = torch.where(keep, place, float("inf"))
        order = place.argsort(dim=1, stable=True)
        length = int(keep.sum(1).max()) if keep.numel() else 0
        return torch.where(keep, text, 0).gather(1, order)[:, :length]
