"""One fit that ExactResume watches: its position, its generators and what is brought back from a checkpoint."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from ds_lightning.errors import ConfigError

from ._epoch_pass import sized
from ._epoch_totals import (
    forget_logged,
    read_gradients,
    read_logged,
    read_metrics,
    update_counts,
    write_gradients,
    write_logged,
    write_metrics,
)
from ._resumable_loader import make_resumable
from ._rng_state import read_state, write_state

_LIGHTNINGS_WARNING = "You're resuming from a checkpoint that ended before the epoch ended"


class ResumedFit:
    """One fit: where it is, what is brought back, and Lightning's methods that are wrapped meanwhile."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, seed: int, requested: int | None) -> None:
        self.trainer, self.module, self.seed, self._requested = trainer, module, seed, requested
        self.rank: int = trainer.global_rank
        self.loop = trainer.fit_loop
        self.cycles = False
        self.sampler_seeds: dict[int, int] = {}
        self.loaded: dict[str, Any] | None = None
        self._pending: dict[str, Any] = {}
        self._outer: dict[str, Any] | None = None
        self._counts: dict[str, int] | None = None
        self._preparing = False
        self._batches: list[int | None] = []
        self._cut_off = self._epoch_cut_off = self._validated = False
        epoch_loop = self.loop.epoch_loop
        self._wrapped: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
            (self.loop, "setup_data", self._setup_data),
            (epoch_loop.val_loop, "run", self._run_validation),
            (epoch_loop, "on_run_start", self._on_epoch_run_start),
            (epoch_loop, "reset", self._reset_epoch),
            (self.loop, "run", self._run),
        )
        self._originals: list[Callable[..., Any]] = []
        for owner, name, replacement in self._wrapped:
            self._originals.append(getattr(owner, name))
            setattr(owner, name, replacement)

    def leave(self) -> None:
        for owner, name, _ in self._wrapped:
            owner.__dict__.pop(name, None)
        forget_logged(self.loop.epoch_loop._results)

    def epoch(self) -> int:
        progress: Any = self.loop.epoch_progress.current
        return int(progress.processed)

    def trained(self) -> int:
        loop: Any = self.loop.epoch_loop
        # Before Lightning resets its counters they may be those of an epoch that is over.
        if self._preparing and (not loop.restarting or loop.batch_progress.is_last_batch):
            return 0
        return int(loop.batch_progress.current.processed)

    def bring_back(self, *, in_epoch: bool) -> None:
        if not self._pending:
            return
        pending, self._pending = self._pending, {}
        # Also between epochs: there may be metrics that are never reset.
        write_metrics(self.module, pending.get("metrics", {}))
        connector = self.trainer._logger_connector
        position = self.trained() if in_epoch else 0
        if position:
            self._check_batches(pending.get("batches", self._batches), position)
            write_gradients(self.module, pending.get("gradients", {}))
            self._write_logged(pending)
            # Else the next batch would be the epoch's first one to Lightning, which drops what was logged before it.
            connector._first_loop_iter = False
        # What plateau schedulers, early stopping and checkpoints monitor may be from before.
        connector._callback_metrics.update(pending.get("monitored", {}))
        if "generators" in pending:
            write_state(pending["generators"])

    def _write_logged(self, pending: dict[str, Any]) -> None:
        reduce = self.trainer.strategy.reduce
        write_logged(self.loop.epoch_loop._results, pending.get("logged", {}), self.module, reduce)

    def read(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "seed": self.seed,
            "sampler_seeds": dict(self.sampler_seeds),
            "batches": list(self._batches),
        }
        if self._pending:
            # Not a batch since the resume: what was loaded still holds.
            return {**state, **self._pending}
        state["generators"] = self._outer or read_state()
        state["validating"] = self._counts is not None
        state["monitored"] = {key: value.detach().clone() for key, value in self.trainer.callback_metrics.items()}
        state["metrics"] = read_metrics(self.module, self._counts)
        state["logged"] = read_logged(self.loop.epoch_loop._results)
        state["gradients"] = read_gradients(self.module) if self._accumulating() else {}
        return state

    def _accumulating(self) -> bool:
        loop = self.loop.epoch_loop
        return loop.batch_progress.current.ready > 0 and loop._should_accumulate()

    def _resume(self, state: dict[str, Any]) -> None:
        progress: Any = self.loop.epoch_loop.batch_progress
        trained = progress.current.processed
        inside = trained > 0 and not progress.is_last_batch
        total = progress.total
        if self.loop.epoch_loop.restarting and total.processed == total.ready == total.completed + 1:
            # Saved after a batch, before what follows it. Lightning would skip that: the validation, and after the
            # last batch the end of the epoch too.
            self._cut_off = True
            progress.increment_completed()
        epochs: Any = self.loop.epoch_progress.total
        self._epoch_cut_off = epochs.started == epochs.processed == epochs.completed + 1
        if self._epoch_cut_off:
            # With max_steps Lightning would run the end of this epoch once more.
            self.loop._restarting = False
        if self._epoch_cut_off or epochs.started == epochs.processed == epochs.completed:
            # Between epochs. Lightning would take the batches of the last one for those of the next.
            self.loop.epoch_loop.restarting = False
        if not state:
            if inside:
                rank_zero_warn(
                    "ExactResume: the checkpoint was saved without ExactResume, so the order of the data and the "
                    "random numbers before it are unknown; the first "
                    f"{trained} batches of the epoch are skipped, but they may not be those that were trained"
                )
            return
        saved, now = state["world_size"], self.trainer.world_size
        if saved != now:
            message = f"the checkpoint was saved by {saved} processes and this fit has {now}"
            if inside:
                raise ConfigError(
                    f"ExactResume: {message}, in the middle of an epoch; expected the same number: start {saved} "
                    "processes, or resume from a checkpoint of the end of an epoch"
                )
            rank_zero_warn(f"ExactResume: {message}; it goes on, but not as the uninterrupted fit would")
        mine = dict(state["ranks"][min(self.rank, saved - 1)])
        if self._requested is not None and self._requested != mine["seed"]:
            rank_zero_warn(
                f"ExactResume: seed is {self._requested}, and the checkpoint's is {mine['seed']}, which is used; to "
                "train with another seed start a new fit"
            )
        self.seed, self.sampler_seeds = mine.pop("seed"), dict(mine.pop("sampler_seeds"))
        # Saved in the validation after a batch: that counts as over.
        self._validated = mine["validating"]
        self._cut_off |= self._validated
        self._pending = mine

    def _check_batches(self, saved: list[int | None], position: int) -> None:
        if saved != self._batches:
            raise ConfigError(
                f"ExactResume: the train loaders have {self._batches} batches an epoch, and had {saved} when the "
                f"checkpoint was saved after batch {position} of an epoch; expected the same data set and batch size: "
                "put them back, or resume from a checkpoint of the end of an epoch"
            )

    @contextmanager
    def _generators_kept(self) -> Iterator[None]:
        self._outer = read_state()
        try:
            yield
        finally:
            write_state(self._outer)
            self._outer = None

    def _run(self) -> None:
        if self.loaded is not None:
            loaded, self.loaded = self.loaded, None
            if self.loop._loaded_from_state_dict:
                # Loaders that were made in configure_optimizers don't know the position.
                self.loop._combined_loader = None
            self._resume(loaded)
        self._originals[4]()

    def _setup_data(self) -> None:
        if self.loop._combined_loader is not None and not self.loop._should_reload_train_dl:
            return
        strategy: Any = self.trainer.strategy
        process = strategy.process_dataloader
        number = 0

        def process_dataloader(loader: object) -> object:
            nonlocal number
            resumable = make_resumable(process(loader), number, self)
            number += 1
            return resumable

        strategy.process_dataloader = process_dataloader
        self._preparing = True
        try:
            with self._generators_kept():
                self._originals[0]()
        finally:
            self._preparing = False
            del strategy.__dict__["process_dataloader"]
        combined = self.loop._combined_loader
        self.cycles = combined is not None and combined._mode == "max_size_cycle"
        self._batches = [] if combined is None else [sized(loader) for loader in combined.flattened]
        if self._epoch_cut_off:
            self._epoch_cut_off = False
            self._finish_epoch()

    def _run_validation(self) -> Any:
        self._counts = update_counts(self.module)
        try:
            with self._generators_kept():
                return self._originals[1]()
        finally:
            self._counts = None

    def _on_epoch_run_start(self, data_fetcher: Any) -> None:
        self._originals[2](data_fetcher)
        known = bool(self._pending)
        # No hook of anybody's is called between this and the first batch.
        self.bring_back(in_epoch=True)
        # It keeps plateau schedulers from stepping at the end of an epoch whose metrics Lightning believes lost.
        self.loop._restarting = False
        if self._cut_off:
            self._cut_off = False
            loop = self.loop.epoch_loop
            loop.val_loop.restarting = False
            if known and not self._validated:
                # Saved in `on_train_batch_end`: the logger has not had that step's values.
                self.trainer._logger_connector.on_batch_end()
                self.trainer._logger_connector.update_train_step_metrics()
            loop._skip_next_val = self._validated
            loop.on_advance_end(data_fetcher)
            loop.on_iteration_done()

    def _reset_epoch(self) -> None:
        with warnings.catch_warnings():
            # Lightning believes that the loaders start over.
            warnings.filterwarnings("ignore", message=_LIGHTNINGS_WARNING)
            self._originals[3]()

    def _finish_epoch(self) -> None:
        """Do what Lightning does after the hooks of an epoch's end, in which the checkpoint was saved."""
        pending, loop = self._pending, self.loop.epoch_loop
        if not pending:
            return
        write_metrics(self.module, pending["metrics"])
        self._write_logged(pending)
        connector = self.trainer._logger_connector
        connector._callback_metrics.update(pending["monitored"])
        if loop._num_ready_batches_reached():
            loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        loop._batches_that_stepped -= 1
        connector.update_train_epoch_metrics()
        loop._batches_that_stepped += 1
        pending["logged"], pending["metrics"] = {}, read_metrics(self.module, None)
