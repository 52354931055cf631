"""What FiniteGuard says."""

from collections.abc import Mapping
from typing import Any

_SHOWN = 5


def listed(names: list[str]) -> str:
    """List the first few names, and say how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def limit_reached(consecutive: int, max_consecutive: int, total: int, max_total: int | None) -> str | None:
    """Say which limit is reached; None while none is."""
    if consecutive >= max_consecutive:
        return f"{consecutive} steps in a row were not finite (max_consecutive is {max_consecutive})"
    if max_total is not None and total >= max_total:
        return f"{total} steps in all were not finite (max_total is {max_total})"
    return None


def described(event: Mapping[str, Any], optimizer: str, world_size: int) -> str:
    """Say what was not finite, and where."""
    ranks = ", ".join(map(str, event["loss_on_ranks"]))
    what = []
    if ranks:
        what.append(f"the loss on rank {ranks}" if world_size > 1 else "the loss")
    if event["parameters"]:
        what.append(listed(event["parameters"]))
    batches = ", ".join(map(str, event["batches"]))
    place = f"epoch {event['epoch']}, batch {batches}, step {event['step']}, {optimizer}"
    return f"NaN or inf in {' and in '.join(what)} ({place})"
