import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from ds_lightning.errors import ConfigError, NoEffectWarning
from ds_lightning.sweeps import Sweep
from ds_lightning.sweeps.pool import WorkerPool
from ds_lightning.sweeps.processes import this_process
from ds_lightning.sweeps.retries import is_left_over
from ds_lightning.sweeps.spec import SweepSpec
from ds_lightning.sweeps.sweep import warn_if_nothing_was_compared
from ds_lightning.training import resolve

STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}


def sweep(content, store, name):
    return Sweep(SweepSpec.from_dict(content, name=name), store)


def load(store, name):
    storage = JournalStorage(JournalFileBackend(str(store / "optuna" / f"{name}.journal")))
    return optuna.load_study(study_name=name, storage=storage)


def assert_books_agree(study, runs):
    """Every trial has one MLflow run, with the same end, parameters and objective."""
    assert {trial.number for trial in study.trials} == set(runs.children)
    for trial in study.trials:
        run = runs.children[trial.number]
        assert run.info.status == STATUS[trial.state.name]
        assert run.info.run_name == f"trial-{trial.number}"
        tags = run.data.tags
        assert tags["optuna.state"] == trial.state.name
        assert tags["optuna.study"] == study.study_name
        assert ("error" in tags) == (trial.state.name == "FAIL")
        assert trial.user_attrs["mlflow.run_id"] == run.info.run_id
        for key, value in trial.params.items():
            assert run.data.params[key] == str(value)
        if trial.state.name == "COMPLETE":
            assert run.data.metrics["val/loss"] == pytest.approx(trial.value, rel=1e-6)


def test_complete_pruned_and_failed_trials_are_the_same_in_optuna_and_mlflow(content, store, runs, capsys):
    content["space"] = {"model.x": {"type": "float", "low": 1, "high": 5, "step": 1}}
    content["base"]["overrides"]["model.trouble"] = "five"
    content["sampler"] = {"name": "grid", "seed": 3}
    content["pruner"] = {"name": "median", "n_startup_trials": 1}
    result = sweep(content, store, "states").run()
    study, books = load(store, result.study), runs(result)

    assert_books_agree(study, books)
    assert sum(result.counts.values()) == 5
    assert result.counts["FAIL"] == 1
    assert result.counts["PRUNED"] >= 1
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert min(complete, key=lambda trial: trial.value).number == result.best[0].number
    for trial in complete:
        # Four validations, after 2, 4, 6 and 8 steps, although there are two epochs.
        x = trial.params["model.x"]
        expected = {2 * count: (x - 3) ** 2 + 10 / count for count in (1, 2, 3, 4)}
        assert trial.intermediate_values == pytest.approx(expected)
        history = books.client.get_metric_history(trial.user_attrs["mlflow.run_id"], "val/loss")
        assert [metric.value for metric in sorted(history, key=lambda m: m.step)] == pytest.approx(
            list(expected.values())
        )
    failed = next(run for run in books.children.values() if run.info.status == "FAILED")
    assert failed.data.tags["error"] == "RuntimeError: out of memory"
    assert "error.txt" in books.artifacts(failed)

    assert books.parent.info.status == "FINISHED"
    assert books.parent.data.metrics["best/val/loss"] == pytest.approx(result.best[0].values[0])
    assert books.artifacts(books.parent) == {"best.yaml", "pictures", "trials.json"}
    assert books.artifacts(books.parent, "pictures") >= {"pictures/history.png"}
    lines = re.findall(r"^trial (\d+): (COMPLETE|PRUNED|FAIL) ", capsys.readouterr().err, re.MULTILINE)
    assert {int(number): state for number, state in lines} == {t.number: t.state.name for t in study.trials}

    with pytest.raises(ConfigError, match="has tried all 5 points of its grid"):
        sweep(content, store, "states").run(study=result.study)


def test_best_configuration_resolves_to_the_best_trial(content, store, runs):
    content["space"]["data.init_args.batch_size"] = {"type": "categorical", "choices": [2, 4]}
    content["base"]["overrides"]["trainer"]["val_check_interval"] = 1.0
    result = sweep(content, store, "best").run(3)
    best = result.best[0]
    assert best.config == store / "sweeps" / result.study / "best.yaml"
    config = resolve([best.config])
    assert config == yaml.safe_load(best.config.read_text())
    assert config == resolve([], {**content["base"]["overrides"], **best.params})
    assert config["model"]["init_args"]["x"] == best.params["model.x"]
    assert config["data"]["init_args"]["batch_size"] == best.params["data.init_args.batch_size"]
    assert config["trainer"]["logger"]["init_args"]["parent_run_id"] is None

    table = json.loads(Path(runs(result).client.download_artifacts(result.parent_run_id, "trials.json")).read_text())
    assert [entry["number"] for entry in table] == [0, 1, 2]
    assert table[best.number]["values"] == best.values
    assert "pictures/importance.png" in runs(result).artifacts(runs(result).parent, "pictures")


def test_a_continued_study_keeps_its_parent_run_and_draws_new_points(content, store, runs):
    first = sweep(content, store, "again").run(2)
    second = sweep(content, store, "again").run(1, study=first.study)
    assert second.study == first.study
    assert second.parent_run_id == first.parent_run_id
    assert second.counts == {"COMPLETE": 3}
    study = load(store, first.study)
    assert_books_agree(study, runs(second))
    assert len({trial.params["model.x"] for trial in study.trials}) == 3
    assert runs(second).parent.info.status == "FINISHED"

    with pytest.raises(ConfigError, match=f"study 'agian' is not in .*{first.study}"):
        sweep(content, store, "again").run(1, study="agian")
    content["objective"]["direction"] = "maximize"
    with pytest.raises(ConfigError, match="was made to minimize; the sweep file says maximize"):
        sweep(content, store, "again").run(1, study=first.study)


def test_a_killed_sweep_is_booked_when_its_study_goes_on(content, store, runs):
    first = sweep(content, store, "killed").run(1)
    study = load(store, first.study)
    dead, alive = study.ask(), study.ask()
    host, _, created = this_process().rsplit(" ", 2)
    dead.set_user_attr("process", f"{host} 4194305 {created}")
    alive.set_user_attr("process", this_process())
    assert is_left_over(study.trials[dead.number])
    assert not is_left_over(study.trials[alive.number])
    second = sweep(content, store, "killed").run(1, study=first.study)
    assert second.counts == {"COMPLETE": 2, "FAIL": 1, "RUNNING": 1}
    run = runs(second).children[dead.number]
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == "left running by a process that was killed"


def test_a_sweep_that_was_killed_ends_with_exactly_its_trials(content, store, runs):
    content["trials"] = 3
    dying = copy.deepcopy(content)
    # At the first point above 0 its process, here the sweep itself, kills itself.
    dying["base"]["overrides"]["model.trouble"] = "die"
    code = (
        "import json, sys\n"
        "from ds_lightning.allowlist import allow_packages\n"
        "from ds_lightning.sweeps import Sweep\n"
        "from ds_lightning.sweeps.spec import SweepSpec\n"
        "allow_packages(['sweep_parts'])\n"
        "Sweep(SweepSpec.from_dict(json.loads(sys.argv[1]), name='sigkill'), sys.argv[2]).run()\n"
    )
    command = [sys.executable, "-c", code, json.dumps(dying), str(store)]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}).returncode == -signal.SIGKILL
    name = max((store / "optuna").glob("sigkill-*.journal")).stem
    before = load(store, name).trials
    assert before[-1].state.name == "RUNNING"

    result = sweep(content, store, "sigkill").run(study=name)
    assert result.counts == {"COMPLETE": 3, "FAIL": 1}
    study = load(store, name)
    again = study.trials[len(before)]
    assert again.user_attrs["retry_of"] == before[-1].number
    assert again.params == before[-1].params
    children = runs(result).children
    assert [children[trial.number].info.status for trial in study.trials] == [
        STATUS[trial.state.name] for trial in study.trials
    ]
    assert children[again.number].data.tags["retry_of"] == str(before[-1].number)
    assert runs(result).parent.info.status == "FINISHED"


def test_going_on_runs_what_is_missing_and_no_more(content, store, runs):
    content["base"]["overrides"]["model.trouble"] = "sleep"
    first = sweep(content, store, "missing").run(3, timeout=0.5)
    assert first.counts == {"COMPLETE": 1}
    content["base"]["overrides"]["model.trouble"] = ""
    assert sweep(content, store, "missing").run(study=first.study).counts == {"COMPLETE": 3}
    with pytest.warns(NoEffectWarning, match="has all its trials; --trials N adds some"):
        third = sweep(content, store, "missing").run(study=first.study)
    assert third.counts == {"COMPLETE": 3}
    assert runs(third).parent.info.status == "FINISHED"
    history = runs(third).client.get_metric_history(third.parent_run_id, "trials/complete")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1), (3, 3)]


def test_several_objectives_give_a_pareto_front(content, store, runs):
    content["objective"] = [
        {"metric": "val/loss", "direction": "minimize"},
        {"metric": "val/size", "direction": "maximize"},
    ]
    result = sweep(content, store, "pareto").run(3)
    values = {trial.number: trial.values for trial in load(store, result.study).trials}
    front = {
        number
        for number, (loss, size) in values.items()
        if not any((a <= loss and b >= size) and (a, b) != (loss, size) for a, b in values.values())
    }
    assert {trial.number for trial in result.best} == front
    for trial in result.best:
        assert trial.config.name == f"best-trial-{trial.number}.yaml"
        assert resolve([trial.config])["model"]["init_args"]["x"] == trial.params["model.x"]
    assert "pictures/pareto.png" in runs(result).artifacts(runs(result).parent, "pictures")


def test_the_best_value_may_count_instead_of_the_last(content, store):
    content["base"]["overrides"]["model.train_metric"] = True
    content["space"] = {"model.x": {"type": "int", "low": 2, "high": 2}}
    # A metric that only the training epoch logs: x, then 2 x.
    content["objective"] = {"metric": "train/x", "direction": "minimize"}
    assert sweep(content, store, "last").run(1).best[0].values == [4.0]
    content["objective"]["value"] = "best"
    result = sweep(content, store, "first").run(1)
    assert result.best[0].values == [2.0]
    assert load(store, result.study).trials[0].intermediate_values == {4: 2.0, 8: 4.0}


def test_an_unknown_key_in_any_branch_is_refused_before_anything_is_made(content, tmp_path):
    content["space"]["model.block"] = {"type": "categorical", "choices": ["a", "b"]}
    content["space"]["model.depht"] = {"type": "int", "low": 1, "high": 2, "when": {"model.block": "b"}}
    with pytest.raises(ConfigError, match=r"space does not fit the base: .*depht"):
        sweep(content, tmp_path / "runs", "unknown").run(1)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"trainer.devices": 2}, "a trial runs on one device, got trainer.devices 2"),
        ({"trainer.fast_dev_run": True}, "trainer.fast_dev_run logs no metric"),
    ],
)
def test_what_can_not_be_a_trial_is_refused(content, tmp_path, changes, text):
    content["base"]["overrides"].update(changes)
    with pytest.raises(ConfigError, match=text):
        sweep(content, tmp_path / "runs", "refused").run(1)
    assert not (tmp_path / "runs").exists()


def test_a_sweep_needs_an_end(content, tmp_path):
    with pytest.raises(ConfigError, match="give `trials` or `timeout`"):
        sweep(content, tmp_path, "endless").run()


def test_no_trial_begins_after_the_timeout(content, store):
    content["base"]["overrides"]["model.trouble"] = "sleep"
    result = sweep(content, store, "timeout").run(timeout=0.5)
    assert result.counts == {"COMPLETE": 1}


def test_a_metric_that_is_never_logged_stops_the_study(content, store):
    content["objective"]["metric"] = "val/accuracy"
    with pytest.raises(ConfigError, match=r"metric 'val/accuracy' is never logged; logged: val/loss, val/size$"):
        sweep(content, store, "metric").run(5)
    name = max((store / "optuna").glob("metric-*.journal")).stem
    assert [trial.state.name for trial in load(store, name).trials] == ["FAIL"]


def test_three_failures_at_the_start_stop_the_study(content, store, runs):
    content["base"]["overrides"]["model.trouble"] = "nan"
    with pytest.raises(ConfigError, match=r"first 3 trials all failed.*val/loss is nan at step 2"):
        sweep(content, store, "failing").run(5)
    study = load(store, max((store / "optuna").glob("failing-*.journal")).stem)
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * 3


@pytest.mark.parametrize(("steps", "warns"), [(((2, 4), (3, 6)), True), (((2, 4), (1, 2)), False), (((2,),), False)])
def test_a_pruner_with_nothing_to_compare_warns(content, steps, warns):
    content["pruner"] = "median"
    study = optuna.create_study()
    for each in steps:
        study.add_trial(optuna.trial.create_trial(value=0.0, intermediate_values=dict.fromkeys(each, 0.0)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_nothing_was_compared(study, SweepSpec.from_dict(content))
    assert [each.category for each in caught] == [NoEffectWarning] * warns


def test_ctrl_c_keeps_what_was_done(content, store, runs):
    content["base"]["overrides"]["model.trouble"] = "interrupt"
    content["space"] = {"model.x": {"type": "int", "low": 0, "high": 1}}
    content["sampler"] = {"name": "grid", "seed": 0}
    result = sweep(content, store, "stopped").run()
    study = load(store, result.study)
    assert result.exit_code == 130
    states = [trial.state.name for trial in study.trials]
    assert states in (["FAIL"], ["COMPLETE", "FAIL"])
    assert_books_agree(study, runs(result))
    assert runs(result).parent.info.status == "KILLED"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_workers_run_exactly_the_trials_and_survive_the_death_of_one(content, store, runs):
    # Of 7 points the one above 0 kills its worker.
    content["space"] = {"model.x": {"type": "int", "low": -5, "high": 1}}
    content["base"]["overrides"]["model.trouble"] = "die"
    content["sampler"] = {"name": "grid", "seed": 0}
    content["max_retries"] = 0
    result = sweep(content, store, "workers").run(7, workers=3)
    study = load(store, result.study)
    assert result.counts == {"COMPLETE": 6, "FAIL": 1}
    assert sorted(trial.params["model.x"] for trial in study.trials) == list(range(-5, 2))
    assert_books_agree(study, runs(result))
    dead = next(run for run in runs(result).children.values() if run.info.status == "FAILED")
    assert dead.data.params["model.x"] == "1"
    assert re.search(r"worker process \d ended \(killed by SIGKILL\)", dead.data.tags["error"])
    assert result.best[0].params == {"model.x": 0}
    assert runs(result).parent.info.status == "FINISHED"


def test_sigterm_stops_a_worker_and_books_its_trial(content, store, runs, monkeypatch, tmp_path):
    content["base"]["overrides"]["model.trouble"] = "sleep"
    content["base"]["overrides"]["trainer"]["max_epochs"] = 1000
    started = threading.Event()

    def report(self, number, step, value):
        # From a thread, as a scheduler would: between any two messages.
        if not started.is_set():
            started.set()
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()

    monkeypatch.setattr("ds_lightning.sweeps.progress.SweepProgress.report", report)
    monkeypatch.setattr("ds_lightning.sweeps.sweep.run_here", lambda ledger: WorkerPool(1, tmp_path).run(ledger))
    result = sweep(content, store, "sigterm").run(4)
    assert result.exit_code == 143
    study = load(store, result.study)
    assert [trial.state.name for trial in study.trials] == ["FAIL"]
    assert_books_agree(study, runs(result))
    assert runs(result).children[0].data.tags["error"] == "interrupted"
    assert runs(result).parent.info.status == "KILLED"
