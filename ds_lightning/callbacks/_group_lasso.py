"""A pull on whole channels towards zero, as a gradient in closed form."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_lightning.networks._channel_group import ChannelGroup


class GroupLasso:
    """The gradient of the sum of the norms of all units, each over every tensor that it is in (arXiv 2301.12900).

    Args:
        network: whose channels they are; on its device.
        groups: of its units.
    """

    def __init__(self, network: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        parameters = dict(network.named_parameters(remove_duplicate=False))
        self._groups: list[tuple[int, list[tuple[nn.Parameter, int, Tensor]]]] = []
        for group in groups:
            pieces = [
                (parameter, piece.dim, piece.units.to(parameter.device))
                for piece in group.slices
                if (parameter := parameters.get(piece.tensor)) is not None  # running statistics are no weights
            ]
            self._groups.append((group.units, pieces))

    @torch.no_grad()
    def pull(self, optimizer: Optimizer, strength: float) -> None:
        """Add `strength * w / ||unit||` to the gradients of what an optimizer steps; a unit that is zero stays."""
        stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for units, pieces in self._groups:
            # One more unit takes what belongs to none, which has index -1.
            squares = torch.zeros(units + 1, device=pieces[0][0].device)
            for parameter, dim, unit_of in pieces:
                others = [d for d in range(parameter.ndim) if d != dim]
                sums = parameter.float().square().sum(others) if others else parameter.float().square()
                squares.index_add_(0, unit_of % (units + 1), sums)
            factors = torch.where(squares > 0, strength * squares.rsqrt(), 0.0)
            factors[-1] = 0.0
            for parameter, dim, unit_of in pieces:
                if parameter in stepped and parameter.grad is not None:
                    shape = [-1 if d == dim else 1 for d in range(parameter.ndim)]
                    parameter.grad.add_((parameter * factors[unit_of].view(shape)).to(parameter.grad.dtype))
