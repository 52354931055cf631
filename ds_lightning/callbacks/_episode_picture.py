"""Pictures of episodes, drawn without pyplot."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._figures import new_figure, put_image, stretched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RIGHT, _WRONG = "#1a9850", "#d73027"
# Above this the rows are too small to be told apart.
_MAX_CLASSES = 20


def episode_grid(
    batch: Mapping[str, Any], logits: Tensor, names: Sequence[str] | None, shots: int, queries: int
) -> "Figure":
    """Draw each task's classes as rows: the support samples, a gap, the query samples with the predictions.

    Args:
        batch: `support` and `query` with `image` (T, N, C, H, W) and `label` (T, N); perhaps `classes` (T, ways).
        logits: (T, M, ways) of the query samples.
        names: of the data's classes, or None.
        shots: support samples of a class that are shown.
        queries: query samples of a class that are shown.
    """
    from matplotlib.patches import Rectangle

    tasks, ways = len(logits), min(logits.shape[-1], _MAX_CLASSES)
    support, query = batch["support"], batch["query"]
    shots = min(shots, int((support["label"][0] == 0).sum()))
    queries = min(queries, int((query["label"][0] == 0).sum()))
    side = 0.45
    width, height = side * (shots + queries + 1) + 1.2, side * ways + 0.6
    figure = _figure(max(width, 3.0), height * tasks)
    for task, axes in enumerate(figure.subplots(tasks, 1, squeeze=False).flat):
        label, predicted = query["label"][task], logits[task].argmax(dim=-1)
        images = stretched(torch.cat([support["image"][task], query["image"][task]]))
        shown_support, shown_query = images[: len(support["label"][task])], images[len(support["label"][task]) :]
        words = _class_words(batch, task, logits.shape[-1], names)
        for row in range(ways):
            for place, index in enumerate((support["label"][task] == row).nonzero()[:shots, 0].tolist()):
                put_image(axes, shown_support[index], place, row)
            for place, index in enumerate((label == row).nonzero()[:queries, 0].tolist()):
                right = int(predicted[index]) == row
                column = shots + 1 + place
                put_image(axes, shown_query[index], column, row)
                axes.add_patch(
                    Rectangle(
                        (column + 0.03, row + 0.03),
                        0.94,
                        0.94,
                        fill=False,
                        linewidth=1.6,
                        edgecolor=_RIGHT if right else _WRONG,
                    )
                )
                if not right:
                    text = words[int(predicted[index])]
                    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8}
                    axes.text(column + 0.08, row + 0.3, text[:8], color=_WRONG, fontsize=6, bbox=box)
        axes.set_xlim(0, shots + 1 + queries)
        axes.set_ylim(ways, 0)
        axes.set_aspect("equal")
        axes.set_yticks([row + 0.5 for row in range(ways)], words[:ways], fontsize=7)
        axes.set_xticks([shots / 2, shots + 1 + queries / 2], ["support", "query"], fontsize=8)
        axes.tick_params(length=0)
        axes.set_frame_on(False)
        accuracy = (predicted == label).float().mean().item()
        axes.set_title(f"accuracy of the query set {accuracy:.2f}", fontsize=8)
    return figure


def curves(batch: Mapping[str, Any], outputs: Tensor) -> "Figure":
    """Draw each task of a regression: the truth, the support samples, the outputs before and after adaptation.

    Args:
        batch: `support` and `query` with `table` (T, N, 1) and `target` (T, N, 1).
        outputs: (S, T, M, 1) of the query samples.
    """
    tasks = outputs.shape[1]
    figure = _figure(3.4 * tasks, 2.8)
    support, query = batch["support"], batch["query"]
    for task, axes in enumerate(figure.subplots(1, tasks, squeeze=False).flat):
        x, order = query["table"][task].flatten().sort()
        axes.plot(x, query["target"][task].flatten()[order], color="black", linewidth=1, label="truth")
        if len(outputs) > 1:
            axes.plot(x, outputs[0, task].flatten()[order], color="#999999", linestyle=":", label="before")
        axes.plot(x, outputs[-1, task].flatten()[order], color="#4575b4", linestyle="--", label="adapted")
        axes.plot(
            support["table"][task].flatten(), support["target"][task].flatten(), "o", color=_WRONG, label="support"
        )
        error = (outputs[-1, task] - query["target"][task]).square().mean().item()
        axes.set_title(f"mean squared error {error:.3g}", fontsize=8)
        axes.tick_params(labelsize=7)
        if task == 0:
            axes.legend(fontsize=7)
    return figure


def score_by_step(by_step: Mapping[int, float], score: str) -> "Figure":
    """Draw a figure after each number of adaptation steps.

    Args:
        by_step: step to its value.
        score: the figure's name.
    """
    figure = _figure(4.2, 3.0)
    axes = figure.add_subplot()
    steps = sorted(by_step)
    axes.plot(steps, [by_step[step] for step in steps], "o-", color="#4575b4")
    axes.set_xlabel("adaptation steps")
    axes.set_ylabel({"mse": "mean squared error"}.get(score, score))
    if steps[-1] > 20:
        axes.set_xscale("symlog", linthresh=1)
    elif steps == list(range(len(steps))):
        axes.set_xticks(steps)
    axes.grid(alpha=0.3)
    return figure


def _figure(width: float, height: float) -> "Figure":
    return new_figure(min(width, 16.0), min(height, 24.0))


def _class_words(batch: Mapping[str, Any], task: int, ways: int, names: Sequence[str] | None) -> list[str]:
    classes = batch.get("classes")
    if classes is None:
        return [str(number) for number in range(ways)]
    indices = classes[task].tolist()
    known = names is not None and max(indices) < len(names)
    words = [str(names[index]) if known and names is not None else str(index) for index in indices]
    return [word if len(word) <= 16 else word[:15] + "…" for word in words]
