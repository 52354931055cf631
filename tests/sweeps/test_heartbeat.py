import time

import optuna
import pytest
from optuna.trial import TrialState

from ds_lightning.sweeps import Sweep, retries
from ds_lightning.sweeps.heartbeat import Heartbeat
from ds_lightning.sweeps.left_overs import close_left_overs
from ds_lightning.sweeps.processes import this_process
from ds_lightning.sweeps.spec import SweepSpec
from ds_lightning.sweeps.study import create_study, open_storage

FAR = "another-host 1 1.0"
HERE_GONE = f"{this_process().split()[0]} 4194305 1.0"


def made_in(place):
    return create_study(open_storage(place), "s", ["minimize"], None, None)


@pytest.fixture
def study(tmp_path):
    return made_in(str(tmp_path / "s.journal"))


def beat(study, mark, when):
    study.set_user_attr(f"sweep {mark}", when)


def run_one(study, mark):
    """Ask for a trial as another process would."""
    trial = study.ask()
    trial.set_user_attr("process", mark)
    return trial


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("place", ["{}/s.journal", "sqlite:///{}/s.db"])
def test_the_sign_of_life_changes_and_ends(tmp_path, place):
    study = made_in(place.format(tmp_path))

    def sign():
        return study.user_attrs[f"sweep {this_process()}"]

    with Heartbeat(study, interval=0.05):
        first = sign()
        assert abs(first - time.time()) < 10
        until(lambda: sign() > first)
    assert sign() is False


def test_another_host_is_gone_when_its_sign_stops_and_not_before(study):
    beat(study, FAR, 1.0)
    with Heartbeat(study, interval=0.05, grace=1.0) as heart:
        # Its clock is years behind: what counts is that the sign changes.
        for count in range(24):
            beat(study, FAR, 2.0 + count)
            time.sleep(0.05)
            assert not heart.gone(FAR)
            assert heart.others_live()
        until(lambda: heart.gone(FAR))
        assert not heart.others_live()
        beat(study, FAR, 40.0)
        until(lambda: not heart.gone(FAR))
        beat(study, FAR, False)
        until(lambda: heart.gone(FAR))
        assert not heart.gone("a-host-that-never-wrote 1 1.0")
        assert heart.gone(HERE_GONE)
        assert not heart.gone(this_process())


def test_at_the_start_an_old_sign_is_watched_for_a_while(study):
    run_one(study, FAR)
    beat(study, FAR, time.time() - 1000)
    with Heartbeat(study, interval=0.1, grace=60) as heart:
        assert not heart.gone(FAR)
        heart.settle()
        assert heart.gone(FAR)
        beat(study, FAR, time.time())
        until(lambda: not heart.gone(FAR))


def test_a_fresh_sign_is_believed_without_waiting(study):
    run_one(study, FAR)
    beat(study, FAR, time.time())
    with Heartbeat(study, interval=20, grace=60) as heart:
        start = time.monotonic()
        heart.settle()
        assert time.monotonic() - start < 10
        assert not heart.gone(FAR)


def test_a_storage_that_fails_costs_a_warning():
    study = optuna.create_study()
    heart = Heartbeat(study)

    def fail(*arguments):
        raise OSError("no space left")

    study.set_user_attr = fail
    with pytest.warns(RuntimeWarning, match=r"sign of life was not exchanged: no space left"):
        heart._write(1.0)


def journal_of(store, name):
    return open_storage(str(store / "optuna" / f"{name}.journal"))


def test_a_second_sweep_does_not_touch_the_trials_of_one_that_lives(content, store, runs):
    study = create_study(journal_of(store, "two"), "two", ["minimize"], None, None)
    theirs = run_one(study, FAR)
    beat(study, FAR, time.time())
    result = Sweep(SweepSpec.from_dict(content, name="two"), store).run(trials=1, study="two")
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.RUNNING, TrialState.COMPLETE]
    # The study's run is the other one's to close.
    assert runs(result).parent.info.status == "RUNNING"
    assert result.counts == {"RUNNING": 1, "COMPLETE": 1}
    theirs.report(1.0, 1)
    study.tell(theirs, 1.0)


def test_a_sweep_that_dies_while_another_runs_is_taken_over(content, store, runs, monkeypatch):
    study = create_study(journal_of(store, "over"), "over", ["minimize"], None, None)
    theirs = run_one(study, FAR)
    x = SweepSpec.from_dict(content).space.suggest(theirs)["model.x"]
    beat(study, FAR, time.time())
    died = []

    class Watched(Heartbeat):
        def gone(self, mark):
            return bool(died) if mark == FAR else super().gone(mark)

    monkeypatch.setattr("ds_lightning.sweeps.sweep.Heartbeat", Watched)
    monkeypatch.setattr("ds_lightning.sweeps.progress.SweepProgress.report", lambda *_: died.append(True))
    result = Sweep(SweepSpec.from_dict(content, name="over"), store).run(trials=1, study="over")
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    again = next(trial for trial in study.trials if "retry_of" in trial.user_attrs)
    assert (again.user_attrs["retry_of"], again.params["model.x"]) == (0, x)
    books = runs(result)
    assert books.children[0].info.status == "FAILED"
    assert books.parent.info.status == "FINISHED"


def test_a_sweep_that_was_taken_for_dead_learns_it(content, store, runs, monkeypatch):
    """Its host was suspended in the middle of a trial; meanwhile another one booked that trial."""
    done = []

    def report(self, number, step, value):
        if not done:
            (name,) = [path.stem for path in (store / "optuna").glob("asleep-*.journal")]
            other = optuna.load_study(study_name=name, storage=journal_of(store, name))
            other.set_user_attr(f"died {number}", FAR)
            other.tell(number, state=TrialState.FAIL)
            done.append(other)

    monkeypatch.setattr("ds_lightning.sweeps.progress.SweepProgress.report", report)
    result = Sweep(SweepSpec.from_dict(content, name="asleep"), store).run(trials=2)
    assert result.counts == {"FAIL": 1, "COMPLETE": 1}
    run = runs(result).children[0]
    assert (run.info.status, run.data.tags["optuna.state"]) == ("FAILED", "FAIL")
    assert "another sweep took this one for dead" in run.data.tags["error"]
    # It is the other one's to give out again.
    assert retries.pending(done[0], 2) == []
    assert len(retries.pending(done[0], 2, lambda mark: True)) == 1


def test_checkpoints_that_nobody_needs_are_removed_at_the_start(content, tmp_path):
    spec = SweepSpec.from_dict(content)
    study = optuna.create_study()
    done, running, dead = (study.ask() for _ in range(3))
    study.tell(done, 1.0)
    running.set_user_attr("process", this_process())
    dead.suggest_float("x", 0, 1)
    retries.mark_dead(study, dead.number)
    study.tell(dead, state=TrialState.FAIL)
    for number in range(3):
        (tmp_path / "checkpoints" / f"trial-{number}").mkdir(parents=True)
    assert close_left_overs(study, None, spec, folder=tmp_path) == 0
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"trial-1", "trial-2"}
