"""A figure of every episode: its mean over episodes, and how sure that mean is."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

# The 97.5% point of the normal distribution: with 600 episodes Student's differs by 0.2%.
_NORMAL_95 = 1.96


class EpisodeMean(Metric):
    """Mean over episodes of figures such as the accuracy, with its 95% interval, exact over batches and ranks.

    Under DDP a sampler that repeats episodes to fill the last round counts them twice.

    Raises:
        ValueError: when an update has another number of figures an episode than the ones before.

    Example:
        >>> metric = EpisodeMean()
        >>> metric.update(torch.tensor([[0.5, 0.7]]))
        >>> metric.compute()["mean"]
        tensor(0.6000, dtype=torch.float64)
    """

    full_state_update = False
    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("count", "total", "squares"):
            self.add_state(name, torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add episodes.

        Args:
            values: (S, T): S figures (such as the accuracy after each step) of T episodes.
        """
        values = values.detach().double()
        if self.update_count > 1 and len(values) != len(self.total):
            raise ValueError(f"values has {len(values)} rows; expected {len(self.total)} as in the updates before")
        # Not in place: the first update widens the states from one figure to S.
        self.count = self.count + values.shape[1]
        self.total = self.total + values.sum(dim=1)
        self.squares = self.squares + values.square().sum(dim=1)

    def compute(self) -> dict[str, Tensor]:
        """Return `episodes` (), `mean` (S,) and `interval` (S,), half its width, NaN below 2 episodes; () for S = 1."""
        mean = self.total / self.count
        variance = (self.squares - self.total * mean).clamp(min=0) / (self.count - 1)
        interval = _NORMAL_95 * (variance / self.count).sqrt()
        enough = self.count > 1
        return {
            "episodes": self.count[0],
            "mean": mean,
            "interval": torch.where(enough, interval, torch.full_like(interval, torch.nan)),
        }
