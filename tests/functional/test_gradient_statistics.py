import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.functional.gradient_statistics import (
    ema_update,
    layer_gradient_moments,
    radial_share,
    variance_multipliers,
)


def population_gradients() -> torch.Tensor:
    """Gradients of every single sample of a small network's first layer, (N, parameters)."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    x = torch.randn(256, 6, dtype=torch.float64)
    y = x @ torch.randn(6, 1, dtype=torch.float64) + 0.8 * torch.randn(256, 1, dtype=torch.float64)
    rows = []
    for i in range(len(x)):
        (grad,) = torch.autograd.grad(torch.nn.functional.mse_loss(net(x[i : i + 1]), y[i : i + 1]), net[0].weight)
        rows.append(grad.flatten())
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("make", "key", "scale", "beta"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9), "momentum_buffer", 0.1, 0.9),
        (lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.5), "momentum_buffer", 0.5, 0.5),
        (lambda p: torch.optim.Adam(p, lr=0.0), "exp_avg", 1.0, 0.9),
    ],
    ids=["sgd-0.9", "sgd-0.5", "adam"],
)
def test_mean_and_variance_agree_with_the_population(make, key, scale, beta):
    single = population_gradients()
    batch = 8
    mean_sq = single.mean(0).square().sum().item()
    variance = (single - single.mean(0)).square().sum(1).mean().item() / batch  # of a mini-batch gradient
    generator = torch.Generator().manual_seed(1)
    parameter = torch.nn.Parameter(torch.zeros(single.shape[1], dtype=torch.float64))
    optimizer = make([parameter])
    grads = single[torch.randint(len(single), (8000, batch), generator=generator)].mean(1)
    momenta = []
    for grad in grads:
        if optimizer.state:
            momenta.append((scale * optimizer.state[parameter][key]).square().sum())
        parameter.grad = grad
        optimizer.step()
    found = layer_gradient_moments(grads[1:].square().sum(1), torch.stack(momenta), beta, torch.arange(2, 8001))
    kept = torch.stack(found, dim=1)[50:]
    blocks = kept[: len(kept) // 50 * 50].view(-1, 50, 2).mean(1)  # momentum correlates neighbouring steps
    blocks = torch.stack([blocks[:, 0], blocks[:, 1] - blocks[:, 0]], dim=1)
    error = blocks.std(0) / math.sqrt(len(blocks))
    assert abs(blocks[:, 0].mean() - mean_sq) < 4 * error[0]
    assert abs(blocks[:, 1].mean() - variance) < 4 * error[1]
    assert error[0] < 0.1 * mean_sq  # the agreement is not for want of precision
    assert error[1] < 0.05 * variance


@pytest.mark.parametrize("beta", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("step", [3, 6, 40])
def test_white_noise_through_the_momentum_leaves_no_mean(beta, step):
    generator = torch.Generator().manual_seed(step)
    d = 200_000
    momentum = torch.zeros(d, dtype=torch.float64)
    for _ in range(step - 1):
        noise = torch.randn(d, generator=generator, dtype=torch.float64)
        momentum = beta * momentum + (1 - beta) * noise
    grad = torch.randn(d, generator=generator, dtype=torch.float64)
    mean_sq, second = layer_gradient_moments(grad.square().sum()[None], momentum.square().sum()[None], beta, step)
    n = step - 1
    rho = (1 - beta) * (1 + beta**n) / ((1 + beta) * (1 - beta**n))
    # chi-square: the relative error of each squared norm is sqrt(2 / d)
    assert abs(mean_sq.item()) < 5 * math.sqrt(2) * rho / (1 - rho) * math.sqrt(2 / d) * d
    assert second.item() == grad.square().sum().item()


@given(
    beta=st.floats(0.05, 0.995),
    step=st.integers(3, 2000),
    size=st.floats(1e-6, 1e6),
)
@settings(deadline=None, max_examples=40)
def test_a_constant_gradient_is_all_mean(beta, step, size):
    weight = 1 - beta ** (step - 1)  # the moving average of a constant that started at zero
    sq = torch.tensor([size], dtype=torch.float64)
    mean_sq, _ = layer_gradient_moments(sq, weight**2 * sq, beta, step)
    torch.testing.assert_close(mean_sq, sq, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("beta", "step"), [(0.0, 100), (0.9, 1), (0.9, 2)])
def test_without_information_in_the_momentum_the_mean_is_zero(beta, step):
    mean_sq, second = layer_gradient_moments(torch.tensor([2.0]), torch.tensor([1.5]), beta, step)
    assert mean_sq.item() == 0.0
    assert second.item() == 2.0


def test_layers_have_their_own_beta_and_step():
    beta, step = torch.tensor([0.9, 0.0, 0.5]), torch.tensor([10, 10, 2])
    grad, momentum = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.3, 0.3, 0.3])
    together, _ = layer_gradient_moments(grad, momentum, beta, step)
    alone = [layer_gradient_moments(grad[:1], momentum[:1], b, s)[0].item() for b, s in [(0.9, 10), (0.0, 10)]]
    assert together.tolist() == pytest.approx([*alone, 0.0], rel=1e-6)


def test_moving_average_is_the_weighted_mean_of_the_finite_values():
    values = [3.0, float("nan"), -1.0, float("inf"), 2.0]
    average, weight, decay = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), 0.7
    for value in values:
        average, weight = ema_update(average, weight, torch.tensor([value], dtype=torch.float64), decay)
    weights = [decay**2, decay, 1.0]
    expected = sum(w * v for w, v in zip(weights, [3.0, -1.0, 2.0], strict=True)) / sum(weights)
    assert average.item() == pytest.approx(expected, rel=1e-12)
    assert weight.item() == pytest.approx(1 - decay**3, rel=1e-12)


def test_a_layer_skips_when_either_of_its_values_is_not_finite():
    average, weight = torch.ones(2, 2), torch.full((2,), 0.5)
    value = torch.tensor([[5.0, float("inf")], [5.0, 5.0]])
    average, weight = ema_update(average, weight, value, 0.5)
    assert average[:, 1].tolist() == [1.0, 1.0]
    assert weight.tolist() == [0.75, 0.5]
    assert (average[:, 0] > 1).all()


def test_multipliers_follow_the_formula_layer_by_layer():
    mean_sq, second, numel = [0.5, -0.1, 0.999999], [1.0, 4.0, 1.0], [10.0, 20.0, 30.0]
    x = [
        -0.25 * math.log((1.0 - 0.5) / 10),
        -0.25 * math.log(4.0 / 20),  # a negative estimate of the mean counts as zero
        -0.25 * math.log(1e-3 / 30),  # the floor
    ]
    expected = [math.exp(0.6 * min(max(v - sum(x) / 3, math.log(0.7)), math.log(1.6))) for v in x]
    m = variance_multipliers(
        torch.tensor(mean_sq, dtype=torch.float64),
        torch.tensor(second, dtype=torch.float64),
        torch.tensor(numel, dtype=torch.float64),
        alpha=0.5,
        bounds=(0.7, 1.6),
        ramp=0.6,
    )
    assert m.tolist() == pytest.approx(expected, rel=1e-12)


def test_bounds_and_ramp_are_exact():
    zero, second, numel = torch.zeros(2).double(), torch.tensor([1e-12, 1e12]).double(), torch.ones(2).double()
    full = variance_multipliers(zero, second, numel, 1.0, (0.4, 2.3))
    assert full.tolist() == pytest.approx([2.3, 0.4], rel=1e-15)
    none = variance_multipliers(zero, second, numel, 1.0, (0.4, 2.3), ramp=0.0)
    assert none.tolist() == [1.0, 1.0]
    half = variance_multipliers(zero, second, numel, 1.0, (0.4, 2.3), ramp=0.5)
    assert half.tolist() == pytest.approx([math.sqrt(2.3), math.sqrt(0.4)], rel=1e-15)


@given(second=st.lists(st.floats(1e-9, 1e9), min_size=2, max_size=8), factor=st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=40)
def test_a_loss_scale_changes_nothing_and_more_noise_never_raises_a_rate(second, factor):
    e = torch.tensor(second, dtype=torch.float64)
    zero, numel = torch.zeros_like(e), torch.ones_like(e)
    m = variance_multipliers(zero, e, numel, 1.0, (0.4, 2.3))
    torch.testing.assert_close(m, variance_multipliers(zero, factor * e, numel, 1.0, (0.4, 2.3)), rtol=1e-9, atol=0.0)
    assert (m[e.argsort()].diff() <= 1e-12).all()
    assert ((m >= 0.4 - 1e-12) & (m <= 2.3 + 1e-12)).all()


def test_a_layer_without_statistics_keeps_its_rate_and_leaves_the_mean_alone():
    e = torch.tensor([1.0, 0.0, 4.0, float("nan")])
    m = variance_multipliers(torch.zeros(4), e, torch.ones(4), 1.0, (0.1, 10.0))
    assert m.tolist() == pytest.approx([2**0.5, 1.0, 2**-0.5, 1.0], rel=1e-6)


def test_one_layer_always_has_multiplier_one():
    assert variance_multipliers(torch.zeros(1), torch.ones(1), torch.ones(1), 1.0, (0.4, 2.3)).tolist() == [1.0]


@pytest.mark.parametrize(("norm", "free"), [(torch.nn.BatchNorm1d(5), True), (torch.nn.Identity(), False)])
def test_the_radial_share_is_the_derivative_by_the_size_of_the_weights(norm, free):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), norm, torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.randn(32, 1, dtype=torch.float64)
    weight = net[0].weight

    def loss_at(size):
        out = torch.func.functional_call(net, {"0.weight": size * weight}, x)
        return torch.nn.functional.mse_loss(out, y)

    (grad,) = torch.autograd.grad(loss_at(1.0), weight)
    slope = (loss_at(1 + 1e-5) - loss_at(1 - 1e-5)) / 2e-5
    expected = weight.numel() * slope**2 / (weight.square().sum() * grad.square().sum())
    squares = (weight.square().sum(), grad.square().sum())
    share = radial_share((weight * grad).sum(), *squares, torch.tensor(float(weight.numel())))
    torch.testing.assert_close(share, expected, rtol=1e-6, atol=1e-9)
    assert (share < 1e-6) == free


def test_without_weights_or_gradient_there_is_no_radial_share():
    zero, one = torch.zeros(2), torch.ones(2)
    assert radial_share(zero, torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), one).isnan().all()
