"""An encoder with its projector, and the slow copy of it that a momentum encoder is."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ds_lightning.errors import ConfigError
from ds_lightning.functional.gradient_cache import cached_embeddings
from ds_lightning.networks.residual import DEPTHS


class Tower(nn.Module):
    """An encoder and the perceptron that the loss looks through; the perceptron is thrown away after pre-training.

    Args:
        encoder: maps inputs (B, ...) to features (B, num_features).
        num_features: at least 1.
        projector: widths of the perceptron's layers, the last one the embedding's; empty: the features themselves.
    """

    def __init__(self, encoder: nn.Module, num_features: int, projector: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_features = num_features
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise([num_features, *projector]):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.projector = nn.Sequential(*layers[:-1])

    def features(self, x: Tensor) -> Tensor:
        """Map inputs (B, ...) to features (B, num_features)."""
        features: Tensor = self.encoder(x)
        if features.dim() != 2 or features.shape[1] != self.num_features:
            raise ConfigError(
                f"{type(self.encoder).__name__} gave {tuple(features.shape)}; expected features "
                f"(B, {self.num_features}): an encoder ends with a flatten and says its `num_features`"
            )
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (B, ...) to embeddings (B, D), of any length."""
        embedding: Tensor = self.projector(self.features(x))
        return embedding


def without_batch_norm(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return a network's options with GroupNorm for our ResNets, unless they say which norm.

    BatchNorm lets the samples of a batch know of each other: the loss can be cheated, and depends on how a batch is
    split over ranks and micro-batches.
    """
    return {"norm": "group", **options} if name in {f"resnet{depth}" for depth in DEPTHS} else options


class Towers(nn.ModuleDict):
    """The tower of both views, or one for each of two modalities.

    Args:
        towers: one tower, or two by modality.
        micro_batch: samples that go through at a time; None: all at once.
    """

    def __init__(self, towers: dict[str, Tower], micro_batch: int | None) -> None:
        super().__init__(towers)
        self.micro_batch = micro_batch

    def side(self, modality: str | None = None) -> Tower:
        """Return a modality's tower; the one that there is, whatever the modality; for None the first."""
        if modality is not None and len(self) > 1 and modality not in self:
            raise ConfigError(f"modality is {modality!r}; expected one of {', '.join(self)}")
        tower = self[modality if modality is not None and len(self) > 1 else next(iter(self))]
        assert isinstance(tower, Tower)
        return tower

    def rows(self, x: Tensor, modality: str | None = None) -> Tensor:
        """Map inputs (B, ...) to embeddings (B, D), a micro-batch at a time."""
        tower = self.side(modality)
        if self.micro_batch is None:
            embeddings: Tensor = tower(x)
            return embeddings
        return cached_embeddings(tower, x, self.micro_batch)

    def both(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Map both sides' inputs (B, ...) to embeddings (B, D)."""
        if len(self) > 1:
            one, other = self
            return self.rows(first, one), self.rows(second, other)
        if first.shape[1:] != second.shape[1:]:
            return self.rows(first), self.rows(second)
        # In one pass, so that BatchNorm does not tell the views apart.
        rows = self.rows(torch.cat([first, second]))
        return rows[: len(first)], rows[len(first) :]

    def slow_copy(self) -> "Towers":
        """Return a copy that gets no gradients."""
        return copy.deepcopy(self).requires_grad_(False)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Move each parameter of `slow` a share of 1 - momentum towards that of `fast`."""
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), 1.0 - momentum)
