import optuna
import pytest

from ds_lightning.sweeps import retries
from ds_lightning.sweeps.ledger import Ledger
from ds_lightning.sweeps.left_overs import close_left_overs
from ds_lightning.sweeps.runs import StudyRuns
from ds_lightning.sweeps.spec import SweepSpec
from ds_lightning.sweeps.study import make_sampler
from ds_lightning.sweeps.task import TrialOutcome
from ds_lightning.tracking import default_store

NAMES = iter(range(100))


class Silence:
    def started(self, number): ...
    def report(self, number, step, value): ...
    def finished(self, number, outcome, params, seconds): ...


@pytest.fixture
def ledger_of(content, store):
    """Return a function that makes a ledger, with its runs, of a study."""

    def make(study=None, trials=3, **changes):
        spec = SweepSpec.from_dict({**content, **changes}, name="ledger")
        sampler = make_sampler(spec.sampler, spec.space)
        study = study or optuna.create_study(study_name=f"ledger-{next(NAMES)}", sampler=sampler)
        runs = StudyRuns(default_store(store), spec.experiment, study.study_name)
        runs.open({})
        return Ledger(spec, study, runs, str(store), trials, None, True, Silence())

    return make


def finish(ledger):
    """Give out and complete what is left; returns the tasks."""
    tasks = []
    while (task := ledger.open_trial()) is not None:
        tasks.append(task)
        ledger.close_trial(task.number, TrialOutcome("COMPLETE", [0.0]))
    return tasks


def test_a_killed_trial_is_tried_again_before_a_new_one_and_takes_no_place(ledger_of, store):
    ledger = ledger_of(trials=2)
    first = ledger.open_trial()
    assert ledger.abandon(first.number, "killed") is True
    tasks = finish(ledger)
    assert [task.retry_of for task in tasks] == [first.number, None]
    assert tasks[0].params == first.params != tasks[1].params
    assert [trial.state.name for trial in ledger.study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    run = ledger.runs._client.get_run(ledger.runs.child(first.number))
    assert (run.info.status, run.data.tags["optuna.state"], run.data.tags["error"]) == ("FAILED", "FAIL", "killed")


@pytest.mark.parametrize(("sampler", "complete"), [("random", 2), ("grid", 1)])
def test_a_trial_that_is_always_killed_gives_way_to_another_point(ledger_of, sampler, complete):
    space = {"model.x": {"type": "int", "low": 0, "high": 1}}
    ledger = ledger_of(trials=2, sampler={"name": sampler, "seed": 1}, space=space, max_retries=1)
    first = ledger.open_trial()
    assert ledger.abandon(first.number, "killed") is True
    again = ledger.open_trial()
    assert again.params == first.params
    assert ledger.abandon(again.number, "killed") is False
    # A grid has no other point, so the one that can't be tried has its place.
    assert len(finish(ledger)) == complete
    assert retries.counted(ledger.study) == 2


def test_a_trial_that_raises_is_not_tried_again_and_counts(ledger_of):
    ledger = ledger_of(trials=2)
    task = ledger.open_trial()
    assert ledger.close_trial(task.number, TrialOutcome("FAIL", error="RuntimeError: no")) is False
    assert [task.retry_of for task in finish(ledger)] == [None]
    assert retries.counted(ledger.study) == 2


def test_killed_trials_do_not_end_a_sweep_as_failures_do(ledger_of):
    ledger = ledger_of(trials=1)
    for _ in range(2):
        ledger.abandon(ledger.open_trial().number, "killed")
    task = ledger.open_trial()
    assert ledger.stop_reason is None
    ledger.close_trial(task.number, TrialOutcome("COMPLETE", [0.0]))
    assert ledger.open_trial() is None


def test_what_a_killed_sweep_left_is_tried_again_by_the_next(ledger_of):
    killed = ledger_of(trials=2)
    task = killed.open_trial()
    study = killed.study
    host, _, created = study.trials[0].user_attrs["process"].rsplit(" ", 2)
    study._storage.set_trial_user_attr(study.trials[0]._trial_id, "process", f"{host} 4194305 {created}")
    for _ in range(2):
        # Each of them is killed while it works on the retry of the one before.
        assert close_left_overs(study, killed.runs, killed.spec) == 1
        again = ledger_of(study, trials=2).open_trial()
        assert (again.retry_of, again.params) == (again.number - 1, task.params)
        study._storage.set_trial_user_attr(study.trials[-1]._trial_id, "process", f"{host} 4194305 {created}")
    assert close_left_overs(study, killed.runs, killed.spec) == 1
    # The third death was the last.
    assert ledger_of(study, trials=2).open_trial().retry_of is None
    run = killed.runs._client.get_run(killed.runs.child(2))
    assert (run.info.status, run.data.tags["retry_of"]) == ("FAILED", "1")
    assert retries.counted(study) == 1
