"""How good the features are, measured while they are learned: a linear classifier and nearest neighbours."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ds_lightning.errors import ConfigError, NoEffectWarning
from ds_lightning.functional.probes import knn_label, label_subset, logistic_scores, tuned_logistic
from ds_lightning.functional.seeds import derived_seed

from ._frozen_features import LabelledSource, feature_reader


class LinearProbe(pl.Callback):
    """Fit a logistic regression on frozen features with a share of the labels, and let the nearest neighbours vote.

    **When it acts.** In the validation at the end of every `every`-th epoch and of the last one that `max_epochs`,
    `max_steps` or an early stop names; where there is no validation, when the training epoch ends. Also in
    `trainer.validate`. The sanity check and validations inside an epoch are left out.

    **What it changes.** Nothing: the module goes to eval mode and back, running statistics, gradients and generators
    stay as they were.

    **What it logs.** `probe/accuracy_1pct`, `probe/accuracy_10pct`, `probe/accuracy_100pct`: the accuracy on the
    validation samples of a regression fitted with that share of the training labels; `probe/knn`: that of the `knn`
    nearest training samples' vote, with all labels (arXiv 1805.01978). A ModelCheckpoint can monitor them, with
    `every_n_epochs` equal to `every`.

    **Checkpoint.** Nothing is kept; the shares of the labels depend on `seed` alone.

    **Limits.** The weight decay is chosen by cross-validation inside the share; validation samples are never used for
    it. Training samples of `data` go through that DataModule's own `transform`, if it has one, but not through what it
    does on the device in training. One input a batch.

    **Cost.** A pass of all labelled samples through the network, shared out over the ranks, and the regressions:
    on one CPU thread half a second with 4,000 samples of 64 features, 5 s with 45,000 of 256. Features stay on the
    module's device: 4 bytes x samples x features.

    Args:
        labels: the shares of the training labels, each in (0, 1]; at least one sample of each class is taken.
        every: epochs between two probes, at least 1.
        knn: neighbours that vote, at least 1; 0 leaves it out.
        data: a DataModule with labels in its training and validation batches, for modules that are trained on others.
            None takes `labelled_loaders()` of the trainer's, as `ContrastiveViews` has.
        features: a method of the module, called with the input, which gives (B, D); or a submodule, such as
            `network.pool`, whose output is taken while the module runs.
        weight_decays: to choose from; the penalty is decay / 2 times the squared weights of standardised features.
        seed: of the choice of the labels.

    Raises:
        ConfigError: an argument out of its range; at the start no labelled samples or no such features.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[LinearProbe(labels=(0.1,))], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        labels: Sequence[float] = (0.01, 0.1, 1.0),
        every: int = 1,
        knn: int = 20,
        data: pl.LightningDataModule | None = None,
        features: str = "embed",
        weight_decays: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        seed: int = 0,
    ) -> None:
        if not all(0 < share <= 1 for share in labels):
            raise ConfigError(f"labels is {list(labels)}; expected shares in (0, 1], such as [0.01, 0.1, 1.0]")
        for name, value, least in (("every", every, 1), ("knn", knn, 0)):
            if value < least:
                raise ConfigError(f"{name} is {value}; expected an integer >= {least}")
        if not labels and knn == 0:
            raise ConfigError("labels is empty and knn is 0; expected one of them, or there is nothing to measure")
        if not weight_decays or not all(0 <= decay < float("inf") for decay in weight_decays):
            raise ConfigError(f"weight_decays is {list(weight_decays)}; expected at least one finite number >= 0")
        self.labels = tuple(labels)
        self.every = every
        self.knn = knn
        self.features = features
        self.weight_decays = tuple(weight_decays)
        self.seed = seed
        self._source = LabelledSource("LinearProbe", data)
        self._measured: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the data, and check that there are features."""
        if stage in ("fit", "validate"):
            self._measured = None
            self._source.setup(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a module without the features, now that it is built."""
        feature_reader(pl_module, self.features, "LinearProbe")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure when the epoch is due."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._log(trainer, pl_module)
        elif trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and self._due(trainer):
            self._measured = trainer.current_epoch
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure an epoch that is due and had no validation at its end."""
        if self._measured != trainer.current_epoch and self._due(trainer):
            self._measured = trainer.current_epoch
            self._log(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so when nothing was measured."""
        if self._measured is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn("LinearProbe measured nothing: no epoch ended in this fit", category=NoEffectWarning)

    def _due(self, trainer: pl.Trainer) -> bool:
        epoch, steps, most = trainer.current_epoch + 1, trainer.max_steps, trainer.max_epochs
        last = trainer.should_stop or epoch == most or 0 <= steps <= trainer.global_step
        return epoch % self.every == 0 or last

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        train_loader, held_loader = self._source.loaders(trainer)
        train = self._source.read(trainer, module, train_loader, self.features)
        held = self._source.read(trainer, module, held_loader, self.features)
        # On every rank, so that none waits for one that has stopped.
        if not bool(train.features.isfinite().all() & held.features.isfinite().all()):
            raise ConfigError(
                f"{self.features!r} gave NaN or infinite features; LinearProbe can't fit them: lower the learning rate"
            )
        figures: dict[str, float] = {}
        if trainer.is_global_zero:
            with torch.inference_mode(False), torch.no_grad():
                figures = self._figures(train.features, train.label, held.features, held.label)
        figures = trainer.strategy.broadcast(figures)
        module.log_dict(figures, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def _figures(self, train: Tensor, label: Tensor, held: Tensor, held_label: Tensor) -> dict[str, float]:
        classes = int(torch.maximum(label.max(), held_label.max())) + 1
        classes = max(classes, 2)
        figures: dict[str, float] = {}
        # Statistics need no labels. A feature that is always the same tells nothing.
        mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0)
        scale = torch.where(deviation > 1e-6 * deviation.max(), 1 / deviation.clamp(min=1e-30), 0.0)
        scaled, held_scaled = (train - mean) * scale, (held - mean) * scale
        for share in self.labels:
            chosen = label_subset(label, share, derived_seed(self.seed, "probe"))
            weights, _ = tuned_logistic(scaled[chosen], label[chosen], classes, self.weight_decays)
            right = logistic_scores(weights, held_scaled).argmax(dim=1) == held_label
            figures[f"probe/accuracy_{100 * share:g}pct"] = right.float().mean().item()
        if self.knn:
            right = knn_label(train, label, held, classes, self.knn) == held_label
            figures["probe/knn"] = right.float().mean().item()
        return figures
