"""One optimizer whose steps are scaled layer by layer."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from ds_lightning.functional.gradient_statistics import variance_multipliers

from ._layer_statistics import LayerStatistics, Reading, read_norms
from ._layers import Layer


@dataclass(frozen=True)
class VarianceRule:
    """How statistics become multipliers; the names are DynamicLayerLR's arguments."""

    alpha: float
    bounds: tuple[float, float]
    every: int
    ema: float
    warmup: int

    def ramp(self, step: int) -> float:
        """Return 0 before the first reading counts, 1 from step `warmup` on, linear between."""
        if step < self.every:
            return 0.0
        return 1.0 if step >= self.warmup else (step - self.every) / (self.warmup - self.every)


class ScaledSteps:
    """Hooks around `optimizer.step` that scale what the step does to each layer.

    Before the update (after the closure, where there is one: Lightning runs forward, backward and clipping inside
    it) the scaled tensors are copied; after it they are interpolated: `new = old + multiplier * (stepped - old)`.
    For a step that is linear in its rate this equals a rate of its own for each layer.

    Args:
        optimizer: any optimizer that passed `check_linear`.
        find: returns the layers of the module that are among the given parameters.
        rule: how multipliers are made.
        broadcast: statistics come from rank 0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        find: Callable[[list[Tensor]], list[Layer]],
        rule: VarianceRule,
        broadcast: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.rule = rule
        self.steps = 0
        self.largest_change = 0.0
        self.layers: list[Layer] = []
        self.statistics = LayerStatistics()
        self._find = find
        self._broadcast = broadcast
        self._stepped: list[Tensor] = []
        self._sparse: set[str] = set()
        self._reading: Reading | None = None
        self._scaled: list[Tensor] = []
        self._retreat: list[float] = []
        self._buffers: list[Tensor] = []
        self._snapshot: tuple[Tensor, ...] | list[Tensor] | None = None
        self._find_layers(self._parameters())
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def multipliers(self) -> dict[str, float]:
        return dict(zip(self.statistics.names, self.statistics.multipliers, strict=True))

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        self._snapshot = None
        if closure is None:
            self._before_update()
            return None
        done = False

        def closure_then_copy() -> Any:
            nonlocal done
            result = closure()
            if not done:  # an optimizer that calls it twice, such as SAM, starts from the first point
                self._before_update()
                done = True
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_copy}
        return (args[0], closure_then_copy, *args[2:]), kwargs

    @torch.no_grad()
    def _before_update(self) -> None:
        stepped = self._parameters()
        if len(stepped) != len(self._stepped) or not all(map(is_, stepped, self._stepped)):
            self._find_layers(stepped)
        if self.layers and self.steps % self.rule.every == 0:
            self._update_multipliers()
            self._leave_sparse_layers()
        if self.layers and self.steps % self.rule.every == 0:
            self._reading = read_norms(self.optimizer, self.layers, self.statistics, self._broadcast)
        for i, layer in enumerate(self.layers):
            if layer.weight.grad is not None:
                self.statistics.seen[i] += 1
        self.steps += 1
        if self._scaled:
            self._snapshot = self._copies()

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        if self._snapshot is not None:
            torch._foreach_lerp_(self._scaled, self._snapshot, self._retreat)
            self._snapshot = None

    def _copies(self) -> tuple[Tensor, ...] | list[Tensor]:
        if self._scaled[0].is_cuda:
            # The caching allocator makes this free, and no memory is held while the activations need it.
            return torch._foreach_mul(self._scaled, 1.0)
        # Elsewhere fresh pages cost ten times the copy.
        if not self._buffers:
            self._buffers = [torch.empty_like(tensor) for tensor in self._scaled]
        torch._foreach_copy_(self._buffers, self._scaled)
        return self._buffers

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _find_layers(self, stepped: list[Tensor]) -> None:
        self._stepped = stepped
        self.layers = [layer for layer in self._find(stepped) if layer.name not in self._sparse]
        self.statistics = self.statistics.aligned([layer.name for layer in self.layers])
        self._use_multipliers()

    def _leave_sparse_layers(self) -> None:
        sparse = [
            layer.name
            for layer in self.layers
            if layer.weight.grad is not None and layer.weight.grad.layout is not torch.strided
        ]
        if sparse:
            rank_zero_warn(
                f"DynamicLayerLR leaves out {', '.join(sparse)}: sparse gradients have no variance over steps that "
                "could be compared; the rate stays the scheduler's. Use sparse=False to include them"
            )
            self._sparse.update(sparse)
            self._find_layers(self._stepped)

    def _update_multipliers(self) -> None:
        if self._reading is None:
            return
        fresh = self.statistics.add(self._reading, self.rule.ema**self.rule.every)
        self._reading = None
        wanted = variance_multipliers(
            self.statistics.moments[0],
            self.statistics.moments[1],
            torch.tensor([layer.weight.numel() for layer in self.layers], dtype=torch.float64),
            self.rule.alpha,
            self.rule.bounds,
            self.rule.ramp(self.steps),
        ).tolist()
        # A layer without a gradient in that step keeps its multiplier until it trains again.
        self.statistics.multipliers = [
            new if ok else old for new, old, ok in zip(wanted, self.statistics.multipliers, fresh, strict=True)
        ]
        self._use_multipliers()

    def _use_multipliers(self) -> None:
        before, self._scaled, self._retreat = self._scaled, [], []
        for layer, m in zip(self.layers, self.statistics.multipliers, strict=True):
            if m != 1:
                self._scaled += layer.tensors
                self._retreat += [1 - m] * len(layer.tensors)
                self.largest_change = max(self.largest_change, abs(m - 1))
        if len(before) != len(self._scaled) or not all(map(is_, before, self._scaled)):
            self._buffers = []

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "largest_change": self.largest_change,
            "sparse": sorted(self._sparse),
            "layers": self.statistics.state_dict(),
            "reading": None if self._reading is None else self._reading.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> tuple[int, int]:
        """Go on from a state, layers matched by name; return how many layers are new and how many are gone."""
        self.steps = state["steps"]
        self.largest_change = state["largest_change"]
        self._sparse = set(state["sparse"])
        self.statistics = LayerStatistics(**state["layers"])
        self._reading = None if state["reading"] is None else Reading(**state["reading"])
        before = set(self.statistics.names)
        self._find_layers(self._parameters())
        now = set(self.statistics.names)
        return len(now - before), len(before - now)
