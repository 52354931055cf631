"""From YAML files to a Trainer, a module and its data: Lightning's CLI with our defaults and one-line errors."""

import copy
import os
from argparse import ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

# They speak of Lightning's use of jsonargparse, about which a user can do nothing.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

# Imported so that their short names (`--model Classifier`) resolve.
import ds_lightning.callbacks.layer_lr
import ds_lightning.datamodules.image_folder
import ds_lightning.datamodules.mnist5k
import ds_lightning.datamodules.torchvision_sets
import ds_lightning.modules.classifier
import ds_lightning.tracking.tracker  # noqa: F401
from ds_lightning.errors import ConfigError
from ds_lightning.presets import find_config

SUBCOMMANDS = ("fit", "validate", "test", "predict")


class LogConfig(SaveConfigCallback):
    """Hand the resolved configuration to every logger that takes one (`log_config`)."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the configuration; called by Lightning on rank zero."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        for logger in trainer.loggers:
            log_config = getattr(logger, "log_config", None)
            if log_config is not None:
                log_config(config)


class TrainingCLI(LightningCLI):
    """LightningCLI over any module and data, logging to MLflow, that raises instead of exiting.

    Args:
        args: command-line words, or a nested configuration; None reads `sys.argv`.
        run: whether to run the subcommand in `args`; when False there are no subcommands.

    Raises:
        ConfigError: when the configuration does not parse; one line.
    """

    def __init__(self, args: list[str] | dict[str, Any] | None = None, *, run: bool = True) -> None:
        quiet = {"exit_on_error": False}
        super().__init__(
            LightningModule,
            None,
            subclass_mode_model=True,
            save_config_callback=LogConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={"logger": {"class_path": "ds_lightning.tracking.MLflowTracker"}},
            # Runs that are compared should differ in what was changed, not in the seed.
            seed_everything_default=0,
            parser_kwargs={**quiet, **(dict.fromkeys(SUBCOMMANDS, quiet) if run else {})},
            run=run,
            args=args,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse words or a nested dictionary; `--config` also finds the shipped presets."""
        try:
            if isinstance(args, Mapping):
                self.config = parser.parse_object(dict(args))
            else:
                self.config = parser.parse_args(with_found_configs(args) if args is not None else None)
        except ArgumentError as error:
            raise ConfigError(one_line(error)) from error


class _Resolver(TrainingCLI):
    """Parses and stops there."""

    def _set_seed(self) -> None: ...

    def instantiate_classes(self) -> None: ...


def with_found_configs(words: Iterable[str]) -> list[str]:
    """Replace the value of each `--config` (or `-c`) by the path of the file it names."""
    found: list[str] = []
    value_next = False
    for word in words:
        if value_next:
            word, value_next = str(find_config(word)), False
        elif word in ("--config", "-c"):
            value_next = True
        elif word.startswith("--config="):
            word = f"--config={find_config(word.removeprefix('--config='))}"
        found.append(word)
    return found


def one_line(error: BaseException) -> str:
    """Put an error's text on one line."""
    return " ".join(str(error).split())


def set_key(config: Any, dotted: str, value: Any) -> None:
    """Set a dotted key in a nested configuration, in place.

    Args:
        config: nested dictionaries and lists.
        dotted: such as `trainer.callbacks.0.init_args.every`; a number is a position in a list, and
            `init_args` may be left out after a class (`model.lr` for `model.init_args.lr`).
        value: the new value.

    Raises:
        ConfigError: when the path leads through something that isn't there.
    """
    node = config
    *parents, last = dotted.split(".")
    for depth, part in enumerate([*parents, last]):
        if isinstance(node, dict) and "class_path" in node and part not in ("class_path", "init_args", "dict_kwargs"):
            node = node.setdefault("init_args", {})
        where = ".".join([*parents, last][:depth]) or "the configuration"
        key: Any = part
        if isinstance(node, list):
            if not (part.isdigit() and int(part) < len(node)):
                raise ConfigError(f"key {dotted!r}: {where} is a list of {len(node)}; {part!r} is no position in it")
            key = int(part)
        elif not isinstance(node, dict):
            raise ConfigError(f"key {dotted!r}: {where} is {node!r}, which has no key {part!r}")
        if depth == len(parents):
            node[key] = value
        elif isinstance(node, dict) and key not in node:
            raise ConfigError(f"key {dotted!r}: {where} has no key {part!r}; it has {', '.join(map(str, node))}")
        else:
            node = node[key]


def resolve(
    configs: Sequence[str | Path], overrides: Mapping[str, Any] | None = None, folder: Path | None = None
) -> dict[str, Any]:
    """Merge configuration files into one complete, validated, nested configuration.

    Args:
        configs: YAML files in order; later ones win, `callbacks+:` appends; preset names are found too.
        overrides: dotted key -> value, set after the files.
        folder: where relative paths are looked for first.

    Returns:
        The configuration with every default filled in, as `build` takes it.

    Raises:
        ConfigError: on an unknown key or a value that does not fit; one line.
    """
    words = [f"--config={find_config(config, folder)}" for config in configs]
    overrides = overrides or {}
    # Whole groups come first: without a module there is nothing for the keys inside it to land in.
    whole = {key: value for key, value in overrides.items() if "." not in key}
    for key, value in whole.items():
        words.append(f"--{key}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}")
    config = _dump(_Resolver(words, run=False))
    inner = {key: value for key, value in overrides.items() if key not in whole}
    if not inner:
        return config
    for key, value in inner.items():
        set_key(config, key, copy.deepcopy(value))
    return _dump(_Resolver(config, run=False))


def _dump(cli: TrainingCLI) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(cli.parser.dump(cli.config, skip_unset=False))
    config.pop("config", None)
    return config


def build(config: Mapping[str, Any]) -> TrainingCLI:
    """Instantiate a resolved configuration without running it.

    Returns:
        The CLI: `.trainer`, `.model`, `.datamodule` (None when the configuration has no data).
    """
    return TrainingCLI(copy.deepcopy(dict(config)), run=False)


def run_training_command(argv: list[str]) -> int:
    """Run `fit`, `validate`, `test` or `predict` with the rest of the words as Lightning's CLI takes them."""
    TrainingCLI(argv)
    return 0
