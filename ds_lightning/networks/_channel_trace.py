"""Which channels hang together: torch-pruning's dependency graph, walked once for all channels of a network."""

import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ds_lightning.errors import ConfigError
from ds_lightning.networks._channel_layers import IN, OUT, blocks, channels
from ds_lightning.networks._channel_shadow import same_random_numbers, short, tensors_in

_SECONDS = 40.0
_ROOTS = (nn.modules.conv._ConvNd, nn.Linear)
PARAMETER = "parameter"
# Where a channel shows up: the name of a layer (or bare parameter), its side, the index there.
Position = tuple[str, str, int]


class _OutOfTimeError(Exception):
    pass


def dependency_graph(shadow: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return torch-pruning's graph of a network, in bounded time.

    Raises:
        ConfigError: when the network can't be traced.
    """
    import torch_pruning

    graph = torch_pruning.DependencyGraph()
    deadline = time.monotonic() + _SECONDS
    for name in ("get_in_channels", "get_out_channels"):
        # Its search for shapes calls these at each step, and has no bound of its own.
        setattr(graph, name, _until(deadline, getattr(graph, name)))
    title = type(shadow).__name__
    try:
        with same_random_numbers(grad=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph.build_dependency(
                shadow,
                args,
                forward_fn=lambda network, inputs: network(*inputs, **kwargs),
                output_transform=lambda output: [t for t in tensors_in(output) if t.grad_fn is not None],
                verbose=False,
            )
    except _OutOfTimeError:
        raise ConfigError(
            f"torch-pruning did not finish {title}'s graph of channels in {_SECONDS:.0f} s; it can't be pruned as a "
            "whole: name a submodule that can"
        ) from None
    except Exception as error:
        raise ConfigError(
            f"torch-pruning can't trace {title} ({short(error)}); expected a network of convolutions, linear and norm "
            "layers that runs on the example inputs: name a submodule that can be pruned"
        ) from error
    return graph


def _until(deadline: float, function: Any) -> Any:
    def bounded(*args: Any) -> Any:
        if time.monotonic() > deadline:
            raise _OutOfTimeError
        return function(*args)

    return bounded


class Walk:
    """The sets of positions that can only go together.

    Every position (layer, side, index) is visited once: labels that meet at one position are joined, so that the walk
    takes time and memory in proportion to the channels of the network.

    Args:
        graph: torch-pruning's graph.
        shadow: the network that it was built from.

    Attributes:
        together: the positions of each set.
        refused: why a set can't go, for those that can't.
    """

    def __init__(self, graph: Any, shadow: nn.Module) -> None:
        self._names: dict[int, str] = {id(module): name for name, module in shadow.named_modules()}
        self._names |= {id(parameter): name for name, parameter in shadow.named_parameters()}
        self._largest = max((channels(m, side) or 0 for m in shadow.modules() for side in (IN, OUT)), default=0)
        self._parent: list[int] = []
        self._reasons: dict[int, str] = {}
        self._labels: dict[tuple[int, str], dict[int, int]] = defaultdict(dict)
        self._nodes = list(graph.module2node.values())
        for node in self._nodes:
            count = channels(node.module, OUT) if isinstance(node.module, _ROOTS) else None
            if count is not None:
                self._walk(graph, node, count)
        found: dict[int, list[Position]] = defaultdict(list)
        for node in self._nodes:
            for side in (IN, OUT):
                name = self._names.get(id(node.module))
                bare = isinstance(node.module, Tensor)
                if name is None or not (bare or channels(node.module, side)):
                    continue
                for index, label in self._labels.get((id(node), side), {}).items():
                    found[self._find(label)].append((name, PARAMETER if bare else side, index))
        reasons = {self._find(label): reason for label, reason in self._reasons.items()}
        self.together = list(found.values())
        self.refused = [reasons.get(root) for root in found]

    def _walk(self, graph: Any, root: Any, count: int) -> None:
        from torch_pruning._helpers import _HybridIndex

        fresh = []
        for index in range(count):
            if index not in self._labels[id(root), OUT]:
                self._parent.append(len(self._parent))
                fresh.append((index, self._parent[-1]))
        stack = list(self._arrive(root, OUT, fresh))
        while stack:
            node, side, new = stack.pop()
            pruner = graph.get_pruner_of_module(node.module)
            trigger = pruner.prune_in_channels if side == IN else pruner.prune_out_channels
            for dependency in node.dependencies:
                if not dependency.is_triggered_by(trigger):
                    continue
                mapped: list[tuple[int, int]] = new
                if any(mapping is not None for mapping in dependency.index_mapping):
                    mapped = [_HybridIndex(idx=index, root_idx=label) for index, label in new]
                for mapping in dependency.index_mapping:
                    mapped = mapped if mapping is None else mapping(mapped)
                target = dependency.target
                into = graph.get_pruner_of_module(target.module)
                both = into.prune_in_channels == into.prune_out_channels
                side_there = OUT if both or dependency.handler == into.prune_out_channels else IN
                if any(label is None for _, label in mapped):
                    for _, label in new:
                        self._reasons[label] = "its heads share keys and values"
                    continue
                stack += self._arrive(target, side_there, mapped)

    def _arrive(self, node: Any, side: str, pairs: list[tuple[int, int]]) -> Iterator[tuple[Any, str, Any]]:
        """Label positions, and yield those that are new with the sides on which they are."""
        if not pairs:
            return
        module = node.module
        count = self._count(node, side)
        reason = None
        if node.type.name == "OUTPUT" or (side == OUT and not node.outputs):
            reason = "its channels are the network's output"
        elif node.type.name in ("MHA", "LSTM", "CUSTOMIZED") or count is None:
            reason = f"it is tied to {self._names.get(id(module))}, a {type(module).__name__}"
        if reason is not None:
            self._reasons |= {label: reason for _, label in pairs}
        count = count or 0
        lost = [label for index, label in pairs if not 0 <= index < count]
        if lost:
            self._reasons = dict.fromkeys(lost, "torch-pruning loses track of its channels") | self._reasons
            pairs = [(index, label) for index, label in pairs if 0 <= index < count]
        pieces = blocks(module) if isinstance(module, nn.Module) else 1
        sides = (IN, OUT) if pieces > 1 and self._has_sides(module) else (side,)
        for at in sides:
            labels = self._labels[id(node), at]
            here, there = count // pieces, (self._count(node, at) or 0) // pieces
            new = []
            for index, label in pairs:
                block = index // here
                for place in range(block * there, block * there + there) if pieces > 1 else (index,):
                    if place not in labels:
                        labels[place] = label
                        new.append((place, label))
                    elif labels[place] != label:
                        self._join(labels[place], label)
            if new:
                yield node, at, new

    @staticmethod
    def _has_sides(module: nn.Module) -> bool:
        # A depthwise convolution is one side to torch-pruning.
        return isinstance(module, nn.modules.conv._ConvNd) and module.groups != module.out_channels

    def _count(self, node: Any, side: str) -> int | None:
        if isinstance(node.module, nn.Parameter):
            return int(node.module.shape[node.pruning_dim])
        if id(node.module) not in self._names:
            return self._largest
        found = channels(node.module, side)
        # A layer that torch-pruning takes for an element-wise operation has no channels of its own.
        return self._largest if found is None and node.type.name in ("ELEMENTWISE", "PRELU") else found

    def _find(self, label: int) -> int:
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = self._parent[label]
        return label

    def _join(self, first: int, second: int) -> None:
        self._parent[self._find(second)] = self._find(first)
