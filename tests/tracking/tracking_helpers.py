import sqlite3
import time
from collections.abc import Callable

from ds_lightning.tracking import Store


def rows_of(store: Store, run: str) -> list[tuple[str, float, int]]:
    """Key, value and step of all rows, read past MLflow; NaN as MLflow stores it."""
    with sqlite3.connect(store.uri.removeprefix("sqlite:///"), timeout=20) as database:
        query = "select key, value, step from metrics where run_uuid = ? order by key, step, timestamp"
        return database.execute(query, (run,)).fetchall()


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
