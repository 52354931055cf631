"""Which gradients hold NaN or inf, found without waiting for the device."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class FiniteCheck:
    """One flag for all gradients, raised on the device where any of them holds NaN or inf; exact in every dtype.

    Args:
        device: where the flag is.
    """

    def __init__(self, device: torch.device) -> None:
        self._found = torch.zeros((), device=device)
        self._unscaled = torch.ones((), device=device)

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return the flag: a scalar, 0.0 where all is finite; it stays raised until `lower`.

        It is the same tensor each time, so it must be read before the next call or not at all.
        """
        held = [g if type(g) is Tensor else _values(g) for g in gradients if g is not None]
        if not held:
            return self._found
        if held[0].device == self._found.device:
            try:
                # GradScaler's own check at a scale of 1, which leaves every bit as it is: one kernel on a GPU, no
                # tensor for each result, and no overflow, as a norm has.
                torch._amp_foreach_non_finite_check_and_unscale_(held, self._found, self._unscaled)
            except RuntimeError:
                # It refuses sparse, complex and expanded gradients, several devices, and some backends.
                return self._found.add_(non_finite(held, self._found.device).sum())
            return self._found
        return self._found.add_(non_finite(held, self._found.device).sum())

    def lower(self) -> None:
        """Take the flag down."""
        self._found.zero_()


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
