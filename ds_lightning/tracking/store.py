"""Where runs live: one folder with database, artifacts and checkpoints, or a tracking server."""

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from ds_lightning.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DEFAULT_ROOT = "mlruns"
_REACH_SECONDS = 5.0
# Slow disks and the first creation of the tables (2 to 4 s) both fit in this.
_LOCK_SECONDS = 120.0


@dataclass(frozen=True)
class Store:
    """A place for runs.

    Args:
        uri: MLflow tracking URI.
        artifact_location: where the artifacts of new experiments go; None lets the server decide.
        checkpoints: folder that gets the Trainer's checkpoints.
    """

    uri: str
    artifact_location: str | None
    checkpoints: Path

    @property
    def shown_uri(self) -> str:
        """The tracking URI without its password."""
        return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", self.uri)

    @property
    def spool(self) -> Path:
        """Folder for what could not be sent."""
        return self.checkpoints.parent / "spool"


def default_store(root: str | Path | None = None) -> Store:
    """Return the store that runs go to, and make its folder when it is a local one.

    Args:
        root: folder of the store. None means the server in the environment variable MLFLOW_TRACKING_URI when
            that is set (read now, not at import), else `./mlruns`.

    Returns:
        The store. A folder holds `mlflow.db`, `artifacts/`, `checkpoints/` and a `.gitignore` that keeps all
        of it out of git.

    Example:
        >>> import tempfile
        >>> store = default_store(tempfile.mkdtemp())
        >>> store.uri.startswith("sqlite:////"), store.checkpoints.name
        (True, 'checkpoints')
    """
    store = locate(root)
    if root is not None or not os.environ.get("MLFLOW_TRACKING_URI"):
        make_folder(store)
    return store


def locate(place: str | Path | None = None) -> Store:
    """Name the store at a folder or a tracking URI, without making anything.

    Args:
        place: folder, or tracking URI (`http://...`, `sqlite:///...`); None as in `default_store`.
    """
    place = place or os.environ.get("MLFLOW_TRACKING_URI") or _DEFAULT_ROOT
    text = str(place)
    if text.startswith("file:"):
        raise ConfigError(
            f"store is {text!r}, but MLflow no longer writes to plain files; give the folder itself "
            f"(store: {text.removeprefix('file:').removeprefix('//') or _DEFAULT_ROOT}), which becomes an "
            "SQLite store"
        )
    if "://" in text or text.split(":")[0] in ("databricks", "databricks-uc", "uc"):
        database = _sqlite_file(text)
        artifacts = None if database is None else str(database.parent / "artifacts")
        return Store(text, artifacts, Path(_DEFAULT_ROOT, "checkpoints").resolve())
    root = Path(place).expanduser().resolve()
    if root.exists() and not root.is_dir():
        raise ConfigError(f"store {text!r} is a file; expected a folder, which holds mlflow.db, or a tracking URI")
    return Store(f"sqlite:///{root / 'mlflow.db'}", str(root / "artifacts"), root / "checkpoints")


def make_folder(store: Store) -> None:
    """Make the folder of a local store, with its `.gitignore`; nothing for a server."""
    database = _sqlite_file(store.uri)
    if database is None:
        return
    if database.is_dir():
        # MLflow would try for a minute to open it.
        raise ConfigError(f"the store's database {database} is a folder; move it away, or choose another store")
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"store {database.parent} can't be made: {error.strerror}; choose another folder") from error
    ignore = database.parent / ".gitignore"
    if store.checkpoints.parent == database.parent and not ignore.exists():
        ignore.write_text("*\n!.gitignore\n")


def connect(store: Store) -> "MlflowClient":
    """Return a client of the store; the first one makes the database's tables, under a lock.

    Raises:
        ConfigError: when the tracking URI is wrong or nothing answers there.
    """
    _check_reachable(store)
    make_folder(store)
    with _one_at_a_time(store), _quiet():
        from mlflow import MlflowClient

        try:
            return MlflowClient(store.uri)
        # SQLAlchemy, its drivers and MLflow's registry each have their own exception for a wrong URI.
        except Exception as error:
            raise ConfigError(
                f"no tracking store at {store.shown_uri!r} ({_first_line(error)}); expected a "
                "folder, http(s)://host:port, or a database such as sqlite:////path/mlflow.db"
            ) from error


def experiment_id(store: Store, name: str) -> str:
    """Return the id of the experiment, which is created if it isn't there.

    Args:
        store: where to look.
        name: the experiment's name.

    Raises:
        ConfigError: when an experiment of that name was deleted, or the store can't be used.
    """
    client = connect(store)
    with _one_at_a_time(store), _quiet():
        from mlflow.exceptions import MlflowException

        try:
            found = client.get_experiment_by_name(name)
            if found is None:
                try:
                    return str(client.create_experiment(name, artifact_location=store.artifact_location))
                except MlflowException as error:
                    # On a server the lock is not shared with other machines: one of them may have been first.
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    found = client.get_experiment_by_name(name)
        except MlflowException as error:
            raise ConfigError(
                f"experiment {name!r} can't be opened at {store.shown_uri!r}: {_first_line(error)}"
            ) from error
    if found is None or found.lifecycle_stage == "deleted":
        number = found.experiment_id if found is not None else "ID"
        raise ConfigError(
            f"experiment {name!r} was deleted in {store.shown_uri!r}; restore it with "
            f"`MLFLOW_TRACKING_URI={store.shown_uri} mlflow experiments restore "
            f"--experiment-id {number}`, or choose another name"
        )
    return str(found.experiment_id)


def _check_reachable(store: Store) -> None:
    """Ask an HTTP server for a sign of life: MLflow's own retries would take four minutes to give up."""
    if not store.uri.startswith(("http://", "https://")):
        return
    import requests

    try:
        requests.get(store.uri.rstrip("/") + "/health", timeout=_REACH_SECONDS)
    except (requests.RequestException, ValueError) as error:
        raise ConfigError(
            f"tracking server {store.shown_uri!r} does not answer ({type(error).__name__}); start it, "
            "correct the URI, or unset MLFLOW_TRACKING_URI to write to ./mlruns"
        ) from error


def _sqlite_file(uri: str) -> Path | None:
    if not uri.startswith("sqlite:") or ":memory:" in uri or "///" not in uri:
        return None
    return Path(uri.split("///", 1)[1].split("?")[0]).resolve()


@contextlib.contextmanager
def _one_at_a_time(store: Store) -> Iterator[None]:
    database = _sqlite_file(store.uri)
    if database is None:
        yield
        return
    with FileLock(f"{database}.lock", timeout=_LOCK_SECONDS):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's table-creation chatter and SQLAlchemy's deprecations off the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("mlflow.store.db.utils", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
