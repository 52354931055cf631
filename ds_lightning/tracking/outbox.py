"""The training process's side of the writer: a buffer, a courier thread and the list of what isn't written yet."""

import json
import threading
import time
from pathlib import Path
from typing import Any

from ds_lightning.tracking.batches import Batches
from ds_lightning.tracking.batches import Row as Row
from ds_lightning.tracking.child import Child
from ds_lightning.tracking.direct import DirectWriter
from ds_lightning.tracking.kept import Kept
from ds_lightning.tracking.notices import Notices, first_line
from ds_lightning.tracking.undelivered import Call, Undelivered

_PERIOD_SECONDS = 1.0
_IDLE_SECONDS = 120.0
_AT_EXIT_SECONDS = 10.0
_START_SECONDS = 60.0
_HAND_OVER_SECONDS = 1.0
# About 100 MB: a server that stays away must not fill the memory.
_MAX_ROWS_KEPT = 500_000


class Outbox:
    """Everything that goes to one tracking store, from all threads and runs of this process.

    A call is kept until the writer has written it or, in an outage, put it on disk. If the writer dies it is started
    once more and gets what was not acknowledged; what was written already is written again, which changes nothing (a
    metric's row is its own primary key in MLflow's databases). If it dies twice, the courier thread writes from here.

    Args:
        uri: tracking URI.
        spool: folder for what can't be sent.
    """

    def __init__(self, uri: str, spool: Path) -> None:
        self._uri, self._spool = uri, spool
        self._changed = threading.Condition()
        self._delivery = threading.Lock()
        self._wake = threading.Event()
        self._rows = Batches()
        self._calls = Undelivered()
        self._child: Child | None = None
        self._deaths = 0
        self._courier: threading.Thread | None = None
        self._closed = self._waiting_said = self._stuck = False
        # Calls with a number below this are not to wait for the writer's start.
        self._urgent_below = 0
        self._progress = self._busy_at = 0.0
        self._notices = Notices()
        self._kept = Kept(spool, self._notices)
        self._direct = DirectWriter(uri, spool, self._on_answer)

    def metrics(self, run: str, rows: list[Row], resumed: str | None = None) -> None:
        """Take rows for a run (`resumed`: names its reopening, see `present`); costs microseconds."""
        self._after_taking(self._rows.add(run, rows, resumed))

    def call(self, run: str, kind: str, **content: Any) -> None:
        """Take a call of another kind; `calls.apply` says which there are."""
        with self._changed:
            self._calls.add({"kind": kind, "run": run, **content})
        self._after_taking(False)

    def hand_over(self) -> bool:
        """Get what was taken so far out of this process, so that a kill of it loses nothing of that.

        The courier gives it to the writer, or, while that is starting, writes it into a store that is no server. A
        second at most is waited for that, and not again before something gets through.

        Returns:
            Whether all of it is out.
        """
        self._ensure_courier()
        with self._changed:
            self._seal()
            upto = self._calls.next
            if self._calls.all_arrived(upto):
                return True
            self._urgent_below = max(self._urgent_below, upto)
            self._wake.set()
            seconds = 0.0 if self._stuck else _HAND_OVER_SECONDS
            self._stuck = not self._changed.wait_for(lambda: self._calls.all_arrived(upto), seconds)
            return not self._stuck

    def flush(self, run: str | None, timeout: float) -> bool:
        """Wait until everything of a run is written.

        Args:
            run: run id, or None for all runs.
            timeout: seconds without progress after which to stop waiting.

        Returns:
            Whether everything is written.
        """
        started = time.monotonic()
        while True:
            with self._changed:
                self._seal()
                waiting = self._has(run)
                alone = self._can_write_here()
                quiet_since = max(started, self._progress)
                starting = self._child is not None and not self._child.ready and not self._child.gone
            if not waiting:
                break
            # A writer that is still importing MLflow is not a server that doesn't answer.
            limit = started + _START_SECONDS if starting and not alone else quiet_since + timeout
            if time.monotonic() > limit:
                break
            if alone:
                self._write_here()
                continue
            self._ensure_courier()
            self._wake.set()
            with self._changed:
                if self._has(run):
                    self._changed.wait(0.1)
        self._notices.say()
        return not waiting

    def give_up(self, run: str | None, reason: str = "the tracking server did not take it in time") -> list[Path]:
        """Move what is left of a run (None: of all) to the spool folder, and say so in a warning."""
        files = self._give_up(run, reason)
        self._notices.say()
        return files

    def _give_up(self, run: str | None, reason: str) -> list[Path]:
        with self._changed:
            self._seal()
            child = None if self._nothing_is_out(run) else self._child
            if child is not None:
                # Dead, it can't write later what is on disk by then.
                self._drop_child(kill=True)
        if child is not None:
            child.hear_out()
        with self._changed:
            left = self._calls.of(run)
            for call in left:
                self._forget(call["id"])
            runs = self._kept.give_up(run, left)
        return self._kept.keep(left, runs, reason)

    def spool_first(self, run: str) -> None:
        """Let the writer send what an earlier process spooled of a run before anything else of it."""
        with self._changed:
            self._kept.given_up[run] = None

    def close(self) -> None:
        """Write what is left, or spool it, and let the writer go."""
        if not self.flush(None, _AT_EXIT_SECONDS):
            self.give_up(None)
        with self._changed:
            self._closed = True
            self._drop_child(kill=False)
        self._wake.set()

    def leave_to_parent(self) -> None:
        """Let go of the writer in a forked child, without a word to it: it is the parent's."""
        if self._child is not None:
            self._child.disown()

    def _after_taking(self, full: bool) -> None:
        self._ensure_courier()
        if full:
            self._wake.set()
        self._notices.say()

    def _forget(self, number: int) -> Call | None:  # with self._changed held
        call = self._calls.pop(number)
        if call is not None:
            self._progress, self._stuck = time.monotonic(), False
            self._changed.notify_all()
        return call

    def _seal(self) -> None:  # with self._changed held
        for call in self._rows.take():
            self._calls.add(call)

    def _has(self, run: str | None) -> bool:  # with self._changed held
        return self._kept.has(run) or bool(self._calls.of(run))

    def _nothing_is_out(self, run: str | None = None) -> bool:  # with self._changed held
        if self._child is not None and self._kept.has(run):
            return False
        return not self._calls.any_sent(run)

    def _can_write_here(self) -> bool:  # with self._changed held
        """Tell whether a short run need not wait for the writer's start (a dead server would block us)."""
        not_ready = self._child is None or not self._child.ready
        near = not self._uri.startswith(("http", "databricks", "uc"))
        return not_ready and near and self._nothing_is_out() and not self._kept.has(None)

    def _ensure_courier(self) -> None:
        if self._courier is None:
            with self._changed:
                if self._courier is None:
                    self._courier = threading.Thread(target=self._carry, name="mlflow-courier", daemon=True)
                    self._courier.start()

    def _carry(self) -> None:
        while not self._closed:
            self._wake.wait(_PERIOD_SECONDS)
            self._wake.clear()
            with self._changed:
                self._seal()
                now = time.monotonic()
                if self._has(None):
                    self._busy_at = now
                elif self._child is not None and now - self._busy_at > _IDLE_SECONDS:
                    self._drop_child(kill=False)
                anything = self._has(None) and not self._closed
                too_many = self._calls.rows > _MAX_ROWS_KEPT
            if too_many:
                self._give_up(None, f"more than {_MAX_ROWS_KEPT:,} metrics are waiting for the tracking server")
            elif anything:
                self._send()

    def _send(self) -> None:
        if self._deaths > 1:
            self._write_here()
            return
        with self._delivery:
            if self._child is None and not self._start_child():
                return
            with self._changed:
                child, urgent = self._child, not self._calls.all_arrived(self._urgent_below)
                if child is None or not (child.ready or urgent):
                    return
                # Not what a reopened run has, or its spool: they ask MLflow for histories, on our GIL.
                here = self._can_write_here() and not (self._kept.pending() or self._calls.any_resumed())
                calls = [] if here else self._calls.send()
            for call in calls:
                if not child.send(json.dumps(call)):
                    return
            with self._changed:
                if child is self._child and not here:
                    self._calls.arrived(calls)
                    self._stuck = False
                    self._changed.notify_all()
        if here:
            self._write_here()

    def _start_child(self) -> bool:  # with self._delivery held
        try:
            with self._changed:
                pending = self._kept.pending()
            # Without the lock: a process takes milliseconds to start, and training would wait.
            child = Child(self._uri, self._spool, pending, self._on_answer, self._on_death)
        except OSError as error:
            self._deaths = 2
            self._notices.add(f"the MLflow writer can't be started ({error}); writing from here")
            return False
        with self._changed:
            self._child = child
            if self._closed:
                self._drop_child(kill=False)
        if child.gone:
            # It may have died before it was ours to miss.
            self._on_death(child, None)
        return True

    def _write_here(self) -> None:
        with self._delivery:
            with self._changed:
                if not self._nothing_is_out():
                    return
                runs, calls = self._kept.pending(), self._calls.of(None)
            self._direct.write(runs, calls)

    def _on_answer(self, answer: dict[str, Any]) -> None:
        refused, left = None, False
        with self._changed:
            if "done" in answer:
                self._forget(answer["done"])
                self._waiting_said = False
            elif "spooled" in answer:
                for number in answer["spooled"]:
                    if (call := self._forget(number)) is not None:
                        self._kept.waited_for[call["run"]] = None
            elif "sent" in answer or "progress" in answer:
                self._progress, self._waiting_said = time.monotonic(), False
                self._kept.forget(answer.get("sent"))
                self._changed.notify_all()
            elif "left" in answer:
                left = self._kept.forget(answer["left"])
                self._changed.notify_all()
            elif "notice" in answer:
                self._notices.add(answer["notice"])
            elif "refused" in answer:
                refused = self._forget(answer["refused"])
            elif "waiting" in answer and not self._waiting_said:
                self._waiting_said = True
                said = "training goes on, and metrics are kept until it does"
                self._notices.add(f"tracking store does not answer ({first_line(answer['waiting'])}); {said}")
            elif "ready" in answer:
                self._progress = time.monotonic()
                self._wake.set()
        reason = f"MLflow refused it: {first_line(answer.get('error', ''))}"
        if left:
            self._kept.keep([], [answer["left"]], reason)
        if refused is not None:
            self._kept.keep_refused(refused, reason)

    def _on_death(self, child: Child, code: int | None) -> None:
        with self._changed:
            if child is not self._child:
                return
            self._drop_child(kill=False)
            self._deaths += 1
            if self._deaths > 1:
                said = "metrics are now written from the training process, which costs about 0.2 ms each"
                self._notices.add(f"the MLflow writer process ended twice (exit code {code}); {said}")
        self._wake.set()

    def _drop_child(self, kill: bool) -> None:  # with self._changed held
        child, self._child = self._child, None
        # What it had and did not acknowledge goes to the next one.
        self._calls.come_back()
        if child is not None:
            child.end(kill)
