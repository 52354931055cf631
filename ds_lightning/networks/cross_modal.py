"""Attention between the tokens of several modalities, with masks that are exact."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ds_lightning.networks._ranges import check_ranges
from ds_lightning.networks._time_convolutions import check_mask
from ds_lightning.networks._transformer_block import TransformerBlock

Tokens = Mapping[str, tuple[Tensor, Tensor | None]]


class FusionAttention(NamedTuple):
    """Who attends to whom, without dropout, averaged over the heads.

    Attributes:
        matrix: (B, depth, M + 1, M + 1); the first row and column are the fused token's, the others the modalities'
            in their order. The mean over the row's tokens of the sum over the column's; the rows of what is present
            sum to 1, the others are zero.
        tokens: modality -> (B, depth, N), the fused token's attention to each of its tokens.
    """

    matrix: Tensor
    tokens: dict[str, Tensor]


class _Joined(NamedTuple):
    hidden: Tensor
    attended: Tensor | None
    sizes: dict[str, int]


class CrossModalFusion(nn.Module):
    """Transformer layers in which every token attends to the tokens of all modalities, and one learned, fused token.

    What is absent or padding changes nothing: the result is that of a run without it, whatever the tensors hold
    there. A sample without any modality gets what the fused token says alone.

    Args:
        dims: modality -> features of its tokens; its order is that of the columns of `present`.
        width: features inside, at least 1, a multiple of `heads`.
        depth: layers, at least 1.
        heads: attention heads of a layer, at least 1.
        dropout: probability of dropping a feature or an attention, in [0, 1).

    Attributes:
        modalities: the keys of `dims`.
        num_features: `width`.

    Raises:
        ValueError: when an argument is outside its range; in `forward`, when tokens, masks or `present` have a shape,
            type or name that does not fit.

    Paper:
        Attention Is All You Need, arXiv:1706.03762, over the tokens of all modalities as in ViLT, arXiv:2102.03334.

    Example:
        >>> fusion = CrossModalFusion({"image": 64, "audio": 32})
        >>> tokens = {"image": (torch.zeros(2, 49, 64), None), "audio": (torch.zeros(2, 13, 32), None)}
        >>> fusion(tokens, present=torch.tensor([[True, True], [True, False]])).shape
        torch.Size([2, 128])
    """

    def __init__(
        self, dims: dict[str, int], width: int = 128, depth: int = 2, heads: int = 4, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if not dims:
            raise ValueError("dims is empty; expected at least one modality with the features of its tokens")
        sizes = {f"dims[{name!r}]": size for name, size in dims.items()}
        check_ranges({**sizes, "width": width, "depth": depth, "heads": heads}, dropout)
        if width % heads:
            raise ValueError(f"width is {width}; expected a multiple of the {heads} heads")
        self.modalities = tuple(dims)
        self.num_features = width
        self.dims = dict(dims)
        self.projections = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(size), nn.Linear(size, width)) for name, size in dims.items()}
        )
        self.modality_embedding = nn.Parameter(torch.randn(len(dims), width) * 0.02)
        self.fused_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tokens, present: Tensor | None = None) -> Tensor:
        """Return the fused token of each sample after the last layer, (B, width).

        Args:
            tokens: modality -> tokens (B, N, dims[modality]) and their mask (B, N) bool, True for a real token, or
                None when all are. A modality that is left out is absent in every sample.
            present: (B, M) bool, the modalities that each sample has; None when all are there.
        """
        joined = self._joined(tokens, present)
        hidden = joined.hidden
        for block in self.blocks:
            hidden = block(hidden, joined.attended)
        fused: Tensor = self.norm(hidden[:, 0])
        return fused

    def attention(self, tokens: Tokens, present: Tensor | None = None) -> FusionAttention:
        """Return the attention of every layer for a batch; the arguments are those of `forward`."""
        joined = self._joined(tokens, present)
        hidden, attended = joined.hidden, joined.attended
        real = torch.ones_like(hidden[..., 0], dtype=torch.bool) if attended is None else attended
        # The row and column of each token; 0 is the fused token's.
        group = [0]
        for row, name in enumerate(self.modalities, start=1):
            group += [row] * joined.sizes.get(name, 0)
        belongs = nn.functional.one_hot(torch.tensor(group, device=real.device), len(self.modalities) + 1)
        member = (belongs * real[..., None]).float()
        count = member.sum(dim=1).clamp(min=1.0)[..., None]
        matrices, rows = [], []
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            weights = block.attention(hidden, attended).mean(dim=1)
            matrices.append(member.transpose(1, 2) @ weights @ member / count)
            rows.append(weights[:, 0, 1:])
            hidden = block(hidden, attended)
        split = torch.split(torch.stack(rows, dim=1), list(joined.sizes.values()), dim=-1)
        return FusionAttention(torch.stack(matrices, dim=1), dict(zip(joined.sizes, split, strict=True)))

    def _joined(self, tokens: Tokens, present: Tensor | None) -> _Joined:
        batch = self._checked(tokens, present)
        parts, masks, sizes = [self.fused_token.expand(batch, 1, -1)], [], {}
        for column, name in enumerate(self.modalities):
            if name not in tokens:
                continue
            hidden, real = tokens[name]
            sizes[name] = hidden.shape[1]
            if present is not None:
                there = present[:, column, None].expand(-1, hidden.shape[1])
                real = there if real is None else real & there
            if real is not None:
                # Before the projection: a NaN there would reach the gradient of its weight.
                hidden = hidden.masked_fill(~real[..., None], 0.0)
            parts.append(self.projections[name](hidden) + self.modality_embedding[column])
            masks.append(real)
        attended = None
        if any(mask is not None for mask in masks):
            filled = [
                mask if mask is not None else part.new_ones(part.shape[:2], dtype=torch.bool)
                for part, mask in zip(parts, [None, *masks], strict=True)
            ]
            attended = torch.cat(filled, dim=1)
        return _Joined(torch.cat(parts, dim=1), attended, sizes)

    def _checked(self, tokens: Tokens, present: Tensor | None) -> int:
        """Return the batch size, after refusing what does not fit."""
        unknown = [name for name in tokens if name not in self.dims]
        if unknown or not tokens:
            raise ValueError(
                f"tokens has the modalities {list(tokens)}; expected one or more of {', '.join(self.modalities)}"
            )
        batch = len(next(iter(tokens.values()))[0])
        for name, (hidden, real) in tokens.items():
            if hidden.dim() != 3 or hidden.shape[0] != batch or hidden.shape[2] != self.dims[name]:
                raise ValueError(
                    f"the tokens of {name} have the shape {tuple(hidden.shape)}; expected "
                    f"({batch}, N, {self.dims[name]}): the batch size, any number of tokens, the features in dims"
                )
            check_mask(real, (batch, hidden.shape[1]), f"the tokens of {name}")
        check_mask(present, (batch, len(self.modalities)), "the modalities that are present")
        return batch


def modality_dropout(present: Tensor, p: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Drop each present modality of a sample with a probability, but never the last one.

    Args:
        present: (B, M) bool, the modalities that each sample has.
        p: the probability, in [0, 1]; 1 leaves one of them, at random.
        generator: gives the random numbers, on the device of `present`.

    Returns:
        (B, M) bool.

    Raises:
        ValueError: when `p` is no probability.

    Paper:
        ModDrop: adaptive multi-modal gesture recognition, arXiv:1501.00102.

    Example:
        >>> modality_dropout(torch.tensor([[True, False, False]]), 0.9)
        tensor([[ True, False, False]])
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p is {p}; expected a probability in [0, 1]")
    draws = torch.rand(present.shape, device=present.device, generator=generator)
    # The highest draw of a row stays in any case: it is below p only where all are.
    highest = draws.masked_fill(~present, -1.0).amax(dim=1, keepdim=True)
    return present & (draws >= highest.clamp(max=p))
