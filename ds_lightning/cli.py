"""The command line. Nothing heavy is imported before the command is known: `--help` answers at once."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ds_lightning.errors import ConfigError, Preempted

TRACEBACK_VARIABLE = "DS_LIGHTNING_TRACEBACK"


class _Command(NamedTuple):
    summary: str
    help: str | None  # None: the command answers --help itself
    run: Callable[[list[str]], int]


def _training(name: str) -> Callable[[list[str]], int]:
    def run(argv: list[str]) -> int:
        from ds_lightning.training_command import run_training_command

        words = ["--help" if word == "--help-all" else word for word in argv]
        return run_training_command([name, *words])

    return run


def _sweep(argv: list[str]) -> int:
    from ds_lightning.sweeps.command import run_sweep_command

    return run_sweep_command(argv)


def _ui(argv: list[str]) -> int:
    from ds_lightning.tracking.ui import run_ui_command

    return run_ui_command(argv)


def _tracking(argv: list[str]) -> int:
    from ds_lightning.tracking.command import run_tracking_command

    return run_tracking_command(argv)


def _presets(argv: list[str]) -> int:
    from ds_lightning.presets import find_config, list_presets, presets_root

    if not argv:
        for name in list_presets():
            first = (presets_root() / name).read_text().splitlines()[0]
            print(f"{name:36}{first.removeprefix('#').strip() if first.startswith('#') else ''}".rstrip())
        return 0
    for name in argv:
        print(find_config(name).read_text(), end="")
    return 0


def _inspect(argv: list[str]) -> int:
    from ds_lightning.inspection import run_inspect_command

    return run_inspect_command(argv)


def _demo(argv: list[str]) -> int:
    from ds_lightning.demo import run_demo_command

    return run_demo_command(argv)


def _training_help(name: str, does: str, example: str, more: str = "") -> str:
    return f"""usage: ds-lightning {name} [--config FILE ...] [--model CLASS] [--data CLASS] [--trainer.OPTION V ...]

{does}

  --config FILE        a YAML file; several add up, later ones win. Shipped presets are found by name
                       (`ds-lightning presets`); `callbacks+:` in a file appends to the list.
  --model CLASS        a LightningModule: one of ours by its short name, or yours as package.Class
  --data CLASS         a LightningDataModule, likewise
  --model.OPTION V     an argument of the class; --data.OPTION and --trainer.OPTION likewise
  --ckpt_path FILE     start from a checkpoint
  --allow PACKAGE      let the configuration name classes of this package too (yours); may be repeated
{more}  --seed_everything N  seed of everything random (default 0)
  --print_config       print the composed configuration and stop

  --model.help CLASS   the options of a class (--data.help, --trainer.help too)
  --help-all           every option there is

Example:
  {example}
"""


_EXAMPLE_FIT = (
    "ds-lightning fit --model Classifier --data MNIST5k --config callbacks/layer_lr.yaml --trainer.max_epochs 5"
)
_RESUME = """  --resume [RUN_ID]    go on with the experiment's newest run that did not finish, or with this one, from
                       its newest whole checkpoint; its own configuration is used if no --config is given
  --safeguards false   add no callback by itself: by default ExactResume, DurableCheckpoint and Preemption
"""
_EXAMPLE_OTHER = "ds-lightning {} --config config.yaml --ckpt_path best.ckpt"

_COMMANDS: dict[str, _Command] = {
    "fit": _Command(
        "train a model on data",
        _training_help("fit", "Train, and log everything to MLflow under mlruns/.", _EXAMPLE_FIT, _RESUME),
        _training("fit"),
    ),
    "validate": _Command(
        "measure a checkpoint on the validation data",
        _training_help("validate", "One pass over the validation data.", _EXAMPLE_OTHER.format("validate")),
        _training("validate"),
    ),
    "test": _Command(
        "measure a checkpoint on the test data",
        _training_help("test", "One pass over the test data.", _EXAMPLE_OTHER.format("test")),
        _training("test"),
    ),
    "predict": _Command(
        "predict with a checkpoint",
        _training_help(
            "predict",
            "One pass over the prediction data; a callback such as BasePredictionWriter keeps the results.",
            _EXAMPLE_OTHER.format("predict"),
        ),
        _training("predict"),
    ),
    "sweep": _Command("search hyperparameters with Optuna from a YAML file", None, _sweep),
    "ui": _Command("open the MLflow UI on the runs under mlruns/", None, _ui),
    "tracking": _Command("send to MLflow what an outage of its server left on disk", None, _tracking),
    "presets": _Command(
        "list the shipped YAML files, or print some",
        """usage: ds-lightning presets [NAME ...]

Without a name, list the shipped presets; with names, print them, to be copied and edited.

Example:
  ds-lightning presets callbacks/layer_lr.yaml > my_layer_lr.yaml
""",
        _presets,
    ),
    "inspect": _Command("print what is in a checkpoint, without running any of it", None, _inspect),
    "demo": _Command("train, sweep and compare on 5,000 real digits", None, _demo),
}


def _help() -> str:
    commands = "\n".join(f"  {name:10}{command.summary}" for name, command in _COMMANDS.items())
    return f"""usage: ds-lightning COMMAND [OPTION ...]

Training modes, callbacks, data and sweeps for PyTorch Lightning, tracked in MLflow.

{commands}

`ds-lightning COMMAND --help` says more. {TRACEBACK_VARIABLE}=1 shows the traceback of an error.

Example:
  {_EXAMPLE_FIT}
"""


def _message(error: BaseException) -> str:
    """Say an error in one line."""
    text = str(error)
    if "Original Traceback" in text:
        # A DataLoader worker wraps the error in its traceback; the last line is the error itself.
        last = next(line for line in reversed(text.splitlines()) if line.strip())
        return last.removeprefix("ds_lightning.errors.").strip()
    line = " ".join(text.split()) or "no message"
    return line if isinstance(error, ConfigError) else f"{type(error).__name__}: {line}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code (0 done, 1 failed, 2 wrong input, 130 stopped by SIGINT, 143 by SIGTERM)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_help(), end="")
        return 0 if words else 2
    if words[0] == "--version":
        from ds_lightning import __version__

        print(__version__)
        return 0
    name, rest = words[0], words[1:]
    command = _COMMANDS.get(name)
    if command is None:
        print(f"ds-lightning: {name!r} is no command; expected one of {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    if command.help is not None and rest[:1] in (["-h"], ["--help"]):
        print(command.help, end="")
        return 0
    try:
        return command.run(rest)
    except SystemExit as stop:  # argparse's and jsonargparse's way of being done
        if isinstance(stop, Preempted):
            print(
                f"ds-lightning {name}: stopped by {stop.signal_name}; --resume goes on",
                file=sys.stderr,
            )
        elif isinstance(stop.__context__, KeyboardInterrupt):
            # Lightning's way of passing on Ctrl-C, with an exit code of 1.
            print(f"ds-lightning {name}: interrupted", file=sys.stderr)
            return 130
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print(f"ds-lightning {name}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"ds-lightning {name}: {_message(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
