"""What could not be sent is kept on disk, in files that only grow, with a mark of how much has been sent.

A run has two files: `<run>.jsonl`, a metric a line, and `<run>.calls.jsonl`, any other call a line. Beside each,
`<file>.sent` holds the number of bytes that the server has acknowledged; it is replaced after every batch and
synced to disk, so a replay that was killed goes on where it was. A file goes when all of it is sent: first the
file, then its mark, and a writer that finds a mark without a file removes it.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from ds_lightning.errors import DataError

# An hour of 30 steps a second with five metrics is about 50 MB.
MAX_BYTES = 256 << 20

_METRICS, _CALLS = ".jsonl", ".calls.jsonl"
_REFUSED, _DROPPED, _SENT = ".refused.jsonl", ".dropped", ".sent"
# Without them a run has no parameters, no tags and no end.
_ALWAYS_KEPT = ("params", "tags", "status")


def metrics_file(folder: Path, run: str) -> Path:
    """Name the file of a run's metrics."""
    return folder / (run + _METRICS)


def calls_file(folder: Path, run: str) -> Path:
    """Name the file of a run's other calls."""
    return folder / (run + _CALLS)


def refused_file(folder: Path, run: str) -> Path:
    """Name the file of what the server will never take, such as a parameter that has another value."""
    return folder / (run + _REFUSED)


def spool(folder: Path, calls: Iterable[dict[str, Any]], max_bytes: int = MAX_BYTES) -> list[Path]:
    """Append calls that MLflow did not take to files in `folder`, and sync them to disk.

    Args:
        folder: the store's spool folder; made when needed.
        calls: calls as they go to the writer. Metrics go to `<run>.jsonl`, one JSON object a metric with
            key, value, timestamp (ms) and step, and `resumed` of a reopened run; everything else to
            `<run>.calls.jsonl` as it is.
        max_bytes: size, >= 0, up to which a file grows. What comes later is left out and counted in
            `<run>.dropped`; parameters, tags and the status are always kept.

    Returns:
        The files that belong to the calls.
    """
    lines: dict[Path, list[tuple[bytes, bool]]] = {}
    runs: dict[Path, str] = {}
    for call in calls:
        path = (metrics_file if call["kind"] == "metrics" else calls_file)(folder, call["run"])
        runs[path] = call["run"]
        mine = lines.setdefault(path, [])
        if call["kind"] == "metrics":
            resumed = {"resumed": call["resumed"]} if "resumed" in call else {}
            for key, value, timestamp, step in call["rows"]:
                row = {"key": key, "value": value, "timestamp": timestamp, "step": step, **resumed}
                mine.append((json.dumps(row).encode() + b"\n", False))
        else:
            mine.append((json.dumps(call).encode() + b"\n", call["kind"] in _ALWAYS_KEPT))
    if lines:
        folder.mkdir(parents=True, exist_ok=True)
        with appending(folder):
            sizes = {path: path.stat().st_size if path.exists() else 0 for path in lines}
            try:
                for path, mine in lines.items():
                    _append(path, folder / (runs[path] + _DROPPED), mine, max_bytes)
            except OSError:
                # A full disk: all or nothing, or the next try would write some lines a second time.
                for path in lines:
                    if path.exists():
                        os.truncate(path, sizes[path])
                raise
    return list(lines)


@contextlib.contextmanager
def appending(folder: Path) -> Iterator[None]:
    """Hold the lock under which the folder's files grow and go."""
    with FileLock(folder / ".append.lock"):
        yield


def _append(path: Path, dropped: Path, lines: list[tuple[bytes, bool]], max_bytes: int) -> None:
    if not path.exists():
        _mark(path).unlink(missing_ok=True)
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        kept: list[bytes] = []
        if size:
            file.seek(size - 1)
            # A line cut by a death must not swallow the next one.
            kept = [b"\n"] if file.read(1) != b"\n" else []
        full = False
        for line, always in lines:
            # Once full, always full: a short line that still fits must not come before a longer one.
            full = full or size + len(line) > max_bytes
            if always or not full:
                kept.append(line)
                size += len(line)
        lost = len(lines) - sum(line != b"\n" for line in kept)
        file.write(b"".join(kept))
        file.flush()
        os.fsync(file.fileno())
    if lost:
        count = lost + (int(dropped.read_text() or 0) if dropped.exists() else 0)
        _replace(dropped, str(count))


def read(path: Path, most: int) -> tuple[list[Any], int, int]:
    """Read what comes after the mark.

    Args:
        path: a spool file; its folder exists.
        most: number of lines, >= 1.

    Returns:
        The parsed lines, the offset behind them, and how many lines were not JSON (cut by a death).
    """
    found: list[Any] = []
    torn = 0
    with appending(path.parent):
        if not path.exists():
            return [], 0, 0
        with path.open("rb") as file:
            offset = file.seek(sent(path))
            while len(found) + torn < most and (line := file.readline()):
                offset += len(line)
                try:
                    found.append(json.loads(line))
                # RecursionError: thousands of brackets.
                except (ValueError, RecursionError):
                    torn += bool(line.strip())
    return found, offset, torn


def sent(path: Path) -> int:
    """Return how many bytes of a spool file the server has; called under `appending`.

    Raises:
        DataError: when the mark holds no such number; guessed wrongly, metrics would be lost or logged twice.
    """
    mark = _mark(path)
    if not (mark.exists() and path.exists()):
        return 0
    text, size = mark.read_bytes()[:40].decode("ascii", "replace"), path.stat().st_size
    if not (text.isdecimal() and int(text) <= size):
        raise DataError(
            f"{mark} holds {text!r}; expected the number of bytes of {path.name} that are sent, 0 to {size}: "
            "correct it, or remove it to send all of that file again"
        )
    return int(text)


def mark_sent(path: Path, offset: int) -> None:
    """Remember on disk how many bytes of a spool file the server has."""
    _replace(_mark(path), str(offset))


def remove_if_sent(folder: Path, run: str) -> bool:
    """Remove a run's files when all of both is sent; tell whether there is nothing left to send."""
    paths = [metrics_file(folder, run), calls_file(folder, run)]
    with appending(folder):
        if any(path.exists() and sent(path) < path.stat().st_size for path in paths):
            return False
        for path in paths:
            path.unlink(missing_ok=True)
            _sync_folder(folder)
            _mark(path).unlink(missing_ok=True)
    return True


def keep_refused(folder: Path, run: str, call: Any) -> None:
    """Keep a call that the server will never take, out of the way of the others."""
    with appending(folder), refused_file(folder, run).open("ab") as file:
        file.write(json.dumps(call).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def take_dropped(folder: Path, run: str, forget: bool) -> int:
    """Return how many lines found no room in a run's files; `forget` when they have been reported for good."""
    path = folder / (run + _DROPPED)
    if not path.exists():
        return 0
    with appending(folder):
        count = int(path.read_text() or 0)
        if forget:
            path.unlink(missing_ok=True)
    return count


def runs_waiting(folder: Path) -> list[str]:
    """Return the ids of the runs that have something to be sent."""
    names = (path.name for path in folder.glob(f"*{_METRICS}") if not path.name.endswith(_REFUSED))
    return sorted({name.removesuffix(_CALLS).removesuffix(_METRICS) for name in names})


def count_waiting(folder: Path, run: str) -> tuple[int, int]:
    """Return how many metrics and other calls of a run wait to be sent; where a mark is damaged, how many there are."""
    if not folder.exists():
        return 0, 0
    counts = []
    with appending(folder):
        for path in (metrics_file(folder, run), calls_file(folder, run)):
            count = 0
            if path.exists():
                with path.open("rb") as file:
                    with contextlib.suppress(DataError):
                        file.seek(sent(path))
                    count = sum(1 for line in file if line.strip())
            counts.append(count)
    return counts[0], counts[1]


def _mark(path: Path) -> Path:
    return path.with_name(path.name + _SENT)


def _replace(path: Path, text: str) -> None:
    """Write a small file so that a death leaves the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # Not every system can open a folder; there, the order of two renames is the file system's matter.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
