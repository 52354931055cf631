"""A classifier on each modality alone, and the mean of those that a sample has."""

import torch
from torch import Tensor, nn


class ModalityHeads(nn.ModuleDict):
    """One linear layer a modality, on the mean of its real tokens.

    Args:
        dims: modality -> features of its tokens.
        num_classes: outputs.
    """

    def __init__(self, dims: dict[str, int], num_classes: int) -> None:
        super().__init__({name: nn.Linear(features, num_classes) for name, features in dims.items()})

    def forward(self, tokens: dict[str, tuple[Tensor, Tensor | None]]) -> Tensor:
        """Return the logits of each modality alone, (B, M, C).

        Args:
            tokens: modality -> tokens (B, N, D), and which of them are real, (B, N) bool or None.
        """
        return torch.stack([head(_mean(*tokens[name])) for name, head in self.items()], dim=1)


def _mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return tokens.mean(dim=1)
    real = mask[..., None]
    return torch.where(real, tokens, 0.0).sum(dim=1) / real.sum(dim=1).clamp(min=1)


def mean_of_present(values: Tensor, present: Tensor) -> Tensor:
    """Return the mean over the modalities that a sample has, (B, ...); 0 where it has none.

    Args:
        values: (B, M, ...).
        present: (B, M) bool.
    """
    there = present.view(*present.shape, *(1,) * (values.dim() - 2))
    return torch.where(there, values, 0.0).sum(dim=1) / there.sum(dim=1).clamp(min=1)
