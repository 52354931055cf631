"""How the statistics of the layers become multipliers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ds_lightning.errors import ConfigError
from ds_lightning.functional.gradient_statistics import (
    article_multipliers,
    element_variance,
    exponent_multipliers,
    mean_exponent,
    snr_multipliers,
    trust_exponents,
    variance_multipliers,
)

from ._layer_statistics import LayerStatistics

RuleName = Literal["variance", "trust", "snr", "article"]
ReferenceName = Literal["mean", "start"]
RULES = ("variance", "trust", "snr", "article")
_BOUNDS = (0.4, 2.3)
FLOOR = 0.02  # a head behind layers with norms wants a fraction of their rate
_TRUST_BOUNDS = (FLOOR, 10.0)
_LONGEST_HOLD = 10  # where gradients stay away or are not finite, so that no layer becomes known


@dataclass(frozen=True)
class VarianceRule:
    """How statistics become multipliers; the names are DynamicLayerLR's arguments.

    With `spare` all multipliers are 1 where the rule has nothing to offer. Reference "start": where no layer is known
    yet whose size changes nothing. Reference "mean": of each layer of which it is not known yet that its size counts.
    `floor` bounds layers whose size counts from below, where that of at least half of all layers changes nothing; with
    `slow_start` these begin at it there, and come to what the rule gives them until step `warmup`.
    """

    alpha: float
    bounds: tuple[float, float]
    every: int
    ema: float
    warmup: int
    name: RuleName = "variance"
    trust: float = 0.0
    fade: bool = False
    reference: ReferenceName = "mean"
    vectors: float = 1.0
    spare: bool = False
    floor: float = FLOOR
    slow_start: bool = False

    @property
    def first_change(self) -> int:
        """The optimizer step after which multipliers may differ from 1 for the first time."""
        periods = 1 if self.name == "article" else 3 if self.spare else 2
        return periods * self.interval(0)

    @property
    def tells_layers_apart(self) -> bool:
        """Whether the rule finds out which layers have a size that counts."""
        return self.spare or (self.name == "trust" and self.reference == "start")

    @property
    def extra_rows(self) -> tuple[str, ...]:
        """What the rule reads beside the norms of gradients and momenta."""
        if self.tells_layers_apart:
            return "weight", "inner"
        return {"trust": ("weight",), "article": ("sum",)}.get(self.name, ())

    def interval(self, step: int) -> int:
        """Return how many steps after one at `step` the next reading is; a slow start reads in each step at first."""
        return min(self.every, max(1, step // 4)) if self.slow_start else self.every

    def ramp(self, step: int) -> float:
        """Return 0 before the first reading counts, 1 from step `warmup` on, linear between."""
        first = self.interval(0)
        if step < first:
            return 0.0
        return 1.0 if step >= self.warmup else (step - first) / (self.warmup - first)

    def holds(self, statistics: LayerStatistics, step: int) -> bool:
        """Tell whether layers wait until it is known which of them have a size that counts.

        A head that takes its first steps at the full rate loses more by them than some steps of all layers are worth.
        """
        return self.slow_start and step < _LONGEST_HOLD and not bool(statistics.known().any())

    def multipliers(
        self, statistics: LayerStatistics, rows: dict[str, Tensor], numel: Tensor, group: Sequence[int], step: int
    ) -> list[float]:
        """Return the multiplier of each layer; with reference "start", note where it began.

        Args:
            statistics: the averages; layers without any don't count in their group.
            rows: what the last reading says of each layer, (L,): `weight` and `gradient` are norms, `sum` is the sum
                of the gradient's elements; NaN where there is none.
            numel: number of weights of each layer, (L,), float64.
            group: number of each layer's group, counted from 0; layers of one group are added up.
            step: optimizer steps so far.
        """
        index = torch.tensor(group, dtype=torch.long)
        count = max(group, default=-1) + 1
        known = statistics.weight > 0
        if self.name == "article":
            # As it is printed: of the last gradient, without averages, bounds, centre or ramp.
            known = torch.isfinite(rows["gradient"]) & torch.isfinite(rows["sum"])
        acting, bounds = torch.ones_like(known), self.bounds
        free = statistics.scale_free()
        mostly_free = 2 * int(free.sum()) >= len(free)
        if self.spare and self.reference == "start":
            acting = free.any().expand_as(known)
        elif self.spare:
            acting = known & statistics.scale_counts()
            bounds = (self.floor if mostly_free else bounds[0]), bounds[1]

        def added(values: Tensor) -> Tensor:
            values = torch.where(known, values, torch.zeros_like(values))
            return values.new_zeros(count).index_add_(0, index, values)

        size = added(numel).clamp(min=1)
        a, e = added(statistics.moments[0]), added(statistics.moments[1])
        match self.name:
            case "article":
                variance = element_variance(added(rows["sum"]), added(rows["gradient"] ** 2), size.clamp(min=2))
                m = article_multipliers(variance)
            case "snr":
                m = snr_multipliers(a, e, self.alpha, self.bounds, self.ramp(step))
            case "trust":
                x = trust_exponents(a, e, size, added(rows["weight"] ** 2), self.alpha, self.trust)
                m = exponent_multipliers(x, self.bounds, self.ramp(step))
                if self.reference == "start":
                    # With residual branches that begin at zero most layers have no gradient in the first step.
                    if step >= self.warmup or not bool(x.isnan().any()):
                        statistics.start = torch.where(statistics.start.isnan(), x[index], statistics.start)
                    start = x.new_full((count,), torch.nan).index_copy_(0, index, statistics.start)
                    bound = added((~free).double()) > 0  # a group, where any of its layers is
                    center = mean_exponent(torch.where(bound, torch.nan, start))
                    # Their mean begins at 1 by itself.
                    free_m = exponent_multipliers(x, self.bounds, 1.0 if self.slow_start else self.ramp(step), center)
                    low = self.floor if mostly_free else max(self.bounds[0], _BOUNDS[0])
                    bounds = low, min(self.bounds[1], _BOUNDS[1])
                    bound_m = self._of_bound_layers(a, e, size, bounds, step, mostly_free)
                    m = torch.where(bound, bound_m, free_m)
            case "variance" if self.spare:
                m = self._of_bound_layers(a, e, size, bounds, step, mostly_free)
            case "variance":
                m = variance_multipliers(a, e, size, self.alpha, bounds, self.ramp(step))
        found: list[float] = torch.where(acting, m[index], 1.0).tolist()
        return found

    def _of_bound_layers(
        self, a: Tensor, e: Tensor, size: Tensor, bounds: tuple[float, float], step: int, mostly_free: bool
    ) -> Tensor:
        if not (self.slow_start and mostly_free):
            return variance_multipliers(a, e, size, self.alpha, bounds, self.ramp(step))
        ramp = self.ramp(step)
        x = variance_multipliers(a, e, size, self.alpha, bounds, 1.0).log()
        return torch.exp(ramp * x + (1 - ramp) * math.log(self.floor))


def with_start(rule: VarianceRule, slow_start: bool | None, warmup: int | None, sgd: bool) -> VarianceRule:
    """Fill in how a rule begins, None being the default for SGD or another optimizer.

    Raises:
        ConfigError: a slow start of a rule that has none.
    """
    if slow_start and not rule.tells_layers_apart:
        raise ConfigError(
            f"slow_start is True, but rule={rule.name!r} with reference={rule.reference!r} has none; expected "
            "rule=None, or rule='trust' with reference='start'"
        )
    slow = rule.tells_layers_apart and (sgd if slow_start is None else slow_start)
    return replace(rule, slow_start=slow, warmup=(40 if slow else 50) if warmup is None else warmup)


def checked_rule(
    rule: str | None, alpha: float | None, trust: float | None, bounds: Sequence[float] | None, reference: str | None
) -> tuple[float, tuple[float, float]]:
    """Check the arguments that depend on each other; return trust and bounds, with their defaults filled in.

    Of rule None the optimizer decides later, so nothing may be given that not all of its rules use.

    Raises:
        ConfigError: a value out of range, or one that the rule does not use.
    """
    if rule is not None and rule not in RULES:
        raise ConfigError(f"rule is {rule!r}; expected one of {', '.join(RULES)}, or None for the optimizer's default")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ConfigError(f"alpha is {alpha}; expected a number > 0, or None for the optimizer's default")
    if trust is not None and not 0 <= trust < math.inf:
        raise ConfigError(f"trust is {trust}; expected a number >= 0, or None for the rule's default")
    if trust and rule != "trust":
        raise ConfigError(f"trust is {trust}, but rule={rule!r} does not use it; use rule='trust', or leave trust out")
    if bounds is not None and (len(bounds) != 2 or not 0 < bounds[0] <= 1 <= bounds[1] < math.inf):
        raise ConfigError(f"bounds is {bounds}; expected (low, high) with 0 < low <= 1 <= high")
    if reference not in (None, "mean", "start"):
        raise ConfigError(f"reference is {reference!r}; expected 'mean', 'start', or None for the optimizer's default")
    if reference == "start" and rule != "trust":
        raise ConfigError(f"reference is 'start', but rule={rule!r} has no other than 'mean'; use rule='trust'")
    if rule == "article":
        for name, value in (("alpha", alpha), ("bounds", bounds)):
            if value is not None:
                raise ConfigError(f"{name} is {value}, but rule='article' has none; leave {name} out")
    low, high = bounds or (_TRUST_BOUNDS if rule == "trust" else _BOUNDS)
    return (1.0 if trust is None else float(trust)) if rule == "trust" else 0.0, (float(low), float(high))
