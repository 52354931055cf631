"""What was read of each layer one period ago, and the averages over all readings."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_lightning.functional.gradient_statistics import SCALE_FREE, ema_update, layer_gradient_moments, radial_share

# By chance the share of a gradient of any direction is below SCALE_FREE in one of 23 readings, but the mean of three
# in one of 4,000 cases.
_RADIAL_DECAY = 0.9  # a reading
_RADIAL_WEIGHT = 1 - 0.9**2.5  # more than two readings


@dataclass
class Reading:
    """What was read in one step, on its way to the host, one entry a layer.

    `norms` is (R, L), with a row for each name in `rows`: `gradient` and `momentum`, the norms of the gradient (NaN
    where there is none) and of the momentum buffer; `weight`, the norm of the weight; `sum`, of the gradient's
    elements; `inner`, the inner product of weight and gradient. It lies in pinned memory on CUDA and is valid once
    `copied` has happened.
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
    """What is known of each layer: averages of its moments, gradients seen, and the multiplier in use.

    `radial` holds the average of `radial_share` and the weight of that average, (2, L); `start` the exponents that
    were a layer's first, (L,), NaN where there are none yet.
    """

    names: list[str] = field(default_factory=list)
    moments: Tensor = field(default_factory=lambda: torch.zeros(2, 0, dtype=torch.float64))
    weight: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    seen: list[int] = field(default_factory=list)
    multipliers: list[float] = field(default_factory=list)
    radial: Tensor = field(default_factory=lambda: torch.zeros(2, 0, dtype=torch.float64))
    start: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def __post_init__(self) -> None:
        if self.radial.shape[1] != len(self.names):  # a checkpoint from before these were kept
            self.radial = torch.zeros(2, len(self.names), dtype=torch.float64)
            self.start = torch.full((len(self.names),), torch.nan, dtype=torch.float64)

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
            take(self.radial, rows, 0.0),
            take(self.start, rows, torch.nan),
        )

    def add(self, reading: Reading, decay: float) -> list[bool]:
        """Take a reading into the averages; say for each layer whether it had a finite value."""
        at = {name: i for i, name in enumerate(reading.names)}
        value = take(reading.moments(), [at.get(name) for name in self.names], float("nan"))
        self.moments, self.weight = ema_update(self.moments, self.weight, value, decay)
        return [bool(ok) for ok in torch.isfinite(value).all(dim=0)]

    def add_radial(self, rows: dict[str, Tensor], numel: Tensor) -> None:
        """Take the radial shares of one reading into their average; NaN leaves a layer as it was."""
        share = radial_share(rows["inner"], rows["weight"] ** 2, rows["gradient"] ** 2, numel)
        self.radial = torch.stack(ema_update(self.radial[0], self.radial[1], share, _RADIAL_DECAY))

    def known(self) -> Tensor:
        """Tell of each layer whether there were three readings of its radial share, (L,)."""
        return self.radial[1] > _RADIAL_WEIGHT

    def scale_free(self) -> Tensor:
        """Tell of each layer whether the size of its weights changes nothing, (L,); not before three readings."""
        return self.known() & (self.radial[0] < SCALE_FREE)

    def scale_counts(self) -> Tensor:
        """Tell of each layer whether the loss changes with the size of its weights, (L,); not before three readings."""
        return self.known() & (self.radial[0] >= SCALE_FREE)

    def state_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "moments": self.moments.clone(),
            "weight": self.weight.clone(),
            "seen": list(self.seen),
            "multipliers": list(self.multipliers),
            "radial": self.radial.clone(),
            "start": self.start.clone(),
        }


def take(values: Tensor, rows: Sequence[int | None], fill: float) -> Tensor:
    """Return the columns of the last dimension in this order, `fill` where there is none."""
    padded = torch.cat([values, values.new_full((*values.shape[:-1], 1), fill)], dim=-1)
    return padded[..., [values.shape[-1] if i is None else i for i in rows]]
