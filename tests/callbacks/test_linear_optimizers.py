import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_lightning.callbacks._linear_optimizers import (
    _LINEAR,
    check_linear,
    coupled_decay,
    default_alpha,
    momentum_of,
)
from ds_lightning.errors import ConfigError


class SignSGD(Optimizer):
    """Linear in its rate, and not from torch."""

    def __init__(self, params, lr: float = 0.1, power: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "power": power})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                with torch.no_grad():
                    p -= group["lr"] ** group["power"] * p.grad.sign()


class AdamWScheduleFree(SignSGD):
    pass


class Prodigy(SignSGD):
    pass


class NeedsModel(SignSGD):
    def __init__(self, params, model: nn.Module) -> None:
        super().__init__(params)


class NoHooks(Optimizer):
    def __init__(self, params) -> None:
        self.param_groups = [{"params": list(params), "lr": 0.1}]


def parameter() -> nn.Parameter:
    p = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
    p.grad = torch.randn(3, 3, dtype=torch.float64)
    return p


@pytest.mark.parametrize("kind", sorted(_LINEAR - {torch.optim.SparseAdam}, key=lambda k: k.__name__))
def test_what_counts_as_linear_moves_twice_as_far_at_twice_the_rate(kind):
    options = {"momentum": 0.9} if kind in (torch.optim.SGD, torch.optim.RMSprop) else {}
    decayed = {"weight_decay": 0.1, **options}
    moves = []
    for factor in (1.0, 2.0):
        torch.manual_seed(0)
        p = parameter()
        optimizer = kind([p], lr=0.01, **decayed)
        for _ in range(4):
            optimizer.step()
            p.grad = torch.randn(3, 3).to(p)
        before = p.detach().clone()
        optimizer.param_groups[0]["lr"] *= factor
        optimizer.step()
        moves.append(p.detach() - before)
    torch.testing.assert_close(moves[1], 2 * moves[0], rtol=1e-9, atol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_linear(kind([parameter()], lr=0.01))


@pytest.mark.parametrize("kind", [torch.optim.ASGD, torch.optim.Rprop])
def test_a_step_that_is_not_linear_is_measured(kind):
    with pytest.raises(ConfigError, match=rf"can't work with {kind.__name__}: twice the rate moved .* times"):
        check_linear(kind([parameter()]))


def test_line_search_schedule_free_and_d_adaptation_are_refused_by_name():
    with pytest.raises(ConfigError, match="can't work with LBFGS: it searches along a line"):
        check_linear(torch.optim.LBFGS([parameter()]))
    with pytest.raises(ConfigError, match="AdamWScheduleFree: a schedule-free optimizer"):
        check_linear(AdamWScheduleFree([parameter()]))
    with pytest.raises(ConfigError, match="Prodigy: it estimates its own rate"):
        check_linear(Prodigy([parameter()]))


def test_a_foreign_optimizer_is_tried_out():
    p, rate = parameter(), torch.tensor(0.1)
    before = p.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_linear(SignSGD([p], lr=rate))
    assert torch.equal(p, before)
    assert rate.item() == torch.tensor(0.1).item()
    with pytest.raises(ConfigError, match="SignSGD: twice the rate moved a test weight 4 times as far"):
        check_linear(SignSGD([parameter()], power=2.0))


def test_what_cannot_be_tried_out_is_said():
    with pytest.warns(UserWarning, match="can't try out NeedsModel"):
        check_linear(NeedsModel([parameter()], nn.Linear(1, 1)))


def test_an_optimizer_without_hooks_is_refused():
    with pytest.raises(ConfigError, match=r"NoHooks: it does not call torch\.optim\.Optimizer\.__init__"):
        check_linear(NoHooks([parameter()]))


@pytest.mark.parametrize(
    ("make", "beta"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.8), 0.8),
        (lambda p: torch.optim.Adam(p, lr=0.0, betas=(0.7, 0.9)), 0.7),
        (lambda p: torch.optim.AdamW(p, lr=0.0), 0.9),
        (lambda p: torch.optim.NAdam(p, lr=0.0), 0.9),
        (lambda p: torch.optim.RAdam(p, lr=0.0), 0.9),
        (lambda p: torch.optim.Adamax(p, lr=0.0), 0.9),
        (lambda p: torch.optim.Muon(p, lr=0.0, momentum=0.6), 0.6),
    ],
    ids=["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Muon"],
)
def test_momentum_is_the_moving_average_of_the_gradients_from_zero(make, beta):
    torch.manual_seed(0)
    p = parameter()
    optimizer = make([p])
    assert momentum_of(optimizer, optimizer.param_groups[0], p) is None
    expected = torch.zeros_like(p)
    for _ in range(5):
        p.grad = torch.randn(3, 3, dtype=torch.float64)
        expected = beta * expected + (1 - beta) * p.grad
        optimizer.step()
    momentum = momentum_of(optimizer, optimizer.param_groups[0], p)
    assert momentum is not None
    assert momentum.beta == beta
    torch.testing.assert_close(momentum.buffer * momentum.scale, expected, rtol=1e-9, atol=1e-12)


def test_dampening_is_scaled_away_and_other_buffers_are_not_taken_for_means():
    torch.manual_seed(0)
    p = parameter()
    optimizer = torch.optim.SGD([p], lr=0.0, momentum=0.5, dampening=0.5)
    expected: Tensor = torch.zeros_like(p)
    for _ in range(60):  # the first gradient enters undamped, and is forgotten
        p.grad = torch.randn(3, 3, dtype=torch.float64)
        expected = 0.5 * expected + 0.5 * p.grad
        optimizer.step()
    momentum = momentum_of(optimizer, optimizer.param_groups[0], p)
    assert momentum is not None
    torch.testing.assert_close(momentum.buffer * momentum.scale, expected, rtol=1e-9, atol=1e-12)
    normalised = torch.optim.RMSprop([p], lr=0.0, momentum=0.9)
    normalised.step()
    assert momentum_of(normalised, normalised.param_groups[0], p) is None


def test_decay_that_enters_the_momentum():
    def decay(optimizer: Optimizer) -> float:
        return coupled_decay(optimizer, optimizer.param_groups[0])

    assert decay(torch.optim.SGD([parameter()], weight_decay=0.1)) == 0.1
    assert decay(torch.optim.Adam([parameter()], weight_decay=0.1)) == 0.1
    assert decay(torch.optim.AdamW([parameter()], weight_decay=0.1)) == 0.0
    assert decay(torch.optim.Muon([parameter()], weight_decay=0.1)) == 0.0


def test_default_strength():
    assert default_alpha(torch.optim.SGD([parameter()])) == 1.0
    assert default_alpha(torch.optim.AdamW([parameter()])) == 0.5
