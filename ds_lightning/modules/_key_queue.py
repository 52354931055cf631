"""The keys of the last batches, as more negatives than a batch has."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The id of a key of which nothing is known: no sample has it.
_UNKNOWN = torch.iinfo(torch.int64).min


class KeyQueue(nn.Module):
    """The last `size` keys, newest first; random directions at the start, as in MoCo. All of it is in the checkpoint.

    Args:
        size: number of keys, at least 1.
        dim: of a key.

    Attributes:
        keys: (size, dim) float32 of length one.
        ids: (size,) int64; what each key shows.
    """

    keys: Tensor
    ids: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("ids", torch.full((size,), _UNKNOWN))

    @torch.no_grad()
    def push(self, keys: Tensor, ids: Tensor | None) -> None:
        """Put keys (B, dim) in front and drop the oldest; negative ids (B,) are unknown."""
        if ids is None:
            ids = torch.full((len(keys),), -1, device=keys.device)
        known = torch.where(ids < 0, _UNKNOWN, ids)
        # New tensors: the loss holds the old ones until its backward.
        self.keys = torch.cat([F.normalize(keys.to(self.keys.dtype), dim=1), self.keys])[: self.size].clone()
        self.ids = torch.cat([known, self.ids])[: self.size].clone()
