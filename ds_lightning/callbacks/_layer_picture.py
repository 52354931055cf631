"""The multipliers of all layers over the steps of a fit, as a picture."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

from ._figures import figure_writers, new_figure
from ._layer_history import LayerHistory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_NAMES = 60  # above this names can't be read; evenly spaced ones are shown
_LEAST_SPAN = 1.05  # of the colours, or rounding would look like a pattern


def log_multipliers(trainer: pl.Trainer, histories: Sequence[LayerHistory]) -> None:
    """Give one picture an optimizer to every logger that has `log_figure`."""
    writers = figure_writers(trainer)
    shown = [history for history in histories if len(history.steps) > 1 and history.names]
    for i, history in enumerate(shown if writers else ()):
        figure = multiplier_map(history)
        for log_figure in writers:
            log_figure(figure, "layer_lr/multipliers" if len(shown) == 1 else f"layer_lr/multipliers_{i}")


def multiplier_map(history: LayerHistory) -> "Figure":
    """Draw layers from top to bottom and optimizer steps from left to right; white is 1, the colours are logarithmic.

    Args:
        history: two columns or more.
    """
    from matplotlib.colors import LogNorm

    count = len(history.names)
    figure = new_figure(8.0, 1.4 + 0.2 * min(max(count, 4), _MAX_NAMES))
    axes = figure.add_subplot()
    values = history.values.T
    present = values[torch.isfinite(values) & (values > 0)]
    span = max(_LEAST_SPAN, math.exp(float(present.log().abs().max()))) if present.numel() else _LEAST_SPAN
    # A multiplier holds until the next column; the last one as long as the one before.
    edges = [*history.steps, 2 * history.steps[-1] - history.steps[-2]]
    rows = [row - 0.5 for row in range(count + 1)]
    axes.set_facecolor("#d8dce6")  # a layer that was not there
    mesh = axes.pcolormesh(edges, rows, values.numpy(), cmap="RdBu_r", norm=LogNorm(1 / span, span))
    named = range(0, count, -(-count // _MAX_NAMES))
    axes.set_yticks(named, [history.names[i] for i in named], fontsize=7)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_xlabel("optimizer step")
    axes.set_title("multiplier of the learning rate", fontsize=11)
    ticks = [1 / span, span**-0.5, 1.0, span**0.5, span]
    bar = figure.colorbar(mesh, ax=axes, ticks=ticks)
    bar.ax.set_yticklabels([f"{tick:.2f}" for tick in ticks], fontsize=8)
    bar.ax.minorticks_off()
    return figure
