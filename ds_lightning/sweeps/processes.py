"""Which processes belong to a sweep, whether they live, and the end of those that a killed sweep left behind."""

import contextlib
import os
import socket
from collections.abc import Callable

import psutil

# Set for each worker, and so inherited by what it starts: DataLoader workers and the process that writes to MLflow.
OWNER = "DS_LIGHTNING_SWEEP_OWNER"
_WRITER = "ds_lightning.tracking.writer"
# A writer whose trainer was killed sends what it has and leaves; its MLflow may still be importing.
_WRITER_SECONDS = 10.0
_KILL_SECONDS = 10.0


def this_process() -> str:
    """Return a mark of this process that no later process on any host has."""
    process = psutil.Process()
    return f"{socket.gethostname()} {os.getpid()} {process.create_time()}"


def is_gone(mark: str) -> bool:
    """Tell whether a marked process ran on this host and has ended; of other hosts nothing is known."""
    host, pid, created = mark.rsplit(" ", 2)
    if host != socket.gethostname():
        return False
    try:
        process = psutil.Process(int(pid))
        # A zombie's work is over, even when its parent has not noticed.
        return bool(process.create_time() != float(created) or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def end_processes(owned: Callable[[str], bool]) -> None:
    """End the processes whose owner is meant, so that none of them writes to MLflow afterwards.

    Writers may finish what they have; everything else is killed at once.

    Args:
        owned: called with a process's owner: the mark of its sweep, then ` #` and the worker.
    """
    found = [process for process in psutil.process_iter() if owned(_owner(process))]
    writers = [process for process in found if _is_writer(process)]
    others = [process for process in found if process not in writers]
    for process in others:
        _kill(process)
    psutil.wait_procs(others, timeout=_KILL_SECONDS)
    _, slow = psutil.wait_procs(writers, timeout=_WRITER_SECONDS)
    for process in slow:
        _kill(process)
    psutil.wait_procs(slow, timeout=_KILL_SECONDS)


def _owner(process: psutil.Process) -> str:
    # Other users' processes can't be read, and some end while one looks.
    with contextlib.suppress(psutil.Error, OSError):
        return str(process.environ().get(OWNER, ""))
    return ""


def _is_writer(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return _WRITER in process.cmdline()
    return False


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        process.kill()
