"""Channel pruning in one call."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ds_lightning.networks.channel_graph import ChannelGraph, check_choice
from ds_lightning.networks.pruning_plan import PruningPlan


def prune_channels(
    network: nn.Module,
    example_args: Any,
    target: float,
    *,
    measure: str = "macs",
    importance: str = "magnitude",
    scope: str = "global",
    round_to: int = 8,
    exclude: Sequence[str] = (),
    min_channels: int = 8,
    seed: int = 0,
    example_kwargs: Mapping[str, Any] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
) -> PruningPlan:
    """Decide which channels of a network go; `apply_plan` then removes them.

    The network is only read. Its outputs keep their shapes without being named.

    Args:
        network: any module that runs on the example inputs, as it is now.
        example_args: what it is called with: a tensor, or a tuple of positional arguments; two samples are enough.
        target: share of the measure to keep, in (0, 1).
        measure: `macs`, `params` or `latency`.
        importance: `magnitude`, `taylor`, `bn_scale` or `random`; see `channel_scores`.
        scope: `global` ranks the channels of all layers together, `layer` keeps the same share of each.
        round_to: channels of a layer are a multiple of this, where it has that many.
        exclude: patterns of module paths (`fnmatch`) whose output channels stay; a container stands for all in it.
        min_channels: channels that a layer keeps at least.
        seed: of random importance.
        example_kwargs: what the network is called with by name.
        gradients: for `taylor`: name of a parameter -> its gradient; the parameters' own `.grad` when None.

    Raises:
        ConfigError: when the network can't be pruned, the target can't be reached, or an argument is outside its range.

    Paper:
        DepGraph: Towards Any Structural Pruning, arXiv:2301.12900.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1))
        >>> replaced = apply_plan(network, prune_channels(network, torch.zeros(2, 2), target=0.5))
        >>> network[0].out_features
        32
    """
    check_choice(target, measure, scope, round_to, min_channels)
    args = example_args if isinstance(example_args, tuple) else (example_args,)
    graph = ChannelGraph(network, args, example_kwargs, exclude=exclude)
    scores = graph.scores(network, importance, gradients, seed)
    choice = graph.choose(scores, target, measure=measure, scope=scope, round_to=round_to, min_channels=min_channels)
    return graph.plan(choice)
