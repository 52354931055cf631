"""Metrics kept in memory for the learning curves: bounded, and thinned as they grow."""

from collections.abc import Iterable

from ds_lightning.tracking.harmless import harmless
from ds_lightning.tracking.runs import Run

_MAX_POINTS = 1000
_MAX_CURVES = 200


class Curve:
    """The points of one metric: at most 1,000, evenly thinned.

    Once full, every second point is dropped and from then on every second one is taken, and so on.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []
        self._stride = 1
        self._seen = 0

    def add(self, step: int, value: float) -> None:
        """Take a point, or leave it out."""
        if self._seen % self._stride == 0:
            self.steps.append(step)
            self.values.append(value)
            if len(self.steps) >= _MAX_POINTS:
                del self.steps[1::2], self.values[1::2]
                self._stride *= 2
        self._seen += 1


class Curves(dict[str, Curve]):
    """Curves by metric name; at most 200 of them."""

    _count = _count_before = 0

    def log(self, run: Run) -> None:
        """Log them to a run, as a picture, if there is something new to see."""
        with harmless("learning curves"):
            if (picture := self.picture()) is not None:
                run.artifact("pictures/learning_curves.png", picture)

    def picture(self) -> bytes | None:
        """Return the learning curves as PNG; None when nothing has come since the last call, or it can't be drawn."""
        from ds_lightning.tracking.pictures import learning_curves, png

        grown, self._count_before = self._count > self._count_before, self._count
        figure = learning_curves(self) if grown else None
        return None if figure is None else png(figure)

    def add_rows(self, rows: Iterable[tuple[str, float, int, int]]) -> None:
        """Take rows of key, value, timestamp and step."""
        for name, value, _, step in rows:
            curve = self.get(name)
            if curve is None:
                if len(self) >= _MAX_CURVES:
                    continue
                curve = self[name] = Curve()
            curve.add(step, value)
            self._count += 1
