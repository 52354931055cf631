import json
import math
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from killed_fit import Kill, fit
from stub_server import StubServer
from tracking_helpers import rows_of, wait_until

from ds_lightning.tracking import outboxes, replay
from ds_lightning.tracking.present import Present
from ds_lightning.tracking.runs import open_run
from ds_lightning.tracking.spool import spool
from ds_lightning.tracking.store import connect, locate

RUN = "f" * 32


def rows(start, stop, time=1_000, key="m"):
    return [(key, float(step), time + step, step) for step in range(start, stop)]


def points(found):
    return Counter((row["key"], float(row["value"]), int(row["step"])) for row in found)


class History:
    """A server's history of metrics, and a count of who asked for it."""

    def __init__(self, found):
        self.found, self.asked = found, []

    def get_metric_history(self, run, key):
        self.asked.append((run, key))
        return [SimpleNamespace(key=k, value=v, timestamp=t, step=s) for k, v, t, s in self.found if k == key]


def test_same_step_and_value_are_left_out_whatever_the_time_and_each_history_is_read_once():
    odd = [("nan", math.nan, 1, 5), ("inf", sys.float_info.max, 1, 5), ("float", 0.1, 1, 5)]
    history = History(rows(0, 10) + odd)
    present = Present(history)

    def left(*new, resumed="a"):
        return present.without({"kind": "metrics", "run": RUN, "rows": list(new), "resumed": resumed})["rows"]

    # Another value, another step, another metric: those are new.
    new = [("m", 7.5, 2, 7), ("m", 8.0, 2, 11), ("n", 8.0, 2, 8), ("float", 0.1 + 2**-56, 2, 5)]
    assert left(*rows(6, 10, 9_000), *new) == new
    assert left(("nan", math.nan, 2, 5), ("inf", math.inf, 2, 5), ("float", 0.1, 2, 5)) == []
    assert left(*rows(8, 12, 9_000)) == rows(10, 12, 9_000)
    assert sorted(history.asked) == [(RUN, key) for key in ("float", "inf", "m", "n", "nan")]
    # What lies before the first step is not kept, ...
    assert all(step >= 5 for _, found in present._points.values() for step, _ in found)
    # ... and is read, once, by who needs it all the same.
    assert left(*rows(3, 5, 9_000)) == left(*rows(1, 3, 9_000)) == []
    assert len(history.asked) == 6
    # Reopened again: what came meanwhile counts.
    history.found += rows(10, 12)
    assert left(*rows(10, 13, 9_000), resumed="b") == rows(12, 13, 9_000)


def test_calls_of_a_run_that_was_not_reopened_cost_nothing():
    history = History(rows(0, 10))
    for call in ({"kind": "metrics", "run": RUN, "rows": rows(0, 10)}, {"kind": "tags", "run": RUN, "items": []}):
        assert Present(history).without(call) is call
    assert history.asked == []


@pytest.mark.parametrize("by", ["this process", "the writer"])
def test_a_reopened_run_gets_what_is_new_and_what_differs(store, by):
    run = open_run(store, "x")
    run.metrics(rows(0, 100))
    assert run.outbox.flush(None, 30)
    again = open_run(store, "x", run_id=run.run_id)
    if by == "the writer":
        again.metrics(rows(0, 1, key="warm-up"))
        wait_until(lambda: again.outbox._child is not None and again.outbox._child.ready)
    differs = [("m", -1.0, 9_000, 95)]
    again.metrics(rows(90, 95, 9_000) + differs + rows(96, 103, 9_000))
    assert again.outbox.flush(None, 30)
    found = [row for row in rows_of(store, run.run_id) if row[0] == "m"]
    assert (by == "the writer") == (again.outbox._child is not None)
    outboxes._close_all()
    assert found == [("m", float(s), s) for s in range(96)] + [("m", -1.0, 95)] + [
        ("m", float(s), s) for s in range(96, 103)
    ]


def test_an_outage_at_two_reopenings_leaves_no_doubles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "server.jsonl"
    # A killed process: half of what it logged is at the server, half is on disk.
    there = [dict(zip(("key", "value", "timestamp", "step"), row, strict=True)) for row in rows(0, 10)]
    kept.write_text(json.dumps(there) + "\n")
    server = StubServer(str(tmp_path / "artifacts"), file=kept)
    place = locate(server.uri)
    spool(place.spool, [{"kind": "metrics", "run": RUN, "id": 0, "rows": rows(10, 20)}])
    for time, start, stop in ((5_000, 8, 25), (9_000, 12, 30)):
        # Its spool can't be sent now, the server goes right after, and this process is killed in the outage.
        with FileLock(place.spool / f".{RUN}.lock"), pytest.warns(RuntimeWarning, match="another process"):
            run = open_run(place, "x", run_id=RUN)
        server.die()
        run.metrics([*rows(start, stop, time), ("m", -float(time), time, 15)])
        assert not run.outbox.flush(RUN, 0.3)
        with pytest.warns(RuntimeWarning, match="were not written to MLflow"):
            run.outbox.give_up(RUN)
        outboxes._close_all()
        server = StubServer(str(tmp_path / "artifacts"), port=int(server.uri.rpartition(":")[2]), file=kept)
    assert len(server.rows) == 10
    (result,) = replay(server.uri)
    assert result.complete
    differ = {("m", -5_000.0, 15): 1, ("m", -9_000.0, 15): 1}
    assert points(server.rows) == Counter({("m", float(step), step): 1 for step in range(30)} | differ)
    server.die()


def test_a_fit_that_is_killed_and_goes_on_logs_each_step_once(store, root, tmp_path):
    """Checkpoint after 10 of 40 steps, SIGKILL after 27, and nothing random: the values come out the same."""
    script = Path(__file__).with_name("killed_fit.py")
    command = [sys.executable, "-W", "ignore", str(script), str(root), str(tmp_path / "checkpoints")]
    assert subprocess.run(command, check=False, timeout=300).returncode == -signal.SIGKILL
    client = connect(store)
    (run,) = client.search_runs([client.get_experiment_by_name("x").experiment_id])
    run_id = run.info.run_id
    # The kill lost nothing that the writer had, and the orphan may still be at it: that is ours to wait for.
    fit(root, tmp_path / "checkpoints", run_id, callbacks=[Kill(tmp_path / "checkpoints" / "logged", 0)])
    found = Counter((key, step) for key, _, step in rows_of(store, run_id))
    # Lightning itself logs the epoch twice where there is a validation: with its metrics and with the step's.
    assert {point: count for point, count in found.items() if count != 1} == {("epoch", s): 2 for s in (9, 19, 29, 39)}
    for key in ("train/loss", "train/nan"):
        assert sorted(step for name, step in found if name == key) == list(range(40))
    assert sorted(step for name, step in found if name == "val/loss") == [9, 19, 29, 39]
    machine = sorted(step for name, step in found if name == "system/cpu_utilization_percentage")
    assert machine == list(range(len(machine)))
    assert len(machine) >= 2, "one of each process"
    ended = client.get_run(run_id)
    assert (ended.info.status, ended.data.tags["ds_lightning.resumed_at_step"]) == ("FINISHED", "10")
    # The point of it: those steps were trained and logged by both.
    log = (tmp_path / "checkpoints" / "logged").read_text().split()
    assert {"10", "11", "12"} <= {step for step, count in Counter(log).items() if count == 2}
