"""Model-agnostic meta-learning: weights from which a few gradient steps learn a new task."""

import copy
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from ds_lightning.errors import ConfigError
from ds_lightning.functional.batch import input_of
from ds_lightning.functional.maml import (
    adapted_outputs,
    default_loss,
    inner_adapt,
    multi_step_weights,
    use_batch_statistics,
)
from ds_lightning.modules._embedding import at_least_float
from ds_lightning.modules.few_shot import FewShotModule
from ds_lightning.networks._plan_followers import with_followers
from ds_lightning.networks.pruning_plan import PruningPlan


class MAML(FewShotModule):
    """Train a network so that a few gradient steps on a task's support set predict its query set.

    One training step adapts to every task of the batch, each from the network's own weights, and differentiates the
    mean loss of the query sets through those steps. Validation and test adapt too, without a graph. Loss:
    cross-entropy of class indices, mean squared error of real targets.

    BatchNorm and InstanceNorm use the statistics of each batch always and keep none (the paper's setting: the
    predictions of a query set depend on each other), so nothing leaks from task to task; the network given is
    changed so. Networks with GroupNorm predict every query for itself.

    Under `bf16-mixed` the inner loss is computed in 32 bits. Under `16-mixed` the gradients of the inner steps are not
    scaled, as the scaler sees the outer loss alone: small ones become 0. Prefer `bf16-mixed`.

    Args:
        network: name of one of our networks, or an nn.Module that maps inputs to outputs.
        ways: classes of a task, at least 2; None takes the DataModule's.
        inner_lr: rate of the inner steps, above 0; where rates are learned, their beginning. The paper takes 0.4
            (Omniglot, 1 step), 0.01 (miniImageNet, 5 steps; sinusoid, 1 step).
        inner_steps: steps in training, at least 1.
        order: 2 differentiates through the steps; 1 does not (first-order MAML: cheaper, often nearly as good).
        adapt: `all` parameters; the `head` alone (ANIL: the network has a part of this name); or patterns of
            parameter names such as `["head.*", "features.3.*"]`.
        learn_inner_lr: True learns a rate for each single weight (Meta-SGD), `per_step` one for each tensor and step
            (MAML++); they are parameters of this module, trained by its optimizer, in its checkpoint.
        multi_step_loss: also takes the query losses after each earlier step, with weights that fall over this number
            of epochs, or, when True, over the whole training (MAML++); steadier at more than one step.
        test_steps: steps in validation, test and `adapt`, at least 0; None is `inner_steps`.
        checkpoint_steps: memory nearly flat in `inner_steps`, for a third to a half more time.
        tasks: `vmap` (all tasks at once), `loop`, or `auto`: see `ds_lightning.functional.adapted_outputs`.
        in_channels: channels of the images; None takes the DataModule's.
        image_size: height and width in pixels; None takes the DataModule's.
        network_options: further arguments of a network given by name.
        optimizer: makes the optimizer of the meta-training from the parameters.
        lr_scheduler: makes its scheduler, stepped every epoch; `cosine` anneals to zero; None keeps the rate.

    Raises:
        ConfigError: when an argument is outside its range, or a pattern matches no parameter.

    Paper:
        arXiv:1703.03400; MAML++ arXiv:1810.09502; Meta-SGD arXiv:1707.09835; ANIL arXiv:1909.09157.

    Example:
        >>> model = MAML(nn.Linear(2, 3), ways=3, inner_lr=0.5)
        >>> support = {"table": torch.randn(6, 2), "label": torch.tensor([0, 0, 1, 1, 2, 2])}
        >>> model.adapt(support)(torch.randn(4, 2)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        network: str | nn.Module = "conv4",
        ways: int | None = None,
        *,
        inner_lr: float = 0.1,
        inner_steps: int = 5,
        order: Literal[1, 2] = 2,
        adapt: Literal["all", "head"] | list[str] = "all",
        learn_inner_lr: bool | Literal["per_step"] = False,
        multi_step_loss: bool | int = False,
        test_steps: int | None = None,
        checkpoint_steps: bool = False,
        tasks: Literal["auto", "vmap", "loop"] = "auto",
        in_channels: int | None = None,
        image_size: int | None = None,
        network_options: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        lr_scheduler: Literal["cosine"] | LRSchedulerCallable | None = None,
    ) -> None:
        if not (math.isfinite(inner_lr) and inner_lr > 0):
            raise ConfigError(f"inner_lr is {inner_lr}; expected a rate above 0")
        if inner_steps < 1:
            raise ConfigError(f"inner_steps is {inner_steps}; expected at least 1")
        if order not in (1, 2):
            raise ConfigError(f"order is {order}; expected 1 (no second derivatives) or 2")
        if adapt not in ("all", "head") and (isinstance(adapt, str) or not adapt):
            raise ConfigError(f"adapt is {adapt!r}; expected 'all', 'head' or a list of patterns of parameter names")
        if learn_inner_lr not in (True, False, "per_step"):
            raise ConfigError(f"learn_inner_lr is {learn_inner_lr!r}; expected True, False or 'per_step'")
        if multi_step_loss is not False and multi_step_loss < 1:
            raise ConfigError(f"multi_step_loss is {multi_step_loss}; expected True, False or epochs, at least 1")
        if test_steps is not None and test_steps < 0:
            raise ConfigError(f"test_steps is {test_steps}; expected at least 0, or nothing to take inner_steps")
        if tasks not in ("auto", "vmap", "loop"):
            raise ConfigError(f"tasks is {tasks!r}; expected 'auto', 'vmap' or 'loop'")
        # Before the base's constructor, which may build the network already, and with it the rates.
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.order = order
        self.test_steps = inner_steps if test_steps is None else test_steps
        self.checkpoint_steps = checkpoint_steps
        self.tasks: Literal["auto", "vmap", "loop"] = tasks
        self._adapt = adapt
        self._learn_inner_lr = learn_inner_lr
        self._multi_step_loss = multi_step_loss
        self._names: tuple[str, ...] | None = None
        super().__init__(
            network,
            ways,
            in_channels=in_channels,
            image_size=image_size,
            network_options=network_options,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )

    # ---------------------------------------------------------------- what adapts, and how fast

    def configure_model(self) -> None:
        """Build what is not built yet: the network, and the rates that are learned."""
        super().configure_model()
        if self._names is not None:
            return
        network = use_batch_statistics(self._built())
        self._names = _matching(network, self._adapt)
        if self._learn_inner_lr is False:
            return
        rates = {}
        for name in self._names:
            value = network.get_parameter(name)
            shape = (self.inner_steps, *[1] * value.dim()) if self._learn_inner_lr == "per_step" else value.shape
            rates[_key(name)] = nn.Parameter(torch.full(shape, self.inner_lr).to(value))
        self.inner_rates = nn.ParameterDict(rates)

    def extend_pruning_plan(self, plan: PruningPlan) -> PruningPlan:
        """Return a plan for this module with the learned rates, which lose what their weights lose.

        Args:
            plan: with the names of this module, such as `network.head.weight`.
        """
        if self._learn_inner_lr is not True or self._names is None:
            return plan
        return with_followers(plan, {f"inner_rates.{_key(name)}": f"network.{name}" for name in self._names})

    def _how(self) -> dict[str, Any]:
        """Return the arguments that every adaptation takes."""
        self._built()
        assert self._names is not None
        rates: float | dict[str, Tensor] = self.inner_lr
        if self._learn_inner_lr is not False:
            rates = {name: self.inner_rates[_key(name)] for name in self._names}
        return {"inner_lr": rates, "adapt": self._names, "loss_fn": default_loss}

    # ---------------------------------------------------------------- the episodes

    def _outputs(self, batch: Mapping[str, Mapping[str, Tensor]], after: Sequence[int], order: int) -> Tensor:
        """Return the outputs (S, T, M, ...) of the query sets after each number of steps."""
        support = batch["support"]
        return adapted_outputs(
            self._built(),
            (input_of(support), _target(support)),
            input_of(batch["query"]),
            after=after,
            order=order,
            checkpoint=self.checkpoint_steps,
            tasks=self.tasks,
            **self._how(),
        )

    def episode_loss(self, batch: Mapping[str, Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the loss of the query sets after adaptation, a scalar, and their outputs (T, M, ...).

        Args:
            batch: `support` and `query`, each a batch with a leading dimension of tasks.
        """
        weights = self._step_weights()
        outputs = self._outputs(batch, range(self.inner_steps - len(weights) + 1, self.inner_steps + 1), self.order)
        y = _target(batch["query"]).flatten(0, 1)
        losses = [default_loss(at_least_float(output.flatten(0, 1)), y) for output in outputs]
        total = sum(
            (weight * loss for weight, loss in zip(weights, losses, strict=True)), start=losses[0].new_zeros(())
        )
        return total, outputs[-1]

    def _step_weights(self) -> list[float]:
        """Return the weights of the losses after the last steps, up to the last."""
        if self._multi_step_loss is False or self.inner_steps == 1:
            return [1.0]
        epochs = self.trainer.max_epochs if self._multi_step_loss is True else self._multi_step_loss
        if epochs is None or epochs < 1:
            raise ConfigError(
                f"multi_step_loss is True and the Trainer's max_epochs {epochs}; give the number of epochs to one"
            )
        return multi_step_weights(self.inner_steps, min(self.current_epoch / epochs, 1.0)).tolist()

    def predictions(self, batch: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Return the outputs (S, T, M, ...) of the query sets after 0, 1, ..., `test_steps` steps, without a graph.

        Args:
            batch: as for `episode_loss`.
        """
        with torch.no_grad():
            return self._outputs(batch, range(self.test_steps + 1), order=1)

    def adapt(self, support: Mapping[str, Tensor]) -> nn.Module:
        """Return a network of its own that has learned one task, in eval mode: inputs (M, ...) -> outputs (M, ...).

        Args:
            support: batch of the labelled samples, (N, ...) each; labels below `ways`.

        Raises:
            ValueError: when a label is none of the network's classes.
        """
        label = support.get("label")
        if label is not None and self.ways is not None and not 0 <= int(label.min()) <= int(label.max()) < self.ways:
            raise ValueError(
                f"label has values from {int(label.min())} to {int(label.max())}; expected 0 to {self.ways - 1}, "
                f"as the network was trained with {self.ways} ways"
            )
        # A user may well be in inference mode, where nothing could be learned.
        with torch.inference_mode(False), torch.no_grad():
            how = self._how()
            network = copy.deepcopy(self._built()).eval()
            device = next(network.parameters()).device
            x, y = (tensor.to(device, copy=True) for tensor in (input_of(support), _target(support)))
            adapted = inner_adapt(network, (x, y), steps=self.test_steps, order=1, **how)
            for name, value in network.named_parameters():
                value.copy_(adapted[name])
        return network.requires_grad_(False)


def _target(batch: Mapping[str, Tensor]) -> Tensor:
    for name in ("label", "target"):
        if name in batch:
            return batch[name]
    raise ValueError(f"the batch has the keys {sorted(batch)}; expected `label` or `target` among them")


def _key(name: str) -> str:
    # A ParameterDict takes no dots.
    return name.replace(".", "/")


def _matching(network: nn.Module, adapt: str | list[str]) -> tuple[str, ...]:
    """Return the names of the parameters that adapt, of those that are trained."""
    names = tuple(name for name, value in network.named_parameters() if value.requires_grad)
    if adapt == "all":
        return names
    patterns = ["head.*"] if adapt == "head" else list(adapt)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[-6:])
            raise ConfigError(
                f"adapt is {adapt!r}, and no trained parameter of the network is named {pattern!r}; "
                f"give patterns of its names, which end with {shown}"
            )
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
