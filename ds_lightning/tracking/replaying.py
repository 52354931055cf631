"""Send what lies in the spool: in order, with the original steps and times, once."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ds_lightning.errors import ConfigError, DataError
from ds_lightning.tracking.calls import (
    MAX_ROWS_A_CALL,
    apply,
    is_gone,
    is_hopeless,
    is_refusal,
    is_whole,
    without_known,
)
from ds_lightning.tracking.notices import first_line
from ds_lightning.tracking.present import Present
from ds_lightning.tracking.spool import (
    calls_file,
    count_waiting,
    keep_refused,
    mark_sent,
    metrics_file,
    read,
    refused_file,
    remove_if_sent,
    runs_waiting,
    take_dropped,
)
from ds_lightning.tracking.store import connect, locate

if TYPE_CHECKING:
    from mlflow import MlflowClient

# A run's other calls are sent one by one, but one parsed line may be an artifact of megabytes.
_CALLS_AT_ONCE = 1


@dataclass
class ReplayedRun:
    """What `replay` did for one run.

    Args:
        run_id: the run.
        metrics: metric points sent.
        calls: other calls sent: parameters, tags, artifacts, datasets, status.
        refused: metrics and calls that the server will never take; they are kept in `<run>.refused.jsonl`.
        left: why something is still in the spool; None when nothing is.
        notices: what else there is to say, one line each.
    """

    run_id: str
    metrics: int = 0
    calls: int = 0
    refused: int = 0
    left: str | None = None
    notices: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether everything reached the server."""
        return self.left is None and self.refused == 0


def replay(store: str | Path | None = None, run_id: str | None = None) -> list[ReplayedRun]:
    """Send to MLflow what an outage left in the store's spool folder.

    A batch of at most 1,000 metrics is marked as sent, on disk, when the server has acknowledged it. Killed at
    any moment and called again it goes on behind the last mark; for the one batch whose answer may have been lost
    the server is asked what it has, so nothing is logged twice, whatever the server's database. Of a run that was
    reopened, points that the run has with another time are left out too (`present.Present`).

    Args:
        store: folder of the store or tracking URI; None: MLFLOW_TRACKING_URI, else `./mlruns`.
        run_id: only this run; None for all that wait.

    Returns:
        One entry for each run that had something in the spool. A run that can't be sent (deleted, or another
        process is sending it) keeps its files, and the others go on; a server that can't be reached leaves all.

    Raises:
        ConfigError: when `store` can't be a store.

    Example:
        >>> import tempfile
        >>> replay(tempfile.mkdtemp())
        []
    """
    place = locate(store)
    runs = [run for run in runs_waiting(place.spool) if run_id in (None, run)]
    if not runs:
        return []
    done = [ReplayedRun(run) for run in runs]
    try:
        client = connect(place)
    except ConfigError as error:
        for result in done:
            result.left = str(error)
        return done
    away: str | None = None
    for result in done:
        if away is None:
            away = replay_run(client, place.uri, place.spool, result)
        else:
            result.left = away
    return done


def replay_run(client: "MlflowClient", uri: str, spool: Path, result: ReplayedRun) -> str | None:
    """Send one run's spool, and write into `result` what became of it; return why the server is away."""
    away = None
    try:
        with _one_try():
            drain(client, uri, spool, result)
    except Timeout:
        result.left = "another process is sending it"
    # A server can fail in any way; the files stay, and the reason is said.
    except Exception as error:
        reason = first_line(str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}")
        if not is_hopeless(error):
            away = reason
        result.left = reason
    if result.left is not None:
        metrics, calls = count_waiting(spool, result.run_id)
        result.left += f"; {metrics} metrics and {calls} other calls are kept in {spool}"
    return away


def drain(
    client: "MlflowClient",
    uri: str,
    spool: Path,
    result: ReplayedRun,
    on_batch: Callable[[], None] = lambda: None,
) -> None:
    """Send one run's spool until nothing is left.

    Args:
        client: a client of the store.
        uri: the store's tracking URI.
        spool: the spool folder.
        result: counts and notices are added here; `left` is set when the run was deleted.
        on_batch: called after each batch that the server has acknowledged.

    Raises:
        Timeout: when another process is sending this run.
        Exception: whatever MLflow raises when the server doesn't answer.
    """
    run = result.run_id
    if not spool.exists():
        return
    with FileLock(spool / f".{run}.lock", timeout=0):
        present = Present(client)
        # The first batch may be there already: a kill came between the server's answer and the mark.
        in_doubt = True
        while result.left is None and not remove_if_sent(spool, run):
            metrics = metrics_file(spool, run)
            in_doubt = _drain_file(client, uri, spool, metrics, MAX_ROWS_A_CALL, result, on_batch, present, in_doubt)
            # The status is the last call: it must come after the metrics.
            if result.left is None:
                _drain_file(client, uri, spool, calls_file(spool, run), _CALLS_AT_ONCE, result, on_batch, present)
        if result.left is None and (dropped := take_dropped(spool, run, forget=True)):
            result.notices.append(f"{dropped} lines found no room in its spool files and are lost")


def _drain_file(
    client: "MlflowClient",
    uri: str,
    spool: Path,
    path: Path,
    most: int,
    result: ReplayedRun,
    on_batch: Callable[[], None],
    present: Present,
    in_doubt: bool = False,
) -> bool:
    """Send one file; return whether a batch would still be in doubt."""
    while True:
        lines, offset, torn = read(path, most)
        if torn:
            result.notices.append(f"{torn} torn line in {path.name}, cut when its writer was killed, was left out")
        if not lines and not torn:
            return in_doubt
        metrics = path == metrics_file(spool, result.run_id)
        whole: list[Any] = []
        foreign: list[Any] = []
        for line in lines:
            (whole if is_whole(line, metrics) else foreign).append(line)
        for line in foreign:
            keep_refused(spool, result.run_id, line)
        if foreign:
            result.refused += len(foreign)
            kept = refused_file(spool, result.run_id)
            result.notices.append(f"{len(foreign)} lines in {path.name} are no tracker's; kept in {kept}")
        for call in _calls(whole, result.run_id, metrics):
            new = present.without(call)
            _send(client, without_known(client, new, uri) if in_doubt else new, spool, result)
            if result.left is not None:
                return in_doubt
        mark_sent(path, offset)
        in_doubt = False
        on_batch()


def _calls(lines: list[Any], run: str, metrics: bool) -> list[dict[str, Any]]:
    if not metrics:
        return [{**line, "run": run} for line in lines]
    calls = []
    # What a run's earlier process left is sent before what comes after it was reopened is compared with it.
    for resumed, group in itertools.groupby(lines, key=lambda line: line.get("resumed")):
        rows = [(line["key"], line["value"], line["timestamp"], line["step"]) for line in group]
        mark = {} if resumed is None else {"resumed": resumed}
        calls.append({"kind": "metrics", "run": run, "rows": rows, **mark})
    return calls


def _send(client: "MlflowClient", call: dict[str, Any], spool: Path, result: ReplayedRun) -> None:
    """Send a call; of a batch that is refused, all but the refused rows."""
    rows = call.get("rows", [])
    try:
        apply(client, call)
    except Exception as error:
        if not is_hopeless(error):
            raise
        if is_gone(client, call["run"]):
            result.left = "it was deleted, or belongs to another server"
            return
        if not is_refusal(error):
            raise
        if len(rows) > 1:
            middle = len(rows) // 2
            _send(client, {**call, "rows": rows[:middle]}, spool, result)
            _send(client, {**call, "rows": rows[middle:]}, spool, result)
            return
        result.refused += 1
        keep_refused(spool, call["run"], call)
        said = f"MLflow refused {rows[0][0] if rows else call['kind']} ({first_line(str(error))})"
        result.notices.append(f"{said}; kept in {refused_file(spool, call['run'])}")
        return
    result.metrics += len(rows)
    result.calls += call["kind"] != "metrics"


def say_replayed(results: list[ReplayedRun]) -> list[str]:
    """Say in lines what was sent and what is left."""
    lines = []
    for result in results:
        sent = f"run {result.run_id}: {result.metrics} metrics and {result.calls} other calls sent"
        lines.append(sent if result.left is None else f"{sent}; not all: {result.left}")
        lines += [f"run {result.run_id}: {notice}" for notice in result.notices]
    return lines


@contextlib.contextmanager
def _one_try() -> Iterator[None]:
    """Switch off MLflow's own retries: they hold a call for minutes, and repeat one whose answer was lost."""
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    wanted["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
