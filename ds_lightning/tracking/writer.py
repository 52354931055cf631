"""The process that writes to MLflow, so that training doesn't: `python -m ds_lightning.tracking.writer`.

MLflow's database store is about 0.1 to 0.2 ms of pure Python a metric. On a thread that holds the GIL, so the
training thread waits; in a process of its own it costs training nothing. Calls come in on stdin and answers go
out on stdout, one JSON object a line. The first line is `{"uri": ..., "spool": ..., "pending": [run, ...],
"training": pid}`, where pending are runs whose spool is to be sent before anything else.

Answers: `{"ready": true}` once MLflow is imported, then for each call `{"done": id}`, or
`{"refused": id, "error": ...}` for a call that can't ever succeed. `{"waiting": error}` says that the server
doesn't answer and the call is tried again.

An outage: when a call has not been answered for two seconds, it and all that come after it go to the spool on
disk (`{"spooled": [id, ...]}`), so that a death of both processes loses nothing that came in. From then on the
spool is the queue, sent in order; `{"progress": run}` after each batch, `{"sent": run}` when a run's is empty,
`{"left": run, "error": ...}` when it can't be sent, `{"notice": text}` for anything else to be said.

When stdin ends (the training process finished or was killed) it writes what it has, and exits.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from filelock import Timeout

from ds_lightning.tracking.calls import apply, is_hopeless, without_known
from ds_lightning.tracking.orphans import at_work
from ds_lightning.tracking.present import Present
from ds_lightning.tracking.replaying import ReplayedRun, drain
from ds_lightning.tracking.spool import runs_waiting, spool

if TYPE_CHECKING:
    from mlflow import MlflowClient

_FIRST_DELAY = 0.2
# A server that is back is found soon; one request every two seconds costs nobody anything.
_LONGEST_DELAY = 2.0
# How long a dead server is tried after the training process has gone.
_LAST_EFFORT_SECONDS = 20.0
# How long a call may go unanswered before it and those behind it are put on disk.
_PATIENCE_SECONDS = 2.0
_SPOOL_PERIOD_SECONDS = 0.5


class _Writer:
    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source, self._sink = source, sink
        self._sink_lock = threading.Lock()
        # Guards the calls in memory and the runs that are in the spool: a call is in one of the two.
        self._changed = threading.Condition()
        self._calls: deque[dict[str, Any]] = deque()
        self._spooled: dict[str, None] = {}
        self._tried_since: float | None = None
        self._ended_at: float | None = None
        self._finished = False

    def run(self) -> None:
        settings = json.loads(self._source.readline())
        self._uri, self._spool = settings["uri"], Path(settings["spool"])
        self._spooled.update(dict.fromkeys(settings["pending"]))
        keeper = threading.Thread(target=self._keep)
        # First: calls may have been sent before MLflow is imported, and who goes on with the run must wait for them.
        with at_work(self._spool, settings["training"]):
            threading.Thread(target=self._read, daemon=True).start()
            keeper.start()
            try:
                from mlflow import MlflowClient

                client = MlflowClient(self._uri)
                self._present = Present(client)
                self._answer({"ready": True})
                self._ready_at = time.monotonic()
                self._work(client)
            finally:
                with self._changed:
                    self._finished = True
                    self._changed.notify_all()
                keeper.join()

    def _read(self) -> None:
        for line in self._source:
            # A line without its end was cut by the death of the training process.
            if line.endswith(b"\n"):
                with self._changed:
                    self._calls.append(json.loads(line))
                    self._changed.notify_all()
        with self._changed:
            self._ended_at = time.monotonic()
            self._changed.notify_all()

    def _keep(self) -> None:
        """Put calls on disk while the server is away; a thread of its own, as a request may hang for long."""
        while True:
            with self._changed:
                finished = self._finished
                now = time.monotonic()
                slow = self._tried_since is not None and now - self._tried_since > _PATIENCE_SECONDS
                if self._calls and (self._spooled or slow or finished):
                    self._move_to_spool()
                if finished:
                    return
                self._changed.wait_for(lambda: self._finished, _SPOOL_PERIOD_SECONDS)

    def _move_to_spool(self) -> None:  # with self._changed held
        calls = list(self._calls)
        try:
            spool(self._spool, calls)
        except OSError as error:  # a full disk: the calls stay in memory
            self._answer({"waiting": f"and the spool can't be written ({error})"})
            return
        self._calls.clear()
        self._tried_since = None
        self._spooled.update(dict.fromkeys(call["run"] for call in calls))
        self._answer({"spooled": [call["id"] for call in calls]})

    def _work(self, client: "MlflowClient") -> None:
        delay, in_doubt = _FIRST_DELAY, False
        while not self._late():
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._spooled or self._ended_at is not None)
                run = next(iter(self._spooled), None)
                call = self._calls[0] if self._calls and run is None else None
                if run is None and call is None:
                    return
                if call is not None and self._tried_since is None:
                    self._tried_since = time.monotonic()
            try:
                if run is not None:
                    self._replay(client, run)
                else:
                    assert call is not None
                    self._deliver(client, call, in_doubt)
                delay, in_doubt = _FIRST_DELAY, False
            # Whatever it is, the call stays where it is, and is tried again.
            except Exception as error:
                in_doubt = True
                self._answer({"waiting": f"{type(error).__name__}: {error}"})
                time.sleep(min(delay, 1.0) if self._ended_at is not None else delay)
                delay = min(2 * delay, _LONGEST_DELAY)

    def _late(self) -> bool:
        if self._ended_at is None:
            return False
        return time.monotonic() - max(self._ended_at, self._ready_at) > _LAST_EFFORT_SECONDS

    def _deliver(self, client: "MlflowClient", call: dict[str, Any], in_doubt: bool) -> None:
        answer: dict[str, Any] = {"done": call["id"]}
        try:
            new = self._present.without(call)
            apply(client, without_known(client, new, self._uri) if in_doubt else new)
        except Exception as error:
            if not is_hopeless(error):
                raise
            answer = {"refused": call["id"], "error": f"{type(error).__name__}: {error}"}
        with self._changed:
            self._tried_since = None
            if not self._calls or self._calls[0] is not call:
                return  # it was put on disk meanwhile; the replay asks the server whether it has it
            self._calls.popleft()
            if "refused" in answer and self._ended_at is not None:
                spool(self._spool, [call])
        self._answer(answer)

    def _replay(self, client: "MlflowClient", run: str) -> None:
        result = ReplayedRun(run)
        try:
            drain(client, self._uri, self._spool, result, lambda: self._answer({"progress": run}))
        except Timeout:
            raise OSError("another process is sending this run's spool") from None
        except Exception as error:
            if not is_hopeless(error):
                raise
            result.left = f"{type(error).__name__}: {error}"
        finally:
            for notice in result.notices:
                self._answer({"notice": f"run {run}: {notice}"})
        with self._changed:
            # More may have come to the spool since.
            if result.left is None and run in self._spooled and self._has_more(run):
                return
            self._spooled.pop(run, None)
            # With the lock held: it must not overtake the next "spooled".
            self._answer({"sent": run} if result.left is None else {"left": run, "error": result.left})

    def _has_more(self, run: str) -> bool:
        return run in runs_waiting(self._spool)

    def _answer(self, answer: dict[str, Any]) -> None:
        # Nobody listens any more when the training process was killed; the calls are still written.
        with contextlib.suppress(BrokenPipeError), self._sink_lock:
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
