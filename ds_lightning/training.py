"""From YAML files to a Trainer, a module and its data: Lightning's CLI with our defaults and one-line errors."""

import copy
import os
import sys
from argparse import ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

# They speak of Lightning's use of jsonargparse, about which a user can do nothing.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

# Imported so that their short names (`--model Classifier`) resolve.
import ds_lightning.callbacks.attention_maps
import ds_lightning.callbacks.continual_metrics
import ds_lightning.callbacks.durable_checkpoint
import ds_lightning.callbacks.embedding_map
import ds_lightning.callbacks.episode_pictures
import ds_lightning.callbacks.ewc
import ds_lightning.callbacks.exact_resume
import ds_lightning.callbacks.finite
import ds_lightning.callbacks.layer_lr
import ds_lightning.callbacks.linear_probe
import ds_lightning.callbacks.preemption
import ds_lightning.callbacks.pruning
import ds_lightning.datamodules.contrastive_views
import ds_lightning.datamodules.episodes
import ds_lightning.datamodules.image_folder
import ds_lightning.datamodules.mnist5k
import ds_lightning.datamodules.multimodal
import ds_lightning.datamodules.pairs
import ds_lightning.datamodules.sinusoids
import ds_lightning.datamodules.tasks
import ds_lightning.datamodules.text_files
import ds_lightning.datamodules.torchvision_sets
import ds_lightning.modules.classifier
import ds_lightning.modules.contrastive
import ds_lightning.modules.fusion
import ds_lightning.modules.meta_learning
import ds_lightning.modules.prototypical
import ds_lightning.modules.transfer
import ds_lightning.tracking.tracker
from ds_lightning.allowlist import allow_packages, one_line_refusals, refusal, split_allowed
from ds_lightning.checkpoint_check import does_not_fit
from ds_lightning.errors import ConfigError
from ds_lightning.logged_config import LogConfig, tracker_entries
from ds_lightning.optimizer_count import OptimizerCount
from ds_lightning.parsed_checks import check_parsed
from ds_lightning.parser_messages import plain_message
from ds_lightning.presets import find_config
from ds_lightning.resume import UnfinishedRun
from ds_lightning.yaml_check import check_yaml

SUBCOMMANDS = ("fit", "validate", "test", "predict")
# What `ds-lightning fit` adds to the callbacks, in this order, unless they are there or `safeguards` is false.
SAFEGUARDS = tuple(
    f"ds_lightning.callbacks.{name}"
    for name in ("ExactResume", "DurableCheckpoint", "Preemption")
    if name in ds_lightning.callbacks.__all__
)


class TrainingCLI(LightningCLI):
    """LightningCLI over any module and data, logging to MLflow, that raises instead of exiting.

    Args:
        args: command-line words, or a nested configuration; None reads `sys.argv`.
        run: whether to run the subcommand in `args`; when False there are no subcommands.
        resumed: the run to go on with; only for `fit`.

    Raises:
        ConfigError: when the configuration does not parse; one line.
    """

    def __init__(
        self,
        args: list[str] | dict[str, Any] | None = None,
        *,
        run: bool = True,
        resumed: UnfinishedRun | None = None,
    ) -> None:
        quiet = {"exit_on_error": False}
        self._resumed = resumed
        super().__init__(
            LightningModule,
            None,
            subclass_mode_model=True,
            save_config_callback=LogConfig,
            save_config_kwargs={"save_to_log_dir": False, "resumed": resumed},
            trainer_defaults={"logger": {"class_path": "ds_lightning.tracking.MLflowTracker"}},
            # Runs that are compared should differ in what was changed, not in the seed.
            seed_everything_default=0,
            parser_kwargs={**quiet, **(dict.fromkeys(SUBCOMMANDS, quiet) if run else {})},
            run=run,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our own options."""
        parser.add_argument(
            "--safeguards",
            type=bool,
            default=True,
            help=f"whether `ds-lightning fit` adds {', '.join(path.rpartition('.')[2] for path in SAFEGUARDS)} "
            "to the callbacks, those that are not there.",
        )

    def before_instantiate_classes(self) -> None:
        """Point the logger and the Trainer at the run that is resumed."""
        if self._resumed is None:
            return
        config = self.config[self.subcommand]
        self._resumed.check_goes_further(config.trainer.max_epochs)
        entries = tracker_entries(config.trainer)
        if len(entries) != 1:
            raise ConfigError(f"--resume needs one MLflowTracker in trainer.logger; got {len(entries)}")
        entries[0]["init_args"]["run_id"] = self._resumed.run_id
        # Not before: Lightning would put the checkpoint's hyperparameters in the place of the configuration's.
        config.ckpt_path = str(self._resumed.checkpoint)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse words or a nested dictionary; `--config` also finds the shipped presets."""
        words: list[str] | None = None
        packages: list[str] = []
        if not isinstance(args, Mapping):
            words, packages = split_allowed(sys.argv[1:] if args is None else args)
        allow_packages(packages)
        try:
            if isinstance(args, Mapping):
                self.config = parser.parse_object(dict(args))
            else:
                self.config = parser.parse_args(with_found_configs(words or []))
        except ArgumentError as error:
            raise ConfigError(refusal(error) or plain_message(error)) from error
        # Lightning reads the checkpoint's hyperparameters next.
        check_parsed(self.config)

    def instantiate_classes(self) -> None:
        """Instantiate; a class that was hidden in a value of any type is refused here."""
        with one_line_refusals():
            try:
                super().instantiate_classes()
            except (TypeError, ValueError, MisconfigurationException) as error:
                if isinstance(error, ConfigError) or refusal(error):
                    raise
                raise ConfigError(plain_message(error)) from error

    def before_fit(self) -> None:
        """Watch what is loaded; Lightning calls this before the fit."""
        if self.config["fit"].get("ckpt_path"):
            self.trainer.callbacks.insert(0, OptimizerCount())  # type: ignore[attr-defined]

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            path = self.config[subcommand].get("ckpt_path")
            found = does_not_fit(path, error) if path else None
            if found is None:
                raise
            raise found from error


class Resolver(TrainingCLI):
    """Parse a configuration, and stop there."""

    def _set_seed(self) -> None: ...

    def instantiate_classes(self) -> None:
        """Make nothing."""

    def _run_subcommand(self, subcommand: str) -> None: ...


def with_found_configs(words: Iterable[str]) -> list[str]:
    """Replace the value of each `--config` (or `-c`) by the path of the file it names."""
    found: list[str] = []
    value_next = False
    for word in words:
        if value_next:
            word, value_next = _checked(word), False
        elif word in ("--config", "-c"):
            value_next = True
        elif word.startswith("--config="):
            word = f"--config={_checked(word.removeprefix('--config='))}"
        found.append(word)
    return found


def _checked(name: str) -> str:
    path = find_config(name)
    check_yaml(path)
    return str(path)


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
    config = dump(Resolver(words, run=False))
    inner = {key: value for key, value in overrides.items() if key not in whole}
    if not inner:
        return config
    for key, value in inner.items():
        set_key(config, key, copy.deepcopy(value))
    return dump(Resolver(config, run=False))


def dump(cli: TrainingCLI) -> dict[str, Any]:
    """Return the configuration as nested plain Python."""
    config: dict[str, Any] = yaml.safe_load(cli.parser.dump(cli.config, skip_unset=False))
    config.pop("config", None)
    return config


def build(config: Mapping[str, Any]) -> TrainingCLI:
    """Instantiate a resolved configuration without running it.

    Returns:
        The CLI: `.trainer`, `.model`, `.datamodule` (None when the configuration has no data).
    """
    return TrainingCLI(copy.deepcopy(dict(config)), run=False)
