"""Which gradients hold NaN or inf, found without waiting for the device."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def size(gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Add the gradients' norms up: finite only if every gradient is, in one pass and without a look at the result.

    Not the other way round: it may overflow. `non_finite` then tells.

    Returns:
        A scalar on `device`.
    """
    held = [_values(gradient) for gradient in gradients if gradient is not None]
    held = [values for values in held if values.numel()]
    if not held:
        return torch.zeros((), device=device)
    # On a CPU the Euclidean norm is 17 times faster than the largest value; in half precision it overflows often.
    euclidean = all(values.is_cpu and values.dtype is not torch.float16 for values in held)
    norms = list(torch._foreach_norm(held, 2.0 if euclidean else math.inf))
    if len({(norm.dtype, norm.device) for norm in norms}) > 1:
        norms = [norm.to(device, torch.float64 if device.type == "cpu" else torch.float32) for norm in norms]
    return torch.stack(norms).sum(dtype=torch.float32).to(device)


@torch.no_grad()
def non_finite(gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Flag each gradient that holds NaN or inf.

    Args:
        gradients: dense, sparse or sharded (the local part counts); None where there is none.
        device: where the flags are wanted.

    Returns:
        1.0 or 0.0 for each gradient, shape (len(gradients),), on `device`.
    """
    flags = torch.zeros(len(gradients), device=device)
    held = [(i, _values(gradient)) for i, gradient in enumerate(gradients) if gradient is not None]
    held = [(i, values) for i, values in held if values.numel()]
    if not held:
        return flags
    # The largest absolute value is exact in every dtype, where a sum of squares overflows.
    norms = torch._foreach_norm([values for _, values in held], math.inf)
    if len({(norm.dtype, norm.device) for norm in norms}) == 1:
        bad = torch.stack(norms).isfinite().logical_not().to(flags)
    else:
        bad = torch.stack([norm.isfinite().logical_not().to(flags) for norm in norms])
    if len(held) == len(gradients):
        return bad
    present = iter(bad.unbind())
    indices = {i for i, _ in held}
    return torch.stack([next(present) if i in indices else flags[i] for i in range(len(gradients))])


def _values(gradient: Tensor) -> Tensor:
    if hasattr(gradient, "to_local"):
        local: Tensor = gradient.to_local()
        return local
    if gradient.layout is torch.strided:
        return gradient
    return gradient._values() if gradient.layout is torch.sparse_coo else gradient.values()
