"""Two sweeps that settle a third one's death at the same moment do so once."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from ds_lightning.sweeps import retries
from ds_lightning.sweeps.ledger import Ledger
from ds_lightning.sweeps.left_overs import close_left_overs, tell
from ds_lightning.sweeps.runs import StudyRuns
from ds_lightning.sweeps.spec import SweepSpec
from ds_lightning.sweeps.study import create_study, open_storage
from ds_lightning.sweeps.task import TrialOutcome
from ds_lightning.tracking import default_store

FAR = "another-host 1 1.0"


class Silence:
    def started(self, number): ...
    def report(self, number, step, value): ...
    def finished(self, number, outcome, params, seconds): ...


def gone(mark):
    return mark == FAR


@pytest.fixture(params=["journal", "sqlite"])
def sweeps(request, tmp_path, content, store, monkeypatch):
    """A study with a RUNNING trial of a dead sweep, and two living sweeps of it."""
    place = str(tmp_path / "s.journal") if request.param == "journal" else f"sqlite:///{tmp_path / 's.db'}"
    spec = SweepSpec.from_dict(content, name="twice")
    name = create_study(open_storage(place), request.node.name, ["minimize"], None, None)
    name.set_user_attr(f"sweep {FAR}", 1.0)
    dead = name.ask()
    spec.space.suggest(dead)
    dead.set_user_attr("process", FAR)
    found = []
    for mark in ("one-host 1 1.0", "two-host 1 1.0"):
        study = optuna.load_study(study_name=name.study_name, storage=open_storage(place))
        runs = StudyRuns(default_store(store), spec.experiment, name.study_name)
        runs.open({})
        found.append((mark, study, runs, Ledger(spec, study, runs, str(store), 1, None, True, Silence(), None, gone)))
    marks = threading.local()
    monkeypatch.setattr(retries, "this_process", lambda: getattr(marks, "own", FAR))
    return found, marks


def at_once(found, marks, act):
    """Let both sweeps act at the same moment, each as a process of its own."""

    def run(each):
        marks.own = each[0]
        return act(*each[1:])

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, found))


def meet(monkeypatch, owner, name):
    """Keep each sweep at a call until the other one is there too."""
    barrier, original = threading.Barrier(2, timeout=20), getattr(owner, name)
    waited = threading.local()

    def call(*arguments, **others):
        if not getattr(waited, "done", False):
            waited.done = True
            barrier.wait()
        return original(*arguments, **others)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.filterwarnings("ignore:the end of trial")
def test_a_trial_that_a_dead_sweep_left_running_is_booked_once(sweeps, monkeypatch):
    found, marks = sweeps
    meet(monkeypatch, StudyRuns, "child")
    meet(monkeypatch, retries, "mark_dead")
    uncounted = at_once(found, marks, lambda study, runs, ledger: close_left_overs(study, runs, ledger.spec, gone))
    # The target of one of them grows by one, not that of both.
    assert sorted(uncounted) == [0, 1]
    _, study, runs, _ = found[0]
    assert study.trials[0].state == TrialState.FAIL
    assert retries.counted(study) == 0
    assert len(runs._children(0)) == 1
    given = at_once(found, marks, lambda study, *_: [trial.number for trial in retries.pending(study, 2, gone)])
    # Either the slower one's mark was last, and each may take it, or it is the faster one's.
    assert [0] in given


def test_sqlite_lets_one_process_end_a_trial(sweeps, monkeypatch):
    found, marks = sweeps
    original = RDBStorage.check_trial_is_updatable

    def slowly(*arguments):
        original(*arguments)
        time.sleep(0.3)

    monkeypatch.setattr(RDBStorage, "check_trial_is_updatable", slowly)
    meet(monkeypatch, optuna.Study, "tell")
    told = at_once(found, marks, lambda study, *_: tell(study, 0, TrialState.FAIL))
    assert sorted(told) == [False, True]


def test_a_dead_trial_is_given_out_again_once(sweeps, monkeypatch):
    found, marks = sweeps
    _, study, runs, _ = found[0]
    marks.own = FAR
    retries.mark_dead(study, 0)
    assert tell(study, 0, TrialState.FAIL)
    assert not tell(study, 0, TrialState.FAIL)
    runs.fail(0, {}, "killed")
    meet(monkeypatch, retries, "enqueue")
    tasks = at_once(found, marks, lambda study, runs, ledger: ledger.open_trial())
    assert sorted((task.retry_of for task in tasks), key=str) == [0, None]
    for (mark, _, _, ledger), task in zip(found, tasks, strict=True):
        marks.own = mark
        ledger.close_trial(task.number, TrialOutcome("COMPLETE", [0.0]))
        assert ledger.open_trial() is None
    # One that asked while the other took its retry got a new point: the second retry waits for who asks next.
    mark, _, _, before = found[0]
    marks.own = mark
    ledger = Ledger(before.spec, study, runs, before._store, 1, None, True, Silence(), None, gone)
    task = ledger.open_trial()
    assert task.retry_of is None
    ledger.close_trial(task.number, TrialOutcome("COMPLETE", [0.0]))
    states = [trial.state.name for trial in study.trials]
    assert sorted(states) == ["COMPLETE", "COMPLETE", "COMPLETE", "FAIL", "FAIL"]
    again = [trial for trial in study.trials if trial.user_attrs.get("retry_of") == 0]
    assert [trial.state.name for trial in again] == ["COMPLETE", "FAIL"]
    assert all(trial.params == study.trials[0].params for trial in again)
    assert retries.counted(study) == 3
    assert retries.pending(study, 2, lambda mark: True) == []
    double = runs._client.get_run(runs.child(again[1].number))
    assert (double.info.status, double.data.tags["retry_of"]) == ("FAILED", "0")
    assert "was first" in double.data.tags["error"]
