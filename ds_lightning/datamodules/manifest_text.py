"""The texts of a manifest as token ids, by a vocabulary that is counted or a tokenizer from a folder."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ds_lightning.errors import ConfigError

from .manifest_columns import TextColumn
from .manifest_values import Tokenizer
from .text_vocabulary import UNKNOWN, Level, Vocabulary, check_words, most_common

# A word and the space after it, in bytes.
_WORD = 6


class ManifestText:
    """Turns texts into numbers.

    Args:
        column: what the schema says about the texts.
        tokenizer: of the folder that the schema names; None is a vocabulary of words or characters.
    """

    def __init__(self, column: TextColumn, tokenizer: Tokenizer | None) -> None:
        self.column = column
        self.level: Level = "char" if column.tokenizer == "char" else "word"
        self.tokenizer = tokenizer
        # Of the schema, so that a model's size does not depend on the rows.
        self.vocab_size = column.vocab_size if tokenizer is None else len(tokenizer)
        self.words: list[str] | None = None

    def count(self, texts: Iterable[str]) -> None:
        """Make the vocabulary, unless it is there or comes with the tokenizer."""
        if self.tokenizer is None:
            self.use(most_common(texts, self.vocab_size - UNKNOWN - 1, self.level, self.column.lower))

    def use(self, words: list[str]) -> None:
        """Take a vocabulary.

        Raises:
            ConfigError: it doesn't fit the schema.
        """
        if self.words is None and self.tokenizer is not None:
            raise ConfigError(
                f"the checkpoint has a vocabulary, and the schema names the tokenizer {self.column.tokenizer!r}; "
                "expected the schema that it was trained with"
            )
        check_words(words, self.vocab_size)
        self.words, self.tokenizer = words, Vocabulary(words, self.level, self.column.lower)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, at least one and at most `max_length`."""
        assert self.tokenizer is not None
        return self.tokenizer.encode(text, self.column.max_length)

    def lengths(self, sizes: Tensor) -> Tensor:
        """Return about how many tokens texts of some sizes in bytes have, without a look at them; 0 stays 0."""
        tokens = sizes // (1 if self.level == "char" else _WORD)
        return torch.where(sizes > 0, tokens.clamp(1, self.column.max_length), 0)
