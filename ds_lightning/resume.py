"""Find the run that `ds-lightning fit --resume` goes on with, and its newest whole checkpoint."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from ds_lightning.checkpoint_reader import read_outline
from ds_lightning.checkpoints import newest_checkpoint
from ds_lightning.errors import ConfigError
from ds_lightning.tracking.store import Store, connect, locate

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

CONFIG_FILE = "config.yaml"
_PAGE = 100
# A killed run's DataLoader workers hold its lock until they see, within 5 s, that their parent is gone.
_LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class UnfinishedRun:
    """A run to go on with.

    Args:
        run_id: its id.
        checkpoint: its newest whole checkpoint.
        config: the configuration that it saved; None when it saved none.
        status: its status in MLflow.
        max_epochs: what it was to train for; None when that isn't known.
    """

    run_id: str
    checkpoint: Path
    config: dict[str, Any] | None
    status: str
    max_epochs: int | None

    def check_goes_further(self, max_epochs: int | None) -> None:
        """Refuse to go on with a run that has reached its end, or is past it.

        Args:
            max_epochs: what it is to train for now; -1 for ever.

        Raises:
            ConfigError: when the run is FINISHED and max_epochs is no larger than it was, or less than what it has
                begun.
        """
        begun = self._epochs_begun()
        if max_epochs is not None and -1 < max_epochs < begun:
            raise ConfigError(
                f"max_epochs is {max_epochs}, but run {self.run_id} has begun {begun}; give at least {begun}"
            )
        if self.status != "FINISHED" or max_epochs == -1:
            return
        if max_epochs is None or (self.max_epochs is not None and max_epochs <= self.max_epochs):
            raise ConfigError(
                f"run {self.run_id} is FINISHED, after max_epochs {self.max_epochs}; to train further give a larger "
                f"--trainer.max_epochs, got {max_epochs}"
            )

    def _epochs_begun(self) -> int:
        content = read_outline(self.checkpoint).content
        try:
            # The entry `epoch` is one less where the checkpoint was saved within the epoch, its end included.
            begun: int = content["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"]
        except (KeyError, TypeError):  # of a script that keeps no loops
            begun = content["epoch"]
        return begun


def find_unfinished(
    experiment: str, place: str | Path | None = None, run_id: str | None = None, checkpoints: Sequence[Path] = ()
) -> UnfinishedRun:
    """Find a run to go on with.

    Args:
        experiment: name of the MLflow experiment to look in.
        place: folder of the store, or a tracking URI; None as in `MLflowTracker`.
        run_id: this run, whatever its experiment; None means the experiment's newest that is not FINISHED, is not
            going now and is no part of a sweep.
        checkpoints: more folders to look for the run's checkpoints in.

    Raises:
        ConfigError: when there is none, it is still going, or it has no whole checkpoint; one line.
    """
    store = locate(place)
    client = connect(store)
    run = _given(client, store, run_id) if run_id is not None else _newest(client, store, experiment)
    config = _saved_config(client, run)
    folders = [_folder(store, run) / "checkpoints", *checkpoints]
    # The first folder that has one: the others may hold other runs' checkpoints too.
    found = next((path for path in map(newest_checkpoint, folders) if path is not None), None)
    if found is None:
        raise ConfigError(
            f"run {run.info.run_id} ({run.info.status}) has no whole checkpoint in {', '.join(map(str, folders))}; "
            "start again without --resume, or name another run: --resume RUN_ID"
        )
    epochs = run.data.tags.get("changed.trainer.max_epochs", run.data.params.get("trainer.max_epochs", ""))
    known = int(epochs) if epochs.lstrip("-").isdigit() else None
    return UnfinishedRun(run.info.run_id, found, config, run.info.status, known)


def hold(folder: Path) -> FileLock:
    """Mark a run as going, until the lock is let go or the process ends, however that happens.

    Args:
        folder: the run's own folder, which holds its `checkpoints`.

    Raises:
        ConfigError: when another process is training this run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "going.lock")
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout:
        raise ConfigError(f"run {folder.name} is being trained by another process; stop that one first") from None
    return lock


def _is_going(folder: Path, seconds: float = 0.0) -> bool:
    if not (folder / "going.lock").exists():
        return False
    try:
        with FileLock(folder / "going.lock", timeout=seconds):
            return False
    except Timeout:
        return True


def _folder(store: Store, run: "Run") -> Path:
    # Where the Trainer puts checkpoints: <save_dir>/<logger.name>/<logger.version>/checkpoints.
    folder: Path = store.checkpoints / run.info.experiment_id / run.info.run_id
    return folder


def _given(client: "MlflowClient", store: Store, run_id: str) -> "Run":
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise ConfigError(
            f"no run {run_id!r} in {store.shown_uri!r}; the MLflow UI shows the ids (`ds-lightning ui`)"
        ) from error
    if run.info.status == "RUNNING" and _is_going(_folder(store, run), _LOCK_SECONDS):
        raise ConfigError(f"run {run_id} is still going; stop its process first")
    return run


def _newest(client: "MlflowClient", store: Store, experiment: str) -> "Run":
    nothing = (
        f"nothing to resume: experiment {experiment!r} in {store.shown_uri!r} has no run that is KILLED, FAILED or "
        "left RUNNING; name an experiment (--trainer.logger.experiment NAME) or a run (--resume RUN_ID)"
    )
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise ConfigError(nothing)
    token = None
    while True:
        page = client.search_runs(
            [found.experiment_id],
            "attributes.status != 'FINISHED'",
            max_results=_PAGE,
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        for run in page:
            # Sweeps go on by themselves: `ds-lightning sweep` on the same study.
            if not any(tag.startswith("optuna.") for tag in run.data.tags) and not _is_going(
                _folder(store, run), _LOCK_SECONDS if run.info.status == "RUNNING" else 0.0
            ):
                return run
        token = page.token
        if not token:
            raise ConfigError(nothing)


def _saved_config(client: "MlflowClient", run: "Run") -> dict[str, Any] | None:
    from mlflow.exceptions import MlflowException

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with TemporaryDirectory() as folder:
        try:
            path = client.download_artifacts(run.info.run_id, CONFIG_FILE, folder)
        except (MlflowException, OSError):
            return None
        config: dict[str, Any] = yaml.safe_load(Path(path).read_text())
    # The files that it was composed of: it holds all that was in them.
    config.pop("config", None)
    return config
