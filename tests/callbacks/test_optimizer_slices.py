"""States sliced with the parameters: a step of what is left equals the step of the whole, cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from ds_lightning.callbacks._optimizer_slices import OptimizerSlices, check_optimizers
from ds_lightning.errors import ConfigError
from ds_lightning.networks import PruningPlan, apply_plan

# Their steps treat each element by itself, so a cut and a step can change places.
ELEMENTWISE = {
    "sgd": (SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
    "adam": (Adam, {"amsgrad": True}),
    "adam-fused": (Adam, {"fused": True, "amsgrad": True}),
    "adamw-foreach": (AdamW, {"foreach": True}),
    "adamw-single": (AdamW, {"foreach": False, "weight_decay": 0.1}),
    "rmsprop": (RMSprop, {"momentum": 0.5, "centered": True}),
    "adagrad": (Adagrad, {}),
    "adadelta": (Adadelta, {}),
    "adamax": (Adamax, {}),
    "nadam": (NAdam, {}),
    "radam": (RAdam, {}),
    "rprop": (Rprop, {}),
    "asgd": (ASGD, {}),
}


def pair(inputs=5, hidden=6, outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Linear(hidden, outputs))


def plan_of_hidden(kept, inputs=5, hidden=6, outputs=3):
    shapes = {"0.weight": (hidden, inputs), "0.bias": (hidden,), "1.weight": (outputs, hidden)}
    dims = {"0.weight": {0: kept}, "0.bias": {0: kept}, "1.weight": {1: kept}}
    return PruningPlan(shapes, dims, {"0": {"out_features": len(kept)}, "1": {"in_features": len(kept)}})


def cut(name, tensor, kept):
    """By plain indexing."""
    if name == "1.weight":
        return tensor[:, list(kept)]
    return tensor if name == "1.bias" else tensor[list(kept)]


def step(network, optimizer, gradients):
    for name, parameter in network.named_parameters():
        parameter.grad = gradients[name].clone()
    optimizer.step()


def prune(network, optimizer, plan):
    names = {p: name for name, p in network.named_parameters() if name in plan.shapes}
    slices = OptimizerSlices([optimizer], names, plan)
    slices.replace(apply_plan(network, plan))


@pytest.mark.parametrize("kind", ELEMENTWISE)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_a_step_after_the_cut_is_the_cut_of_the_step(kind, data):
    hidden = data.draw(st.integers(1, 7))
    kept = tuple(sorted(data.draw(st.sets(st.integers(0, hidden - 1), min_size=1))))
    make, options = ELEMENTWISE[kind]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    whole, cut_one = pair(hidden=hidden), pair(hidden=hidden)
    gradients = [
        {name: torch.randn(p.shape, generator=generator) for name, p in whole.named_parameters()} for _ in range(4)
    ]
    optimizers = [make(network.parameters(), lr=0.1, **options) for network in (whole, cut_one)]
    for network, optimizer in zip((whole, cut_one), optimizers, strict=True):
        step(network, optimizer, gradients[0])
        step(network, optimizer, gradients[1])
    prune(cut_one, optimizers[1], plan_of_hidden(kept, hidden=hidden))
    for later in gradients[2:]:
        step(whole, optimizers[0], later)
        step(cut_one, optimizers[1], {name: cut(name, g, kept) for name, g in later.items()})
    for name, value in whole.named_parameters():
        torch.testing.assert_close(dict(cut_one.named_parameters())[name].data, cut(name, value.data, kept))
    new = dict(cut_one.named_parameters())
    assert [id(p) for group in optimizers[1].param_groups for p in group["params"]] == [id(p) for p in new.values()]
    assert {id(p) for p in optimizers[1].state} == {id(p) for p in new.values()}


def test_adafactors_row_and_column_factors_keep_their_own_dimension():
    kept, network = (0, 2, 5), pair()
    optimizer = Adafactor(network.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    step(network, optimizer, {n: torch.randn(p.shape, generator=generator) for n, p in network.named_parameters()})
    before = {name: dict(optimizer.state[p]) for name, p in network.named_parameters()}
    prune(network, optimizer, plan_of_hidden(kept))
    after = {name: optimizer.state[p] for name, p in network.named_parameters()}
    rows = list(kept)
    assert torch.equal(after["0.weight"]["row_var"], before["0.weight"]["row_var"][rows])
    assert torch.equal(after["0.weight"]["col_var"], before["0.weight"]["col_var"])
    assert torch.equal(after["1.weight"]["row_var"], before["1.weight"]["row_var"])
    assert torch.equal(after["1.weight"]["col_var"], before["1.weight"]["col_var"][:, rows])
    assert torch.equal(after["0.bias"]["variance"], before["0.bias"]["variance"][rows])
    assert all(after[name]["step"] == before[name]["step"] == 1 for name in after)
    step(network, optimizer, {name: torch.ones_like(p) for name, p in network.named_parameters()})


def test_groups_keep_their_options_and_order():
    network, kept = pair(), (1, 4)
    groups = [{"params": [network[1].weight, network[0].bias], "lr": 0.2}, {"params": [network[0].weight], "lr": 0.3}]
    optimizer = SGD(groups, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    step(network, optimizer, {name: torch.ones_like(p) for name, p in network.named_parameters()})
    prune(network, optimizer, plan_of_hidden(kept))
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.15]
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == [
        [id(network[1].weight), id(network[0].bias)],
        [id(network[0].weight)],
    ]


class RowState(Optimizer):
    """Keeps one number for each row: no telling which dimension it is of."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["rows"] = p.grad.flatten(1).sum(1) if p.ndim > 1 else p.grad.clone()


class NestedState(RowState):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["history"] = [p.grad.clone()]


class AsksForMore(RowState):
    """Can't be tried out, for it wants what its groups do not hold."""

    def __init__(self, params, lr, secret):
        super().__init__(params, lr)


@pytest.mark.parametrize("kind", [LBFGS, RowState, NestedState])
def test_states_that_cant_be_matched_are_refused_at_the_start(kind):
    with pytest.raises(ConfigError, match=f"can't work with {kind.__name__}: .*Expected an optimizer"):
        check_optimizers([kind(pair().parameters(), lr=0.1)])


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_the_trial_accepts_what_torch_ships(kind):
    make, options = ELEMENTWISE[kind]
    network = pair()
    optimizer = type(make.__name__, (make,), {"__module__": "elsewhere"})(network.parameters(), lr=0.1, **options)
    before, states = {name: p.clone() for name, p in network.named_parameters()}, len(optimizer.state)
    check_optimizers([optimizer])
    assert len(optimizer.state) == states
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


def test_what_could_not_be_tried_is_refused_before_anything_is_touched():
    network = pair()
    optimizer = AsksForMore(network.parameters(), 0.1, "x")
    check_optimizers([optimizer])
    step(network, optimizer, {name: torch.ones_like(p) for name, p in network.named_parameters()})
    with pytest.raises(ConfigError, match=r"'rows' of 0\.weight"):
        prune(network, optimizer, plan_of_hidden((0, 1)))
    assert network[0].weight.shape == (6, 5)
    assert next(iter(optimizer.state)) is network[0].weight
