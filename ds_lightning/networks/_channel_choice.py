"""How many units each group keeps, so that a network costs a given share."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ds_lightning.errors import ConfigError
from ds_lightning.networks._channel_group import ChannelGroup

Counts = npt.NDArray[np.int64]


class CostModel:
    """Multiply-accumulates and parameters as a function of how many units each group keeps.

    A layer's multiply-accumulates are proportional to the numbers of its weight, an attention's to its heads.

    Args:
        network: with its shapes before.
        groups: the groups.
        macs: path of a module -> its own multiply-accumulates.
    """

    def __init__(self, network: nn.Module, groups: Sequence[ChannelGroup], macs: Mapping[str, int]) -> None:
        self.units = np.array([group.units for group in groups], dtype=np.int64)
        parameters = dict(network.named_parameters())
        sliced = {piece.tensor for group in groups for piece in group.slices} & parameters.keys()
        sizes: list[int] = []
        per_unit: list[npt.NDArray[np.float64]] = []
        rows: dict[tuple[str, int], int] = {}
        for number, group in enumerate(groups):
            for piece in group.slices:
                if piece.tensor not in sliced:
                    continue
                key = (piece.tensor, piece.dim)
                if key not in rows:
                    rows[key] = len(sizes)
                    sizes.append(len(piece.units))
                    per_unit.append(np.zeros(len(groups)))
                per_unit[rows[key]][number] += int((piece.units >= 0).sum()) / group.units / len(piece.units)
        # One more row that never shrinks, for tensors that are sliced along one dimension.
        self._shrink = np.array([*per_unit, np.zeros(len(groups))])
        names = sorted(sliced)
        self._rows = np.full((len(names), 2), len(sizes))
        for number, name in enumerate(names):
            found = [row for (tensor, _), row in rows.items() if tensor == name]
            self._rows[number, : len(found)] = found
        self._numbers = np.array([parameters[name].numel() for name in names], dtype=np.float64)
        self._other_parameters = sum(p.numel() for n, p in parameters.items() if n not in sliced)
        paths = {name.removesuffix("weight").rstrip("."): name for name in names if name.endswith("weight")}
        self._macs = np.array(
            [macs.get(name.removesuffix("weight").rstrip("."), 0) if name in paths.values() else 0 for name in names],
            dtype=np.float64,
        )
        attentions = {path: number for number, group in enumerate(groups) for path in group.scaled}
        self._attentions = np.array(list(attentions.values()), dtype=np.int64)
        self._attention_macs = np.array([macs.get(path, 0) for path in attentions], dtype=np.float64)
        self._other_macs = sum(macs.values()) - self._macs.sum() - self._attention_macs.sum()

    def share(self, measure: str, kept: Counts) -> float:
        """Return the cost of keeping so many units of each group, as a share of that of keeping all."""
        return self._cost(measure, kept) / self._cost(measure, self.units)

    def _cost(self, measure: str, kept: Counts) -> float:
        left = 1.0 - self._shrink @ (self.units - kept)
        tensors = left[self._rows].prod(axis=1)
        if measure == "params":
            return float(tensors @ self._numbers + self._other_parameters)
        heads = kept[self._attentions] / self.units[self._attentions]
        return float(tensors @ self._macs + heads @ self._attention_macs + self._other_macs)


class Steps:
    """The numbers of units that a group may keep: all, or a multiple of a step that is at least a floor."""

    def __init__(self, groups: Sequence[ChannelGroup], fixed: Sequence[bool], round_to: int, min_channels: int) -> None:
        self.units = np.array([group.units for group in groups], dtype=np.int64)
        wide = [group.units * group.width >= round_to for group in groups]
        self.step = np.array(
            [math.lcm(round_to, g.width) // g.width if w else 1 for g, w in zip(groups, wide, strict=True)],
            dtype=np.int64,
        )
        least = np.array([max(1, math.ceil(min_channels / group.width)) for group in groups], dtype=np.int64)
        self.floor = np.minimum(-(-least // self.step) * self.step, self.units)
        self.floor[np.array(fixed, dtype=bool)] = self.units[np.array(fixed, dtype=bool)]

    def below(self, counts: Counts) -> Counts:
        """Return the largest allowed counts that are not above the given ones, or else the floors."""
        rounded = np.maximum(counts // self.step * self.step, self.floor)
        return np.where(counts >= self.units, self.units, np.minimum(rounded, self.units))

    def more(self, counts: Counts, group: int) -> int:
        """Return the next larger count of a group."""
        return int(min((counts[group] // self.step[group] + 1) * self.step[group], self.units[group]))


def choose_counts(
    model: CostModel, steps: Steps, scores: Sequence[Tensor], target: float, measure: str, scope: str
) -> Counts:
    """Return how many units each group keeps: the most that costs no more than the target.

    Raises:
        ConfigError: when the target can't be reached.
    """
    smallest = model.share(measure, steps.floor)
    if smallest > target:
        raise ConfigError(
            f"target is {target:g}, and {measure} can't go below {smallest:.3f} of the network's; expected a larger "
            "target, or a smaller min_channels or round_to, or less in exclude"
        )
    path, length = _by_score(steps, scores) if scope == "global" else _by_share(steps)
    low, high = 0, length
    while low < high:
        middle = (low + high) // 2
        if model.share(measure, path(middle)) <= target:
            high = middle
        else:
            low = middle + 1
    counts = path(low)
    order = [np.sort(score.numpy())[::-1] for score in scores]
    while True:
        # What matters most comes back first, as far as the target allows.
        open_groups = [g for g in range(len(counts)) if counts[g] < steps.units[g]]
        if scope == "global":
            open_groups.sort(key=lambda g: -order[g][counts[g]])
        else:
            open_groups.sort(key=lambda g: counts[g] / steps.units[g])
        for g in open_groups:
            larger = counts.copy()
            larger[g] = steps.more(counts, g)
            if model.share(measure, larger) <= target:
                counts = larger
                break
        else:
            return counts


def _by_score(steps: Steps, scores: Sequence[Tensor]) -> tuple[Callable[[int], Counts], int]:
    owner = np.concatenate([np.full(len(score), number) for number, score in enumerate(scores)])
    ranked = owner[np.argsort(torch.cat(list(scores)).numpy(), kind="stable")]

    def counts(removed: int) -> Counts:
        return steps.below(steps.units - np.bincount(ranked[:removed], minlength=len(steps.units)))

    return counts, len(ranked)


def _by_share(steps: Steps, parts: int = 4096) -> tuple[Callable[[int], Counts], int]:
    def counts(removed: int) -> Counts:
        return steps.below(np.ceil(steps.units * (1.0 - removed / parts)).astype(np.int64))

    return counts, parts
