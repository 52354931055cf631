"""Words or characters to numbers: a vocabulary by count."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ds_lightning.errors import ConfigError, DataError

PADDING, UNKNOWN = 0, 1
Level = Literal["word", "char"]
_WORD = re.compile(r"\w+|[^\w\s]")


class Vocabulary:
    """Numbers for the tokens of a text: 0 is padding, 1 unknown, then the words in their order.

    Args:
        words: all different, at least one.
        level: `word` (runs of letters and digits, and each other sign) or `char`.
        lower: whether case is ignored.

    Example:
        >>> vocabulary = Vocabulary(["a", "cat", "!"])
        >>> vocabulary.encode("A black cat!")
        [2, 1, 3, 4]
    """

    def __init__(self, words: Sequence[str], level: Level = "word", lower: bool = True) -> None:
        self.words = list(words)
        self.level = level
        self.lower = lower
        self._numbers = {word: number for number, word in enumerate(self.words, UNKNOWN + 1)}

    def __len__(self) -> int:
        """The number of ids, with padding and unknown."""
        return len(self.words) + UNKNOWN + 1

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Return the numbers of the first `max_length` tokens; a text without any is one unknown token."""
        found = [self._numbers.get(token, UNKNOWN) for token in tokens_of(text, self.level, self.lower)[:max_length]]
        return found or [UNKNOWN]

    def decode(self, numbers: Iterable[int]) -> str:
        """Return the tokens of a text, without the padding; those of words with a space between."""
        tokens = ["?" if n == UNKNOWN else self.words[n - UNKNOWN - 1] for n in numbers if n != PADDING]
        return (" " if self.level == "word" else "").join(tokens)


def tokens_of(text: str, level: Level, lower: bool) -> list[str]:
    """Return the words, or the characters, of a text."""
    text = text.lower() if lower else text
    return _WORD.findall(text) if level == "word" else list(text)


def most_common(texts: Iterable[str], size: int, level: Level, lower: bool) -> list[str]:
    """Return the `size` most common tokens of the texts, the most common first, ties by the alphabet."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokens_of(text, level, lower))
    return sorted(counts, key=lambda token: (-counts[token], token))[:size]


def read_vocabulary(path: str | Path) -> list[str]:
    """Return the words of a checkpoint that was trained with `TextFiles`, or of a text file with one word a line.

    Raises:
        DataError: no such file, or a checkpoint without a vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"the vocabulary {path} is not there; expected a checkpoint, or a file with one word a line")
    if path.suffix != ".ckpt":
        return path.read_text(encoding="utf-8").splitlines()
    # mmap leaves the weights on the disk.
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    found = _find(checkpoint)
    if found is None:
        raise DataError(f"{path} has no vocabulary; expected a checkpoint that was trained on texts of TextFiles")
    return found


def check_words(words: Sequence[str], vocab_size: int) -> None:
    """Refuse a vocabulary with more ids than a model of `vocab_size` has, or with a word twice."""
    if len(words) + UNKNOWN + 1 > vocab_size:
        raise ConfigError(
            f"the vocabulary has {len(words)} words, and vocab_size is {vocab_size}; expected at least "
            f"{len(words) + UNKNOWN + 1} (padding and unknown count too)"
        )
    if len(set(words)) < len(words):
        twice = Counter(words).most_common(1)[0][0]
        raise ConfigError(f"the vocabulary has the word {twice!r} twice; expected each once")


def _find(checkpoint: dict[str, Any]) -> list[str] | None:
    for state in checkpoint.values():
        if isinstance(state, dict):
            for inner in (state, state.get("data")):
                if isinstance(inner, dict) and isinstance(inner.get("vocabulary"), list):
                    return list(map(str, inner["vocabulary"]))
    return None
