"""A killed fit that goes on as if nothing had happened."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from ds_lightning.errors import ConfigError

from ._resumed_fit import ResumedFit


class ExactResume(pl.Callback):
    """Make a fit that is killed and resumed with `ckpt_path` end as the one that never stopped, bit for bit on a CPU.

    **When it acts.** When Lightning sets up the train loaders, at the start of fit and at each reload; before the
    first batch after a resume; around validation; when a checkpoint is saved.

    **What it changes.** Each train loader is replaced by a copy that draws the epoch's order from (seed, epoch), and
    seeds Python, NumPy and torch once a batch from (seed, rank, epoch, batch), wherever the batch is loaded. So order
    and augmentation depend neither on the number of workers nor on restarts. In the middle of an epoch the copy skips
    the batches that are trained already, without loading them. Loading, validation and reloading leave the global
    generators of the training process as they were. Explicit generators of loaders and samplers are seeded too.

    **What it logs.** Nothing.

    **Checkpoint.** For each rank: the seed, the states of all generators (CUDA too), the number of batches; in the
    middle of an epoch also the states of torchmetrics, what `self.log` has gathered, and the gradients of a
    half-done accumulation. All tensors and plain Python. The checkpoint loads without the callback.

    **Limits.** Refused in the middle of an epoch: another number of processes or of batches. A loader with
    `state_dict` and `load_state_dict` is left alone; an IterableDataset or another iterable is drawn again up to the
    position, with a warning. Generators that a data set or sampler keeps to itself are not seen. A hook of
    the module that runs after the checkpoint of the same batch, validation or epoch was saved is not made up for:
    `on_train_batch_end` gives a warning.

    **Cost.** With `num_workers=0` the CPU's generators are exchanged once a batch (figure: docs/exact_resume.md);
    with workers the seeding runs there. CUDA's are read at checkpoints and validations; it never waits for the device.

    Args:
        seed: of the order and the augmentation, >= 0. None: torch's initial seed in each process, as
            `seed_everything` sets it. On resume the checkpoint's seed wins.

    Raises:
        ConfigError: a negative seed; on resume, data or a number of processes that do not fit the checkpoint.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[ExactResume()], logger=False, accelerator="cpu")
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None and seed < 0:
            raise ConfigError(f"seed is {seed}; expected an integer >= 0, or None for torch's initial seed")
        self.requested_seed = seed
        self._forget()

    def _forget(self) -> None:
        self._fit: ResumedFit | None = None
        self._loaded: dict[str, Any] = {}
        self._at_the_end: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Step between Lightning and the train loaders."""
        if stage == "fit":
            self._forget()
            seed = torch.initial_seed() if self.requested_seed is None else self.requested_seed
            self._fit = ResumedFit(trainer, pl_module, seed, self.requested_seed)
            if is_overridden("on_train_batch_end", pl_module) and any(
                getattr(callback, "_every_n_train_steps", 0) for callback in trainer.checkpoint_callbacks
            ):
                rank_zero_warn(
                    f"ExactResume: Lightning saves the checkpoint of a step before on_train_batch_end of "
                    f"{type(pl_module).__name__}, so what that hook changes is lost for one batch on resume; move it "
                    "to on_before_zero_grad, optimizer_step or training_step"
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all ranks; every rank must call this, as Lightning does."""
        if self._fit is None:
            return self._loaded
        mine = self._fit.read()
        world = self._fit.trainer.world_size
        ranks: list[Any] = [mine]
        if world > 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = [None] * world
            torch.distributed.all_gather_object(ranks, mine)
        return {"world_size": world, "ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the fit starts."""
        self._loaded = state_dict

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand the state to the fit, which looks at it when Lightning has restored its counters."""
        assert self._fit is not None
        self._fit.loaded, self._loaded = self._loaded, {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the generators back for the hooks of a new epoch; a resume inside an epoch does not come here."""
        assert self._fit is not None
        self._fit.bring_back(in_epoch=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the state for a checkpoint that is saved when the fit is over."""
        self._at_the_end = self.state_dict()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the loops as they were."""
        if stage == "fit" and self._fit is not None:
            self._fit.leave()
            self._fit, self._loaded = None, self._at_the_end
