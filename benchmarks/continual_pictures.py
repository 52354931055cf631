"""The pictures of benchmarks/continual.py: mean accuracy matrices, and accuracy after each task, by method."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

COLUMNS = 4


def write_pictures(folder: Path, stream: str, matrices: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Write `continual_<stream>_matrices.png` and `continual_<stream>_curves.png`.

    Args:
        folder: made when it isn't there.
        stream: part of the names.
        matrices: by method, (seeds, T, T).
        names: of the tasks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    heat_maps(matrices, names).savefig(folder / f"continual_{stream}_matrices.png", dpi=110)
    curves(matrices, names).savefig(folder / f"continual_{stream}_curves.png", dpi=110)


def heat_maps(matrices: Mapping[str, Tensor], names: Sequence[str]) -> Figure:
    columns = min(COLUMNS, len(matrices))
    rows = -(-len(matrices) // columns)
    figure = Figure(figsize=(3.3 * columns + 0.8, 3.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(matrices) :]:
        axes.set_axis_off()
    for place, (axes, (method, found)) in enumerate(zip(panels, matrices.items(), strict=False)):
        mean = found.mean(dim=0)
        image = axes.imshow(mean.numpy(), cmap="viridis", vmin=0, vmax=1)
        for row, line in enumerate(mean.tolist()):
            for column, value in enumerate(line):
                colour = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_title(method, fontsize=11)
        axes.set_xticks(range(len(names)), names, fontsize=8, rotation=90 if max(map(len, names)) > 4 else 0)
        axes.set_yticks(range(len(names)), names if place % columns == 0 else [], fontsize=8)
        if place % columns == 0:
            axes.set_ylabel("after task")
    figure.colorbar(image, ax=panels.tolist(), fraction=0.03).set_label("accuracy, mean over seeds")
    return figure


def curves(matrices: Mapping[str, Tensor], names: Sequence[str]) -> Figure:
    """Draw the accuracy on the first task, and on all tasks so far, after each task; bands from min to max."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    first, so_far = figure.subplots(1, 2, sharey=True)
    steps = range(len(names))
    for number, (method, found) in enumerate(matrices.items()):
        average = torch.stack([found[:, k, : k + 1].mean(dim=1) for k in steps], dim=1)
        for axes, values in ((first, found[:, :, 0]), (so_far, average)):
            style = ("-", "--", ":")[number // 10 % 3]
            axes.plot(steps, values.median(dim=0).values, style, marker=".", color=f"C{number % 10}", label=method)
            low, high = values.min(dim=0).values, values.max(dim=0).values
            axes.fill_between(steps, low, high, color=f"C{number % 10}", alpha=0.12, linewidth=0)
    for axes, title in ((first, f"the first task ({names[0]})"), (so_far, "all tasks so far")):
        axes.set_title(title, fontsize=11)
        axes.set_xticks(steps, names, fontsize=8)
        axes.set_xlabel("after training on task")
        axes.grid(alpha=0.25)
    first.set_ylabel("accuracy")
    figure.legend(*so_far.get_legend_handles_labels(), fontsize=8, loc="outside right center")
    return figure
