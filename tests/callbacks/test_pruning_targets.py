"""The real decision: targets, precisions and the group lasso."""

import lightning.pytorch as pl
import pytest
import torch
from pruning_cases import (
    CLASSES,
    WIDTH,
    Images,
    convolutions,
    loader,
    macs_of,
    samples,
    trainer,
    widths,
)
from torch.optim import SGD, Adam

from ds_lightning.callbacks import ProgressivePruning
from ds_lightning.callbacks._group_lasso import GroupLasso
from ds_lightning.networks.channel_graph import ChannelGraph

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(GPU available|num_workers|litlogger|no step of this fit|multipliers|log_every_n_steps|LeafSpec).*"
)


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "bn_scale", "random"])
@pytest.mark.parametrize("network", [None, "net"])
def test_the_target_is_reached(importance, network):
    module = Images()
    pruning = ProgressivePruning(round_to=1, min_channels=1, start=0.1, end=0.8, every=2, importance=importance)
    pruning.network = network
    trainer(pruning).fit(module, loader())
    assert macs_of(*widths(module)) / macs_of(WIDTH, WIDTH) == pytest.approx(0.5, abs=0.06)  # a channel is 4 to 6%
    assert module(samples()[0]).shape == (len(samples()[0]), CLASSES)


def test_params_as_the_measure():
    module = Images()
    whole = sum(p.numel() for p in module.parameters())
    trainer(ProgressivePruning(0.4, measure="params", scope="layer", round_to=1, min_channels=1)).fit(module, loader())
    left = sum(p.numel() for p in module.parameters())
    assert left / whole == pytest.approx(0.4, abs=0.06)
    a, b = widths(module)
    assert left == 18 * a + 2 * a + 9 * a * b + 3 * b + CLASSES * b + CLASSES


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lower_precision(precision):
    module = Images(Adam, 0.01)
    pruning = ProgressivePruning(round_to=1, min_channels=1, start=0.1, end=0.8, every=2)
    trainer(pruning, precision=precision).fit(module, loader())
    assert macs_of(*widths(module)) / macs_of(WIDTH, WIDTH) == pytest.approx(0.5, abs=0.06)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16 if precision == "bf16-true" else torch.float32}


def test_the_group_lasso_is_the_gradient_of_the_sum_of_norms():
    network = convolutions(4, 5).double()
    groups = ChannelGraph(network, (samples()[0][:2].double(),)).groups
    parameters = dict(network.named_parameters())
    # Channel i of the first convolution: its filter, its norm, and what reads it; likewise the second.
    w = parameters
    norms = [
        (
            w["0.weight"][i].square().sum()
            + w["1.weight"][i] ** 2
            + w["1.bias"][i] ** 2
            + w["3.weight"][:, i].square().sum()
        )
        for i in range(4)
    ] + [
        (
            w["3.weight"][i].square().sum()
            + w["3.bias"][i] ** 2
            + w["4.weight"][i] ** 2
            + w["4.bias"][i] ** 2
            + w["8.weight"][:, i].square().sum()
        )
        for i in range(5)
    ]
    expected = torch.autograd.grad(sum(norm.sqrt() for norm in norms), list(w.values()), allow_unused=True)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer = SGD(network.parameters(), lr=0.1)
    GroupLasso(network, groups).pull(optimizer, 0.3)
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        wanted = 1.0 if gradient is None else 1.0 + 0.3 * gradient
        torch.testing.assert_close(parameter.grad, torch.as_tensor(wanted).to(parameter).expand_as(parameter), msg=name)


def test_sparsity_makes_the_channels_that_go_small():
    norms = {}
    for sparsity in (0.0, 0.5):
        module = Images(rate=0.05)
        pruning = ProgressivePruning(sparsity=sparsity, round_to=1, min_channels=1, schedule="one-shot", start=16)
        pulled = []

        class Reads(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx, pulled=pulled):
                if trainer.global_step == 15:
                    pulled.append(pl_module.net[0].weight.flatten(1).norm(dim=1).sum().item())

        trainer(pruning, Reads(), epochs=5).fit(module, loader())
        norms[sparsity] = pulled[0]
        assert widths(module) != (WIDTH, WIDTH)
    assert norms[0.5] < 0.9 * norms[0.0]
