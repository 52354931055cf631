"""What multipliers the layers had during a fit, in bounded memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MAX_COLUMNS = 500


@dataclass
class LayerHistory:
    """The multipliers of each layer over the optimizer steps; every second column goes when there are too many.

    Attributes:
        names: the layers, those that are gone included.
        steps: the optimizer step of each column, counted from 0.
        values: the multipliers, (T, L), float32; NaN where a layer was not there.
        stride: one in so many readings is kept.
        seen: readings so far.
    """

    names: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    values: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    stride: int = 1
    seen: int = 0

    def add(self, step: int, multipliers: Mapping[str, float]) -> None:
        """Take the multipliers of one step."""
        self.seen += 1
        if (self.seen - 1) % self.stride:
            return
        old = set(self.names)
        new = [name for name in multipliers if name not in old]
        self.names = self.names + new
        columns = torch.cat([self.values, torch.full((len(self.steps), len(new)), float("nan"))], dim=1)
        row = torch.tensor([[multipliers.get(name, float("nan")) for name in self.names]], dtype=torch.float32)
        self.values, self.steps = torch.cat([columns, row]), [*self.steps, step]
        if len(self.steps) > MAX_COLUMNS:
            self.values, self.steps, self.stride = self.values[::2].clone(), self.steps[::2], 2 * self.stride

    def state_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "steps": list(self.steps),
            "values": self.values.clone(),
            "stride": self.stride,
            "seen": self.seen,
        }
