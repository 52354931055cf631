import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from ds_lightning.callbacks._order import apply_order, in_order
from ds_lightning.errors import ConfigError


class Free(Callback):
    pass


class Consolidates(Callback):
    pass


class ConsolidatesBetter(Consolidates):
    pass


class Looks(Callback):
    runs_after = ("Consolidates",)


class Opens(Callback):
    runs_before = ("Looks", "Consolidates")


class Cuts(Callback):
    runs_after = ("Looks",)
    runs_before = ("Consolidates",)


class AfterCheckpoints(Callback):
    runs_after = ("ModelCheckpoint",)


class Mistyped(Callback):
    runs_after = "Consolidates"


def names(callbacks):
    return [type(callback).__name__ for callback in callbacks]


def test_a_right_order_is_kept_as_it_is():
    callbacks = [Free(), Opens(), Consolidates(), Free(), Looks(), ModelCheckpoint()]
    assert [a is b for a, b in zip(in_order(callbacks), callbacks, strict=True)] == [True] * 6


def test_only_what_must_move_moves():
    a, b = Free(), Free()
    callbacks = [Looks(), a, Consolidates(), b, ModelCheckpoint()]
    ordered = in_order(callbacks)
    assert names(ordered) == ["Free", "Consolidates", "Looks", "Free", "ModelCheckpoint"]
    assert ordered[0] is a
    assert ordered[3] is b


def test_runs_before_and_subclasses_count():
    assert names(in_order([Looks(), ConsolidatesBetter(), Opens()])) == ["Opens", "ConsolidatesBetter", "Looks"]


def test_names_that_are_not_there_ask_for_nothing():
    assert names(in_order([Looks(), Free()])) == ["Looks", "Free"]


def test_a_circle_is_refused_with_its_members():
    with pytest.raises(ConfigError, match="circle: Looks after Consolidates after Cuts after Looks"):
        in_order([Free(), Looks(), Consolidates(), Cuts()])


def test_nothing_runs_after_a_checkpoint():
    with pytest.raises(ConfigError, match="AfterCheckpoints would have to run after ModelCheckpoint, but Lightning"):
        in_order([AfterCheckpoints(), ModelCheckpoint()])


def test_a_string_is_refused():
    with pytest.raises(ConfigError, match=r"Mistyped.runs_after is the string 'Consolidates'; expected a tuple"):
        in_order([Mistyped(), Free()])


def test_in_a_trainer_hooks_run_in_the_new_order(tmp_path):
    seen = []

    class Notes(Callback):
        def setup(self, trainer, pl_module, stage):
            seen.append((type(self).__name__, "setup"))
            apply_order(trainer)

        def on_train_epoch_end(self, trainer, pl_module):
            seen.append((type(self).__name__, "end"))

    class Second(Notes):
        runs_after = ("First",)

    class First(Notes):
        pass

    trainer = pl.Trainer(
        callbacks=[Second(), First()],
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=0,
        default_root_dir=tmp_path,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    assert isinstance(trainer.callbacks[-1], ModelCheckpoint)
    trainer.fit(BoringModel())
    assert seen == [("Second", "setup"), ("First", "setup"), ("First", "end"), ("Second", "end")]
    assert isinstance(trainer.callbacks[-1], ModelCheckpoint)
