"""Gradient mean and variance of each layer from what an optimizer holds anyway, and rates from them.

All functions take one value a layer, work on any device without a synchronisation, and change nothing in place.
"""

import math

import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-3  # of E||g||^2: the estimate of a small variance is a difference of two large numbers
# Of `radial_share`. Means of three readings: in bfloat16 before a norm layer 2e-4 at most, others 0.03 at least
# (benchmarks/scale_free_layers.py).
SCALE_FREE = 0.003


def layer_gradient_moments(
    grad_sq: Tensor, momentum_sq: Tensor, beta: float | Tensor, step: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Estimate `||E g||^2` of each layer from one mini-batch gradient and the momentum.

    The momentum averages the past gradients, so its norm holds the mean gradient and the share `rho` of the noise
    that averaging leaves:

        n = step - 1                                  gradients that the momentum has seen
        rho = (1 - beta)(1 + beta^n) / ((1 + beta)(1 - beta^n))
        G2 = (||M||^2 / (1 - beta^n)^2 - rho ||g||^2) / (1 - rho)

    G2 has the expectation `||E g||^2` while the weights stand still; single values may be negative.

    Args:
        grad_sq: `||g||^2` of this step's gradient, (L,), >= 0.
        momentum_sq: `||M||^2`, (L,), >= 0, where M is the moving average `M <- beta M + (1 - beta) g` that started
            at zero: Adam's `exp_avg`, or `(1 - beta)` times SGD's `momentum_buffer`.
        beta: decay of the momentum a step, in [0, 1); a number or (L,).
        step: number of this step, counted from 1, so that M has seen `step - 1` gradients; a number or (L,).

    Returns:
        `(G2, E||g||^2)`, both (L,): the second is `grad_sq` itself, one sample of it. G2 is 0 where the momentum
        says nothing: beta = 0, or fewer than two gradients seen.

    Example:
        >>> layer_gradient_moments(torch.tensor([4.0]), torch.tensor([4.0]), beta=0.9, step=1000)[0]
        tensor([4.])
    """
    beta = torch.as_tensor(beta, dtype=grad_sq.dtype, device=grad_sq.device)
    seen = torch.as_tensor(step, dtype=grad_sq.dtype, device=grad_sq.device) - 1
    decayed = beta**seen
    rho = (1 - beta) * (1 + decayed) / ((1 + beta) * (1 - decayed))
    mean_sq = (momentum_sq / (1 - decayed) ** 2 - rho * grad_sq) / (1 - rho)
    return torch.where((beta > 0) & (seen > 1.5), mean_sq, torch.zeros_like(grad_sq)), grad_sq


def ema_update(average: Tensor, weight: Tensor, value: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Take one value into a bias-corrected moving average, skipping what is not finite.

    Args:
        average: the bias-corrected average so far, (L,) or (K, L); anything finite before the first value.
        weight: the sum of the weights in it, (L,), in [0, 1); 0 before the first value.
        value: the new value, shaped like `average`. Where any of the K values of a layer is not finite, that layer
            keeps its average and its weight.
        decay: share of the old average, in [0, 1).

    Returns:
        The new `(average, weight)`.

    Example:
        >>> ema_update(torch.zeros(2), torch.zeros(2), torch.tensor([3.0, float("nan")]), decay=0.5)
        (tensor([3., 0.]), tensor([0.5000, 0.0000]))
    """
    finite = torch.isfinite(value)
    if value.ndim > weight.ndim:
        finite = finite.all(dim=0)
    new_weight = decay * weight + (1 - decay)
    new_average = average + (1 - decay) / new_weight * (value - average)
    return torch.where(finite, new_average, average), torch.where(finite, new_weight, weight)


def gradient_variance(mean_sq: Tensor, second: Tensor) -> Tensor:
    """Return `max(E - max(A, 0), 1e-3 E)`, the variance of a mini-batch gradient summed over its elements.

    Args:
        mean_sq: A, an average of `||E g||^2`, (L,); a negative estimate counts as 0.
        second: E, an average of `||g||^2`, (L,), >= 0.

    Example:
        >>> gradient_variance(torch.tensor([1.0, -2.0]), torch.tensor([4.0, 4.0]))
        tensor([3., 4.])
    """
    return torch.maximum(second - mean_sq.clamp(min=0), VARIANCE_FLOOR * second)


def variance_multipliers(
    mean_sq: Tensor,
    second: Tensor,
    numel: Tensor,
    alpha: float,
    bounds: tuple[float, float],
    ramp: float = 1.0,
) -> Tensor:
    """Turn the gradient statistics of the layers into multipliers of the learning rate.

    The inverse rule: the noisier a layer's gradient is for its size, the smaller its steps.

        var = max(E - max(A, 0), 1e-3 E)
        x = -alpha / 2 * log(var / N)
        m = exp(ramp * clamp(x - mean of x over the layers, log low, log high))

    Args:
        mean_sq: A, an average of `||E g||^2`, (L,).
        second: E, an average of `||g||^2`, (L,).
        numel: N, number of weights of each layer, (L,).
        alpha: strength, > 0: 1 for SGD-type optimizers; 0.5 for Adam-type ones, which normalise by themselves.
        bounds: `(low, high)`, the smallest and the largest multiplier, 0 < low <= 1 <= high.
        ramp: 0 (all multipliers are 1) to 1 (the full rule).

    Returns:
        The multipliers, (L,). A layer without a positive, finite E gets 1 and does not count in the mean.

    Example:
        >>> variance_multipliers(torch.zeros(2), torch.tensor([1.0, 4.0]), torch.ones(2), 1.0, (0.1, 10.0))
        tensor([1.4142, 0.7071])
    """
    return exponent_multipliers(_variance_exponents(mean_sq, second, numel, alpha), bounds, ramp)


def trust_multipliers(
    mean_sq: Tensor,
    second: Tensor,
    numel: Tensor,
    weight_sq: Tensor,
    alpha: float,
    bounds: tuple[float, float],
    trust: float = 1.0,
    ramp: float = 1.0,
    center: float | None = None,
) -> Tensor:
    """The inverse rule, weighed with the size of the weights as LARS does: large weights may take larger steps.

        x = -alpha / 2 * log(var / N) + trust / 2 * log(||w||^2 / N)

    centred, bounded and ramped as in `variance_multipliers`. With a center that stays, the rate of all layers together
    follows the weights' size over the gradients', too, which is what LARS does (arXiv 1708.03888).

    Args:
        mean_sq: A, an average of `||E g||^2`, (L,).
        second: E, an average of `||g||^2`, (L,).
        numel: N, number of weights of each layer, (L,).
        weight_sq: `||w||^2`, (L,), >= 0.
        alpha: strength of the variance, > 0.
        bounds: `(low, high)`, the smallest and the largest multiplier, 0 < low <= 1 <= high.
        trust: strength of the weights' size, >= 0; 0 is the inverse rule.
        ramp: 0 (all multipliers are 1) to 1 (the full rule).
        center: the x that has multiplier 1; None: the mean of x over the layers.

    Returns:
        The multipliers, (L,). A layer without a positive, finite E and `||w||^2` gets 1 and does not count in the mean.

    Example:
        >>> e, n, w = torch.ones(2), torch.ones(2), torch.tensor([4.0, 1.0])
        >>> trust_multipliers(torch.zeros(2), e, n, w, 1.0, (0.1, 10.0))
        tensor([1.4142, 0.7071])
    """
    x = trust_exponents(mean_sq, second, numel, weight_sq, alpha, trust)
    return exponent_multipliers(x, bounds, ramp, center)


def trust_exponents(
    mean_sq: Tensor, second: Tensor, numel: Tensor, weight_sq: Tensor, alpha: float, trust: float = 1.0
) -> Tensor:
    """Return the x of `trust_multipliers`, whose arguments these are; NaN for a layer that has none.

    Example:
        >>> e, n, w = torch.ones(2), torch.ones(2), torch.tensor([4.0, 0.0])
        >>> trust_exponents(torch.zeros(2), e, n, w, 1.0)
        tensor([0.6931,    nan])
    """
    x = _variance_exponents(mean_sq, second, numel, alpha)
    known = (weight_sq > 0) & torch.isfinite(weight_sq)
    return torch.where(known, x + trust / 2 * torch.log(weight_sq / numel), torch.nan)


def radial_share(inner: Tensor, weight_sq: Tensor, grad_sq: Tensor, numel: Tensor) -> Tensor:
    """Return `N <w, g>^2 / (||w||^2 ||g||^2)`: whether the gradient has a part along the weights.

    If the loss does not depend on the size of w, as before a norm layer, then L(s w) = L(w), and its derivative by s
    at 1, <w, g>, is 0 (arXiv 1706.05350). A gradient that points anywhere has 1 on the average, one that shrinks or
    grows the weights more. A mean over readings below SCALE_FREE is taken as 0.

    Args:
        inner: <w, g> of each layer, (L,).
        weight_sq: `||w||^2`, (L,), >= 0.
        grad_sq: `||g||^2`, (L,), >= 0.
        numel: N, number of weights of each layer, (L,).

    Returns:
        The shares, (L,), in [0, N]; NaN where the weights or the gradient are all 0.

    Example:
        >>> one, n = torch.ones(3), torch.full((3,), 4.0)
        >>> radial_share(torch.tensor([0.0, 0.5, -1.0]), one, one, n)
        tensor([0., 1., 4.])
    """
    return numel * inner**2 / (weight_sq * grad_sq)


def mean_exponent(x: Tensor) -> float | None:
    """Return the mean of x over the layers that have one; None when there is none.

    Example:
        >>> mean_exponent(torch.tensor([1.0, float("nan"), 3.0]))
        2.0
    """
    known = x[~x.isnan()]
    return float(known.mean()) if len(known) else None


def exponent_multipliers(
    x: Tensor, bounds: tuple[float, float], ramp: float = 1.0, center: float | None = None
) -> Tensor:
    """Return `exp(ramp * clamp(x - center, log low, log high))`; 1 where x is NaN.

    Args:
        x: of each layer, (L,).
        bounds: `(low, high)`, the smallest and the largest multiplier, 0 < low <= 1 <= high.
        ramp: 0 (all multipliers are 1) to 1 (the full rule).
        center: the x that has multiplier 1; None: the mean of x over the layers.

    Example:
        >>> exponent_multipliers(torch.tensor([0.0, float("nan"), 2.0]), (0.5, 3.0), center=0.0)
        tensor([1., 1., 3.])
    """
    known = ~x.isnan()
    about = x.nansum() / known.sum().clamp(min=1) if center is None else center
    exponent = ramp * (x - about).clamp(math.log(bounds[0]), math.log(bounds[1]))
    return torch.where(known, torch.exp(exponent), torch.ones_like(x))


def snr_multipliers(
    mean_sq: Tensor, second: Tensor, alpha: float, bounds: tuple[float, float], ramp: float = 1.0
) -> Tensor:
    """Give a higher rate to a layer whose gradient is more signal than noise.

        x = alpha / 2 * log(max(A, 1e-3 E) / var)

    centred, bounded and ramped as in `variance_multipliers`.

    Args:
        mean_sq: A, an average of `||E g||^2`, (L,).
        second: E, an average of `||g||^2`, (L,).
        alpha: strength, > 0.
        bounds: `(low, high)`, the smallest and the largest multiplier, 0 < low <= 1 <= high.
        ramp: 0 (all multipliers are 1) to 1 (the full rule).

    Returns:
        The multipliers, (L,). A layer without a positive, finite E gets 1 and does not count in the mean.

    Example:
        >>> snr_multipliers(torch.tensor([0.8, 0.2]), torch.ones(2), 1.0, (0.1, 10.0))
        tensor([2.0000, 0.5000])
    """
    signal = torch.maximum(mean_sq, VARIANCE_FLOOR * second)
    x = alpha / 2 * torch.log(signal / gradient_variance(mean_sq, second))
    return exponent_multipliers(torch.where(_known(mean_sq, second), x, torch.nan), bounds, ramp)


def element_variance(grad_sum: Tensor, grad_sq: Tensor, numel: Tensor) -> Tensor:
    """Return the unbiased variance over the elements of each layer's gradient, as `torch.var` gives it.

    Args:
        grad_sum: sum of the gradient's elements, (L,).
        grad_sq: sum of their squares, (L,).
        numel: number of elements, (L,), >= 2.

    Example:
        >>> element_variance(torch.tensor([3.0]), torch.tensor([5.0]), torch.tensor([2.0]))  # elements 1 and 2
        tensor([0.5000])
    """
    return ((grad_sq - grad_sum**2 / numel) / (numel - 1)).clamp(min=0)


def article_multipliers(variance: Tensor) -> Tensor:
    """Return `1 + 0.5 (1 - exp(-0.1 Var))`, in [1, 1.5]; it is 1.000 for the variances of real gradients.

    Args:
        variance: variance over the elements of each layer's gradient, (L,), >= 0.

    Example:
        >>> article_multipliers(torch.tensor([0.0, 1e-3, 1e9]))
        tensor([1.0000, 1.0000, 1.5000])
    """
    return 1 - 0.5 * torch.expm1(-0.1 * variance)


def _known(mean_sq: Tensor, second: Tensor) -> Tensor:
    return (second > 0) & torch.isfinite(second) & torch.isfinite(mean_sq)


def _variance_exponents(mean_sq: Tensor, second: Tensor, numel: Tensor, alpha: float) -> Tensor:
    x = -alpha / 2 * torch.log(gradient_variance(mean_sq, second) / numel)
    return torch.where(_known(mean_sq, second), x, torch.nan)
