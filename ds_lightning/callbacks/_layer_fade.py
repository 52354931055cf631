"""Multipliers that go back to 1 with the schedule."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ds_lightning.errors import ConfigError


@dataclass
class Fade:
    """The rate of each parameter group as a share of its largest so far; multipliers are taken to that power.

    Attributes:
        rates: the rate of each parameter group in the last step.
        peaks: the largest rate of each parameter group so far.
    """

    rates: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    def follow(self, rates: Sequence[float | Tensor]) -> bool:
        """Take the rates of this step; say whether they differ from those of the last one."""
        now = [float(rate) for rate in rates]
        if now == self.rates:
            return False
        self.rates = now
        peaks = self.peaks[: len(now)] + [0.0] * (len(now) - len(self.peaks))
        self.peaks = [max(peak, rate) for peak, rate in zip(peaks, now, strict=True)]
        return True

    def faded(self, multipliers: Sequence[float], groups: Sequence[int]) -> list[float]:
        """Return each multiplier to the power of `rate / peak` of its parameter group, whose number `groups` has."""
        share = [rate / peak if peak > 0 else 1.0 for rate, peak in zip(self.rates, self.peaks, strict=True)]
        # Before the first step, and for a group that was added since the last one, there is no rate yet.
        powers = [share[at] if at < len(share) else 1.0 for at in groups]
        return [m**power for m, power in zip(multipliers, powers, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"rates": list(self.rates), "peaks": list(self.peaks)}


def check_rates(groups: Sequence[dict[str, Any]]) -> None:
    """Refuse rates that can't be read without waiting for a device.

    Raises:
        ConfigError: a rate is a tensor on a device.
    """
    for group in groups:
        rate = group["lr"]
        if isinstance(rate, Tensor) and rate.device.type != "cpu":
            raise ConfigError(
                f"fade=True can't work with a rate that is a tensor on {rate.device}: reading it would make every step "
                "wait for the device; give the optimizer a float as lr, or leave fade out"
            )
