from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from ds_lightning.callbacks._layers import find_layers
from ds_lightning.callbacks._scaled_steps import ScaledSteps, VarianceRule

MULTIPLIERS = {"0": 0.4, "1": 1.0, "3": 2.3}
NEVER = 10**9


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 6, generator=generator) for _ in range(count)]


def loss_of(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (net(x) - x[:, :2].sin()).square().mean()


def scale(net: nn.Module, optimizer: Optimizer, every: int = NEVER, **multipliers: float) -> ScaledSteps:
    rule = VarianceRule(1.0, (0.4, 2.3), every, 0.95, 0)
    scaled = ScaledSteps(optimizer, partial(find_layers, net), rule)
    scaled.statistics.multipliers = [multipliers.get(name, 1.0) for name in scaled.statistics.names]
    scaled._use_multipliers()
    return scaled


def train(net: nn.Sequential, optimizer: Optimizer, steps: int = 100) -> None:
    for x in batches(steps):
        optimizer.zero_grad()
        loss_of(net, x.to(net[0].weight)).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.SGD, lr=0.05),
        partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-2),
        partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-2, foreach=True),
        partial(torch.optim.SGD, lr=0.02, momentum=0.9, fused=True),
        partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.1),
        partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.1, fused=True, amsgrad=True),
        partial(torch.optim.Adam, lr=2e-3, weight_decay=0.1),
        partial(torch.optim.NAdam, lr=2e-3),
        partial(torch.optim.RAdam, lr=2e-3),
        partial(torch.optim.Adamax, lr=2e-3),
        partial(torch.optim.Adagrad, lr=1e-2, lr_decay=0.1),
        partial(torch.optim.Adadelta, lr=0.1),
        partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9),
    ],
    ids=lambda make: "-".join([make.func.__name__, *(k for k in make.keywords if k != "lr")]),
)
@pytest.mark.parametrize(
    ("dtype", "steps", "tolerance"), [(torch.float64, 100, 1e-12), (torch.float32, 20, 1e-6)], ids=["f64", "f32"]
)
def test_equals_hand_made_groups(make, dtype, steps, tolerance):
    grouped = network().to(dtype)
    rate = make.keywords["lr"]
    rates = {name: rate * m for name, m in MULTIPLIERS.items()}
    optimizer = make(
        [{"params": module.parameters(), "lr": rates.get(name, rate)} for name, module in grouped.named_children()]
    )
    train(grouped, optimizer, steps)

    net = network().to(dtype)
    optimizer = make(net.parameters())
    scale(net, optimizer, **MULTIPLIERS)
    train(net, optimizer, steps)
    assert [group["lr"] for group in optimizer.param_groups] == [rate]
    for got, want in zip(net.parameters(), grouped.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0.0, atol=tolerance)
    start = network().to(dtype)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(net.parameters(), start.parameters(), strict=True))


def test_multiplier_one_is_bit_equal_and_copies_nothing():
    plain, net = network(), network()
    train(plain, torch.optim.AdamW(plain.parameters()), steps=5)
    optimizer = torch.optim.AdamW(net.parameters())
    scaled = scale(net, optimizer)
    optimizer.register_step_post_hook(lambda *_: seen.append(scaled._interpolation.snapshot))
    seen: list[object] = []
    train(net, optimizer, steps=5)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    assert seen == [None] * 5


@pytest.mark.parametrize("form", ["keyword", "positional"])
def test_a_closure_runs_before_the_copy(form):
    """Lightning's closure runs forward and backward; what moves weights in there is not a step."""
    expected, net = network(), network()
    x = batches(1)[0]
    for model in (expected, net):
        with torch.no_grad():
            model[0].weight.mul_(0.5)  # what the closure will do, done by hand
    loss_of(expected, x).backward()
    with torch.no_grad():
        for name, module in expected.named_children():
            for p in module.parameters():
                p -= 0.1 * MULTIPLIERS.get(name, 1.0) * p.grad
    with torch.no_grad():
        net[0].weight.mul_(2.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scale(net, optimizer, **MULTIPLIERS)

    def closure() -> torch.Tensor:
        with torch.no_grad():
            net[0].weight.mul_(0.5)
        loss = loss_of(net, x)
        loss.backward()
        return loss

    loss = optimizer.step(closure=closure) if form == "keyword" else optimizer.step(closure)
    assert loss.item() == pytest.approx(loss_of(network_halved(), x).item())
    for got, want in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0.0, atol=1e-6)


def network_halved() -> nn.Sequential:
    net = network()
    with torch.no_grad():
        net[0].weight.mul_(0.5)
    return net


class TwoPoints(Optimizer):
    """Evaluates the closure at the weights and at a neighbour, and steps from the weights."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        params = [p for group in self.param_groups for p in group["params"]]
        start = [p.clone() for p in params]
        with torch.enable_grad():
            closure()
        for p in params:
            p.add_(p.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        for p, s in zip(params, start, strict=True):
            p.copy_(s - self.param_groups[0]["lr"] * p.grad)


def test_a_closure_that_is_called_twice_counts_once():
    net, twin = network(), network()
    x = batches(1)[0]

    def closure_of(model: nn.Module, optimizer: Optimizer):
        def closure():
            optimizer.zero_grad()
            loss_of(model, x).backward()

        return closure

    plain = TwoPoints(twin.parameters(), lr=0.1)
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    plain.step(closure_of(twin, plain))
    optimizer = TwoPoints(net.parameters(), lr=0.1)
    scaled = scale(net, optimizer, **MULTIPLIERS)
    optimizer.step(closure_of(net, optimizer))
    assert scaled.steps == 1
    for name, p in net.named_parameters():
        moved = twin.get_parameter(name) - start[name]
        want = start[name] + MULTIPLIERS.get(name.split(".")[0], 1.0) * moved
        torch.testing.assert_close(p, want, rtol=0.0, atol=1e-6)


def test_a_fused_optimizer_with_a_loss_scaler_gives_unscaled_statistics():
    readings = []
    for loss_scale in (1.0, 4096.0):
        net = network()
        optimizer = torch.optim.Adam(net.parameters(), fused=True)
        scaled = scale(net, optimizer, every=1)
        scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
        for x in batches(5):
            optimizer.zero_grad()
            scaler.scale(loss_of(net, x)).backward()
            scaler.step(optimizer)
            scaler.update()
        readings.append(scaled.statistics.moments)
    torch.testing.assert_close(readings[0], readings[1], rtol=1e-4, atol=0.0)
    assert (readings[0][1] > 0).all()


def test_a_step_that_the_scaler_skips_reaches_nothing():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaled = scale(net, optimizer, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(net, batches(1)[0]) * float("inf")).backward()
    scaler.step(optimizer)
    assert scaled.steps == 0


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=["SGD", "Adam"])
def test_weight_decay_in_the_momentum_is_no_signal(make):
    """With standing weights the statistics are those of the gradients alone, whatever the decay."""
    moments = []
    for decay in (0.0, 0.3):
        net = network().double()
        options = {"momentum": 0.9} if make is torch.optim.SGD else {}
        optimizer = make(net.parameters(), lr=0.0, weight_decay=decay, **options)
        scaled = scale(net, optimizer, every=1)
        for x in batches(30):
            optimizer.zero_grad()
            loss_of(net, x.double()).backward()
            optimizer.step()
        moments.append(scaled.statistics.moments)
    torch.testing.assert_close(moments[0], moments[1], rtol=1e-3, atol=0.0)


def test_a_momentum_older_than_the_callback_is_not_corrected_for_a_start():
    net = network().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    x = batches(1)[0].double()

    def step() -> None:
        optimizer.zero_grad()
        loss_of(net, x).backward()
        optimizer.step()

    for _ in range(300):
        step()
    scaled = scale(net, optimizer, every=1)
    for _ in range(3):
        step()
    mean_sq, second = scaled.statistics.moments
    # The same gradient every time: all of it is mean.
    torch.testing.assert_close(mean_sq, second, rtol=1e-5, atol=0.0)


def test_a_non_finite_gradient_is_skipped():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    scaled = scale(net, optimizer, every=1)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    for i, x in enumerate(batches(4)):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        if i == 1:
            net[0].weight.grad[0, 0] = float("nan")
        optimizer.step()
        net.load_state_dict(start)
    assert torch.isfinite(scaled.statistics.moments).all()
    decay = 0.95
    assert scaled.statistics.weight.tolist() == pytest.approx([1 - decay**2, 1 - decay**3, 1 - decay**3])


def test_removed_hooks_do_nothing():
    plain, net = network(), network()
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), steps=3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaled = scale(net, optimizer, **MULTIPLIERS)
    scaled.remove()
    train(net, optimizer, steps=3)
    assert scaled.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))


def test_ramp():
    rule = VarianceRule(1.0, (0.4, 2.3), every=10, ema=0.95, warmup=50)
    assert [rule.ramp(step) for step in (0, 9, 10, 20, 30, 50, 400)] == [0.0, 0.0, 0.0, 0.25, 0.5, 1.0, 1.0]
    assert [VarianceRule(1.0, (0.4, 2.3), 10, 0.95, 0).ramp(step) for step in (9, 10)] == [0.0, 1.0]
    slow = VarianceRule(1.0, (0.4, 2.3), every=10, ema=0.95, warmup=41, slow_start=True)
    assert [slow.ramp(step) for step in (0, 1, 11, 21, 41, 400)] == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("slow", [True, False])
def test_a_slow_start_reads_in_each_of_the_first_steps(slow):
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    scaled = ScaledSteps(
        optimizer, partial(find_layers, net), VarianceRule(1.0, (0.4, 2.3), 5, 0.95, 0, slow_start=slow)
    )
    found = []
    for step in range(40):
        train(net, optimizer, steps=1)
        if scaled.state_dict()["read"] == step:
            found.append(step)
    assert found == ([*range(9), 10, 12, 15, 18, 22, 27, 32, 37] if slow else list(range(0, 40, 5)))
