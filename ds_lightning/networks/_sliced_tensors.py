"""What is left of a tensor and of a parameter when some of its channels go."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def sliced(tensor: Tensor, kept: Mapping[int, tuple[int, ...]]) -> Tensor:
    """Return a copy of what is kept along each dimension, in the tensor's memory format and without history."""
    # Parameters made in inference mode, which Lightning's evaluation runs in, could not be trained.
    with torch.inference_mode(False), torch.no_grad():
        out = tensor
        for dim, indices in kept.items():
            out = out.index_select(dim, torch.tensor(indices, device=tensor.device))
        return out.clone(memory_format=_memory_format(tensor))


def successor(old: Tensor, cut: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what takes the place of a buffer or parameter, the latter with its gradient and its marks."""
    if not isinstance(old, nn.Parameter):
        return cut(old)
    with torch.inference_mode(False):
        new = nn.Parameter(cut(old), requires_grad=old.requires_grad)
        new.grad = None if old.grad is None else cut(old.grad)
    # Marks such as `_no_weight_decay` that others have put on the parameter.
    new.__dict__.update(old.__dict__)
    return new


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Return channels last where the strides say so, also with a 1x1 kernel: state must lie as its parameter does."""
    last = _CHANNELS_LAST.get(tensor.dim())
    if last is not None and tensor.is_contiguous(memory_format=last):
        shape, strides = tensor.shape, tensor.stride()
        if strides[1] == 1 and strides[-1] == shape[1]:
            return last
    return torch.contiguous_format
