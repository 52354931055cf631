"""Callbacks that say which others they come after or before."""

from collections.abc import Iterable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from ds_lightning.errors import ConfigError


def apply_order(trainer: pl.Trainer) -> None:
    """Put the trainer's callbacks into the order that they ask for, and say so; to be called in `setup`.

    A callback asks with the class attributes `runs_after` and `runs_before`, tuples of class names; a name stands for
    the subclasses too. Others keep their places as far as that goes. Checkpoints stay where Lightning puts them.

    Raises:
        ConfigError: the wishes contradict each other, or Lightning's place for checkpoints.
    """
    # A new list: Lightning may be going through the old one.
    ordered = in_order(trainer.callbacks)  # type: ignore[attr-defined]
    moved = [a for a, b in zip(ordered, trainer.callbacks, strict=True) if a is not b]  # type: ignore[attr-defined]
    if moved:
        trainer.callbacks = ordered  # type: ignore[attr-defined]
        names = ", ".join(type(callback).__name__ for callback in ordered)
        rank_zero_info(f"The callbacks were put in the order that they ask for: {names}")


def in_order(callbacks: list[Callback]) -> list[Callback]:
    """Return the callbacks with every `runs_after` and `runs_before` met; the first that can run, in their old order.

    Raises:
        ConfigError: as `apply_order`.
    """
    earlier: dict[int, set[int]] = {place: set() for place in range(len(callbacks))}
    for place, callback in enumerate(callbacks):
        for other in _places(callbacks, callback, "runs_after"):
            earlier[place].add(other)
        for other in _places(callbacks, callback, "runs_before"):
            earlier[other].add(place)
    done: list[int] = []
    # Lightning calls them after the module's own hook, so they come last whatever is asked for.
    last = {place for place, callback in enumerate(callbacks) if isinstance(callback, Checkpoint)}
    for group in (earlier.keys() - last, last):
        waiting = sorted(group)
        while waiting:
            ready = next((place for place in waiting if earlier[place] <= set(done)), None)
            if ready is None:
                raise ConfigError(_refusal(callbacks, waiting, earlier, last))
            waiting.remove(ready)
            done.append(ready)
    return [callbacks[place] for place in done]


def _places(callbacks: list[Callback], asking: Callback, attribute: str) -> Iterable[int]:
    names = getattr(asking, attribute, ())
    if isinstance(names, str):
        raise ConfigError(f"{type(asking).__name__}.{attribute} is the string {names!r}; expected a tuple of names")
    for place, callback in enumerate(callbacks):
        if callback is not asking and any(cls.__name__ in names for cls in type(callback).__mro__):
            yield place


def _refusal(callbacks: list[Callback], waiting: list[int], earlier: dict[int, set[int]], last: set[int]) -> str:
    def name(place: int) -> str:
        return type(callbacks[place]).__name__

    first = waiting[0]
    for place in waiting:
        for other in sorted(earlier[place] & last - {place}):
            if place not in last:
                return f"{name(place)} would have to run after {name(other)}, but Lightning runs checkpoints last"
    # Each that waits has one before it that waits, so this walk comes round.
    walk = [first]
    while (following := min(earlier[walk[-1]] & set(waiting))) not in walk:
        walk.append(following)
    ring = [*walk[walk.index(following) :], following]
    return "the callbacks ask for an order that goes in a circle: " + " after ".join(name(place) for place in ring)
