"""Warnings from background threads, said on a thread of the user's."""

import warnings
from collections.abc import Sequence
from pathlib import Path


class Notices:
    """Collect messages on any thread; a warning that is turned into an error must not end a background thread."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    def add(self, message: str) -> None:
        """Take a message."""
        self._messages.append(message)

    def kept(self, metrics: int, others: int, files: Sequence[Path], reason: str) -> None:
        """Take the message that calls are on disk and not in MLflow."""
        self.add(
            f"{metrics} metrics and {others} other calls were not written to MLflow ({reason}); they are kept in "
            + ", ".join(str(file) for file in files)
            + "; `ds-lightning tracking replay` sends them"
        )

    def say(self) -> None:
        """Warn of what was collected."""
        while self._messages:
            warnings.warn(self._messages.pop(0), RuntimeWarning, stacklevel=5)


def first_line(reason: str) -> str:
    """Shorten an error's text."""
    return (reason.strip().splitlines() or ["no reason given"])[0][:300]
