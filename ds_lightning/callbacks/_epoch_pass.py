"""Where a loader is in the fit: the epoch, the pass over the loader, and how much of it is trained already."""

from dataclasses import dataclass
from typing import Any, Protocol


class Place(Protocol):
    """What a loader asks about the fit."""

    seed: int
    rank: int
    cycles: bool
    sampler_seeds: dict[int, int]

    def epoch(self) -> int:
        """Return the number of the running epoch."""

    def trained(self) -> int:
        """Return how many batches of this epoch are trained already."""


@dataclass
class Pass:
    """One iteration over a loader: a loader that is shorter than others is passed more than once an epoch."""

    epoch: int = -1
    number: int = 0
    skip: int = 0
    exhausted: bool = False


def start_pass(current: Pass, place: Place, length: int | None) -> None:
    """Say which pass starts now, and how much of it is trained already."""
    epoch = place.epoch()
    if epoch == current.epoch and current.exhausted:
        current.number, current.skip, current.exhausted = current.number + 1, 0, False
        return
    current.epoch, current.number, current.skip, current.exhausted = epoch, 0, place.trained(), False
    if place.cycles and length:
        current.number, current.skip = divmod(current.skip, length)


def sized(loader: Any) -> int | None:
    """Return the number of batches, or None where it isn't known."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None
