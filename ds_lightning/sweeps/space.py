"""The search space: dotted configuration keys and what each may be."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ds_lightning.errors import ConfigError, hint
from ds_lightning.sweeps.dimension import Dimension
from ds_lightning.sweeps.keys import as_mapping

if TYPE_CHECKING:
    from optuna.trial import BaseTrial


@dataclass(frozen=True)
class SearchSpace:
    """Dotted configuration keys, each with the values that it may take.

    Args:
        dimensions: key -> `Dimension`, parents before the keys that depend on them.

    Example:
        >>> space = SearchSpace.from_dict({
        ...     "model.init_args.lr": {"type": "float", "low": 1e-3, "high": 1.0, "log": True},
        ...     "data.init_args.batch_size": {"type": "categorical", "choices": [32, 64]},
        ... })
        >>> next(space.assignments())
        {'model.init_args.lr': 0.001, 'data.init_args.batch_size': 32}
    """

    dimensions: Mapping[str, Dimension]

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "SearchSpace":
        """Build a space from dotted key -> `{type, low, high, step, log, choices, when}`.

        Args:
            mapping: `type` is float, int or categorical; the other names are those of Optuna's `suggest_*`.
                `when: {other.key: value or [values]}` makes a key exist only where every condition holds.

        Raises:
            ConfigError: on an unknown type, argument or key, an impossible range, a cycle of conditions, or a
                condition that can never hold.
        """
        entries = as_mapping(mapping, "space")
        if not entries:
            raise ConfigError("space is empty; expected dotted keys such as model.init_args.lr")
        dimensions = {key: Dimension.from_dict(key, entry) for key, entry in entries.items()}
        for key, dimension in dimensions.items():
            for parent, wanted in dimension.when.items():
                if parent not in dimensions:
                    raise ConfigError(
                        f"space: {key}: `when` names {parent!r}, not in the space{hint(parent, dimensions)}"
                    )
                dimensions[parent].check_condition(parent, wanted, key)
        space = cls({key: dimensions[key] for key in _parents_first(dimensions)})
        for key in space.dimensions:
            space._requirement(key)
        return space

    def suggest(self, trial: "BaseTrial") -> dict[str, Any]:
        """Let a trial choose; keys whose condition does not hold are absent.

        Args:
            trial: an Optuna trial (or a `FixedTrial`).

        Returns:
            Dotted key -> value, in the order in which they were asked for.
        """
        chosen: dict[str, Any] = {}
        for key, dimension in self.dimensions.items():
            if dimension.holds(chosen):
                chosen[key] = dimension.suggest(key, trial)
        return chosen

    def decode(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Turn a trial's stored `params` back into configuration values, in the space's order."""
        return {key: dimension.decode(params[key]) for key, dimension in self.dimensions.items() if key in params}

    def assignments(self) -> Iterator[dict[str, Any]]:
        """Yield valid assignments without a trial: every reachable branch, every choice, both ends of a range.

        A branch is a set of keys that exist together. Within a branch the values of all keys advance side by
        side, so a branch costs as many assignments as its longest list of choices.
        """
        for pools in self._branches({}, list(self.dimensions)):
            longest = max(len(pool) for pool in pools.values())
            for index in range(longest):
                yield {key: pool[index % len(pool)] for key, pool in pools.items()}

    def grid(self) -> dict[str, list[Any]]:
        """Return every value of every key, for a grid.

        Raises:
            ConfigError: for a conditional key, or a range without `step`.
        """
        for key, dimension in self.dimensions.items():
            if dimension.when:
                raise ConfigError(f"sampler grid: {key} has `when`; a grid has no conditional keys, use tpe or random")
        return {key: dimension.grid(key) for key, dimension in self.dimensions.items()}

    def _branches(self, pools: dict[str, list[Any]], rest: list[str]) -> Iterator[dict[str, list[Any]]]:
        if not rest:
            yield pools
            return
        key, *rest = rest
        dimension = self.dimensions[key]
        if not dimension.holds({parent: pool[0] for parent, pool in pools.items()}):
            yield from self._branches(pools, rest)
            return
        conditions = [child.when[key] for child in self.dimensions.values() if key in child.when]
        for pool in dimension.groups(conditions):
            yield from self._branches({**pools, key: pool}, rest)

    def _requirement(self, key: str) -> dict[str, list[Any]]:
        """What must be true of other keys for this one to exist."""
        merged: dict[str, list[Any]] = {}
        for parent, wanted in self.dimensions[key].when.items():
            for name, values in [(parent, wanted), *self._requirement(parent).items()]:
                both = [value for value in values if value in merged.get(name, values)]
                if not both:
                    raise ConfigError(f"space: {key} can never exist: its conditions want {name} to be two things")
                merged[name] = both
        return merged


def _parents_first(dimensions: Mapping[str, Dimension]) -> list[str]:
    order: list[str] = []

    def visit(key: str, path: tuple[str, ...]) -> None:
        if key in path:
            circle = " -> ".join([*path[path.index(key) :], key])
            raise ConfigError(f"space: the `when` conditions go in a circle: {circle}")
        if key not in order:
            for parent in dimensions[key].when:
                visit(parent, (*path, key))
            order.append(key)

    for key in dimensions:
        visit(key, ())
    return order
