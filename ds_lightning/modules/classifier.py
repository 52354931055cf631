"""Supervised classification."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix

from ds_lightning.errors import ConfigError
from ds_lightning.functional.batch import as_batch, input_of, labelled_batch, restrict
from ds_lightning.modules._network_module import NetworkModule, named_network
from ds_lightning.modules.class_metrics import class_metrics, log_confusion
from ds_lightning.modules.optimizers import make_optimizers


class Classifier(NetworkModule):
    """Train any network to tell classes apart, on plain or on mixed (MixUp, CutMix) batches.

    What is not given (classes, channels, size) is read from the DataModule when training starts, and is kept
    in the checkpoint. Made to be subclassed: override `loss`, or `configure_optimizers`, and nothing else.
    Outputs that a batch's `allowed` (B, num_classes) excludes are at minus infinity everywhere, also in `loss`.

    Logs `train/loss`, `train/accuracy` at every step (of mixed batches: lambda-weighted), and for `val` and
    `test` the loss, accuracy, macro F1 (`f1`) and expected calibration error (`calibration_error`) of an epoch.
    A logger that has `log_confusion_matrix` gets the matrix of the last validation and of the test.

    Args:
        network: a name that `ds_lightning.networks.backbone` knows (`resnet8`, `torchvision/resnet18`,
            `timm/vit_tiny_patch16_224`), or an nn.Module that maps (B, C, H, W), or whatever the batch holds,
            to logits (B, num_classes). A module is not kept in the hyperparameters: give it again to
            `load_from_checkpoint`.
        num_classes: number of classes, at least 2; None takes the DataModule's.
        in_channels: channels of the images; None takes the DataModule's.
        image_size: height and width in pixels; None takes the DataModule's.
        network_options: further arguments of a network given by name, such as `{width: 32}`.
        optimizer: makes the optimizer from the parameters; by default SGD with Nesterov momentum, the usual choice
            for a convolutional network from scratch.
        lr_scheduler: makes a scheduler from the optimizer, stepped every epoch; `cosine` anneals to zero over
            the whole training, stepped every step; None keeps the rate.
        label_smoothing: share of the target that is spread over all (allowed) classes, in [0, 1).

    Raises:
        ConfigError: when an argument is outside its range, or something is neither given nor in the data.

    Example:
        >>> model = Classifier("resnet8", num_classes=10, in_channels=1)
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        network: str | nn.Module = "resnet8",
        num_classes: int | None = None,
        *,
        in_channels: int | None = None,
        image_size: int | None = None,
        network_options: dict[str, Any] | None = None,
        # A lambda, so that the command line can show it and set single arguments of it.
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(
            params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
        ),
        lr_scheduler: Literal["cosine"] | LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 2:
            raise ConfigError(f"num_classes is {num_classes}; expected at least 2")
        self._check(in_channels, image_size, lr_scheduler)
        if not 0.0 <= label_smoothing < 1.0:
            raise ConfigError(f"label_smoothing is {label_smoothing}; expected a share in [0, 1)")
        given = {"network": network, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        self.save_hyperparameters(ignore=[name for name, value in given.items() if not isinstance(value, str | None)])
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.image_size = image_size
        self.label_smoothing = label_smoothing
        self._network_name = network if isinstance(network, str) else None
        self._network_options = network_options or {}
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self.network: nn.Module | None = network if isinstance(network, nn.Module) else None
        if num_classes is not None and (self.network is not None or in_channels is not None):
            self.configure_model()

    # ---------------------------------------------------------------- the network

    def configure_model(self) -> None:
        """Build what is not built yet, with what the DataModule knows."""
        if self.num_classes is None:
            self.num_classes = self._from_data("num_classes")
        if self.network is None:
            self.in_channels, self.image_size = self._image_shape(self.in_channels, self.image_size)
            assert self._network_name is not None
            self.network = named_network(
                self._network_name, self.num_classes, self.in_channels, self.image_size, self._network_options
            )
        if not hasattr(self, "val_metrics"):
            self._build_metrics(self.num_classes)
        for name in ("num_classes", "in_channels", "image_size"):
            self.hparams[name] = getattr(self, name)

    def _build_metrics(self, num_classes: int) -> None:
        metrics = class_metrics(num_classes)
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        self.val_confusion = MulticlassConfusionMatrix(num_classes)
        self.test_confusion = MulticlassConfusionMatrix(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map a batch of inputs to logits (B, num_classes)."""
        if self.network is None:
            self.configure_model()
            assert self.network is not None
        logits: Tensor = self.network(x)
        return logits

    # ---------------------------------------------------------------- the loss

    def loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the loss of each sample (B,); a subclass may override it.

        Args:
            logits: (B, num_classes).
            label: (B,) int64 class indices.
        """
        plain = F.cross_entropy(logits, label, reduction="none")
        if self.label_smoothing == 0:
            return plain
        # The uniform share goes to the outputs that the sample may have: to the others it would be infinite.
        possible = ~logits.isneginf()
        log_probability = logits.log_softmax(dim=1).masked_fill(~possible, 0.0)
        uniform = -log_probability.sum(dim=1) / possible.sum(dim=1)
        return (1 - self.label_smoothing) * plain + self.label_smoothing * uniform

    def _mixed(self, of_label: Callable[[Tensor], Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Average a per-sample quantity over both labels of a mixed batch, weighted by lambda."""
        value = of_label(batch["label"])
        if "mix" not in batch:
            return value
        mix = batch["mix"].to(value.dtype)
        return mix * value + (1 - mix) * of_label(batch["label_mixed"])

    # ---------------------------------------------------------------- the steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch and log it with the accuracy."""
        batch = labelled_batch(batch)
        logits = restrict(self(input_of(batch)), batch)
        loss = self._mixed(lambda label: self.loss(logits, label), batch).mean()
        predicted = logits.detach().argmax(dim=1)
        accuracy = self._mixed(lambda label: (predicted == label).float(), batch).mean()
        size = len(predicted)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        self.log("train/accuracy", accuracy, batch_size=size)
        return loss

    def _evaluate(self, batch: Any, stage: str) -> None:
        batch = labelled_batch(batch)
        logits, label = restrict(self(input_of(batch)), batch), batch["label"]
        self.log(f"{stage}/loss", self.loss(logits, label).mean(), batch_size=len(label), sync_dist=True)
        metrics: MetricCollection = getattr(self, f"{stage}_metrics")
        metrics.update(logits, label)
        if not self.trainer.sanity_checking:
            getattr(self, f"{stage}_confusion").update(logits, label)
        self.log_dict(metrics, prog_bar=stage == "val", batch_size=len(label))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update and log the validation metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update and log the test metrics."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the class probabilities (B, num_classes)."""
        batch = as_batch(batch)
        return restrict(self(input_of(batch)), batch).softmax(dim=1)

    # ---------------------------------------------------------------- the confusion matrix

    def on_validation_epoch_start(self) -> None:
        """Start counting afresh."""
        self.val_confusion.reset()

    def on_validation_epoch_end(self) -> None:
        """Hand the confusion matrix to the loggers when this is no part of a fit."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._log_confusion("val")

    def on_fit_end(self) -> None:
        """Hand the last validation's confusion matrix to the loggers."""
        self._log_confusion("val")

    def on_test_epoch_start(self) -> None:
        """Start counting afresh."""
        self.test_confusion.reset()

    def on_test_epoch_end(self) -> None:
        """Hand the test's confusion matrix to the loggers."""
        self._log_confusion("test")

    def _log_confusion(self, stage: str) -> None:
        confusion: MulticlassConfusionMatrix = getattr(self, f"{stage}_confusion")
        log_confusion(self.loggers, confusion, self._from_data("class_names", required=False), stage)

    # ---------------------------------------------------------------- the optimizer

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer and the scheduler; a subclass may override it."""
        return make_optimizers(
            self.parameters(), self._optimizer, self._lr_scheduler, lambda: self.trainer.estimated_stepping_batches
        )
