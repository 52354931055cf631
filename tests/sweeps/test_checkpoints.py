"""A killed trial goes on from its checkpoint, and nobody can tell from the books."""

import copy
from functools import partial

import optuna
import pytest
import torch

from ds_lightning.sweeps import Sweep
from ds_lightning.sweeps.checkpoints import find_usable, kept_numbers, trial_folder
from ds_lightning.sweeps.pool import WorkerPool, run_here
from ds_lightning.sweeps.spec import SweepSpec

EPOCHS, BATCHES, DIE_AT = 4, 6, 20


def walking(content, folder, die_at):
    content = copy.deepcopy(content)
    content["base"]["overrides"].update(
        {
            "model": {"class_path": "sweep_parts.Walk", "init_args": {"steps": str(folder / "steps.txt")}},
            "model.die_at": die_at,
            "data": {"class_path": "sweep_parts.Shuffled"},
        }
    )
    content["base"]["overrides"]["trainer"] |= {"max_epochs": EPOCHS, "val_check_interval": 3}
    return {**content, "checkpoint_seconds": 0, "trials": 1}


class Replaced(Exception):
    pass


def begin_in_a_worker(folder, ledger):
    def replace(index, replaced):
        raise Replaced

    pool = WorkerPool(1, folder)
    pool._start = replace
    with pytest.raises(Replaced):
        pool.run(ledger)
    run_here(ledger)


@pytest.fixture(scope="module")
def walked(store, tmp_path_factory):
    """One trial in this process, whose checkpoints stay, and one whose worker is killed in step 20, on SQLite.

    Its retry runs in this process: a worker takes long to start.
    """
    from conftest import CONTENT

    results = {}
    for name, die_at in (("whole", -1), ("killed", DIE_AT)):
        folder = tmp_path_factory.mktemp(name)
        content = walking(CONTENT, folder, die_at)
        if name == "killed":
            content |= {"storage": f"sqlite:///{folder / 'study.db'}"}
        else:
            content |= {"keep_checkpoints": True}
        with pytest.MonkeyPatch.context() as patch:
            if name == "killed":
                patch.setattr("ds_lightning.sweeps.sweep.run_here", partial(begin_in_a_worker, folder))
            result = Sweep(SweepSpec.from_dict(content, name=name), store).run()
        results[name] = (result, folder, content)
    return results


def study_of(store, walked, name):
    result, _, content = walked[name]
    place = content.get("storage")
    if place is None:
        from ds_lightning.sweeps.study import open_storage

        place = open_storage(str(store / "optuna" / f"{result.study}.journal"))
    return optuna.load_study(study_name=result.study, storage=place)


def steps_of(walked, name):
    lines = [line.split() for line in (walked[name][1] / "steps.txt").read_text().splitlines()]
    processes = list(dict.fromkeys(process for process, _ in lines))
    return [[int(step) for process, step in lines if process == each] for each in processes]


def check_that_the_retry_trains_only_what_the_dead_trial_had_not_saved(walked):
    assert steps_of(walked, "whole") == [list(range(EPOCHS * BATCHES))]
    # Saved at the validation after 18 steps.
    assert steps_of(walked, "killed") == [list(range(DIE_AT)), list(range(18, EPOCHS * BATCHES))]


def check_that_the_retry_ends_as_the_trial_that_was_never_killed(store, walked):
    whole = study_of(store, walked, "whole").trials
    dead, again = study_of(store, walked, "killed").trials
    assert [trial.state.name for trial in (*whole, dead, again)] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert again.params == whole[0].params
    assert again.values == whole[0].values
    assert list(whole[0].intermediate_values) == list(range(3, 25, 3))
    assert again.intermediate_values == whole[0].intermediate_values


def check_that_each_metric_point_is_in_the_retrys_own_run_once(walked, runs):
    (alone,) = runs(walked["whole"][0]).children.values()
    books = runs(walked["killed"][0])
    dead, again = books.children[0], books.children[1]
    assert (dead.info.status, again.info.status) == ("FAILED", "FINISHED")
    assert again.data.tags["retry_of"] == "0"
    assert again.data.tags["resumed_from_step"] == "18"
    assert "resumed_from_step" not in dead.data.tags
    assert set(again.data.metrics) == set(alone.data.metrics) > {"train/loss_step", "train/loss_epoch", "val/loss"}
    for key in alone.data.metrics:
        found, expected = (
            [(point.step, point.value) for point in books.client.get_metric_history(run.info.run_id, key)]
            for run in (again, alone)
        )
        assert sorted(found) == sorted(expected), key
    first = books.client.get_metric_history(again.info.run_id, "val/loss")
    early = {point.step: point.timestamp for point in books.client.get_metric_history(dead.info.run_id, "val/loss")}
    assert [point.timestamp for point in first if point.step in early] == list(early.values())


def check_that_checkpoints_go_with_the_trial_unless_they_are_to_stay(store, walked):
    assert kept_numbers(store / "sweeps" / walked["killed"][0].study) == []
    folder = trial_folder(store / "sweeps" / walked["whole"][0].study, 0)
    assert find_usable([str(folder)]) == (folder / "last.ckpt", EPOCHS * BATCHES)


def test_a_killed_trial_goes_on_and_nobody_can_tell(store, walked, runs):
    """One test, so that what it looks at is made once, also where tests are spread over processes."""
    check_that_the_retry_trains_only_what_the_dead_trial_had_not_saved(walked)
    check_that_the_retry_ends_as_the_trial_that_was_never_killed(store, walked)
    check_that_each_metric_point_is_in_the_retrys_own_run_once(walked, runs)
    check_that_checkpoints_go_with_the_trial_unless_they_are_to_stay(store, walked)


def test_the_first_folder_with_a_whole_checkpoint_counts(tmp_path):
    torn, whole, other = (tmp_path / name for name in ("torn", "whole", "other"))
    for folder, step in ((torn, 3), (whole, 2), (other, 1)):
        folder.mkdir()
        torch.save({"global_step": step}, folder / "last.ckpt")
    (torn / "last.ckpt").write_bytes((torn / "last.ckpt").read_bytes()[:200])
    folders = [str(tmp_path / "none"), str(torn), str(whole), str(other)]
    with pytest.warns(UserWarning, match="passed over"):
        assert find_usable(folders) == (whole / "last.ckpt", 2)


class Pickled:
    pass


def test_a_checkpoint_that_would_have_to_run_code_is_not_used(tmp_path):
    torch.save({"global_step": 1, "hyper_parameters": Pickled()}, tmp_path / "last.ckpt")
    with pytest.warns(RuntimeWarning, match=r"holds pickled .*Pickled.* so the trial starts again"):
        assert find_usable([str(tmp_path)]) is None
