import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import stub_server
from filelock import FileLock
from stub_server import StubServer, rows_in
from tracking_helpers import rows_of
from tracking_helpers import wait_until as wait_for

from ds_lightning.cli import main
from ds_lightning.tracking import outboxes, replay
from ds_lightning.tracking.outbox import Outbox
from ds_lightning.tracking.runs import open_run
from ds_lightning.tracking.spool import calls_file, mark_sent, metrics_file, read, refused_file, runs_waiting, spool
from ds_lightning.tracking.store import connect, locate

RUN = "f" * 32


def rows(start, stop, key="m"):
    return [(key, float(step), 1_000 + step, step) for step in range(start, stop)]


def spooled(folder, run, *calls):
    spool(folder, [{"run": run, "id": number, **call} for number, call in enumerate(calls)])


def arrived(found):
    return sorted((row["key"], float(row["value"]), int(row["timestamp"]), int(row["step"])) for row in found)


def wait_until(condition):
    # A new process imports MLflow: seconds, and many of them on a busy machine.
    wait_for(condition, 120.0)


class Server:
    """A server process that can be killed, and comes back on the same port with what it had acknowledged."""

    def __init__(self, folder: Path, delay: float = 0.0) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.file, self.delay = folder / "server.jsonl", delay
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, stub_server.__file__, str(self.port), str(self.file), str(self.delay)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path)
    yield made
    made.kill()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The spool folder of a server's client that works in tmp_path."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mlruns" / "spool"


def test_every_point_arrives_once_though_the_server_is_killed_again_and_again(server, folder):
    """The stub keeps a row as often as it is sent: only an exact list passes."""
    box = Outbox(server.uri, folder)
    logged, outages, chance = [], [0.3, 3.5, 0.1, 3.0], random.Random(0)
    box.metrics(RUN, rows(0, 1))
    wait_until(lambda: rows_in(server.file) != [])
    logged += rows(0, 1)

    def log(seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            new = rows(len(logged), len(logged) + 7)
            logged.extend(new)
            box.metrics(RUN, new)
            time.sleep(0.005)

    on_disk = 0
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for outage in outages:
            log(chance.uniform(0.3, 1.3))
            server.kill()
            log(outage)
            on_disk += metrics_file(folder, RUN).exists()
            server.start()
        log(0.5)
        assert box.flush(RUN, 60)
        assert on_disk >= 1, "an outage of seconds is on disk while it lasts"
        assert arrived(rows_in(server.file)) == logged
        assert [int(row["step"]) for row in rows_in(server.file)] == [row[3] for row in logged], "in order"
        assert runs_waiting(folder) == []
        box.close()


def test_a_lost_answer_is_not_a_second_row(tmp_path, folder):
    server = StubServer(str(tmp_path / "artifacts"))
    box = Outbox(server.uri, folder)
    box.metrics(RUN, rows(0, 1))
    wait_until(lambda: bool(server.rows))
    server.swallow = 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        box.metrics(RUN, rows(1, 2_500))
        assert box.flush(RUN, 60)
        box.close()
    assert server.swallow == 0
    assert arrived(server.rows) == rows(0, 2_500)
    server.die()


def test_after_a_kill_of_both_processes_in_an_outage_all_but_the_last_second_is_replayed(server, tmp_path, folder):
    code = """
import os, sys, time
from pathlib import Path
from ds_lightning.tracking.outbox import Outbox
box = Outbox(sys.argv[1], Path(sys.argv[2]))
for step in range(1_000_000):
    box.metrics("f" * 32, [("m", float(step), int(time.time() * 1000), step)])
    if box._child is not None:
        print(box._child.pid, step, flush=True)
    time.sleep(0.01)
"""
    log = tmp_path / "log"
    command = [sys.executable, "-W", "ignore", "-c", code, server.uri, str(folder)]
    with log.open("w") as out:
        training = subprocess.Popen(command, stdout=out)
    wait_until(lambda: rows_in(server.file) != [])
    server.kill()
    wait_until(lambda: metrics_file(folder, RUN).exists())
    time.sleep(2.0)
    killed_at = time.time() * 1000
    training.kill()
    training.wait()
    writer, _ = map(int, log.read_text().splitlines()[-2].split())
    os.kill(writer, signal.SIGKILL)
    server.start()
    (result,) = replay(server.uri)
    assert result.complete
    assert result.metrics > 0
    found = arrived(rows_in(server.file))
    assert [row[3] for row in found] == list(range(len(found))), "no hole, and nothing twice"
    # One second on the way to the writer, half of one to the disk, and the machine may be busy.
    assert max(row[2] for row in found) > killed_at - 2_500
    assert runs_waiting(folder) == []


def test_a_replay_killed_mid_way_and_repeated_sends_everything_once(tmp_path, folder):
    server = Server(tmp_path, delay=0.15)
    everything = rows(0, 12_300)
    spooled(folder, RUN, {"kind": "metrics", "rows": everything})
    with metrics_file(folder, RUN).open("a") as file:
        file.write('{"key": "torn')
    command = [sys.executable, "-m", "ds_lightning", "tracking", "replay", "--store", server.uri]
    for more in (1, 3_500):
        before = len(rows_in(server.file))
        going = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(lambda least=before + more: len(rows_in(server.file)) >= least)
        # The answer takes 0.15 s: the batch is there, and the replay can't know it.
        going.kill()
        going.wait()
    assert len(rows_in(server.file)) < len(everything)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "1 torn line in" in done.stdout
    assert arrived(rows_in(server.file)) == everything
    assert runs_waiting(folder) == []
    server.kill()


def test_a_batch_that_is_there_already_is_not_sent_again(tmp_path, folder):
    server = StubServer(str(tmp_path / "artifacts"))
    odd = [("nan", float("nan"), 1, 0), ("inf", float("inf"), 1, 0), ("-inf", float("-inf"), 1, 0)]
    spooled(folder, RUN, {"kind": "metrics", "rows": rows(0, 1_500) + odd})
    kept = metrics_file(folder, RUN).read_bytes()
    (first,) = replay(server.uri)
    assert first.metrics == 1_503
    # As if killed before the second mark: the file is there, and the first 1,000 are marked.
    metrics_file(folder, RUN).write_bytes(kept)
    _, offset, _ = read(metrics_file(folder, RUN), 1_000)
    mark_sent(metrics_file(folder, RUN), offset)
    (again,) = replay(server.uri)
    assert (again.metrics, again.complete) == (0, True)
    assert len(server.rows) == 1_503
    server.die()


ROW = {"key": "m", "value": 1.0, "timestamp": 1, "step": 1}
FOREIGN = [[1], 3, None, {"hello": 1}, {"key": "m", "value": 1.0}]
FOREIGN += [{**ROW, "value": "x"}, {**ROW, "key": [1]}, {**ROW, "step": 2**70}, {**ROW, "timestamp": None}]
ODD_CALLS = [[1], {"kind": "explode"}, {"kind": "tags"}, {"kind": "tags", "items": [["a", 1]]}, {"kind": "status"}]


def test_foreign_lines_are_kept_aside_and_the_others_are_sent(tmp_path, folder):
    server = StubServer(str(tmp_path / "artifacts"))
    spooled(folder, RUN, {"kind": "metrics", "rows": rows(0, 3)}, {"kind": "tags", "items": [["a", "b"]]})
    for path, lines in ((metrics_file(folder, RUN), FOREIGN), (calls_file(folder, RUN), ODD_CALLS)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + path.read_text())
    (done,) = replay(server.uri)
    assert (done.metrics, done.calls, done.refused, done.left) == (3, 1, len(FOREIGN + ODD_CALLS), None)
    assert any(notice.startswith(f"{len(FOREIGN)} lines in {RUN}.jsonl are no tracker's") for notice in done.notices)
    kept = [json.loads(line) for line in refused_file(folder, RUN).read_text().splitlines()]
    assert kept == FOREIGN + ODD_CALLS
    assert len(server.rows) == 3
    server.die()


def test_one_replay_at_a_time(tmp_path, folder, capsys):
    server = StubServer(str(tmp_path / "artifacts"))
    spooled(folder, RUN, {"kind": "metrics", "rows": rows(0, 3)})
    with FileLock(folder / f".{RUN}.lock"):
        assert main(["tracking", "replay", "--store", server.uri]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "another process is sending it; 3 metrics and 0 other calls are kept in" in line
    assert server.rows == []
    server.die()
    assert main(["tracking", "replay", "--store", server.uri]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "does not answer" in line
    assert main(["tracking", "replay", "--store", server.uri, "--run", "other"]) == 0
    assert capsys.readouterr().out == "nothing waits to be sent\n"


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_params_tags_and_the_end_are_replayed_and_a_deleted_run_holds_nobody_up(store, root, status, capsys):
    run, deleted = open_run(store, "x").run_id, open_run(store, "x").run_id
    client = connect(store)
    client.log_param(run, "taken", "1")
    client.delete_run(deleted)
    spooled(store.spool, deleted, {"kind": "metrics", "rows": rows(0, 2)})
    spooled(
        store.spool,
        run,
        {"kind": "metrics", "rows": [*rows(0, 6), ("bad@name", 1.0, 1, 0), ("nan", float("nan"), 1, 0)]},
        {"kind": "params", "items": [["lr", "0.1"]]},
        {"kind": "params", "items": [["taken", "2"]]},
        {"kind": "tags", "items": [["a", "b"]]},
        {"kind": "status", "status": status, "time": 1_234_567},
    )
    assert main(["tracking", "replay", "--store", str(root)]) == 1
    said = capsys.readouterr().out
    assert rows_of(store, run) == [*((k, v, s) for k, v, _, s in rows(0, 6)), ("nan", 0.0, 0)]
    found = client.get_run(run)
    assert (found.info.status, found.info.end_time) == (status, 1_234_567)
    assert found.data.params == {"lr": "0.1", "taken": "1"}
    assert found.data.tags["a"] == "b"
    assert f"run {run}: 7 metrics and 3 other calls sent" in said
    assert "refused bad@name" in said
    assert "refused params" in said
    assert f"run {deleted}: 0 metrics and 0 other calls sent; not all: it was deleted" in said
    assert runs_waiting(store.spool) == [deleted]
    assert len((store.spool / f"{run}.refused.jsonl").read_text().splitlines()) == 2

    client.restore_run(deleted)
    assert main(["tracking", "replay", "--store", str(root), "--run", deleted]) == 0
    assert rows_of(store, deleted) == [(k, v, s) for k, v, _, s in rows(0, 2)]
    assert runs_waiting(store.spool) == []


def test_a_run_gone_on_with_gets_its_own_spool_first_and_others_are_named(store):
    mine, other = open_run(store, "x").run_id, open_run(store, "x").run_id
    ended = {"kind": "status", "status": "FINISHED"}
    spooled(store.spool, mine, {"kind": "metrics", "rows": [("system/cpu", 1.0, 1, 8)]}, ended)
    spooled(store.spool, other, {"kind": "metrics", "rows": rows(0, 2)})
    sent = pytest.warns(RuntimeWarning, match=f"run {mine}: 1 metrics and 1 other calls sent")
    others = pytest.warns(RuntimeWarning, match="1 other runs wait in .*tracking replay` sends them")
    with sent, others:
        run = open_run(store, "x", run_id=mine)
    # What was replayed counts for how the run goes on.
    assert run.finished
    assert run.system_step == 9
    assert run.outbox._kept.pending() == []
    assert runs_waiting(store.spool) == [other]


def test_what_found_no_room_is_said(tmp_path, folder):
    server = StubServer(str(tmp_path / "artifacts"))
    spool(folder, [{"kind": "metrics", "run": RUN, "rows": rows(0, 10)}], max_bytes=300)
    (result,) = replay(server.uri)
    assert 0 < result.metrics < 10
    assert result.notices == [f"{10 - result.metrics} lines found no room in its spool files and are lost"]
    assert arrived(server.rows) == rows(0, result.metrics)
    server.die()


def test_a_spool_that_could_not_be_sent_at_the_start_is_sent_before_what_comes_later(tmp_path, folder):
    server = StubServer(str(tmp_path / "artifacts"))
    spooled(folder, RUN, {"kind": "metrics", "rows": rows(0, 5)}, {"kind": "status", "status": "FINISHED"})
    store = locate(server.uri)
    with FileLock(folder / f".{RUN}.lock"), pytest.warns(RuntimeWarning, match="another process is sending it"):
        run = open_run(store, "x", run_id=RUN)
    run.status("RUNNING")
    run.metrics(rows(5, 9))
    assert run.outbox.flush(RUN, 60)
    assert [int(row["step"]) for row in server.rows] == list(range(9))
    assert server.status == "RUNNING"
    outboxes._close_all()
    server.die()
