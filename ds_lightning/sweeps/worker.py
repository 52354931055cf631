"""A worker process of a sweep: `python -m ds_lightning.sweeps.worker`, started by `pool.py`.

Messages are JSON, one a line. On stdin: `{"sys_path": [...], "threads": n, "allow": [...]}` first, then
`{"task": {...}}`, answers `{"prune": bool}` and `{"stop": true}`. On stdout: `{"ready": true}` first, then for each
task `{"step": n, "value": x}` a validation and `{"outcome": {...}}`.
When stdin ends, the parent is gone: the trial is interrupted, its MLflow run closed, and the process leaves.
"""

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from dataclasses import asdict
from typing import Any, TextIO

_SIGNAL_SECONDS = 10.0


class Worker:
    """Runs the tasks that come in, one after another.

    Args:
        sink: where messages go.
    """

    def __init__(self, sink: TextIO) -> None:
        self._sink = sink
        self._inbox: queue.Queue[dict[str, Any]] = queue.Queue()
        self._busy = False

    def listen(self, source: TextIO) -> None:
        """Take messages until the source ends; runs on a thread."""
        for line in source:
            message = json.loads(line)
            if "stop" in message:
                break
            self._inbox.put(message)
        if self._busy:
            # Training ends as by Ctrl-C: hooks run, the run is closed.
            os.kill(os.getpid(), signal.SIGINT)
        self._inbox.put({"stop": True})

    def run(self) -> None:
        """Work until told to stop."""
        from ds_lightning.sweeps.task import TrialTask
        from ds_lightning.sweeps.trial import run_trial

        self._send({"ready": True})
        while "task" in (message := self._inbox.get()):
            self._busy = True
            outcome = run_trial(TrialTask.from_dict(message["task"]), self._report)
            self._busy = False
            self._send({"outcome": asdict(outcome)})

    def _report(self, step: int, value: float) -> bool:
        self._send({"step": step, "value": value})
        answer = self._inbox.get()
        if "stop" in answer:
            self._inbox.put(answer)
            # The signal is on its way; a second interrupt would break into the clean-up after the first.
            time.sleep(_SIGNAL_SECONDS)
            raise KeyboardInterrupt
        return bool(answer["prune"])

    def _send(self, message: dict[str, Any]) -> None:
        self._sink.write(json.dumps(message) + "\n")
        self._sink.flush()


def main() -> None:
    """Serve until stdin ends."""
    # What a library or the user's module prints goes to the log: the real stdout is for messages only.
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    hello = json.loads(sys.stdin.readline())
    sys.path[:] = hello["sys_path"]
    import torch

    from ds_lightning.allowlist import allow_packages

    torch.set_num_threads(hello["threads"])
    allow_packages(hello["allow"])
    worker = Worker(sink)
    threading.Thread(target=worker.listen, args=(sys.stdin,), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        worker.run()


if __name__ == "__main__":
    main()
