"""Figures without pyplot, and the loggers that take them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure that can be saved.

    Args:
        width: in inches.
        height: in inches.
    """
    # Here, because it takes 0.3 s and most fits draw nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure_writers(trainer: pl.Trainer) -> list[Callable[..., Any]]:
    """Return `log_figure(figure, name)` of each logger that has it."""
    return [logger.log_figure for logger in trainer.loggers if hasattr(logger, "log_figure")]
