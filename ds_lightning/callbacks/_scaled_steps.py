"""One optimizer whose steps are scaled layer by layer."""

from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from ds_lightning.functional.gradient_statistics import gradient_variance

from ._interpolation import Interpolation
from ._layer_fade import Fade
from ._layer_history import LayerHistory
from ._layer_norms import read_norms
from ._layer_rules import VarianceRule as VarianceRule
from ._layer_statistics import LayerStatistics, Reading
from ._layers import Layer, group_numbers

_UNCHANGED = 0.01


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
        groups: which layers share one multiplier, as `group_numbers` takes it.
        find_vectors: returns the other parameters, whose multiplier is the rule's `vectors`.
        trained: tells of layers that are new to the optimizer whether they were trained before; then nothing is scaled.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        find: Callable[[list[Tensor]], list[Layer]],
        rule: VarianceRule,
        broadcast: bool = False,
        groups: str | Callable[[str], str] = "layer",
        find_vectors: Callable[[list[Tensor]], list[Tensor]] | None = None,
        trained: Callable[[list[Layer]], bool] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.rule = rule
        self.steps = 0
        self._read = 0  # the step of the last reading
        self._held = False
        self.idle = False  # all multipliers are 1, because the network was trained before
        self.smallest, self.largest = 1.0, 1.0  # over the whole fit
        self.readings, self.changed = 0, 0  # how many counted, and after how many a multiplier differed from 1
        self.history = LayerHistory()
        self.layers: list[Layer] = []
        self.groups: list[int] = []  # of each layer
        self.statistics = LayerStatistics()
        self._find = find
        self._broadcast = broadcast
        self._groups = groups
        self._find_vectors = find_vectors
        self._trained = trained
        self._vectors: list[Tensor] = []
        self._layer_groups: list[int] = []  # number of each layer's parameter group, to fade
        self._vector_groups: list[int] = []  # and of each vector's
        self._fade = Fade()
        self._stepped: list[Tensor] = []
        self._sparse: set[str] = set()
        self._reading: Reading | None = None
        self._used: list[float] = []
        self._noted = False  # whether those are in `smallest` and `largest`
        self._interpolation = Interpolation()
        self._find_layers(self._parameters())
        # Without any scale or shift there is no norm layer, and a rule that is not named scales nothing.
        if self._waits() and find_vectors is not None and find_vectors(self._stepped):
            self._hold(True)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def multipliers(self) -> dict[str, float]:
        """The multipliers in use, by layer."""
        return dict(zip(self.statistics.names, self._used, strict=True))

    @property
    def unfaded(self) -> dict[str, float]:
        """The multipliers as the rule gives them, by layer."""
        return dict(zip(self.statistics.names, self.statistics.multipliers, strict=True))

    @property
    def variances(self) -> dict[str, float]:
        """The variance of a layer's gradient, mean over its weights, where there are readings."""
        values = gradient_variance(self.statistics.moments[0], self.statistics.moments[1]).tolist()
        known = (self.statistics.weight > 0).tolist()
        return {
            layer.name: value / layer.weight.numel()
            for layer, value, ok in zip(self.layers, values, known, strict=True)
            if ok
        }

    @property
    def largest_change(self) -> float:
        """How far a multiplier has been from 1 at most."""
        return max(1 - self.smallest, self.largest - 1)

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        self._interpolation.snapshot = None
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
        held = self._held
        if self.steps == 0 or self.steps - self._read >= self.rule.interval(self._read):
            if self.layers:
                self._update_multipliers()
                self._leave_sparse_layers()
            if self.layers:  # a sparse layer may have been the last
                extra = self.rule.extra_rows
                self._reading = read_norms(self.optimizer, self.layers, self.statistics, self._broadcast, extra)
            self._read = self.steps
        for i, layer in enumerate(self.layers):
            if layer.weight.grad is not None:
                self.statistics.seen[i] += 1
        self.steps += 1
        if self.rule.fade and self._fade.follow([group["lr"] for group in self.optimizer.param_groups]):
            self._set_factors()
        if not self._noted and not self._held:
            self.smallest, self.largest = min(self.smallest, *self._used, 1.0), max(self.largest, *self._used, 1.0)
            self._noted = True
        if self.layers and ((self.steps - 1) % self.rule.every == 0 or held != self._held):
            self.history.add(self.steps - 1, self.multipliers)
        self._interpolation.before_update()

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        self._interpolation.after_update()

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _find_layers(self, stepped: list[Tensor]) -> None:
        self._stepped = stepped
        self.layers = [layer for layer in self._find(stepped) if layer.name not in self._sparse]
        self.groups = group_numbers(self.layers, self._groups)
        if self._find_vectors is not None and self.rule.vectors != 1:
            self._vectors = self._find_vectors(stepped)
        known = set(self.statistics.names)  # pruning replaces a layer's tensors, and not its name
        new = [layer for layer in self.layers if layer.name not in known]
        if new and self._trained is not None and self._trained(new):
            self.idle = True
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
        reading, self._reading = self._reading, None
        fresh = self.statistics.add(reading, self.rule.ema ** (self.steps - self._read))
        rows = reading.by_row(self.statistics.names)
        if not set(self.rule.extra_rows) <= set(rows):
            return  # a reading from the checkpoint of another rule
        numel = torch.tensor([layer.weight.numel() for layer in self.layers], dtype=torch.float64)
        if "inner" in self.rule.extra_rows:
            self.statistics.add_radial(rows, numel)
        if self._held:
            self._hold(self._waits())
            if self._held:
                return
        wanted = [1.0] * len(self.layers)
        if not self.idle:
            wanted = self.rule.multipliers(self.statistics, rows, numel, self.groups, self.steps)
        # A group without a gradient in that step keeps its multiplier until it trains again.
        trained = {group for group, ok in zip(self.groups, fresh, strict=True) if ok}
        self.statistics.multipliers = [
            new if group in trained else old
            for new, old, group in zip(wanted, self.statistics.multipliers, self.groups, strict=True)
        ]
        self._use_multipliers()
        self.readings += 1
        self.changed += any(abs(m - 1) > _UNCHANGED for m in self._used)

    def _waits(self) -> bool:
        return not self.idle and self.rule.holds(self.statistics, self.steps)

    def _hold(self, held: bool) -> None:
        """Let all layers wait at the lowest multiplier, or no longer."""
        self._held = held
        self.statistics.multipliers = [self.rule.floor if held else 1.0] * len(self.layers)
        self._use_multipliers()

    def _use_multipliers(self) -> None:
        scaled: list[Tensor] = []
        for layer, m in zip(self.layers, self.statistics.multipliers, strict=True):
            if m != 1:
                scaled += layer.tensors
        self._interpolation.use(scaled + self._vectors)
        if self.rule.fade:
            at = {id(p): i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
            self._layer_groups = [at[id(layer.weight)] for layer in self.layers]
            self._vector_groups = [at[id(vector)] for vector in self._vectors]
        self._set_factors()

    def _set_factors(self) -> None:
        """Fade the multipliers to what is used in this step; the tensors stay the same."""
        multipliers = self.statistics.multipliers
        self._used = self._fade.faded(multipliers, self._layer_groups) if self.rule.fade else multipliers
        retreat = [
            1 - used
            for layer, m, used in zip(self.layers, multipliers, self._used, strict=True)
            if m != 1
            for _ in layer.tensors
        ]
        vectors = [self.rule.vectors] * len(self._vectors)
        if self.rule.fade:
            vectors = self._fade.faded(vectors, self._vector_groups)
        self._interpolation.retreat = retreat + [1 - m for m in vectors]
        self._noted = False

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "read": self._read,
            "held": self._held,
            "idle": self.idle,
            "range": [self.smallest, self.largest],
            "readings": [self.readings, self.changed],
            "fade": self._fade.state_dict(),
            "history": self.history.state_dict(),
            "sparse": sorted(self._sparse),
            "layers": self.statistics.state_dict(),
            "reading": None if self._reading is None else self._reading.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> tuple[int, int]:
        """Go on from a state, layers matched by name; return how many layers are new and how many are gone."""
        self.steps, self._held = state["steps"], state.get("held", False)
        # The weights of a checkpoint look as in fine-tuning; what counts is what its fit started from.
        self.idle = self._trained is not None and state.get("idle", False)
        # Of a checkpoint from when readings were equally far apart.
        last = max(0, self.steps - 1) // self.rule.every * self.rule.every
        self._read = state.get("read", last)
        # An older checkpoint has "largest_change" alone.
        self.smallest, self.largest = state.get("range") or (1.0, 1.0 + state["largest_change"])
        self.readings, self.changed = state.get("readings", (0, 0))
        self._fade = Fade(**state.get("fade", {}))
        if self.rule.fade and self.steps and not self._fade.peaks:
            rank_zero_warn(
                "DynamicLayerLR resumes with fade=True from a checkpoint without the largest rate so far: multipliers "
                "fade from the rate that it resumes with"
            )
        self.history = LayerHistory(**state.get("history", {}))
        self._sparse = set(state["sparse"])
        self.statistics = LayerStatistics(**state["layers"])
        self._reading = None if state["reading"] is None else Reading(**state["reading"])
        before = set(self.statistics.names)
        self._find_layers(self._parameters())
        now = set(self.statistics.names)
        return len(now - before), len(before - now)
