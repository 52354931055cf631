"""What goes wrong, in the user's words: one line that names the thing, what was expected and what to do."""

import difflib
import signal
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that can't work: a wrong key, value, name or combination."""


class DataError(RuntimeError):
    """Data that can't be used: a missing folder, an empty class, a broken file."""


class NoEffectWarning(UserWarning):
    """Something was asked for and changed nothing, such as mixing a batch of one."""


class CollapseWarning(UserWarning):
    """All embeddings have become the same: what is learned says nothing about the samples."""


class Preempted(SystemExit):
    """Training was stopped by a signal, and its state is saved.

    Args:
        number: the signal's number; the process ends with 128 + number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


def hint(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest known word, or all known words when none is close.

    Example:
        >>> hint("smapler", ["sampler", "pruner"])
        "; did you mean 'sampler'?"
    """
    words = list(known)
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(words)}"
