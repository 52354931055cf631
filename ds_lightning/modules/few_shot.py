"""What all methods of few-shot learning share: the network, the steps and the figures over episodes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from ds_lightning.errors import ConfigError
from ds_lightning.modules._embedding import at_least_float
from ds_lightning.modules._network_module import NetworkModule, named_network
from ds_lightning.modules.episode_metrics import EpisodeMean
from ds_lightning.modules.optimizers import make_optimizers

# `support` and `query` hold batches with a leading dimension of tasks; `classes` holds (T, ways) indices.
Episodes = Mapping[str, Any]


class FewShotModule(NetworkModule):
    """The base of `MAML`, `PrototypicalNetwork` and `TransferLearning`: one module family, one DataModule.

    A batch holds `support` and `query`, each a batch with a leading dimension of tasks: `image` (T, N, C, H, W) or
    another modality, and `label` (T, N) in 0..ways-1, or `target` (T, N, ...) for regression. It may hold `classes`
    (T, ways), the data's own indices of each task's classes.

    Logs `train/loss` and `train/accuracy`, and for `val` and `test`, over all episodes and ranks: `loss`,
    `accuracy`, `accuracy_interval` (half of the 95% interval of the mean), `episodes`, and `accuracy_after_K` for
    the adaptation steps K where a method has some. For regression `mse` takes the place of `accuracy`.
    Validation and test adapt with gradients although Lightning runs them in inference mode.

    Args:
        network: a name that `ds_lightning.networks.backbone` knows, or an nn.Module, which is not kept in the
            hyperparameters: give it again to `load_from_checkpoint`.
        ways: classes of a task, at least 2; None takes the DataModule's.
        in_channels: channels of the images; None takes the DataModule's.
        image_size: height and width in pixels; None takes the DataModule's.
        network_options: further arguments of a network given by name.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes a scheduler from the optimizer, stepped every epoch; `cosine` anneals to zero over
            the whole training, stepped every step; None keeps the rate.

    Raises:
        ConfigError: when an argument is outside its range, or something is neither given nor in the data.
    """

    #: Steps after which `predictions` gives outputs, one for each entry of its first dimension; None: 0, 1, 2, ...
    recorded_steps: tuple[int, ...] | None = None

    def __init__(
        self,
        network: str | nn.Module = "conv4",
        ways: int | None = None,
        *,
        in_channels: int | None = None,
        image_size: int | None = None,
        network_options: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        lr_scheduler: Literal["cosine"] | LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if ways is not None and ways < 2:
            raise ConfigError(f"ways is {ways}; expected at least 2, or nothing to take the DataModule's")
        self._check(in_channels, image_size, lr_scheduler)
        given = {"network": network, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        left_out = [name for name, value in given.items() if not isinstance(value, str | None)]
        # None and the DataModule's number of ways would be a conflict to Lightning, which logs both.
        self.save_hyperparameters(ignore=[*left_out, *(["ways"] if ways is None else [])])
        self.ways = ways
        self.in_channels = in_channels
        self.image_size = image_size
        self._network_name = network if isinstance(network, str) else None
        self._network_options = network_options or {}
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self.val_loss, self.test_loss = EpisodeMean(), EpisodeMean()
        self.val_score, self.test_score = EpisodeMean(), EpisodeMean()
        self.network: nn.Module | None = network if isinstance(network, nn.Module) else None
        if self.network is not None or (self._num_outputs() is not None and in_channels and image_size):
            self.configure_model()

    # ---------------------------------------------------------------- the network

    def _num_outputs(self) -> int | None:
        """Return the outputs that a network given by name gets; None where only the data can tell."""
        return self.ways

    def configure_model(self) -> None:
        """Build what is not built yet, with what the DataModule knows."""
        if self.network is not None:
            return
        assert self._network_name is not None
        if self._num_outputs() is None:
            self.ways = self._from_data("ways")
        self.in_channels, self.image_size = self._image_shape(self.in_channels, self.image_size)
        outputs = self._num_outputs()
        assert outputs is not None
        self.network = named_network(
            self._network_name, outputs, self.in_channels, self.image_size, self._network_options
        )
        for name in ("ways", "in_channels", "image_size"):
            if getattr(self, name) is not None:
                self.hparams[name] = getattr(self, name)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (B, ...) to the network's outputs, without adaptation."""
        outputs: Tensor = self._built()(x)
        return outputs

    def _built(self) -> nn.Module:
        if self.network is None:
            self.configure_model()
        assert self.network is not None
        return self.network

    # ---------------------------------------------------------------- what a method is

    def episode_loss(self, batch: Episodes) -> tuple[Tensor, Tensor]:
        """Return the training loss, a scalar, and the outputs (T, M, ways) of the query sets.

        Args:
            batch: `support` and `query`, each a batch with a leading dimension of tasks.
        """
        raise NotImplementedError(f"{type(self).__name__} has no episode_loss")

    def predictions(self, batch: Episodes) -> Tensor:
        """Return the outputs (S, T, M, ways) of the query sets after 0, ..., S-1 adaptation steps, without a graph.

        Args:
            batch: as for `episode_loss`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no predictions")

    def adapt(self, support: Mapping[str, Tensor]) -> nn.Module:
        """Return a plain network of its own that has learned one task, in eval mode: inputs (M, ...) -> outputs.

        Args:
            support: batch of the labelled samples, (N, ...) each.
        """
        raise NotImplementedError(f"{type(self).__name__} has no adapt")

    # ---------------------------------------------------------------- the steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch of episodes and log it with the accuracy."""
        check_episodes(batch, self.ways)
        loss, outputs = self.episode_loss(batch)
        tasks = len(outputs)
        name, score = _scores(outputs.detach(), batch["query"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=tasks)
        self.log(f"train/{name}", score.mean(), batch_size=tasks)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Adapt to each episode and count how well its query set is predicted."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Adapt to each episode and count how well its query set is predicted."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the query sets' class probabilities (T, M, ways), or for regression the outputs, after all steps."""
        outputs = self._adapted(batch)[-1]
        return outputs if "target" in batch["query"] else outputs.float().softmax(dim=-1)

    def _adapted(self, batch: Any) -> Tensor:
        check_episodes(batch, self.ways)
        with gradients_allowed():
            return self.predictions(_cloned(batch))

    def _evaluate(self, batch: Any, stage: str) -> None:
        outputs = self._adapted(batch)
        name, scores = _scores(outputs, batch["query"])
        self._score_name = name
        getattr(self, f"{stage}_loss").update(_losses(outputs[-1:], batch["query"]))
        getattr(self, f"{stage}_score").update(scores)

    def on_validation_epoch_start(self) -> None:
        """Start counting afresh."""
        self.val_loss.reset()
        self.val_score.reset()

    def on_test_epoch_start(self) -> None:
        """Start counting afresh."""
        self.test_loss.reset()
        self.test_score.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the figures over all episodes."""
        self._log_figures("val")

    def on_test_epoch_end(self) -> None:
        """Log the figures over all episodes."""
        self._log_figures("test")

    def _log_figures(self, stage: str) -> None:
        loss: EpisodeMean = getattr(self, f"{stage}_loss")
        score: EpisodeMean = getattr(self, f"{stage}_score")
        if score.update_count == 0:
            return
        found, name = score.compute(), self._score_name
        # torchmetrics takes the dimension from what has one element.
        mean, interval = found["mean"].reshape(-1), found["interval"].reshape(-1)
        figures = {
            "loss": loss.compute()["mean"],
            name: mean[-1],
            f"{name}_interval": interval[-1],
            "episodes": found["episodes"],
        }
        if len(mean) > 1:
            steps = self.recorded_steps or range(len(mean))
            figures |= {f"{name}_after_{step}": value for step, value in zip(steps, mean, strict=True)}
        shown = {f"{stage}/{key}": value.float() for key, value in figures.items()}
        # The values are the same on all ranks already.
        for key, value in shown.items():
            self.log(key, value, prog_bar=key == f"val/{name}", batch_size=1, sync_dist=True)

    # ---------------------------------------------------------------- the optimizer

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer and the scheduler; a subclass may override it."""
        return make_optimizers(
            self.parameters(), self._optimizer, self._lr_scheduler, lambda: self.trainer.estimated_stepping_batches
        )


@contextmanager
def gradients_allowed() -> Iterator[None]:
    """Allow gradients, also inside Lightning's validation; tensors made outside need a clone first."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _cloned(batch: Episodes) -> dict[str, Any]:
    """Clone all tensors: those made in inference mode can't take part in a graph."""
    return {
        key: value.clone() if isinstance(value, Tensor) else _cloned(value) if isinstance(value, Mapping) else value
        for key, value in batch.items()
    }


def check_episodes(batch: Any, ways: int | None = None) -> None:
    """Check that a batch holds episodes, of classes that the network has.

    Args:
        batch: what the loader gave.
        ways: outputs of a network with a fixed head; None: any.

    Raises:
        ConfigError: when it is something else, such as a batch of single images, or has more classes.
    """
    if not isinstance(batch, Mapping) or not {"support", "query"} <= set(batch):
        got = f"the keys {sorted(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise ConfigError(f"the batch has {got}; expected `support` and `query`: use a DataModule of episodes")
    for part in ("support", "query"):
        if not {"label", "target"} & set(batch[part]):
            raise ConfigError(f"{part} has the keys {sorted(batch[part])}; expected `label` or `target` among them")
    label, classes = batch["query"].get("label"), batch.get("classes")
    if label is None or ways is None:
        return
    # On an accelerator, reading a label would wait for it; there the number of `classes` must do.
    needed = classes.shape[-1] if classes is not None else int(label.max()) + 1 if label.device.type == "cpu" else 0
    if needed > ways:
        raise ConfigError(
            f"the tasks have {needed} ways, the network was built for {ways}; train and evaluate with the same ways, "
            "or take a method without a fixed head, such as PrototypicalNetwork"
        )


def _scores(outputs: Tensor, query: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """Return the name of the figure and its value for each episode, (..., T), from outputs (..., T, M, ways)."""
    if "target" in query:
        return "mse", _losses(outputs, query)
    return "accuracy", (outputs.argmax(dim=-1) == query["label"]).float().mean(dim=-1)


def _losses(outputs: Tensor, query: Mapping[str, Tensor]) -> Tensor:
    """Return the mean loss of each episode, (..., T)."""
    outputs = at_least_float(outputs)
    if "target" in query:
        target = query["target"]
        if outputs.shape[-target.dim() :] != target.shape:
            raise ConfigError(
                f"the outputs have the shape {tuple(outputs.shape[-target.dim() :])}, the target "
                f"{tuple(target.shape)}; expected the same"
            )
        return (outputs - target).square().flatten(1 - target.dim()).mean(dim=-1)
    label = query["label"].expand(outputs.shape[:-1])
    return F.cross_entropy(outputs.flatten(0, -2), label.flatten(), reduction="none").view(label.shape).mean(dim=-1)


def one_two_five(last: int) -> tuple[int, ...]:
    """Return 0, 1, 2, 5, 10, 20, ... below `last`, and `last`."""
    steps: Sequence[int] = [0, *(factor * 10**power for power in range(len(str(last))) for factor in (1, 2, 5))]
    return (*[step for step in steps if step < last], last)
