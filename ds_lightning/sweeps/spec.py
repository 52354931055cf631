"""The sweep file: what is searched, from which base, towards what."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ds_lightning.errors import ConfigError
from ds_lightning.sweeps.keys import as_mapping
from ds_lightning.sweeps.space import SearchSpace
from ds_lightning.yaml_check import check_yaml

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Objective:
    """What a trial is judged by.

    Args:
        metric: the name under which the module logs it.
        direction: minimize or maximize.
        value: which of the trial's values counts: the last one or the best one.
        step: what a validation is counted by when it is reported for pruning: `global_step` (optimizer steps)
            or `validation` (1, 2, 3...), which stays comparable when the batch size is searched.
    """

    metric: str
    direction: Direction
    value: Literal["last", "best"] = "last"
    step: Literal["global_step", "validation"] = "global_step"

    @classmethod
    def from_dict(cls, entry: Any) -> "Objective":
        """Read and check one objective.

        Raises:
            ConfigError: naming the key, what was expected and what it got.
        """
        fields = as_mapping(entry, "objective", ("metric", "direction", "value", "step"))
        metric = fields.get("metric")
        if not isinstance(metric, str) or not metric:
            raise ConfigError(f"objective: metric must be the name of a logged metric, got {metric!r}")
        allowed = {
            "direction": ("minimize", "maximize"),
            "value": ("last", "best"),
            "step": ("global_step", "validation"),
        }
        for name, words in allowed.items():
            if (name in fields or name == "direction") and fields.get(name) not in words:
                raise ConfigError(f"objective: {name} must be {' or '.join(words)}, got {fields.get(name)!r}")
        return cls(**fields)


@dataclass(frozen=True)
class SweepSpec:
    """A checked sweep file.

    Args:
        name: prefix of the study's name.
        configs: the base's configuration files, in order.
        overrides: dotted key -> value, set on the base.
        space: the search space.
        objectives: one, or several for a multi-objective search.
        sampler: `name` and Optuna's arguments of that sampler.
        pruner: `name` and Optuna's arguments of that pruner.
        trials: how many trials to run; None: until `timeout`.
        timeout: seconds after which no new trial starts; None: no limit.
        max_retries: how often a trial whose process is killed is tried again, at least 0.
        checkpoint_seconds: how often, at most, a running trial is saved, at a validation, for a retry to go on from;
            at least 0, None: never.
        keep_checkpoints: whether those stay when the trial is over.
        storage: where Optuna keeps the study (path of a journal, `sqlite:///` or `postgresql://`); None: a
            journal beside the MLflow store.
        experiment: MLflow experiment.
        folder: where relative paths are looked for first.
    """

    name: str
    configs: tuple[str, ...]
    overrides: Mapping[str, Any]
    space: SearchSpace
    objectives: tuple[Objective, ...]
    sampler: Mapping[str, Any] = field(default_factory=lambda: {"name": "tpe"})
    pruner: Mapping[str, Any] = field(default_factory=lambda: {"name": "none"})
    trials: int | None = None
    timeout: float | None = None
    max_retries: int = 2
    checkpoint_seconds: float | None = 60.0
    keep_checkpoints: bool = False
    storage: str | None = None
    experiment: str = ""
    folder: Path | None = None

    @classmethod
    def from_yaml(cls, path: str | Path) -> "SweepSpec":
        """Read and check a sweep file.

        Raises:
            ConfigError: when the file is missing, is no YAML, or says something that can't work; one line.
        """
        path = Path(path)
        try:
            check_yaml(path, "sweep file")
            content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (yaml.YAMLError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            # What can be composed but not constructed, such as a date that does not exist.
            raise ConfigError(f"sweep file {str(path)!r} is no YAML: {' '.join(str(error).split())}") from error
        return cls.from_dict(content, name=path.stem, folder=path.resolve().parent)

    @classmethod
    def from_dict(cls, content: Any, name: str = "sweep", folder: Path | None = None) -> "SweepSpec":
        """Check the content of a sweep file.

        Args:
            content: the keys of the file.
            name: the name when the content has none.
            folder: where relative paths are looked for first.

        Raises:
            ConfigError: naming the key, what was expected and what it got.
        """
        fields = as_mapping(content, "sweep file", _KEYS)
        for key in ("base", "space", "objective"):
            if key not in fields:
                raise ConfigError(f"sweep file: `{key}` is missing")
        base = as_mapping(fields["base"], "base", ("config", "overrides"))
        configs = base.get("config", [])
        configs = [configs] if isinstance(configs, str) else configs
        if not isinstance(configs, list) or not all(isinstance(config, str) for config in configs):
            raise ConfigError(f"base: config must be a file or a list of files, got {configs!r}")
        spec = cls(
            name=_text(fields, "name", name),
            configs=tuple(configs),
            overrides=as_mapping(base.get("overrides", {}), "base: overrides"),
            space=SearchSpace.from_dict(fields["space"]),
            objectives=_objectives(fields["objective"]),
            sampler=_named(fields, "sampler", "tpe"),
            pruner=_named(fields, "pruner", "none"),
            trials=positive_int("trials", fields.get("trials")),
            timeout=positive_seconds("timeout", fields.get("timeout")),
            max_retries=_retries(fields.get("max_retries", cls.max_retries)),
            checkpoint_seconds=_save_seconds(fields.get("checkpoint_seconds", cls.checkpoint_seconds)),
            keep_checkpoints=_yes_or_no("keep_checkpoints", fields.get("keep_checkpoints", cls.keep_checkpoints)),
            storage=_text(fields, "storage", None),
            experiment=_text(fields, "experiment", _text(fields, "name", name)),
            folder=folder,
        )
        spec._check_together()
        return spec

    @property
    def directions(self) -> list[Direction]:
        """The direction of each objective."""
        return [objective.direction for objective in self.objectives]

    @property
    def prunes(self) -> bool:
        """Whether trials may be pruned."""
        return bool(self.pruner["name"] != "none")

    def _check_together(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ConfigError(f"name must be letters, digits, '.', '_' or '-' (it names files), got {self.name!r}")
        if len(self.objectives) > 1 and self.prunes:
            raise ConfigError(
                f"pruner {self.pruner['name']!r} can't work with {len(self.objectives)} objectives: trials are "
                "compared by one value; drop `pruner` or keep one objective"
            )
        if len(self.objectives) > 1 and any(objective.value == "best" for objective in self.objectives):
            raise ConfigError(
                "objective: value `best` works with one objective only; with several, the best values may come "
                "from different steps and never existed together"
            )
        names = [objective.metric for objective in self.objectives]
        for metric in names:
            if names.count(metric) > 1:
                raise ConfigError(f"objective: metric {metric!r} is there twice")
        overlap = sorted(set(self.overrides) & set(self.space.dimensions))
        if overlap:
            raise ConfigError(f"{overlap[0]} is both in base.overrides and in the space; keep one")


_KEYS = (
    "name",
    "base",
    "space",
    "objective",
    "sampler",
    "pruner",
    "trials",
    "timeout",
    "max_retries",
    "checkpoint_seconds",
    "keep_checkpoints",
    "storage",
    "experiment",
)


def positive_int(name: str, value: Any) -> int | None:
    """Return an integer of at least 1, or None.

    Raises:
        ConfigError: for anything else.
    """
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


def positive_seconds(name: str, value: Any) -> float | None:
    """Return a number of seconds above 0, or None.

    Raises:
        ConfigError: for anything else.
    """
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ConfigError(f"{name} must be a number of seconds above 0, got {value!r}")
    return float(value)


def _retries(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"max_retries must be an integer of at least 0, got {value!r}")
    return value


def _save_seconds(value: Any) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0):
        return value
    raise ConfigError(f"checkpoint_seconds must be a number of seconds >= 0, or null for never, got {value!r}")


def _yes_or_no(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")
    return value


def _objectives(entry: Any) -> tuple[Objective, ...]:
    entries = entry if isinstance(entry, list) else [entry]
    if not entries:
        raise ConfigError("objective is empty; expected {metric: ..., direction: minimize or maximize}")
    return tuple(Objective.from_dict(each) for each in entries)


def _named(fields: Mapping[str, Any], key: str, default: str) -> dict[str, Any]:
    entry = fields.get(key)
    if entry is None:
        return {"name": default}
    if isinstance(entry, str):
        return {"name": entry}
    entry = as_mapping(entry, key)
    if not isinstance(entry.get("name"), str):
        raise ConfigError(f"{key}: `name` is missing, as in {{name: {default}}}")
    return entry


def _text(fields: Mapping[str, Any], key: str, default: Any) -> Any:
    value = fields.get(key, default)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{key} must be text, got {value!r}")
    return value


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
