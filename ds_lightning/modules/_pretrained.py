"""A pre-trained encoder, taken out of the checkpoint that it lies in."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_lightning.checkpoint_check import check_loadable
from ds_lightning.errors import ConfigError, DataError
from ds_lightning.modules._heads import head_name

_TOWERS = "towers."
_ENCODER = ".encoder."


@dataclass(frozen=True)
class Pretrained:
    """An encoder's weights, and what it takes to build the network that they fit.

    Attributes:
        path: of the checkpoint.
        network: its name; None when it was given as a module.
        options: of the network, when it has a name.
        in_channels: of the images, where they are known.
        image_size: in pixels, where it is known.
        weights: state of the network without its head.
    """

    path: str
    network: str | None
    options: dict[str, Any]
    in_channels: int | None
    image_size: int | None
    weights: dict[str, Tensor]


def read_pretrained(path: str, modality: str | None) -> Pretrained:
    """Read the encoder of a checkpoint of `ContrastivePretraining`.

    Args:
        path: the file.
        modality: which encoder, when there are two.

    Raises:
        DataError: when there is no such file, or it is torn, holds pickled classes or no encoder; one line.
        ConfigError: when it has two encoders and `modality` is neither of them.
    """
    if not Path(path).is_file():
        raise DataError(f"encoder {path}: there is no such file; expected a checkpoint of ContrastivePretraining")
    check_loadable(path)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    hparams: Mapping[str, Any] = checkpoint.get("hyper_parameters", {})
    weights: dict[str, dict[str, Tensor]] = {}
    for name, value in checkpoint["state_dict"].items():
        side, found, rest = name.removeprefix(_TOWERS).partition(_ENCODER)
        if name.startswith(_TOWERS) and found:
            weights.setdefault(side, {})[rest] = value
    if not weights:
        raise DataError(f"encoder {path} has no pre-trained encoder; expected a checkpoint of ContrastivePretraining")
    if len(weights) > 1 and modality not in weights:
        raise ConfigError(
            f"encoder {path} has encoders of {', '.join(sorted(weights))}; say which one as encoder_modality"
            + (f", not {modality!r}" if modality else "")
        )
    side = modality if len(weights) > 1 and modality else next(iter(weights))
    network, options = hparams.get("encoder"), hparams.get("encoder_options") or {}
    if isinstance(network, Mapping):
        network, options = network.get(side), options.get(side, {})
    named = isinstance(network, str)
    return Pretrained(
        path,
        network if named else None,
        dict(options) if named else {},
        hparams.get("in_channels"),
        hparams.get("image_size"),
        weights[side],
    )


def load_encoder(network: nn.Module, pretrained: Pretrained, num_classes: int) -> None:
    """Put the pre-trained weights into a network, in place; its head stays as it is.

    Args:
        network: maps inputs to (B, num_classes).
        pretrained: what was read.
        num_classes: outputs of the network.

    Raises:
        ConfigError: when the weights are another network's.
    """
    head = head_name(network, num_classes)
    own = {name: value.shape for name, value in network.state_dict().items() if not _within(name, head)}
    theirs = {name: value.shape for name, value in pretrained.weights.items() if not _within(name, head)}
    for name in sorted(own.keys() | theirs.keys()):
        if own.get(name) != theirs.get(name):
            here, there = (tuple(side[name]) if name in side else "nothing" for side in (own, theirs))
            raise ConfigError(
                f"encoder {pretrained.path} does not fit {type(network).__name__}: {name} is {here} here and {there} "
                "in the checkpoint; give the network, channels and options that it was pre-trained with"
            )
    network.load_state_dict({name: pretrained.weights[name] for name in theirs}, strict=False)


def freeze_all_but_head(network: nn.Module, num_classes: int) -> None:
    """Let the head alone be trained: no gradients elsewhere."""
    head = head_name(network, num_classes)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(_within(name, head))


def _within(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")
