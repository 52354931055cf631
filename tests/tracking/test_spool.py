import json
import math
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.errors import DataError
from ds_lightning.tracking.spool import (
    count_waiting,
    mark_sent,
    metrics_file,
    read,
    remove_if_sent,
    runs_waiting,
    spool,
    take_dropped,
)

ROW = st.tuples(
    st.text(min_size=1, max_size=8),
    st.floats() | st.integers(-5, 5).map(float),
    st.integers(0, 2**53),
    st.integers(0, 2**53),
)


def metrics(rows, run="r"):
    return {"kind": "metrics", "run": run, "rows": rows, "id": 0}


def same(found, rows):
    assert len(found) == len(rows)
    for line, (key, value, timestamp, step) in zip(found, rows, strict=True):
        assert (line["key"], line["timestamp"], line["step"]) == (key, timestamp, step)
        assert line["value"] == value or (math.isnan(value) and math.isnan(line["value"]))


@settings(deadline=None, max_examples=40)
@given(first=st.lists(ROW, max_size=5), second=st.lists(ROW, min_size=1, max_size=5), cut=st.integers(0, 30))
def test_what_is_written_is_read_also_behind_a_torn_line(first, second, cut):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = metrics_file(folder, "r")
        torn = b'{"key": "cut", "value": 1.0, '[:cut]
        spool(folder, [metrics(first)] if first else [])
        with path.open("ab") as file:
            file.write(torn)
        # A torn last line, before and after the next writer came.
        found, _, lost = read(path, 1000)
        same(found, first)
        assert lost == bool(torn)
        spool(folder, [metrics(second)])
        found, offset, lost = read(path, 1000)
        same(found, first + second)
        assert lost == bool(torn)
        assert offset == path.stat().st_size


def test_reading_goes_on_behind_the_mark_and_the_file_goes_when_all_is_sent(tmp_path):
    rows = [("m", float(step), step, step) for step in range(5)]
    spool(tmp_path, [metrics(rows), {"kind": "status", "run": "r", "status": "FINISHED"}])
    path = metrics_file(tmp_path, "r")
    found, offset, _ = read(path, 3)
    same(found, rows[:3])
    mark_sent(path, offset)
    found, offset, _ = read(path, 3)
    same(found, rows[3:])
    assert count_waiting(tmp_path, "r") == (2, 1)
    mark_sent(path, offset)
    assert not remove_if_sent(tmp_path, "r"), "the status waits"
    calls = tmp_path / "r.calls.jsonl"
    mark_sent(calls, calls.stat().st_size)
    assert runs_waiting(tmp_path) == ["r"]
    assert remove_if_sent(tmp_path, "r")
    assert runs_waiting(tmp_path) == []
    assert not list(tmp_path.glob("r.*"))


def test_a_mark_that_outlived_its_file_hides_nothing(tmp_path):
    spool(tmp_path, [metrics([("m", 1.0, 1, 1)])])
    path = metrics_file(tmp_path, "r")
    mark_sent(path, path.stat().st_size)
    path.unlink()  # killed between the two removals
    spool(tmp_path, [metrics([("m", 2.0, 2, 2)])])
    found, _, _ = read(path, 10)
    same(found, [("m", 2.0, 2, 2)])


def test_a_full_spool_keeps_the_oldest_counts_the_rest_and_takes_the_status(tmp_path):
    rows = [("m", float(step), 10 + step, step % 10) for step in range(10)]
    line = len(json.dumps({"key": "m", "value": 1.0, "timestamp": 11, "step": 1})) + 1
    spool(tmp_path, [metrics(rows[:2])], max_bytes=4 * line)
    spool(tmp_path, [metrics(rows[2:6])], max_bytes=4 * line)
    spool(tmp_path, [metrics(rows[6:])], max_bytes=4 * line)
    found, _, _ = read(metrics_file(tmp_path, "r"), 100)
    same(found, rows[:4])
    calls = [{"kind": "artifact", "run": "r", "data": "x" * 500}, {"kind": "status", "run": "r", "status": "FAILED"}]
    spool(tmp_path, calls, max_bytes=100)
    found, _, _ = read(tmp_path / "r.calls.jsonl", 100)
    assert found == calls[1:]
    assert take_dropped(tmp_path, "r", forget=False) == 6 + 1
    assert take_dropped(tmp_path, "r", forget=True) == 7
    assert take_dropped(tmp_path, "r", forget=True) == 0


def test_a_full_disk_leaves_the_files_as_they_were(tmp_path, monkeypatch):
    spool(tmp_path, [metrics([("m", 1.0, 1, 1)])])
    before = metrics_file(tmp_path, "r").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        spool(tmp_path, [metrics([("m", 2.0, 2, 2)])])
    assert metrics_file(tmp_path, "r").read_bytes() == before


@pytest.mark.parametrize("mark", [b"many", b"-5", b"", b"999999", b"\xff"])
def test_a_damaged_mark_is_named_and_nothing_is_guessed_or_removed(tmp_path, mark):
    spool(tmp_path, [metrics([("m", 1.0, 1, 1)])])
    path = metrics_file(tmp_path, "r")
    path.with_name(path.name + ".sent").write_bytes(mark)
    for use in (lambda: read(path, 5), lambda: remove_if_sent(tmp_path, "r")):
        with pytest.raises(DataError, match=r"r\.jsonl\.sent holds .*; expected the number of bytes"):
            use()
    assert count_waiting(tmp_path, "r") == (1, 0)
    assert path.exists()
