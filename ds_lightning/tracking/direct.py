"""Write to MLflow from the training process: a run too short for a writer, or a writer that died twice."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_lightning.errors import ConfigError
from ds_lightning.tracking.calls import apply, is_hopeless, without_known
from ds_lightning.tracking.present import Present
from ds_lightning.tracking.replaying import ReplayedRun, replay_run
from ds_lightning.tracking.store import Store, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient


class DirectWriter:
    """Make calls in the caller's thread, and answer as the writer process does.

    Args:
        uri: tracking URI.
        spool: the store's spool folder.
        on_answer: called with each answer.
    """

    def __init__(self, uri: str, spool: Path, on_answer: Callable[[dict[str, Any]], None]) -> None:
        self._uri, self._spool, self._on_answer = uri, spool, on_answer
        self._client: MlflowClient | None = None
        self._present: Present | None = None
        self._in_doubt = False

    def write(self, spooled: Sequence[str], calls: Sequence[dict[str, Any]]) -> None:
        """Send the spool of runs, then calls; stop at the first that the server doesn't answer."""
        try:
            self._client = self._client or connect(Store(self._uri, None, self._spool.parent / "checkpoints"))
        # OSError: also the Timeout of the lock under which a database is opened.
        except (ConfigError, OSError) as error:
            self._wait(str(error))
            return
        self._present = self._present or Present(self._client)
        for run in spooled:
            result = ReplayedRun(run)
            away = replay_run(self._client, self._uri, self._spool, result)
            for notice in result.notices:
                self._on_answer({"notice": f"run {run}: {notice}"})
            if away is not None:
                self._wait(away)
                return
            self._on_answer({"sent": run} if result.left is None else {"left": run, "error": result.left})
        for call in calls:
            try:
                new = self._present.without(call)
                apply(self._client, without_known(self._client, new, self._uri) if self._in_doubt else new)
            # The same three ways as in the writer: refused, tried again later, done.
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                if is_hopeless(error):
                    self._on_answer({"refused": call["id"], "error": reason})
                    continue
                self._in_doubt = True
                self._wait(reason)
                return
            self._in_doubt = False
            self._on_answer({"done": call["id"]})

    def _wait(self, reason: str) -> None:
        self._on_answer({"waiting": reason})
        time.sleep(0.2)
