"""What of this process's runs is in the spool, and who waits for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_lightning.tracking.notices import Notices
from ds_lightning.tracking.spool import calls_file, count_waiting, metrics_file, spool, take_dropped


class Kept:
    """The training process's view of the spool; the outbox's lock is held where runs are looked up or changed.

    Runs in `waited_for` were put on disk by the writer in an outage, and are sent when the server is back; nobody
    waits any more for those in `given_up`, which are sent when there is more to send of the run.

    Args:
        folder: the spool folder.
        notices: gets a line about all that was put there.
    """

    def __init__(self, folder: Path, notices: Notices) -> None:
        self._folder, self._notices = folder, notices
        self.waited_for: dict[str, None] = {}
        self.given_up: dict[str, None] = {}
        self._refused_files: set[Path] = set()

    def has(self, run: str | None) -> bool:
        """Tell whether a run (None: any) is waited for."""
        return bool(self.waited_for) if run is None else run in self.waited_for

    def pending(self) -> list[str]:
        """Return the runs whose spool comes before new calls."""
        return list({**self.waited_for, **self.given_up})

    def forget(self, run: str | None) -> bool:
        """Take out a run whose spool was sent or can't be; tell whether it was waited for."""
        waited_for = run in self.waited_for
        if run is not None:
            self.waited_for.pop(run, None)
            self.given_up.pop(run, None)
        return waited_for

    def give_up(self, run: str | None, calls: Sequence[dict[str, Any]]) -> list[str]:
        """Stop waiting for a run (None: for all) and for the runs of these calls; return them."""
        runs = dict.fromkeys(
            [call["run"] for call in calls] + [name for name in self.waited_for if run in (None, name)]
        )
        self.given_up.update(runs)
        for name in runs:
            self.waited_for.pop(name, None)
        return list(runs)

    def keep(self, calls: Sequence[dict[str, Any]], runs: Sequence[str], reason: str) -> list[Path]:
        """Spool calls, and say what waits of these runs, with what the writer has put there before."""
        files = self._spool(calls)
        counts = [count_waiting(self._folder, run) for run in runs]
        if runs:
            metrics, others = (sum(count[kind] for count in counts) for kind in (0, 1))
            # The writer may have put a part there before: all files are named.
            both = [file(self._folder, run) for run in runs for file in (metrics_file, calls_file)]
            self._notices.kept(metrics, others, [path for path in both if path.exists()] or [self._folder], reason)
        for run in runs:
            if dropped := take_dropped(self._folder, run, forget=False):
                self._notices.add(f"run {run}: {dropped} lines found no room in its spool files and are lost")
        return files

    def keep_refused(self, call: dict[str, Any], reason: str) -> None:
        """Spool a call that MLflow refused."""
        files = self._spool([call])
        # A run deleted in the UI is refused every second: the same file needs one warning.
        if not self._refused_files.issuperset(files):
            self._refused_files.update(files)
            self._notices.kept(len(call.get("rows", ())), int(call["kind"] != "metrics"), files, reason)

    def _spool(self, calls: Sequence[dict[str, Any]]) -> list[Path]:
        try:
            return spool(self._folder, calls)
        except OSError as error:
            rows = sum(len(call.get("rows", ())) for call in calls)
            self._notices.add(f"{rows} metrics are lost: {self._folder} can't be written ({error})")
            return []
