"""When channels go, and what is refused before a weight is touched."""

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from pruning_cases import (
    WIDTH,
    Images,
    equal,
    loader,
    macs_of,
    samples,
    tensors,
    trainer,
    widths,
)
from torch.nn import functional as F

from ds_lightning.callbacks import ProgressivePruning
from ds_lightning.callbacks._pruning_schedule import schedule_of
from ds_lightning.errors import ConfigError, NoEffectWarning

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(GPU available|num_workers|litlogger|no step of this fit|multipliers|log_every_n_steps|LeafSpec).*"
)


@given(
    st.sampled_from(["cubic", "linear"]),
    st.floats(0.05, 0.95),
    st.integers(0, 50),
    st.integers(1, 60),
    st.none() | st.integers(1, 30),
)
def test_the_schedule_follows_its_formula(kind, target, start, length, every):
    schedule = schedule_of(kind, target, start, start + length, every, 200)
    assert list(schedule.steps) == sorted(set(schedule.steps))
    assert schedule.steps[-1] == start + length
    assert schedule.keeps[-1] == pytest.approx(target)
    assert every is not None or len(schedule.steps) <= 8
    for step, keep in zip(schedule.steps, schedule.keeps, strict=True):
        left = 1 - (step - start) / length
        assert 1 - keep == pytest.approx((1 - target) * (1 - left ** (3 if kind == "cubic" else 1)))
        assert schedule.due(step) == schedule.due(step - 1) + 1


def test_shares_of_the_fit_become_steps():
    assert schedule_of("linear", 0.5, 0.1, 0.6, None, 160).steps == (26, 36, 46, 56, 66, 76, 86, 96)
    assert schedule_of("one-shot", 0.5, 0.1, 0.6, None, 160).steps == (16,)
    assert schedule_of("one-shot", 0.5, 0, 0.6, None, 160).steps == (1,)
    assert schedule_of("linear", 0.5, 5, 20, 10, float("inf")).steps == (15, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.0}, r"target is 1\.0; expected the share to keep"),
        ({"measure": "flops"}, "measure is 'flops'; expected 'macs' or"),
        ({"schedule": "square"}, "schedule is 'square'"),
        ({"importance": "l1"}, "importance is 'l1'"),
        ({"scope": "all"}, "scope is 'all'"),
        ({"start": 0.6, "end": 0.6}, "expected end after start"),
        ({"start": 7, "end": 3}, "expected end after start"),
        ({"start": -1}, "start is -1; expected a share"),
        ({"end": 1.5}, r"end is 1\.5; expected a share"),
        ({"every": 0}, "every is 0; expected a number of optimizer steps"),
        ({"round_to": 0}, "round_to is 0"),
        ({"min_channels": 0}, "min_channels is 0"),
        ({"sparsity": -1.0}, r"sparsity is -1\.0"),
        ({"exclude": "head"}, r"exclude is the string 'head'; expected a list"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        ProgressivePruning(**options)


class WithoutForward(Images):
    forward = pl.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class TwoInputs(Images):
    def forward(self, x, scale):
        return self.net(x) * scale

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0], 1.0), batch[1])


REFUSED = {
    "end past the fit": ({"start": 1, "end": 9}, {}, {}, "step 9, and this fit has 8 optimizer steps"),
    "unknown length": ({}, {}, {"max_epochs": -1}, "whose number is not known"),
    "no steps": ({}, {}, {"max_steps": 0}, "makes no step"),
    "no batches": ({}, {}, {"limit_train_batches": 0}, "makes no step"),
    "no such submodule": ({"network": "body"}, {}, {}, "network is 'body', and Images has no such submodule"),
    "optimizer": ({}, {"make": torch.optim.LBFGS}, {}, "can't work with LBFGS"),
    "target": ({"target": 0.01}, {}, {}, "target|share"),
    "pattern": ({"exclude": ["nothing*"]}, {}, {}, "nothing"),
    "everything excluded": ({"exclude": ["net"]}, {}, {}, "no channels that can be removed|exclude"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_weight_is_touched(case):
    options, of_module, of_trainer, message = REFUSED[case]
    module = Images(**of_module)
    before = tensors(module)
    with pytest.raises(ConfigError, match=message) as caught:
        trainer(ProgressivePruning(**options), **of_trainer).fit(module, loader())
    assert "\n" not in str(caught.value)
    assert equal(tensors(module), before)


def test_a_module_that_cant_be_called_with_the_batch():
    for kind in (WithoutForward, TwoInputs):
        with pytest.raises(ConfigError, match=f"can't call {kind.__name__} .*expected .* or example_input_array"):
            trainer(ProgressivePruning()).fit(kind(), loader())


def test_example_input_array_stands_in_for_the_batch():
    module = TwoInputs()
    module.example_input_array = {"x": samples()[0][:2], "scale": torch.ones(())}
    trainer(ProgressivePruning(round_to=1, min_channels=1, start=1, end=6)).fit(module, loader())
    assert macs_of(*widths(module)) <= 0.55 * macs_of(WIDTH, WIDTH)


def test_compiled_networks_are_refused():
    module = Images()
    module.net[0] = torch.compile(module.net[0], backend="eager")
    with pytest.raises(ConfigError, match=r"net\.0 is compiled"):
        trainer(ProgressivePruning()).fit(module, loader())
    with pytest.raises(ConfigError, match="Images is compiled"):
        trainer(ProgressivePruning()).fit(torch.compile(Images(), backend="eager"), loader())


def test_strategies_that_share_parameters_out_are_refused():
    run, module = trainer(ProgressivePruning()), Images()
    run.strategy.__class__ = type("Parts", (FSDPStrategy,), {})
    with pytest.raises(ConfigError, match="Parts, which gives each rank parts"):
        ProgressivePruning().on_fit_start(run, module)


def test_checkpoints_without_the_plan_are_refused(tmp_path):
    saves = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.raises(ConfigError, match="save_weights_only=True"):
        trainer(ProgressivePruning(), saves).fit(Images(), loader())


def test_a_fit_that_ends_too_early_says_so():
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == 4

    pruning = ProgressivePruning(round_to=1, min_channels=1, start=0, end=8, every=2)
    with pytest.warns(NoEffectWarning, match="after 2 of 4 removals"):
        trainer(pruning, Stops()).fit(Images(), loader())
