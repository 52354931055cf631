"""Optuna's side of a sweep: where the study is kept, its sampler and its pruner."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from ds_lightning.errors import ConfigError
from ds_lightning.sweeps.keys import as_mapping, hint
from ds_lightning.sweeps.space import SearchSpace
from ds_lightning.sweeps.spec import Direction

SAMPLERS: dict[str, type[BaseSampler]] = {
    "tpe": optuna.samplers.TPESampler,
    "random": optuna.samplers.RandomSampler,
    "gp": optuna.samplers.GPSampler,
    "cmaes": optuna.samplers.CmaEsSampler,
    "qmc": optuna.samplers.QMCSampler,
    "nsga2": optuna.samplers.NSGAIISampler,
    "nsga3": optuna.samplers.NSGAIIISampler,
    "grid": optuna.samplers.GridSampler,
}
PRUNERS: dict[str, type[BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "percentile": optuna.pruners.PercentilePruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
    "threshold": optuna.pruners.ThresholdPruner,
}


def make_sampler(entry: Mapping[str, Any], space: SearchSpace, told: int = 0) -> BaseSampler:
    """Build the sampler of a sweep file.

    Args:
        entry: `name` and the sampler's own arguments.
        space: the search space, which a grid is made of.
        told: trials that the study already has; a seed moves on by it, for otherwise a continued study would
            draw the same points again. A grid keeps its seed, which orders the points that it has still to try.

    Raises:
        ConfigError: for an unknown name or argument, or a value that the sampler refuses.
    """
    arguments = {key: value for key, value in entry.items() if key != "name"}
    if isinstance(arguments.get("seed"), int) and entry["name"] != "grid":
        arguments["seed"] += told
    fixed = {"search_space": space.grid()} if entry["name"] == "grid" else {}
    sampler: BaseSampler = _make("sampler", entry["name"], SAMPLERS, arguments, fixed)
    return sampler


def make_pruner(entry: Mapping[str, Any]) -> BasePruner:
    """Build the pruner of a sweep file.

    Args:
        entry: `name` and the pruner's own arguments.

    Raises:
        ConfigError: for an unknown name or argument, or a value that the pruner refuses.
    """
    arguments = {key: value for key, value in entry.items() if key != "name"}
    pruner: BasePruner = _make("pruner", entry["name"], PRUNERS, arguments, {})
    return pruner


def _make(kind: str, name: str, homes: Mapping[str, Any], arguments: dict[str, Any], fixed: dict[str, Any]) -> Any:
    if name not in homes:
        raise ConfigError(f"{kind}: unknown name {name!r}{hint(name, homes)}")
    made = homes[name]
    known = [
        parameter.name
        for parameter in inspect.signature(made).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and parameter.name not in fixed
    ]
    as_mapping(arguments, f"{kind} {name}", known)
    try:
        return made(**arguments, **fixed)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"{kind} {name}: {' '.join(str(error).split())}") from error


def open_storage(place: str) -> BaseStorage:
    """Open the storage of a study, and make its folder.

    Args:
        place: the path of a journal file, or a `sqlite:///`, `postgresql://` or `mysql://` URL.

    Raises:
        ConfigError: when the database can't be reached or its driver is not installed.
    """
    if "://" not in place:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(place))
    if place.startswith("sqlite:///"):
        # SQLite makes the file, never the folder.
        Path(place.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        return RDBStorage(place)
    except ImportError as error:
        raise ConfigError(
            f"storage {_without_password(place)!r} needs a driver: {' '.join(str(error).split())}; "
            "for PostgreSQL install psycopg2-binary"
        ) from error
    except Exception as error:
        # SQLAlchemy and each driver have their own families of errors; all mean the same here.
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"storage {_without_password(place)!r} can't be opened: {reason}") from error


def mend_journal(path: Path) -> None:
    """Cut off a last line without its end, left by a process that was killed while it wrote.

    The next line would be appended to it, and neither could be read.
    """
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        with path.open("r+b") as journal:
            content = journal.read()
            journal.truncate(content.rfind(b"\n") + 1)
    finally:
        lock.release()


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def create_study(
    storage: BaseStorage, name: str, directions: list[Direction], sampler: BaseSampler, pruner: BasePruner
) -> optuna.Study:
    """Create a study; when the name is taken, by one that began in the same second, a number is added."""
    taken = set(optuna.get_all_study_names(storage))
    free = name
    count = 1
    while free in taken:
        count += 1
        free = f"{name}-{count}"
    return optuna.create_study(storage=storage, study_name=free, directions=directions, sampler=sampler, pruner=pruner)


def check_study(storage: BaseStorage, name: str, directions: list[Direction]) -> int:
    """Check that a study can be continued.

    Returns:
        The number of trials that it has.

    Raises:
        ConfigError: when there is no such study, or it goes in another direction.
    """
    names = optuna.get_all_study_names(storage)
    if name not in names:
        raise ConfigError(f"study {name!r} is not in the storage{hint(name, names) if names else ', which is empty'}")
    study = optuna.load_study(study_name=name, storage=storage)
    known = [direction.name.lower() for direction in study.directions]
    if known != list(directions):
        raise ConfigError(f"study {name!r} was made to {', '.join(known)}; the sweep file says {', '.join(directions)}")
    return len(study.trials)
