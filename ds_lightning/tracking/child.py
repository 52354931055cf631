"""The handle on the writer process."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_SOURCE_ROOT = Path(__file__).resolve().parents[2]


class Child:
    """Start a writer process and listen to it.

    Args:
        uri: tracking URI; goes over the pipe, because it may hold a password.
        spool: folder for what the writer can't send.
        pending: runs whose spool the writer is to send first.
        on_answer: called with each answer, on a thread.
        on_death: called with this handle and the exit code when the process ended, on a thread.

    Raises:
        OSError: when no process can be started.
    """

    def __init__(
        self,
        uri: str,
        spool: Path,
        pending: Sequence[str],
        on_answer: Callable[[dict[str, Any]], None],
        on_death: Callable[["Child", int | None], None],
    ) -> None:
        self.ready = False
        self.gone = False
        self._on_answer, self._on_death = on_answer, on_death
        if not sys.executable:
            raise OSError("this Python does not know its own executable")
        # -P: a file named json.py in the working folder must not replace the library's.
        command = [sys.executable, "-P", "-m", "ds_lightning.tracking.writer"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Unbuffered: a forked copy of the buffer must not be flushed into the pipe a second time.
            bufsize=0,
            # Ctrl-C in the terminal goes to the training process alone.
            start_new_session=True,
            env=_environment(),
        )
        _widen(self._process)
        settings = {"uri": uri, "spool": str(spool), "pending": list(pending), "training": os.getpid()}
        self.send(json.dumps(settings))
        self._listener = threading.Thread(target=self._listen, name="mlflow-answers", daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def send(self, line: str) -> bool:
        """Write one line; False when the process has gone."""
        assert self._process.stdin is not None
        rest = memoryview(line.encode() + b"\n")
        try:
            while rest:
                rest = rest[self._process.stdin.write(rest) or 0 :]
        except (OSError, ValueError):
            return False
        return True

    def end(self, kill: bool) -> None:
        """Let the process finish what it has and leave, or kill it."""
        self.gone = True
        if kill:
            self._process.kill()
            self._process.wait()
            return
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def hear_out(self) -> None:
        """Wait until every answer of a killed process has been taken."""
        if threading.current_thread() is not self._listener:
            self._listener.join()

    def disown(self) -> None:
        """Close this process's copies of the pipes, in a forked child: they would keep the writer waiting."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        # Or its destructor would wait for a process that is not ours.
        self._process.returncode = 0

    def _listen(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        while block := self._process.stdout.read(65536):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                self.ready = self.ready or "ready" in answer
                self._on_answer(answer)
        code = self._process.wait()
        expected, self.gone = self.gone, True
        if not expected:
            self._on_death(self, code)


def _widen(process: "subprocess.Popen[bytes]") -> None:
    """Let the pipe hold 1 MB, so that metrics are out of this process even while the writer is busy."""
    if sys.platform == "linux" and process.stdin is not None:
        import fcntl

        # An unprivileged process may be refused when it has many pipes; the pipe then stays as it is.
        with contextlib.suppress(OSError):
            fcntl.fcntl(process.stdin.fileno(), fcntl.F_SETPIPE_SZ, 1 << 20)


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    found = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(_SOURCE_ROOT), *([found] if found else [])])
    # The writer has its own retries; MLflow's would hold one call for minutes, and send rows twice whose answer
    # was lost.
    environment["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    environment.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # Usage is already counted in the training process.
    environment.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    return environment
