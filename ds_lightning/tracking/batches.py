"""Rows of metrics on their way into calls."""

from collections import deque
from typing import Any

from ds_lightning.tracking.calls import MAX_ROWS_A_CALL

Row = tuple[str, float, int, int]


# With five metrics a step, 500 rows.
_ADDS_THAT_FILL = 100


class Batches:
    """Collect rows of key, value, timestamp (ms) and step, without a lock that training could wait for."""

    def __init__(self) -> None:
        # Its append and popleft are atomic.
        self._added: deque[tuple[str, str | None, list[Row]]] = deque()

    def add(self, run: str, rows: list[Row], resumed: str | None) -> bool:
        """Take rows of a run, on any thread.

        Args:
            run: the run's id.
            rows: the rows.
            resumed: names the run's reopening (see `present.Present`); None when there was none.

        Returns:
            Whether it is time to take them.
        """
        self._added.append((run, resumed, rows))
        return len(self._added) % _ADDS_THAT_FILL == 0

    def take(self) -> list[dict[str, Any]]:
        """Return all that came since the last time, as calls for `calls.apply`; one thread at a time."""
        together: dict[tuple[str, str | None], list[Row]] = {}
        for _ in range(len(self._added)):
            run, resumed, rows = self._added.popleft()
            together.setdefault((run, resumed), []).extend(rows)
        calls = []
        for (run, resumed), rows in together.items():
            mark = {} if resumed is None else {"resumed": resumed}
            for start in range(0, len(rows), MAX_ROWS_A_CALL):
                calls.append({"kind": "metrics", "run": run, "rows": rows[start : start + MAX_ROWS_A_CALL], **mark})
        return calls
