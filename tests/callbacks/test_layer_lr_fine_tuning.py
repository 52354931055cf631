from functools import partial

import pytest
import torch
from layer_lr_cases import LAYERS, SGD_MOMENTUM, Recorder, User, images, same_state, trainer_of
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch import nn
from torch.optim import SGD, AdamW

from ds_lightning.callbacks import DynamicLayerLR
from ds_lightning.errors import NoEffectWarning

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(GPU available|does not have many workers|`LeafSpec`|litlogger|num_workers|log_every_n_steps).*",
    "ignore:.*callbacks used to create the checkpoint.*",
)
REST = dict.fromkeys(LAYERS, 1.0)


def trained(module=None):
    """A module after one fit without the callback."""
    module = module or User()
    trainer_of(max_steps=12).fit(module, images())
    return module


def fit_of(module, steps=24, **options):
    recorder = Recorder()
    trainer_of(DynamicLayerLR(**options), recorder, epochs=8, max_steps=steps).fit(module, images())
    return recorder.multipliers


def test_a_trained_network_is_left_alone_by_default():
    plain, scaled = trained(), trained()
    trainer_of(max_steps=24).fit(plain, images())
    with pytest.warns(NoEffectWarning, match="scales of norm layers differ .* in fine-tuning .* nothing with SGD"):
        assert fit_of(scaled) == [REST] * 24
    assert same_state(dict(plain.state_dict()), dict(scaled.state_dict()))


def test_a_rule_that_is_named_acts_on_a_trained_network():
    used = fit_of(trained(), rule="trust")
    assert used[:3] == [dict.fromkeys(LAYERS, 0.02)] * 3
    assert used[-1]["net.0"] != 1


def test_adamw_scales_the_head_of_a_trained_network():
    assert fit_of(trained(User(partial(AdamW, lr=1e-3))), steps=48)[-1]["net.7"] != 1


def test_vectors_are_scaled_all_the_same(recwarn):
    module = trained()
    before = module.net[1].weight.detach().clone()
    other = trained()
    trainer_of(max_steps=1).fit(other, images())
    fit_of(module, steps=1, vectors=3.0)
    moved, alone = module.net[1].weight - before, other.net[1].weight - before
    torch.testing.assert_close(moved, 3 * alone, rtol=1e-4, atol=1e-7)
    assert not [w for w in recwarn if w.category is NoEffectWarning]


class Teacher(User):
    """A new network beside a trained one that the optimizer may hold."""

    def __init__(self, make=SGD_MOMENTUM):
        super().__init__(make)
        self.teacher = trained().net.requires_grad_(False)


class Student(Teacher):
    def configure_optimizers(self):
        return self.make_optimizer(self.net.parameters())


class Backbone(User):
    """A trained network, and beside its head a new part with a norm of its own."""

    def __init__(self):
        super().__init__()
        self.net = trained().net
        self.more = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))

    def loss(self, batch):
        return nn.functional.cross_entropy(self.more(self.net(batch[0])), batch[1])


@pytest.mark.filterwarnings("ignore::ds_lightning.errors.NoEffectWarning")
def test_only_norms_beside_the_optimizer_s_layers_count():
    assert fit_of(Student(), steps=1) == [dict.fromkeys(LAYERS, 0.02)]
    assert set(fit_of(Teacher(), steps=1)[0].values()) == {1.0}
    assert fit_of(Teacher(), steps=1, exclude=["teacher.*"]) == [dict.fromkeys(LAYERS, 0.02)]
    assert set(fit_of(Backbone(), steps=1)[0].values()) == {1.0}
    assert fit_of(Backbone(), steps=1, include=["more.*"]) == [{"more.0": 0.02}]
    assert fit_of(trained(), steps=1, include=["net.0.*", "net.4.*"])[0] == {"net.0": 1.0, "net.4": 1.0}


@pytest.mark.filterwarnings("ignore::ds_lightning.errors.NoEffectWarning")
def test_frozen_norms_of_a_trained_network_count():
    module = trained()
    for norm in (module.net[1], module.net[5]):
        norm.requires_grad_(False)
    assert fit_of(module) == [REST] * 24


class Thawing(BaseFinetuning):
    """Adds the layers before the head, and their norms, to the optimizer in the second epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[:6], train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[:6], optimizer, train_bn=False)


class Head(User):
    """A network whose first layers have no bias, the optimizer of what is not frozen."""

    def __init__(self):
        super().__init__()
        self.net[0], self.net[4] = nn.Conv2d(1, 4, 3, bias=False), nn.Linear(144, 8, bias=False)

    def configure_optimizers(self):
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


@pytest.mark.filterwarnings("ignore::ds_lightning.errors.NoEffectWarning", "ignore:.*no_grad.*|.*requires_grad.*")
@pytest.mark.parametrize("start", [Head, lambda: trained(Head())], ids=["new", "trained"])
def test_layers_that_thaw_are_told_by_their_norms_too(start):
    recorder = Recorder()
    trainer_of(DynamicLayerLR(), Thawing(), recorder, epochs=8).fit(start(), images())
    assert set(recorder.multipliers[0]) == {"net.7"}
    assert set(recorder.multipliers[-1]) == set(LAYERS)
    assert (recorder.multipliers[-1] == REST) == (start is not Head)


class Two(User):
    """Two optimizers: a trained generator, a new critic."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.critic = trained().net, User().net

    def configure_optimizers(self):
        return SGD(self.net.parameters(), lr=0.05), SGD(self.critic.parameters(), lr=0.05)

    def training_step(self, batch, batch_idx):
        for optimizer, part in zip(self.optimizers(), (self.net, self.critic), strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(part(batch[0]), batch[1]))
            optimizer.step()


@pytest.mark.filterwarnings("ignore::ds_lightning.errors.NoEffectWarning")
def test_each_optimizer_by_itself():
    used = fit_of(Two(), steps=2)[0]
    assert used == REST | {name.replace("net", "critic"): 0.02 for name in LAYERS}


def test_an_idle_optimizer_is_named_beside_one_without_norms():
    module = Two()
    module.critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.warns(NoEffectWarning, match="scales of norm layers differ"):
        fit_of(module)


@pytest.mark.filterwarnings("ignore::ds_lightning.errors.NoEffectWarning")
@pytest.mark.parametrize("start", [User, trained], ids=["new", "trained"])
def test_a_resumed_fit_goes_on_as_it_began(start, tmp_path):
    keep = partial(ModelCheckpoint, tmp_path, every_n_train_steps=12, save_top_k=-1, filename="{step}")
    whole = start()
    trainer_of(DynamicLayerLR(), keep(), max_steps=24).fit(whole, images())
    resumed, recorder = User(), Recorder()
    trainer_of(DynamicLayerLR(), recorder, max_steps=24).fit(resumed, images(), ckpt_path=tmp_path / "step=12.ckpt")
    assert same_state(dict(whole.state_dict()), dict(resumed.state_dict()))
    assert (recorder.multipliers == [REST] * 12) == (start is trained)


@pytest.mark.filterwarnings("ignore::ds_lightning.errors.NoEffectWarning")
def test_a_rule_that_is_named_on_resuming_acts(tmp_path):
    trainer_of(DynamicLayerLR(), ModelCheckpoint(tmp_path, filename="last"), epochs=2).fit(trained(), images())
    recorder = Recorder()
    trainer = trainer_of(DynamicLayerLR(rule="trust"), recorder, max_steps=48)
    trainer.fit(User(SGD_MOMENTUM), images(), ckpt_path=tmp_path / "last.ckpt")
    assert recorder.multipliers[-1] != REST


def test_a_callback_that_comes_with_a_resumed_fit_finds_a_trained_network(tmp_path):
    trainer_of(ModelCheckpoint(tmp_path, filename="last"), epochs=2).fit(User(), images())
    recorder = Recorder()
    trainer = trainer_of(DynamicLayerLR(), recorder, max_steps=24)
    with pytest.warns(NoEffectWarning, match="scales of norm layers differ"):
        trainer.fit(User(), images(), ckpt_path=tmp_path / "last.ckpt")
    assert recorder.multipliers == [REST] * 12
