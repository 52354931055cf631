"""What benchmarks/continual.py compares with: the peers' Fisher, training on everything so far, Adam reset."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from ds_lightning.callbacks._tasks import ends_task
from ds_lightning.datamodules import TaskStream
from ds_lightning.datamodules.image_data import as_it_is
from ds_lightning.datamodules.task_samples import TaskSamples
from ds_lightning.functional.batch import input_of, restrict


class FisherBatches(TaskStream):
    """Gives a task's training samples, which a Fisher is taken from, in batches of another size."""

    fisher_batch_size: int | None = None

    def task_dataloader(self, task: int, split: str) -> DataLoader[Any]:
        if split != "train" or self.fisher_batch_size is None:
            return super().task_dataloader(task, split)
        loader = super().task_dataloader(task, split)
        return DataLoader(loader.dataset, self.fisher_batch_size, collate_fn=as_it_is, generator=loader.generator)


class Joint(TaskStream):
    """Trains on the samples of all tasks so far: an upper bound."""

    def train_dataloader(self) -> DataLoader[Any]:
        samples = TaskSamples([self._table.part(number, "train") for number in range(self.current_task + 1)])
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        order = torch.Generator().manual_seed(1000 * self.seed + epoch)
        size = self.data[0].batch_size
        return DataLoader(samples, size, sampler=RandomSampler(samples, generator=order), collate_fn=as_it_is)


class ResetOptimizer(pl.Callback):
    """Makes the optimizer forget its moments at the end of a task."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if ends_task(trainer):
            for optimizer in trainer.optimizers:
                optimizer.state.clear()


class BatchFisherEWC(pl.Callback):
    """EWC with squared gradients of mini-batch means for a Fisher, as avalanche 0.6.0 has it (separate anchors).

    The penalty is `strength * sum_tasks F (theta - theta*)^2`; the sum over the tasks is kept as two tensors.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.importance: list[Tensor] = []
        self.pull: list[Tensor] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for parameter, importance, pull in zip(pl_module.parameters(), self.importance, self.pull, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(importance * parameter.detach() - pull, alpha=2 * self.strength)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not ends_task(trainer):
            return
        stream = trainer.datamodule
        parameters = list(pl_module.parameters())
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        loader = stream.task_dataloader(stream.current_task, "train")
        was_training = pl_module.training
        pl_module.eval()
        for raw in loader:
            batch = {name: tensor.to(pl_module.device) for name, tensor in raw.items()}
            logits = restrict(pl_module(input_of(batch)), batch)
            gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, batch["label"]), parameters)
            torch._foreach_addcmul_(totals, gradients, gradients, 1 / len(loader))
        pl_module.train(was_training)
        anchors = [parameter.detach().clone() for parameter in parameters]
        if not self.importance:
            self.importance = [torch.zeros_like(total) for total in totals]
            self.pull = [torch.zeros_like(total) for total in totals]
        torch._foreach_add_(self.importance, totals)
        torch._foreach_addcmul_(self.pull, totals, anchors)
