"""A sign of life of each process that runs trials of a study, and who has stopped giving it."""

import socket
import threading
import time
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import optuna

from ds_lightning.sweeps.processes import is_gone, this_process
from ds_lightning.sweeps.retries import SWEEP

INTERVAL_SECONDS = 10.0
GRACE_SECONDS = 60.0


class Heartbeat:
    """Write the time into the study every few seconds, and watch what the others write.

    Optuna's own heartbeat lives in `study.optimize` and in databases; a sweep asks and tells, and may keep its study in
    a journal. A process of this host is judged by its process id, at once. One of another host is gone when what it
    writes has not changed for `grace` seconds while this process was looking. So hosts whose clocks differ never
    take a living sweep for a dead one; clocks only say whom it is worth waiting for at the start.

    Args:
        study: the study.
        interval: seconds > 0 between two signs.
        grace: seconds without a change after which a process of another host is gone; several intervals.
    """

    def __init__(self, study: optuna.Study, interval: float = INTERVAL_SECONDS, grace: float = GRACE_SECONDS) -> None:
        self._study, self._interval, self._grace = study, interval, grace
        self._mark = this_process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="sweep-heartbeat", daemon=True)
        # Mark -> what it wrote, and when this process saw that for the first time.
        self._seen: dict[str, tuple[Any, float]] = {}
        self._dead: dict[str, Any] = {}

    def __enter__(self) -> "Heartbeat":
        self._write(time.time())
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._write(False)

    def gone(self, mark: str) -> bool:
        """Tell whether a process that ran trials has ended, or given no sign of life for too long."""
        if _is_here(mark):
            return is_gone(mark)
        wrote, since = self._seen.get(mark, (None, time.monotonic()))
        if wrote is False:
            return True
        if not _is_time(wrote):
            return False
        return self._dead.get(mark) == wrote or time.monotonic() - since > self._grace

    def others_live(self) -> bool:
        """Tell whether another process runs trials of the study."""
        self._look()
        return any(_is_time(wrote) and not self.gone(mark) for mark, (wrote, _) in list(self._seen.items()))

    def settle(self) -> None:
        """Wait until it is known of each other host whose trials run but whose sign is old whether it lives.

        That is two and a half intervals, where there is such a host.
        """
        owners = {
            trial.user_attrs.get("process")
            for trial in self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        }
        old = {
            mark: wrote
            for mark, (wrote, _) in list(self._seen.items())
            if mark in owners and not _is_here(mark) and _is_time(wrote) and time.time() - wrote > self._grace
        }
        end = time.monotonic() + 2.5 * self._interval
        while old and time.monotonic() < end:
            time.sleep(self._interval / 5)
            self._look()
            old = {mark: wrote for mark, wrote in old.items() if self._seen[mark][0] == wrote}
        self._dead.update(old)

    def _beat(self) -> None:
        while not self._stop.wait(self._interval):
            self._write(time.time())
            self._look()

    def _write(self, value: float | bool) -> None:
        self._try(lambda: self._study.set_user_attr(SWEEP + self._mark, value))

    def _look(self) -> None:
        self._try(self._read)

    def _read(self) -> None:
        now = time.monotonic()
        for key, wrote in self._study.user_attrs.items():
            mark = key.removeprefix(SWEEP)
            if key.startswith(SWEEP) and mark != self._mark:
                before = self._seen.get(mark)
                if before is None or before[0] != wrote:
                    self._seen[mark] = (wrote, now)

    def _try(self, action: Callable[[], None]) -> None:
        """A storage that is busy or away for a moment costs one sign, not the sweep."""
        try:
            action()
        except Exception as error:
            # Each storage has its own errors; a study that is really gone ends the sweep at the next trial.
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"the sweep's sign of life was not exchanged: {reason}", RuntimeWarning, stacklevel=3)


def _is_here(mark: str) -> bool:
    return mark.rsplit(" ", 2)[0] == socket.gethostname()


def _is_time(wrote: Any) -> bool:
    return isinstance(wrote, float | int) and not isinstance(wrote, bool)
