"""Sums of squared per-sample gradients from each layer's input and output gradient, in one backward pass.

No gradient of a parameter is computed. What the closed forms can't take is left to the caller, parameter by parameter.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._pytree import tree_map

from ._fisher_generic import LossOf, accumulation_type
from ._fisher_squares import Rule, rules_of


def closed_form_names(loss: LossOf, batch: Any, samples: int, names: Mapping[int, str]) -> set[str]:
    """Find the parameters whose layers have a closed form and keep the samples on their first axis.

    Sequence-first or flattened activations are told from batch-first ones by two small forward passes, of two and
    of three samples: every output must grow by one along its first axis and nowhere else.

    Args:
        loss: the loss of each sample.
        batch: a batch of which the first samples are used.
        samples: number of samples in the batch.
        names: the wanted parameters: id to name.
    """
    shapes: dict[int, list[list[torch.Size]]] = {2: [], 3: []}
    layers: list[nn.Module] = []
    for count, seen in shapes.items():
        index = [i % samples for i in range(count)]
        layers.clear()

        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            layers.append(layer)
            seen.append([_input_of(args, kwargs).shape, output.shape])  # noqa: B023 (called within the turn)

        with _hooks((layer, note) for layer in loss.modules() if rules_of(layer)), torch.no_grad():
            loss.with_parameters({}, tree_map(lambda x, index=index: x[index], batch), count, Tensor.detach)
    if len(shapes[2]) != len(shapes[3]):
        return set()
    refused = {
        id(parameter)
        for layer, two, three in zip(layers, shapes[2], shapes[3], strict=True)
        if any(a[:1] != (2,) or b[:1] != (3,) or a[1:] != b[1:] for a, b in zip(two, three, strict=True))
        for parameter in layer.parameters(recurse=False)
    }
    owned = {
        id(layer._parameters[key])
        for layer in {id(layer): layer for layer in layers}.values()
        for key in rules_of(layer)
        if layer._parameters.get(key) is not None
    }
    return {name for key, name in names.items() if key in owned - refused}


def layer_squares(
    loss: LossOf, batch: Any, samples: int, leaves: Mapping[str, Tensor], names: Mapping[int, str]
) -> dict[str, Tensor]:
    """Sum the squared per-sample gradients over a batch, layer by layer.

    Args:
        loss: the loss of each sample.
        batch: the batch.
        samples: number of samples in the batch.
        leaves: name to value of the wanted parameters.
        names: id of a wanted parameter to its name.

    Returns:
        The sums of those parameters that the closed forms cover: used by one call of one layer and by nothing else
        (or by nothing at all, then zero). A shared weight's per-sample gradients must be added before squaring.
    """
    tracked = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    work = _Pass(samples)
    anchor = torch.zeros((), requires_grad=True)

    def tap(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        tapped: Tensor = _Tap.apply(output, anchor, _input_of(args, kwargs).detach(), layer, wanted[id(layer)], work)
        return tapped

    def backward(losses: Tensor) -> None:
        if losses.requires_grad:
            work.edges = _edges_into(losses, tracked)
            torch.autograd.grad(losses, anchor, torch.ones_like(losses), allow_unused=True)

    wanted = {
        id(layer): {
            key: (names[id(parameter)], rule)
            for key, rule in rules_of(layer).items()
            if (parameter := layer._parameters.get(key)) is not None and names.get(id(parameter)) in leaves
        }
        for layer in loss.modules()
    }
    with _hooks((layer, tap) for layer in loss.modules() if wanted[id(layer)]):
        loss.with_parameters(tracked, batch, samples, backward)
    zero = {name: torch.zeros_like(leaf, dtype=accumulation_type(leaf)) for name, leaf in leaves.items()
            if work.edges[name] == 0 and work.arrivals[name] == 0}  # fmt: skip
    found = {name: value for name, value in work.found.items() if work.arrivals[name] == 1}
    return {**zero, **found}


class _Pass:
    """What one backward pass collects."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.edges: Counter[str] = Counter()  # places in the graph that use a parameter
        self.arrivals: Counter[str] = Counter()  # tapped layers through which a gradient came
        self.found: dict[str, Tensor] = {}

    def take(self, layer: nn.Module, rules: Mapping[str, tuple[str, Rule]], a: Tensor, g: Tensor) -> None:
        dtype = torch.promote_types(g.dtype, torch.float32)
        if a.is_floating_point():
            a = a.to(dtype)
        g = g.to(dtype)
        for name, rule in rules.values():
            self.arrivals[name] += 1
            if self.edges[name] == 1 and len(a) == len(g) == self.samples:
                self.found[name] = rule(layer, a, g)


class _Tap(torch.autograd.Function):
    """The identity; its backward pass hands the gradient over. The anchor keeps every tap in the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        anchor: Tensor,
        a: Tensor,
        layer: nn.Module,
        rules: Mapping[str, tuple[str, Rule]],
        work: _Pass,
    ) -> Tensor:
        ctx.save_for_backward(a)
        ctx.task = (layer, rules, work)
        return output.detach()  # no copy, and the next layer may still work in place

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        layer, rules, work = ctx.task
        with torch.autocast(g.device.type, enabled=False), torch.no_grad():
            work.take(layer, rules, *ctx.saved_tensors, g)
        return g, None, None, None, None, None


def _edges_into(losses: Tensor, leaves: Mapping[str, Tensor]) -> Counter[str]:
    """Count the places in the graph of the losses that use each leaf directly."""
    ends = {get_gradient_edge(leaf).node: name for name, leaf in leaves.items()}
    found: Counter[str] = Counter()
    start = losses.grad_fn
    stack: list[Node] = [] if start is None else [start]
    seen: set[Node] = set(stack)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node in ends:
                found[ends[node]] += 1
            elif node is not None and node not in seen:
                seen.add(node)
                stack.append(node)
    return found


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value: Tensor = args[0] if args else next(iter(kwargs.values()))
    return value


@contextmanager
def _hooks(pairs: Iterable[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Put forward hooks onto layers for a while, before any others."""
    handles = [layer.register_forward_hook(hook, prepend=True, with_kwargs=True) for layer, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
