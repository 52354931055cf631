from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from layer_lr_cases import LAYERS, ONE_CYCLE, RULE, SGD_MOMENTUM, Recorder, User, images, same_state, trainer_of
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.optim import AdamW, RMSprop
from torch.utils.data import DataLoader, DistributedSampler

from ds_lightning.callbacks import DynamicLayerLR

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(GPU available|does not have many workers|`LeafSpec`|litlogger|num_workers|log_every_n_steps).*"
)


@pytest.mark.parametrize(
    ("make", "scheduler", "options"),
    [
        (SGD_MOMENTUM, None, {}),
        (AdamW, ONE_CYCLE, {"rule": "trust", "fade": True, "groups": "block"}),
        (SGD_MOMENTUM, None, {"rule": "snr"}),
        (SGD_MOMENTUM, None, {"rule": None}),
        (partial(RMSprop, lr=1e-3), None, {"rule": None, "every": 2}),
        (partial(RMSprop, lr=1e-3), None, {"rule": None, "slow_start": True}),
    ],
    ids=["sgd", "adamw-trust-fade", "snr", "sgd-default", "rmsprop-default", "rmsprop-slow-start"],
)
def test_resume_is_bit_equal(make, scheduler, options, tmp_path):
    options = {**RULE, **options}
    whole, straight = User(make, scheduler), DynamicLayerLR(**options)
    trainer_of(straight, epochs=6).fit(whole, images())

    saver = ModelCheckpoint(tmp_path, filename="half", every_n_epochs=3, save_top_k=-1)
    half = trainer_of(DynamicLayerLR(**options), saver, epochs=3)
    half.fit(User(make, scheduler), images())
    path = tmp_path / "half.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["DynamicLayerLR"]
    assert state["optimizers"][0]["steps"] == 18
    assert state["optimizers"][0]["reading"] is not None
    assert max(abs(m - 1) for m in state["optimizers"][0]["layers"]["multipliers"]) > 0.1
    half.save_checkpoint(tmp_path / "after.ckpt")
    after = torch.load(tmp_path / "after.ckpt", weights_only=True)["callbacks"]["DynamicLayerLR"]
    assert same_state(after, state)

    resumed, callback = User(make, scheduler), DynamicLayerLR(**options)
    trainer_of(callback, epochs=6).fit(resumed, images(), ckpt_path=path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert same_state(callback.state_dict(), straight.state_dict())
    trainer_of(epochs=4).fit(User(make, scheduler), images(), ckpt_path=path)  # loads without the callback


def test_a_checkpoint_from_before_rules_goes_on(tmp_path):
    whole = User()
    trainer_of(DynamicLayerLR(**RULE), epochs=6).fit(whole, images())
    half = trainer_of(DynamicLayerLR(**RULE), epochs=3)
    half.fit(User(), images())
    half.save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    (state,) = checkpoint["callbacks"]["DynamicLayerLR"]["optimizers"]
    for key in ("range", "readings", "fade", "history", "read", "held"):
        del state[key]
    del state["reading"]["rows"]
    state["largest_change"] = 0.5
    torch.save(checkpoint, tmp_path / "old.ckpt")
    resumed = User()
    trainer_of(DynamicLayerLR(**RULE), epochs=6).fit(resumed, images(), ckpt_path=tmp_path / "old.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    other = trainer_of(DynamicLayerLR(**{**RULE, "rule": "trust"}, fade=True), epochs=6)
    with pytest.warns(UserWarning, match="from a checkpoint without the largest rate so far"):
        other.fit(User(), images(), ckpt_path=tmp_path / "old.ckpt")


class RestoresLate(SingleDeviceStrategy):
    """Hands callbacks their state after `on_fit_start`, as ModelParallelStrategy does."""

    @property
    def restore_checkpoint_after_setup(self):
        return True


def test_resume_within_the_first_three_steps_is_bit_equal(tmp_path):
    def fit(epochs, **kwargs):
        module, callback = User(), DynamicLayerLR()
        trainer = trainer_of(callback, epochs=epochs)
        trainer.fit(module, images(batch_size=12), **kwargs)  # two batches an epoch
        return trainer, module, callback

    half, *_ = fit(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["DynamicLayerLR"]["optimizers"][0]
    assert state["layers"]["multipliers"] == [0.02] * 3
    _, resumed, callback = fit(4, ckpt_path=tmp_path / "half.ckpt")
    _, whole, straight = fit(4)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert same_state(callback.state_dict(), straight.state_dict())


def test_a_strategy_that_restores_after_setup_resumes_bit_equal(tmp_path):
    whole, straight = User(), DynamicLayerLR(**RULE, fade=True)
    trainer_of(straight, epochs=6).fit(whole, images())
    half = trainer_of(DynamicLayerLR(**RULE, fade=True), epochs=3)
    half.fit(User(), images())
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, callback = User(), DynamicLayerLR(**RULE, fade=True)
    trainer_of(callback, epochs=6, strategy=RestoresLate("cpu")).fit(
        resumed, images(), ckpt_path=tmp_path / "half.ckpt"
    )
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert same_state(callback.state_dict(), straight.state_dict())


def test_resume_with_other_layers_matches_by_name(tmp_path):
    trainer = trainer_of(DynamicLayerLR(**RULE, exclude=["net.0.*"]), epochs=3)
    trainer.fit(User(), images())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    before = trainer.callbacks[0].state_dict()["optimizers"][0]["layers"]
    recorder = Recorder()
    with pytest.warns(UserWarning, match="1 new, which start at multiplier 1, and 1 gone"):
        trainer_of(DynamicLayerLR(**RULE, exclude=["net.7.*"]), recorder, epochs=4).fit(
            User(), images(), ckpt_path=tmp_path / "a.ckpt"
        )
    assert recorder.multipliers[0]["net.0"] == 1.0
    assert recorder.multipliers[0]["net.4"] == before["multipliers"][before["names"].index("net.4")]


def test_two_fits_hook_once_and_start_afresh():
    callback, recorder = DynamicLayerLR(**RULE), Recorder()
    trainer_of(callback, epochs=4).fit(User(), images())
    module = User()
    trainer_of(callback, recorder, epochs=4).fit(module, images())
    once = User()
    trainer_of(DynamicLayerLR(**RULE), epochs=4).fit(once, images())
    assert callback.state_dict()["optimizers"][0]["steps"] == 24
    assert recorder.multipliers[0] == dict.fromkeys(LAYERS, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), once.parameters(), strict=True))


def test_hooks_go_after_fit_and_after_an_exception():
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 10:
                raise RuntimeError("stop")

    def hooks(trainer):
        (optimizer,) = trainer.optimizers
        return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)

    trainer = trainer_of(DynamicLayerLR(**RULE), epochs=4)
    trainer.fit(User(), images())
    assert hooks(trainer) == 0
    broken = trainer_of(DynamicLayerLR(**RULE), Stop())
    with pytest.raises(RuntimeError, match="stop"):
        broken.fit(User(), images())
    assert hooks(broken) == 0
    assert broken.callbacks[0].state_dict()["optimizers"][0]["steps"] == 10


class Halves(User):
    """Each of two ranks takes every second sample, in order."""

    def train_dataloader(self):
        data = images().dataset
        return DataLoader(data, batch_size=2, sampler=DistributedSampler(data, shuffle=False))


class SaveRank(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        (callback,) = (c for c in trainer.callbacks if isinstance(c, DynamicLayerLR))
        weights = [p.detach().clone() for p in pl_module.parameters()]
        torch.save((callback.state_dict(), weights), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("options", [RULE, {"rule": "trust"}], ids=["variance", "slow-start"])
def test_two_processes_agree_and_equal_one_with_twice_the_batch(options, tmp_path):
    norm = partial(nn.GroupNorm, 2)
    trainer = trainer_of(
        DynamicLayerLR(**options), SaveRank(tmp_path), strategy="ddp_fork", devices=2, use_distributed_sampler=False
    )
    trainer.fit(Halves(norm=norm))
    (zero, weights_zero), (one, weights_one) = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    assert same_state(zero, one)
    assert all(torch.equal(a, b) for a, b in zip(weights_zero, weights_one, strict=True))

    single, callback = User(norm=norm), DynamicLayerLR(**options)
    trainer_of(callback).fit(single, images(batch_size=4))
    got, want = zero["optimizers"][0], callback.state_dict()["optimizers"][0]
    assert got["steps"] == want["steps"] == 30
    assert got["layers"]["multipliers"] == pytest.approx(want["layers"]["multipliers"], rel=1e-3)
    assert max(abs(m - 1) for m in got["layers"]["multipliers"]) > 0.1
    for a, b in zip(weights_zero, single.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-3, atol=1e-4)
