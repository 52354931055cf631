"""Training goes on as by hand, and whatever hangs on the parameters follows."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers.logger import Logger
from pruning_cases import (
    CLASSES,
    WIDTH,
    FixedPlans,
    Images,
    convolutions,
    equal,
    loader,
    macs_of,
    plan_keeping,
    tensors,
    trainer,
    widths,
)
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from ds_lightning.callbacks import DynamicLayerLR, ElasticWeightConsolidation, FiniteGuard, ProgressivePruning

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(GPU available|num_workers|litlogger|no step of this fit|multipliers|log_every_n_steps|LeafSpec).*"
)

A, B = (0, 2, 3, 5, 8, 9, 11, 12, 13, 15), (1, 2, 4, 6, 7, 10, 12, 14)
A2, B2 = (0, 1, 3, 4, 6, 9), (0, 2, 5, 7)
TWICE = {"target": 0.05, "network": "net", "schedule": "linear", "start": 0, "end": 6, "every": 3}


def plans():
    return plan_keeping(A, B, prefix=None), plan_keeping(A2, B2, before=(len(A), len(B)), prefix=None)


class Logs(Logger):
    def __init__(self):
        super().__init__()
        self.rows = []

    name = version = property(lambda self: "logs")

    def log_hyperparams(self, *args, **kwargs): ...

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


def cut(name, tensor, first, second):
    """By plain indexing, from the layer's number."""
    layer, a, b = name.split(".")[-2], list(first), list(second)
    if tensor.ndim == 0:
        return tensor
    if layer == "3" and tensor.ndim == 4:
        return tensor[b][:, a]
    if layer == "8":
        return tensor[:, b] if tensor.ndim == 2 else tensor
    return tensor[a] if layer in "01" else tensor[b]


def smaller(network, optimizer, make, options, first, second):
    """Build a smaller network and its optimizer afresh."""
    names = [name for name, _ in network.named_parameters()]
    state = optimizer.state_dict()
    new = convolutions(len(first), len(second))
    new.load_state_dict({name: cut(name, value, first, second) for name, value in network.state_dict().items()})
    for i, name in enumerate(names if state["state"] else ()):
        state["state"][i] = {
            key: cut(name, v, first, second) if isinstance(v, torch.Tensor) else v
            for key, v in state["state"][i].items()
        }
    fresh = make(new.parameters(), **options)
    fresh.load_state_dict(state)
    return new, fresh


def by_hand(make, options, removals, epochs=2, accumulate=1, seen=None):
    network = Images().net
    optimizer = make(network.parameters(), **options)
    step = 0
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader()):
            if i % accumulate == 0:
                optimizer.zero_grad()
            (F.cross_entropy(network(x), y) / accumulate).backward()
            if i % accumulate < accumulate - 1:
                continue
            optimizer.step()
            step += 1
            if step in removals:
                network, optimizer = smaller(network, optimizer, make, options, *removals[step])
            if seen is not None:
                seen.append(tensors(network))
    return network


@pytest.mark.parametrize(
    ("make", "options"),
    [(SGD, {"momentum": 0.9}), (Adam, {"amsgrad": True}), (Adam, {"fused": True})],
    ids=["sgd", "adam", "fused"],
)
def test_training_goes_on_as_by_hand(make, options, monkeypatch):
    FixedPlans(*plans()).into(monkeypatch)
    module = Images(make, 0.02, **options)
    trainer(ProgressivePruning(**TWICE)).fit(module, loader())
    expected = by_hand(make, {"lr": 0.02, **options}, {3: (A, B), 6: (A2, B2)})
    assert widths(module) == (len(A2), len(B2))
    assert equal(tensors(module.net), tensors(expected))


def test_in_the_middle_of_accumulation_nothing_is_removed(monkeypatch):
    FixedPlans(*plans()).into(monkeypatch)
    module = Images(Adam, 0.02)
    pruning = ProgressivePruning(0.05, network="net", schedule="linear", start=0, end=4, every=2)
    trainer(pruning, epochs=3, accumulate_grad_batches=2).fit(module, loader())
    expected = by_hand(Adam, {"lr": 0.02}, {2: (A, B), 4: (A2, B2)}, epochs=3, accumulate=2)
    for name, value in tensors(expected).items():
        torch.testing.assert_close(tensors(module.net)[name], value)


class InTurns(Images):
    """Manual optimization: the body and the head have optimizers of their own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return Adam(self.net[:5].parameters(), lr=0.01), SGD(self.net[8].parameters(), lr=0.05, momentum=0.9)


def test_two_optimizers_in_manual_optimization(monkeypatch):
    FixedPlans(*plans()).into(monkeypatch)
    module = InTurns()
    run = trainer(ProgressivePruning(**TWICE))
    run.fit(module, loader())
    held = [[id(p) for group in o.param_groups for p in group["params"]] for o in run.optimizers]
    assert held == [[id(p) for p in module.net[:5].parameters()], [id(p) for p in module.net[8].parameters()]]
    assert widths(module) == (len(A2), len(B2))
    assert run.optimizers[1].state[module.net[8].weight]["momentum_buffer"].shape == (CLASSES, len(B2))


def test_what_it_logs_is_counted_by_definition(monkeypatch):
    FixedPlans(*plans()).into(monkeypatch)
    logs, module = Logs(), Images()
    trainer(ProgressivePruning(**TWICE), logger=logs, log_every_n_steps=1).fit(module, loader())
    rows = [(step, row) for step, row in logs.rows if "pruning/macs" in row]
    assert [step for step, _ in rows] == [2, 5]  # with Lightning's own metrics of the batch
    for (_, row), (a, b) in zip(rows, ((len(A), len(B)), (len(A2), len(B2))), strict=True):
        parameters = 18 * a + 2 * a + 9 * a * b + b + 2 * b + CLASSES * b + CLASSES
        buffers = 4 * (2 * a + 2 * b) + 2 * 8  # running statistics, and two counters of 8 bytes
        assert row["pruning/macs"] == macs_of(a, b)
        assert row["pruning/macs_share"] == pytest.approx(macs_of(a, b) / macs_of(WIDTH, WIDTH))
        assert row["pruning/params"] == parameters
        assert row["pruning/size_mb"] == pytest.approx((4 * parameters + buffers) / 1e6)
        assert 0 < row["pruning/latency_ms"] < 1000


def test_the_average_of_the_weights_follows(monkeypatch):
    FixedPlans(*plans()).into(monkeypatch)
    average, module = EMAWeightAveraging(decay=0.5), Images()
    trainer(average, ProgressivePruning(**TWICE)).fit(module, loader())
    seen = []
    by_hand(SGD, {"lr": 0.05}, {3: (A, B), 6: (A2, B2)}, seen=seen)
    # The average comes first here: it takes step 3 in with its channels, and then loses them.
    mean = seen[0]
    for state, kept in zip(seen[1:], (None, (A, B), None, None, (A2, B2), None, None), strict=True):
        if kept:
            mean = {name: cut(name, value, *kept) for name, value in mean.items()}
        mean = {n: v if v.dtype == torch.long else 0.5 * v + 0.5 * state[n] for n, v in mean.items()}
    for name, value in module.net.named_parameters():  # on_train_end puts the average into the module
        torch.testing.assert_close(value.data, mean[name])


def test_elastic_weight_consolidation_keeps_what_is_left(monkeypatch):
    ewc, module = ElasticWeightConsolidation(strength=1.0, merge=None), Images()
    trainer(ewc, epochs=1).fit(module, loader())
    before = {group: dict(getattr(ewc._memory, group)) for group in ("importance", "anchor")}
    FixedPlans(plans()[0]).into(monkeypatch)
    once = ProgressivePruning(network="net", schedule="one-shot", start=1)
    penalties = []

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            theta = dict(pl_module.named_parameters())
            importance, anchor = ({n: cut(n, v, A, B) for n, v in before[g].items()} for g in ("importance", "anchor"))
            expected = sum((importance[n] * (theta[n] - anchor[n]) ** 2).sum() / 2 for n in anchor)
            penalties.append((ewc.penalty(pl_module), float(expected.detach())))

    trainer(ewc, once, Reads(), epochs=1, max_steps=3).fit(module, loader())
    assert len(penalties) == 3
    for ours, expected in penalties:
        assert ours == pytest.approx(expected, rel=1e-4)


def test_layer_rates_stay_with_their_layers(monkeypatch):
    FixedPlans(plans()[0]).into(monkeypatch)
    rates, seen = DynamicLayerLR("variance", every=2, warmup=4), []

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(rates.multipliers)

    # 7 steps: multipliers change at steps 5 and 7 (before them), and channels go after step 5.
    trainer(rates, ProgressivePruning(network="net", schedule="one-shot", start=5), Reads(), epochs=3).fit(
        Images(), loader()
    )
    assert {tuple(multipliers) for multipliers in seen} == {("net.0", "net.3", "net.8")}
    assert seen[4] == seen[5]
    assert any(abs(m - 1) > 0.01 for m in seen[4].values())
    assert seen[-1] != seen[5]


class HoldsOn(pl.Callback):
    """Puts the old parameters back into the optimizer, as a careless wrapper would."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.old = [list(group["params"]) for group in trainer.optimizers[0].param_groups]

    def on_channels_removed(self, trainer, pl_module, plan):
        for group, params in zip(trainer.optimizers[0].param_groups, self.old, strict=True):
            group["params"] = params


@pytest.mark.parametrize("make", [SGD, Adam])
def test_a_parameter_that_stands_still_is_an_error_at_the_next_step(make, monkeypatch):
    FixedPlans(plans()[0]).into(monkeypatch)
    run = trainer(HoldsOn(), ProgressivePruning(network="net", schedule="one-shot", start=3))
    with pytest.raises(RuntimeError, match=r"does not move net\.0\.weight, net\.1\.weight.* which have gradients"):
        run.fit(Images(make, 1e-5), loader())
    assert run.global_step == 3  # the step after is the one that is not completed


class Remembers(Images):
    """Holds one of its parameters, and regularises it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.held = [self.net[3].weight]

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.1 * self.held[0].square().sum()


class LooksUp(Remembers):
    def on_channels_removed(self, trainer, pl_module, plan):
        self.held = [self.net[3].weight]


def test_an_old_parameter_that_is_still_computed_with_is_an_error_unless_the_module_looks_it_up(monkeypatch):
    FixedPlans(plans()[0]).into(monkeypatch)
    with pytest.raises(RuntimeError, match=r"still computes with the old net\.3\.weight: expected every holder"):
        trainer(ProgressivePruning(network="net", schedule="one-shot", start=3)).fit(Remembers(), loader())
    FixedPlans(plans()[0]).into(monkeypatch)
    module = LooksUp()
    trainer(ProgressivePruning(network="net", schedule="one-shot", start=3)).fit(module, loader())
    assert module.held[0] is module.net[3].weight
    assert widths(module) == (len(A), len(B))


class NanAt(Images):
    def __init__(self, batch, **options):
        super().__init__(**options)
        self.batch = batch

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == self.batch else loss


def test_a_step_that_is_left_out_does_not_count_as_standing_still(monkeypatch):
    FixedPlans(plans()[0]).into(monkeypatch)
    guard, module = FiniteGuard(), NanAt(1)
    trainer(guard, ProgressivePruning(network="net", schedule="one-shot", start=1), epochs=1).fit(module, loader())
    assert guard.skipped == 1
    FixedPlans(plans()[0]).into(monkeypatch)
    pruning = ProgressivePruning(network="net", schedule="one-shot", start=1)
    with pytest.raises(RuntimeError, match="does not move"):
        trainer(FiniteGuard(), HoldsOn(), pruning, epochs=1).fit(NanAt(1), loader())


class OverflowsAt(Images):
    """Its gradient is infinite at one step, which leaves the weights alone: the rate is 0."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + (1e30 * self.net[0].weight).sum() * (1e30 if self.global_step == 2 else 0.0)


def test_gradients_that_overflow_put_a_removal_off_by_a_step():
    module, seen = OverflowsAt(rate=0.0), []

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(widths(pl_module) != (WIDTH, WIDTH))

    options = {"schedule": "one-shot", "start": 3, "importance": "taylor", "round_to": 1, "min_channels": 1}
    guard = FiniteGuard()
    trainer(guard, ProgressivePruning(**options), Reads()).fit(module, loader())
    assert guard.skipped == 1
    assert seen == [False] * 3 + [True] * 5


def test_a_warm_up_rate_of_zero_is_no_error(monkeypatch):
    FixedPlans(plans()[0]).into(monkeypatch)
    trainer(ProgressivePruning(network="net", schedule="one-shot", start=1), epochs=1).fit(Images(rate=0.0), loader())


def test_taylor_sees_the_gradients_of_that_very_step(monkeypatch):
    FixedPlans(plans()[0]).into(monkeypatch)
    seen = []
    monkeypatch.setattr(
        "ds_lightning.callbacks._pruning_decision.PruningRule.decide",
        lambda rule, trainer, graph, network, target, gradients, number: (seen.append(gradients), plans()[0])[1],
    )
    reads = []

    class Reads(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            reads.append({n: p.grad.clone() for n, p in pl_module.net.named_parameters()})

    pruning = ProgressivePruning(network="net", schedule="one-shot", start=3, importance="taylor")
    trainer(pruning, Reads(), gradient_clip_val=0.01).fit(Images(), loader())
    assert len(seen) == 1
    assert equal(seen[0], reads[2])


def test_an_exception_leaves_no_hook_behind(monkeypatch):
    FixedPlans(plans()[0]).into(monkeypatch)
    module, run = Images(), trainer(HoldsOn(), ProgressivePruning(network="net", schedule="one-shot", start=3))
    with pytest.raises(RuntimeError, match="does not move"):
        run.fit(module, loader())
    assert not module._load_state_dict_pre_hooks
    assert not run.optimizers[0]._optimizer_step_post_hooks


def test_nn_modules_of_the_module_that_is_not_pruned_stay(monkeypatch):
    FixedPlans(plans()[0]).into(monkeypatch)
    module = Images()
    module.extra = nn.Linear(2, 2)
    before = tensors(module.extra)
    trainer(ProgressivePruning(network="net", schedule="one-shot", start=1)).fit(module, loader())
    assert widths(module) == (len(A), len(B))
    assert equal(tensors(module.extra), before)
