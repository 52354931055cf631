"""Attention between modalities as pictures, drawn without pyplot."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._attention_batches import Sample
from ._figures import new_figure, stretched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_NUMBERED = 10
_MAX_WORDS = 60
_LINE = 36


def matrix_figure(matrix: Tensor, names: Sequence[str], importance: Mapping[str, float]) -> "Figure":
    """Draw the mean matrix, and beside it the permutation importance.

    Args:
        matrix: (M+1, M+1); rows attend. A row of NaN is left white.
        names: of the rows.
        importance: accuracy lost by modality; empty leaves the bars out.
    """
    side = min(2.6 + 0.6 * len(names), 9.0)
    figure = new_figure(side + (3.0 if importance else 0.8), side)
    panels = figure.subplots(1, 2, width_ratios=[side, 2.6], squeeze=False)[0] if importance else [figure.add_subplot()]
    image = _heat_map(panels[0], matrix, names, size=9)
    figure.colorbar(image, ax=panels[0], fraction=0.046, pad=0.02)
    panels[0].set_title("attention, mean", fontsize=10)
    if importance:
        places = range(len(importance))
        panels[1].barh(places, list(importance.values()), color="#4575b4")
        panels[1].set_yticks(places, list(importance), fontsize=8)
        panels[1].invert_yaxis()
        panels[1].axvline(0, color="black", linewidth=0.8)
        panels[1].tick_params(labelsize=8)
        panels[1].set_title("accuracy lost when permuted", fontsize=10)
    return figure


def samples_figure(samples: Sequence[Sample], data: Any) -> "Figure":
    """Draw a row for each sample: its matrix, and what it is made of with the attention of the fused token.

    Args:
        samples: at least one.
        data: the DataModule, or None; its `vocabulary.decode` gives words, its `class_names` the labels.
    """
    names = samples[0].names[1:]
    figure = new_figure(2.6 + 2.8 * len(names), 2.5 * len(samples))
    panels = figure.subplots(len(samples), 1 + len(names), squeeze=False)
    for row, sample in zip(panels, samples, strict=True):
        absent = torch.tensor([name != "fused" and name not in sample.inputs for name in sample.names])
        _heat_map(row[0], sample.matrix.masked_fill(absent[:, None], torch.nan), sample.names, size=6)
        row[0].set_title(_label(sample.label, data), fontsize=8)
        for axes, name in zip(row[1:], names, strict=True):
            if name not in sample.inputs:
                _empty(axes, f"no {name}")
                continue
            _PANELS[name](axes, sample, data)
            share = float(sample.matrix[0, sample.names.index(name)])
            axes.set_title(f"{name}: {share:.2f} of the fused token", fontsize=8)
    return figure


def _heat_map(axes: Any, matrix: Tensor, names: Sequence[str], size: float) -> Any:
    image = axes.imshow(matrix.numpy(), cmap="viridis", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_xticks(range(len(names)), names, fontsize=size, rotation=45)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set_xlabel("is attended to", fontsize=size)
    axes.set_ylabel("attends", fontsize=size)
    if len(names) <= _MAX_NUMBERED:
        for row, line in enumerate(matrix.tolist()):
            for column, value in enumerate(line):
                if value == value:
                    colour = "black" if value > 0.6 else "white"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=size)
    return image


def _label(label: int | list[int] | None, data: Any) -> str:
    names = getattr(data, "class_names", None)
    numbers = [] if label is None else [label] if isinstance(label, int) else [i for i, on in enumerate(label) if on]
    words = [str(names[n]) if names is not None and 0 <= n < len(names) else str(n) for n in numbers]
    return ", ".join(words)[:40]


def _empty(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, color="#777777", transform=axes.transAxes)
    axes.axis("off")


def _draw_image(axes: Any, sample: Sample, data: Any) -> None:
    image, weights = sample.inputs["image"].float(), sample.tokens.get("image")
    axes.axis("off")
    if image.dim() != 3:
        _draw_columns(axes, sample, data, "image")
        return
    height, width = image.shape[1:]
    axes.imshow(stretched(image[None])[0].numpy(), extent=(0, width, height, 0), interpolation="nearest")
    rows = 0 if weights is None else round((len(weights) * height / width) ** 0.5)
    if weights is not None and len(weights) > 1 and rows and len(weights) % rows == 0:
        grid = weights.view(1, 1, rows, -1)
        heat = F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)[0, 0]
        axes.imshow(heat.numpy(), cmap="inferno", alpha=0.5, extent=(0, width, height, 0))


def _draw_text(axes: Any, sample: Sample, data: Any) -> None:
    import matplotlib

    tokens, weights = sample.inputs["text"], sample.tokens.get("text")
    if tokens.is_floating_point():
        _draw_columns(axes, sample, data, "text")
        return
    decode = getattr(getattr(data, "vocabulary", None), "decode", None)
    real = (tokens != 0).nonzero()[:_MAX_WORDS, 0].tolist()
    colours = matplotlib.colormaps["Reds"]
    # Tokens that were split or joined on the way have no weight of their own.
    known = weights is not None and len(weights) == len(tokens)
    highest = float(weights[real].max()) if known and weights is not None and real else 0.0
    column = line = 0
    for place in real:
        word = str(decode([int(tokens[place])]) if decode is not None else int(tokens[place]))[:_LINE]
        if column and column + len(word) > _LINE:
            column, line = 0, line + 1
        share = float(weights[place]) / highest if known and weights is not None and highest > 0 else 0.0
        box = {"facecolor": colours(0.7 * share), "edgecolor": "none", "pad": 1.0}
        axes.text(column, line, word, fontsize=6, family="monospace", va="top", bbox=box, parse_math=False)
        column += len(word) + 1
    axes.set_xlim(0, _LINE)
    axes.set_ylim(max(line + 1, 8), -0.3)
    axes.axis("off")


def _draw_series(axes: Any, sample: Sample, data: Any, name: str = "series") -> None:
    values, weights = sample.inputs[name].float(), sample.tokens.get(name)
    if values.dim() != 2:
        _draw_columns(axes, sample, data, name)
        return
    real = sample.masks.get(name)
    length = values.shape[1] if real is None else int(real.nonzero().max()) + 1 if bool(real.any()) else 1
    if name == "audio":
        axes.imshow(values[:, :length].numpy(), origin="lower", aspect="auto", cmap="magma", extent=(0, length, 0, 1))
        axes.set_yticks([])
    else:
        for channel in values[:8, :length]:
            axes.plot(channel.numpy(), linewidth=0.8)
    axes.tick_params(labelsize=6)
    if weights is not None and len(weights) > 1:
        above = axes.twinx()
        step = values.shape[1] / len(weights)
        centres = [step * (number + 0.5) for number in range(len(weights))]
        above.plot(centres, weights.tolist(), color="#00b4d8", linewidth=1.2)
        above.set_ylim(0, None)
        above.set_xlim(0, length)
        above.tick_params(labelsize=6)


def _draw_audio(axes: Any, sample: Sample, data: Any) -> None:
    _draw_series(axes, sample, data, "audio")


def _draw_table(axes: Any, sample: Sample, data: Any) -> None:
    _draw_columns(axes, sample, data, "table")


def _draw_columns(axes: Any, sample: Sample, data: Any, name: str) -> None:
    """Draw a bar for each token's attention; of one token the title says all."""
    weights = sample.tokens.get(name)
    if weights is None or len(weights) < 2:
        _empty(axes, f"{sample.inputs[name].numel()} features")
        return
    axes.axis("on")
    axes.bar(range(len(weights)), weights.tolist(), color="#4575b4")
    axes.tick_params(labelsize=6)


_PANELS: dict[str, Callable[[Any, Sample, Any], None]] = {
    "image": _draw_image,
    "text": _draw_text,
    "audio": _draw_audio,
    "series": _draw_series,
    "table": _draw_table,
}
