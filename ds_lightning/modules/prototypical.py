"""Prototypical networks: a new sample is of the class whose mean embedding is nearest."""

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from ds_lightning.functional.batch import input_of
from ds_lightning.modules._embedding import (
    at_least_float,
    check_embedding,
    check_every_class,
    class_indices,
    embed,
    number_of_ways,
)
from ds_lightning.modules.few_shot import FewShotModule


class PrototypicalNetwork(FewShotModule):
    """Train an embedding in which the mean of a class's support samples is near its query samples.

    Nothing is fitted to a new task but the means, so that it costs one pass, and any number of ways will do: the
    paper trains with more ways than it tests with. BatchNorm, where the network has it, takes the statistics of all
    the samples of a training batch together, and its running ones in evaluation.

    Logs what `FewShotModule` says.

    Args:
        network: a name that `ds_lightning.networks.backbone` knows, or an nn.Module that maps inputs to embeddings
            (B, D), which is not kept in the hyperparameters: give it again to `load_from_checkpoint`.
        embedding: D of a network given by name; None takes its features, without a last linear layer (torchvision's
            networks need a number).
        in_channels: channels of the images; None takes the DataModule's.
        image_size: height and width in pixels; None takes the DataModule's.
        network_options: further arguments of a network given by name.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes a scheduler from the optimizer, stepped every epoch; `cosine` anneals to zero; None keeps
            the rate.

    Raises:
        ConfigError: when an argument is outside its range, or something is neither given nor in the data.

    Paper:
        arXiv:1703.05175.

    Example:
        >>> model = PrototypicalNetwork("conv4", in_channels=1, image_size=28)
        >>> support = {"image": torch.randn(6, 1, 28, 28), "label": torch.tensor([0, 0, 1, 1, 2, 2])}
        >>> model.adapt(support)(torch.randn(4, 1, 28, 28)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        network: str | nn.Module = "conv4",
        embedding: int | None = None,
        *,
        in_channels: int | None = None,
        image_size: int | None = None,
        network_options: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        lr_scheduler: Literal["cosine"] | LRSchedulerCallable | None = None,
    ) -> None:
        check_embedding(embedding)
        self.embedding = embedding
        super().__init__(
            network,
            in_channels=in_channels,
            image_size=image_size,
            network_options=network_options,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )

    def _num_outputs(self) -> int:
        return self.embedding or 0

    def _logits(self, episodes: Mapping[str, Any]) -> Tensor:
        label = class_indices(self, episodes["support"])
        support, query = embed(self._built(), episodes["support"], episodes["query"])
        centres = prototypes(support, label, number_of_ways(episodes, label))
        return -squared_distances(query, centres)

    def episode_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of the query sets, a scalar, and their logits (T, M, ways).

        Args:
            batch: `support` and `query`, each a batch with a leading dimension of tasks.
        """
        logits = self._logits(batch)
        return F.cross_entropy(logits.flatten(0, 1), class_indices(self, batch["query"]).flatten()), logits

    def predictions(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the logits (1, T, M, ways) of the query sets, without a graph.

        Args:
            batch: as for `episode_loss`.
        """
        with torch.no_grad():
            return self._logits(batch)[None]

    def adapt(self, support: Mapping[str, Tensor]) -> nn.Module:
        """Return a network of its own that tells a task's classes apart, in eval mode: inputs (M, ...) -> logits.

        Args:
            support: batch of the labelled samples, (N, ...) each; labels 0 to ways - 1, each at least once.

        Raises:
            ValueError: when a class has no sample.
        """
        label = class_indices(self, support)
        ways = check_every_class(label)
        # Outside a user's inference mode: what was made in there could never be trained.
        with torch.inference_mode(False), torch.no_grad():
            network = copy.deepcopy(self._built()).eval().requires_grad_(False)
            x, label = input_of(support).to(self.device, copy=True), label.to(self.device, copy=True)
            centres = prototypes(network(x)[None], label[None], ways)[0]
        return _NearestPrototype(network, centres).eval()


class _NearestPrototype(nn.Module):
    """A task's network: logits are the negative squared distances to the prototypes."""

    prototypes: Tensor

    def __init__(self, network: nn.Module, centres: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("prototypes", centres)

    def forward(self, x: Tensor) -> Tensor:
        return -squared_distances(self.network(x)[None], self.prototypes[None])[0]


def prototypes(embeddings: Tensor, label: Tensor, ways: int) -> Tensor:
    """Return the mean embedding of each class, (T, ways, D), at least 32 bits; NaN for a class without samples.

    Args:
        embeddings: (T, N, D).
        label: (T, N) int64 in 0..ways-1.
        ways: classes of each task.
    """
    embeddings = at_least_float(embeddings)
    belongs = F.one_hot(label, ways).to(embeddings.dtype)
    with torch.autocast(embeddings.device.type, enabled=False):
        return belongs.mT @ embeddings / belongs.sum(dim=1).unsqueeze(-1)


def squared_distances(query: Tensor, centres: Tensor) -> Tensor:
    """Return the squared Euclidean distances (T, M, W), at least 32 bits, from products: no (T, M, W, D) is made.

    Args:
        query: (T, M, D).
        centres: (T, W, D).
    """
    # Distances do not depend on the origin, but rounding does: it grows with what the products cancel.
    origin = centres.mean(dim=1, keepdim=True)
    query, centres = at_least_float(query) - origin, centres - origin
    with torch.autocast(query.device.type, enabled=False):
        products = query @ centres.mT
    return query.square().sum(-1, keepdim=True) - 2 * products + centres.square().sum(-1).unsqueeze(1)
