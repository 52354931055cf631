"""What a sweep shows while it runs: a line for each finished trial, and a bar on a terminal."""

from collections.abc import Mapping
from textwrap import shorten
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ds_lightning.sweeps.task import TrialOutcome

# The whole line is the run's tag `error`.
_ERROR_LENGTH = 240
_COLOURS = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red"}


class SweepProgress:
    """Lines and a bar on stderr.

    Args:
        trials: how many trials are to come; None when only time limits them.
        metric: name of the objective.
        bar: whether a bar is wanted, where stderr is a terminal.
    """

    def __init__(self, trials: int | None, metric: str, bar: bool = True) -> None:
        self._metric = metric
        # Lines of a log are not to be folded at 80 characters.
        self._console = Console(stderr=True, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not (bar and self._console.is_terminal),
            transient=True,
        )
        self._task = self._progress.add_task("sweep", total=trials)

    def __enter__(self) -> "SweepProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def started(self, number: int) -> None:
        """A trial begins."""
        self._progress.update(self._task, description=f"trial {number}")

    def report(self, number: int, step: int, value: float) -> None:
        """A running trial has a new value."""
        text = f"trial {number}, step {step}: {self._metric} {value:.5g}"
        self._progress.update(self._task, description=escape(text))

    def finished(self, number: int, outcome: TrialOutcome, params: Mapping[str, Any], seconds: float) -> None:
        """A trial has ended."""
        value = " ".join(f"{value:.6g}" for value in outcome.values) or "-"
        chosen = ", ".join(f"{short_key(key)}={short_value(each)}" for key, each in params.items())
        state = f"[{_COLOURS[outcome.state]}]{outcome.state}[/]"
        text = f"trial {number}: {state} {value}  {escape(chosen)}  {seconds:.1f} s"
        if outcome.error:
            text += f"  {escape(shorten(outcome.error, _ERROR_LENGTH, placeholder=' ...'))}"
        self._progress.console.print(text, highlight=False)
        self._progress.advance(self._task, int(outcome.counts))


def short_key(key: str) -> str:
    """Return a dotted key without `init_args`.

    Example:
        >>> short_key("model.init_args.optimizer.init_args.lr")
        'model.optimizer.lr'
    """
    return ".".join(part for part in key.split(".") if part != "init_args")


def short_value(value: Any) -> str:
    """Return a value as a person reads it: floats with four digits.

    Example:
        >>> short_value(0.012345678)
        '0.01235'
    """
    return f"{value:.4g}" if isinstance(value, float) else str(value)
