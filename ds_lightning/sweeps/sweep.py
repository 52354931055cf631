"""A sweep from its file to its summary."""

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import optuna

from ds_lightning.errors import ConfigError, NoEffectWarning
from ds_lightning.sweeps import retries
from ds_lightning.sweeps.heartbeat import Heartbeat
from ds_lightning.sweeps.ledger import Ledger
from ds_lightning.sweeps.left_overs import close_left_overs
from ds_lightning.sweeps.pool import WorkerPool, run_here
from ds_lightning.sweeps.progress import SweepProgress
from ds_lightning.sweeps.runs import StudyRuns
from ds_lightning.sweeps.signals import Terminated, sigterm_interrupts
from ds_lightning.sweeps.spec import SweepSpec, positive_int, positive_seconds
from ds_lightning.sweeps.study import (
    check_study,
    create_study,
    make_pruner,
    make_sampler,
    mend_journal,
    open_storage,
)
from ds_lightning.sweeps.summary import SweepResult, best_results, count_states, log_summary
from ds_lightning.sweeps.trial import check_trainer, trial_config
from ds_lightning.tracking import Store, default_store
from ds_lightning.tracking.store import locate

# A branch costs about 0.2 s.
_MOST_CHECKED = 64
# Notes in the study: how many trials it is to have, and whether it was not brought to its end.
_TARGET = "target"
_GOING_ON = "going on"
_ENDLESS = "a sweep without end: give `trials` or `timeout`, in the file or on the command line"


class Sweep:
    """A hyperparameter search over any LightningModule, from a YAML file.

    Each trial is a configuration of the base files with some dotted keys changed, trained once. Optuna keeps
    the study, MLflow gets one run for the study and under it one run a trial.

    Args:
        spec: the checked sweep file.
        store: folder of the MLflow store or a tracking URI; None: MLFLOW_TRACKING_URI, else `./mlruns`.

    Example:
        >>> sweep = Sweep.from_yaml("sweeps/mnist5k.yaml")  # doctest: +SKIP
        >>> sweep.run(trials=8, workers=2).best[0].params  # doctest: +SKIP
        {'model.init_args.optimizer.init_args.lr': 0.21, ...}
    """

    def __init__(self, spec: SweepSpec, store: str | Path | None = None) -> None:
        self.spec = spec
        self._place = store
        make_pruner(spec.pruner)
        make_sampler(spec.sampler, spec.space)

    @classmethod
    def from_yaml(cls, path: str | Path, store: str | Path | None = None, storage: str | None = None) -> "Sweep":
        """Read and check a sweep file.

        Args:
            path: the file.
            store: folder of the MLflow store or a tracking URI; None: MLFLOW_TRACKING_URI, else `./mlruns`.
            storage: where Optuna keeps the study; None: as in the file.

        Raises:
            ConfigError: when the file says something that can't work; one line.
        """
        spec = SweepSpec.from_yaml(path)
        return cls(replace(spec, storage=storage) if storage else spec, store)

    def run(
        self,
        trials: int | None = None,
        workers: int = 1,
        timeout: float | None = None,
        study: str | None = None,
    ) -> SweepResult:
        """Run trials and sum the study up.

        Args:
            trials: how many, exactly, over all workers; None: as in the file, and for a study to go on with as many
                as are missing of what it was asked for. A trial whose process was killed is not one of them.
            workers: processes that train side by side, at least 1.
            timeout: seconds > 0 after which no new trial begins; None: as in the file.
            study: a study to go on with, in the same storage; None: a new one.

        Returns:
            The result; after Ctrl-C or SIGTERM that of the trials so far.

        Raises:
            ConfigError: before anything is created, when a value of the space does not fit the base; later,
                when the metric is never logged, the first three trials all fail, or every worker died.
        """
        spec = self.spec
        trials = positive_int("trials", trials)
        timeout = positive_seconds("timeout", timeout if timeout is not None else spec.timeout)
        workers = positive_int("workers", workers) or 1
        grid = _grid_size(spec)
        if study is None and trials is None and spec.trials is None and timeout is None and grid is None:
            raise ConfigError(_ENDLESS)
        base = self._check_configurations()

        store = default_store(self._place)
        root = store.checkpoints.parent
        name = study or f"{spec.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        with _quiet_optuna():
            opened = self._open_study(root, name, continued=study is not None)
            going_on = bool(opened.user_attrs.get(_GOING_ON))
            if grid is not None and retries.counted(opened) >= grid and not going_on:
                raise ConfigError(f"study {opened.study_name!r} has tried all {grid} points of its grid")
            endless = trials is None and spec.trials is None and timeout is None and grid is None
            if endless and _TARGET not in opened.user_attrs:
                raise ConfigError(_ENDLESS)
            folder = root / "sweeps" / opened.study_name
            with Heartbeat(opened) as heartbeat:
                if not opened.get_trials(deepcopy=False):
                    # Before MLflow is asked for anything: a study of a sweep that is killed then knows its target.
                    _missing(opened, spec, trials, grid)
                opened.set_user_attr(_GOING_ON, True)
                runs = StudyRuns(store, spec.experiment, opened.study_name)
                runs.open({"sweep.name": spec.name})
                heartbeat.settle()
                close_left_overs(opened, runs, spec, heartbeat.gone, folder)
                trials = _missing(opened, spec, trials, grid)
                if trials == 0 and not going_on:
                    text = f"study {name!r} has all its trials; --trials N adds some"
                    warnings.warn(text, NoEffectWarning, stacklevel=2)
                own_bar = workers == 1 and bool(base["trainer"].get("enable_progress_bar"))
                progress = SweepProgress(trials, spec.objectives[0].metric, bar=not own_bar)
                quiet = workers > 1
                ledger = Ledger(
                    spec, opened, runs, _place_of(store), trials, timeout, quiet, progress, folder, heartbeat.gone
                )
                with progress:
                    count = workers if trials is None else max(1, min(workers, trials))
                    return self._run(ledger, count, folder, heartbeat)

    def _run(self, ledger: Ledger, workers: int, folder: Path, heartbeat: Heartbeat) -> SweepResult:
        study, runs = ledger.study, ledger.runs
        exit_code = 0
        try:
            with sigterm_interrupts():
                if workers == 1:
                    run_here(ledger)
                else:
                    WorkerPool(workers, folder).run(ledger)
            if ledger.stop_reason is not None:
                raise ledger.stop_reason
        except KeyboardInterrupt as error:
            exit_code = 143 if isinstance(error, Terminated) else 130
        except BaseException as error:
            ledger.abandon_all("the sweep failed")
            self._sum_up(ledger, folder)
            runs.close("FAILED", {"error": " ".join(str(error).split())[:1000]})
            raise
        ledger.abandon_all("interrupted")
        best = self._sum_up(ledger, folder)
        if not exit_code and not best:
            exit_code = 1
        if not heartbeat.others_live():
            runs.close("KILLED" if exit_code > 1 else "FAILED" if exit_code else "FINISHED", {})
            study.set_user_attr(_GOING_ON, exit_code > 1)
        return SweepResult(study.study_name, best, runs.parent_id, count_states(study), exit_code, ledger.first_error)

    def _sum_up(self, ledger: Ledger, folder: Path) -> list[Any]:
        best = best_results(ledger.study, self.spec, folder)
        log_summary(ledger.study, self.spec, ledger.runs, best)
        warn_if_nothing_was_compared(ledger.study, self.spec)
        return best

    def _check_configurations(self) -> dict[str, Any]:
        """Resolve the base and every branch of the space; returns the base."""
        spec = self.spec
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "a sweep was started by torchrun or a scheduler with several processes (WORLD_SIZE "
                f"{os.environ['WORLD_SIZE']}); start it once, with --workers"
            )
        base = trial_config(spec.configs, spec.folder, spec.overrides, {})
        check_trainer(base)
        for params in islice(spec.space.assignments(), _MOST_CHECKED):
            try:
                check_trainer(trial_config(spec.configs, spec.folder, spec.overrides, params))
            except ConfigError as error:
                raise ConfigError(f"space does not fit the base: {error}") from error
        return base

    def _open_study(self, root: Path, name: str, continued: bool) -> optuna.Study:
        spec = self.spec
        place = spec.storage or str(root / "optuna" / f"{name}.journal")
        if continued and spec.storage is None and not Path(place).is_file():
            raise ConfigError(
                f"study {name!r} is not in {root / 'optuna'}; there are: "
                f"{', '.join(sorted(path.stem for path in (root / 'optuna').glob('*.journal'))) or 'none'}"
            )
        if continued and "://" not in place and Path(place).is_file():
            mend_journal(Path(place))
        storage = open_storage(place)
        if spec.storage is None and not optuna.get_all_study_names(storage):
            # Also where a sweep was killed between its journal and its study.
            continued = False
        told = check_study(storage, name, spec.directions) if continued else 0
        sampler, pruner = make_sampler(spec.sampler, spec.space, told), make_pruner(spec.pruner)
        if continued:
            return optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
        return create_study(storage, name, spec.directions, sampler, pruner)


def _grid_size(spec: SweepSpec) -> int | None:
    if spec.sampler["name"] != "grid":
        return None
    size = 1
    for values in spec.space.grid().values():
        size *= len(values)
    return size


def _missing(study: optuna.Study, spec: SweepSpec, trials: int | None, grid: int | None) -> int | None:
    """Return how many trials are to come, and note the study's target; None without a limit."""
    done = retries.counted(study)
    if trials is None:
        target = study.user_attrs.get(_TARGET)
        trials = spec.trials if target is None else max(0, target - done)
    if grid is not None:
        left = max(0, grid - done)
        trials = left if trials is None else min(trials, left)
    if trials is not None:
        study.set_user_attr(_TARGET, done + trials)
    return trials


def _place_of(store: Store) -> str:
    """Return what a tracker in another process takes to find the same store."""
    root = store.checkpoints.parent
    return str(root) if locate(root).uri == store.uri else store.uri


def warn_if_nothing_was_compared(study: optuna.Study, spec: SweepSpec) -> None:
    """Warn when a pruner could not prune: it compares values at equal steps, and there were none.

    That happens where the batch size is searched and validations are counted by `global_step`.
    """
    steps = [set(trial.intermediate_values) for trial in study.get_trials(deepcopy=False)]
    steps = [each for each in steps if each]
    apart = sum(map(len, steps)) == len(set().union(*steps))
    if spec.prunes and len(steps) > 1 and apart:
        warnings.warn(
            f"pruner {spec.pruner['name']!r} had nothing to compare: no two trials were validated at the same "
            "global step; set objective.step: validation",
            NoEffectWarning,
            stacklevel=4,
        )


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """The sweep prints its own line a trial."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Journal storage, multivariate TPE and the like; named in our documentation.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Lightning 2.6 beside torch 2.14, once a trial.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            yield
    finally:
        optuna.logging.set_verbosity(level)
