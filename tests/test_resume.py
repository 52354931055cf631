import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ds_lightning.checkpoints import newest_checkpoint
from ds_lightning.cli import main
from ds_lightning.errors import ConfigError
from ds_lightning.resume import find_unfinished, hold
from ds_lightning.tracking import MLflowTracker
from ds_lightning.tracking.store import connect, locate

ROOT = Path(__file__).parents[1]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
FIT = [
    "--model=Classifier",
    "--model.network_options={width: 4}",
    "--data=MNIST5k",
    "--data.train_size=400",
    "--data.batch_size=8",
    "--trainer.max_epochs=1000",
    "--trainer.log_every_n_steps=1",
    *QUIET,
]


def rows(folder: Path, query: str) -> list[Any]:
    database = folder / "mlruns" / "mlflow.db"
    if not database.exists():
        return []
    with sqlite3.connect(database, timeout=20) as connection:
        try:
            return connection.execute(query).fetchall()
        except sqlite3.OperationalError:  # the tables are being made
            return []


def loss_steps(folder: Path) -> list[int]:
    return [step for (step,) in rows(folder, "select step from metrics where key = 'train/loss' order by step")]


def steps_saved(folder: Path) -> int:
    newest = newest_checkpoint(folder)
    assert newest is not None
    return int(torch.load(newest, weights_only=True)["global_step"])


def fit_until(folder: Path, words: list[str], number: int, more_steps: int) -> tuple[int, str]:
    """Start `ds-lightning fit`, and send it a signal when so many more steps are in MLflow."""
    before = len(loss_steps(folder))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ds_lightning", "fit", *words]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 120
        while process.poll() is None and len(loss_steps(folder)) < before + more_steps:
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.1)
        process.send_signal(number)
        code = process.wait(60)
    finally:
        process.kill()
    return code, (folder / "log.txt").read_text()


def interrupt_when(folder: Path, steps: int) -> None:
    """Press Ctrl-C on this process when so many steps are in MLflow."""
    while len(loss_steps(folder)) < steps:
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_run_that_is_stopped_three_ways_ends_as_one_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, log = fit_until(tmp_path, FIT, signal.SIGTERM, 1)
    assert code == 143, log
    assert "stopped by SIGTERM" in log
    assert "Traceback" not in log
    ((run, status),) = rows(tmp_path, "select run_uuid, status from runs")
    assert status == "KILLED"
    assert rows(tmp_path, "select value from tags where key = 'ds_lightning.preempted'") == [("SIGTERM",)]
    (saved,) = tmp_path.rglob("preempted.ckpt")
    assert saved.parts[-3:] == (run, "checkpoints", "preempted.ckpt")
    step = torch.load(saved, weights_only=True)["global_step"]
    assert loss_steps(tmp_path) == list(range(step)), "every step before the stop is logged, and none after it"

    monkeypatch.chdir(tmp_path)
    watch = threading.Thread(target=interrupt_when, args=(tmp_path, step + 3), daemon=True)
    watch.start()
    assert main(["fit", "--resume"]) == 130
    watch.join()
    assert rows(tmp_path, "select run_uuid, status from runs") == [(run, "KILLED")]
    steps = loss_steps(tmp_path)
    assert steps == list(range(torch.load(saved, weights_only=True)["global_step"])), "no hole and no step twice"
    assert len(steps) > step

    code, log = fit_until(tmp_path, ["--resume", run], signal.SIGKILL, 3)
    assert code == -signal.SIGKILL, log
    assert rows(tmp_path, "select run_uuid, status from runs") == [(run, "RUNNING")]

    # MLflow may lag behind the checkpoint by epochs, and be ahead of it by less than one.
    epochs = steps_saved(saved.parent) // 50 + 1
    assert main(["fit", "--resume", f"--trainer.max_epochs={epochs}"]) == 0
    assert rows(tmp_path, "select run_uuid, status from runs") == [(run, "FINISHED")]
    assert set(loss_steps(tmp_path)) == set(range(epochs * 50))
    changed = rows(tmp_path, "select key, value from tags where key like 'changed.%'")
    assert changed == [("changed.trainer.max_epochs", str(epochs))]
    config = yaml.safe_load(next(tmp_path.rglob("config.yaml")).read_text())
    assert config["ckpt_path"] is None
    assert config["trainer"]["logger"]["init_args"]["run_id"] is None
    names = [entry["class_path"].rpartition(".")[2] for entry in config["trainer"]["callbacks"]]
    assert names == ["ExactResume", "DurableCheckpoint", "Preemption"], "added once, and seen in the saved file"

    capsys.readouterr()
    assert main(["fit", "--resume"]) == 2
    assert "nothing to resume: experiment 'ds_lightning'" in capsys.readouterr().err
    assert main(["fit", "--resume", run]) == 2
    assert f"run {run} is FINISHED, after max_epochs {epochs}" in capsys.readouterr().err
    assert main(["fit", f"--resume={run}", "--trainer.max_epochs=-2", "--ckpt_path=x"]) == 2
    capsys.readouterr()
    assert main(["fit", f"--resume={run}", f"--trainer.max_epochs={epochs - 1}"]) == 2
    assert f"run {run} has begun {epochs}; give at least {epochs}" in capsys.readouterr().err
    assert main(["fit", "--resume", run, f"--trainer.max_epochs={epochs + 1}"]) == 0
    assert max(loss_steps(tmp_path)) == (epochs + 1) * 50 - 1


def test_what_is_there_and_what_is_going(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to resume: experiment 'digits'"):
        find_unfinished("digits", tmp_path)
    ids = []
    for tags in ({}, {}, {"optuna.study": "s"}):
        tracker = MLflowTracker("digits", store=tmp_path, tags=tags, system_metrics=False)
        ids.append(tracker.run_id)
        tracker.close("FAILED")
        time.sleep(0.01)
    older, newer, _ = ids
    with pytest.raises(ConfigError, match=f"run {newer} .FAILED. has no whole checkpoint in "):
        find_unfinished("digits", tmp_path)
    experiment = connect(locate(tmp_path)).get_run(newer).info.experiment_id
    for run in (older, newer):
        folder = tmp_path / "checkpoints" / experiment / run / "checkpoints"
        folder.mkdir(parents=True)
        torch.save(
            {"global_step": 3, "epoch": 1, "state_dict": {}, "pytorch-lightning_version": "2"}, folder / "a.ckpt"
        )
    found = find_unfinished("digits", tmp_path)
    assert (found.run_id, found.checkpoint.name, found.config, found.status) == (newer, "a.ckpt", None, "FAILED")
    found.check_goes_further(2)
    with pytest.raises(ConfigError, match="max_epochs is 0, but run"):
        found.check_goes_further(0)
    assert find_unfinished("other", tmp_path, older).run_id == older
    lock = hold(tmp_path / "checkpoints" / experiment / newer)
    assert find_unfinished("digits", tmp_path).run_id == older, "the newer one is being trained"
    lock.release()
    assert find_unfinished("digits", tmp_path).run_id == newer
    with pytest.raises(ConfigError, match="no run 'nobody'"):
        find_unfinished("digits", tmp_path, "nobody")


def test_safeguards_give_way_to_what_the_user_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def callbacks(*words: str) -> list[str]:
        assert main(["fit", "--model=Classifier", "--data=MNIST5k", *words, "--print_config"]) == 0
        entries = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"] or []
        return [entry["class_path"].rpartition(".")[2] for entry in entries]

    assert callbacks("--safeguards=false") == []
    assert callbacks("--trainer.callbacks+=ModelCheckpoint") == ["ModelCheckpoint", "ExactResume", "Preemption"]
    assert callbacks("--trainer.enable_checkpointing=false") == ["ExactResume", "Preemption"]
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "trainer: {callbacks: [{class_path: ds_lightning.callbacks.Preemption, init_args: {signals: [SIGUSR2]}}]}"
    )
    assert callbacks(f"--config={mine}") == ["Preemption", "ExactResume", "DurableCheckpoint"]
