"""Transfer learning: the simple baseline that every method of few-shot learning has to beat."""

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F

from ds_lightning.errors import ConfigError
from ds_lightning.functional.batch import input_of
from ds_lightning.modules._embedding import (
    at_least_float,
    check_embedding,
    check_every_class,
    class_indices,
    embed,
    embedding_size,
    number_of_ways,
)
from ds_lightning.modules._task_heads import (
    TaskHeads,
    fit_logistic,
    fit_steps,
    make_optimizer,
    new_heads,
    task_loss,
)
from ds_lightning.modules.few_shot import FewShotModule, gradients_allowed, one_two_five


class TransferLearning(FewShotModule):
    """Pre-train on all training classes together, then give each new task a new head and fine-tune.

    Training is ordinary classification of the support and query samples of the training episodes over all training
    classes, so the batches need `classes`. In validation, test and `adapt`, a new head is fitted to the support set,
    the network in eval mode (BatchNorm keeps the statistics of the training); `train/accuracy` counts only a task's
    own classes as possible, so that it can be compared with the other methods'.

    Logs what `FewShotModule` says, after 0, 1, 2, 5, 10, 20, ... and all steps.

    Args:
        network: a name that `ds_lightning.networks.backbone` knows, or an nn.Module that maps inputs to embeddings
            (B, D), which is not kept in the hyperparameters: give it again to `load_from_checkpoint`.
        num_train_classes: classes that are pre-trained on, at least 2; None takes the DataModule's `train_classes`.
        embedding: D; None takes the network's features, without a last linear layer (torchvision's networks, and
            modules without an attribute `num_features`, need a number).
        finetune: `head` leaves the network as it is, all tasks at once; `all` also trains a copy of it for each
            task, one after the other.
        head: `linear`; `cosine` (10 times the cosine to a weight that begins at the class's mean direction);
            `logistic`: linear, fitted to the optimum, needs `weight_decay` above 0 and `finetune` head.
        steps: gradient steps on the whole support set, at least 0; `logistic` does not use it.
        lr: their rate, above 0.
        finetune_optimizer: `adam`, or `sgd` with momentum 0.9.
        weight_decay: of the fine-tuning, at least 0; for `logistic` the factor of |weight|^2 / 2.
        in_channels: channels of the images; None takes the DataModule's.
        image_size: height and width in pixels; None takes the DataModule's.
        network_options: further arguments of a network given by name.
        optimizer: makes the optimizer of the pre-training from the parameters.
        lr_scheduler: makes its scheduler, stepped every epoch; `cosine` anneals to zero; None keeps the rate.

    Raises:
        ConfigError: when an argument is outside its range, or something is neither given nor in the data.

    Paper:
        A Closer Look at Few-shot Classification, arXiv:1904.04232 (Baseline and Baseline++); the frozen network with
        logistic regression, arXiv:2003.11539.

    Example:
        >>> model = TransferLearning("conv4", 64, in_channels=1, image_size=28, steps=10)
        >>> support = {"image": torch.randn(6, 1, 28, 28), "label": torch.tensor([0, 0, 1, 1, 2, 2])}
        >>> model.adapt(support)(torch.randn(4, 1, 28, 28)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        network: str | nn.Module = "conv4",
        num_train_classes: int | None = None,
        *,
        embedding: int | None = None,
        finetune: Literal["head", "all"] = "head",
        head: Literal["linear", "cosine", "logistic"] = "linear",
        steps: int = 100,
        lr: float = 0.01,
        finetune_optimizer: Literal["adam", "sgd"] = "adam",
        weight_decay: float = 0.0,
        in_channels: int | None = None,
        image_size: int | None = None,
        network_options: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        lr_scheduler: Literal["cosine"] | LRSchedulerCallable | None = None,
    ) -> None:
        if num_train_classes is not None and num_train_classes < 2:
            raise ConfigError(f"num_train_classes is {num_train_classes}; expected at least 2")
        check_embedding(embedding)
        for name, value, choices in (
            ("finetune", finetune, ("head", "all")),
            ("head", head, ("linear", "cosine", "logistic")),
            ("finetune_optimizer", finetune_optimizer, ("adam", "sgd")),
        ):
            if value not in choices:
                raise ConfigError(f"{name} is {value!r}; expected {' or '.join(choices)}")
        if steps < 0:
            raise ConfigError(f"steps is {steps}; expected at least 0")
        if not (math.isfinite(lr) and lr > 0):
            raise ConfigError(f"lr is {lr}; expected a rate above 0")
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise ConfigError(f"weight_decay is {weight_decay}; expected at least 0")
        if head == "logistic" and (weight_decay == 0 or finetune == "all"):
            raise ConfigError(
                f"head is 'logistic' with weight_decay {weight_decay} and finetune {finetune!r}; expected a "
                "weight_decay above 0, without which separable classes have no optimum, and finetune 'head'"
            )
        self.num_train_classes = num_train_classes
        self.embedding = embedding
        self.finetune = finetune
        self.head_kind: Literal["linear", "cosine", "logistic"] = head
        self.recorded_steps = None if head == "logistic" else one_two_five(steps)
        self.lr = lr
        self.finetune_optimizer: Literal["adam", "sgd"] = finetune_optimizer
        self.weight_decay = weight_decay
        super().__init__(
            network,
            in_channels=in_channels,
            image_size=image_size,
            network_options=network_options,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
        # On the device with the rest, but the data's, not the checkpoint's.
        self._place: Tensor | None
        self.register_buffer("_place", None, persistent=False)

    # ---------------------------------------------------------------- pre-training

    def _num_outputs(self) -> int:
        return self.embedding or 0

    def configure_model(self) -> None:
        """Build what is not built yet: the network, and the head over all training classes."""
        super().configure_model()
        if hasattr(self, "train_head"):
            return
        if self.num_train_classes is None:
            # Only a fit needs this head.
            fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
            classes = self._from_data("train_classes", wanted="num_train_classes", required=fitting)
            if classes is None:
                return
            self.num_train_classes = len(classes)
        network = self._built()
        size = embedding_size(network, self.embedding, self._network_name or type(network).__name__)
        self.train_head = nn.Linear(size, self.num_train_classes)
        self.hparams["num_train_classes"] = self.num_train_classes

    def setup(self, stage: str) -> None:
        """Learn which of the data's classes are trained on."""
        classes = self._from_data("train_classes", required=False)
        if classes and all(isinstance(index, int) for index in classes):
            place = torch.full((max(classes) + 1,), -1)
            place[torch.tensor(list(classes))] = torch.arange(len(classes))
            self._place = place

    def _task_classes(self, batch: Mapping[str, Any]) -> Tensor:
        if "classes" not in batch:
            raise ConfigError(
                f"the batch has the keys {sorted(batch)}; TransferLearning needs `classes` (T, ways), the index "
                "of each task's classes among all, to train on all of them together"
            )
        classes: Tensor = batch["classes"]
        return classes if self._place is None else self._place[classes]

    def episode_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy over all training classes, and the query's logits (T, M, ways) of its own classes.

        Args:
            batch: `support` and `query`, each a batch with a leading dimension of tasks, and `classes` (T, ways).
        """
        classes = self._task_classes(batch)
        parts = embed(self._built(), batch["support"], batch["query"])
        logits = [self.train_head(part) for part in parts]
        labels = [classes.gather(1, class_indices(self, batch[part])) for part in ("support", "query")]
        loss = F.cross_entropy(
            torch.cat([part.flatten(0, 1) for part in logits]), torch.cat([part.flatten() for part in labels])
        )
        query = logits[1]
        return loss, query.gather(2, classes.unsqueeze(1).expand(-1, query.shape[1], -1))

    # ---------------------------------------------------------------- a new task

    def predictions(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the logits (S, T, M, ways) of the query sets after `recorded_steps`, without a graph.

        Args:
            batch: `support` and `query`, each a batch with a leading dimension of tasks.
        """
        support, query = batch["support"], batch["query"]
        label = class_indices(self, support)
        ways = number_of_ways(batch, label)
        with gradients_allowed():
            if self.finetune == "head":
                with torch.no_grad():
                    inputs, queries = (at_least_float(part) for part in embed(self._built(), support, query))
                with torch.autocast(inputs.device.type, enabled=False):
                    return torch.stack([heads(queries).detach() for heads in self._fitted(inputs, label, ways)])
            x, x_query = input_of(support), input_of(query)
            tasks = [self._tuned(x[task], label[task], ways, x_query[task])[2] for task in range(len(x))]
            return torch.stack(tasks, dim=1)

    def _fitted(self, embeddings: Tensor, label: Tensor, ways: int) -> list[TaskHeads]:
        """Return the heads of all tasks, after each of the recorded steps."""
        if self.head_kind == "logistic":
            return [fit_logistic(embeddings, label, ways, self.weight_decay)]
        heads = new_heads(embeddings, label, ways, self.head_kind)
        assert self.recorded_steps is not None
        return fit_steps(heads, embeddings, label, self._finetuner(heads), self.recorded_steps)

    def _finetuner(self, *modules: nn.Module) -> torch.optim.Optimizer:
        parameters = [value for module in modules for value in module.parameters() if value.requires_grad]
        return make_optimizer(parameters, self.finetune_optimizer, self.lr, self.weight_decay)

    def _tuned(
        self, x: Tensor, label: Tensor, ways: int, x_query: Tensor | None = None
    ) -> tuple[nn.Module, TaskHeads, Tensor]:
        """Return one task's network and head after all steps, and the logits (S, M, ways) of its queries."""
        assert self.recorded_steps is not None
        network = copy.deepcopy(self._built()).eval()
        # Autocast keeps copies of the weights: without a graph when made here, and too old after a step.
        with torch.no_grad():
            heads = new_heads(at_least_float(network(x))[None], label[None], ways, self.head_kind)
        torch.clear_autocast_cache()
        optimizer = self._finetuner(network, heads)
        outputs = []
        for step in range(self.recorded_steps[-1] + 1):
            if step > 0:
                optimizer.zero_grad()
                torch.autograd.backward(task_loss(heads(network(x)[None]), label[None]))
                optimizer.step()
                torch.clear_autocast_cache()
            if x_query is not None and step in self.recorded_steps:
                with torch.no_grad():
                    outputs.append(at_least_float(heads(network(x_query)[None])[0]))
                torch.clear_autocast_cache()
        return network, heads, torch.stack(outputs) if outputs else x.new_empty(0)

    def adapt(self, support: Mapping[str, Tensor]) -> nn.Module:
        """Return a network of its own that tells a task's classes apart, in eval mode: inputs (M, ...) -> logits.

        Args:
            support: batch of the labelled samples, (N, ...) each; labels 0 to ways - 1, each at least once.

        Raises:
            ValueError: when a class has no sample.
        """
        ways = check_every_class(class_indices(self, support))
        with gradients_allowed():
            x = input_of(support).to(self.device, copy=True)
            label = class_indices(self, support).to(self.device, copy=True)
            if self.finetune == "all":
                network, heads, _ = self._tuned(x, label, ways)
            else:
                network = copy.deepcopy(self._built()).eval()
                with torch.no_grad():
                    embeddings = at_least_float(network(x))[None]
                heads = self._fitted(embeddings, label[None], ways)[-1]
        return _OneTask(network, heads).eval().requires_grad_(False)


class _OneTask(nn.Module):
    """A task's network and its head."""

    def __init__(self, network: nn.Module, heads: TaskHeads) -> None:
        super().__init__()
        self.network = network
        self.head = heads

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.network(x)[None])[0]
        return logits
