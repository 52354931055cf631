"""Calls that MLflow does not have yet, and how far each of them is on its way."""

from typing import Any

Call = dict[str, Any]


class Undelivered:
    """Number calls and keep them until they are delivered; the outbox's lock is held wherever this is used.

    A call is first here alone, then on its way to the writer (`send`), then with it (`arrived`). `come_back` is for a
    writer that is gone: what it had is here alone again.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._calls: dict[int, Call] = {}
        # The number that the next call will have.
        self.next = 0
        # Calls with a number below these are on their way, and with the writer.
        self._sent_below = self._arrived_below = 0

    def add(self, call: Call) -> None:
        """Give a call its number and keep it."""
        call["id"] = self.next
        self._calls[self.next] = call
        self.next += 1
        self.rows += len(call.get("rows", ()))

    def pop(self, number: int) -> Call | None:
        """Forget a call; None when it is not here any more."""
        call = self._calls.pop(number, None)
        if call is not None:
            self.rows -= len(call.get("rows", ()))
        return call

    def of(self, run: str | None) -> list[Call]:
        """Return the calls of a run (None: of all), in order."""
        return [call for call in self._calls.values() if run in (None, call["run"])]

    def any_sent(self, run: str | None) -> bool:
        """Tell whether a call of a run (None: of any) is on its way or with the writer."""
        return any(call["id"] < self._sent_below for call in self.of(run))

    def any_resumed(self) -> bool:
        """Tell whether there are metrics of a reopened run, which MLflow may have already."""
        return any("resumed" in call for call in self._calls.values())

    def all_arrived(self, upto: int) -> bool:
        """Tell whether no call with a number below `upto` is here alone or on its way."""
        return not any(self._arrived_below <= number < upto for number in self._calls)

    def send(self) -> list[Call]:
        """Return the calls that are here alone, and count them as on their way."""
        calls = [call for number, call in self._calls.items() if number >= self._sent_below]
        self._sent_below = self.next
        return calls

    def arrived(self, calls: list[Call]) -> None:
        """Count calls that `send` returned as being with the writer."""
        if calls:
            self._arrived_below = calls[-1]["id"] + 1

    def come_back(self) -> None:
        """Count all calls as being here alone."""
        self._sent_below = self._arrived_below = 0
