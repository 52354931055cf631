"""Parts of a module that have the shapes of its network, and lose the channels that it loses."""

from collections.abc import Mapping
from typing import TypeVar

from .pruning_plan import PruningPlan

Entry = TypeVar("Entry")


def with_followers(plan: PruningPlan, followers: Mapping[str, str]) -> PruningPlan:
    """Return the plan that also does to each follower what it does to the tensor or module that it follows.

    Args:
        plan: with the names of the module that holds both.
        followers: name of a tensor, or path of a module -> the one that it follows.
    """

    def both(entries: Mapping[str, Entry]) -> dict[str, Entry]:
        return {**entries, **{mine: entries[name] for mine, name in followers.items() if name in entries}}

    return PruningPlan(both(plan.shapes), both(plan.kept), both(plan.attributes))
