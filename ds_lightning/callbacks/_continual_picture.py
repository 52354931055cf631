"""The accuracy matrix of a stream of tasks as a picture, drawn without pyplot."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ._figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Above this, cells are too small for numbers.
_MAX_NUMBERED = 15


def accuracy_heat_map(matrix: Tensor, names: Sequence[str], title: str = "") -> "Figure":
    """Draw accuracies after each task; tasks to come are left white.

    Args:
        matrix: (T, T) in [0, 1] or NaN; row i is after task i.
        names: T names of the tasks.
        title: shown above.
    """
    values = matrix.detach().cpu().double()
    tasks = len(names)
    short = [name if len(name) <= 14 else name[:13] + "…" for name in names]
    side = min(2.4 + 0.62 * tasks, 12.0)
    figure = new_figure(side + 1.2, side)
    axes = figure.add_subplot()
    image = axes.imshow(values.numpy(), cmap="viridis", vmin=0.0, vmax=1.0, interpolation="nearest")
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02).set_label("accuracy")
    axes.set_xticks(range(tasks), short, rotation=90 if max(map(len, short)) > 4 else 0)
    axes.set_yticks(range(tasks), short)
    axes.set_xlabel("measured on task")
    axes.set_ylabel("after training on task")
    axes.set_title(title or "accuracy", fontsize=11)
    if tasks <= _MAX_NUMBERED:
        for row, line in enumerate(values.tolist()):
            for column, value in enumerate(line):
                if value == value:
                    colour = "black" if value > 0.6 else "white"
                    text = f"{value:.2f}" if tasks <= 8 else f"{100 * value:.0f}"
                    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    return figure
