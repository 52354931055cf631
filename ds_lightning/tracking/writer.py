"""The process that writes to MLflow, so that training doesn't: `python -m ds_lightning.tracking.writer`.

MLflow's database store is about 0.1 to 0.2 ms of pure Python a metric. On a thread that holds the GIL, so the
training thread waits; in a process of its own it costs training nothing. Calls come in on stdin and answers go
out on stdout, one JSON object a line. The first line is `{"uri": ..., "spool": ...}`.

Answers: `{"ready": true}` once MLflow is imported, then for each call `{"done": id}`, or
`{"refused": id, "error": ...}` for a call that can't ever succeed. `{"waiting": error}` says that the server
doesn't answer and the call is tried again.

When stdin ends (the training process finished or was killed) it writes what it has, and exits.
"""

import base64
import contextlib
import json
import os
import queue
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ds_lightning.tracking.spool import spool

if TYPE_CHECKING:
    from mlflow import MlflowClient

_FIRST_DELAY = 0.2
_LONGEST_DELAY = 15.0
# How long a dead server is tried after the training process has gone.
_LAST_EFFORT_SECONDS = 20.0

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


def apply(client: "MlflowClient", call: dict[str, Any]) -> None:
    """Make one call to MLflow.

    Args:
        client: a client of the tracking store.
        call: `kind` and `run`, and for metrics `rows` (at most 1,000 of key, value, timestamp, step); for
            params and tags `items` (at most 100 of key, value); for an artifact `path` and `data` (base64);
            for a dataset `dataset` and `context`; for status `status`.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    run, kind = call["run"], call["kind"]
    if kind == "metrics":
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
        client.set_terminated(run, call["status"])
    else:
        raise ValueError(f"unknown kind of call {kind!r}")


def is_hopeless(error: Exception) -> bool:
    """Tell whether a failed call would fail again: a rejected value, not a server that is away."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in _HOPELESS
    return not isinstance(error, OSError)


class _Writer:
    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source, self._sink = source, sink
        self._calls: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._ended_at = 0.0

    def run(self) -> None:
        settings = json.loads(self._source.readline())
        self._spool = Path(settings["spool"])
        threading.Thread(target=self._read, daemon=True).start()
        from mlflow import MlflowClient

        client = MlflowClient(settings["uri"])
        self._answer({"ready": True})
        while (call := self._calls.get()) is not None:
            self._deliver(client, call)

    def _read(self) -> None:
        for line in self._source:
            # A line without its end was cut by the death of the training process.
            if line.endswith(b"\n"):
                self._calls.put(json.loads(line))
        self._ended_at = time.monotonic()
        self._ended.set()
        self._calls.put(None)

    def _deliver(self, client: "MlflowClient", call: dict[str, Any]) -> None:
        delay = _FIRST_DELAY
        while True:
            try:
                apply(client, call)
            # Whatever it is, it is answered, retried or spooled below.
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                late = self._ended.is_set() and time.monotonic() - self._ended_at > _LAST_EFFORT_SECONDS
                if is_hopeless(error) or late:
                    if self._ended.is_set():
                        spool(self._spool, [call])
                    self._answer({"refused": call["id"], "error": reason})
                    return
                self._answer({"waiting": reason})
                if self._ended.wait(delay):
                    time.sleep(min(delay, 1.0))
                delay = min(2 * delay, _LONGEST_DELAY)
            else:
                self._answer({"done": call["id"]})
                return

    def _answer(self, answer: dict[str, Any]) -> None:
        # Nobody listens any more when the training process was killed; the calls are still written.
        with contextlib.suppress(BrokenPipeError):
            self._sink.write(json.dumps(answer).encode() + b"\n")
            self._sink.flush()


def main() -> None:
    """Serve until stdin ends."""
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; this one leaves when training has left.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    # The real stdout is the answers' alone: a library that prints must not break a line.
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _Writer(sys.stdin.buffer, sink).run()


if __name__ == "__main__":
    main()
