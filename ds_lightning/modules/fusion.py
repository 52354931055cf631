"""Classification of samples with several modalities: image, text, audio, series, table."""

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ds_lightning.errors import ConfigError
from ds_lightning.functional.batch import as_batch
from ds_lightning.functional.mixing import mixed_mean
from ds_lightning.modules._encoder_sizes import size_is_known, sizes_in_data
from ds_lightning.modules._fusion_network import Encoded, FusionNetwork
from ds_lightning.modules._gradient_share import gradient_shares
from ds_lightning.modules._modality_heads import mean_of_present
from ds_lightning.modules._multimodal_batch import check_labels
from ds_lightning.modules._multimodal_checks import check_classes, check_encoders, check_numbers
from ds_lightning.modules._network_module import NetworkModule
from ds_lightning.modules._present_encoder import PresentEncoder
from ds_lightning.modules.optimizers import make_optimizers
from ds_lightning.modules.subset_metrics import SubsetMetrics
from ds_lightning.networks.cross_modal import modality_dropout
from ds_lightning.networks.token_encoders import token_encoder


class AttentionMap(NamedTuple):
    """What attends to what in the last layer, averaged over the heads.

    Attributes:
        names: `fused` and the modalities.
        matrix: (B, M + 1, M + 1) in the order of `names`: the row attends to the column. The rows of what is present
            sum to 1, the others are zero.
        tokens: modality -> (B, N), the fused token's attention to each of its tokens.
    """

    names: tuple[str, ...]
    matrix: Tensor
    tokens: dict[str, Tensor]


class MultimodalFusion(NetworkModule):
    """Tell classes apart by several modalities at once, some of which a sample may not have.

    A batch has a key for each modality and `label`: class indices (B,), or with `multilabel` 0 or 1 for each class
    (B, C) float. `present` (B, M) bool says which of them a sample has, in the order of `encoders`; without it all are
    there. `audio_mask` and `series_mask` (B, T) bool mark the real frames, text is padded with 0. What is absent or
    padding changes nothing, whatever stands there. Mixed batches are learned from as by `Classifier`.

    Logs `train/loss`, `train/accuracy`, and for `val` and `test` `loss`, `accuracy`, macro `f1` and macro `auroc`; also
    `val/subset/image_audio/accuracy` and `/auroc` for every subset of the modalities, over the samples that have at
    least one of them. Every `log_every_n_steps` steps `gradient_share/image`: the norm of that encoder's gradient
    over the sum of all encoders', which shows a modality that is not learned from.

    Args:
        encoders: modality (`image`, `text`, `audio`, `series`, `table`) -> encoder, in the order of the columns of
            `present`: a name that `ds_lightning.networks.token_encoder` knows; None for the usual one; `features` when
            the batch holds them already; or an nn.Module that gives tokens and their mask, or features (B, D).
            Modules are not kept in the hyperparameters: give `encoders` again to `load_from_checkpoint`.
        num_classes: number of classes; None takes the DataModule's.
        fusion: `cross`, attention between the tokens of all modalities; `late`, the mean of the logits of each
            modality alone, over those that a sample has; `single`, one modality.
        single: which one; with `fusion="single"`.
        multilabel: whether a sample can have several classes.
        width: features inside the cross-modal attention, a multiple of `heads`.
        depth: its layers, at least 1.
        heads: its attention heads, at least 1.
        dropout: in it, in [0, 1).
        modality_dropout: probability of hiding each modality of a sample from the fusion in training, never the last
            one, in [0, 1).
        skip: whether, with `cross`, the logits of late fusion are added to what attention says, so that it has only the
            rest to learn; the attention's own begin at zero.
        auxiliary: weight of the mean loss of a linear classifier on each modality that a sample has, at least 0.
        subsets: whether to evaluate subsets; there are 2^M - 1, and each runs the fusion again, the encoders not.
        freeze: modalities whose encoder is left as it is, in eval mode.
        encoder_options: modality -> arguments of an encoder given by name; what the data have to say (`in_channels`,
            `vocab_size`, `mels`, `channels`, `columns`) is taken from the DataModule (`input_shapes`, `vocab_size`)
            where it is not given. Of a module that does not say how many features it gives, `width_in`.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes a scheduler from the optimizer, stepped every epoch; `cosine` anneals to zero over
            the whole training, stepped every step; None keeps the rate.

    Raises:
        ConfigError: when an argument is outside its range, something is neither given nor in the data, or a batch is
            not as above.

    Paper:
        Attention between all tokens: ViLT, arXiv:2102.03334. Modality dropout: ModDrop, arXiv:1501.00102. Losses of
        single modalities and balance of gradients: arXiv:1905.12681, arXiv:2203.15332.

    Example:
        >>> model = MultimodalFusion({"table": None}, 2, encoder_options={"table": {"columns": 3}})
        >>> model({"table": torch.zeros(4, 3)}).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        encoders: dict[str, str | nn.Module | None],
        num_classes: int | None = None,
        *,
        fusion: Literal["cross", "late", "single"] = "cross",
        single: str | None = None,
        multilabel: bool = False,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
        modality_dropout: float = 0.2,
        skip: bool = True,
        auxiliary: float = 0.3,
        subsets: bool = True,
        freeze: tuple[str, ...] = (),
        encoder_options: dict[str, dict[str, Any]] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-4),
        lr_scheduler: Literal["cosine"] | LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self._check(None, None, lr_scheduler)
        check_encoders(encoders, encoder_options or {}, freeze, fusion, single)
        check_numbers(width, heads, depth, auxiliary, {"dropout": dropout, "modality_dropout": modality_dropout})
        if num_classes is not None:
            check_classes(num_classes, multilabel)
        given = {"optimizer": optimizer, "lr_scheduler": lr_scheduler}
        left_out = [name for name, value in given.items() if not isinstance(value, str | None)]
        if any(isinstance(one, nn.Module) for one in encoders.values()):
            left_out.append("encoders")
        self.save_hyperparameters(ignore=left_out)
        self.modalities = tuple(encoders)
        self.num_classes, self.fusion, self.multilabel = num_classes, fusion, multilabel
        self.auxiliary, self.modality_dropout = auxiliary, modality_dropout
        # Of a single modality too: without it, a sample counts as one of class 0 in what is over all samples.
        self.subsets = subsets and len(encoders) > 1
        # Those that are looked at.
        self.used = (single or self.modalities[0],) if fusion == "single" else self.modalities
        self._given, self._freeze = encoders, freeze
        self._options = {name: dict((encoder_options or {}).get(name, {})) for name in self.modalities}
        self._attention, self._skip = None, skip and fusion == "cross"
        if fusion == "cross":
            self._attention = {"width": width, "depth": depth, "heads": heads, "dropout": dropout}
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self.network: FusionNetwork | None = None
        if num_classes is not None and all(
            size_is_known(name, encoders[name], self._options[name]) for name in self.used
        ):
            self.configure_model()

    # ---------------------------------------------------------------- the network

    def configure_model(self) -> None:
        """Build what is not built yet, with what the DataModule knows."""
        in_data = self._from_data("modalities", required=False)
        if in_data is not None and tuple(in_data) != self.modalities:
            raise ConfigError(
                f"encoders has {', '.join(self.modalities)}, and the data have {', '.join(in_data)}; "
                "give the same modalities in the order of the data"
            )
        if self.network is not None:
            return
        if self.num_classes is None:
            self.num_classes = int(self._from_data("num_classes"))
        check_classes(self.num_classes, self.multilabel)
        encoders = {name: self._encoder(name) for name in self.used}
        heads = self.fusion != "cross" or self.auxiliary > 0 or self._skip
        self.network = FusionNetwork(encoders, self.modalities, self.num_classes, self._attention, heads, self._skip)
        metrics = (self.used, self.num_classes, self.multilabel, self.subsets)
        self.val_metrics, self.test_metrics = SubsetMetrics(*metrics), SubsetMetrics(*metrics)
        self.hparams["num_classes"], self.hparams["encoder_options"] = self.num_classes, self._options
        self.train(self.training)

    def _encoder(self, modality: str) -> PresentEncoder:
        given, options = self._given[modality], self._options[modality]
        if not size_is_known(modality, given, options):
            found = sizes_in_data(modality, given, partial(self._from_data, required=False))
            self._options[modality] = options = {**found, **options}
        return PresentEncoder(modality, token_encoder(modality, given, **options), modality in self._freeze)

    def _built(self) -> FusionNetwork:
        if self.network is None:
            self.configure_model()
            assert self.network is not None
        return self.network

    @property
    def has_attention(self) -> bool:
        """Whether `attention_maps` can be asked for."""
        return self.fusion == "cross"

    def _batch(self, batch: Any) -> dict[str, Tensor]:
        try:
            found = as_batch(batch, self.used[0])
        except TypeError as error:
            raise ConfigError(str(error)) from error
        image = found.get("image")
        if "image" in self.used and image is not None and not image.is_floating_point():
            raise ConfigError(
                f"image is {image.dtype}; expected floating point, normalised: outside a Trainer take "
                "datamodule.on_after_batch_transfer(batch, 0)"
            )
        return found

    def _labelled(self, batch: Any) -> tuple[dict[str, Tensor], Encoded]:
        batch = self._batch(batch)
        encoded = self._built().encode(batch)
        assert self.num_classes is not None
        check_labels(batch, len(encoded.present), self.num_classes, self.multilabel)
        return batch, encoded

    def forward(self, batch: Any) -> Tensor:
        """Map a batch, as the class describes it, to logits (B, num_classes); it needs no labels."""
        network = self._built()
        return network.logits(network.encode(self._batch(batch)))

    def attention_maps(self, batch: Any) -> AttentionMap:
        """Return what attends to what in a batch, in the last layer; without gradients.

        Raises:
            ConfigError: when the fusion is no attention.
        """
        if not self.has_attention:
            raise ConfigError(f"fusion is {self.fusion!r}, which has no attention between modalities; use 'cross'")
        with torch.no_grad():
            attention = self._built().attended(self._batch(batch))
        last = {name: layers[:, -1] for name, layers in attention.tokens.items()}
        return AttentionMap(("fused", *self.used), attention.matrix[:, -1], last)

    # ---------------------------------------------------------------- the loss

    def loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the loss of each sample (B,); a subclass may override it.

        Args:
            logits: (B, num_classes).
            label: (B,) int64 class indices; with `multilabel` (B, num_classes) of 0 and 1.
        """
        if self.multilabel:
            return F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="none").mean(dim=1)
        return F.cross_entropy(logits, label, reduction="none")

    def _right(self, logits: Tensor, label: Tensor) -> Tensor:
        if self.multilabel:
            return ((logits > 0) == (label > 0.5)).float().mean(dim=1)
        return (logits.argmax(dim=1) == label).float()

    # ---------------------------------------------------------------- the steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch and log it with the accuracy."""
        batch, encoded = self._labelled(batch)
        present, alone = encoded.present, encoded.alone
        chosen = None
        if self.modality_dropout > 0 and len(self.used) > 1:
            chosen = modality_dropout(present, self.modality_dropout)
        logits = self._built().logits(encoded, chosen)
        loss = mixed_mean(lambda label: self.loss(logits, label), batch)
        if self.auxiliary > 0 and alone is not None and self.fusion != "single":

            def of_each(label: Tensor) -> Tensor:
                losses = torch.stack([self.loss(one, label) for one in alone.unbind(dim=1)], dim=1)
                return mean_of_present(losses, present)

            loss = loss + self.auxiliary * mixed_mean(of_each, batch)
        # DDP waits for the gradient of every parameter, and another process may have that modality.
        unseen = [p.sum() for encoder in encoded.idle for p in encoder.parameters() if p.requires_grad]
        if unseen:
            loss = loss + 0.0 * torch.stack(unseen).sum()
        size = len(present)
        accuracy = mixed_mean(lambda label: self._right(logits.detach(), label), batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        self.log("train/accuracy", accuracy, batch_size=size)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log now and then how much of the gradient each encoder has."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if len(self.used) > 1 and every and (self.global_step + 1) % every == 0:
            for name, share in gradient_shares(dict(self._built().encoders.items())).items():
                self.log(f"gradient_share/{name}", share, batch_size=1)

    def _evaluate(self, batch: Any, stage: str) -> None:
        batch, encoded = self._labelled(batch)
        network, label = self._built(), batch["label"]
        metrics: SubsetMetrics = getattr(self, f"{stage}_metrics")
        together = network.logits(encoded)
        outputs = [together, *(network.logits(encoded, names=names) for names in metrics.members[1:])]
        metrics.update(torch.stack(outputs, dim=1), label, encoded.present)
        loss = self.loss(together, label).mean()
        self.log(f"{stage}/loss", loss, prog_bar=stage == "val", batch_size=len(label), sync_dist=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update the validation metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update the test metrics."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the class probabilities (B, num_classes)."""
        logits: Tensor = self(batch)
        return logits.sigmoid() if self.multilabel else logits.softmax(dim=1)

    def on_validation_epoch_start(self) -> None:
        """Start counting afresh."""
        self.val_metrics.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the epoch."""
        self._log_metrics("val")

    def on_test_epoch_start(self) -> None:
        """Start counting afresh."""
        self.test_metrics.reset()

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the epoch."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        metrics: SubsetMetrics = getattr(self, f"{stage}_metrics")
        if metrics.update_count == 0:
            return
        # The values are the same on all ranks already.
        for name, value in metrics.compute().items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "accuracy", batch_size=1, sync_dist=True)

    # ---------------------------------------------------------------- the optimizer

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer and the scheduler; a subclass may override it."""
        trained = [parameter for parameter in self._built().parameters() if parameter.requires_grad]
        return make_optimizers(
            trained, self._optimizer, self._lr_scheduler, lambda: self.trainer.estimated_stepping_batches
        )
