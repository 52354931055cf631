"""The resolved configuration of a run, handed to its logger; and the run held while this process trains it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from ds_lightning.resume import UnfinishedRun, hold


class LogConfig(SaveConfigCallback):
    """Hand the resolved configuration to every logger that takes one (`log_config`)."""

    def __init__(self, *args: Any, resumed: UnfinishedRun | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.resumed = resumed
        self._held: list[FileLock] = []

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the runs that this process was training."""
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of them too: Lightning calls no teardown now."""
        self._let_go()

    def _let_go(self) -> None:
        for lock in self._held:
            lock.release()
        self._held = []

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the configuration; called by Lightning on rank zero."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        if self.resumed is not None:
            # Where it went on is this run's own matter: a new run from this file starts from nothing.
            config["ckpt_path"] = None
            for entry in tracker_entries(config["trainer"]):
                entry["init_args"]["run_id"] = None
        for logger in trainer.loggers:
            log_config = getattr(logger, "log_config", None)
            if log_config is not None:
                self._held.append(hold(Path(str(logger.save_dir), str(logger.name), str(logger.version))))
                log_config(config)


def tracker_entries(trainer: Mapping[str, Any]) -> list[Any]:
    """Return the entries of `trainer.logger` that are an MLflowTracker."""
    entries = trainer.get("logger")
    # jsonargparse's Namespace is no Mapping.
    return [
        entry
        for entry in (entries if isinstance(entries, list) else [entries])
        if entry and hasattr(entry, "get") and str(entry.get("class_path")).rpartition(".")[2] == "MLflowTracker"
    ]
