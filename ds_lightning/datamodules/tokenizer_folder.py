"""A Hugging Face tokenizer from a folder on the disk."""

from pathlib import Path

from ds_lightning.errors import ConfigError


class FolderTokenizer:
    """Numbers for the tokens of a text, as a pretrained text encoder knows them.

    Args:
        folder: has the `tokenizer.json` that Hugging Face's models come with; its padding must be 0, as that of BERT.

    Raises:
        ConfigError: no such file, one that can't be read, other padding, or the package tokenizers is not installed.

    Example:
        >>> FolderTokenizer("all-MiniLM-L6-v2").encode("A cat", max_length=8)  # doctest: +SKIP
        [101, 1037, 4937, 102]
    """

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder, "tokenizer.json")
        if not path.is_file():
            raise ConfigError(
                f"tokenizer {str(folder)!r} has no tokenizer.json; expected word, char or a folder with one"
            )
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ConfigError(
                f"tokenizer {str(folder)!r} needs the package tokenizers; pip install tokenizers"
            ) from error
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # what the package raises is a bare Exception
            raise ConfigError(f"{str(path)!r} is no tokenizer: {' '.join(str(error).split())}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if not any(self._tokenizer.token_to_id(token) == 0 for token in ("[PAD]", "<pad>")):
            raise ConfigError(f"{str(path)!r} has no padding token with the number 0; expected one, as BERT's has")

    def __len__(self) -> int:
        """The number of ids, with padding."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Return the numbers of a text, cut to `max_length` with the tokenizer's own marks at its ends.

        A text of which nothing is left, such as one of invisible signs without marks, is one padding, 0.
        """
        if max_length is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(max_length)
        # Where the marks alone are more than max_length, the package does not cut at all.
        return list(self._tokenizer.encode(text).ids)[:max_length] or [0]
