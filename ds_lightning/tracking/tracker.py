"""The logger: plugs into any Trainer, writes to MLflow from a process of its own."""

import copy
import json
import sys
import uuid
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor, nn

from ds_lightning.errors import ConfigError, Preempted
from ds_lightning.tracking.batches import Row
from ds_lightning.tracking.checkpoints import BestCheckpoint
from ds_lightning.tracking.curves import Curves
from ds_lightning.tracking.dataset import TrainingData
from ds_lightning.tracking.harmless import harmless
from ds_lightning.tracking.metrics import MetricRows
from ds_lightning.tracking.params import clean_name, flatten, plain
from ds_lightning.tracking.provenance import log_provenance
from ds_lightning.tracking.runs import Run, open_run
from ds_lightning.tracking.saved_step import SavedStep
from ds_lightning.tracking.store import Store, locate
from ds_lightning.tracking.system import SystemMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STATUS = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


class MLflowTracker(MLFlowLogger):
    """Log any LightningModule's training to MLflow, without slowing it down or being able to stop it.

    When it acts: the run is created at first use (in `fit`: just before the first epoch). Metrics are written every
    second by a process of their own, shared by all trackers of this process. `finalize`, which Lightning calls at the
    end of `fit`, `validate` and `test` and after an exception, waits until all is written and closes the run; a second
    `fit` opens it again. A server that stops answering costs training nothing: what can't be written by the end goes
    into the store's folder `spool/`, with a warning.

    What it logs: metrics and hyperparameters (dotted: `net.width`); git commit, versions and command line; model
    summary and size; the dataset's name, size and digest; `system/...` every 5 s; learning curves; the best
    checkpoint. Only rank 0 logs. Hyperparameters and artifacts appear about a second after the call.

    Cost: 0.14 ms a step with five metrics, 0.5 s a run; 230 MB for the writer while the run is going.

    Args:
        experiment: name of the MLflow experiment; created when it isn't there.
        run_name: name of the run; MLflow makes one up when None.
        store: folder of the store, or a tracking URI. None: the server in MLFLOW_TRACKING_URI, else `./mlruns`.
        tags: tags of the run.
        run_id: go on with this run instead of a new one; points that it has (key, step, value) are not repeated.
        parent_run_id: show the run as a child of this one.
        log_checkpoint: upload the best checkpoint (the last, when there is no best) at the end.
        system_metrics: log use of CPU, memory, disk, network and GPU.
        prefix: put before metric names, with a `-`.
        flush_timeout: seconds > 0 without any answer after which the end of training stops waiting.

    Raises:
        ConfigError: at first use, when the store can't be reached or the run isn't there.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(logger=MLflowTracker("digits", run_name="small"))
    """

    def __init__(
        self,
        experiment: str = "ds_lightning",
        run_name: str | None = None,
        store: str | Path | None = None,
        tags: dict[str, str] | None = None,
        run_id: str | None = None,
        parent_run_id: str | None = None,
        log_checkpoint: bool = True,
        system_metrics: bool = True,
        prefix: str = "",
        flush_timeout: float = 10.0,
    ) -> None:
        # MLFlowLogger's own constructor opens the store, and races with other processes for its tables.
        Logger.__init__(self)
        if not experiment:
            raise ConfigError("experiment is empty; expected a name")
        if not flush_timeout > 0:
            raise ConfigError(f"flush_timeout is {flush_timeout}; expected seconds > 0")
        self.tags: dict[str, str] = dict(tags or {})
        if parent_run_id is not None:
            self.tags["mlflow.parentRunId"] = parent_run_id
        self._experiment_name = experiment
        self._run_name = run_name
        self._run_id = run_id
        self._log_checkpoint = log_checkpoint
        self._system_metrics = system_metrics
        self._flush_timeout = flush_timeout
        self._place = store
        self._opened: Run | None = None
        self._experiment_id: str | None = None
        self._copy_id: str | None = None
        self._rows, self._curves = MetricRows(prefix), Curves()
        self._provenance_logged = self._resuming = False
        self._dataset, self._monitor = TrainingData(), SystemMetrics()
        self._best, self._saved = BestCheckpoint(), SavedStep()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """MLflow's client; the run is created when this is first asked for."""
        return self._run.client

    @property
    def save_dir(self) -> str:
        """Folder for checkpoints: the Trainer puts them into `<experiment id>/<run id>/checkpoints` below it."""
        return str(self._where.checkpoints)

    @cached_property
    def _where(self) -> Store:
        return locate(self._place)

    @property
    def _run(self) -> Run:
        if self._opened is None:
            self._opened = open_run(
                self._where, self._experiment_name, self._run_id, self._run_name, self.tags, self._copy_id
            )
            self._run_id, self._experiment_id = self._opened.run_id, self._opened.experiment_id
        return self._opened

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int | None = None) -> None:
        """Take metrics for the run; they are written within about a second.

        Args:
            metrics: numbers or one-element tensors by name; `val/acc@5` becomes `val/acc5`, with a warning.
            step: step of all of them; 0 when None.
        """
        rows = self._rows.rows(metrics, step)
        self.log_rows(rows)
        if self._resuming and rows:
            self._resuming = False
            self._run.tags({"ds_lightning.resumed_at_step": str(rows[0][3])})
        if self._dataset.awaited:
            self._dataset.log(self._run)

    @rank_zero_only
    def log_rows(self, rows: list[Row]) -> None:
        """Log points that are made already; `log_metrics` passes its own through here.

        Args:
            rows: name as MLflow takes it, value, time (ms) and step of each.
        """
        self._run.metrics(rows)
        self._curves.add_rows(rows)
        if self._saved.is_now():
            self.hand_over()

    @rank_zero_only
    def hand_over(self) -> None:
        """Get what was logged out of this process: what a checkpoint is ahead of would be lost for good by a kill.

        It is done after each save of a ModelCheckpoint; DurableCheckpoint does it before, too. It takes a second at
        most, where the writer or the store does not answer.
        """
        if self._opened is not None:
            self._opened.outbox.hand_over()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Log hyperparameters as `a.b.c`, values up to 6,000 characters.

        Args:
            params: nested dictionaries, Namespaces and dataclasses are flattened. MLflow forbids to change a value:
                one that is not the run's goes into the tag `changed.<name>`.
        """
        self._run.params(flatten(params))

    @rank_zero_only
    def log_config(self, config: Mapping[str, Any]) -> None:
        """Log a resolved configuration: whole as `config.yaml`, and flattened as parameters.

        Args:
            config: any nesting of dictionaries and lists. Values of None and classes are not made parameters.
        """
        self._run.artifact("config.yaml", yaml.safe_dump(plain(config), sort_keys=False))
        kept = {k: v for k, v in flatten(config).items() if v is not None and not isinstance(v, type)}
        self._run.params(kept)

    @rank_zero_only
    def log_graph(self, model: nn.Module, input_array: Tensor | None = None) -> None:
        """Log where the run comes from, and start the machine metrics; Lightning calls it before training.

        Args:
            model: the module that is trained.
            input_array: not used: the model is not run.
        """
        run = self._run
        if run.finished:
            run.reopen()
            run.status("RUNNING")
        if self._system_metrics:
            self._monitor.start(run)
        trainer = model._trainer if isinstance(model, LightningModule) else None
        self._saved.watch(trainer)
        self._resuming = run.goes_on and isinstance(trainer, Trainer) and trainer.state.fn == TrainerFn.FITTING
        if not self._provenance_logged:
            self._provenance_logged = True
            log_provenance(run, model)
            if isinstance(trainer, Trainer):
                self._dataset.expect(trainer)
                self._dataset.log(run)

    @rank_zero_only
    def log_figure(self, figure: "Figure", name: str) -> None:
        """Log a matplotlib figure as `pictures/<name>.png`.

        Args:
            figure: the figure; it is not closed.
            name: name without ending.
        """
        from ds_lightning.tracking.pictures import png

        self._run.artifact(f"pictures/{clean_name(name)}.png", png(figure))

    @rank_zero_only
    def log_json(self, content: Any, name: str) -> None:
        """Log plain Python as `<name>.json`.

        Args:
            content: dictionaries, lists, strings, booleans and finite numbers.
            name: name without ending.
        """
        self._run.artifact(f"{clean_name(name)}.json", json.dumps(content, allow_nan=False))

    @rank_zero_only
    def log_confusion_matrix(self, matrix: Tensor, class_names: Sequence[str], stage: str) -> None:
        """Log a confusion matrix as picture and as `confusion_matrix_<stage>.json`.

        Args:
            matrix: (C, C) counts; rows are true classes.
            class_names: C names.
            stage: `val`, `test` and so on.
        """
        from ds_lightning.tracking.pictures import confusion_files

        for path, content in confusion_files(matrix, class_names, clean_name(stage).replace("/", "_")).items():
            self._run.artifact(path, content)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Remember who saves checkpoints, and get the metrics up to this one out of the process."""
        self._best.watch(checkpoint_callback)
        self._saved.note()
        self.hand_over()

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Write everything, upload the best checkpoint and set the run's status.

        Args:
            status: `success` and `finished` become FINISHED, `failed` FAILED, `killed` KILLED. What Lightning calls
                failed because a signal stopped it is KILLED, with the tag `ds_lightning.preempted`.
        """
        if (run := self._opened) is None:
            return
        self._monitor.stop()
        self._dataset.log(run)
        self._curves.log(run)
        path, tags = self._best.find()
        if isinstance(stop := sys.exception(), Preempted):
            status, tags = "killed", {**tags, "ds_lightning.preempted": stop.signal_name}
        run.tags(tags)
        run.finished, final = True, _STATUS.get(status, status.upper())
        if not run.outbox.flush(run.run_id, self._flush_timeout):
            run.status(final)
            run.outbox.give_up(run.run_id)
            return
        if path is not None and self._log_checkpoint:
            with harmless("checkpoint"):
                self._best.upload(run.client, run.run_id, path)
        with harmless("run status"):
            run.client.set_terminated(run.run_id, final)

    @rank_zero_only
    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"], tags: Mapping[str, str] | None = None) -> None:
        """Set a run's final status, also after `finalize`: a pruned trial is KILLED, not FAILED.

        Args:
            status: MLflow's run status.
            tags: more tags, such as `{"optuna.state": "PRUNED"}`.

        Raises:
            ConfigError: when status is another word, or the store can't be reached.
        """
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise ConfigError(f"status is {status!r}; expected FINISHED, FAILED or KILLED")
        if self._run.finished:
            with harmless("run status"):
                self._run.correct(status, tags or {})
        else:
            self._run.tags(tags or {})
            self.finalize(status)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled copy (ddp_spawn) makes the run in another process: the shared id lets this one find it.
        if self._run_id is None and self._copy_id is None:
            self._copy_id = uuid.uuid4().hex
        fresh = {"_dataset": TrainingData(), "_monitor": SystemMetrics(), "_best": BestCheckpoint()}
        return {**self.__dict__, **fresh, "_saved": SavedStep(), "_opened": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "MLflowTracker":
        mine = self._copy_id
        state, self._copy_id = {**self.__getstate__(), "_copy_id": mine}, mine  # a deep copy is for another run
        clone = type(self).__new__(type(self))
        clone.__dict__.update(copy.deepcopy(state, memo))
        return clone
