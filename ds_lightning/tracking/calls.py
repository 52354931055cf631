"""The calls to MLflow: how each is made, which can't succeed, and how one whose answer was lost is repeated."""

import base64
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_ROWS_A_CALL = 1000

_HOPELESS = {
    "BAD_REQUEST",
    "ENDPOINT_NOT_FOUND",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "NOT_FOUND",
    "PERMISSION_DENIED",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
}


_FIELDS: dict[str, dict[str, type]] = {
    "params": {"items": list},
    "tags": {"items": list},
    "artifact": {"path": str, "data": str},
    "dataset": {"dataset": dict, "context": str},
    "status": {"status": str},
}


def is_whole(line: Any, metrics: bool) -> bool:
    """Tell whether a parsed line of a spool file has what a tracker writes; a foreign file may hold anything.

    Args:
        line: any JSON.
        metrics: whether it is of the file of metrics.
    """
    if not isinstance(line, dict):
        return False
    if not metrics:
        fields = _FIELDS.get(str(line.get("kind")))
        if fields is None:
            return False
        items = line.get("items", [])
        pairs = isinstance(items, list) and all(
            isinstance(item, list) and len(item) == 2 and all(isinstance(part, str) for part in item) for item in items
        )
        return pairs and all(isinstance(line.get(name), kind) for name, kind in fields.items())
    counts = (line.get("timestamp"), line.get("step"))
    value = line.get("value")
    return (
        isinstance(line.get("key"), str)
        and (isinstance(value, float) or _is_count(value))
        and all(_is_count(count) for count in counts)
        and isinstance(line.get("resumed"), str | None)
    )


def _is_count(value: Any) -> bool:
    # More bits than 64 are an error of the database, which looks like one that is away.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def apply(client: "MlflowClient", call: dict[str, Any]) -> None:
    """Make one call to MLflow.

    Args:
        client: a client of the tracking store.
        call: `kind` and `run`, and for metrics `rows` (at most 1,000 of key, value, timestamp, step) and, of a
            reopened run, `resumed` (see `present.Present`); for params and tags `items` (at most 100 of key,
            value); for an artifact `path` and `data` (base64); for a dataset `dataset` and `context`; for status
            `status` and `time`, when it was set (ms).
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    run, kind = call["run"], call["kind"]
    if kind == "metrics":
        if not call["rows"]:
            return
        client.log_batch(run, metrics=[Metric(*row) for row in call["rows"]], synchronous=True)
    elif kind == "params":
        client.log_batch(run, params=[Param(*item) for item in call["items"]], synchronous=True)
    elif kind == "tags":
        client.log_batch(run, tags=[RunTag(*item) for item in call["items"]], synchronous=True)
    elif kind == "artifact":
        folder, _, name = call["path"].rpartition("/")
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary, name)
            file.write_bytes(base64.b64decode(call["data"]))
            client.log_artifact(run, str(file), folder or None)
    elif kind == "dataset":
        tags = [InputTag("mlflow.data.context", call["context"])]
        client.log_inputs(run, [DatasetInput(Dataset(**call["dataset"]), tags)])
    elif kind == "status" and call["status"] == "RUNNING":
        client.update_run(run, status="RUNNING")
    elif kind == "status":
        client.set_terminated(run, call["status"], call.get("time"))
    else:
        raise ValueError(f"unknown kind of call {kind!r}")


def is_hopeless(error: Exception) -> bool:
    """Tell whether a failed call would fail again: a rejected value, not a server that is away."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in _HOPELESS
    return not isinstance(error, OSError)


def is_refusal(error: Exception) -> bool:
    """Tell whether a failed call was refused for what is in it, not for who sent it or where to."""
    from mlflow.exceptions import MlflowException

    codes = ("BAD_REQUEST", "INVALID_PARAMETER_VALUE")
    return isinstance(error, MlflowException) and error.error_code in codes


def is_gone(client: "MlflowClient", run: str) -> bool:
    """Tell whether a run was deleted, or never was on this server."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run).info.lifecycle_stage == "deleted")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return True
        raise


def without_known(client: "MlflowClient", call: dict[str, Any], uri: str) -> dict[str, Any]:
    """Take out of a metrics call the rows that the server has: its answer to an earlier try may have been lost.

    MLflow's own databases take a row once anyway, so they aren't asked when they are written to directly.
    Every other kind of call changes nothing when it is made again.

    Args:
        client: a client of the store.
        call: as for `apply`.
        uri: the store's tracking URI.
    """
    if call["kind"] != "metrics" or "sql" in uri.split(":")[0]:
        return call
    known: set[tuple[Any, ...]] = set()
    for key in {row[0] for row in call["rows"]}:
        known.update(
            _identity((metric.key, metric.value, metric.timestamp, metric.step))
            for metric in client.get_metric_history(call["run"], key)
        )
    return {**call, "rows": [row for row in call["rows"] if _identity(row) not in known]}


def as_stored(value: float) -> float | str:
    """Return what MLflow makes of a value, such that equal ones compare equal: also NaN."""
    # An infinite value is stored as the largest float.
    return "nan" if math.isnan(value) else max(-sys.float_info.max, min(sys.float_info.max, float(value)))


def _identity(row: Sequence[Any]) -> tuple[Any, ...]:
    key, value, timestamp, step = row
    return (key, as_stored(value), timestamp, step)
