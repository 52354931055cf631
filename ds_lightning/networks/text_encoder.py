"""A small encoder of token ids: a Transformer, or a bag of embeddings."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_lightning.networks._transformer_block import TransformerBlock

PADDING = 0
_POOLS = ("mean", "max")


class _TextFeatures(nn.Module):
    """Token ids (B, L) -> features (B, width)."""

    def __init__(
        self,
        vocab_size: int,
        width: int,
        depth: int,
        heads: int,
        max_length: int,
        dropout: float,
        embedding_dropout: float,
        pool: str,
    ) -> None:
        super().__init__()
        self.max_length, self.pool = max_length, pool
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=PADDING)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        with torch.no_grad():
            self.embedding.weight[PADDING].zero_()
        self.positions = nn.Embedding(max_length, width) if depth else None
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=width**-0.5)
        self.embedding_dropout = embedding_dropout
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.bag: nn.Module = nn.Identity()
        if not depth:
            self.bag = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.blocks:
            return self._pooled(*self.tokens(x))
        # Dropping features of each token would all but cancel in the mean, and cost a pass over all tokens.
        pooled = self.dropout(self._pooled(*self._embedded(x)))
        out: Tensor = self.bag(self.norm(pooled))
        return out

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map token ids (B, L) to what is pooled, (B, L, width), and where it is real, (B, L) bool."""
        hidden, real = self._embedded(x)
        if self.positions is not None:
            hidden = hidden + self.positions.weight[: x.shape[1]]
        hidden = self.dropout(hidden)
        # Attention over nothing is NaN: a text without tokens attends to its first padding.
        attended = real.clone()
        attended[:, 0] = True
        for block in self.blocks:
            hidden = block(hidden, attended)
        if self.blocks:
            hidden = self.norm(hidden)
        return hidden, real

    def _embedded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() != 2 or x.is_floating_point():
            raise ValueError(f"text has the shape {tuple(x.shape)} and type {x.dtype}; expected token ids (B, L) int64")
        length = x.shape[1]
        if not 1 <= length <= self.max_length:
            raise ValueError(f"the texts have {length} tokens; expected 1 to max_length, {self.max_length}")
        hidden = self.embedding(x)
        if self.embedding_dropout:
            ones = torch.ones_like(hidden[..., :1])
            hidden = hidden * F.dropout(ones, self.embedding_dropout, self.training)
        return hidden, x != PADDING

    def _pooled(self, hidden: Tensor, real: Tensor) -> Tensor:
        if self.pool == "mean":
            # A product, because masking would write all tokens once more.
            share = real / real.sum(dim=1, keepdim=True).clamp(min=1)
            return torch.bmm(share[:, None].to(hidden.dtype), hidden)[:, 0]
        highest = hidden.masked_fill(~real[..., None], -torch.inf).amax(dim=1)
        return highest.masked_fill(~real.any(dim=1, keepdim=True), 0.0)


class TextEncoder(nn.Module):
    """A text encoder with a linear head: a Transformer without tricks, or for `depth` 0 a bag of embeddings.

    Padding (token 0, at the end) changes nothing: it is neither attended to nor pooled. An empty text gives the
    features of no token.

    Args:
        vocab_size: number of token ids, at least 2: 0 is padding, 1 an unknown token.
        width: features of a token and of a text, at least 1, a multiple of `heads`.
        depth: Transformer blocks, at least 0; 0 is the mean of the embeddings and a perceptron, without an order.
        heads: attention heads of a block, at least 1.
        max_length: the longest text in tokens, at least 1.
        dropout: probability of dropping a feature in the embeddings (of a bag: in their mean), the attention and the
            perceptrons, in [0, 1).
        num_classes: outputs of the head; 0 gives the features.
        pool: `mean` or `max` over the tokens of a text.
        embedding_dropout: probability of dropping a token's whole embedding, in [0, 1).

    Attributes:
        features: token ids (B, L) int64 -> features (B, width).
        num_features: `width`.
        head: linear layer to the classes, or the identity when `num_classes` is 0.

    Raises:
        ValueError: when an argument is outside its range; in `forward`, when the input is no token ids (B, L) or
            longer than `max_length`.

    Paper:
        Attention Is All You Need, arXiv:1706.03762, with the norm before each part, arXiv:2002.04745. The bag: Deep
        Averaging Networks, Iyyer et al., ACL 2015.

    Example:
        >>> TextEncoder(100, num_classes=2)(torch.tensor([[4, 7, 0], [5, 1, 9]])).shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        max_length: int = 256,
        dropout: float = 0.1,
        num_classes: int = 0,
        pool: str = "mean",
        embedding_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        least = {"vocab_size": 2, "width": 1, "depth": 0, "heads": 1, "max_length": 1, "num_classes": 0}
        for name, lowest in least.items():
            if locals()[name] < lowest:
                raise ValueError(f"{name} is {locals()[name]}; expected at least {lowest}")
        if depth and width % heads:
            raise ValueError(f"width is {width}; expected a multiple of the {heads} heads")
        for name in ("dropout", "embedding_dropout"):
            if not 0.0 <= locals()[name] < 1.0:
                raise ValueError(f"{name} is {locals()[name]}; expected a probability in [0, 1)")
        if pool not in _POOLS:
            raise ValueError(f"pool is {pool!r}; expected mean or max")
        self.num_features = width
        self.features = _TextFeatures(vocab_size, width, depth, heads, max_length, dropout, embedding_dropout, pool)
        self.head: nn.Module = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map token ids (B, L) to logits (B, num_classes), or to features."""
        logits: Tensor = self.head(self.features(x))
        return logits
