"""How important each parameter is to the tasks so far, as a picture."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from torch import Tensor

from ._figures import figure_writers, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_ROWS = 60  # above this names can't be read; the most important are shown


def log_importance(trainer: pl.Trainer, importance: Mapping[str, Tensor], tasks: int) -> None:
    """Give the picture to every logger that has `log_figure`."""
    if writers := figure_writers(trainer):
        figure = importance_bars(importance, f"importance after {tasks} tasks")
        for log_figure in writers:
            log_figure(figure, f"ewc/importance_{tasks}")


def importance_bars(importance: Mapping[str, Tensor], title: str) -> "Figure":
    """Draw the mean importance of each parameter, on a logarithmic scale.

    Args:
        importance: parameter name to its importance, >= 0, in the order of the module.
        title: shown above.
    """
    means = {name: float(value.double().mean()) if value.numel() else 0.0 for name, value in importance.items()}
    if len(means) > _MAX_ROWS:
        kept = set(sorted(means, key=means.__getitem__)[-_MAX_ROWS:])
        means = {name: value for name, value in means.items() if name in kept}
        title = f"{title} (the {_MAX_ROWS} largest)"
    figure = new_figure(7.0, 1.2 + 0.22 * max(len(means), 3))
    axes = figure.add_subplot()
    axes.barh(range(len(means)), list(means.values()), color="#4c72b0", height=0.7)
    axes.set_yticks(range(len(means)), list(means), fontsize=8)
    axes.invert_yaxis()
    if any(value > 0 for value in means.values()):
        axes.set_xscale("log")
    axes.set_xlabel("mean importance of an element (over all: 1 a task)")
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
