"""One decision for all ranks: which channels go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from ds_lightning.errors import ConfigError
from ds_lightning.networks.channel_graph import ChannelGraph, Choice
from ds_lightning.networks.pruning_plan import PruningPlan

from ._pruning_checks import Inputs


@dataclass(frozen=True)
class PruningRule:
    """How channels are chosen; the names are ProgressivePruning's arguments."""

    measure: Literal["macs", "params", "latency"]
    importance: Literal["magnitude", "taylor", "bn_scale", "random"]
    scope: Literal["global", "layer"]
    round_to: int
    exclude: tuple[str, ...]
    min_channels: int
    seed: int

    def graph(self, network: nn.Module, inputs: Inputs) -> ChannelGraph:
        """Find out which channels hang together; the network itself is not touched.

        Raises:
            ConfigError: the network can't be traced, or has nothing to remove.
        """
        args, kwargs = inputs
        return ChannelGraph(network, args, kwargs, exclude=self.exclude)

    def check_reachable(self, graph: ChannelGraph, network: nn.Module, target: float) -> None:
        """Refuse a target that is out of reach; one of 1 or more is reached already.

        Raises:
            ConfigError: says how far it goes.
        """
        if target >= 1:
            return
        kind = "magnitude" if self.importance == "taylor" else self.importance
        scores = graph.scores(network, kind, None, seed=self.seed)
        self._choose(graph, scores, target)

    def decide(
        self,
        trainer: pl.Trainer,
        graph: ChannelGraph,
        network: nn.Module,
        target: float,
        gradients: Mapping[str, Tensor] | None,
        number: int,
    ) -> PruningPlan | None:
        """Score on every rank, average, choose on rank 0 and tell the others.

        Args:
            trainer: whose ranks decide together.
            graph: of the network as it is.
            network: the real one.
            target: the share of the measure, as it is now, to keep.
            gradients: of its parameters by name, for `taylor`.
            number: of the removal, which random scores follow.

        Returns:
            The plan, the same on all ranks; None when a gradient is not finite.

        Raises:
            ConfigError: the target can't be reached; on all ranks.
        """
        finite = all(bool(gradient.isfinite().all()) for gradient in (gradients or {}).values())
        overflows = torch.tensor(float(not finite), device=trainer.strategy.root_device)
        if trainer.strategy.reduce(overflows, reduce_op="sum") > 0:
            return None
        mine = graph.scores(network, self.importance, gradients, seed=self.seed + number)
        together = torch.cat(mine).to(trainer.strategy.root_device)
        mean = trainer.strategy.reduce(together, reduce_op="mean").cpu()
        told: dict[str, Any] = {}
        if trainer.is_global_zero:
            scores = list(mean.split([len(score) for score in mine]))
            try:
                told = {"plan": graph.plan(self._choose(graph, scores, target)).to_dict()}
            except Exception as error:
                if trainer.world_size == 1:
                    raise
                # The others wait for an answer.
                told = {"error": " ".join(str(error).split())}
        told = trainer.strategy.broadcast(told, src=0)
        if "error" in told:
            raise ConfigError(told["error"])
        return PruningPlan.from_dict(told["plan"])

    def _choose(self, graph: ChannelGraph, scores: Sequence[Tensor], target: float) -> Choice:
        return graph.choose(
            scores,
            target,
            measure=self.measure,
            scope=self.scope,
            round_to=self.round_to,
            min_channels=self.min_channels,
        )
