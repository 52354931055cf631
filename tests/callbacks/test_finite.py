import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from finite_cases import Two, User, batches, by_hand, loader, same, trainer_of
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from ds_lightning.callbacks import DynamicLayerLR, FiniteGuard
from ds_lightning.callbacks._finite_check import FiniteCheck, non_finite
from ds_lightning.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*(GPU available|LeafSpec|num_workers|logging interval|litlogger).*")

MAKERS = {
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": partial(AdamW, lr=0.1),
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"clip": 0.1}, {"schedule": partial(StepLR, step_size=2)}])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_poisoned_batch_is_as_if_it_were_left_out(make, options, value):
    model, optimizer = by_hand(make, batches(), left_out=(2, 3) if "accumulate" in options else (3,), **options)
    user, guard = User(make, options.get("schedule")), FiniteGuard()
    trainer = trainer_of(
        guard, accumulate_grad_batches=options.get("accumulate", 1), gradient_clip_val=options.get("clip")
    )
    # tanh(inf) is 1: the loss is finite then, and the gradient is inf * 0.
    with pytest.warns(UserWarning, match=r"in net.0.weight.*\(epoch 0, batch (2, )?3, step \d") as caught:
        trainer.fit(user, loader(batches(poison=[3], value=value)))
    assert same(user.net.state_dict(), model.state_dict())
    assert same(trainer.optimizers[0].state_dict(), optimizer.state_dict())
    assert guard.skipped == 1
    assert sum("FiniteGuard" in str(w.message) for w in caught) == 1
    assert not any("before `optimizer.step" in str(w.message) for w in caught)
    assert guard.events[0]["batches"][-1] == 3


def test_without_the_guard_the_weights_are_lost():
    user = User(MAKERS["sgd"])
    trainer_of().fit(user, loader(batches(poison=[3])))
    assert user.net[0].weight.isnan().any()


def test_two_manual_optimizers_decide_by_themselves():
    make = MAKERS["adamw"]
    module, guard = Two(make), FiniteGuard()
    trainer = trainer_of(guard)
    with pytest.warns(UserWarning, match=r"in a.0.weight, a.0.bias, a.2.weight, a.2.bias \(epoch 0, batch 3"):
        trainer.fit(module, loader(batches(poison=[3])))
    for net, optimizer, left_out in zip((module.a, module.b), trainer.optimizers, ((3,), ()), strict=True):
        expected, by = by_hand(make, batches(), left_out)
        assert same(net.state_dict(), expected.state_dict())
        assert same(optimizer.state_dict(), by.state_dict())


class LateNaN(pl.Callback):
    """Adds its gradient after the guard looked for names, as a penalty would."""

    def __init__(self, value=math.nan):
        self.value, self.calls = value, 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.calls == 3:
            pl_module.net[2].bias.grad += self.value
        self.calls += 1


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}])
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_from_another_callback_counts(first, options):
    module = User(MAKERS["sgd"])
    callbacks = [FiniteGuard(), LateNaN()] if first else [LateNaN(math.inf), FiniteGuard()]
    with pytest.warns(UserWarning, match=r"in net.2.bias \(epoch 0, batch 3"):
        trainer_of(*callbacks, **options).fit(module, loader(batches()))
    if not options:
        assert same(module.net.state_dict(), by_hand(MAKERS["sgd"], batches(), (3,))[0].state_dict())
    assert all(p.isfinite().all() for p in module.parameters())


class ConstantNaN(User):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (math.nan if batch_idx == 3 else 0.0)


def test_a_loss_with_finite_gradients_counts():
    module = ConstantNaN(MAKERS["adamw"])
    with pytest.warns(UserWarning, match=r"NaN or inf in the loss \(epoch 0, batch 3"):
        trainer_of(FiniteGuard()).fit(module, loader(batches()))
    assert same(module.net.state_dict(), by_hand(MAKERS["adamw"], batches(), (3,))[0].state_dict())


def test_it_stops_with_one_clear_error():
    module = User(MAKERS["sgd"])
    with pytest.raises(FloatingPointError) as error:
        trainer_of(FiniteGuard(max_consecutive=3)).fit(module, loader(batches(poison=[1, 2, 3])))
    text = str(error.value)
    assert text.startswith("FiniteGuard stopped the training: 3 steps in a row were not finite (max_consecutive is 3)")
    assert "net.0.weight" in text
    assert "batch 3, step 3, SGD" in text
    assert "\n" not in text
    assert same(module.net.state_dict(), by_hand(MAKERS["sgd"], batches(), range(1, 8))[0].state_dict())

    data = loader(batches(poison=[1, 3]))
    with pytest.raises(FloatingPointError, match=r"2 steps in all were not finite \(max_total is 2\).*batch 3"):
        trainer_of(FiniteGuard(max_total=2)).fit(User(MAKERS["sgd"]), data)
    trainer_of(FiniteGuard(max_consecutive=2)).fit(User(MAKERS["sgd"]), data)


class _LateSchedule(User):
    """Makes a scheduler in the middle of training, which wraps the guarded step."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 1:
            self.late = StepLR(self.trainer.optimizers[0], 100)


def test_the_step_is_put_back():
    for module in (
        User(MAKERS["sgd"]),
        User(MAKERS["sgd"], partial(StepLR, step_size=9)),
        _LateSchedule(MAKERS["sgd"]),
    ):
        trainer = trainer_of(FiniteGuard())
        trainer.fit(module, loader(batches()))
        (optimizer,) = trainer.optimizers
        before = module.net[0].weight.detach().clone()
        module.net[0].weight.grad = torch.full_like(before, math.nan)
        optimizer.step()
        assert module.net[0].weight.isnan().all()
        if type(module) is User and module.schedule is None:
            assert "step" not in vars(optimizer)


def test_resume_is_bit_equal(tmp_path):
    def run(epochs, path=None, *more):
        module, guard = User(MAKERS["adamw"]), FiniteGuard(max_total=9)
        # Frozen, and in the optimizer: it has no gradient.
        module.net[0].bias.requires_grad_(False)
        trainer = trainer_of(guard, *more, epochs=epochs, enable_checkpointing=bool(more))
        trainer.fit(module, loader(batches(poison=[0, 7])), ckpt_path=path)
        return module, guard

    whole, guard = run(3)
    assert guard.skipped == 6
    run(2, None, ModelCheckpoint(tmp_path, filename="two"))
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]["FiniteGuard"]
    assert saved["skipped"] == 4
    assert saved["consecutive"] == [1]
    resumed, again = run(3, tmp_path / "two.ckpt")
    assert same(whole.state_dict(), resumed.state_dict())
    assert again.state_dict() == guard.state_dict()


@pytest.mark.parametrize("poison", [(), (2, 3)])
def test_a_scalers_own_search_does_not_count(poison):
    # 2^127 overflows float32 gradients until it has been halved some times.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    guard = FiniteGuard(max_consecutive=3)
    data = batches(40, poison=[30 + k for k in poison])
    trainer_of(guard, plugins=[plugin]).fit(User(MAKERS["sgd"]), loader([(x * 100, y, z) for x, y, z in data]))
    assert guard.scaler_skipped >= 3
    assert guard.skipped == len(poison)


def test_nan_behind_a_scaler_stops():
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        trainer_of(FiniteGuard(), plugins=[plugin]).fit(User(MAKERS["sgd"]), loader(batches(poison=range(8))))


def test_it_changes_nothing_while_all_is_finite():
    for extra in ([], [DynamicLayerLR("variance", every=1, warmup=2)]):
        for make in (*MAKERS.values(), partial(LBFGS, lr=0.1, max_iter=3)):
            if extra and make.func is LBFGS:
                continue
            with_guard, without = User(make), User(make)
            trainer_of(FiniteGuard(), *extra).fit(with_guard, loader(batches()))
            trainer_of(*extra).fit(without, loader(batches()))
            assert same(with_guard.state_dict(), without.state_dict())


class SecondEvaluation(User):
    calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        return super().training_step(batch, batch_idx) * (math.nan if self.calls == 2 else 1.0)


def test_nan_within_a_step_stops():
    with pytest.raises(FloatingPointError, match="further evaluation inside a step of LBFGS, which can't be undone"):
        trainer_of(FiniteGuard()).fit(SecondEvaluation(partial(LBFGS, max_iter=3)), loader(batches()))


class Sparse(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 2, sparse=True)

    def training_step(self, batch, batch_idx):
        return self.table(batch).sum() * (math.nan if batch_idx == 1 else 1.0)

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=1.0)


def test_sparse_gradients():
    module = Sparse()
    before = module.table.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"table.weight \(epoch 0, batch 1"):
        trainer_of(FiniteGuard()).fit(module, DataLoader(torch.tensor([0, 1, 2]), batch_size=1))
    moved = torch.tensor([1.0, 0, 1, 0, 0])[:, None].expand(5, 2)
    torch.testing.assert_close(before - module.table.weight.detach(), moved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_flags_are_exact(dtype):
    largest = torch.full((9,), torch.finfo(dtype).max, dtype=dtype)
    bad = torch.zeros(33, dtype=dtype)
    bad[32] = -math.inf
    gradients = [largest, None, bad, torch.zeros(0, dtype=dtype), torch.tensor([1.0, math.nan], dtype=torch.float64)]
    assert non_finite(gradients, torch.device("cpu")).tolist() == [0, 0, 1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_flag_is_exact_and_leaves_every_bit(dtype):
    limits, check = torch.finfo(dtype), FiniteCheck(torch.device("cpu"))
    values = [limits.max, -limits.max, limits.smallest_normal / 4, -0.0, limits.eps]
    good = torch.tensor(values * 9, dtype=dtype)
    bits = good.view(torch.uint8).clone()
    other = torch.full((2, 3), 1e300, dtype=torch.float64).t()
    assert check([good, None, other, good[:0], good[::2]]).item() == 0
    assert torch.equal(good.view(torch.uint8), bits)
    for value in (math.nan, math.inf, -math.inf):
        for place in (0, 22, 44):
            bad = good.clone()
            bad[place] = value
            assert check([good, bad, other]).item() != 0
            assert check([good]).item() != 0, "raised until it is lowered"
            check.lower()
            assert check([good]).item() == 0
    assert check([]).item() == check([None]).item() == 0


@pytest.mark.parametrize("value", [2.0, math.nan, math.inf])
def test_unusual_gradients_are_checked_too(value):
    unusual = {
        "sparse": torch.tensor([0.0, value]).to_sparse(),
        "complex": torch.tensor([1.0, complex(0.0, value)]),
        "expanded": torch.tensor([value]).expand(4),
        "part": nn.Parameter(torch.tensor([1.0, value])),
    }
    for name, gradient in unusual.items():
        check = FiniteCheck(torch.device("cpu"))
        assert (check([torch.ones(3), gradient]).item() == 0) == math.isfinite(value), name


def test_gradients_that_a_graph_holds_can_still_be_differentiated():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (first,) = torch.autograd.grad((x.exp()).sum(), x, create_graph=True)
    assert FiniteCheck(torch.device("cpu"))([first]).item() == 0
    torch.testing.assert_close(torch.autograd.grad(first.sum(), x)[0], x.detach().exp())


class _OnDevice(FiniteGuard):
    """Goes the way of a device, where a read makes the host wait."""

    def _guard(self, trainer):
        super()._guard(trainer)
        self._on_host = False


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"clip": 0.1}])
def test_a_step_on_a_device_is_read_once(options):
    def fit(*callbacks, poison=()):
        user = User(MAKERS["adamw"])
        trainer = trainer_of(
            *callbacks, accumulate_grad_batches=options.get("accumulate", 1), gradient_clip_val=options.get("clip")
        )
        with torch.profiler.profile() as profile:
            trainer.fit(user, loader(batches(poison=poison)))
        return user, sum(event.count for event in profile.key_averages() if event.key == "aten::_local_scalar_dense")

    plain, reads = fit()
    guarded, more = fit(_OnDevice())
    assert same(guarded.state_dict(), plain.state_dict())
    assert more - reads == 8 // options.get("accumulate", 1)
    with pytest.warns(UserWarning, match=r"in net.0.weight.*\(epoch 0, batch (2, )?3"):
        poisoned, _ = fit(_OnDevice(), poison=[3])
    left_out = (2, 3) if "accumulate" in options else (3,)
    assert same(poisoned.net.state_dict(), by_hand(MAKERS["adamw"], batches(), left_out, **options)[0].state_dict())
    with pytest.warns(UserWarning, match=r"NaN or inf in the loss \(epoch 0, batch 3"):
        trainer_of(_OnDevice()).fit(ConstantNaN(MAKERS["adamw"]), loader(batches()))


class Huge(User):
    def training_step(self, batch, batch_idx):
        weight = self.net[2].weight
        return super().training_step(batch, batch_idx) + 3e38 * (weight - weight.detach()).sum()


def test_gradients_whose_norm_overflows_are_no_reason():
    user, guard = Huge(partial(SGD, lr=1e-38)), FiniteGuard()
    before = user.net[2].weight.detach().clone()
    trainer_of(guard).fit(user, loader(batches()))
    assert guard.skipped == 0
    assert user.net[2].weight.grad.square().sum().isinf()
    torch.testing.assert_close(before - user.net[2].weight.detach(), torch.full((1, 4), 8 * 3.0))


class Rows(pl.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, {k: v for k, v in metrics.items() if k.startswith("finite/")}))


def test_it_logs():
    logger = Rows()
    trainer_of(FiniteGuard(), logger=logger, log_every_n_steps=4).fit(
        User(MAKERS["sgd"]), loader(batches(poison=[1, 5]))
    )
    rows = [row for row in logger.rows if row[1]]
    assert rows == [
        (1, {"finite/skipped": 1.0, "finite/batch": 1.0}),
        (3, {"finite/skipped": 1.0}),
        (5, {"finite/skipped": 2.0, "finite/batch": 5.0}),
        (7, {"finite/skipped": 2.0}),
    ]


@pytest.mark.parametrize("arguments", [{"max_consecutive": 0}, {"max_total": 0}])
def test_arguments(arguments):
    (name,) = arguments
    with pytest.raises(ConfigError, match=f"{name} is 0; expected"):
        FiniteGuard(**arguments)
