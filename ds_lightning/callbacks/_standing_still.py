"""The first step after a removal: every parameter with a gradient has to move."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# So much of a value's rounding may hide a step.
_ROUNDINGS = 4


class StandingStill:
    """Look, once for each optimizer, at a real step, and name the parameters that should have moved and did not.

    A step that is left out (GradScaler, FiniteGuard) does not count: the next one does. A parameter that no group
    holds counts where its gradient is not zero; another one where a plain step along its gradient, at its group's
    rate, would be larger than rounding. A replaced parameter that gets a gradient is still computed with.

    Args:
        stepped: each optimizer with the names of the parameters that it has to move.
        replaced: the parameters from before the removal, by name; nothing may compute with them any more.
    """

    def __init__(
        self, stepped: Mapping[Optimizer, Iterable[str]], replaced: Mapping[str, nn.Parameter] | None = None
    ) -> None:
        self._replaced = dict(replaced or {})
        for parameter in self._replaced.values():
            parameter.grad = None
        self._names = {optimizer: list(names) for optimizer, names in stepped.items()}
        self._copies: dict[str, Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._handles = [optimizer.register_step_post_hook(self._after) for optimizer in self._names]

    def before(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Copy what an optimizer is about to step; to be called in `on_before_optimizer_step`."""
        if optimizer not in self._names:
            return
        parameters = dict(module.named_parameters())
        self._parameters = {name: parameters[name] for name in self._names[optimizer] if name in parameters}
        self._copies = {name: p.detach().clone() for name, p in self._parameters.items() if p.grad is not None}

    def remove(self) -> None:
        """Take the hooks off the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._names, self._copies, self._parameters, self._replaced = {}, {}, {}, {}

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        # A fused optimizer is called even where the GradScaler found inf, and looks at this flag by itself.
        found_inf = getattr(optimizer, "found_inf", None)
        if optimizer not in self._names or not self._copies or (found_inf is not None and bool(found_inf)):
            return
        used = [name for name, parameter in self._replaced.items() if parameter.grad is not None]
        self._replaced = {}
        if used:
            raise RuntimeError(
                f"after channels were removed, something still computes with the old {', '.join(used[:5])}: expected "
                "every holder of parameters to look them up, or to implement on_channels_removed"
            )
        rates = {p: float(group.get("lr", 0.0)) for group in optimizer.param_groups for p in group["params"]}
        flags = [
            _stands_still(before, self._parameters[name], rates.get(self._parameters[name]))
            for name, before in self._copies.items()
        ]
        device = flags[0].device
        still = torch.stack([flag.to(device, non_blocking=True) for flag in flags]).tolist()
        names = [name for name, flag in zip(self._copies, still, strict=True) if flag]
        del self._names[optimizer]
        self._copies, self._parameters = {}, {}
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise RuntimeError(
                f"after channels were removed, {type(optimizer).__name__} does not move {shown}, which have gradients; "
                "something still holds the parameters from before: expected every holder to look them up, or to "
                "implement on_channels_removed"
            )


@torch.no_grad()
def _stands_still(before: Tensor, parameter: nn.Parameter, rate: float | None) -> Tensor:
    gradient = parameter.grad
    if gradient is None or gradient.layout is not torch.strided:
        return torch.zeros((), dtype=torch.bool, device=before.device)
    if rate is None:
        pulled = gradient.ne(0).any()
    else:
        pulled = ((rate * gradient).abs() > _ROUNDINGS * torch.finfo(before.dtype).eps * before.abs()).any()
    return pulled & parameter.eq(before).all()
