"""Optuna's side of a sweep: where the study is kept, its sampler and its pruner."""

import inspect
import json
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy import Connection, event
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from ds_lightning.errors import ConfigError, hint
from ds_lightning.sweeps.keys import as_mapping
from ds_lightning.sweeps.space import SearchSpace
from ds_lightning.sweeps.spec import Direction

_LOCKED_SECONDS = 120.0
_TRIES = 5
_TRY_AGAIN_SECONDS = 0.5
# Optuna's number of the operation in a journal.
_CREATE_STUDY = 0

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
    for key, value in arguments.items():
        _check_type(f"{kind} {name}: {key}", inspect.signature(made).parameters[key].annotation, value)
    try:
        if made is optuna.pruners.HyperbandPruner and not isinstance(arguments.get("reduction_factor", 3), str):
            # It takes any factor and would never prune; the pruner that it is made of looks.
            optuna.pruners.SuccessiveHalvingPruner(reduction_factor=arguments.get("reduction_factor", 3))
        return made(**arguments, **fixed)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"{kind} {name}: {' '.join(str(error).split())}") from error


def _check_type(where: str, annotation: Any, value: Any) -> None:
    """Refuse text for a number: most samplers and pruners would take it, and fail in the middle of the sweep."""
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    allowed = text.replace(" ", "").split("|")
    if not set(allowed) <= {*kinds, "None"}:
        # Dictionaries and lists; what is no plain value can't come from a file.
        if value is not None and not isinstance(value, dict | list):
            raise ConfigError(f"{where} can't be given in a sweep file, got {value!r}")
        return
    types = tuple(kind for name in allowed for kind in kinds.get(name, (type(None),)))
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ConfigError(f"{where} must be {' or '.join(allowed).replace('None', 'null')}, got {value!r}")


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
        # The driver begins no transaction by itself: `_take_turns` does.
        options: dict[str, Any] = {"connect_args": {"timeout": _LOCKED_SECONDS, "isolation_level": None}}
    else:
        # A server that was restarted meanwhile costs one connection, not the sweep.
        options = {"pool_pre_ping": True}
    try:
        storage = _open_database(place, options)
    except ImportError as error:
        raise ConfigError(
            f"storage {_without_password(place)!r} needs a driver: {' '.join(str(error).split())}; "
            "for PostgreSQL install psycopg2-binary"
        ) from error
    except Exception as error:
        # SQLAlchemy and each driver have their own families of errors; all mean the same here.
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"storage {_without_password(place)!r} can't be opened: {reason}") from error
    if place.startswith("sqlite:///"):
        event.listen(storage.engine, "begin", _take_turns)
    return storage


def _take_turns(connection: Connection) -> None:
    """Make a transaction of SQLite wait for its turn before it reads.

    The driver's own transactions begin with what they write: two processes both read that a trial is RUNNING, and
    both end it. One that had begun to read would be refused ("database is locked"), without waiting.
    """
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _with_driver(url: str) -> str:
    """Name the driver that is installed: SQLAlchemy 2.1 looks for psycopg alone, 2.0 for psycopg2."""
    for name in ("psycopg2", "psycopg"):
        if url.startswith("postgresql://") and find_spec(name) is not None:
            return url.replace("postgresql://", f"postgresql+{name}://", 1)
    return url


def _open_database(place: str, options: dict[str, Any]) -> RDBStorage:
    place = _with_driver(place)
    for _ in range(_TRIES):
        try:
            return RDBStorage(place, engine_kwargs=dict(options))
        except (IntegrityError, OperationalError, ProgrammingError) as error:
            # Another process makes the tables in this moment.
            if "exist" not in str(error) and "unique" not in str(error).lower():
                raise
            time.sleep(_TRY_AGAIN_SECONDS)
    return RDBStorage(place, engine_kwargs=dict(options))


def mend_journal(path: Path) -> None:
    """Cut off a last line without its end, left by a process that was killed while it wrote.

    The next line would be appended to it, and neither could be read.

    Raises:
        ConfigError: when another line was damaged, or the first ones are gone; the file is left as it is.
    """
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        with path.open("r+b") as journal:
            content = journal.read()
            end = content.rfind(b"\n") + 1
            _check_journal(path, content[:end])
            journal.truncate(end)
    finally:
        lock.release()


def _check_journal(path: Path, content: bytes) -> None:
    made = False
    for number, line in enumerate(content.splitlines(), 1):
        try:
            entry = json.loads(line)
            whole = isinstance(entry, dict) and isinstance(entry.get("op_code"), int)
        except (ValueError, RecursionError):
            whole = False
        if whole:
            # The first thing that is written is the study itself.
            made = made or entry["op_code"] == _CREATE_STUDY
        if not whole or not made:
            what = "is damaged" if not whole else "comes before any study was made, so that lines before it are missing"
            raise ConfigError(
                f"study's journal {path}: line {number} {what}; put a whole copy in its place, or start a new study "
                "without --study"
            )


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
