"""Mean and deviation of audio, series and tables, from training samples."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# Where the deviation is below this share of the mean's size, a channel is taken for constant.
_CONSTANT = 1e-6
_KINDS = ("audio", "series", "table")


class Statistics:
    """Standardises audio (one mean for all mel bands), series (each channel) and tables (each column).

    A missing number of a table becomes the mean, 0 after standardising. For each column that is missing in one of the
    training samples looked at, a column follows at the end that is 1 where it is missing and 0 elsewhere.

    Args:
        values: for each of these modalities the mean and the standard deviation, that broadcast to a sample.
        indicators: the columns of the table that get an indicator.
    """

    def __init__(self, values: Mapping[str, tuple[Tensor, Tensor]], indicators: Iterable[int] = ()) -> None:
        self.values = dict(values)
        self.indicators = list(indicators)

    @classmethod
    def of(cls, samples: Iterable[Mapping[str, Tensor]]) -> "Statistics":
        """Return those of some samples: audio (mels, T), series (channels, T) and table (F,)."""
        sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        missing = torch.zeros(0, dtype=torch.bool)
        for sample in samples:
            for name in _KINDS:
                if name not in sample:
                    continue
                value = _columns(name, sample[name])
                known = ~value.isnan()
                value = torch.where(known, value, 0)
                found = (known.sum(1).double(), value.sum(1), value.square().sum(1))
                before = sums.get(name)
                sums[name] = found if before is None else tuple(map(torch.add, before, found))  # type: ignore[assignment]
                if name == "table":
                    missing = ~known[:, 0] if len(missing) == 0 else missing | ~known[:, 0]
        values = {}
        for name, (count, total, squares) in sums.items():
            mean = total / count.clamp(min=1)
            std = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
            std = torch.where(std > _CONSTANT * mean.abs().clamp(min=_CONSTANT), std, 1)
            shape = (-1,) if name == "table" else (-1, 1)
            values[name] = (mean.float().view(shape), std.float().view(shape))
        return cls(values, missing.nonzero()[:, 0].tolist())

    def apply(self, name: str, value: Tensor) -> Tensor:
        """Return a sample's audio, series or table standardised, as float32."""
        value = value.float()
        if name in self.values:
            mean, std = self.values[name]
            value = (value - mean) / std
        if name == "table":
            unknown = value.isnan()
            value = torch.cat([torch.where(unknown, 0, value), unknown[self.indicators].float()])
        return value

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers."""
        return {"values": {name: list(pair) for name, pair in self.values.items()}, "indicators": self.indicators}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Statistics":
        """Return those whose `state_dict` this is."""
        return cls({name: (mean, std) for name, (mean, std) in state["values"].items()}, state["indicators"])


def _columns(name: str, value: Tensor) -> Tensor:
    """One row for each thing that has a mean of its own."""
    value = value.double()
    return value[:, None] if name == "table" else value.reshape(1, -1) if name == "audio" else value
