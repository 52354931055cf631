"""What is logged when channels go: costs, accuracy on some validation batches, and pictures."""

from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from ds_lightning.functional.batch import input_of, labelled_batch, restrict
from ds_lightning.networks.channel_costs import count_macs, latency, saved_bytes

from ._eval_mode import eval_mode
from ._figures import figure_writers
from ._log_step import log_step
from ._pruning_checks import Inputs, one_sample, samples_in
from ._pruning_picture import channel_bars, kept_channels, pareto
from ._tasks import in_order

_PREFIX = "pruning/"


def costs(network: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Return the network's multiply-accumulates of a sample, parameters, bytes, and seconds for one sample."""
    args, kwargs = inputs
    first, options = one_sample(inputs)
    return {
        "macs": count_macs(network, *args, **kwargs) / samples_in(inputs),
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "size": saved_bytes(network),
        "latency": latency(network, *first, **options),
    }


class PruningReport:
    """Costs and accuracies of the removals of a fit, for its loggers; nothing of the fit changes.

    Args:
        batches: of the validation loader on which the accuracy is measured, at most, >= 0.
    """

    def __init__(self, batches: int) -> None:
        self._batches = batches
        self._told = False
        #: Of each removal: shares of the MACs, and accuracies where they could be measured.
        self.points: list[dict[str, float]] = []

    def accuracy(self, trainer: pl.Trainer, module: pl.LightningModule) -> float | None:
        """Return the accuracy over all ranks, the same on each; None where it can't be measured."""
        # The other ranks may have no logger.
        if not self._batches or not trainer.strategy.broadcast(bool(trainer.loggers), src=0):
            return None
        right = seen = 0
        reason, stage = None, trainer.state.stage
        with isolate_rng(include_cuda=module.device.type == "cuda"):
            try:
                trainer.state.stage = RunningStage.VALIDATING  # the hooks of a batch may ask for it
                right, seen = self._counts(trainer, module)
            except Exception as error:  # a user's loader and forward may raise anything
                reason = " ".join(str(error).split())[:200] or type(error).__name__
            finally:
                trainer.state.stage = stage
        # 64 bits are not everywhere; 32 hold whole numbers up to 16 million.
        counts = torch.tensor([right, seen, float(reason is not None)], device=trainer.strategy.root_device)
        total: Tensor = trainer.strategy.reduce(counts, reduce_op="sum")
        all_right, all_seen, failed = total.tolist()
        if not failed and all_seen:
            return float(all_right / all_seen)
        if not self._told:
            self._told = True
            reason = reason or ("another rank can't measure it" if failed else "there are no labelled samples")
            rank_zero_info(f"ProgressivePruning logs no accuracy: {reason}")
        return None

    def removed(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        network: nn.Module,
        costs: dict[str, float],
        shares: tuple[float, float],
        before: float | None,
    ) -> None:
        """Measure behind a removal, and log.

        Args:
            trainer: in `on_train_batch_end`.
            module: with the smaller network.
            network: the smaller network.
            costs: its.
            shares: of the MACs at the beginning, before and after the removal.
            before: the accuracy in front of it, which also is what came back since the one before.
        """
        accuracies = {"before": before, "after": self.accuracy(trainer, module)}
        if self.points and before is not None:
            self.points[-1]["recovered"] = accuracies["recovered"] = before
        measured = {name: value for name, value in accuracies.items() if value is not None}
        point = {name: value for name, value in measured.items() if name != "recovered"}
        self.points.append({"share_before": shares[0], "share": shares[1], **point})
        if not trainer.is_global_zero:
            return
        metrics = {
            "macs": costs["macs"],
            "params": costs["params"],
            "macs_share": shares[1],
            "size_mb": costs["size"] / 1e6,
            "latency_ms": 1e3 * costs["latency"],
            **{f"accuracy_{name}": value for name, value in measured.items()},
        }
        self._log(trainer, metrics, log_step(trainer)[0])
        if writers := figure_writers(trainer):
            figure = channel_bars(kept_channels(network), f"channels with {shares[1]:.1%} of the MACs")
            for log_figure in writers:
                log_figure(figure, f"{_PREFIX}channels_{len(self.points)}")

    def end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure at the end of a fit what came back since the last removal, and draw all of it."""
        if not self.points:
            return
        now = self.accuracy(trainer, module)
        if now is not None:
            self.points[-1]["recovered"] = now
        if not trainer.is_global_zero:
            return
        if now is not None:
            step = max(trainer.fit_loop.epoch_loop._batches_that_stepped - 1, 0)
            self._log(trainer, {"accuracy_recovered": now}, step)
        if any("after" in point for point in self.points) and (writers := figure_writers(trainer)):
            figure = pareto(self.points)
            for log_figure in writers:
                log_figure(figure, f"{_PREFIX}pareto")

    @staticmethod
    def _log(trainer: pl.Trainer, metrics: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({f"{_PREFIX}{name}": value for name, value in metrics.items()}, step=step)

    def _counts(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[int, int]:
        """Return how many samples are right, and of how many, in this rank's share of the batches."""
        loader = _validation_loader(trainer)
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        right = seen = 0
        with eval_mode(module), torch.no_grad(), trainer.precision_plugin.forward_context():
            # Not the loader itself: its generator and its workers belong to the validation.
            batches = in_order(loader, None if size is None else size * self._batches)
            for number, raw in enumerate(islice(batches, self._batches)):
                if number % trainer.world_size == trainer.global_rank:
                    good = _is_right(trainer, module, raw)
                    right, seen = right + int(good.sum()), seen + len(good)
        return right, seen


def _validation_loader(trainer: pl.Trainer) -> DataLoader[Any]:
    """Return the first validation loader."""
    loaders = tree_leaves(trainer.val_dataloaders)
    if not loaders or loaders[0] is None:
        raise ValueError("this fit has no validation loader (yet)")
    loader = loaders[0]
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = type(getattr(loader, "dataset", loader)).__name__
        raise ValueError(f"the validation data are a {kind}, which can't be read beside the validation")
    return loader


def _is_right(trainer: pl.Trainer, module: pl.LightningModule, raw: Any) -> Tensor:
    """Return which of a batch's labelled samples have the largest output at their label."""
    batch = trainer.precision_plugin.convert_input(raw)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    found = labelled_batch(batch)
    output, label = module(input_of(found)), found["label"]
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2 or len(output) != len(label):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{type(module).__name__} gives {got} and not logits (B, classes)")
    if len(label) and int(label.max()) >= output.shape[1]:
        raise ValueError(f"the batch has the label {int(label.max())}, and there are {output.shape[1]} outputs")
    known = label >= 0
    return (restrict(output, found).argmax(dim=1) == label)[known]
