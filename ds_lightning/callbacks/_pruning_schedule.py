"""When channels go, and how much of the network is kept after each removal."""

import math
from bisect import bisect_right
from dataclasses import dataclass

from ds_lightning.errors import ConfigError

_REMOVALS = 8


@dataclass(frozen=True)
class PruningSchedule:
    """The removals of a fit.

    Args:
        steps: after how many optimizer steps each is made, ascending, >= 1.
        keeps: the share of the unpruned network that is kept after each, falling to the target.
    """

    steps: tuple[int, ...]
    keeps: tuple[float, ...]

    def due(self, step: int) -> int:
        """Return how many removals belong to the first `step` optimizer steps."""
        return bisect_right(self.steps, step)


def schedule_of(
    kind: str, target: float, start: int | float, end: int | float, every: int | None, total: float
) -> PruningSchedule:
    """Lay the removals out over a fit.

    Args:
        kind: `cubic` (arXiv 1710.01878), `linear` or `one-shot`.
        target: the share that is kept in the end.
        start: float: share of the fit's steps; int: an optimizer step.
        end: likewise; the last removal.
        every: steps from one removal to the next; None: eight removals.
        total: the fit's optimizer steps; inf or negative where they are not known.

    Raises:
        ConfigError: `end` is not after `start` or past the fit, or a share of an unknown number was asked for.
    """
    known = 0 <= total < math.inf
    if not known and (isinstance(start, float) or isinstance(end, float)):
        raise ConfigError(
            f"start is {start} and end {end}, shares of the fit's steps, whose number is not known; expected optimizer "
            "steps (int), or a Trainer with max_steps or max_epochs and data of known length"
        )
    first, last = (round(at * total) if isinstance(at, float) else at for at in (start, end))
    if kind == "one-shot":
        first = last = max(first, 1)
    elif last <= first:
        raise ConfigError(
            f"start {start} and end {end} are steps {first} and {last} of {total:g}; expected end after start"
        )
    if known and last > total:
        raise ConfigError(
            f"the last removal is at step {last}, and this fit has {total:g} optimizer steps; expected an earlier "
            f"{'start' if kind == 'one-shot' else 'end'}, or a longer fit"
        )
    if kind == "one-shot":
        return PruningSchedule((first,), (target,))
    interval = every or math.ceil((last - first) / _REMOVALS)
    steps = (*range(first + interval, last, interval), last)
    shares = ((step - first) / (last - first) for step in steps)
    power = 3 if kind == "cubic" else 1
    return PruningSchedule(steps, tuple(1 - (1 - target) * (1 - (1 - share) ** power) for share in shares))
