"""What pruning left of each layer, and what it cost in accuracy, as pictures."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ds_lightning.networks.pruning_plan import plan_of

from ._figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_ROWS = 150  # above this names can't be read; those that lost the largest shares are shown
_KEPT, _GONE, _AFTER = "#4c72b0", "#d8dce6", "#c44e52"


def kept_channels(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Return, for each layer, how many output channels it has and how many it had before anything was removed."""
    plan = plan_of(network)
    before, after = (plan.shapes, plan.shapes_after) if plan is not None else ({}, {})
    found = {}
    for layer, weight, dim, now in _layers(network):
        found[layer] = now, now * before[weight][dim] // after[weight][dim] if weight in before else now
    return found


def _layers(network: nn.Module) -> Iterator[tuple[str, str, int, int]]:
    """Yield layers with the name of their weight, its dimension that follows their output channels, and their number.

    The weight itself is not asked for: of a layer with spectral norm it would change with that.
    """
    for path, part in network.named_modules():
        prefix = f"{path}." if path else ""
        match part:
            case nn.Embedding():
                yield path, f"{prefix}weight", 1, part.embedding_dim
            case _ConvNd():
                yield path, f"{prefix}weight", int(part.transposed and part.groups == 1), part.out_channels
            case nn.Linear():
                yield path, f"{prefix}weight", 0, part.out_features
            case nn.MultiheadAttention() if part._parameters.get("in_proj_weight") is not None:
                yield f"{prefix}in_proj", f"{prefix}in_proj_weight", 0, len(part.in_proj_weight)


def channel_bars(kept: Mapping[str, tuple[int, int]], title: str) -> "Figure":
    """Draw the channels that each layer keeps, over those that it had.

    Args:
        kept: path of a layer -> its channels now and at the beginning, in the order of the network.
        title: shown above.
    """
    if len(kept) > _MAX_ROWS:
        lost = sorted(kept, key=lambda layer: kept[layer][0] / kept[layer][1])[:_MAX_ROWS]
        kept = {layer: counts for layer, counts in kept.items() if layer in lost}
        title = f"{title} (the {_MAX_ROWS} layers that lost most)"
    rows = range(len(kept))
    now, before = [counts[0] for counts in kept.values()], [counts[1] for counts in kept.values()]
    figure = new_figure(7.0, 1.2 + 0.22 * max(len(kept), 3))
    axes = figure.add_subplot()
    axes.barh(rows, before, color=_GONE, height=0.7, label="removed")
    axes.barh(rows, now, color=_KEPT, height=0.7, label="kept")
    for row, left, full in zip(rows, now, before, strict=True):
        axes.text(full, row, f" {left} of {full}", va="center", fontsize=7)
    axes.set_yticks(rows, list(kept), fontsize=8)
    axes.set_ylim(len(kept) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_xlabel("output channels")
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def pareto(points: Sequence[Mapping[str, float]]) -> "Figure":
    """Draw the accuracy over the share of the MACs that is left: before, right after and some training after removals.

    Args:
        points: of each removal, in order: `share_before` and `share`, in [0, 1], and, where they were measured,
            `before`, `after` and `recovered`, accuracies in [0, 1].
    """
    figure = new_figure(6.0, 4.2)
    axes = figure.add_subplot()
    steps = [point for point in points if "before" in point and "after" in point]
    for point in steps:
        x = [100 * point["share_before"], 100 * point["share"]]
        axes.plot(x, [point["before"], point["after"]], color=_AFTER, linewidth=0.8, alpha=0.5)
    styles: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
        ("before", "share_before", "before a removal", {"marker": "o", "color": _KEPT, "markerfacecolor": "white"}),
        ("after", "share", "right after it", {"marker": "v", "color": _AFTER}),
        ("recovered", "share", "recovered, before the next or at the end", {"marker": ".", "color": _KEPT}),
    )
    for key, at, label, style in styles:
        found = [(100 * point[at], point[key]) for point in points if key in point]
        if found:
            axes.plot(*zip(*found, strict=True), linestyle="", label=label, **style)
    axes.invert_xaxis()
    axes.set_xlabel("MACs left, % of the unpruned network's")
    axes.set_ylabel("accuracy on validation batches")
    axes.set_title("accuracy for what the network costs", fontsize=11)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
