"""The points that a reopened run has already: trained a second time, they are not written a second time."""

from typing import TYPE_CHECKING, Any

from ds_lightning.tracking.calls import as_stored

if TYPE_CHECKING:
    from mlflow import MlflowClient

_Point = tuple[int, float | str]


class Present:
    """Leave out of a reopened run's metrics the points (key, step, value) that it has, whatever their time.

    A run's history of a metric is read when the metric first comes, and kept from that step on: what came before
    the checkpoint is not trained again. A reopened run's calls carry `resumed`, a name of this reopening; rows of
    another one are read anew, so that a run that was killed twice is right too. A point with another value is
    left in: it is the truth about the weights that there are now.

    Args:
        client: a client of the store.
    """

    def __init__(self, client: "MlflowClient") -> None:
        self._client = client
        self._reopenings: dict[str, str] = {}
        self._points: dict[tuple[str, str], tuple[float, set[_Point]]] = {}

    def without(self, call: dict[str, Any]) -> dict[str, Any]:
        """Take out the rows that the run has.

        Args:
            call: as for `calls.apply`; only metrics with `resumed` are looked at.

        Raises:
            Exception: whatever MLflow raises when the server doesn't answer.
        """
        if call["kind"] != "metrics" or "resumed" not in call:
            return call
        run, rows = call["run"], call["rows"]
        if self._reopenings.get(run) != call["resumed"]:
            self._points = {place: found for place, found in self._points.items() if place[0] != run}
            self._reopenings[run] = call["resumed"]
        first: dict[str, int] = {}
        for key, _, _, step in rows:
            first[key] = min(step, first.get(key, step))
        points = {key: self._of(run, key, step) for key, step in first.items()}
        return {**call, "rows": [row for row in rows if (row[3], as_stored(row[1])) not in points[row[0]]]}

    def _of(self, run: str, key: str, step: int) -> set[_Point]:
        since, points = self._points.get((run, key), (None, set()))
        if since is None or step < since:
            # Steps that go down, against the rule: from now on all of them, so that this is the last read.
            lowest = step if since is None else float("-inf")
            history = self._client.get_metric_history(run, key)
            points = {(metric.step, as_stored(metric.value)) for metric in history if metric.step >= lowest}
            self._points[run, key] = (lowest, points)
        return points
