"""MLflow's side of a sweep: one parent run for the study, one child run for each trial."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from mlflow.tracking.context.registry import resolve_tags

from ds_lightning.tracking.params import MAX_PARAM_LENGTH, clean_name, flatten
from ds_lightning.tracking.store import Store, connect, experiment_id


class StudyRuns:
    """The MLflow runs of one study.

    Once the parent run is open, a store that stops answering is a warning: the study itself is in Optuna's
    storage and goes on.

    Args:
        store: where runs live.
        experiment: the experiment's name, created when it isn't there.
        study: the study's name.
    """

    def __init__(self, store: Store, experiment: str, study: str) -> None:
        self.study = study
        self._experiment_id = experiment_id(store, experiment)
        self._client = connect(store)
        self.parent_id = ""

    def open(self, tags: Mapping[str, str]) -> str:
        """Create the parent run, or set the one that the study has to RUNNING again; returns its id."""
        found = self._search(f"tags.`optuna.sweep` = '{self.study}'")
        if found:
            self.parent_id = found[0]
            self._client.update_run(self.parent_id, status="RUNNING")
        else:
            self.parent_id = self._create(self.study, {**tags, "optuna.sweep": self.study})
        return self.parent_id

    def child(self, number: int) -> str | None:
        """Return the id of a trial's run, None when it has none."""
        found = self._children(number)
        return found[0] if found else None

    def _children(self, number: int) -> list[str]:
        mine = f"tags.`optuna.trial` = '{number}' and tags.`mlflow.parentRunId` = '{self.parent_id}'"
        return sorted(self._search(mine))

    def fail(
        self,
        number: int,
        params: Mapping[str, Any],
        error: str,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str | None:
        """Close a trial's run as FAILED, creating it when there is none.

        Args:
            number: the trial's number.
            params: dotted key -> value.
            error: one line.
            run_id: the run, where it is known.
            tags: tags of the run, where it has to be created.

        Returns:
            The run's id; None when the store does not answer.
        """
        with _harmless(f"the end of trial {number}"):
            run_id = run_id or self.child(number)
            if run_id is None:
                own = {"mlflow.parentRunId": self.parent_id, "optuna.trial": str(number)}
                self._create(f"trial-{number}", {**(tags or {}), **own})
                # Another sweep may have done the same at this moment: both keep the same one.
                run_id, *others = self._children(number)
                for other in others:
                    self._client.delete_run(other)
            # Writing the same value again is allowed.
            for key, value in flatten(params).items():
                self._client.log_param(run_id, clean_name(key), str(value)[:MAX_PARAM_LENGTH])
            self._client.set_tag(run_id, "optuna.state", "FAIL")
            self._client.set_tag(run_id, "error", error)
            self._client.set_terminated(run_id, "FAILED")
            return run_id
        return None

    def text(self, content: str, path: str, run_id: str | None = None) -> None:
        """Keep a text as an artifact of a run, by default the parent's."""
        with _harmless(path):
            self._client.log_text(run_id or self.parent_id, content, path)

    def file(self, path: Path) -> None:
        """Keep a file as an artifact of the parent run."""
        with _harmless(path.name):
            self._client.log_artifact(self.parent_id, str(path))

    def picture(self, figure: Figure, name: str) -> None:
        """Keep a figure as `pictures/<name>.png` of the parent run."""
        with _harmless(name):
            self._client.log_figure(self.parent_id, figure, f"pictures/{name}.png")

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics of the parent run, but not what it has at that step."""
        with _harmless("the sweep's metrics"):
            for key, value in values.items():
                if any(point.step == step for point in self._client.get_metric_history(self.parent_id, key)):
                    continue
                self._client.log_metric(self.parent_id, key, value, step=step)

    def close(self, status: str, tags: Mapping[str, str]) -> None:
        """End the parent run: FINISHED, FAILED or KILLED."""
        with _harmless("the sweep's end"):
            for key, value in tags.items():
                self._client.set_tag(self.parent_id, key, value)
            self._client.set_terminated(self.parent_id, status)

    def _create(self, name: str, tags: Mapping[str, str]) -> str:
        # User and source, which MLflow's table of runs shows.
        every = resolve_tags({**tags, "optuna.study": self.study})
        run = self._client.create_run(self._experiment_id, tags=every, run_name=name)
        return str(run.info.run_id)

    def _search(self, condition: str) -> list[str]:
        runs = self._client.search_runs([self._experiment_id], condition, max_results=10)
        return [run.info.run_id for run in runs]


@contextlib.contextmanager
def _harmless(what: str) -> Iterator[None]:
    """Turn a store that fails into a warning."""
    try:
        yield
    except Exception as error:
        # MLflow, its database driver and the artifact store each have their own exceptions.
        reason = " ".join(str(error).split())[:300]
        warnings.warn(f"{what} not written to MLflow: {reason}", RuntimeWarning, stacklevel=4)
