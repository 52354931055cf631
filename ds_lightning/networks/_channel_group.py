"""Channels that can be removed from a network, in groups of units, and the plan that removes them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_lightning.networks._channel_layers import OUT, attributes, channels, tensor_dims
from ds_lightning.networks._channel_trace import PARAMETER, Position
from ds_lightning.networks.pruning_plan import PruningPlan


@dataclass(frozen=True)
class UnitSlices:
    """Where a group's units are along one dimension of a tensor.

    Attributes:
        tensor: name of the parameter or buffer in the network.
        dim: the dimension.
        units: for each index of the dimension, the unit it belongs to, or -1 for none of this group; int64.
        reads: whether a layer reads the units there; zeros cut them off from it.
    """

    tensor: str
    dim: int
    units: Tensor
    reads: bool


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Units that any number of can be removed: a unit is the channels of all the layers that hang together.

    Attributes:
        name: path of the first layer that gives these channels.
        units: how many units there are, at least 2.
        width: channels of that layer in one unit: 1, or more where they go in blocks (grouped convolutions, heads).
        sides: (layer path, `in` | `out`) or (parameter name, `parameter`) -> the unit of each of its channels, or -1.
        slices: where the units are in the network's tensors.
        scaled: path -> attributes that count blocks and go down with the units, such as the number of heads.
    """

    name: str
    units: int
    width: int
    sides: dict[tuple[str, str], Tensor]
    slices: tuple[UnitSlices, ...]
    scaled: dict[str, dict[str, int]]


def find_groups(
    shadow: nn.Module, together: Sequence[Sequence[Position]], dims: Mapping[str, int]
) -> list[ChannelGroup]:
    """Return the groups: sets of positions that touch the same layers in the same way are units of one group.

    Args:
        shadow: the network.
        together: the positions of each unit.
        dims: the dimension of each bare parameter that has channels.
    """
    units_of: dict[tuple[tuple[str, str, int], ...], list[Sequence[Position]]] = defaultdict(list)
    for positions in together:
        counts: dict[tuple[str, str], int] = defaultdict(int)
        for name, side, _ in positions:
            counts[name, side] += 1
        units_of[tuple(sorted((*key, count) for key, count in counts.items()))].append(positions)
    order = {name: number for number, (name, _) in enumerate(shadow.named_modules())}
    modules = dict(shadow.named_modules())
    groups = []
    for signature, units in units_of.items():
        name, width = min(
            ((name, count) for name, side, count in signature if side == OUT), key=lambda item: order[item[0]]
        )
        units = sorted(units, key=lambda unit: min(index for at, side, index in unit if (at, side) == (name, OUT)))
        sides = {}
        for path, side, _ in signature:
            if side == PARAMETER:
                size = shadow.get_parameter(path).shape[dims[path]]
            else:
                size = channels(modules[path], side) or 0
            sides[path, side] = torch.full((size,), -1)
        for number, unit in enumerate(units):
            for path, side, index in unit:
                sides[path, side][index] = number
        groups.append(ChannelGroup(name, len(units), width, sides, unit_slices(modules, sides, dims), {}))
    return sorted(groups, key=lambda group: order[group.name])


def unit_slices(
    modules: Mapping[str, nn.Module], sides: Mapping[tuple[str, str], Tensor], dims: Mapping[str, int]
) -> tuple[UnitSlices, ...]:
    """Return where units are in the tensors of the layers that they touch."""
    found = []
    for (path, side), units in sides.items():
        if side == PARAMETER:
            found.append(UnitSlices(path, dims[path], units, reads=False))
            continue
        for item in tensor_dims(modules[path], side):
            found.append(UnitSlices(f"{path}.{item.tensor}".lstrip("."), item.dim, units, item.reads))
    return tuple(found)


def plan_for(
    shadow: nn.Module, groups: Sequence[ChannelGroup], kept: Sequence[Tensor], dims: Mapping[str, int]
) -> PruningPlan:
    """Return the plan that keeps the given units of each group.

    Args:
        shadow: the network with its shapes before.
        groups: the groups.
        kept: the units that stay of each, int64.
        dims: the dimension of each bare parameter that has channels.
    """
    left: dict[tuple[str, str], Tensor] = {}
    scaled: dict[str, dict[str, Any]] = defaultdict(dict)
    for group, units in zip(groups, kept, strict=True):
        if len(units) == group.units:
            continue
        stays = torch.zeros(group.units + 1, dtype=torch.bool)
        stays[units] = True
        stays[-1] = True  # index -1: channels that belong to no unit of this group
        for key, unit_of in group.sides.items():
            left[key] = left.get(key, torch.ones(len(unit_of), dtype=torch.bool)) & stays[unit_of]
        for path, counts in group.scaled.items():
            scaled[path] |= {name: value * len(units) // group.units for name, value in counts.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    kept_of: dict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)
    counts_of: dict[str, dict[str, int]] = defaultdict(dict)
    modules = dict(shadow.named_modules())
    for piece in unit_slices(modules, left, dims):
        tensor = _tensor(shadow, piece.tensor)
        shapes[piece.tensor] = tuple(tensor.shape)
        kept_of[piece.tensor][piece.dim] = tuple(piece.units.nonzero().flatten().tolist())
    for (path, side), mask in left.items():
        if side != PARAMETER:
            counts_of[path][side] = int(mask.sum())
    for path, counts in counts_of.items():
        scaled[path] |= attributes(modules[path], counts)
    return PruningPlan(shapes, dict(kept_of), dict(scaled))


def _tensor(network: nn.Module, name: str) -> Tensor:
    path, _, key = name.rpartition(".")
    found: Tensor = getattr(network.get_submodule(path), key)
    return found


def cut_off(network: nn.Module, groups: Sequence[ChannelGroup], kept: Sequence[Tensor]) -> None:
    """Replace what reads the units that are not kept by parameters that are zero there; the shapes stay."""
    for group, units in zip(groups, kept, strict=True):
        gone = torch.ones(group.units + 1, dtype=torch.bool)
        gone[units] = False
        gone[-1] = False
        for piece in group.slices:
            if piece.reads:
                path, _, key = piece.tensor.rpartition(".")
                weight = _tensor(network, piece.tensor).detach()
                zeroed = weight.index_fill(piece.dim, gone[piece.units].nonzero().flatten(), 0.0)
                setattr(network.get_submodule(path), key, nn.Parameter(zeroed))
