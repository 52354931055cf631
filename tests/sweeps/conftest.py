import copy

import mlflow
import pytest

from ds_lightning.allowlist import allow_packages

# The user's module of these tests; on a command line it is `--allow sweep_parts`.
allow_packages(["sweep_parts"])

BASE = {
    "model": {"class_path": "sweep_parts.Bowl"},
    "data": {"class_path": "sweep_parts.FourBatches"},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "val_check_interval": 2, "log_every_n_steps": 1},
    "trainer.logger.system_metrics": False,
}
CONTENT = {
    "base": {"overrides": BASE},
    "space": {"model.x": {"type": "float", "low": -5, "high": 5}},
    "objective": {"metric": "val/loss", "direction": "minimize"},
    "sampler": {"name": "random", "seed": 1},
}


@pytest.fixture
def content():
    """A sweep file over `Bowl` with one float; tests change what they are about."""
    return copy.deepcopy(CONTENT)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """One store for all tests: making its tables costs seconds."""
    return tmp_path_factory.mktemp("mlruns")


class Runs:
    """What MLflow says about a study."""

    def __init__(self, store, parent_run_id):
        self.client = mlflow.MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
        self.parent = self.client.get_run(parent_run_id)
        found = self.client.search_runs(
            [self.parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent_run_id}'"
        )
        self.children = {int(run.data.tags["optuna.trial"]): run for run in found}
        assert len(self.children) == len(found)

    def artifacts(self, run, path=None):
        return {entry.path for entry in self.client.list_artifacts(run.info.run_id, path)}


@pytest.fixture
def runs(store):
    return lambda result: Runs(store, result.parent_run_id)
