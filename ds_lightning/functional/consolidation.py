"""Elastic weight consolidation as arithmetic: quadratics that merge, their gradient, means weighted by importance.

A task that has ended is remembered as a quadratic, `1/2 sum_i importance_i (theta_i - anchor_i)^2`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

STABLE = 0.5  # of 2, where the explicit step `theta -= rate * curvature * (theta - anchor)` starts to diverge


def normalised(fisher: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Divide importances by their mean over all elements, so that a strength means the same for any model and data.

    Args:
        fisher: parameter name to its diagonal Fisher information, >= 0, any shape.

    Returns:
        The same with mean 1; None when all are 0 (or there are none).

    Example:
        >>> normalised({"weight": torch.tensor([1.0, 3.0])})
        {'weight': tensor([0.5000, 1.5000])}
    """
    count = sum(value.numel() for value in fisher.values())
    # One number for all devices and sizes: float32 would lose small elements in a large sum.
    total = sum(float(value.sum(dtype=torch.float64)) for value in fisher.values())
    if total <= 0:
        return None
    return {name: value * (count / total) for name, value in fisher.items()}


def merge_quadratics(
    importance: Tensor, anchor: Tensor, fisher: Tensor, theta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Add two quadratics elementwise: their sum is one quadratic and a constant, exactly.

    `a (x - u)^2 + f (x - t)^2 = (a + f) (x - w)^2 + a f / (a + f) (u - t)^2` with `w = (a u + f t) / (a + f)`. So the
    memory of all tasks takes as much as that of one (Huszar, arXiv 1712.03847).

    Args:
        importance: a, >= 0, any shape.
        anchor: u, of the same shape.
        fisher: f, >= 0, of the same shape.
        theta: t, of the same shape.

    Returns:
        The importance, the anchor (theta where both importances are 0), and the sum of the constants, a float64 scalar.

    Example:
        >>> one, two = torch.tensor([1.0]), torch.tensor([3.0])
        >>> merge_quadratics(one, torch.tensor([0.0]), two, torch.tensor([4.0]))
        (tensor([4.]), tensor([3.]), tensor(12., dtype=torch.float64))
    """
    total = importance + fisher
    between = weighted_mean(anchor, importance, theta, fisher)
    harmonic = torch.where(total > 0, importance * (fisher / total), 0)
    constant = (harmonic.double() * (anchor - theta).double().square()).sum()
    return total, between, constant


def weighted_mean(anchor: Tensor, old: Tensor, theta: Tensor, new: Tensor) -> Tensor:
    """Return `(old * anchor + new * theta) / (old + new)` elementwise, and theta where both weights are 0.

    The mode of the product of two Gaussians with diagonal precisions `old` and `new` (Lee et al. 2017,
    arXiv 1703.08475, mode-IMM).

    Args:
        anchor: any shape.
        old: the anchor's weight, >= 0, of the same shape.
        theta: of the same shape.
        new: theta's weight, >= 0, of the same shape.

    Example:
        >>> weighted_mean(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.ones(2), torch.tensor([3.0, 0.0]))
        tensor([0.7500, 1.0000])
    """
    total = old + new
    return theta + torch.where(total > 0, old / total, 0) * (anchor - theta)


def quadratic_penalty(
    parameters: Sequence[Tensor], importance: Sequence[Tensor], anchor: Sequence[Tensor], constant: Tensor
) -> Tensor:
    """Return `1/2 (sum importance (parameter - anchor)^2 + constant)`, a float64 scalar.

    Args:
        parameters: tensors of any shapes.
        importance: one for each, of its shape.
        anchor: one for each, of its shape.
        constant: what merging left over, a scalar.
    """
    total = constant.detach().double()
    for theta, a, u in zip(parameters, importance, anchor, strict=True):
        total = total + (a * (theta.detach() - u).square()).sum(dtype=torch.float64).to(total.device)
    return total / 2


@torch.no_grad()
def add_penalty_gradients(
    gradients: list[Tensor],
    parameters: list[Tensor],
    importance: list[Tensor],
    anchor: list[Tensor],
    strength: float,
    rate: float | Tensor,
    scale: float = 1.0,
) -> None:
    """Add `scale * min(strength * importance, 0.5 / rate) * (parameter - anchor)` to gradients, in place.

    Without the bound an explicit step diverges where `rate * strength * importance` exceeds 2. With it a step of plain
    gradient descent goes at most half of the way to the anchor. Nothing waits for the device.

    Args:
        gradients: dense tensors, changed in place.
        parameters: one for each, of its shape.
        importance: one for each, of its shape, >= 0.
        anchor: one for each, of its shape.
        strength: > 0.
        rate: the learning rate of the coming step, >= 0; a tensor is not read on the host.
        scale: what the gradients are multiplied with already, > 0.

    Paper: Kirkpatrick et al. 2017, arXiv 1612.00796.
    """
    if not parameters:
        return
    factors = torch._foreach_mul(importance, strength)
    if isinstance(rate, Tensor):
        bounds = [(STABLE / rate).to(x.device, x.dtype).expand_as(x) for x in factors]
        torch._foreach_minimum_(factors, bounds)
    elif rate > 0:
        torch._foreach_clamp_max_(factors, STABLE / rate)
    pull = torch._foreach_sub(parameters, anchor)
    torch._foreach_mul_(pull, factors)
    if scale != 1:
        torch._foreach_mul_(pull, scale)
    # Importance and anchor are float32 also for parameters of half precision.
    same_type = [x.to(gradient.dtype) for x, gradient in zip(pull, gradients, strict=True)]
    torch._foreach_add_(gradients, same_type)


def path_curvature(logits: Tensor, forward: Tensor, backward: Tensor, step: float) -> Tensor:
    """Return the curvature of each sample's softmax loss along a path: `v' J' (diag p - p p') J v`.

    This is the quadratic form of the Fisher information matrix, with all that its diagonal leaves out. `J v` comes
    from a central difference.

    Args:
        logits: (B, C) at theta; minus infinity where an output is not allowed.
        forward: (B, C) at `theta + step * v`.
        backward: (B, C) at `theta - step * v`.
        step: > 0.

    Returns:
        (B,) float64, >= 0.
    """
    p = logits.double().softmax(1)
    along = torch.where(logits.isfinite(), (forward.double() - backward.double()) / (2 * step), 0)
    mean = (p * along).sum(1, keepdim=True)
    return (p * (along - mean).square()).sum(1)


def weighted_labels(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a label for each sample half from the model and half from all its outputs, with the weight that mends it.

    The mean of `weight * f(label)` is that of f over the model's own labels, and no weight exceeds 2. Where a model is
    certain, nearly all of its Fisher information comes from labels that it hardly ever draws: labels drawn from it
    alone need very many samples to find one. With numbers of the samples' own, a draw does not depend on how samples
    are put into batches.

    Args:
        logits: (B, C); minus infinity is never drawn.
        uniform: (B,) in [0, 1).

    Returns:
        The labels, (B,) int64, and their weights, (B,) float64: probability over chance to be drawn.

    Example:
        >>> weighted_labels(torch.zeros(2, 2), torch.tensor([0.1, 0.9]))
        (tensor([0, 1]), tensor([1., 1.], dtype=torch.float64))
    """
    p = logits.double().softmax(1)
    allowed = logits.isfinite()
    chance = (p + allowed / allowed.sum(1, keepdim=True)) / 2
    cumulative = chance.cumsum(1)
    place = uniform.double()[:, None] * cumulative[:, -1:]
    labels = (place >= cumulative).sum(1, keepdim=True).clamp_max(logits.shape[1] - 1)
    return labels[:, 0], (p.gather(1, labels) / chance.gather(1, labels))[:, 0]
