"""Supervised classification."""

from pathlib import Path
from typing import Any, Literal, Self

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
from ds_lightning.functional.mixing import mixed_mean
from ds_lightning.modules._heads import head_name
from ds_lightning.modules._network_module import NetworkModule, needs_no_data
from ds_lightning.modules._pretrained import Pretrained, freeze_all_but_head, load_encoder, read_pretrained
from ds_lightning.modules.class_metrics import class_metrics, log_confusion
from ds_lightning.modules.optimizers import make_optimizers

_DEFAULT_NETWORK = "resnet8"


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
        encoder: checkpoint of `ContrastivePretraining` whose encoder the training starts from, with a new head. Its
            network and options take the place of the defaults, or have to be the given ones. A resume or
            `load_from_checkpoint` does not need the file.
        encoder_modality: which encoder, when the checkpoint has two, such as `image`.
        freeze_encoder: whether the head alone, the last linear layer, is trained; the rest stays in eval mode.

    Raises:
        ConfigError: when an argument is outside its range, something is neither given nor in the data, or the encoder
            does not fit the network.
        DataError: when training starts and there is no such encoder.

    Example:
        >>> model = Classifier("resnet8", num_classes=10, in_channels=1)
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        network: str | nn.Module = _DEFAULT_NETWORK,
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
        encoder: str | None = None,
        encoder_modality: str | None = None,
        freeze_encoder: bool = False,
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
        self.freeze_encoder = freeze_encoder
        self._encoder, self._encoder_modality = encoder, encoder_modality
        self._encoder_is_due = encoder is not None
        self.network: nn.Module | None = network if isinstance(network, nn.Module) else None
        if num_classes is not None and encoder is None and needs_no_data(network, self._network_options, in_channels):
            self.configure_model()

    # ---------------------------------------------------------------- the network

    def configure_model(self) -> None:
        """Build what is not built yet, with what the DataModule knows."""
        if self.num_classes is None:
            self.num_classes = self._from_data("num_classes")
        pretrained = None
        # Without the file a resume can still go on; a new training fails at its first batch.
        if self._encoder_is_due and self._encoder is not None and Path(self._encoder).is_file():
            pretrained = read_pretrained(self._encoder, self._encoder_modality)
        if self.network is None:
            if pretrained is not None:
                self._adopt(pretrained)
            assert self._network_name is not None
            self.network, self._network_options = self._network_by_name(
                self._network_name, self.num_classes, self._network_options
            )
            self.hparams["network"], self.hparams["network_options"] = self._network_name, self._network_options
        if pretrained is not None:
            load_encoder(self.network, pretrained, self.num_classes)
            self._encoder_is_due = False
        if self.freeze_encoder:
            freeze_all_but_head(self.network, self.num_classes)
            self.train(self.training)
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
        if self.network is None or self._encoder_is_due:
            self.configure_model()
            assert self.network is not None
        if self._encoder_is_due and self._encoder is not None:
            # Says what is wrong with the file.
            read_pretrained(self._encoder, self._encoder_modality)
        logits: Tensor = self.network(x)
        return logits

    # ---------------------------------------------------------------- the pre-trained encoder

    def _adopt(self, pretrained: Pretrained) -> None:
        """Take the network's name and options from where its weights come from."""
        if pretrained.network is None:
            raise ConfigError(f"encoder {pretrained.path} was given as a module; give that network, with a head, too")
        if self._network_name not in (_DEFAULT_NETWORK, pretrained.network):
            raise ConfigError(
                f"network is {self._network_name!r}, and encoder {pretrained.path} is a {pretrained.network!r}; "
                "give the same, or no network"
            )
        self._network_name = pretrained.network
        self._network_options = {**pretrained.options, **self._network_options}
        if self._from_data("input_shape", required=False) is None:
            self.in_channels = self.in_channels or pretrained.in_channels
            self.image_size = self.image_size or pretrained.image_size

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Expect no encoder: all weights are in the checkpoint, and its network may not be the encoder's of today."""
        if self._encoder is not None:
            self._encoder_is_due = False
            self._take_network_of(checkpoint.get("hyper_parameters", {}))
        super().on_load_checkpoint(checkpoint)

    def _take_network_of(self, saved: dict[str, Any]) -> None:
        if self._network_name is None or "network" not in saved:
            return
        if (saved["network"], saved["network_options"] or {}) != (self._network_name, self._network_options):
            self._network_name, self._network_options = saved["network"], saved["network_options"] or {}
            self.network = None
            self.configure_model()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the encoder's file out of what is needed to load."""
        super().on_save_checkpoint(checkpoint)
        if "hyper_parameters" in checkpoint:
            checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], "encoder": None}

    def train(self, mode: bool = True) -> Self:
        """Change the mode; what is frozen stays in eval mode, with its dropout and BatchNorm."""
        super().train(mode)
        if self.freeze_encoder and self.network is not None and self.num_classes is not None:
            self.network.eval().get_submodule(head_name(self.network, self.num_classes)).train(mode)
        return self

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

    # ---------------------------------------------------------------- the steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch and log it with the accuracy."""
        batch = labelled_batch(batch)
        logits = restrict(self(input_of(batch)), batch)
        loss = mixed_mean(lambda label: self.loss(logits, label), batch)
        predicted = logits.detach().argmax(dim=1)
        accuracy = mixed_mean(lambda label: (predicted == label).float(), batch)
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

    def on_train_end(self) -> None:
        """Hand the last validation's confusion matrix to the loggers."""
        # In on_fit_end the module is on the CPU already, where NCCL can't add up what the processes counted.
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
        trained = (parameter for parameter in self.parameters() if parameter.requires_grad or not self.freeze_encoder)
        return make_optimizers(
            trained, self._optimizer, self._lr_scheduler, lambda: self.trainer.estimated_stepping_batches
        )
