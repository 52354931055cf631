"""One optimizer whose step is left out when its gradients are not finite."""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from ._finite_check import non_finite


class GuardedStep:
    """Put a decision in front of `optimizer.step`, on the instance.

    A step hook of torch can't cancel a step, and where there is a closure it runs before the gradients exist: Lightning
    runs forward, backward and clipping inside the closure. So `step` itself is replaced: it runs the closure once,
    asks `decide`, and either returns, or calls the step that was there with a closure that first replays the result.

    Args:
        optimizer: any torch optimizer.
        decide: whether to step; called after the closure, before the update.
        check_again: called after each further evaluation within one step (LBFGS, SAM); raises to stop.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        decide: Callable[["GuardedStep"], bool],
        check_again: Callable[["GuardedStep"], None],
    ) -> None:
        self.optimizer = optimizer
        self.consecutive = 0
        self.before_clipping: Tensor | None = None
        self.waits = False
        self.first_batch: int | None = None
        self._decide = decide
        self._check_again = check_again
        self._active = True
        self._own: Any = optimizer.__dict__.get("step")
        original = optimizer.step

        @functools.wraps(original)
        def step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return self._step(original, args, kwargs)

        # A bound method, for a scheduler that is made later wraps `step.__func__`.
        self._guarded = types.MethodType(step, optimizer)
        optimizer.step = self._guarded  # type: ignore[method-assign]

    def remove(self) -> None:
        """Put the step back that was there; where somebody has wrapped it since, only pass through."""
        self._active = False
        if self.optimizer.__dict__.get("step") is self._guarded:
            del self.optimizer.__dict__["step"]
            if self._own is not None:
                self.optimizer.step = self._own  # type: ignore[method-assign]

    def parameters(self) -> list[Tensor]:
        """Return the parameters that the optimizer holds now, in its order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients as they are now."""
        return [parameter.grad for group in self.optimizer.param_groups for parameter in group["params"]]

    def flags(self, device: torch.device) -> Tensor:
        """Flag each parameter whose gradient is not finite."""
        return non_finite(self.gradients(), device)

    def names(self, module: Module, bad: list[float]) -> list[str]:
        """Return the names of the flagged parameters."""
        known = {id(parameter): name for name, parameter in module.named_parameters()}
        return [
            known.get(id(parameter), f"parameter {i}")
            for i, (parameter, flag) in enumerate(zip(self.parameters(), bad, strict=True))
            if flag
        ]

    def _step(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._active:
            return original(*args, **kwargs)
        closure = kwargs.get("closure", args[0] if args else None)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self.waits = False
        if not self._decide(self):
            self.optimizer.zero_grad()
            # Else a scheduler complains that it was stepped before its optimizer.
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
            return result
        if closure is None:
            return original(*args, **kwargs)
        first = True

        def replay() -> Any:
            nonlocal first
            if first:
                first = False
                return result
            again = closure()
            self._check_again(self)
            return again

        if "closure" in kwargs:
            return original(*args, **{**kwargs, "closure": replay})
        return original(replay, *args[1:], **kwargs)
