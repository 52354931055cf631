"""One outbox for each tracking store in this process, closed at exit and left alone by forked children."""

import atexit
import os
import threading
from pathlib import Path

from ds_lightning.tracking.outbox import Outbox

_outboxes: dict[tuple[str, Path], Outbox] = {}
_outboxes_lock = threading.Lock()


def outbox(uri: str, spool: Path) -> Outbox:
    """Return this process's outbox for a store."""
    found = _outboxes.get((uri, spool))
    if found is None:
        with _outboxes_lock:
            found = _outboxes.setdefault((uri, spool), Outbox(uri, spool))
    return found


def _close_all() -> None:
    for box in list(_outboxes.values()):
        box.close()
    _outboxes.clear()


def _leave_all_to_parent() -> None:
    global _outboxes_lock
    _outboxes_lock = threading.Lock()
    for box in _outboxes.values():
        box.leave_to_parent()
    _outboxes.clear()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_all_to_parent)
