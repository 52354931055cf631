"""Encoded texts of any length, kept in one tensor, given a padded batch at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .image_data import Batch
from .text_vocabulary import PADDING, Vocabulary


class TokenTexts(Dataset[Any]):
    """Texts as token ids: `text` (B, L) int64, padded with 0 to the longest of the batch, and `label` (B,) int64.

    Args:
        texts: as they are read; each has one token at least after encoding.
        labels: (N,) int64, or None.
        vocabulary: gives the tokens their numbers.
        max_length: tokens of a text that are kept, >= 1.
    """

    def __init__(self, texts: Sequence[str], labels: Tensor | None, vocabulary: Vocabulary, max_length: int) -> None:
        self.texts = list(texts)
        self.labels = labels
        self.max_length = max_length
        self.encode(vocabulary)

    def encode(self, vocabulary: Vocabulary) -> None:
        """Give the tokens the numbers of another vocabulary."""
        rows = [vocabulary.encode(text, self.max_length) for text in self.texts]
        self._tokens = torch.tensor([number for row in rows for number in row], dtype=torch.int32)
        self._lengths = torch.tensor([len(row) for row in rows])
        self._starts = self._lengths.cumsum(0) - self._lengths

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Batch:
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        lengths, starts = self._lengths[indices], self._starts[indices]
        place = torch.arange(int(lengths.max()))
        real = place < lengths[:, None]
        tokens = self._tokens[torch.where(real, starts[:, None] + place, 0)].to(torch.int64)
        batch = {"text": torch.where(real, tokens, PADDING)}
        if self.labels is not None:
            batch["label"] = self.labels[indices]
        return batch
