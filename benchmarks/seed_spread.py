"""A figure over seeds: its mean, the standard error of that, and all values."""

import math
import statistics
from collections.abc import Sequence
from typing import Any


def spread(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {
        "mean": round(statistics.fmean(values), digits) if values else None,
        "standard_error": None if error is None else round(error, digits),
        "values": [round(value, digits) for value in values],
    }
