"""How much a channel matters: one score for each unit of each group of channels."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ds_lightning.errors import ConfigError
from ds_lightning.networks._channel_group import ChannelGroup, UnitSlices

IMPORTANCES = ("magnitude", "taylor", "bn_scale", "random")


def channel_scores(
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    importance: str = "magnitude",
    gradients: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Return one score for each unit of each group; the units with the lowest scores matter least.

    Scores have the mean 1 in each group, so that groups can be compared.

    Args:
        network: the network whose weights count, with the shapes that the groups have; it is only read.
        groups: the groups of channels.
        importance: `magnitude` (squared norm of all the weights that go with a unit), `taylor` (how much the loss
            changes when they are zero, to first order), `bn_scale` (the size of BatchNorm's scale; a group without a
            BatchNorm gets infinite scores: none of it goes) or `random`.
        gradients: for `taylor`: name of a parameter -> its gradient; the parameters' own `.grad` when None.
        seed: of the random scores.

    Returns:
        One tensor (units,) for each group, float32 on the CPU.

    Raises:
        ConfigError: for an unknown importance, missing gradients, no BatchNorm, or scores that are not finite.

    Papers:
        DepGraph, arXiv:2301.12900 (magnitude over a group); Importance Estimation for Neural Network Pruning,
        arXiv:1906.10771 (taylor); Network Slimming, arXiv:1708.06519 (bn_scale).

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> graph = ChannelGraph(network, (torch.zeros(1, 2),))
        >>> channel_scores(network, graph.groups)[0].shape
        torch.Size([3])
    """
    if importance not in IMPORTANCES:
        raise ConfigError(f"importance is {importance!r}; expected one of {', '.join(IMPORTANCES)}")
    if importance == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(group.units, generator=generator) * 2.0 for group in groups]
    parameters = {n: p for n, p in network.named_parameters(remove_duplicate=False) if p.is_floating_point()}
    if importance == "taylor":
        if gradients is None:
            gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        if not any(piece.tensor in gradients for group in groups for piece in group.slices):
            raise ConfigError(
                "importance is 'taylor' and no parameter has a gradient; expected gradients of the loss: pass them, "
                "or call backward() before"
            )
        scores = [_taylor(group, parameters, gradients) for group in groups]
    elif importance == "magnitude":
        scores = [_magnitude(group, parameters) for group in groups]
    else:
        norms = {f"{path}.weight".lstrip(".") for path, m in network.named_modules() if isinstance(m, _NormBase)}
        scores = [_scale(group, parameters, norms) for group in groups]
        if all(bool(score.isinf().all()) for score in scores):
            raise ConfigError(
                "importance is 'bn_scale' and no channel that can be removed has a BatchNorm with a scale; use "
                "'magnitude'"
            )
    for group, score in zip(groups, scores, strict=True):
        if bool(score.isnan().any()):
            raise ConfigError(
                f"the {importance} scores of {group.name} are not finite; expected finite weights and gradients"
            )
    return scores


def _per_unit(group: ChannelGroup, piece: UnitSlices, values: Tensor) -> Tensor:
    """Return the sum of values (size of the dimension,) over the indices of each unit."""
    values = values.to("cpu", torch.float32)
    mine = piece.units >= 0
    return torch.zeros(group.units).index_add_(0, piece.units[mine], values[mine])


def _along(piece: UnitSlices, tensor: Tensor) -> Tensor:
    """Return the tensor as (size of the dimension, all the rest)."""
    return tensor.detach().float().movedim(piece.dim, 0).reshape(tensor.shape[piece.dim], -1)


def _normalized(scores: Tensor) -> Tensor:
    # Weights that are all zero, of which none matters more.
    mean = scores.mean()
    return scores / mean if bool(mean != 0) else torch.ones_like(scores)


def _magnitude(group: ChannelGroup, parameters: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros(group.units)
    for piece in group.slices:
        if piece.tensor in parameters and not piece.tensor.endswith("bias"):
            total += _per_unit(group, piece, _along(piece, parameters[piece.tensor]).square().sum(1))
    return _normalized(total)


def _taylor(group: ChannelGroup, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros(group.units)
    for piece in group.slices:
        if piece.tensor in parameters and (gradient := gradients.get(piece.tensor)) is not None:
            weight = parameters[piece.tensor]
            change = _along(piece, weight) * _along(piece, gradient.to(weight.device))
            total += _per_unit(group, piece, change.sum(1)).abs()
    return _normalized(total)


def _scale(group: ChannelGroup, parameters: Mapping[str, Tensor], norms: set[str]) -> Tensor:
    pieces = [piece for piece in group.slices if piece.tensor in norms and piece.tensor in parameters]
    if not pieces:
        return torch.full((group.units,), torch.inf)
    total = torch.zeros(group.units)
    for piece in pieces:
        total += _per_unit(group, piece, parameters[piece.tensor].detach().abs())
    return _normalized(total)
