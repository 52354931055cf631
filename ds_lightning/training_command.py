"""`ds-lightning fit`, `validate`, `test` and `predict`: what they add to Lightning's CLI."""

from argparse import ArgumentError
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from ds_lightning.checkpoint_reader import read_outline
from ds_lightning.errors import ConfigError
from ds_lightning.logged_config import tracker_entries
from ds_lightning.parser_messages import plain_message
from ds_lightning.resume import UnfinishedRun, find_unfinished
from ds_lightning.training import SAFEGUARDS, Resolver, TrainingCLI, dump


class CheckpointCLI(TrainingCLI):
    """Gives the module the options that are in the checkpoint, also in one that a Python script has saved."""

    def _parse_ckpt_path(self) -> None:
        options = self.config[self.config["subcommand"]]
        path = options.get("ckpt_path")
        saved = read_outline(path).content if path and Path(path).is_file() else None
        given = saved.get("hyper_parameters") if isinstance(saved, dict) else None
        try:
            # A script saves the options without the class, and Lightning would take it for the base class.
            if given and "_class_path" not in given:
                entry = {"class_path": options["model"]["class_path"], "init_args": dict(given)}
                self.config = self.parser.parse_object({self.config["subcommand"]: {"model": entry}}, self.config)
            else:
                super()._parse_ckpt_path()
        except ArgumentError as error:
            raise ConfigError(
                f"the options in checkpoint {path} don't fit: {plain_message(error)}; give --model the class that it "
                "was saved from"
            ) from error


class _CallbackResolver(Resolver):
    """Parses the words for what they say about callbacks, about which a checkpoint says nothing."""

    def _parse_ckpt_path(self) -> None: ...


def run_training_command(argv: list[str]) -> int:
    """Run `fit`, `validate`, `test` or `predict` with the rest of the words as Lightning's CLI takes them."""
    if argv[0] != "fit":
        CheckpointCLI(argv)
        return 0
    words, resumes, run_id = _without_resume(argv[1:])
    resumed = _find_resumed(words, run_id) if resumes else None
    with TemporaryDirectory() as folder:
        if resumed is not None and not _has_config(words):
            if resumed.config is None:
                raise ConfigError(f"run {resumed.run_id} has no config.yaml; give its configuration with --config FILE")
            path = Path(folder, "config.yaml")
            path.write_text(yaml.safe_dump(resumed.config, sort_keys=False))
            words = [f"--config={path}", *words]
        CheckpointCLI(["fit", *words, *_safeguards(words)], resumed=resumed)
    return 0


def _without_resume(words: list[str]) -> tuple[list[str], bool, str | None]:
    """Take `--resume`, `--resume ID` and `--resume=ID` out of the words."""
    for position, word in enumerate(words):
        if word == "--resume":
            after = words[position + 1 : position + 2]
            run_id = after[0] if after and not after[0].startswith("-") else None
            return words[:position] + words[position + 1 + (run_id is not None) :], True, run_id
        if word.startswith("--resume="):
            return words[:position] + words[position + 1 :], True, word.removeprefix("--resume=") or None
    return words, False, None


def _has_config(words: Iterable[str]) -> bool:
    return any(word in ("--config", "-c") or word.startswith("--config=") for word in words)


def _find_resumed(words: list[str], run_id: str | None) -> UnfinishedRun:
    if any(word.startswith("--ckpt_path") for word in words):
        raise ConfigError("--resume and --ckpt_path say two things; leave one out")
    if _has_config(words):
        known = words
    else:
        # Only where to look is needed: the rest is in the run that is looked for.
        keep = [
            index
            for index, word in enumerate(words)
            if word.startswith("--trainer.logger")
            or (index and words[index - 1].startswith("--trainer.logger") and "=" not in words[index - 1])
        ]
        known = ["--model=Classifier", *(words[index] for index in keep)]
    trainer = dump(Resolver(known, run=False))["trainer"]
    entries = tracker_entries(trainer)
    if not entries:
        raise ConfigError("--resume looks for the run in MLflow; trainer.logger has no MLflowTracker")
    options = entries[0].get("init_args") or {}
    dirs = [entry["init_args"].get("dirpath") for entry in trainer.get("callbacks") or [] if "init_args" in entry]
    folders = [Path(folder) for folder in dirs if folder]
    return find_unfinished(options.get("experiment", "ds_lightning"), options.get("store"), run_id, folders)


def _safeguards(words: list[str]) -> list[str]:
    """Return the words that add the callbacks which keep a run from being lost, those that are missing."""
    asks = ("--print_config", "--help", "-h")
    if any(word.startswith("--") and ".help" in word for word in words) or any(word in words for word in asks[1:]):
        return []
    cli = _CallbackResolver(["fit", *(word for word in words if not word.startswith(asks[0]))])
    config = yaml.safe_load(cli.parser.dump(cli.config, skip_unset=False))["fit"]
    if not config["safeguards"] or config["trainer"].get("fast_dev_run"):
        return []
    callbacks = config["trainer"].get("callbacks") or []
    there = {entry["class_path"].rpartition(".")[2] for entry in callbacks}
    # One that the user chose decides what is saved; without any there would be Lightning's own.
    if config["trainer"].get("enable_checkpointing") is False or any(name.endswith("Checkpoint") for name in there):
        there.add("DurableCheckpoint")
    # It refuses to share the writing of files with another one.
    if "CheckpointIO" in str(config["trainer"].get("plugins")):
        there.add("DurableCheckpoint")
    return [f"--trainer.callbacks+={path}" for path in SAFEGUARDS if path.rpartition(".")[2] not in there]
