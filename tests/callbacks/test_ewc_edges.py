"""Parameters, modules, data and arguments that are out of the ordinary."""

import warnings

import ewc_cases as cases
import lightning.pytorch as pl
import pytest
import torch
from ewc_cases import Stranger, fisher_by_loop, loader, params, scaled, task, trainer
from torch import nn
from torch.nn import functional as F

from ds_lightning.callbacks import ElasticWeightConsolidation
from ds_lightning.errors import ConfigError, NoEffectWarning
from ds_lightning.training import build, resolve

pytestmark = pytest.mark.filterwarnings("ignore:.*(GPU available|num_workers|litlogger|no step of this fit|val).*")
PLAIN = {"fisher": "empirical", "merge": None}


def test_frozen_shared_and_excluded_parameters():
    class Tied(Stranger):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = self.first
            self.body[0].weight.requires_grad_(False)

        def forward(self, x):
            return self.head(self.second(self.first(self.body(x)).tanh()))

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    ewc, model = ElasticWeightConsolidation(exclude=["head.*"], strength=10, **PLAIN), Tied()
    trainer(ewc).fit(model, loader(0))
    assert list(ewc.importance) == ["body.0.bias", "first.weight", "first.bias"]
    expected = scaled({n: f for n, f in fisher_by_loop(model, *task(0)).items() if n in ewc.importance})
    for n, f in expected.items():
        torch.testing.assert_close(ewc.importance[n], f)
    before = params(model)
    trainer(ewc).fit(model, loader(1))
    assert ewc.tasks == 2
    assert [n for n, p in params(model).items() if torch.equal(p, before[n])] == ["body.0.weight"]


def test_a_head_that_grows_keeps_its_old_rows_and_frees_the_new_ones():
    ewc, model = ElasticWeightConsolidation(strength=10.0), Stranger()
    trainer(ewc).fit(model, loader(0))
    old = model.head
    old_importance = ewc.importance["head.weight"]
    model.head = nn.Linear(8, 3)
    with torch.no_grad():
        model.head.weight[:2], model.head.bias[:2] = old.weight, old.bias
    new_row = model.head.weight[2].detach().clone()

    class First(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            assert torch.equal(ewc.importance["head.weight"][:2], old_importance)
            assert not ewc.importance["head.weight"][2].any()
            assert torch.equal(ewc.anchor["head.weight"][2], new_row)

    trainer(ewc, First()).fit(model, loader(1, classes=3))
    assert ewc.importance["head.weight"].shape == (3, 8)
    assert ewc.importance["head.weight"][2].any()
    model.head = nn.Linear(8, 2)
    with pytest.raises(ConfigError, match=r"head.weight is of shape \(2, 8\) and was \(3, 8\).*more rows"):
        trainer(ewc).fit(model, loader(0))
    model.head = nn.Identity()
    with pytest.raises(ConfigError, match=r"no parameter head.weight, head.bias"):
        trainer(ewc).fit(model, loader(0))


def test_several_optimizers_each_get_their_own_share():
    class Two(Stranger):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.body.parameters(), lr=0.0), torch.optim.SGD(self.head.parameters(), lr=0.0)

    calls = []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            calls.append({n: None if p.grad is None else p.grad.clone() for n, p in pl_module.named_parameters()})

    model = Two()
    first, ewc, second = Look(), ElasticWeightConsolidation(strength=1.0, merge=None), Look()
    trainer(ewc).fit(model, loader(0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    importance = dict(ewc.importance)
    trainer(first, ewc, second, max_steps=2).fit(model, loader(1))
    for own, (before, after) in (("body", calls[:2]), ("head", calls[2:4])):
        for n in before:
            if n.startswith(own):
                torch.testing.assert_close(after[n] - before[n], 0.1 * importance[n], rtol=1e-3, atol=1e-6)
            elif before[n] is not None:
                assert torch.equal(before[n], after[n])


def test_a_loss_fn_serves_a_module_without_logits():
    class Regression(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(cases.FEATURES, 1)

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.net(batch[0]).flatten(), batch[1].float())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    with pytest.raises(ConfigError, match=r"Regression has no forward.*loss_fn"):
        trainer(ElasticWeightConsolidation()).fit(Regression(), loader(0))

    def loss(module, batch):
        return (module.net(batch[0]).flatten() - batch[1]).square() / 2

    ewc, model = ElasticWeightConsolidation(loss_fn=loss, **PLAIN), Regression()
    trainer(ewc).fit(model, loader(0))
    x, y = task(0)
    error = (model.net(x).flatten() - y).detach()
    expected = scaled({"net.weight": (error[:, None] ** 2 * x**2).mean(0)[None], "net.bias": (error**2).mean()[None]})
    for n in expected:
        torch.testing.assert_close(ewc.importance[n], expected[n])


def test_what_is_no_classifier_is_told_at_the_first_batch():
    class Wide(Stranger):
        def forward(self, x):
            return super().forward(x)[:, :, None]

        def training_step(self, batch, batch_idx):
            return self(batch[0]).sum()

    with pytest.raises(ConfigError, match=r"output is \(2, 2, 1\); expected logits, \(B, C\).*loss_fn"):
        trainer(ElasticWeightConsolidation()).fit(Wide(), loader(0))
    x, y = task(0)
    floats = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y.float()), batch_size=8)
    with pytest.raises(ConfigError, match=r"labels are torch.float32.*loss_fn"):
        trainer(ElasticWeightConsolidation()).fit(Stranger(), floats)


def test_modes_and_random_numbers_are_left_as_they_were():
    class Watches(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.seen.append((torch.get_rng_state(), [m.training for m in pl_module.modules()]))

    class Half(Stranger):
        def on_train_start(self):
            self.body.eval()

    before, after = Watches(), Watches()
    ewc = ElasticWeightConsolidation()
    cases.stream_fit(ewc, Half(), None, after)
    cases.stream_fit(pl.Callback(), Half(), None, before)
    assert ewc.tasks == 3
    for (a, modes_a), (b, modes_b) in zip(before.seen, after.seen, strict=True):
        assert torch.equal(a, b)
        assert modes_a == modes_b
        assert not all(modes_a)


@pytest.mark.parametrize("state", ["keep", "reset"])
def test_the_optimizers_state_at_the_end_of_a_task(state):
    seen = []

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append(len(trainer.optimizers[0].state))

    ewc = ElasticWeightConsolidation(optimizer_state=state)
    cases.stream_fit(ewc, Stranger(make=torch.optim.Adam), None, Look())
    assert seen == ([0, 4, 4, 4, 4, 4] if state == "keep" else [0, 4, 0, 4, 0, 4])


def test_new_classes_alone_warn_once_and_the_same_classes_do_not():
    def warned(*loaders):
        ewc, model = ElasticWeightConsolidation(), Stranger(classes=4)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for data in loaders:
                trainer(ewc, epochs=1).fit(model, data)
        return [w for w in found if "classes are all new" in str(w.message)]

    (warning,) = warned(loader(0), loader(1, first=2))
    assert issubclass(warning.category, NoEffectWarning)
    assert "memory_size" in str(warning.message)
    assert not warned(loader(0), loader(1))


def test_a_task_that_says_nothing_warns():
    class Certain(Stranger):
        def forward(self, x):
            return torch.zeros(len(x), 1) * self.head.bias[:1]

        def training_step(self, batch, batch_idx):
            return self(batch[0]).sum()

    ewc = ElasticWeightConsolidation()
    with pytest.warns(NoEffectWarning, match="Fisher information is 0 everywhere"):
        trainer(ewc).fit(Certain(), loader(0))
    assert ewc.tasks == 0


def test_sparse_gradients_and_bad_arguments_are_refused():
    class Sparse(Stranger):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 2, sparse=True)

        def forward(self, x):
            return super().forward(x) + self.table((x[:, 0] > 0).long())

    ewc, model = ElasticWeightConsolidation(), Sparse()
    trainer(ewc).fit(model, loader(0))
    with pytest.raises(ConfigError, match=r"table.weight has a sparse gradient.*exclude"):
        trainer(ewc).fit(model, loader(1))
    for kwargs, text in (
        ({"strength": 0}, "strength is 0; expected a number > 0"),
        ({"mode": "both"}, "mode is 'both'; expected 'separate' or 'online'"),
        ({"decay": 2}, r"decay is 2; expected a number in \[0, 1\]"),
        ({"merge": -1}, "merge is -1; expected a number > 0"),
        ({"samples": 0}, "samples is 0; expected a whole number >= 1"),
        ({"exclude": "head.*"}, "exclude is the string"),
        ({"loss_fn": print}, "which both need logits; expected fisher='empirical' and merge=None"),
    ):
        with pytest.raises(ConfigError, match=text):
            ElasticWeightConsolidation(**kwargs)
    with pytest.raises(ConfigError, match=r"exclude has the pattern 'haed.\*'"):
        trainer(ElasticWeightConsolidation(exclude=["haed.*"])).fit(Stranger(), loader(0))


def test_the_preset_has_the_defaults_and_short_names_resolve():
    overrides = {"model": {"class_path": "Classifier", "init_args": {"num_classes": 2, "in_channels": 1}}}
    cli = build({**resolve(["callbacks/ewc.yaml"], overrides), "seed_everything": False})
    (made,) = (c for c in cli.trainer.callbacks if isinstance(c, ElasticWeightConsolidation))
    default, hidden = vars(ElasticWeightConsolidation()), ("_memory", "_labels")
    assert {k: v for k, v in vars(made).items() if k not in hidden} == {
        k: v for k, v in default.items() if k not in hidden
    }


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision):
    ewc, model = ElasticWeightConsolidation(strength=1.0), Stranger()
    for number in range(2):
        trainer(ewc, precision=precision).fit(model, loader(number))
    kept = torch.float64 if precision == "64-true" else torch.float32
    assert {v.dtype for v in ewc.importance.values()} == {kept}
    assert {v.dtype for v in ewc.anchor.values()} == {kept}
    assert all(p.isfinite().all() for p in model.parameters())
    assert 0 < ewc.penalty(model) < 1
