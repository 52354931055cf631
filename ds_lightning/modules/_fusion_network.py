"""Encoders of several modalities and what joins them: attention, the mean of their logits, or one of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from ds_lightning.modules._modality_heads import ModalityHeads, mean_of_present
from ds_lightning.modules._multimodal_batch import mask_of, presence
from ds_lightning.modules._present_encoder import PresentEncoder
from ds_lightning.networks.cross_modal import CrossModalFusion, FusionAttention


class Encoded(NamedTuple):
    """A batch after the encoders.

    Attributes:
        tokens: modality -> tokens (B, N, D), and which of them are real, (B, N) bool or None.
        present: (B, M) bool, the modalities that each sample has.
        complete: whether every sample has all of them.
        alone: (B, M, C), the logits of each modality alone; None when there are no such heads.
        idle: the encoders whose modality no sample has.
    """

    tokens: dict[str, tuple[Tensor, Tensor | None]]
    present: Tensor
    complete: bool
    alone: Tensor | None
    idle: list[nn.Module]


class FusionNetwork(nn.Module):
    """Map a batch to what its modalities say together; the encoders run once, whatever subsets are asked for.

    Args:
        encoders: modality -> encoder; those that are looked at.
        modalities: names of the columns of a batch's `present`.
        num_classes: C.
        attention: options of `CrossModalFusion`; None: the mean of the logits of each modality alone.
        heads: whether there are heads for each modality alone; the mean and `skip` can't do without.
        skip: whether the mean of the logits of each modality alone is added to what the fused token says.
    """

    def __init__(
        self,
        encoders: dict[str, PresentEncoder],
        modalities: tuple[str, ...],
        num_classes: int,
        attention: dict[str, Any] | None,
        heads: bool,
        skip: bool = False,
    ) -> None:
        super().__init__()
        self.skip = skip
        self.modalities, self.used = modalities, tuple(encoders)
        self.encoders = nn.ModuleDict(encoders)
        dims = {name: encoder.num_features for name, encoder in encoders.items()}
        self.attention = None if attention is None else CrossModalFusion(dims, **attention)
        self.head = None if self.attention is None else nn.Linear(self.attention.num_features, num_classes)
        self.heads = ModalityHeads(dims, num_classes) if heads else None
        if skip and self.head is not None:
            # Training begins with late fusion, and attention learns what that leaves.
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def encode(self, batch: Mapping[str, Tensor]) -> Encoded:
        """Run the encoders, each on the samples that have its modality."""
        present, on_host = presence(batch, self.modalities, self.used)
        tokens, idle = {}, []
        for column, (name, encoder) in enumerate(self.encoders.items()):
            there = None if on_host is None else on_host[:, column]
            x = batch.get(name)
            mask = None if x is None else mask_of(batch, name)
            tokens[name] = encoder(x, mask, there, len(present), present.device)
            if there is not None and not there.any():
                idle.append(encoder)
        alone = None if self.heads is None else self.heads(tokens)
        return Encoded(tokens, present, on_host is None or bool(on_host.all()), alone, idle)

    def logits(self, encoded: Encoded, chosen: Tensor | None = None, names: tuple[str, ...] | None = None) -> Tensor:
        """Return logits (B, C); zeros, or what the fused token says alone, for a sample without any modality.

        Args:
            encoded: from `encode`.
            chosen: (B, M) bool that takes the place of `present`.
            names: modalities that are looked at; None: all.
        """
        fused: Tensor | None = None
        if self.attention is not None and self.head is not None:
            tokens = encoded.tokens if names is None else {name: encoded.tokens[name] for name in names}
            there = encoded.present if chosen is None and not encoded.complete else chosen
            fused = cast(Tensor, self.head(self.attention(tokens, there)))
            if not self.skip:
                return fused
        assert encoded.alone is not None
        there = encoded.present if chosen is None else chosen
        columns = [number for number, name in enumerate(self.used) if names is None or name in names]
        late = mean_of_present(encoded.alone[:, columns], there[:, columns])
        return late if fused is None else late + fused

    def attended(self, batch: Mapping[str, Tensor]) -> FusionAttention:
        """Return who attends to whom in a batch, in every layer."""
        assert self.attention is not None
        encoded = self.encode(batch)
        return self.attention.attention(encoded.tokens, None if encoded.complete else encoded.present)
