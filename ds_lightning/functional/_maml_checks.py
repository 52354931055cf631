"""What the functions of MAML accept, and how they go through tasks."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
TASKS = ("auto", "vmap", "loop")


def check_numbers(inner_lr: float | Mapping[str, Tensor], steps: int, order: int) -> None:
    """Refuse numbers that are outside their range."""
    if not isinstance(inner_lr, Mapping) and not (math.isfinite(inner_lr) and inner_lr >= 0):
        raise ValueError(f"inner_lr is {inner_lr}; expected a finite rate of at least 0, or a tensor a parameter")
    if steps < 0:
        raise ValueError(f"steps is {steps}; expected at least 0")
    if order not in (1, 2):
        raise ValueError(f"order is {order}; expected 1 (no second derivatives) or 2")
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "adaptation needs gradients, and inference mode is on; call it under torch.inference_mode(False)"
        )


def check_pair(x: Tensor, y: Tensor, dimensions: int, name: str = "support") -> None:
    """Refuse inputs and labels that differ in their first `dimensions` dimensions (1 a task, 2 many)."""
    wanted = "(N, ...)" if dimensions == 1 else "(T, N, ...)"
    if x.dim() < dimensions or y.dim() < dimensions or x.shape[:dimensions] != y.shape[:dimensions]:
        raise ValueError(
            f"{name} has inputs of shape {tuple(x.shape)} and labels of shape {tuple(y.shape)}; "
            f"expected {wanted} of both"
        )
    if 0 in x.shape[:dimensions]:
        raise ValueError(f"{name} has inputs of shape {tuple(x.shape)}; expected at least one task and one sample")


def all_parameters(own: Mapping[str, Tensor], given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the network's own parameters, with those that are given in their place."""
    for name, value in (given or {}).items():
        if name not in own:
            raise ValueError(f"params has {name!r}, which the network has not; expected names among {_listed(own)}")
        if value.shape != own[name].shape:
            raise ValueError(f"params has {name!r} of shape {tuple(value.shape)}; expected {tuple(own[name].shape)}")
    return {**own, **(given or {})}


def adapting(own: Mapping[str, Tensor], adapt: Iterable[str] | None) -> tuple[str, ...]:
    """Return the names of the parameters that adapt, in the order of `own`, the network's parameters."""
    if adapt is None:
        names = tuple(name for name, value in own.items() if value.requires_grad)
        if not names:
            raise ValueError("adapt is None and no parameter of the network requires a gradient; name some")
        return names
    wanted = {adapt} if isinstance(adapt, str) else set(adapt)
    unknown = sorted(wanted - own.keys())
    if unknown or not wanted:
        raise ValueError(f"adapt has {unknown or 'no name'}; expected names among {_listed(own)}")
    return tuple(name for name in own if name in wanted)


def check_rates(own: Mapping[str, Tensor], names: tuple[str, ...], inner_lr: float | Mapping[str, Tensor]) -> None:
    """Refuse learned rates that are missing or do not fit their parameter."""
    if not isinstance(inner_lr, Mapping):
        return
    for name in names:
        if name not in inner_lr:
            raise ValueError(f"inner_lr has no rate for {name!r}, which adapts; it has {_listed(inner_lr)}")
        shape, wanted = tuple(inner_lr[name].shape), tuple(own[name].shape)
        each = shape[1:] if len(shape) == len(wanted) + 1 and shape[0] > 0 else shape
        if each not in ((), wanted) and each != (1,) * len(wanted):
            raise ValueError(
                f"inner_lr for {name!r} has the shape {shape}; expected (), {wanted}, or (steps, ...) of {wanted} "
                "or of ones"
            )


def check_normalization(network: nn.Module) -> None:
    """Refuse layers whose running statistics would pass from one task to the next."""
    for name, module in network.named_modules():
        if getattr(module, "running_mean", None) is not None:
            raise ValueError(
                f"{name or 'the network'} ({type(module).__name__}) keeps running statistics, which would leak "
                "from support to query and from task to task; use GroupNorm, or take them out with "
                "use_batch_statistics(network)"
            )


def all_at_once(network: nn.Module, tasks: str, count: int, device: str = "cpu") -> bool:
    """Say whether the tasks go through one vmap.

    Args:
        network: looked at for `auto`: recurrent layers go through a loop alone, convolutions are faster so on a CPU,
            and layers that are not torch's own may not work under vmap.
        tasks: `auto`, `vmap` or `loop`.
        count: number of tasks.
        device: type of the device that has the inputs.
    """
    if tasks not in TASKS:
        raise ValueError(f"tasks is {tasks!r}; expected one of {', '.join(TASKS)}")
    if tasks != "auto":
        return tasks == "vmap"
    leaves = [module for module in network.modules() if not any(module.children())]
    known = all(type(leaf).__module__.startswith("torch.nn.modules.") for leaf in leaves)
    # On an accelerator the number of kernels decides, and vmap launches as many for all tasks as for one.
    looped = (*_RECURRENT, nn.modules.conv._ConvNd) if device == "cpu" else _RECURRENT
    return count > 1 and known and not any(isinstance(leaf, looped) for leaf in leaves)


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
