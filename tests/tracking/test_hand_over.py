"""A kill right after a checkpoint: what was logged up to it is in MLflow, for a resumed fit won't log it again."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killed_fit import fit
from stub_server import StubServer, rows_in
from tracking_helpers import rows_of, wait_until

from ds_lightning.callbacks import DurableCheckpoint
from ds_lightning.tracking import MLflowTracker, outbox
from ds_lightning.tracking.outbox import Outbox
from ds_lightning.tracking.runs import open_run
from ds_lightning.tracking.store import connect

HANDED_OVER = """
import os, signal, sys, time
from pathlib import Path
from ds_lightning.tracking import outbox
# A busy machine may take longer than the second of training.
outbox._HAND_OVER_SECONDS = 60.0
uri, spool, run, when = sys.argv[1:]
box = outbox.Outbox(uri, Path(spool))
resumed = "again" if when == "reopened" else None
rows = [("m", float(s), 1000 + s, s) for s in range(3_000)]
if when != "new":
    box.metrics(run, rows[:1], resumed)
    while not (box._child and (box._child.ready or when in ("starting", "reopened"))):
        time.sleep(0.001)
if when == "writer killed":
    child = box._child
    os.kill(child.pid, signal.SIGKILL)
    child._process.wait()
box.metrics(run, rows, resumed)
assert box.hand_over()
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_after_hand_over(uri, spool, run, when, path=""):
    command = [sys.executable, "-c", HANDED_OVER, uri, str(spool), run, when]
    environment = {**os.environ, "PYTHONPATH": path}
    assert subprocess.run(command, check=False, timeout=120, env=environment).returncode == -signal.SIGKILL


@pytest.mark.parametrize("when", ["new", "starting", "reopened", "ready", "writer killed"])
def test_a_kill_right_after_it_loses_nothing(store, when):
    run = open_run(store, "x").run_id
    killed_after_hand_over(store.uri, store.spool, run, when)
    wait_until(lambda: len(rows_of(store, run)) >= 3_000)
    assert rows_of(store, run) == [("m", float(step), step) for step in range(3_000)]


@pytest.mark.parametrize("when", ["new", "ready", "writer killed"])
def test_a_server_gets_it_from_a_writer_that_was_still_starting(tmp_path, when):
    server = StubServer(str(tmp_path / "artifacts"), file=tmp_path / "rows")
    killed_after_hand_over(server.uri, tmp_path / "spool", "f" * 32, when)
    wait_until(lambda: len(rows_in(tmp_path / "rows")) >= 3_000)
    assert {row["step"] for row in rows_in(tmp_path / "rows")} == set(range(3_000))
    server.die()


def test_a_writer_that_can_not_start_leaves_it_on_disk(tmp_path):
    broken = tmp_path / "modules"
    broken.mkdir()
    (broken / "mlflow.py").write_text("import time; time.sleep(10); raise ImportError('broken')")
    killed_after_hand_over("http://127.0.0.1:1", tmp_path / "spool", "f" * 32, "new", str(broken))
    file = tmp_path / "spool" / f"{'f' * 32}.jsonl"
    wait_until(lambda: file.exists() and len(file.read_text().splitlines()) >= 3_000)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == list(range(3_000))


def test_a_locked_database_does_not_hold_training_up(box, store):
    run = open_run(store, "x").run_id
    other = sqlite3.connect(store.uri.removeprefix("sqlite:///"))
    other.execute("begin exclusive")
    box.metrics(run, [("m", 0.0, 0, 0)])
    started = time.monotonic()
    assert not box.hand_over()
    assert not box.hand_over(), "the second is not waited for again"
    # MLflow waits 20 s for a lock.
    assert time.monotonic() - started < 6.0
    box.metrics(run, [("m", 1.0, 1, 1)])
    other.rollback()
    assert box.flush(run, 60)
    assert rows_of(store, run) == [("m", 0.0, 0), ("m", 1.0, 1)]
    other.close()


def test_what_comes_later_is_not_urgent(box, store, monkeypatch):
    monkeypatch.setattr(outbox, "_HAND_OVER_SECONDS", 60.0)
    run = open_run(store, "x").run_id
    wrote = []
    write = box._direct.write
    box._direct.write = lambda runs, calls: (wrote.append(sum(len(call["rows"]) for call in calls)), write(runs, calls))
    box.metrics(run, [("m", 0.0, 0, 0)])
    assert box.hand_over()
    assert wrote == [1]
    while box._child is None or not box._child.ready:
        box.metrics(run, [("m", float(step), step, step) for step in range(1, 100)])
        time.sleep(0.01)
    assert wrote == [1], "the writer's work, not training's"
    assert box.flush(run, 60)
    assert rows_of(store, run) == [("m", float(step), step) for step in range(100)]


def test_a_writer_that_dies_while_it_starts_leaves_it_urgent(tmp_path, monkeypatch):
    monkeypatch.setattr(outbox, "_HAND_OVER_SECONDS", 60.0)
    server = StubServer(str(tmp_path / "artifacts"))
    box = Outbox(server.uri, tmp_path / "spool")
    ready, arrived = [], box._calls.arrived
    box._calls.arrived = lambda calls: (ready.append(box._child.ready), arrived(calls))
    box.metrics("f" * 32, [("m", 0.0, 0, 0)])
    assert box.hand_over()
    os.kill(box._child.pid, signal.SIGKILL)
    wait_until(lambda: len(ready) == 2)
    assert ready == [False, False], "the second has it before it is ready, too"
    assert box.flush(None, 60)
    assert [row["step"] for row in server.rows] == [0]
    box.close()
    server.die()


def test_neither_a_frozen_writer_nor_a_dead_server_holds_training_up(tmp_path):
    server = StubServer(str(tmp_path / "artifacts"))
    box = Outbox(server.uri, tmp_path / "spool")
    box.metrics("f" * 32, [("m", 0.0, 0, 0)])
    assert box.flush(None, 60)
    server.die()
    os.kill(box._child.pid, signal.SIGSTOP)
    # More than the pipe holds: the courier is stuck in it.
    box.metrics("f" * 32, [("m" * 200, 0.0, step, step) for step in range(20_000)])
    started = time.monotonic()
    assert [box.hand_over() for _ in range(50)] == [False] * 50
    assert time.monotonic() - started < 6.0, "one second, not fifty"
    os.kill(box._child.pid, signal.SIGKILL)
    wait_until(lambda: box._deaths == 1 and box._child is not None)
    os.kill(box._child.pid, signal.SIGKILL)
    wait_until(lambda: box._deaths == 2)
    started = time.monotonic()
    assert not box.hand_over()
    assert time.monotonic() - started < 6.0, "the courier has the server to wait for, this thread has not"
    with pytest.warns(RuntimeWarning, match="were not written to MLflow"):
        box.give_up(None)
    box.close()


@pytest.mark.parametrize(("at", "step"), [("file", 20), ("saved", 20), ("logged", 21), ("validated", 20)])
def test_no_step_is_missing_when_a_fit_is_killed_at_a_checkpoint(store, root, tmp_path, at, step):
    folder = tmp_path / "checkpoints"
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("killed_fit.py")), root, folder, at]
    assert subprocess.run(command, check=False, timeout=300).returncode == -signal.SIGKILL
    client = connect(store)
    (run,) = client.search_runs([client.get_experiment_by_name("x").experiment_id])
    fit(root, folder, run.info.run_id, resume=f"step={step}.ckpt")
    rows = rows_of(store, run.info.run_id)
    assert sorted(step for key, _, step in rows if key == "train/loss") == list(range(40))
    assert sorted(step for key, _, step in rows if key == "val/loss") == [9, 19, 29, 39]


def test_other_loggers_and_other_ranks_are_left_alone(root, monkeypatch):
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import CSVLogger
    from lightning_utilities.core.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    tracker = MLflowTracker("x", store=root)
    tracker.hand_over()
    assert tracker._opened is None
    trainer = Trainer(logger=[tracker, CSVLogger(root)], accelerator="cpu")
    DurableCheckpoint().on_save_checkpoint(trainer, None, {})
    assert tracker._opened is None
