import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from stub_server import StubServer
from tracking_helpers import rows_of, wait_until

from ds_lightning.tracking import outboxes
from ds_lightning.tracking.outbox import Outbox
from ds_lightning.tracking.runs import open_run
from ds_lightning.tracking.store import connect


def rows(start, stop, key="m"):
    return [(key, float(step), 1_000 + step, step) for step in range(start, stop)]


def expected(start, stop, key="m"):
    return [(key, float(step), step) for step in range(start, stop)]


def start_writer(box):
    """Send one row through the writer of a stub server, and leave it ready."""
    box.metrics("f" * 32, rows(9_999, 10_000, "warm-up"))
    assert box.flush(None, 20)
    assert box._child.ready


def test_a_killed_writer_loses_nothing_and_writes_nothing_twice(box, store):
    run = open_run(store, "x").run_id
    box.metrics(run, rows(0, 1))
    wait_until(lambda: box._child is not None and box._child.ready)
    first = box._child.pid
    # It leaves the terminal's Ctrl-C and a scheduler's SIGTERM to the training process.
    assert os.getsid(first) != os.getsid(0)
    os.kill(first, signal.SIGINT)
    os.kill(first, signal.SIGTERM)
    box.metrics(run, rows(1, 5_000))
    wait_until(lambda: len(rows_of(store, run)) > 1)
    os.kill(first, signal.SIGKILL)
    assert len(rows_of(store, run)) < 5_000
    box.metrics(run, rows(5_000, 5_500))
    wait_until(lambda: box._child is not None and box._child.pid != first and box._child.ready)
    assert box.flush(run, 20)
    assert rows_of(store, run) == expected(0, 5_500)

    # The second death is the last: from now on this process writes.
    os.kill(box._child.pid, signal.SIGKILL)
    wait_until(lambda: box._deaths == 2)
    with pytest.warns(RuntimeWarning, match="writer process ended twice") as caught:
        box.metrics(run, rows(5_500, 6_000))
    assert box.flush(run, 20)
    assert rows_of(store, run) == expected(0, 6_000)
    assert len(caught) == 1
    assert box._child is None
    assert not store.spool.exists()


def test_a_killed_training_process_keeps_what_it_had_handed_over(store):
    code = """
import os, signal, sys, time
from pathlib import Path
from ds_lightning.tracking.outbox import Outbox
box = Outbox(sys.argv[1], Path(sys.argv[2]))
rows = [("m", float(s), 1000 + s, s) for s in range(6_000)]
box.metrics(sys.argv[3], rows[:1])
while not (box._child and box._child.ready):
    time.sleep(0.01)
box.metrics(sys.argv[3], rows[1:])
while box._calls._sent_below < 7:
    time.sleep(0.001)
with box._delivery:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    run = open_run(store, "x").run_id
    command = [sys.executable, "-c", code, store.uri, str(store.spool), run]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    wait_until(lambda: len(rows_of(store, run)) >= 6_000)
    assert rows_of(store, run) == expected(0, 6_000)


def test_a_short_run_does_not_wait_for_the_writer(box, store):
    run = open_run(store, "x").run_id
    box.metrics(run, [*rows(0, 3), ("nan", float("nan"), 1, 0), ("inf", float("inf"), 1, 0)])
    box.call(run, "params", items=[("lr", "0.1")])
    box.call(run, "tags", items=[("a", "b")])
    started = time.monotonic()
    assert box.flush(run, 10)
    assert box._child is None
    assert time.monotonic() - started < 2.0
    # MLflow's rules: NaN is a flag beside 0, inf the largest float.
    assert rows_of(store, run) == [("inf", sys.float_info.max, 0), *expected(0, 3), ("nan", 0.0, 0)]
    found = connect(store).get_run(run).data
    assert (found.params, found.tags["a"]) == ({"lr": "0.1"}, "b")


def test_a_forked_child_leaves_the_writer_alone(store):
    run = open_run(store, "x").run_id
    box = outboxes.outbox(store.uri, store.spool)
    box.metrics(run, rows(0, 1))
    wait_until(lambda: box._child is not None and box._child.ready)
    pid, pipe = box._child.pid, box._child._process.stdin.fileno()
    box.metrics(run, rows(1, 10))

    identity = os.fstat(pipe).st_ino

    def in_child(queue):
        # The number may have been given to another file since.
        numbers = [int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
        open_pipe = identity in [os.fstat(number).st_ino for number in numbers]
        queue.put((open_pipe, len(outboxes._outboxes)))
        # What a normal exit does.
        outboxes._close_all()

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=in_child, args=(queue,))
    child.start()
    assert queue.get() == (False, 0)
    child.join()
    assert box._child.pid == pid
    assert box.flush(run, 10)
    assert rows_of(store, run) == expected(0, 10)
    outboxes._close_all()


def test_a_refused_call_is_kept_on_disk_and_holds_nobody_up(box, store):
    run, deleted = open_run(store, "x").run_id, open_run(store, "x").run_id
    connect(store).delete_run(deleted)
    box.metrics(deleted, rows(0, 2))
    box.call(deleted, "tags", items=[("a", "b")])
    box.metrics(run, rows(0, 2))
    metrics = pytest.warns(RuntimeWarning, match=f"2 metrics .*refused.*kept in .*{deleted}.jsonl")
    others = pytest.warns(RuntimeWarning, match=f"1 other calls .*refused.*kept in .*{deleted}.calls.jsonl")
    with metrics, others:
        assert box.flush(None, 10)
    assert rows_of(store, run) == expected(0, 2)
    lines = [json.loads(line) for line in (store.spool / f"{deleted}.jsonl").read_text().splitlines()]
    assert lines == [{"key": "m", "value": float(s), "timestamp": 1_000 + s, "step": s} for s in range(2)]
    call = json.loads((store.spool / f"{deleted}.calls.jsonl").read_text())
    assert (call["kind"], call["items"]) == ("tags", [["a", "b"]])


def test_a_server_that_comes_back_gets_everything_once_and_one_that_stays_away_costs_a_file(tmp_path):
    server = StubServer(str(tmp_path / "artifacts"))
    box = Outbox(server.uri, tmp_path / "spool")
    start_writer(box)
    # Back at the writer's next try, whatever this process is busy with: its patience must not end before.
    server.refuse = 1
    box.metrics("f" * 32, rows(0, 600))
    wait_until(lambda: bool(box._notices._messages))
    with pytest.warns(RuntimeWarning, match="does not answer"):
        assert box.flush(None, 30)
    assert [(row["key"], row["value"], row["step"]) for row in server.rows if row["key"] == "m"] == expected(0, 600)
    assert not (tmp_path / "spool").exists()

    # And one that stays away costs a file.
    server.die()
    box.metrics("f" * 32, rows(600, 603))
    assert not box.flush("f" * 32, 0.5)
    with pytest.warns(RuntimeWarning, match=r"3 metrics and 0 other calls were not written .*f{32}\.jsonl"):
        (file,) = box.give_up("f" * 32)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [600, 601, 602]
    # Dead, so that it can't send them after all; and nothing is left to send.
    assert box._child is None
    assert box.flush(None, 0.1)
    box.close()
