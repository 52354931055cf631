"""One key of a search space: its type, its range, and when it exists."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ds_lightning.errors import ConfigError, hint
from ds_lightning.sweeps.keys import as_mapping

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

ARGUMENTS = {
    "float": ("low", "high", "step", "log"),
    "int": ("low", "high", "step", "log"),
    "categorical": ("choices",),
}


@dataclass(frozen=True)
class Dimension:
    """What one key may be.

    Args:
        type: float, int or categorical.
        arguments: the keyword arguments of Optuna's `suggest_<type>`.
        when: parent key -> the parent's values for which this key exists; all must hold.
    """

    type: str
    arguments: Mapping[str, Any]
    when: Mapping[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, key: str, entry: Any) -> "Dimension":
        """Read and check one entry of a space.

        Raises:
            ConfigError: naming the key, what was expected and what it got.
        """
        where = f"space: {key}"
        fields = as_mapping(entry, where)
        kind = fields.pop("type", None)
        if kind not in ARGUMENTS:
            raise ConfigError(f"{where}: type must be one of {', '.join(ARGUMENTS)}, got {kind!r}")
        when = {
            parent: list(wanted) if isinstance(wanted, list) else [wanted]
            for parent, wanted in as_mapping(fields.pop("when", {}), f"{where}: when").items()
        }
        for name in fields:
            if name not in ARGUMENTS[kind]:
                raise ConfigError(f"{where}: {kind} takes no {name!r}{hint(name, (*ARGUMENTS[kind], 'when'))}")
        if kind == "categorical":
            _check_choices(where, fields.get("choices"))
        else:
            fields = _checked_range(where, kind, fields)
        return cls(kind, fields, when)

    def suggest(self, key: str, trial: "BaseTrial") -> Any:
        """Let a trial choose this key's value."""
        if self.type == "categorical":
            labels = [_label(choice) for choice in self.arguments["choices"]]
            return self.decode(trial.suggest_categorical(key, labels))
        if self.type == "int":
            return trial.suggest_int(key, **self.arguments)
        return trial.suggest_float(key, **self.arguments)

    def decode(self, stored: Any) -> Any:
        """Turn the value that Optuna stores into the configuration's."""
        if self.type != "categorical":
            return stored
        for choice in self.arguments["choices"]:
            if _same(_label(choice), stored):
                return choice
        return stored

    def holds(self, chosen: Mapping[str, Any]) -> bool:
        """Tell whether the key exists beside the values chosen so far."""
        return all(parent in chosen and _in(chosen[parent], wanted) for parent, wanted in self.when.items())

    def check_condition(self, key: str, wanted: Sequence[Any], child: str) -> None:
        """Check that this key can take the values that a child's `when` asks for.

        Raises:
            ConfigError: for a float, an empty list, or a value out of reach.
        """
        where = f"space: {child}: `when` {key}"
        if self.type == "float":
            raise ConfigError(f"{where}: a float has no single values to wait for; use an int or a categorical")
        if not wanted:
            raise ConfigError(f"{where}: names no value")
        for value in wanted:
            if not _in(value, self._values()):
                raise ConfigError(f"{where}: is never {value!r}")

    def groups(self, conditions: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Return sample values, split so that those of one group meet the same conditions."""
        groups: dict[tuple[bool, ...], list[Any]] = {}
        for value in self._samples([value for wanted in conditions for value in wanted]):
            groups.setdefault(tuple(_in(value, wanted) for wanted in conditions), []).append(value)
        return list(groups.values())

    def grid(self, key: str) -> list[Any]:
        """Return every value, as Optuna stores it.

        Raises:
            ConfigError: for a range that has no `step`.
        """
        if self.type == "categorical":
            return [_label(choice) for choice in self.arguments["choices"]]
        log = self.arguments.get("log", False)
        step = self.arguments.get("step", 1 if self.type == "int" and not log else None)
        if step is None:
            raise ConfigError(f"sampler grid: {key} needs `step`, or `type: categorical` with choices")
        low, high = self.arguments["low"], self.arguments["high"]
        # The small surplus keeps 0.1, 0.2, 0.3 whole in floating point.
        return [low + index * step for index in range(int((high - low) / step + 1e-9) + 1)]

    def _samples(self, named: Sequence[Any]) -> list[Any]:
        """Every choice; of a range both ends and, where a condition names values, those and one other."""
        if self.type == "categorical":
            return list(self.arguments["choices"])
        if self.type == "float":
            return sorted({self.arguments["low"], self.arguments["high"]})
        values = self._values()
        return sorted({*named, *values[: len(named) + 1 if named else 1], values[-1]})

    def _values(self) -> Sequence[Any]:
        if self.type == "categorical":
            choices: Sequence[Any] = self.arguments["choices"]
            return choices
        return range(self.arguments["low"], self.arguments["high"] + 1, self.arguments.get("step", 1))


def _checked_range(where: str, kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    checked = dict(fields)
    log = checked.get("log", False)
    if not isinstance(log, bool):
        raise ConfigError(f"{where}: log must be true or false, got {log!r}")
    for name in ("low", "high", "step"):
        if name not in fields:
            if name == "step":
                continue
            raise ConfigError(f"{where}: {kind} needs `{name}`")
        value = fields[name]
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (kind == "int" and value != int(value)):
            expected = "an integer" if kind == "int" else "a finite number"
            raise ConfigError(f"{where}: {name} must be {expected}, got {value!r}")
        if kind == "int" and abs(value) > 2**53:
            raise ConfigError(f"{where}: {name} must be within 2**53, where integers are drawn exactly, got {value!r}")
        checked[name] = int(value) if kind == "int" else float(value)
    low, high = checked["low"], checked["high"]
    if low > high:
        raise ConfigError(f"{where}: low must be at most high, got low {low!r} and high {high!r}")
    if "step" in checked and checked["step"] <= 0:
        raise ConfigError(f"{where}: step must be above 0, got {checked['step']!r}")
    if log and "step" in checked:
        raise ConfigError(f"{where}: log and step exclude each other")
    if log and low <= 0:
        raise ConfigError(f"{where}: log needs low above 0, got {low!r}")
    return checked


def _check_choices(where: str, choices: Any) -> None:
    if not isinstance(choices, list | tuple) or not choices:
        raise ConfigError(f"{where}: choices must be a list with at least one value, got {choices!r}")
    for index, choice in enumerate(choices):
        if _in(choice, choices[:index]):
            raise ConfigError(f"{where}: choice {choice!r} is there twice")
        if isinstance(choice, float) and not math.isfinite(choice):
            raise ConfigError(f"{where}: choice {choice!r} is not finite")


def _label(choice: Any) -> Any:
    """Optuna stores plain values only; lists and mappings travel as JSON."""
    return choice if choice is None or isinstance(choice, bool | int | float | str) else json.dumps(choice)


def _same(one: Any, other: Any) -> bool:
    # In Python True == 1, but in a configuration they are two values.
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _in(value: Any, values: Sequence[Any]) -> bool:
    if isinstance(values, range):
        return not isinstance(value, bool) and value in values
    return any(_same(value, other) for other in values)
