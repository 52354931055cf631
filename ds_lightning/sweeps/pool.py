"""The worker processes of a sweep, seen from their parent."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import IO, Any

from ds_lightning.allowlist import allowed_packages
from ds_lightning.errors import ConfigError
from ds_lightning.sweeps.ledger import Ledger
from ds_lightning.sweeps.processes import OWNER, end_processes, this_process
from ds_lightning.sweeps.task import TrialOutcome
from ds_lightning.sweeps.trial import run_trial

_SOURCE_ROOT = Path(__file__).resolve().parents[2]
# -P: a file named queue.py in the working folder must not replace the library's.
_COMMAND = [sys.executable, "-P", "-m", "ds_lightning.sweeps.worker"]
_LOOK_SECONDS = 0.5
# Lightning finishes the batch, runs its hooks and closes the run.
_STOP_SECONDS = 30.0


def run_here(ledger: Ledger) -> None:
    """Run trials in this process until the ledger gives out no more.

    Raises:
        KeyboardInterrupt: when a trial was interrupted; it has been booked.
    """
    while (task := ledger.open_trial()) is not None:
        outcome = run_trial(task, partial(ledger.report, task.number))
        ledger.close_trial(task.number, outcome)
        if outcome.interrupted:
            raise KeyboardInterrupt


class WorkerPool:
    """N processes that run a ledger's trials.

    Each is a fresh interpreter with cores / N threads and, where there are several GPUs, one of them. What it
    prints goes to `<logs>/worker-<i>.log`. Ctrl-C reaches the parent alone, which tells them.

    Args:
        count: how many.
        logs: folder of their logs.
    """

    def __init__(self, count: int, logs: Path) -> None:
        self._logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        self._inbox: queue.Queue[tuple[_Process, dict[str, Any]]] = queue.Queue()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._threads = max(1, cores // count)
        self._gpus = _visible_gpus()
        self._workers = [self._start(index, 0) for index in range(count)]

    def run(self, ledger: Ledger) -> None:
        """Run trials until the ledger gives out no more and all have ended.

        Raises:
            ConfigError: when every worker died.
        """
        try:
            while any(worker.busy for worker in self._workers):
                self._step(ledger)
            if ledger.wants_more and ledger.stop_reason is None:
                raise ConfigError(f"all worker processes ended before the sweep did; see {self._logs}")
        finally:
            self._stop(ledger)

    def _start(self, index: int, replaced: int) -> "_Process":
        log = self._logs / f"worker-{index}.log"
        return _Process(index, replaced, log, self._threads, self._gpus, self._inbox)

    def _step(self, ledger: Ledger) -> None:
        with contextlib.suppress(queue.Empty):
            self._handle(ledger, *self._inbox.get(timeout=_LOOK_SECONDS))
            return
        for worker in list(self._workers):
            # Nothing has come for a while, so its last words, if any, have been read.
            if worker.busy and worker.code() is not None:
                self._bury(worker, ledger)

    def _handle(self, ledger: Ledger, worker: "_Process", message: dict[str, Any]) -> None:
        if "end" in message:
            worker.wait()
            if worker.busy:
                self._bury(worker, ledger)
        elif "ready" in message:
            worker.starting = False
            self._give(worker, ledger)
        elif worker.number is None:
            return
        elif "outcome" in message:
            self._close(worker, ledger, message["outcome"])
            if ledger.stop_reason is not None:
                self._stop(ledger)
            else:
                self._give(worker, ledger)
        else:
            worker.send({"prune": ledger.report(worker.number, message["step"], message["value"])})

    def _close(self, worker: "_Process", ledger: Ledger, outcome: dict[str, Any]) -> None:
        number, worker.number = worker.number, None
        assert number is not None
        ledger.close_trial(number, TrialOutcome(**outcome))

    def _give(self, worker: "_Process", ledger: Ledger) -> None:
        task = ledger.open_trial()
        if task is not None:
            worker.number = task.number
            worker.send({"task": task.to_dict()})

    def _bury(self, worker: "_Process", ledger: Ledger) -> None:
        """Book the end of a worker that ended by itself."""
        number, worker.number, worker.starting = worker.number, None, False
        worker.clean_up()
        # What it has started may still write to the trial's run.
        end_processes(lambda owner: owner == worker.owner)
        alive = sum(other.code() is None for other in self._workers)
        reason = f"worker process {worker.index} ended ({_how(worker.code())}); its output is in {worker.log}"
        if number is not None:
            idle = [other for other in self._workers if not other.busy and other.code() is None]
            # One more process for one more try: what always kills its worker takes them all down in the end.
            if ledger.abandon(number, f"{reason}; {alive} left") and not idle:
                self._workers[worker.index] = self._start(worker.index, worker.replaced + 1)
            for other in idle:
                self._give(other, ledger)
        else:
            warnings.warn(f"{reason}; {alive} left", RuntimeWarning, stacklevel=2)

    def _stop(self, ledger: Ledger) -> None:
        """Tell all to stop, book what they say, and kill those that don't answer."""
        for worker in self._workers:
            worker.send({"stop": True})
        deadline = time.monotonic() + _STOP_SECONDS
        while any(worker.number is not None for worker in self._workers) and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                worker, message = self._inbox.get(timeout=_LOOK_SECONDS)
                if worker.number is not None and "outcome" in message:
                    self._close(worker, ledger, message["outcome"])
                elif worker.number is not None and "end" in message:
                    ledger.abandon(worker.number, "interrupted", interrupted=True)
                    worker.number = None
        for worker in self._workers:
            worker.clean_up()
            worker.starting = False
            if worker.number is not None:
                ledger.abandon(worker.number, "interrupted", interrupted=True)
                worker.number = None


class _Process:
    def __init__(
        self,
        index: int,
        replaced: int,
        log: Path,
        threads: int,
        gpus: list[str],
        inbox: "queue.Queue[tuple[_Process, dict[str, Any]]]",
    ) -> None:
        self.index, self.replaced, self.log = index, replaced, log
        self.owner = f"{this_process()} #{index}.{replaced}"
        self.number: int | None = None
        self.starting = True
        environment = dict(os.environ)
        found = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(_SOURCE_ROOT), *([found] if found else [])])
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        environment[OWNER] = self.owner
        if len(gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                _COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                # Ctrl-C in the terminal goes to the parent alone.
                start_new_session=True,
                env=environment,
            )
        self.send({"sys_path": sys.path, "threads": threads, "allow": allowed_packages()})
        assert self._process.stdout is not None
        listener = threading.Thread(target=self._listen, args=(self._process.stdout, inbox), daemon=True)
        listener.start()

    @property
    def busy(self) -> bool:
        """Whether something is still to be heard from it."""
        return self.starting or self.number is not None

    def send(self, message: dict[str, Any]) -> None:
        """Write a message; when the process has gone, its end will be read."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def code(self) -> int | None:
        """Exit code, None while it runs."""
        return self._process.poll()

    def wait(self) -> None:
        """Wait for the end of a process that has closed its pipe."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LOOK_SECONDS)

    def clean_up(self) -> None:
        """End the process and what it started, such as DataLoader workers that outlived it."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        if not self.busy:
            # It has nothing to do but to leave; one that is busy at this point does not answer.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        if self.code() is None:
            # Not yet reaped, so the group is still its own.
            if hasattr(os, "killpg"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
            self._process.wait()

    def _listen(self, source: IO[bytes], inbox: "queue.Queue[tuple[_Process, dict[str, Any]]]") -> None:
        for line in source:
            try:
                inbox.put((self, json.loads(line)))
            except json.JSONDecodeError:
                # Half a line is what a killed process leaves.
                break
        inbox.put((self, {"end": True}))


def _visible_gpus() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


def _how(code: int | None) -> str:
    if code is None:
        return "it closed its pipe"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
