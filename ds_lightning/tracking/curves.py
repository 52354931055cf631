"""Metrics kept in memory for the learning curves: bounded, and thinned as they grow."""

from collections.abc import Iterable

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

    def have_grown(self) -> bool:
        """Tell whether there are points that weren't there at the last call."""
        grown, self._count_before = self._count > self._count_before, self._count
        return grown

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
