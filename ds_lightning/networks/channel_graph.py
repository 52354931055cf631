"""The channels of a network that can be removed, and the plan that removes a choice of them."""

import copy
import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ds_lightning.errors import ConfigError
from ds_lightning.networks._channel_choice import CostModel, Counts, Steps, choose_counts
from ds_lightning.networks._channel_group import ChannelGroup, find_groups, plan_for
from ds_lightning.networks._channel_heads import by_heads
from ds_lightning.networks._channel_layers import OUT
from ds_lightning.networks._channel_shadow import example_on_cpu, run, same_tensors, shadow_of, short
from ds_lightning.networks._channel_trace import Walk, dependency_graph
from ds_lightning.networks._channel_trial import Trial
from ds_lightning.networks.channel_costs import latency, layer_macs
from ds_lightning.networks.channel_importance import channel_scores
from ds_lightning.networks.pruning_plan import PruningPlan, apply_plan

MEASURES = ("macs", "params", "latency")
SCOPES = ("global", "layer")
_CLOSE = 0.005
_CORRECTIONS = 4
_LATENCY_CLOSE = 0.05
_MEASUREMENTS = 8


class ChannelGraph:
    """Which channels of a network hang together and can be removed, and the plan that removes a choice of them.

    torch-pruning's dependency graph says which channels hang together, on a copy of the network on the CPU. Every
    group is then tried: a smaller copy must compute exactly what the large one computes when nothing reads the removed
    channels (LayerNorms aside, whose statistics are over fewer channels). What fails is left alone, and so are the
    network's outputs; `refused` says why. The network itself is only read.

    Args:
        network: any module that runs on the example inputs.
        example_args: what it is called with; on any device.
        example_kwargs: what it is called with by name.
        exclude: patterns of module paths (`fnmatch`) whose output channels stay; a container stands for all in it.

    Attributes:
        groups: the groups of channels, in the order of the network's modules.
        refused: path of a layer -> why its channels stay.

    Raises:
        ConfigError: when the network can't be copied or traced, has no channels to remove, or a pattern in `exclude`
            matches no module.

    Paper:
        DepGraph: Towards Any Structural Pruning, arXiv:2301.12900.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
        >>> graph = ChannelGraph(network, (torch.zeros(1, 2),))
        >>> [(group.name, group.units) for group in graph.groups]
        [('0', 16)]
    """

    def __init__(
        self,
        network: nn.Module,
        example_args: tuple[Any, ...],
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        exclude: Sequence[str] = (),
    ) -> None:
        excluded = _excluded(network, exclude)
        self._device = next((p.device for p in network.parameters()), None)
        self._args = example_on_cpu(tuple(example_args))
        self._kwargs = example_on_cpu(dict(example_kwargs or {}))
        self._shadow = shadow_of(network)
        title = type(network).__name__
        try:
            output = run(same_tensors(self._shadow), self._args, self._kwargs)
        except Exception as error:
            raise ConfigError(
                f"{title} does not run on the example inputs ({short(error)}); expected ones that fit"
            ) from error
        if not output:
            raise ConfigError(
                f"{title} gives no floating-point tensor that could be compared; expected a tensor, or tuples, lists "
                "or dicts of them: name a submodule that gives one"
            )
        self._shapes = [tuple(out.shape) for out in output]
        traced = same_tensors(self._shadow)
        graph = dependency_graph(traced, self._args, self._kwargs)
        walk = Walk(graph, traced)
        names = {id(p): name for name, p in self._shadow.named_parameters()}
        self._dims = {names[id(p)]: dim % p.dim() for p, dim in graph.unwrapped_parameters if id(p) in names}
        self.refused: dict[str, str] = {}
        order = {name: number for number, (name, _) in enumerate(self._shadow.named_modules())}
        together = []
        for positions, reason in zip(walk.together, walk.refused, strict=True):
            layers = sorted((name for name, side, _ in positions if side == OUT), key=order.__getitem__)
            if reason is None and any(name in excluded for name in layers):
                reason = "it is in exclude, or tied to a layer that is"
            if reason is None:
                together.append(positions)
            elif layers:
                self.refused.setdefault(layers[0], reason)
        modules = dict(self._shadow.named_modules())
        candidates = [by_heads(modules, group, self._dims) for group in find_groups(self._shadow, together, self._dims)]
        trial = Trial(self._shadow, self._args, self._kwargs, self._dims)
        self.groups: list[ChannelGroup] = trial.sound([group for group in candidates if group.units > 1])
        self.refused |= trial.reasons
        if not self.groups:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(self.refused.items())[:3])
            raise ConfigError(
                f"{title} has no channels that can be removed ({reasons or 'it has no convolution or linear layer'}); "
                "expected hidden layers that exclude lets through"
            )
        self._macs = layer_macs(same_tensors(self._shadow), *self._args, **self._kwargs)
        self._model = CostModel(self._shadow, self.groups, self._macs)

    def scores(
        self,
        network: nn.Module,
        importance: str = "magnitude",
        gradients: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> list[Tensor]:
        """Return one score for each unit of each group; see `channel_scores`."""
        return channel_scores(network, self.groups, importance, gradients, seed)

    def choose(
        self,
        scores: Sequence[Tensor],
        target: float,
        *,
        measure: str = "macs",
        scope: str = "global",
        round_to: int = 8,
        min_channels: int = 8,
    ) -> "Choice":
        """Choose which units stay: as many as the target allows, those with the highest scores.

        Args:
            scores: one tensor (units,) for each group; infinite ones stay.
            target: share of the measure to keep, in (0, 1). What is reached is below it by at most a step of the
                smallest group; `latency` is searched until it is within 5%, by its nature noisy.
            measure: `macs`, `params` or `latency` (on the network's device).
            scope: `global` ranks the units of all groups together, `layer` keeps the same share of each group.
            round_to: channels of a layer are a multiple of this, where it has that many.
            min_channels: channels that a layer keeps at least.

        Raises:
            ConfigError: when an argument is outside its range or the target can't be reached.
        """
        check_choice(target, measure, scope, round_to, min_channels)
        fixed = [bool(score.isinf().any()) for score in scores]
        steps = Steps(self.groups, fixed, round_to, min_channels)
        if measure == "latency":
            return self._choose_by_latency(scores, target, steps, scope)
        aim = target
        full = sum(self._macs.values()) if measure == "macs" else self._cost(self._shadow, measure)
        for _ in range(_CORRECTIONS):
            counts = choose_counts(self._model, steps, scores, aim, measure, scope)
            choice = self._highest(scores, counts)
            share = self._cost(self._smaller(choice), measure) / full
            # Costs that the model takes for constant, such as attention within a head.
            if share <= target * (1.0 + _CLOSE):
                break
            aim += target - share
        return choice

    def plan(self, choice: "Choice") -> PruningPlan:
        """Return the plan that keeps the chosen units."""
        return plan_for(self._shadow, self.groups, choice.kept, self._dims)

    def _highest(self, scores: Sequence[Tensor], counts: Counts) -> "Choice":
        kept = [
            score.sort(descending=True, stable=True).indices[: int(count)].sort().values
            for score, count in zip(scores, counts, strict=True)
        ]
        return Choice(tuple(kept))

    def _smaller(self, choice: "Choice") -> nn.Module:
        """Return a smaller copy of the shadow that has been run."""
        small = same_tensors(self._shadow)
        try:
            apply_plan(small, self.plan(choice))
            shapes = [tuple(out.shape) for out in run(small, self._args, self._kwargs)]
        except Exception as error:
            raise ConfigError(
                f"the smaller network does not run ({short(error)}); put the layers that need their channels in exclude"
            ) from error
        if shapes != self._shapes:
            raise ConfigError(
                f"the smaller network's output has the shapes {shapes} and not {self._shapes}; put the layers that "
                "need their channels in exclude"
            )
        return small

    def _cost(self, network: nn.Module, measure: str) -> float:
        if measure == "params":
            return sum(p.numel() for p in network.parameters())
        return sum(layer_macs(network, *self._args, **self._kwargs).values())

    def _choose_by_latency(self, scores: Sequence[Tensor], target: float, steps: Steps, scope: str) -> "Choice":
        full = self._seconds(same_tensors(self._shadow))
        low, high = self._model.share("macs", steps.floor), 1.0
        smallest = self._highest(scores, steps.floor)
        if (reached := self._seconds(self._smaller(smallest)) / full) > target:
            raise ConfigError(
                f"target is {target:g}, and latency can't go below {reached:.3f} of the network's, as measured; "
                "expected a larger target, or a smaller min_channels or round_to, or less in exclude"
            )
        best = smallest
        for _ in range(_MEASUREMENTS):
            aim = (low + high) / 2
            choice = self._highest(scores, choose_counts(self._model, steps, scores, aim, "macs", scope))
            share = self._seconds(self._smaller(choice)) / full
            if share <= target:
                best, low = choice, aim
                if share >= target * (1.0 - _LATENCY_CLOSE):
                    break
            else:
                high = aim
        return best

    def _seconds(self, network: nn.Module) -> float:
        device = self._device
        if device is None or device.type == "cpu":
            return latency(network, *self._args, **self._kwargs)
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, (self._args, self._kwargs)
        )
        return latency(copy.deepcopy(network).to(device), *args, **kwargs)


@dataclass(frozen=True, eq=False)
class Choice:
    """The units that stay.

    Attributes:
        kept: for each group the units that stay, ascending, int64.
    """

    kept: tuple[Tensor, ...]


def _excluded(network: nn.Module, patterns: Sequence[str]) -> set[str]:
    names = [name for name, _ in network.named_modules() if name]
    found: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            close = difflib.get_close_matches(pattern, names, n=3)
            hint = ", ".join(close) or ", ".join(names[:3])
            raise ConfigError(f"exclude: {pattern!r} matches no module; expected a path or a pattern such as {hint}")
        # A container stands for all in it.
        found.update(n for n in names if any(n == name or n.startswith(f"{name}.") for name in matched))
    return found


def check_choice(target: float, measure: str, scope: str, round_to: int, min_channels: int) -> None:
    """Raise ConfigError for a value outside its range."""
    if not 0.0 < target < 1.0:
        raise ConfigError(f"target is {target!r}; expected the share of the {measure} to keep, in (0, 1)")
    for name, value, known in (("measure", measure, MEASURES), ("scope", scope, SCOPES)):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    for name, least in (("round_to", round_to), ("min_channels", min_channels)):
        if least < 1:
            raise ConfigError(f"{name} is {least}; expected at least 1")
