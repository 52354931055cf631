"""Pictures of a run, drawn without pyplot: no window, no global state, safe on any thread."""

import io
import json
import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ds_lightning.tracking.curves import Curve

_STAGES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_NAME = re.compile(r"^(train|validation|valid|val|test)[/_](.+)$")
_COLOURS = {"train": "#1f77b4", "val": "#d62728", "test": "#2ca02c", "": "#555555"}
_MAX_PANELS = 12
# Above this, cells are too small for numbers, and names for every row overlap.
_MAX_NUMBERED_CLASSES = 20
_MAX_NAMES = 40


def png(figure: Figure, dpi: int = 110) -> bytes:
    """Return a figure as PNG; a figure of the user's keeps its canvas.

    Args:
        figure: a matplotlib figure, made with pyplot or not.
        dpi: resolution.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def confusion_matrix(matrix: Tensor, class_names: Sequence[str], title: str = "") -> Figure:
    """Draw a confusion matrix; colours are shares of the true class, numbers are counts.

    Args:
        matrix: (C, C) counts >= 0; rows are true classes, columns are predicted ones.
        class_names: C names.
        title: shown above.

    Raises:
        ValueError: when matrix isn't square or has another number of classes than there are names.

    Example:
        >>> import torch
        >>> figure = confusion_matrix(torch.tensor([[9, 1], [2, 8]]), ["cat", "dog"])
        >>> png(figure)[1:4]
        b'PNG'
    """
    counts = matrix.detach().cpu().double().numpy()
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or len(class_names) != counts.shape[0]:
        raise ValueError(
            f"matrix has shape {tuple(matrix.shape)} and there are {len(class_names)} class_names; expected "
            "(C, C) and C names"
        )
    classes = len(class_names)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    names = [_shorten(name) for name in class_names]
    longest = max(len(name) for name in names)

    side = min(3.0 + 0.45 * classes, 13.0)
    margin = 0.075 * longest + 0.6
    figure = Figure(figsize=(side + margin + 0.8, side + margin), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label("share of the true class")

    every = -(-classes // _MAX_NAMES)
    places = range(0, classes, every)
    size = 10 if classes <= 12 else max(6, 11 - classes // 12)
    axes.set_xticks(places, [names[i] for i in places], rotation=90 if longest > 3 else 0, fontsize=size)
    axes.set_yticks(places, [names[i] for i in places], fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    accuracy = counts.trace() / counts.sum() if counts.sum() > 0 else 0.0
    axes.set_title(f"{title}  accuracy {accuracy:.1%} of {counts.sum():,.0f}".strip(), fontsize=11)
    if classes <= _MAX_NUMBERED_CLASSES:
        whole = bool((counts == counts.round()).all())
        for row in range(classes):
            for column in range(classes):
                value = counts[row, column]
                if value:
                    text = f"{value:.0f}" if whole else f"{value:.2g}"
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size - 1)
    return figure


def confusion_files(matrix: Tensor, class_names: Sequence[str], stage: str) -> dict[str, bytes]:
    """Return a confusion matrix as picture and as JSON, by path.

    Args:
        matrix: (C, C) counts; rows are true classes.
        class_names: C names.
        stage: `val`, `test` and so on; part of the names.
    """
    name = f"confusion_matrix_{stage}"
    content = {"classes": list(class_names), "rows": "true class", "matrix": matrix.cpu().tolist()}
    return {
        f"pictures/{name}.png": png(confusion_matrix(matrix, class_names, title=stage)),
        f"{name}.json": json.dumps(content).encode(),
    }


def learning_curves(curves: Mapping[str, Curve]) -> Figure | None:
    """Draw training and validation curves of the same metric into one panel.

    Args:
        curves: by metric name: `train/loss` and `val/loss` (or `train_loss`, `val_loss`) share the panel
            `loss`; Lightning's endings `_step` and `_epoch` as well. `system/...` and `epoch` are left out,
            and so is a panel without any line of two points.

    Returns:
        The figure with at most 12 panels, or None when there is nothing to draw.
    """
    panels: dict[str, list[tuple[str, str, Curve]]] = {}
    for name, curve in curves.items():
        if name == "epoch" or name.startswith("system/"):
            continue
        match = _NAME.match(name)
        stage, metric = (_STAGES[match[1]], match[2]) if match else ("", name)
        panels.setdefault(re.sub(r"_(step|epoch)$", "", metric), []).append((stage, name, curve))
    drawable = [item for item in panels.items() if any(len(curve.steps) > 1 for _, _, curve in item[1])]
    # Panels that compare stages first.
    drawable.sort(key=lambda item: (-len({stage for stage, _, _ in item[1]}), item[0]))
    drawable = drawable[:_MAX_PANELS]
    if not drawable:
        return None
    columns = min(3, len(drawable))
    rows = -(-len(drawable) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, lines) in enumerate(drawable, start=1):
        axes = figure.add_subplot(rows, columns, place)
        for stage, name, curve in sorted(lines, key=lambda line: -len(line[2].steps)):
            _draw(axes, name, _COLOURS[stage], curve, dense=name.endswith("_step"))
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return figure


def _draw(axes: Axes, name: str, colour: str, curve: Curve, dense: bool) -> None:
    steps, values = np.asarray(curve.steps), np.asarray(curve.values)
    if len(steps) == 1:
        axes.plot(steps, values, "o", color=colour, label=name)
    elif len(steps) <= 60:
        axes.plot(steps, values, ".-", color=colour, label=name, alpha=0.5 if dense else 1.0)
    else:
        # Noisy single steps: pale points' line, and a running mean that can be read.
        width = max(3, len(steps) // 40)
        finite = np.isfinite(values)
        sums = np.convolve(np.where(finite, values, 0.0), np.ones(width), "valid")
        counts = np.convolve(finite, np.ones(width), "valid")
        mean = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0.5)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
        axes.plot(steps[width - 1 :], mean, color=colour, label=name, linewidth=1.6)


def _shorten(name: str, longest: int = 18) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"
