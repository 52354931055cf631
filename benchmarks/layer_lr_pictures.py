"""The pictures of benchmarks/layer_lr.py: accuracy over the steps, and the multipliers of one training.

`curves` draws what layer_lr.py printed: the mean validation accuracy of each method, one panel for each setting of each
file, with the four targets as lines. `multipliers` trains once, with the setting's first seed, and saves the picture
that DynamicLayerLR gives to every logger with `log_figure`.

Run: `python benchmarks/layer_lr_pictures.py curves curves.png 400.json 1600.json --methods baseline trust`, and
     `OMP_NUM_THREADS=1 python benchmarks/layer_lr_pictures.py multipliers map.png small --rate 0.1`.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from layer_lr import SETTINGS
from layer_lr_methods import train
from layer_lr_networks import prepare
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 110


class PictureFile(DummyLogger):
    """Takes a callback's picture and saves it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def log_figure(self, figure: Figure, name: str) -> None:
        figure.savefig(self.path, dpi=DPI)


def curves(options: argparse.Namespace) -> None:
    tables = [table for path in options.files for table in json.loads(Path(path).read_text())["settings"].values()]
    figure = Figure(figsize=(3.9 * len(tables) + 1.2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, table in zip(panels, tables, strict=True):
        setting = table["setting"]
        for target in table["targets"]:
            axes.axhline(target, color="0.8", linewidth=0.8, zorder=0)
        for number, method in enumerate(options.methods):
            curve = table["methods"].get(method, {}).get("curve")
            if curve is None:
                continue
            steps = [setting["steps"] * (point + 1) / len(curve) for point in range(len(curve))]
            axes.plot([0, *steps], [table["chance"], *curve], color=f"C{number}", label=method)
        warmup = f", warm-up {setting['warmup']}" if setting["warmup"] else ""
        axes.set_title(f"{setting['network']}, {setting['optimizer']}, {setting['steps']:,} steps{warmup}", fontsize=10)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.2)
    panels[0].set_ylabel("validation accuracy, mean over the seeds")
    handles = {text: line for axes in panels for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=9, loc="outside right center")
    figure.savefig(options.picture, dpi=DPI)


def multipliers(options: argparse.Namespace) -> None:
    run, _ = SETTINGS[options.setting]
    run = replace(
        run, setting=options.setting, steps=options.steps or run.steps, lr=options.rate, method=options.method
    )
    with tempfile.TemporaryDirectory() as cache:
        prepare(run.data, options.data_dir, Path(cache))
        train(replace(run, cache=cache, device=options.device), PictureFile(options.picture))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("curves")
    drawing.add_argument("picture", help="the file to write")
    drawing.add_argument("files", nargs="+", help="what layer_lr.py printed")
    drawing.add_argument("--methods", nargs="+", default=["baseline", "default"])
    training = commands.add_parser("multipliers")
    training.add_argument("picture", help="the file to write")
    training.add_argument("setting", choices=sorted(SETTINGS))
    training.add_argument("--rate", type=float, required=True)
    training.add_argument("--method", default="default", help="as layer_lr.py takes it")
    training.add_argument("--steps", type=int, help="instead of the setting's own")
    training.add_argument("--data-dir", default="data", help="folder of the files")
    training.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    (curves if options.command == "curves" else multipliers)(options)


if __name__ == "__main__":
    main()
