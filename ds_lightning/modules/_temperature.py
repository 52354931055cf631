"""The temperature of a contrastive loss, given or learned."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ds_lightning.errors import ConfigError

# CLIP's: logits of at most 100.
_LEAST = 0.01


class Temperature(nn.Module):
    """A temperature; when it is learned, its logarithm is the parameter, and it stays at 0.01 or above.

    Args:
        start: above 0; when learned, at least 0.01.
        learned: whether it is a parameter.

    Raises:
        ConfigError: when `start` is outside its range.
    """

    def __init__(self, start: float, learned: bool) -> None:
        super().__init__()
        if not 0 < start < math.inf:
            raise ConfigError(f"temperature is {start}; expected a number above 0")
        if learned and start < _LEAST:
            raise ConfigError(f"temperature is {start}; expected at least {_LEAST} with learn_temperature")
        self.start = start
        self.log: nn.Parameter | None = nn.Parameter(torch.tensor(math.log(start))) if learned else None

    def forward(self) -> float | Tensor:
        """Return the temperature; gradients flow when it is learned."""
        return self.start if self.log is None else self.log.exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Put a learned temperature back into its range."""
        if self.log is not None:
            self.log.clamp_(min=math.log(_LEAST))

    def apart(self, others: list[nn.Parameter]) -> list[nn.Parameter] | list[dict[str, Any]]:
        """Return what the optimizer gets: a learned temperature in a group without weight decay."""
        if self.log is None:
            return others
        alone: dict[str, Any] = {"params": [self.log], "weight_decay": 0.0}
        return [{"params": others}, alone]
