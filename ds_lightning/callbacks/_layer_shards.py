"""Parameters that are spread over processes (DTensor, as `fully_shard` makes them): their parts, and sums over them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_SUMS = ("sum", "inner")


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor."""
    # Asked without an import of torch.distributed.tensor, which most fits don't need.
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return the part of a tensor that this process holds; the same memory, and the tensor itself if it is whole.

    Args:
        tensor: any tensor; of a DTensor with pending sums, `like` says how it should lie.
        like: the parameter that it belongs to.
    """
    if not is_sharded(tensor):
        return tensor
    spread: Any = tensor.detach()
    if like is not None and is_sharded(like):
        placements = like.placements  # type: ignore[attr-defined]
        if spread.placements != placements:
            spread = spread.redistribute(placements=placements)
    part: Tensor = spread.to_local()
    return part


def reading_device(weight: Tensor) -> torch.device:
    """Return the device on which norms are gathered: that of the processes' group where a parameter is sharded."""
    # With CPU offload the parts lie on the host, which NCCL can't reduce.
    return torch.device(weight.device_mesh.device_type) if is_sharded(weight) else weight.device  # type: ignore[attr-defined]


def norms_over_shards(rows: dict[str, Tensor], weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """Turn norms and sums of this process's parts into those of the whole tensors; one small all-reduce a mesh.

    Args:
        rows: (L,) each; the rows `sum` and `inner` hold sums, all others norms.
        weights: the L tensors; whole ones are left as they are.
    """
    sharded: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for i, weight in enumerate(weights):
        if is_sharded(weight):
            mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
            dims = tuple(dim for dim, placement in enumerate(placements) if not placement.is_replicate())
            sharded.setdefault((mesh, dims), []).append(i)
    if not sharded:
        return rows
    # Squares of small float32 norms would underflow.
    squares = torch.stack([row.double() if name in _SUMS else row.double() ** 2 for name, row in rows.items()])
    columns = list(squares.unbind(1))
    for (mesh, dims), chosen in sharded.items():
        # Stacked one by one: an index would be copied to the device, which waits for it.
        part = torch.stack([columns[i] for i in chosen])
        for dim in dims:
            torch.distributed.all_reduce(part, group=mesh.get_group(dim))
        for i, column in zip(chosen, part, strict=True):
            columns[i] = column
    return {
        name: (row if name in _SUMS else row.sqrt()).to(rows[name].dtype)
        for name, row in zip(rows, torch.stack(columns, dim=1), strict=True)
    }
