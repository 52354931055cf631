"""Attention heads as units: columns of queries, keys and values only go by whole heads."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ds_lightning.networks._channel_group import ChannelGroup, unit_slices

_HEADS = ("num_heads", "heads", "n_heads")
_WIDTHS = ("attn_dim", "inner_dim", "all_head_size")


def by_heads(modules: Mapping[str, nn.Module], group: ChannelGroup, dims: Mapping[str, int]) -> ChannelGroup:
    """Return the group with heads as units when it is the inside of one attention module, and otherwise itself."""
    path = group.name.rpartition(".")[0]
    inside = all(name.startswith(f"{path}.") for name, _ in group.sides)
    attention = vars(modules[path]) if path and inside else {}
    name = next((name for name in _HEADS if isinstance(attention.get(name), int)), None)
    whole = all(bool((units >= 0).all()) for units in group.sides.values())
    if name is None or not whole or group.units % attention[name]:
        return group
    heads = attention[name]
    columns = group.units // heads
    sides = {key: units.div(columns, rounding_mode="floor") for key, units in group.sides.items()}
    counts = {name: heads} | {width: group.units for width in _WIDTHS if attention.get(width) == group.units}
    return replace(
        group,
        units=heads,
        width=group.width * columns,
        sides=sides,
        slices=unit_slices(modules, sides, dims),
        scaled={path: counts},
    )
