"""The rows of all ranks, with a gradient that is exact under DDP."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_lightning.functional._first_order import first_order


def gather_rows(x: Tensor) -> Tensor:
    """Gather the rows of all ranks, in the order of the ranks, so that a loss sees the whole batch.

    Each rank takes the mean of its own rows' losses against the gathered rows. The backward pass adds up what all
    ranks have to say about this rank's rows; DDP then averages the parameters' gradients. Together that is
    exactly the gradient of the mean over the whole batch in one process. Outside a process group of two or
    more, `x` itself comes back.

    Args:
        x: shape (B, ...), of the same shape and dtype on every rank. On the CPU that is checked; on a GPU it
            is not, because the check would make the host wait (a DistributedSampler sees to it).

    Returns:
        Shape (world size * B, ...).

    Raises:
        ValueError: a rank holds another number of rows (CPU).

    Example:
        >>> gather_rows(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    if world_size() == 1:
        return x
    if x.device.type == "cpu":
        sizes = torch.zeros(world_size(), dtype=torch.int64)
        dist.all_gather_into_tensor(sizes, torch.tensor([len(x)]))
        if (sizes != len(x)).any():
            raise ValueError(
                f"the ranks hold {sizes.tolist()} rows; expected the same number on each: set drop_last=True or "
                "use a DistributedSampler, which pads"
            )
    gathered: Tensor = _GatherRows.apply(x)
    return gathered


def world_size() -> int:
    """How many ranks there are: 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place: 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gathered = x.new_empty((world_size() * len(x), *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        # An all-reduce and not a reduce-scatter: gloo has it in every version, and the tensor is small.
        total = grad_output.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]
