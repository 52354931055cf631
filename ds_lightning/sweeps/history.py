"""A trial's metrics in its checkpoint, so that a retry's run has the whole history, each point once."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ds_lightning.tracking import MLflowTracker
from ds_lightning.tracking.outbox import Row


class MetricHistory(Callback):
    """Keep what the logger was given up to a checkpoint, and give it to the run of the fit that goes on from there.

    When it acts: at each call of the logger; at the start of a fit that goes on from a checkpoint. It changes nothing
    in the module or the data. What it logs: on resume, the metrics from before with their steps and times.
    In the checkpoint: three tensors a metric, 24 bytes a point. Limits: what is written to MLflow past the logger, and
    machine metrics (`system/...`), which are the new process's own, are not kept. Cost: a list that grows.

    Args:
        tracker: the trial's logger.
    """

    def __init__(self, tracker: MLflowTracker) -> None:
        self._tracker = tracker
        self._rows: list[Row] = []
        self._loaded: list[Row] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen to the logger: clean names and times are known there alone."""
        log = self._tracker.log_rows

        def log_rows(rows: list[Row]) -> None:
            self._rows.extend(rows)
            log(rows)

        vars(self._tracker)["log_rows"] = log_rows

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the metrics from before the checkpoint."""
        loaded, self._loaded = self._loaded, []
        if loaded:
            self._tracker.log_rows(loaded)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the logger as it was."""
        vars(self._tracker).pop("log_rows", None)

    def state_dict(self) -> dict[str, Any]:
        """Return steps, values and times by metric."""
        by_name: dict[str, list[Row]] = {}
        for row in self._rows:
            by_name.setdefault(row[0], []).append(row)
        return {
            name: {
                "steps": torch.tensor([step for *_, step in rows], dtype=torch.int64),
                "values": torch.tensor([value for _, value, _, _ in rows], dtype=torch.float64),
                "times": torch.tensor([when for _, _, when, _ in rows], dtype=torch.int64),
            }
            for name, rows in by_name.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the metrics until the fit starts."""
        self._loaded = [
            (name, value, when, step)
            for name, kept in state_dict.items()
            for value, when, step in zip(
                kept["values"].tolist(), kept["times"].tolist(), kept["steps"].tolist(), strict=True
            )
        ]
