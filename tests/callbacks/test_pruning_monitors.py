"""Monitors look for their best afresh when the network is another one, and a Trainer has one pruning callback."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from pruning_cases import Images, equal, loader, samples, tensors, trainer, widths

from ds_lightning.callbacks import ProgressivePruning, load_pruned
from ds_lightning.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*(GPU available|num_workers|litlogger|no step of this fit|fork).*")

# Of 4 steps an epoch: removals after steps 4, 6, 8 and 10, the last one in the third epoch.
OPTIONS = {"target": 0.3, "schedule": "linear", "start": 2, "end": 10, "every": 2, "round_to": 1, "min_channels": 1}


class Scored(Images):
    """Its score falls from epoch to epoch, and most when channels go."""

    scores = (0.9, 0.8, 0.5, 0.6, 0.4)

    def validation_step(self, batch, batch_idx):
        self.log("score", torch.tensor(self.scores[self.current_epoch]))

    def on_validation_epoch_end(self):
        if self.current_epoch == 3:
            self.kept = tensors(self)


@pytest.mark.parametrize("top", [1, 2, -1])
def test_the_best_checkpoint_is_of_the_last_network(top, tmp_path, caplog):
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="score", mode="max", save_top_k=top)
    plain = ModelCheckpoint(tmp_path / "plain", "{epoch}")
    module = Scored()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        trainer(ProgressivePruning(**OPTIONS), best, plain, epochs=5).fit(module, loader(), loader())
    told = [record.message for record in caplog.records if "looks for its best" in record.message]
    assert len(told) == 1
    assert "ModelCheckpoint looks for its best score afresh" in told[0]
    # Lightning's own choice, without pruning, would be the first epoch's.
    assert best.best_model_path == str(tmp_path / "epoch=3.ckpt")
    assert float(best.best_model_score) == pytest.approx(0.6)
    assert len(best.best_k_models) == {1: 1, 2: 2, -1: 3}[top]
    assert plain.best_model_path == str(tmp_path / "plain" / "epoch=4.ckpt")
    # What was saved before is still there, and nothing else was deleted than what Lightning replaces.
    assert (tmp_path / "epoch=0.ckpt").exists()
    loaded = load_pruned(Scored, best.best_model_path)
    assert widths(loaded) == widths(module)
    assert equal(tensors(loaded), module.kept)
    x, network = samples()[0], loaded.net.eval()
    torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), network(x), atol=1e-6, rtol=1e-5)


def test_without_a_removal_the_best_stays(tmp_path):
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="score", mode="max")
    late = {**OPTIONS, "start": 18, "end": 20}
    with pytest.warns(match="did not get to its target"):
        trainer(Stops(), ProgressivePruning(**late), best, epochs=5).fit(Scored(), loader(), loader())
    assert best.best_model_path == str(tmp_path / "epoch=0.ckpt")


class Stops(pl.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == 2


def test_early_stopping_counts_from_the_last_removal():
    stop = EarlyStopping("score", mode="max", patience=2)
    run = trainer(ProgressivePruning(**OPTIONS), stop, epochs=5)
    run.fit(Scored(), loader(), loader())
    # From 0.9 on there would have been two epochs without a gain after the third.
    assert (run.current_epoch, float(stop.best_score)) == (5, pytest.approx(0.6))
    alone = EarlyStopping("score", mode="max", patience=2)
    run = trainer(alone, epochs=5)
    run.fit(Scored(), loader(), loader())
    assert run.current_epoch == 3


def test_two_in_one_trainer_are_refused():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `ProgressivePruning`"):
        trainer(ProgressivePruning(), ProgressivePruning())
    # These Lightning lets pass.
    other = trainer(ProgressivePruning(), type("Other", (ProgressivePruning,), {})())
    later = trainer(ProgressivePruning())
    later.callbacks.append(ProgressivePruning())
    for run in (other, later):
        module = Images()
        before = tensors(module)
        with pytest.raises(ConfigError, match=r"has 2 ProgressivePruning.*expected one") as caught:
            run.fit(module, loader())
        assert "\n" not in str(caught.value)
        assert equal(tensors(module), before)
