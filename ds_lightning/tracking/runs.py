"""Open a run: a new one, one to go on with, or the one that a copy of the tracker made."""

import base64
import time
import uuid
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ds_lightning.errors import ConfigError
from ds_lightning.tracking.batches import Row
from ds_lightning.tracking.orphans import wait_for_orphans
from ds_lightning.tracking.outbox import Outbox
from ds_lightning.tracking.outboxes import outbox
from ds_lightning.tracking.params import BATCH, Params
from ds_lightning.tracking.replaying import ReplayedRun, replay_run, say_replayed
from ds_lightning.tracking.spool import runs_waiting
from ds_lightning.tracking.store import Store, connect, experiment_id

if TYPE_CHECKING:
    from mlflow import MlflowClient

_COPY_TAG = "ds_lightning.copy"


class Run:
    """A run that is open: everything but its start and end goes through the store's outbox.

    Args:
        store: the run's store.
        client: a client of it, for calls that wait for an answer.
        run_id: the run's id.
        experiment_id: its experiment's id.
        params: the parameters that it has already.
        system_step: the next step for machine metrics.
    """

    def __init__(
        self,
        store: Store,
        client: "MlflowClient",
        run_id: str,
        experiment_id: str,
        params: Mapping[str, str] | None = None,
        system_step: int = 0,
    ) -> None:
        self.client, self.run_id, self.experiment_id = client, run_id, experiment_id
        self.system_step = system_step
        self.finished = False
        # Whether it has metrics from before it was opened.
        self.goes_on = False
        self._reopening: str | None = None
        self._store = store
        self._params = Params(params)

    @property
    def outbox(self) -> Outbox:
        """The store's outbox, looked up each time: a forked process has one of its own."""
        return outbox(self._store.uri, self._store.spool)

    def metrics(self, rows: list[Row]) -> None:
        """Log rows of key, value, timestamp (ms) and step."""
        self.outbox.metrics(self.run_id, rows, self._reopening)

    def reopen(self) -> None:
        """Leave out, from now on, points that the run has by now (key, step and value): they are trained again."""
        self._reopening, self.goes_on = uuid.uuid4().hex[:8], True

    def params(self, params: Mapping[str, Any]) -> None:
        """Log parameters; one that the run has with another value becomes a tag `changed.<name>`."""
        new, changed = self._params.add(params)
        for start in range(0, len(new), BATCH):
            self.outbox.call(self.run_id, "params", items=new[start : start + BATCH])
        self.tags(changed)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        items = list(tags.items())
        for start in range(0, len(items), BATCH):
            self.outbox.call(self.run_id, "tags", items=items[start : start + BATCH])

    def artifact(self, path: str, content: bytes | str) -> None:
        """Log a small file."""
        data = content.encode() if isinstance(content, str) else content
        self.outbox.call(self.run_id, "artifact", path=path, data=base64.b64encode(data).decode())

    def dataset(self, dataset: Mapping[str, Any]) -> None:
        """Log a dataset, given as the fields of an `mlflow.entities.Dataset`."""
        self.outbox.call(self.run_id, "dataset", dataset=dict(dataset), context="training")

    def status(self, status: str) -> None:
        """Set the status when the calls before it are through."""
        self.finished = status != "RUNNING"
        self.outbox.call(self.run_id, "status", status=status, time=int(time.time() * 1000))

    def correct(self, status: str, tags: Mapping[str, str]) -> None:
        """Change status and tags of a run that is over, at once; its end time stays."""
        for name, value in tags.items():
            self.client.set_tag(self.run_id, name, value)
        self.client.update_run(self.run_id, status=status)


def open_run(
    store: Store,
    experiment: str,
    run_id: str | None = None,
    run_name: str | None = None,
    tags: Mapping[str, str] | None = None,
    copy_id: str | None = None,
) -> Run:
    """Create a run, or go on with one.

    Args:
        store: where.
        experiment: name of the experiment of a new run.
        run_id: go on with this run.
        run_name: name of a new run.
        tags: tags of a new run.
        copy_id: shared by a tracker and its pickled copies; a run with this id is taken instead of a new one.

    Raises:
        ConfigError: when the store can't be reached, the experiment was deleted or the run isn't there.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking.context.registry import resolve_tags

    client = connect(store)
    if run_id is not None:
        wait_for_orphans(store.spool)
    _look_into_spool(store, client, run_id)
    try:
        if run_id is not None:
            return _go_on(store, client, run_id)
        experiment_number = experiment_id(store, experiment)
        all_tags = dict(tags or {})
        if copy_id is not None:
            found = client.search_runs([experiment_number], f"tags.`{_COPY_TAG}` = '{copy_id}'", max_results=1)
            if found:
                return _go_on(store, client, found[0].info.run_id)
            all_tags[_COPY_TAG] = copy_id
        run = client.create_run(experiment_number, tags=resolve_tags(all_tags), run_name=run_name)
    except MlflowException as error:
        raise ConfigError(
            f"run {run_id or run_name or '(new)'} can't be opened in {store.shown_uri!r}: {error}"
        ) from error
    return Run(store, client, run.info.run_id, experiment_number)


def _go_on(store: Store, client: "MlflowClient", run_id: str) -> Run:
    run = client.get_run(run_id)
    steps = [metric.step for metric in run.data._metric_objs if metric.key.startswith("system/")]
    found = Run(store, client, run_id, run.info.experiment_id, run.data.params, max(steps, default=-1) + 1)
    found.finished = run.info.status != "RUNNING"
    found.reopen()
    found.goes_on = bool(run.data.metrics)
    return found


def _look_into_spool(store: Store, client: "MlflowClient", run_id: str | None) -> None:
    """Send what an earlier process could not send of the run to go on with, and say what else waits."""
    waiting = runs_waiting(store.spool)
    if run_id in waiting:
        result = ReplayedRun(run_id)
        replay_run(client, store.uri, store.spool, result)
        for line in say_replayed([result]):
            warnings.warn(line, RuntimeWarning, stacklevel=3)
        if result.left is not None:
            outbox(store.uri, store.spool).spool_first(run_id)
    if others := len(waiting) - (run_id in waiting):
        warnings.warn(
            f"{others} other runs wait in {store.spool}; `ds-lightning tracking replay` sends them",
            RuntimeWarning,
            stacklevel=3,
        )
