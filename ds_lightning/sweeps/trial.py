"""One trial: build the configuration, fit, and say how it ended."""

import gc
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ds_lightning.callbacks import ExactResume
from ds_lightning.errors import ConfigError, Preempted
from ds_lightning.sweeps.checkpoints import TrialCheckpoint, find_usable
from ds_lightning.sweeps.history import MetricHistory
from ds_lightning.sweeps.observer import MetricNotLogged, ObjectiveObserver, Pruned
from ds_lightning.sweeps.task import TrialOutcome, TrialTask
from ds_lightning.tracking import MLflowTracker
from ds_lightning.training import build, one_line, resolve

TRACKER = "ds_lightning.tracking.MLflowTracker"
_STATUS: dict[str, Literal["FINISHED", "KILLED", "FAILED"]] = {
    "COMPLETE": "FINISHED",
    "PRUNED": "KILLED",
    "FAIL": "FAILED",
}
# Lightning announces hardware, seed and limits at each fit: said once a trial, it hides what matters.
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")


def trial_config(
    configs: tuple[str, ...], folder: str | Path | None, overrides: Mapping[str, Any], params: Mapping[str, Any]
) -> dict[str, Any]:
    """Resolve the base with a trial's values.

    Raises:
        ConfigError: on an unknown key or a value that does not fit.
    """
    both = {**overrides, **params}
    # Whole groups come before the keys inside them, whichever of the two named them.
    ordered = dict(sorted(both.items(), key=lambda item: item[0].count(".")))
    return resolve(configs, ordered, Path(folder) if folder else None)


def check_trainer(config: Mapping[str, Any]) -> None:
    """Refuse what can't run as a trial.

    Raises:
        ConfigError: for more than one device or node (every rank would ask for trials of its own), and for
            `fast_dev_run` (which logs nothing).
    """
    trainer = config["trainer"]
    devices = trainer.get("devices") or "auto"
    count = len(devices) if isinstance(devices, list) else devices
    if str(count) not in ("1", "auto") or (trainer.get("num_nodes") or 1) != 1:
        raise ConfigError(
            f"a trial runs on one device, got trainer.devices {devices!r} and num_nodes "
            f"{trainer.get('num_nodes')!r}: with DDP inside a trial each rank would run trials of its own and spoil "
            "the study; set trainer.devices: 1 and use --workers for several devices"
        )
    if trainer.get("fast_dev_run"):
        raise ConfigError(
            "trainer.fast_dev_run logs no metric to search by; use max_epochs: 1 and limit_train_batches instead"
        )


def run_trial(task: TrialTask, report: Callable[[int, float], bool]) -> TrialOutcome:
    """Run one trial to its end, whatever that is.

    Args:
        task: what to run.
        report: called with step and objective once a validation; returns whether to prune.

    Returns:
        The outcome. Only an interrupt outside of training is raised.
    """
    trackers: list[MLflowTracker] = []
    # What is there before the trial stays: so the collection after it looks at the trial's objects alone.
    gc.freeze()
    try:
        with _quiet_lightning():
            outcome = TrialOutcome("COMPLETE", _fit(task, report, trackers))
    except Pruned as pruned:
        outcome = TrialOutcome("PRUNED", [pruned.value])
    except (KeyboardInterrupt, SystemExit) as error:
        outcome = _failed(error, interrupted=_is_interrupt(error))
    except Exception as error:
        # Whatever a user's module, data or library raises ends this trial and not the study.
        outcome = _failed(error)
    _free_memory()
    return _closed(trackers[0], outcome) if trackers else outcome


def _fit(task: TrialTask, report: Callable[[int, float], bool], trackers: list[MLflowTracker]) -> list[float]:
    """Fit and return the objective's values; a function of its own, so that the model goes when it returns."""
    found = find_usable(task.resume_from)
    cli = build(_prepared(task, found[1] if found else None))
    trainer: Trainer = cli.trainer
    if trainer.world_size > 1:
        check_trainer({"trainer": {"devices": trainer.world_size}})
    assert isinstance(trainer.logger, MLflowTracker)
    trackers.append(trainer.logger)
    observer = ObjectiveObserver(task.objectives, report)
    trainer.callbacks.append(observer)  # type: ignore[attr-defined]
    if task.checkpoints is not None:
        _save_now_and_then(trainer, trainer.logger, Path(task.checkpoints), task.checkpoint_seconds)
    trainer.logger.log_hyperparams(dict(task.params))
    trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=found[0] if found else None)
    if not observer.history:
        observer.refuse(trainer)
    return observer.values()


def _save_now_and_then(trainer: Trainer, tracker: MLflowTracker, folder: Path, seconds: float) -> None:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, ExactResume) for callback in callbacks):
        callbacks.insert(0, ExactResume())
    # The checkpoint comes last: it has to hold what the others have seen.
    callbacks += [MetricHistory(tracker), TrialCheckpoint(folder, seconds)]


def _prepared(task: TrialTask, resumed_from: int | None = None) -> dict[str, Any]:
    config = trial_config(task.configs, task.folder, task.overrides, task.params)
    check_trainer(config)
    trainer = config["trainer"]
    if trainer.get("devices") in (None, "auto"):
        trainer["devices"] = 1
    logger = trainer.get("logger")
    own = logger if isinstance(logger, dict) and logger.get("class_path", "").endswith("MLflowTracker") else {}
    trainer["logger"] = {
        "class_path": TRACKER,
        "init_args": {
            **(own.get("init_args") or {}),
            "experiment": task.experiment,
            "run_name": f"trial-{task.number}",
            "store": task.store,
            "run_id": None,
            "parent_run_id": task.parent_run_id,
            "tags": _tags(task, resumed_from),
        },
    }
    # Checkpoints of trials that are thrown away fill the disk; the winner is trained again from best.yaml.
    if trainer.get("enable_checkpointing") is None and not _has_checkpoint(trainer.get("callbacks")):
        trainer["enable_checkpointing"] = False
    if task.quiet or trainer.get("enable_progress_bar") is None:
        trainer["enable_progress_bar"] = False
    if trainer.get("enable_model_summary") is None:
        trainer["enable_model_summary"] = False
    return config


def _tags(task: TrialTask, resumed_from: int | None) -> dict[str, str]:
    tags = {"optuna.study": task.study, "optuna.trial": str(task.number), "optuna.state": "RUNNING"}
    if task.retry_of is not None:
        tags["retry_of"] = str(task.retry_of)
    if resumed_from is not None:
        tags["resumed_from_step"] = str(resumed_from)
    return tags


def _has_checkpoint(callbacks: Any) -> bool:
    entries = callbacks if isinstance(callbacks, list) else [callbacks]
    return any("Checkpoint" in entry.get("class_path", "") for entry in entries if isinstance(entry, dict))


def _failed(error: BaseException, interrupted: bool = False) -> TrialOutcome:
    words = one_line(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {one_line(error)}"
    return TrialOutcome(
        "FAIL",
        error="interrupted" if interrupted else words[:1000],
        details="".join(traceback.format_exception(error)),
        metric_missing=isinstance(error, MetricNotLogged),
        interrupted=interrupted,
    )


def _is_interrupt(error: BaseException) -> bool:
    """Tell Ctrl-C and SIGTERM, which Lightning turns into SystemExit, from a module that calls sys.exit."""
    if isinstance(error, KeyboardInterrupt | SIGTERMException | Preempted):
        return True
    return isinstance(error.__context__, KeyboardInterrupt)


def _closed(tracker: MLflowTracker | None, outcome: TrialOutcome) -> TrialOutcome:
    if tracker is None:
        return outcome
    tags = {"optuna.state": outcome.state}
    if outcome.error:
        tags["error"] = outcome.error
    # Lightning has told the logger "failed" for a pruned trial; this says what really happened.
    tracker.close(_STATUS[outcome.state], tags)
    return TrialOutcome(**{**asdict(outcome), "run_id": tracker.run_id})


def _free_memory() -> None:
    # Trainer, module and loops refer to each other in a circle.
    gc.collect()
    gc.unfreeze()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
