"""Contrastive pre-training of images, texts and pairs of modalities, without labels."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from ds_lightning.functional.contrastive import info_nce, nt_xent
from ds_lightning.functional.gathering import gather_rows
from ds_lightning.modules._collapse import CollapseWatch
from ds_lightning.modules._contrastive_batch import VIEWS, sample_ids, single_input, two_sides
from ds_lightning.modules._contrastive_checks import check_method, refuse_sharded
from ds_lightning.modules._embedding import embedding_size
from ds_lightning.modules._heads import without_head
from ds_lightning.modules._key_queue import KeyQueue
from ds_lightning.modules._network_module import NetworkModule, needs_no_data
from ds_lightning.modules._temperature import Temperature
from ds_lightning.modules._tower import Tower, Towers, follow, without_batch_norm
from ds_lightning.modules.optimizers import make_optimizers
from ds_lightning.modules.retrieval_metrics import RetrievalRecall, unpadded
from ds_lightning.networks._plan_followers import with_followers
from ds_lightning.networks.pruning_plan import PruningPlan


class ContrastivePretraining(NetworkModule):
    """Train an encoder to tell samples apart: SimCLR, MoCo, SimCSE, or with two encoders CLIP.

    A batch of views holds `first` and `second`, each with one modality, and goes through one encoder; for SimCSE both
    are the same sentence, and the encoder's dropout differs. With a dictionary of two encoders, such as
    `{image: resnet8, text: text}`, a batch holds both modalities, and each has an encoder and a projector of its own.

    Logs `train/loss` at every step; every `log_every_n_steps` steps and at an epoch's first `temperature` and the
    projected embeddings' `alignment`, `uniformity`, `effective_rank` and `spread` (0: one point, 1: even on the
    sphere); the same for `val`, whose batches are not gathered over ranks. For pairs also `val/recall_at_K`,
    K = 1, 5, 10, from the first modality to the second, and `_reverse`, over the first 5,000 pairs of each rank.
    Warns once (`CollapseWarning`) at the end of an epoch, after 50 steps, when the embeddings have become one.

    The queue, the momentum encoder and a learned temperature are in the checkpoint. Under DDP negatives and keys are
    gathered; N ranks with batches of B give the gradient of one with N * B, if the network has no BatchNorm: our
    ResNets get GroupNorm here. MoCo's shuffling, which hides the batch from BatchNorm, is not there.

    Args:
        encoder: a name that `ds_lightning.networks.backbone` knows; an nn.Module that maps inputs to features (B, F)
            and has `num_features`; or two of them by modality. A module is not kept in the hyperparameters: give it
            again to `load_from_checkpoint`.
        loss: `nt_xent` (all other views are negatives, SimCLR) or `info_nce` (those of the other side are, MoCo and
            CLIP, in both directions unless there is a queue); None takes `info_nce` for pairs and with a momentum
            encoder, else `nt_xent`.
        projector: widths of the perceptron between features and loss, the last one the embedding's; empty: none.
        temperature: above 0; 0.1 to 0.5 for small images, 0.05 for sentences, 0.07 for pairs.
        learn_temperature: whether it is trained, from `temperature` on, never below 0.01, without weight decay.
        momentum_encoder: share that the slow encoder of the keys keeps at each step, in [0, 1), such as 0.99; None:
            no slow encoder. Without a queue both views are queries.
        queue_size: keys of earlier batches that are negatives too; needs `momentum_encoder`.
        hardness: weight of hard negatives (arXiv:2010.04592), at least 0; 0 weighs all alike.
        mask_same: whether samples with the same `group` in the batch, or else the same `label`, are no negatives;
            negative numbers are unknown.
        micro_batch: samples that go through the encoder at a time, for a batch that does not fit (GradCache): the
            same gradient for a second forward pass; None: all at once. BatchNorm sees micro-batches.
        chunk_size: rows of the loss that are computed at a time; None leaves it to the loss.
        gather: whether the other ranks' samples are negatives too.
        num_features: features of an encoder that is a module and does not say.
        in_channels: channels of the images; None takes the DataModule's.
        image_size: height and width in pixels; None takes the DataModule's.
        encoder_options: further arguments of an encoder given by name (`norm: batch`); of two encoders by modality.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes a scheduler from the optimizer, stepped every epoch; `cosine` anneals to zero over
            the whole training, stepped every step; None keeps the rate.

    Raises:
        ConfigError: when an argument is outside its range, or something is neither given nor in the data.

    Paper:
        SimCLR, arXiv:2002.05709; MoCo, arXiv:1911.05722; SimCSE, arXiv:2104.08821; CLIP, arXiv:2103.00020.

    Example:
        >>> model = ContrastivePretraining("resnet8", in_channels=1, projector=(64, 32))
        >>> model.embed(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        encoder: str | nn.Module | dict[str, str | nn.Module] = "resnet8",
        *,
        loss: Literal["nt_xent", "info_nce"] | None = None,
        projector: tuple[int, ...] = (512, 128),
        temperature: float = 0.1,
        learn_temperature: bool = False,
        momentum_encoder: float | None = None,
        queue_size: int = 0,
        hardness: float = 0.0,
        mask_same: bool = False,
        micro_batch: int | None = None,
        chunk_size: int | None = None,
        gather: bool = True,
        num_features: int | None = None,
        in_channels: int | None = None,
        image_size: int | None = None,
        encoder_options: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-4),
        lr_scheduler: Literal["cosine"] | LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self._check(in_channels, image_size, lr_scheduler)
        check_method(encoder, loss, projector, momentum_encoder, queue_size, hardness, micro_batch, encoder_options)
        self._encoders = encoder if isinstance(encoder, dict) else {VIEWS: encoder}
        self._options = (encoder_options or {}) if isinstance(encoder, dict) else {VIEWS: encoder_options or {}}
        plain = all(isinstance(one, str) for one in self._encoders.values())
        others = {"optimizer": optimizer, "lr_scheduler": lr_scheduler}
        left_out = [name for name, value in others.items() if not isinstance(value, str | None)]
        self.save_hyperparameters(ignore=[*left_out, *([] if plain else ["encoder"])])
        default = "info_nce" if self.pairs or momentum_encoder is not None else "nt_xent"
        self._loss: str = loss or default
        self.projector, self.num_features = tuple(projector), num_features
        self.momentum_encoder, self.queue_size = momentum_encoder, queue_size
        self.hardness, self.mask_same = hardness, mask_same
        self.micro_batch, self.chunk_size, self.gather = micro_batch, chunk_size, gather
        self.in_channels, self.image_size = in_channels, image_size
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._collapse = CollapseWatch()
        self.temperature = Temperature(temperature, learn_temperature)
        self.recall = RetrievalRecall() if self.pairs else None
        self.towers: Towers | None = None
        self.slow_towers: Towers | None = None
        self.queue: KeyQueue | None = None
        if all(needs_no_data(one, self._options.get(key, {}), in_channels) for key, one in self._encoders.items()):
            self.configure_model()

    @property
    def pairs(self) -> bool:
        """Whether there are two encoders."""
        return VIEWS not in self._encoders

    def setup(self, stage: str) -> None:
        """Refuse strategies that give each rank parts of a parameter."""
        refuse_sharded(self.trainer.strategy)

    def configure_model(self) -> None:
        """Build what is not built yet, with what the DataModule knows."""
        if self.towers is not None:
            return
        built = {modality: self._tower(modality, one) for modality, one in self._encoders.items()}
        self.towers = Towers(built, self.micro_batch)
        if self.momentum_encoder is not None:
            self.slow_towers = self.towers.slow_copy()
        if self.queue_size:
            self.queue = KeyQueue(self.queue_size, (built[VIEWS].num_features, *self.projector)[-1])
        self.hparams["in_channels"], self.hparams["image_size"] = self.in_channels, self.image_size
        self.hparams["encoder_options"] = self._options if self.pairs else self._options[VIEWS]

    def _tower(self, modality: str, encoder: str | nn.Module) -> Tower:
        if isinstance(encoder, nn.Module):
            size = embedding_size(encoder, self.num_features, type(encoder).__name__, "num_features")
            return Tower(encoder, size, self.projector)
        # With one output, so that there is a head to take off whoever made the network.
        options = without_batch_norm(encoder, self._options.get(modality, {}))
        network, options = self._network_by_name(encoder, 1, options)
        self._options = {**self._options, modality: options}
        return Tower(*without_head(network, 1), self.projector)

    def _built(self) -> Towers:
        if self.towers is None:
            self.configure_model()
        assert self.towers is not None
        return self.towers

    @property
    def encoder(self) -> nn.Module:
        """The encoder, of pairs the first one; inputs (B, ...) -> features (B, F)."""
        return self._built().side().encoder

    def embed(self, x: Tensor, modality: str | None = None) -> Tensor:
        """Return features (B, F), without the projector: what a probe or a fine-tuning starts from.

        Args:
            x: inputs (B, ...).
            modality: which of two encoders; None takes the first.
        """
        return self._built().side(modality).features(x)

    def forward(self, x: Tensor, modality: str | None = None) -> Tensor:
        """Map inputs (B, ...) to features (B, F), as `embed`."""
        return self.embed(x, modality)

    def project(self, x: Tensor, modality: str | None = None) -> Tensor:
        """Return embeddings (B, D) of length one, as the loss compares them; arguments as for `embed`."""
        return F.normalize(self._built().side(modality)(x), dim=1)

    def contrast(
        self,
        first: Tensor,
        second: Tensor,
        same: Tensor | None = None,
        *,
        gather: bool = False,
        queue: Tensor | None = None,
        queue_same: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of embeddings, a scalar; a subclass may override it.

        Args:
            first: (B, D), of any length.
            second: (B, D); row i shows what row i of `first` shows.
            same: (B,) int64; samples with the same number are no negatives.
            gather: whether the other ranks' rows are negatives too.
            queue: (K, D), further negatives of `first`.
            queue_same: (K,) int64, as `same`, of the queue.
        """
        common: dict[str, Any] = {"same": same, "hardness": self.hardness, "chunk_size": self.chunk_size}
        common |= {"temperature": self.temperature(), "gather": gather}
        if self._loss == "nt_xent":
            return nt_xent(first, second, **common)
        # A slow encoder's keys get no gradient: there the two directions are two calls.
        symmetric = self.slow_towers is None
        return info_nce(first, second, queue=queue, queue_same=queue_same, symmetric=symmetric, **common)

    def _compared(self, batch: Any, *, training: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss and both sides' embeddings (B, D)."""
        towers, slow = self._built(), self.slow_towers
        first_x, second_x = two_sides(batch, tuple(towers) if self.pairs else None)
        gather = training and self.gather
        rank = self.global_rank if gather else 0
        same = sample_ids(batch, len(first_x), first_x.device, rank) if self.mask_same else None
        if slow is None:
            first, second = towers.both(first_x, second_x)
            return self.contrast(first, second, same, gather=gather), first, second
        if self.queue is None:
            first, second = towers.both(first_x, second_x)
            with torch.no_grad():
                slow_first, slow_second = slow.both(first_x, second_x)
            pairs = ((first, slow_second), (second, slow_first))
            there, back = (self.contrast(query, key, same, gather=gather) for query, key in pairs)
            return (there + back) / 2, first, second
        first = towers.rows(first_x)
        with torch.no_grad():
            second = slow.rows(second_x)
        ids = None if same is None else self.queue.ids
        loss = self.contrast(first, second, same, gather=gather, queue=self.queue.keys, queue_same=ids)
        if training:
            self.queue.push(gather_rows(second), None if same is None else gather_rows(same))
        return loss, first, second

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch and log it, now and then with the quality of the embeddings."""
        loss, first, second = self._compared(batch, training=True)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(first))
        every = self.trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
        if batch_idx == 0 or (self.global_step + 1) % every == 0:
            self._log_figures("train", first, second)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss and the quality of the embeddings."""
        loss, first, second = self._compared(batch, training=False)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(first), sync_dist=True)
        self._log_figures("val", first, second)
        if self.recall is not None:
            rows = unpadded(self.trainer, batch_idx, len(first))
            self.recall.update(first[:rows], second[:rows])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor | dict[str, Tensor]:
        """Return features (B, F), of views the first one's; of pairs embeddings (B, D) of length one by modality."""
        if not self.pairs:
            x = batch["first"] if isinstance(batch, Mapping) and "first" in batch else batch
            return self.embed(single_input(x))
        return {modality: self.project(batch[modality], modality) for modality in self._built() if modality in batch}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the slow encoder follow, before anything can be saved in between."""
        super().optimizer_step(*args, **kwargs)
        self.temperature.clamp()
        if self.slow_towers is not None and self.towers is not None and self.momentum_encoder is not None:
            follow(self.slow_towers, self.towers, self.momentum_encoder)

    def extend_pruning_plan(self, plan: PruningPlan) -> PruningPlan:
        """Return a plan for this module with the slow encoder, which loses what the fast one loses.

        Args:
            plan: with the names of this module, such as `towers.views.encoder.stem.weight`.
        """
        names = [name for name in (*plan.shapes, *plan.attributes) if name.startswith("towers.")]
        return plan if self.slow_towers is None else with_followers(plan, {f"slow_{name}": name for name in names})

    def _log_figures(self, stage: str, first: Tensor, second: Tensor) -> None:
        figures: dict[str, Any] = {**self._collapse.update(first, second), "temperature": self.temperature()}
        for name, value in figures.items():
            shown = value.detach() if isinstance(value, Tensor) else value
            self.log(f"{stage}/{name}", shown, batch_size=len(first), sync_dist=stage == "val")

    def on_train_epoch_end(self) -> None:
        """Warn of a collapse."""
        self._collapse.check(self.global_step)

    def on_validation_epoch_start(self) -> None:
        """Start counting afresh."""
        if self.recall is not None:
            self.recall.reset()

    def on_validation_epoch_end(self) -> None:
        """Log how often the partner of a pair is found."""
        # Another rank may have pairs where this one has none.
        if self.recall is None or (self.recall.update_count == 0 and self.trainer.world_size == 1):
            return
        # The values are the same on all ranks already.
        for name, value in self.recall.compute().items():
            self.log(f"val/{name}", value, prog_bar=name == "recall_at_1", batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer and the scheduler; a subclass may override it."""
        groups = self.temperature.apart([p for p in self._built().parameters() if p.requires_grad])
        return make_optimizers(
            groups, self._optimizer, self._lr_scheduler, lambda: self.trainer.estimated_stepping_batches
        )
