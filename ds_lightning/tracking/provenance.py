"""Where a run comes from: code version, packages, command line, machine and model."""

import importlib.metadata
import json
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_summary.model_summary import ModelSummary
from torch.nn.parameter import is_lazy

from ds_lightning.tracking.harmless import harmless
from ds_lightning.tracking.runs import Run

_PACKAGES = ("ds-lightning", "torch", "lightning", "mlflow", "optuna", "torchmetrics", "numpy")
_GIT_SECONDS = 5.0


def git_tags(folder: Path | None = None) -> dict[str, str]:
    """Return the commit and whether tracked files differ from it; empty outside a git repository.

    Args:
        folder: where to look; the working folder by default.
    """
    commit = _git(["rev-parse", "HEAD"], folder)
    if not commit:
        return {}
    tags = {"mlflow.source.git.commit": commit}
    changes = _git(["status", "--porcelain", "--untracked-files=no"], folder)
    if changes is not None:
        tags["git.dirty"] = "true" if changes else "false"
    return tags


def _git(arguments: list[str], folder: Path | None) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment() -> dict[str, Any]:
    """Return Python, packages, command line and machine."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": cuda,
    }


def model_size(model: torch.nn.Module) -> tuple[int, int]:
    """Count parameters, and trainable ones; those of lazy layers that have no shape yet count as 0."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters() if not is_lazy(p)]
    return sum(size for size, _ in sizes), sum(size for size, trainable in sizes if trainable)


def model_summary(model: LightningModule) -> str:
    """Return Lightning's table of layers, without running the model.

    With an `example_input_array` Lightning would run a forward pass, which draws random numbers and takes
    time; the Trainer's own summary does that already.
    """
    example = model._example_input_array
    model._example_input_array = None
    try:
        with warnings.catch_warnings():
            # Lightning warns of lazy layers here as well as in the Trainer's own summary.
            warnings.simplefilter("ignore")
            return f"{ModelSummary(model, max_depth=2)}\n"
    finally:
        model._example_input_array = example


def log_provenance(run: Run, model: torch.nn.Module) -> None:
    """Log code version, environment, model size and summary to a run.

    Args:
        run: the run.
        model: a LightningModule, or any module (then without the summary).
    """
    with harmless("code version and environment"):
        run.tags(git_tags())
        run.artifact("environment.json", json.dumps(environment(), indent=2) + "\n")
    with harmless("model summary"):
        total, trainable = model_size(model)
        run.params({"model.parameters": total, "model.trainable": trainable})
        if isinstance(model, LightningModule):
            run.artifact("model_summary.txt", model_summary(model))
