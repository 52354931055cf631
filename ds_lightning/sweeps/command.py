"""`ds-lightning sweep`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ds_lightning.allowlist import allow_packages
from ds_lightning.presets import find_config

if TYPE_CHECKING:
    from ds_lightning.sweeps.spec import SweepSpec
    from ds_lightning.sweeps.summary import SweepResult

# Columns of a terminal.
_MOST_SHOWN = 5
_EXAMPLE = """\
Example:
  ds-lightning sweep sweeps/mnist5k.yaml --trials 8 --workers 2
"""


def sweep_parser() -> argparse.ArgumentParser:
    """Return the parser of `ds-lightning sweep`; costs no import of torch, Optuna or MLflow."""
    parser = argparse.ArgumentParser(
        prog="ds-lightning sweep",
        description="Search hyperparameters: many short trainings from one YAML file, all of them in MLflow.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="sweep file, or a preset such as sweeps/mnist5k.yaml")
    parser.add_argument("--trials", type=int, metavar="N", help="number of trials (default: as in FILE)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes side by side (1)")
    parser.add_argument("--timeout", type=float, metavar="S", help="begin no trial after S seconds")
    parser.add_argument("--study", metavar="NAME", help="go on with this study")
    parser.add_argument("--storage", metavar="URL", help="the study's: a journal's path, sqlite:/// or postgresql://")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="a package whose classes the files may name too",
    )
    parser.add_argument("--store", metavar="PLACE", help="MLflow store: folder or URI (default: ./mlruns)")
    return parser


def run_sweep_command(argv: Sequence[str]) -> int:
    """Run `ds-lightning sweep` and print the result.

    Args:
        argv: the words after `sweep`.

    Returns:
        0; 1 when no trial was completed, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ConfigError: when the sweep can't work; one line.
    """
    options = sweep_parser().parse_args(argv)
    path = find_config(options.file)
    allow_packages(options.allow)
    from ds_lightning.sweeps.sweep import Sweep

    sweep = Sweep.from_yaml(path, store=options.store, storage=options.storage)
    result = sweep.run(options.trials, options.workers, options.timeout, options.study)
    print_result(result, sweep.spec, options.store)
    if result.exit_code == 1:
        why = f"; the first one: {result.error}" if result.error else ", all were pruned"
        print(f"ds-lightning sweep: no trial was completed{why}", file=sys.stderr)
    return result.exit_code


def print_result(result: "SweepResult", spec: "SweepSpec", store: str | None) -> None:
    """Print the best trials, where their configuration is, and what to do next."""
    from rich.console import Console
    from rich.table import Table

    from ds_lightning.sweeps.progress import short_key, short_value

    # Paths are copied from here: they are not to be folded.
    console = Console(soft_wrap=True, highlight=False)
    states = ", ".join(f"{count} {state.lower()}" for state, count in sorted(result.counts.items()))
    console.print(f"study {result.study}: {states or 'no trials'}", markup=False)
    if not result.best:
        console.print("no trial was completed, so there is no best one")
    else:
        shown = result.best[:_MOST_SHOWN]
        table = Table("trial", *(str(trial.number) for trial in shown))
        for index, objective in enumerate(spec.objectives):
            table.add_row(objective.metric, *(short_value(trial.values[index]) for trial in shown))
        for key in dict.fromkeys(key for trial in shown for key in trial.params):
            values = [short_value(trial.params[key]) if key in trial.params else "" for trial in shown]
            table.add_row(short_key(key), *values)
        console.print(table)
        if len(result.best) > len(shown):
            console.print(f"and {len(result.best) - len(shown)} more on the Pareto front")
        for trial in result.best:
            console.print(f"configuration: {trial.config}", markup=False)
        best = shlex.quote(str(result.best[0].config))
        console.print(f"train it: ds-lightning fit --config {best}", markup=False)
    where = f" --store {shlex.quote(store)}" if store else ""
    console.print(f"compare:  ds-lightning ui{where}", markup=False)
    if result.exit_code:
        console.print(f"go on:    ds-lightning sweep ... --study {result.study}", markup=False)
