import os
import subprocess
import sys
import time

import pytest

from ds_lightning.tracking.orphans import at_work, wait_for_orphans

WRITER = """
import sys
from pathlib import Path
from ds_lightning.tracking.orphans import at_work
with at_work(Path(sys.argv[1]), int(sys.argv[2])):
    print("at work", flush=True)
    sys.stdin.read()
"""


def a_dead_process():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@pytest.fixture
def writer(tmp_path):
    """Start a writer of a training process; what it returns ends it when its stdin is closed."""
    started = []

    def start(training):
        command = [sys.executable, "-c", WRITER, str(tmp_path / "spool"), str(training)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"at work\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_an_orphan_is_waited_for_until_it_leaves_or_is_killed(writer, tmp_path):
    spool = tmp_path / "spool"
    for end in (lambda process: process.stdin.close(), lambda process: process.kill()):
        process = writer(a_dead_process())
        with pytest.warns(RuntimeWarning, match=f"process {process.pid}, .* may be logged twice"):
            wait_for_orphans(spool, 0.1)
        end(process)
        wait_for_orphans(spool, 60.0)
        assert process.wait(60) is not None
        assert list((tmp_path / "writers").iterdir()) == []


def test_a_training_process_that_lives_is_not_waited_for_and_one_not_yet_reaped_is(writer, tmp_path):
    process = writer(os.getpid())
    started = time.monotonic()
    wait_for_orphans(tmp_path / "spool", 60.0)
    assert time.monotonic() - started < 30.0
    assert process.poll() is None
    zombie = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert zombie.stdout.read() == b""
    writer(zombie.pid)
    with pytest.warns(RuntimeWarning, match="still at work"):
        wait_for_orphans(tmp_path / "spool", 1.0)
    zombie.wait()
    zombie.stdout.close()


def test_a_folder_that_cannot_be_written_and_foreign_files_hold_nobody_up(tmp_path):
    (tmp_path / "writers").mkdir()
    (tmp_path / "writers" / "not-ours.lock").touch()
    wait_for_orphans(tmp_path / "spool", 0.0)
    (tmp_path / "file").touch()
    done = []
    with at_work(tmp_path / "file" / "spool", os.getpid()):
        done.append(True)
    assert done == [True]
