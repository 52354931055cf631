"""From a checkpoint of any moment a fit logs what the uninterrupted one logs, value for value, and trains the same."""

import exact_resume_cases as cases
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader
from torchmetrics import MaxMetric, MeanMetric

from ds_lightning.callbacks import ExactResume

EPOCHS, BATCHES = 3, 4


class Book(Logger):
    """Keeps each call of `log_metrics`."""

    def __init__(self):
        super().__init__()
        self.calls = []

    name = version = "book"

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, dict(metrics)))

    def log_hyperparams(self, *_, **__):
        pass


class Logs(cases.Records):
    """Logs in every way."""

    def __init__(self):
        super().__init__()
        self.both, self.epoch_only, self.rare_metric, self.for_ever = (
            MeanMetric(),
            MaxMetric(),
            MeanMetric(),
            MeanMetric(),
        )

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        value = loss.detach()
        self.log("plain", value, on_step=True, on_epoch=False)
        self.log("forked", value, on_step=True, on_epoch=True)
        self.log("sum", value, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("least", value, on_step=True, on_epoch=True, reduce_fx=min)
        self.both(value)
        self.log("metric", self.both, on_step=True, on_epoch=True)
        self.epoch_only.update(value)
        self.log("metric_epoch", self.epoch_only, on_step=False, on_epoch=True)
        self.for_ever.update(value)
        if batch_idx == 0:
            # Lightning goes on logging the step's value, and has the epoch's at its end.
            self.log("rare", value, on_step=True, on_epoch=True)
            self.rare_metric(value)
            self.log("rare_metric", self.rare_metric, on_step=True, on_epoch=True)
        return loss

    def on_before_zero_grad(self, optimizer):
        self.log("in_another_hook", self.net[0].weight.sum(), on_step=True, on_epoch=True)

    def on_train_epoch_end(self):
        super().on_train_epoch_end()
        self.log("at_the_end", self.for_ever.compute())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        # Asks for the loaders before the fit knows where it goes on.
        length = self.trainer.estimated_stepping_batches
        plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=int(length))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan, "interval": "step"}}


class SaveAlways(Checkpoint):
    """Saves at each moment, and notes how many calls the logger had by then."""

    def __init__(self, folder):
        self.folder, self.calls = folder, {}

    def save(self, trainer, name):
        self.calls[f"{name}-{trainer.global_step}"] = len(trainer.logger.calls)
        trainer.save_checkpoint(self.folder / f"{name}-{trainer.global_step}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer, "step")

    def on_validation_end(self, trainer, *_):
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer, "end")

    def on_train_epoch_start(self, trainer, *_):
        self.save(trainer, "start")


def fit(folder, workers, seed, saver=None, resume=None):
    pl.seed_everything(seed, verbose=False)
    model, book = Logs(), Book()
    options = {"limit_train_batches": BATCHES, "val_check_interval": 2, "log_every_n_steps": 1, "epochs": EPOCHS}
    trainer = cases.trainer(folder, ExactResume(), *([saver] if saver else []), **options)
    trainer.loggers = [book]
    data = DataLoader(cases.Noisy(), batch_size=10)
    trainer.fit(model, cases.loader("shuffle", workers), data, ckpt_path=resume, weights_only=True if resume else None)
    return model, book.calls


@pytest.fixture(scope="module", params=[0, 2])
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    saver = SaveAlways(folder)
    model, calls = fit(folder, request.param, seed=1, saver=saver)
    return request.param, folder, saver.calls, model, calls


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "moments",
    [
        ["step-1", "step-5", "step-6", "step-11"],
        ["validation-2", "validation-6"],
        ["step-4", "step-8", "step-12"],
        ["validation-4", "validation-8", "validation-12"],
        ["end-4", "end-8", "end-12"],
        ["start-0", "start-4"],
    ],
    ids=["step", "validation", "last-step", "last-validation", "epoch-end", "epoch-start"],
)
def test_resumed_at_any_moment_it_logs_the_same(whole, moments):
    workers, folder, calls_before, model, calls = whole
    for moment in moments if workers == 0 else moments[1:2]:
        resumed, rest = fit(folder, workers, seed=77, resume=folder / f"{moment}.ckpt")
        assert rest == calls[calls_before[moment] :], moment
        assert torch.equal(cases.weights(resumed), cases.weights(model)), moment
        assert resumed.seen == model.seen[len(model.seen) - len(resumed.seen) :], moment
        assert resumed.for_ever.compute() == model.for_ever.compute(), moment


def test_the_uninterrupted_fit_logs_what_it_should(whole):
    """The calls that the others are compared with."""
    *_, calls = whole
    epochs = [values for _, values in calls if "forked_epoch" in values]
    steps = [(step, values) for step, values in calls if "forked_step" in values]
    assert [step for step, _ in steps] == list(range(EPOCHS * BATCHES))
    for epoch, values in enumerate(epochs):
        losses = [step["plain"] for _, step in steps[epoch * BATCHES : (epoch + 1) * BATCHES]]
        assert values["forked_epoch"] == pytest.approx(sum(losses) / BATCHES)
        assert values["sum"] == pytest.approx(sum(losses))
        assert values["metric_epoch"] == max(losses)
        assert values["rare_epoch"] == losses[0]


def test_a_fit_that_is_over_goes_on_with_more_epochs(tmp_path):
    data = cases.loader("shuffle", 0)
    pl.seed_everything(1, verbose=False)
    whole = cases.Records()
    cases.trainer(tmp_path, ExactResume()).fit(whole, data)
    pl.seed_everything(1, verbose=False)
    short = cases.trainer(tmp_path, ExactResume(), epochs=1)
    short.fit(cases.Records(), data)
    short.save_checkpoint(tmp_path / "over.ckpt")
    pl.seed_everything(77, verbose=False)
    resumed = cases.Records()
    cases.trainer(tmp_path, ExactResume()).fit(resumed, data, ckpt_path=tmp_path / "over.ckpt", weights_only=True)
    assert resumed.seen == whole.seen[cases.STEPS :]
    assert torch.equal(cases.weights(resumed), cases.weights(whole))
