"""The Transformer block that the text encoder and the cross-modal fusion share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TransformerBlock(nn.Module):
    """Self-attention and a perceptron, each after a LayerNorm and added to what came in.

    Args:
        width: features of a token, a multiple of `heads`.
        heads: attention heads.
        dropout: probability of dropping a feature, in [0, 1).
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attended: Tensor | None) -> Tensor:
        """Map tokens (B, N, width) to (B, N, width).

        Args:
            x: the tokens.
            attended: (B, N) bool, at least one True a row: the tokens that may be attended to; None for all.
        """
        query, key, value = self._heads(x)
        mask = None if attended is None else attended[:, None, None, :]
        probability = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=probability)
        x = x + self.dropout(self.projection(mixed.transpose(1, 2).flatten(2)))
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out

    def attention(self, x: Tensor, attended: Tensor | None) -> Tensor:
        """Return the attention weights (B, heads, N, N) that `forward` uses without dropout; rows sum to 1."""
        query, key, _ = self._heads(x)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if attended is not None:
            scores = scores.masked_fill(~attended[:, None, None, :], -torch.inf)
        weights: Tensor = scores.float().softmax(dim=-1)
        return weights

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        packed = self.queries_keys_values(self.attention_norm(x))
        # (3, B, heads, N, width / heads)
        query, key, value = packed.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return query, key, value
