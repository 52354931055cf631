import subprocess
import sys
import time

import optuna
import psutil
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from ds_lightning.errors import ConfigError
from ds_lightning.sweeps import SearchSpace, retries
from ds_lightning.sweeps.processes import OWNER, end_processes, is_gone, this_process
from ds_lightning.sweeps.study import create_study, make_sampler, mend_journal, open_storage

GONE = f"{this_process().split()[0]} 4194305 1.0"
SPACE = SearchSpace.from_dict(
    {"x": {"type": "categorical", "choices": [1, 2, 3]}, "y": {"type": "int", "low": 0, "high": 1}}
)


def kill(study, trial):
    retries.mark_dead(study, trial.number)
    study.tell(trial, state=optuna.trial.TrialState.FAIL)


@pytest.mark.parametrize("sampler", ["random", "tpe", "grid"])
@pytest.mark.parametrize("suggested", [1, 2])
def test_a_killed_trial_comes_again_with_its_parameters(sampler, suggested):
    study = optuna.create_study(sampler=make_sampler({"name": sampler, "seed": 0}, SPACE))
    first = study.ask()
    drawn = {}
    for key in list(SPACE.dimensions)[:suggested]:
        drawn[key] = SPACE.dimensions[key].suggest(key, first)
    kill(study, first)
    for tries in (1, 2):
        (dead,) = retries.pending(study, 2)
        retries.enqueue(study, dead)
        assert retries.pending(study, 2) == []
        assert retries.counted(study) == 0
        again = study.ask()
        assert again.user_attrs["retry_of"] == dead.number
        assert again.user_attrs["retry"] == tries
        assert drawn.items() <= SPACE.suggest(again).items()
        kill(study, again)
    assert retries.pending(study, 2) == []
    assert [trial.number for trial in retries.pending(study, 3)] == [2]


def test_a_grid_is_tried_whole_although_trials_are_killed():
    study = optuna.create_study(sampler=make_sampler({"name": "grid", "seed": 0}, SPACE))
    points = []
    for number in range(9):
        if number == 4:
            # Another process goes on.
            study.sampler = make_sampler({"name": "grid", "seed": 0}, SPACE, told=4)
        for dead in retries.pending(study, 2)[:1]:
            retries.enqueue(study, dead)
        trial = study.ask()
        if number == 3:
            kill(study, trial)
            continue
        point = SPACE.suggest(trial)
        if number in (1, 5):
            kill(study, trial)
        else:
            points.append(tuple(point.values()))
            try:
                study.tell(trial, 0.0)
            except RuntimeError:
                break
    assert sorted(points) == [(x, y) for x in (1, 2, 3) for y in (0, 1)]
    assert retries.counted(study) == 6


def test_a_trial_without_a_mark_is_left_over_when_every_other_sweep_is_gone():
    study = optuna.create_study()
    study.ask()
    assert not retries.is_left_over(study.trials[0], study)
    retries.register(study)
    assert not retries.is_left_over(study.trials[0], study)
    study.set_user_attr(f"sweep {GONE}", True)
    assert retries.is_left_over(study.trials[0], study)
    assert retries.dead_sweeps(study) == {GONE}
    study.set_user_attr("sweep another-host 1 1.0", True)
    assert not retries.is_left_over(study.trials[0], study)


def test_processes_of_a_dead_sweep_are_ended_and_no_others():
    sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    started = [subprocess.Popen(sleeper, env={OWNER: f"{GONE} #{index}.0"}) for index in (0, 1)]
    try:
        while not all(psutil.Process(each.pid).environ().get(OWNER) for each in started):
            time.sleep(0.01)
        end_processes(lambda owner: owner == f"{GONE} #0.0")
        assert started[0].poll() is not None
        assert started[1].poll() is None
    finally:
        for each in started:
            each.kill()
            each.wait()


def test_this_process_is_not_gone():
    assert not is_gone(this_process())
    assert is_gone(GONE)
    assert not is_gone("another-host 4194305 1.0")


def test_a_torn_line_of_a_journal_is_cut_off(tmp_path):
    path = tmp_path / "s.journal"
    study = create_study(open_storage(str(path)), "s", ["minimize"], None, None)
    study.tell(study.ask(), 3.0)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"work')
    mend_journal(path)
    assert path.read_bytes() == whole
    go_on = optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(path))))
    go_on.tell(go_on.ask(), 2.0)
    assert optuna.load_study(study_name="s", storage=open_storage(str(path))).best_value == 2.0


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda good: good.split(b"\n", 1)[1], "line 1 comes before any study"),
        (lambda good: good.replace(b'"', b"", 1), "line 1 is damaged"),
        (lambda good: good + b"\xff\xfe\n", r"line \d is damaged"),
        (lambda good: b"[1, 2]\n" + good, "line 1 is damaged"),
    ],
)
def test_a_damaged_journal_is_named_and_left_alone(tmp_path, damage, what):
    path = tmp_path / "s.journal"
    create_study(open_storage(str(path)), "s", ["minimize"], None, None).ask()
    path.write_bytes(damaged := damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=rf"s.journal: {what}"):
        mend_journal(path)
    assert path.read_bytes() == damaged
