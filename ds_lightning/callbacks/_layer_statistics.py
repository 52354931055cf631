"""What was read of each layer one period ago, and the averages over all readings."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_lightning.functional.gradient_statistics import ema_update, layer_gradient_moments


@dataclass
class Reading:
    """What was read in one step, on its way to the host, one entry a layer.

    `norms` is (R, L), with a row for each name in `rows`: `gradient` and `momentum`, the norms of the gradient (NaN
    where there is none) and of the momentum buffer; `weight`, the norm of the weight; `sum`, of the gradient's
    elements. It lies in pinned memory on CUDA and is valid once `copied` has happened.
    """

    names: list[str]
    norms: Tensor
    scale: list[float]
    beta: list[float]
    seen: list[int]
    rows: list[str] = field(default_factory=lambda: ["gradient", "momentum"])
    copied: torch.cuda.Event | None = None

    def moments(self) -> Tensor:
        """Return the estimates of `||E g||^2` and `E ||g||^2`, (2, L), float64 on the host."""
        norms = self._on_host().double()
        momentum = norms[1] * torch.tensor(self.scale, dtype=torch.float64)
        step = torch.tensor(self.seen, dtype=torch.float64) + 1
        beta = torch.tensor(self.beta, dtype=torch.float64)
        return torch.stack(layer_gradient_moments(norms[0] ** 2, momentum**2, beta, step))

    def by_row(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return each row for these layers, (L,), float64 on the host; NaN for a layer that was not there."""
        at = {name: i for i, name in enumerate(self.names)}
        values = take(self._on_host().double(), [at.get(name) for name in names], float("nan"))
        return dict(zip(self.rows, values, strict=True))

    def _on_host(self) -> Tensor:
        if self.copied is not None:
            # A period old, so this seldom waits. Asking `query()` instead would let ranks read at different steps.
            self.copied.synchronize()
        return self.norms

    def state_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "norms": self._on_host().clone(),
            "scale": list(self.scale),
            "beta": list(self.beta),
            "seen": list(self.seen),
            "rows": list(self.rows),
        }


@dataclass
class LayerStatistics:
    """What is known of each layer: averages of its moments, gradients seen, and the multiplier in use."""

    names: list[str] = field(default_factory=list)
    moments: Tensor = field(default_factory=lambda: torch.zeros(2, 0, dtype=torch.float64))
    weight: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    seen: list[int] = field(default_factory=list)
    multipliers: list[float] = field(default_factory=list)

    def aligned(self, names: Sequence[str]) -> "LayerStatistics":
        """Return the statistics of these layers, matched by name; a new layer starts from nothing, at 1."""
        at = {name: i for i, name in enumerate(self.names)}
        rows = [at.get(name) for name in names]
        return LayerStatistics(
            list(names),
            take(self.moments, rows, 0.0),
            take(self.weight, rows, 0.0),
            [0 if i is None else self.seen[i] for i in rows],
            [1.0 if i is None else self.multipliers[i] for i in rows],
        )

    def add(self, reading: Reading, decay: float) -> list[bool]:
        """Take a reading into the averages; say for each layer whether it had a finite value."""
        at = {name: i for i, name in enumerate(reading.names)}
        value = take(reading.moments(), [at.get(name) for name in self.names], float("nan"))
        self.moments, self.weight = ema_update(self.moments, self.weight, value, decay)
        return [bool(ok) for ok in torch.isfinite(value).all(dim=0)]

    def state_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "moments": self.moments.clone(),
            "weight": self.weight.clone(),
            "seen": list(self.seen),
            "multipliers": list(self.multipliers),
        }


def take(values: Tensor, rows: Sequence[int | None], fill: float) -> Tensor:
    """Return the columns of the last dimension in this order, `fill` where there is none."""
    padded = torch.cat([values, values.new_full((*values.shape[:-1], 1), fill)], dim=-1)
    return padded[..., [values.shape[-1] if i is None else i for i in rows]]
