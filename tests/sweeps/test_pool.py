"""The parent's side, against workers that speak the protocol and do nothing else, so that they start at once."""

import sys
import time
from dataclasses import replace

import pytest

from ds_lightning.errors import ConfigError
from ds_lightning.sweeps import pool
from ds_lightning.sweeps.spec import Objective
from ds_lightning.sweeps.task import TrialOutcome, TrialTask

STUB = """
import json, os, signal, sys, time

def send(message):
    print(json.dumps(message), flush=True)

json.loads(input())
send({"ready": True})
while "task" in (message := json.loads(input())):
    what = message["task"]["params"]["what"]
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "half":
        print('{"outcome": ', end="", flush=True)
        os._exit(3)
    if what == "deaf":
        send({"step": 0, "value": 0.0})
        time.sleep(600)
    for step in range(3):
        send({"step": step, "value": 0.5})
        if json.loads(input())["prune"]:
            send({"outcome": {"state": "PRUNED", "values": [0.5], "run_id": "r"}})
            break
    else:
        send({"outcome": {"state": "COMPLETE", "values": [0.5], "run_id": "r"}})
"""
TASK = TrialTask(0, "s", (), None, {}, {}, (Objective("m", "minimize"),), "e", "store", "parent")


class Book:
    """A ledger that gives out a list and keeps what it hears."""

    stop_reason = None

    def __init__(self, whats, prune=lambda number: False):
        self.whats, self.prune = whats, prune
        self.given = 0
        self.ends = {}
        self.steps = {}

    @property
    def wants_more(self):
        return self.given < len(self.whats)

    def open_trial(self):
        if not self.wants_more:
            return None
        self.given += 1
        return replace(TASK, number=self.given - 1, params={"what": self.whats[self.given - 1]})

    def report(self, number, step, value):
        self.steps.setdefault(number, []).append(step)
        return self.prune(number)

    def close_trial(self, number, outcome):
        assert number not in self.ends
        self.ends[number] = outcome

    def abandon(self, number, reason, interrupted=False):
        self.close_trial(number, TrialOutcome("FAIL", error=reason, interrupted=interrupted))


@pytest.fixture(autouse=True)
def stub(tmp_path, monkeypatch):
    path = tmp_path / "stub.py"
    path.write_text(STUB)
    monkeypatch.setattr(pool, "_COMMAND", [sys.executable, "-S", str(path)])


def test_the_task_travels_whole():
    task = replace(TASK, configs=("a.yaml",), params={"x": [1, {"y": None}]})
    assert TrialTask.from_dict(task.to_dict()) == task


def test_exactly_what_is_given_out_is_run(tmp_path):
    book = Book(["ok"] * 20, prune=lambda number: number % 2 == 1)
    pool.WorkerPool(3, tmp_path).run(book)
    assert {number: end.state for number, end in book.ends.items()} == {
        number: "PRUNED" if number % 2 else "COMPLETE" for number in range(20)
    }
    assert {number: len(steps) for number, steps in book.steps.items()} == {
        number: 1 if number % 2 else 3 for number in range(20)
    }


@pytest.mark.parametrize(("what", "how"), [("die", "killed by SIGKILL"), ("half", "exit code 3")])
def test_a_worker_that_dies_costs_its_trial_alone(tmp_path, what, how):
    book = Book(["ok", what, *["ok"] * 6])
    pool.WorkerPool(2, tmp_path).run(book)
    assert [book.ends[number].state for number in range(8)] == ["COMPLETE", "FAIL", *["COMPLETE"] * 6]
    assert how in book.ends[1].error
    assert "1 left" in book.ends[1].error


def test_when_all_workers_have_died_the_sweep_says_so(tmp_path):
    book = Book(["die"] * 3)
    with pytest.raises(ConfigError, match="all worker processes ended"):
        pool.WorkerPool(2, tmp_path).run(book)
    assert [end.state for end in book.ends.values()] == ["FAIL", "FAIL"]


def test_a_worker_that_can_not_start_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_COMMAND", [sys.executable, "-c", "raise SystemExit('no such thing')"])
    with pytest.warns(RuntimeWarning, match="exit code 1"), pytest.raises(ConfigError, match="all worker processes"):
        pool.WorkerPool(1, tmp_path).run(Book(["ok"]))
    assert "no such thing" in (tmp_path / "worker-0.log").read_text()


def test_a_worker_that_does_not_hear_is_killed_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_STOP_SECONDS", 0.3)
    book = Book(["deaf", "deaf"])

    def interrupt(number, step, value):
        raise KeyboardInterrupt

    book.report = interrupt
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pool.WorkerPool(2, tmp_path).run(book)
    assert time.monotonic() - started < 10
    assert all(end.interrupted for end in book.ends.values())
    assert book.ends


def test_a_worker_is_replaced_when_its_trial_is_tried_again(tmp_path):
    book = Book(["die", "ok", "die", "ok"])
    abandon = book.abandon

    def again(number, reason, interrupted=False):
        abandon(number, reason, interrupted)
        return True

    book.abandon = again
    pool.WorkerPool(1, tmp_path).run(book)
    assert [book.ends[number].state for number in range(4)] == ["FAIL", "COMPLETE", "FAIL", "COMPLETE"]
