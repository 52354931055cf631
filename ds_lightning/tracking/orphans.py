"""Writers that outlive a killed training process: known by a lock, so that who goes on with the run can wait."""

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

# A writer tries a dead server for 20 s after it is ready and training has gone; one request may hang for 10 s.
_LONGEST_WAIT_SECONDS = 60.0


@contextlib.contextmanager
def at_work(spool: Path, training: int) -> Iterator[None]:
    """Hold this writer's lock, until the block or the process ends.

    Args:
        spool: the store's spool folder; the lock is in `writers/` beside it.
        training: process id of the training process.
    """
    path = _folder(spool) / f"{training}-{os.getpid()}.lock"
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:
        # A folder that can't be written: the writer can do its work without.
        yield
        return
    try:
        yield
    finally:
        # First, or another process could take a lock that is about to go.
        path.unlink(missing_ok=True)
        lock.release()


def wait_for_orphans(spool: Path, seconds: float = _LONGEST_WAIT_SECONDS) -> None:
    """Wait until the writers whose training process has gone have written or spooled what they had.

    Args:
        spool: the store's spool folder.
        seconds: >= 0; how long to wait, all in all. What is still at work then is said in a warning.
    """
    end = time.monotonic() + seconds
    for path in sorted(_folder(spool).glob("*-*.lock")):
        training, _, writer = path.stem.partition("-")
        if not training.isdigit() or _lives(int(training)):
            continue
        try:
            with FileLock(path, timeout=max(0.0, end - time.monotonic())):
                path.unlink(missing_ok=True)
        except Timeout:
            warnings.warn(
                f"process {writer}, which writes what a killed training left, is still at work; points that it "
                "has not written yet may be logged twice",
                RuntimeWarning,
                stacklevel=4,
            )


def _folder(spool: Path) -> Path:
    return spool.with_name("writers")


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
