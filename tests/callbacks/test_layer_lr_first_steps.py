from functools import partial

import pytest
import torch
from layer_lr_cases import LAYERS, SGD_MOMENTUM, Recorder, User, images, trainer_of
from torch.optim import AdamW

from ds_lightning.callbacks import DynamicLayerLR
from ds_lightning.errors import ConfigError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(GPU available|does not have many workers|`LeafSpec`|litlogger|num_workers|log_every_n_steps).*",
    "ignore::ds_lightning.errors.NoEffectWarning",
)


def fit_of(module, steps, **options):
    recorder = Recorder()
    trainer_of(DynamicLayerLR(**options), recorder, max_steps=steps).fit(module, images())
    return recorder.multipliers


class Hidden(User):
    """A head behind two layers whose size is hidden."""

    def __init__(self, make=SGD_MOMENTUM):
        super().__init__(make)
        self.net[4] = torch.nn.Linear(144, 8, bias=False)


@pytest.mark.parametrize("make", [SGD_MOMENTUM, partial(AdamW, lr=1e-3)])
def test_a_head_comes_from_the_lowest_multiplier(make):
    slow, at_once = (fit_of(Hidden(make), 24, slow_start=True, warmup=warmup) for warmup in (21, 0))
    for used in (slow, at_once):
        assert used[:3] == [dict.fromkeys(LAYERS, 0.02)] * 3
        assert min(used[3]["net.0"], used[3]["net.4"]) > 0.3
    assert at_once[3]["net.7"] > 0.1
    heads = [used["net.7"] for used in slow]
    # Half of the way in logarithms at step 11; the networks differ by then, so about.
    assert heads[3] == pytest.approx(0.02 * (at_once[3]["net.7"] / 0.02) ** (2 / 20), rel=1e-3)
    assert 0.02 < heads[4] < heads[8] < heads[12] < heads[22]
    assert heads[22] > 0.1


def test_the_hold_ends_without_gradients():
    class Unused(Hidden):
        def loss(self, batch):
            return 0.0 * super().loss(batch)

    used = fit_of(Unused(), 24)
    assert used[:10] == [dict.fromkeys(LAYERS, 0.02)] * 10
    assert used[10:] == [dict.fromkeys(LAYERS, 1.0)] * 14


@pytest.mark.parametrize("rule", ["variance", "snr"])
def test_a_rule_that_is_named_starts_from_one(rule):
    assert fit_of(Hidden(), 2, rule=rule) == [dict.fromkeys(LAYERS, 1.0)] * 2


def test_only_sgd_starts_slowly_by_itself():
    assert fit_of(Hidden(partial(AdamW, lr=1e-3)), 3) == [dict.fromkeys(LAYERS, 1.0)] * 3
    assert fit_of(Hidden(), 3) == [dict.fromkeys(LAYERS, 0.02)] * 3
    assert fit_of(Hidden(), 3, slow_start=False) == [dict.fromkeys(LAYERS, 1.0)] * 3
    assert fit_of(Hidden(), 3, bounds=(0.1, 10.0)) == [dict.fromkeys(LAYERS, 0.1)] * 3


def test_nothing_waits_without_a_norm():
    def plain():
        module = User(norm=lambda channels: torch.nn.Identity())
        module.net[5] = torch.nn.Identity()
        return module

    assert fit_of(plain(), 12) == [dict.fromkeys(LAYERS, 1.0)] * 12


def test_a_rule_that_has_no_slow_start_says_so():
    for options in ({"rule": "variance"}, {"rule": "trust", "reference": "mean"}):
        with pytest.raises(ConfigError, match=r"slow_start is True, but rule='.*; expected rule=None, or rule='trust'"):
            fit_of(Hidden(), 3, slow_start=True, **options)


def test_a_frozen_layer_waits_no_longer_than_the_others():
    module = Hidden()
    module.net[0].requires_grad_(False)
    assert [used["net.0"] for used in fit_of(module, 12)] == [0.02] * 3 + [1.0] * 9


def test_the_picture_shows_how_long_they_waited():
    callback = DynamicLayerLR()
    trainer_of(callback, max_steps=24).fit(Hidden(), images())
    history = callback.state_dict()["optimizers"][0]["history"]
    assert history["steps"] == [0, 3, 10, 20]
    assert history["values"][0].tolist() == pytest.approx([0.02] * 3)
    assert max(history["values"][1].tolist()) > 0.3
