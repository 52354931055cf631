"""Pictures of an embedding, drawn without pyplot."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_lightning.errors import ConfigError

from ._figures import new_figure, put_image, stretched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SAME, _OTHER = "#1a9850", "#d73027"
# Above this a legend is longer than the picture, and colours repeat.
_MAX_NAMES = 20


def principal_plane(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the samples lie on the two directions of the largest variance, and its shares.

    Args:
        features: (N, D), N and D at least 1.

    Returns:
        (N, 2), and (2,) shares of the variance; zeros where there is no second direction.
    """
    centred = features.double() - features.double().mean(dim=0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:2]
    # The sign is free: the largest entry is positive, so that two pictures of one embedding are alike.
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    points = centred @ (directions * largest.sign()).T
    share = values.square() / values.square().sum().clamp(min=1e-300)
    missing = 2 - points.shape[1]
    return F.pad(points, (0, missing)), F.pad(share[:2], (0, missing))


def tsne_plane(features: Tensor, seed: int) -> Tensor:
    """Return the samples' places by t-SNE, (N, 2).

    Args:
        features: (N, D), N at least 3.
        seed: of the search.

    Raises:
        ConfigError: when scikit-learn is not installed.
    """
    try:
        from sklearn.manifold import TSNE
    except ModuleNotFoundError as error:
        raise ConfigError("kind='tsne' needs scikit-learn; `pip install scikit-learn`, or set kind='pca'") from error
    # Thirty is the usual number; it must be below the number of samples.
    perplexity = min(30.0, (len(features) - 1) / 3)
    found = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features.float().numpy())
    return torch.from_numpy(found)


def nearest(features: Tensor, count: int) -> Tensor:
    """Return each sample's nearest others by cosine, nearest first.

    Args:
        features: (N, D).
        count: how many, below N.

    Returns:
        (N, count) int64.
    """
    unit = F.normalize(features.float(), dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    return similarity.topk(count, dim=1).indices


def class_map(points: Tensor, label: Tensor, names: Sequence[str] | None, title: str) -> "Figure":
    """Draw the samples as points in the colours of their classes.

    Args:
        points: (N, 2).
        label: (N,) int64.
        names: of the classes, or None.
        title: above the picture.
    """
    from matplotlib import colormaps

    figure = new_figure(6.4, 4.8)
    axes = figure.add_subplot()
    classes = sorted(set(label.tolist()))
    colours = colormaps["tab10" if len(classes) <= 10 else "tab20"]
    for number, kind in enumerate(classes):
        mine = points[label == kind]
        axes.scatter(
            mine[:, 0].numpy(),
            mine[:, 1].numpy(),
            s=8,
            alpha=0.7,
            linewidths=0,
            color=colours(number % colours.N),
            label=_name(kind, names),
        )
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    if len(classes) <= _MAX_NAMES:
        figure.legend(loc="outside right upper", fontsize=7, markerscale=2)
    return figure


def neighbour_grid(
    images: Tensor, label: Tensor, neighbours: Tensor, queries: Sequence[int], names: Sequence[str] | None
) -> "Figure":
    """Draw a row for each query: its image, a gap, and its neighbours, framed by whether the class is the same.

    Args:
        images: (N, C, H, W).
        label: (N,) int64.
        neighbours: (N, K), of `nearest`.
        queries: the rows, indices of samples.
        names: of the classes, or None.
    """
    from matplotlib.patches import Rectangle

    count = neighbours.shape[1]
    figure = new_figure(min(0.6 * (count + 2) + 1.2, 16.0), min(0.6 * len(queries) + 0.5, 24.0))
    axes = figure.add_subplot()
    shown = stretched(images)
    for row, query in enumerate(queries):
        put_image(axes, shown[query], 0, row)
        for place, other in enumerate(neighbours[query].tolist()):
            column = place + 2
            put_image(axes, shown[other], column, row)
            colour = _SAME if label[other] == label[query] else _OTHER
            corner = (column + 0.03, row + 0.03)
            axes.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, linewidth=1.6, edgecolor=colour))
    axes.set_xlim(0, count + 2)
    axes.set_ylim(len(queries), 0)
    axes.set_aspect("equal")
    axes.set_yticks(
        [row + 0.5 for row in range(len(queries))], [_name(int(label[query]), names) for query in queries], fontsize=7
    )
    axes.set_xticks([0.5, 2 + count / 2], ["sample", "nearest others"], fontsize=8)
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    share = (label[neighbours] == label[:, None]).float().mean().item()
    axes.set_title(f"of the class of their sample, over all: {share:.2f}", fontsize=8)
    return figure


def _name(kind: int, names: Sequence[str] | None) -> str:
    word = str(names[kind]) if names is not None and 0 <= kind < len(names) else str(kind)
    return word if len(word) <= 16 else word[:15] + "…"
