import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev

from ds_lightning.functional.consolidation import (
    add_penalty_gradients,
    merge_quadratics,
    normalised,
    path_curvature,
    quadratic_penalty,
    weighted_labels,
    weighted_mean,
)

D = torch.float64


def drawn(seed, tasks, size):
    """Importances with zeros in them, and parameters, one row a task."""
    g = torch.Generator().manual_seed(seed)
    fisher = torch.rand(tasks, size, generator=g, dtype=D) ** 8
    fisher[torch.rand(tasks, size, generator=g) < 0.3] = 0
    return fisher, torch.randn(tasks, size, generator=g, dtype=D), torch.randn(size, generator=g, dtype=D)


def merged(fisher, thetas):
    a, u, constant = fisher[0], thetas[0], torch.zeros((), dtype=D)
    for f, t in zip(fisher[1:], thetas[1:], strict=True):
        a, u, rest = merge_quadratics(a, u, f, t)
        constant = constant + rest
    return a, u, constant


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 7))
def test_merged_quadratics_are_the_sum_of_separate_ones_everywhere(seed, tasks, size):
    fisher, thetas, x = drawn(seed, tasks, size)
    separate = sum((f * (x - t) ** 2).sum() for f, t in zip(fisher, thetas, strict=True)) / 2
    a, u, constant = merged(fisher, thetas)
    torch.testing.assert_close(quadratic_penalty([x], [a], [u], constant), separate)
    assert torch.equal(u[(fisher == 0).all(0)], thetas[-1][(fisher == 0).all(0)])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.01, 1.0]))
def test_the_gradient_is_that_of_the_separate_penalties(seed, strength):
    fisher, thetas, x = drawn(seed, 3, 5)
    x.requires_grad_()
    (strength / 2 * sum((f * (x - t) ** 2).sum() for f, t in zip(fisher, thetas, strict=True))).backward()
    a, u, _ = merged(fisher, thetas)
    gradient = torch.ones(5, dtype=D)
    add_penalty_gradients([gradient], [x.detach()], [a], [u], strength, rate=1e-3)
    torch.testing.assert_close(gradient - 1, x.grad)


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)])
def test_the_bound_keeps_descent_from_diverging(rate):
    a, u = torch.tensor([0.0, 1e-3, 1.0, 1e6]), torch.zeros(4)
    x = torch.ones(4)
    for _ in range(200):
        gradient = torch.zeros(4)
        add_penalty_gradients([gradient], [x], [a], [u], 1e6, rate)
        before, x = x, x - 0.1 * gradient
        assert (x.abs() <= before.abs()).all()
    assert x[0] == 1
    assert (x[1:].abs() < 1e-6).all()


def test_a_rate_of_zero_bounds_nothing_and_scaled_gradients_get_a_scaled_penalty():
    gradient = torch.zeros(1, dtype=torch.bfloat16)
    add_penalty_gradients(
        [gradient], [torch.ones(1, dtype=torch.bfloat16)], [torch.ones(1)], [torch.zeros(1)], 3.0, 0.0, 8.0
    )
    assert gradient.item() == 24
    add_penalty_gradients([], [], [], [], 1.0, 0.1)


def test_normalised_has_mean_one_over_all_elements_and_knows_zeros():
    fisher = {"a": torch.tensor([[1e-12, 3e-12]]), "b": torch.tensor([8e-12])}
    scaled = normalised(fisher)
    torch.testing.assert_close(torch.cat([v.flatten() for v in scaled.values()]), torch.tensor([0.25, 0.75, 2.0]))
    assert normalised({"a": torch.zeros(3)}) is None
    assert normalised({}) is None


def test_the_weighted_mean_minimises_the_two_quadratics():
    (a, f), (u, t), _ = drawn(3, 2, 50)
    x = torch.zeros(50, dtype=D, requires_grad=True)
    with torch.no_grad():
        x.copy_(weighted_mean(u, a, t, f))
    (a * (x - u) ** 2 + f * (x - t) ** 2).sum().backward()
    assert x.grad.abs().max() < 1e-12
    nothing = (a == 0) & (f == 0)
    assert nothing.any()
    assert torch.equal(x[nothing], t[nothing])


@pytest.mark.parametrize("allowed", [None, [True, False, True]])
def test_the_curvature_of_a_path_is_that_of_the_dense_fisher_matrix(allowed):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(6, 4, dtype=D)
    keep = torch.ones(3, dtype=torch.bool) if allowed is None else torch.tensor(allowed)
    theta = {n: p.detach() for n, p in net.named_parameters()}
    v = {n: torch.randn_like(p) for n, p in theta.items()}

    def logits(parameters):
        return functional_call(net, parameters, x).masked_fill(~keep, float("-inf"))

    step = 1e-4  # of a central difference, whose error is about its square
    there, back = (logits({n: p + s * step * v[n] for n, p in theta.items()}) for s in (1, -1))
    ours = path_curvature(logits(theta), there, back, step)
    # By the definition: the expectation over the model's labels of the squared derivative of log p along v.
    jacobian = jacrev(lambda p: functional_call(net, p, x)[:, keep].log_softmax(1))(theta)
    p = logits(theta).softmax(1)[:, keep]
    along = sum((j * v[n]).flatten(2).sum(2) for n, j in jacobian.items())
    torch.testing.assert_close(ours, (p * along**2).sum(1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("certain", [1.0, 12.0])
def test_weighted_labels_give_means_over_the_models_own_labels(certain):
    logits = certain * torch.tensor([[0.0, 1.0, float("-inf"), -1.0]])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    labels, weight = weighted_labels(logits.expand(10_000, -1), uniform)
    means = torch.stack([(weight * (labels == c)).mean() for c in range(4)])
    torch.testing.assert_close(means, logits[0].double().softmax(0), rtol=2e-3, atol=0)
    assert weight.max() <= 2
    assert not (labels == 2).any()
    ends = torch.tensor([[float("-inf"), 0.0, float("-inf")]]).expand(2, -1)
    assert weighted_labels(ends, torch.tensor([0.0, 1 - 1e-16], dtype=D))[0].tolist() == [1, 1]
