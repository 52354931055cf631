"""Figures without pyplot, and the loggers that take them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import Tensor

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


def stretched(images: Tensor) -> Tensor:
    """Return images (N, C, H, W) of any scale as (N, H, W, 3), stretched to [0, 1] over all of them."""
    images = images.float()
    if images.shape[1] != 3:
        images = images[:, :1].expand(-1, 3, -1, -1)
    low, high = images.amin(), images.amax()
    return ((images - low) / (high - low).clamp(min=1e-12)).permute(0, 2, 3, 1)


def put_image(axes: Any, image: Tensor, column: int, row: int) -> None:
    """Draw an image (H, W, 3) in a cell of a grid whose cells have the side 1."""
    axes.imshow(image.numpy(), extent=(column + 0.05, column + 0.95, row + 0.95, row + 0.05), interpolation="nearest")
