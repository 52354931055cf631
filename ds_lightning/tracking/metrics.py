"""From what Lightning hands over to rows of MLflow's metrics table."""

import time
import warnings
from collections.abc import Mapping
from typing import Any

from ds_lightning.tracking.batches import Row
from ds_lightning.tracking.params import clean_name


class MetricRows:
    """Convert metrics into rows, with names that MLflow takes.

    Args:
        prefix: put before each name, with a `-`.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._names: dict[str, str] = {}
        self._discarded: set[str] = set()

    def rows(self, metrics: Mapping[str, Any], step: int | None) -> list[Row]:
        """Return key, value, timestamp (ms) and step of each metric.

        Args:
            metrics: numbers or one-element tensors by name. Anything else is left out, with a warning once.
            step: step of all of them; 0 when None.
        """
        timestamp, step = int(time.time() * 1000), step or 0
        rows: list[Row] = []
        for raw, value in metrics.items():
            try:
                number = float(value)
            # A string, a tensor of several elements: one metric too few is no reason to stop training.
            except (TypeError, ValueError, RuntimeError):
                if raw not in self._discarded:
                    self._discarded.add(raw)
                    _warn(f"metric {raw!r} is a {type(value).__name__}, not one number; it is not logged")
                continue
            rows.append((self._names.get(raw) or self._name(raw), number, timestamp, step))
        return rows

    def _name(self, raw: str) -> str:
        wanted = f"{self._prefix}-{raw}" if self._prefix else raw
        name = base = clean_name(wanted)
        number = 2
        # acc@5 and acc#5 must not become one curve.
        while name in self._names.values():
            name, number = f"{base}_{number}", number + 1
        if name != wanted:
            _warn(f"metric {raw!r} is logged as {name!r}: MLflow takes letters, digits, _ - . / : and space")
        self._names[raw] = name
        return name


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
