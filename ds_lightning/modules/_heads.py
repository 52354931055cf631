"""The last layer of a network that tells classes apart, and the network without it."""

from torch import nn

from ds_lightning.errors import ConfigError


def head_name(network: nn.Module, num_classes: int) -> str:
    """Return the name of the linear layer that gives the outputs.

    Args:
        network: maps inputs to (B, num_classes).
        num_classes: its outputs.

    Raises:
        ConfigError: when the last linear layer has another number of outputs, or there is none.
    """
    outputs = {name: module.out_features for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    last: str | None = next(reversed(outputs), None)
    if last is None or outputs[last] != num_classes:
        found = "it has no linear layer" if last is None else f"its last one has {outputs[last]}"
        raise ConfigError(
            f"{type(network).__name__} does not end with a linear layer of {num_classes} outputs ({found}); "
            "take another network, or give an nn.Module"
        )
    return last


def without_head(network: nn.Module, num_classes: int) -> tuple[nn.Module, int]:
    """Take the linear layer that gives the outputs from a network, in place.

    Args:
        network: maps inputs to (B, num_classes).
        num_classes: its outputs.

    Returns:
        The network, which now gives features (B, D), and D.

    Raises:
        ConfigError: when it does not end with such a layer.
    """
    name = head_name(network, num_classes)
    if not name:
        raise ConfigError("the network is one linear layer and nothing else; nothing is left without its head")
    features = network.get_submodule(name).in_features
    assert isinstance(features, int)
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, nn.Identity())
    return network, features
