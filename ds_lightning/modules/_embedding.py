"""Networks as embeddings: how many features they give, and tasks that go through them as one batch."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ds_lightning.errors import ConfigError
from ds_lightning.functional.batch import input_of


def check_embedding(size: int | None) -> None:
    """Refuse a number of features below 1."""
    if size is not None and size < 1:
        raise ConfigError(f"embedding is {size}; expected at least 1, or nothing for the network's features")


def class_indices(method: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the labels of a batch, for a method that can't do without.

    Raises:
        ConfigError: when there are none.
    """
    if "label" not in batch:
        raise ConfigError(
            f"the batch has the keys {sorted(batch)}; {type(method).__name__} needs class indices in `label`"
        )
    return batch["label"]


def embedding_size(network: nn.Module, given: int | None, name: str, argument: str = "embedding") -> int:
    """Return the features of an embedding network.

    Args:
        network: maps inputs to embeddings (B, D).
        given: the user's number, or None.
        name: of the network, for the message.
        argument: what the user calls that number.

    Raises:
        ConfigError: when it is neither given nor an attribute of the network.
    """
    # timm's networks with a hidden layer in the head give that one's outputs.
    size = given or getattr(network, "head_hidden_size", None) or getattr(network, "num_features", None)
    if not isinstance(size, int):
        raise ConfigError(f"{name} does not say how many features it has; give the number as {argument}")
    return size


def embed(network: nn.Module, *parts: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the embeddings (T, N, D) of each part of a batch of episodes, from one pass over all.

    Args:
        network: maps inputs (B, ...) to embeddings (B, D).
        parts: batches with a leading dimension of T tasks, and N samples a task.

    Raises:
        ConfigError: when the network gives something else.
    """
    inputs = [input_of(part) for part in parts]
    sizes = [x.shape[:2] for x in inputs]
    embeddings: Tensor = network(torch.cat([x.flatten(0, 1) for x in inputs]))
    if embeddings.dim() != 2 or embeddings.shape[1] == 0:
        raise ConfigError(
            f"{type(network).__name__} gave {tuple(embeddings.shape)}; expected embeddings (B, D), D at least 1: a "
            "network of torchvision needs embedding=D, others need one that ends with a flatten"
        )
    split = torch.split(embeddings, [tasks * samples for tasks, samples in sizes])
    return [part.view(*size, -1) for part, size in zip(split, sizes, strict=True)]


def number_of_ways(episodes: Mapping[str, Tensor], label: Tensor) -> int:
    """Return the classes of each task; without `classes` in the batch, this waits for the accelerator.

    Args:
        episodes: the batch of episodes.
        label: the support set's, of any shape.
    """
    classes = episodes.get("classes")
    return classes.shape[-1] if classes is not None else int(label.max()) + 1


def check_every_class(label: Tensor) -> int:
    """Return the number of classes of one support set.

    Args:
        label: (N,) int64.

    Raises:
        ValueError: when the labels are not 0 to ways - 1, each of them at least once, or there is one class alone.
    """
    found = sorted(set(label.tolist()))
    if len(found) < 2 or found != list(range(len(found))):
        raise ValueError(f"the support set has the labels {found}; expected each of 0 to ways - 1, and 2 ways or more")
    return len(found)


def at_least_float(x: Tensor) -> Tensor:
    """Return 16 bits as 32, and everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
