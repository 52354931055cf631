"""Steps of tensors that are made shorter or longer after they were taken."""

from operator import is_

import torch
from torch import Tensor

from ._layer_shards import is_sharded, local_part

_Tensors = list[Tensor] | tuple[Tensor, ...]


class Interpolation:
    """Moves tensors from where they were before an update to a multiple of the step: `old + m * (stepped - old)`.

    `retreat` is 1 - m of each of the `tensors`; `snapshot` where they were, None outside of an update.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.retreat: list[float] = []
        self.snapshot: _Tensors | None = None
        self._parts: list[Tensor] = []  # of the tensors, on this process, within a step
        self._sharded = False
        self._buffers: list[Tensor] = []

    def use(self, tensors: list[Tensor]) -> None:
        """Take these tensors from the next update on."""
        if len(tensors) != len(self.tensors) or not all(map(is_, tensors, self.tensors)):
            self._buffers = []
            self._sharded = any(map(is_sharded, tensors))
        self.tensors = tensors

    def before_update(self) -> None:
        """Keep where the tensors are."""
        if self.tensors:
            # Asked for in each step: nothing promises that a sharded parameter keeps its memory.
            self._parts = [local_part(tensor) for tensor in self.tensors] if self._sharded else self.tensors
            self.snapshot = self._copies(self._parts)

    def after_update(self) -> None:
        """Move the tensors, where an update was begun."""
        if self.snapshot is not None:
            torch._foreach_lerp_(self._parts, self.snapshot, self.retreat)
            self.snapshot, self._parts = None, []

    def _copies(self, tensors: list[Tensor]) -> _Tensors:
        if tensors[0].is_cuda:
            # The caching allocator makes this free, and no memory is held while the activations need it.
            return torch._foreach_mul(tensors, 1.0)
        # Elsewhere fresh pages cost ten times the copy.
        if not self._buffers:
            self._buffers = [torch.empty_like(tensor) for tensor in tensors]
        torch._foreach_copy_(self._buffers, tensors)
        return self._buffers
