import copy

import ewc_cases as cases
import lightning.pytorch as pl
import pytest
import torch
from ewc_cases import Stranger, fisher_by_loop, loader, params, scaled, task, trainer
from torch.nn import functional as F

from ds_lightning.callbacks import ElasticWeightConsolidation

pytestmark = pytest.mark.filterwarnings("ignore:.*(GPU available|num_workers|litlogger|no step of this fit|val).*")
PLAIN = {"fisher": "empirical", "merge": None}


class Snapshots(pl.Callback):
    """The parameters and the callback's state when each task has ended."""

    def __init__(self, ewc):
        self.ewc, self.params, self.state = ewc, [], []

    def on_train_epoch_end(self, trainer, pl_module):
        if self.ewc.tasks > len(self.params):
            self.params.append(params(pl_module))
            self.state.append(copy.deepcopy(self.ewc.state_dict()))


def test_importance_and_anchor_are_those_of_the_definition():
    ewc = ElasticWeightConsolidation(**PLAIN)
    model = Stranger()
    trainer(ewc).fit(model, loader(0))
    expected = scaled(fisher_by_loop(model, *task(0)))
    assert ewc.tasks == 1
    for name, p in params(model).items():
        torch.testing.assert_close(ewc.importance[name], expected[name])
        assert torch.equal(ewc.anchor[name], p)
    assert sum(v.sum() for v in ewc.importance.values()) == pytest.approx(sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_the_step_is_the_one_that_autograd_makes_of_separate_penalties(mode):
    ewc = ElasticWeightConsolidation(strength=0.3, mode=mode, decay=0.5, **PLAIN)
    taken = Snapshots(ewc)
    seen = {}

    class Look(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            seen["before"] = {n: p.grad.clone() for n, p in pl_module.named_parameters()}

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen["after"] = {n: p.grad.clone() for n, p in pl_module.named_parameters()}
            seen["theta"] = params(pl_module)
            seen["penalty"] = ewc.penalty(pl_module)

    model, _ = cases.stream_fit(ewc, None, None, taken, Look())
    assert ewc.tasks == 3
    # The penalty of task 3's steps, from the snapshots of tasks 1 and 2.
    fishers = []
    for number, theta in enumerate(taken.params[:2]):
        model.load_state_dict(theta)
        fishers.append(scaled(fisher_by_loop(model, *task(number))))
    theta = {n: t.clone().requires_grad_() for n, t in seen["theta"].items()}
    if mode == "separate":
        terms = [(f, at) for f, at in zip(fishers, taken.params, strict=False)]
    else:
        terms = [({n: 0.5 * fishers[0][n] + fishers[1][n] for n in theta}, taken.params[1])]
    penalty = 0.3 / 2 * sum((f[n] * (theta[n] - at[n]) ** 2).sum() for f, at in terms for n in theta)
    assert seen["penalty"] == pytest.approx(penalty.item(), rel=1e-4)
    penalty.backward()
    for n, t in theta.items():
        torch.testing.assert_close(seen["after"][n] - seen["before"][n], t.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("fisher", ["true", "empirical"])
def test_the_importance_does_not_depend_on_the_batch_size(fisher):
    found = []
    for size in (8, 256):
        ewc = ElasticWeightConsolidation(fisher=fisher)
        trainer(ewc).fit(Stranger(rate=0.0), loader(0, size))
        found.append(ewc.importance)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-7)


def test_the_true_fisher_is_the_expectation_over_the_models_labels():
    ewc = ElasticWeightConsolidation()
    model = Stranger(rate=0.0)
    x = task(0, samples=32)[0].repeat(100, 1)
    data = torch.utils.data.TensorDataset(x, torch.zeros(len(x), dtype=torch.long))
    trainer(ewc, epochs=1).fit(model, torch.utils.data.DataLoader(data, batch_size=len(x)))
    model.eval()
    p = model(x[:32]).softmax(1)
    total = {n: 0.0 for n, _ in model.named_parameters()}
    for i in range(32):
        for c in range(2):
            model.zero_grad()
            F.cross_entropy(model(x[i : i + 1]), torch.tensor([c])).backward()
            for n, q in model.named_parameters():
                total[n] = total[n] + p[i, c].detach() * q.grad**2
    expected = scaled(total)
    for n in expected:
        torch.testing.assert_close(ewc.importance[n], expected[n], rtol=0.15, atol=0.05)


def test_a_huge_strength_is_stable_and_holds_the_parameters():
    ewc = ElasticWeightConsolidation(strength=1e6, merge=None)
    model = Stranger(rate=0.1)
    trainer(ewc).fit(model, loader(0))
    anchor = params(model)
    trainer(ewc, epochs=10).fit(model, loader(1))
    for n, p in params(model).items():
        assert p.isfinite().all()
        held = ewc.state_dict()["importance"][n] > 1e-2
        assert (p - anchor[n])[held].abs().max() < 0.5


def test_a_strangers_module_with_three_lines_forgets_less():
    def accuracy(*callbacks):
        model = Stranger(rate=0.02, make=torch.optim.Adam)
        pl.seed_everything(3, verbose=False)
        for number in (2, 3):
            trainer(*callbacks, epochs=12).fit(model, loader(number))
        model.eval()
        return [(model(x).argmax(1) == y).float().mean().item() for x, y in (task(2), task(3))]

    naive, held = accuracy(), accuracy(ElasticWeightConsolidation())
    assert held[0] > naive[0] + 0.05
    assert held[1] > 0.95


def test_merging_moves_to_the_weighted_mean_and_reports_it(tmp_path):
    logged = {}

    class Keeps(pl.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            logged.setdefault(step, {}).update(metrics)

        def log_figure(self, figure, name):
            logged[name] = [label.get_text() for label in figure.axes[0].get_yticklabels()]

    class Before(pl.Callback):
        """Comes first, so it sees the parameters that the task ended with."""

        def on_train_end(self, trainer, pl_module):
            self.theta = params(pl_module)

    before, ewc, model = Before(), ElasticWeightConsolidation(merge=5.0, fisher="empirical"), Stranger()
    trainer(before, ewc).fit(model, loader(0))
    old = copy.deepcopy(ewc.state_dict())
    trainer(before, ewc, logger=Keeps(tmp_path), log_every_n_steps=4).fit(model, loader(1))
    ratio = logged[11]["ewc/curvature_ratio"]
    end = Stranger()
    end.load_state_dict(before.theta)
    raw = fisher_by_loop(end, *task(1))
    for n, f in scaled(raw).items():
        c = (ratio / 5) ** 2
        a, u, t = old["importance"][n], old["anchor"][n], before.theta[n]
        torch.testing.assert_close(model.state_dict()[n], (c * a * u + f * t) / (c * a + f), rtol=1e-4, atol=1e-6)
        assert torch.equal(ewc.state_dict()["start"][n], model.state_dict()[n])
    moved = sum(((before.theta[n] - model.state_dict()[n]) ** 2).sum() for n in raw)
    whole = sum(((before.theta[n] - old["anchor"][n]) ** 2).sum() for n in raw)
    assert logged[11]["ewc/merged_share"] == pytest.approx((moved / whole).sqrt().item(), rel=1e-4)
    # The curvature by its definition, the mean of (d log p_y / dv)^2 over the model's labels, and what the diagonal
    # says of the path, from labels drawn half from the model and half from all, weighted by p over their chance.
    end.eval()
    v = {n: before.theta[n] - old["start"][n] for n in raw}
    x = task(1)[0]
    _, along = torch.func.jvp(lambda p: torch.func.functional_call(end, p, x).log_softmax(1), (before.theta,), (v,))
    p = end(x).softmax(1).detach().double()
    curvature = (p * along.double().square()).sum(1).mean()
    draws = torch.rand(len(x), dtype=torch.float64, generator=torch.Generator().manual_seed(_seed(1)))
    chance = p / 2 + 0.5 / p.shape[1]
    labels = (draws[:, None] >= chance.cumsum(1)).sum(1)
    weights = (p / chance)[torch.arange(len(x)), labels]
    predicted = 0.0
    for i, weight in enumerate(weights.tolist()):
        g = fisher_by_loop(end, x[i : i + 1], labels[i : i + 1])
        predicted += weight / len(x) * sum((g[n] * v[n] ** 2).sum().item() for n in v)
    assert ratio == pytest.approx((curvature / predicted).item(), rel=1e-2)
    assert logged["ewc/importance_2"] == list(raw)
    assert set(logged) >= {3, 7, 11}
    assert all("ewc/penalty" in logged[step] for step in (3, 7, 11))


def test_nothing_moves_where_the_diagonal_is_nearly_right():
    ewc, model = ElasticWeightConsolidation(merge=1e6), Stranger()
    trainer(ewc).fit(model, loader(0))
    trainer(ewc).fit(model, loader(1))
    unmerged, same = ElasticWeightConsolidation(merge=None), Stranger()
    trainer(unmerged).fit(same, loader(0))
    trainer(unmerged).fit(same, loader(1))
    for name, value in params(same).items():
        assert torch.equal(model.state_dict()[name], value)


def _seed(tasks):
    from ds_lightning.functional.seeds import derived_seed

    return derived_seed(0, "ewc labels", tasks)
