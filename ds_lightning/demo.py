"""The main job on 5,000 real digits: three trainings side by side, then a sweep, all in MLflow."""

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from ds_lightning.errors import ConfigError
from ds_lightning.presets import find_config

TARGET = 0.95
# Name of the run -> the presets it adds to the model below.
RUNS = {
    "plain": ["datamodules/mnist5k.yaml"],
    "mixed": ["datamodules/mnist5k_mixed.yaml"],
    "mixed + layer_lr": ["datamodules/mnist5k_mixed.yaml", "callbacks/layer_lr.yaml"],
}
MODEL = {
    "class_path": "ds_lightning.modules.Classifier",
    "init_args": {"network": "resnet8", "lr_scheduler": "cosine"},
}


class Outcome(NamedTuple):
    """What the table shows of a run."""

    name: str
    history: list[tuple[int, float]]  # (optimizer step, validation accuracy)
    seconds: float

    @property
    def steps_to_target(self) -> int | None:
        """The first validated step with at least the target accuracy."""
        return next((step for step, accuracy in self.history if accuracy >= TARGET), None)


def run_demo_command(argv: list[str]) -> int:
    """Train three ways, sweep, and print what came out."""
    parser = argparse.ArgumentParser(
        prog="ds-lightning demo",
        description="Train a small ResNet on 5,000 real digits plainly, with MixUp/CutMix, and with both that and\n"
        "DynamicLayerLR; then run a small Optuna sweep. Everything is logged to MLflow.",
        epilog="Example:\n  ds-lightning demo --epochs 4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--store", help="folder or tracking URI (default: MLFLOW_TRACKING_URI, else ./mlruns)")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of each of the three trainings (default 8)")
    parser.add_argument("--trials", type=int, default=8, help="trials of the sweep (default 8)")
    args = parser.parse_args(argv)
    if args.epochs < 1 or args.trials < 1:
        raise ConfigError(f"--epochs is {args.epochs} and --trials {args.trials}; expected at least 1 of each")

    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    console = Console()
    began = time.perf_counter()
    console.print("Loading PyTorch, Lightning and MLflow ...", style="dim")
    from ds_lightning.sweeps.command import print_result
    from ds_lightning.sweeps.sweep import Sweep
    from ds_lightning.tracking.store import locate

    outcomes = []
    for name, configs in RUNS.items():
        console.rule(f"{name}: {' '.join(configs)}")
        outcomes.append(_train(name, configs, args.epochs, args.store))
    picture = _draw(outcomes, locate(args.store).checkpoints.parent / "demo" / "comparison.png")

    console.rule(f"sweep: sweeps/mnist5k.yaml, {args.trials} trials")
    sweep = Sweep.from_yaml(find_config("sweeps/mnist5k.yaml"), store=args.store)
    result = sweep.run(trials=args.trials)

    console.print(_table(outcomes))
    console.print(f"picture: {picture}", soft_wrap=True, highlight=False)
    console.print(f"all of it took {time.perf_counter() - began:.0f} s\n")
    print_result(result, sweep.spec, args.store)
    return result.exit_code


def _train(name: str, configs: list[str], epochs: int, store: str | None) -> Outcome:
    from ds_lightning.training import build, resolve

    tracker = {"experiment": "demo", "run_name": name, "store": store}
    overrides: dict[str, Any] = {
        "model": MODEL,
        "trainer.max_epochs": epochs,
        "trainer.val_check_interval": 0.5,
        "trainer.log_every_n_steps": 10,
        "trainer.enable_model_summary": False,
        "trainer.logger": {"class_path": "ds_lightning.tracking.MLflowTracker", "init_args": tracker},
    }
    cli = build(resolve(configs, overrides))
    start = time.perf_counter()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    seconds = time.perf_counter() - start
    logger: Any = cli.trainer.logger
    metrics = logger.experiment.get_metric_history(logger.run_id, "val/accuracy")
    return Outcome(name, sorted((metric.step, metric.value) for metric in metrics), seconds)


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(title="5,000 digits, ResNet-8", title_justify="left")
    table.add_column("run")
    for heading in ("best val accuracy", f"steps to {TARGET:.0%}", "seconds"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        best = max(accuracy for _, accuracy in outcome.history)
        table.add_row(outcome.name, f"{best:.4f}", str(outcome.steps_to_target or "-"), f"{outcome.seconds:.0f}")
    return table


def _draw(outcomes: list[Outcome], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for outcome in outcomes:
        axes.plot(*zip(*outcome.history, strict=True), marker="o", markersize=3, label=outcome.name)
    axes.axhline(TARGET, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="optimizer step", ylabel="validation accuracy", ylim=(0.8, 1.0))
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
