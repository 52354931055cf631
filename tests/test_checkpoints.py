import errno
import io
import json
import os
import random
import resource
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from ds_lightning.checkpoint_reader import SAFE_GLOBALS, check_complete, read_outline
from ds_lightning.checkpoints import DurableCheckpointIO, newest_checkpoint, previous_of
from ds_lightning.errors import DataError

IO = DurableCheckpointIO()


class Boring(BoringModel):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint of a real fit, at global step 2, as Lightning's own writer leaves it."""
    path = tmp_path_factory.mktemp("real") / "real.ckpt"
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_steps=2, limit_val_batches=0, enable_checkpointing=False, **quiet)
    trainer.fit(Boring())
    trainer.save_checkpoint(path)
    return path.read_bytes()


def at_step(step: int, path: Path) -> Path:
    IO.save_checkpoint({"global_step": step, "state_dict": {"w": torch.full((50,), float(step))}}, path)
    return path


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def record_bytes(data: bytes) -> list[int]:
    """The positions of all bytes inside the records, from the local headers of the zip format."""
    positions: list[int] = []
    for record in zipfile.ZipFile(io.BytesIO(data)).infolist():
        start = record.header_offset
        name, extra = (int.from_bytes(data[start + at : start + at + 2], "little") for at in (26, 28))
        first = start + 30 + name + extra
        positions += range(first, first + record.file_size)
    return positions


def test_what_is_saved_is_loaded(tmp_path: Path, real: bytes) -> None:
    original = torch.load(io.BytesIO(real), weights_only=True)
    path = tmp_path / "new" / "folders" / "a.ckpt"
    IO.save_checkpoint(original, path)
    assert same(IO.load_checkpoint(path), original)
    assert same(torch.load(path, weights_only=True), original), "an ordinary torch file"
    assert [file.name for file in path.parent.iterdir()] == ["a.ckpt"]


def test_every_cut_is_found_and_the_one_before_is_used(tmp_path: Path, real: bytes) -> None:
    before, newer = at_step(1, tmp_path / "before.ckpt"), tmp_path / "newer.ckpt"
    newer.write_bytes(real)
    assert newest_checkpoint(tmp_path) == newer
    positions = random.Random(0).sample(range(len(real)), 60)
    for cut in [*positions, 0, 1, 3, 4, len(real) - 22, len(real) - 1]:
        newer.write_bytes(real[:cut])
        with pytest.raises(DataError, match=r"newer.ckpt is torn or damaged: .*newest_checkpoint"):
            IO.load_checkpoint(newer)
        with pytest.warns(UserWarning, match=r"passed over: checkpoint .*newer.ckpt is torn") as caught:
            assert newest_checkpoint(tmp_path) == before
        assert len(caught) == 1
        assert "\n" not in str(caught[0].message)


def test_every_flipped_byte_of_a_record_is_found(tmp_path: Path, real: bytes) -> None:
    before, newer = at_step(1, tmp_path / "before.ckpt"), tmp_path / "newer.ckpt"
    chance = random.Random(1)
    for position in chance.sample(record_bytes(real), 60):
        broken = bytearray(real)
        broken[position] ^= chance.randrange(1, 256)
        newer.write_bytes(broken)
        with pytest.raises(DataError, match=r"torn or damaged: (.*CRC-32|Bad CRC)"):
            IO.load_checkpoint(newer)
        with pytest.warns(UserWarning, match="passed over"):
            assert newest_checkpoint(tmp_path) == before


def test_a_flipped_byte_anywhere_is_found_or_changes_nothing(tmp_path: Path, real: bytes) -> None:
    original = torch.load(io.BytesIO(real), weights_only=True)
    chance, path, found = random.Random(2), tmp_path / "a.ckpt", 0
    for _ in range(150):
        broken = bytearray(real)
        broken[chance.randrange(len(real))] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        try:
            loaded = IO.load_checkpoint(path)
        except DataError:
            found += 1
        else:
            assert same(loaded, original)
    assert 0 < found < 150


def test_newest_is_by_global_step_then_time(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nothing") is None
    nine, ten = at_step(9, tmp_path / "a.ckpt"), at_step(10, tmp_path / "b.ckpt")
    os.utime(ten, (1, 1))
    assert newest_checkpoint(tmp_path) == ten
    again = at_step(10, tmp_path / "0.ckpt")
    assert newest_checkpoint(tmp_path) == again, "the later of two at one step"
    os.utime(again, (0, 0))
    assert newest_checkpoint(str(tmp_path)) == ten
    assert nine.exists()


def test_each_file_is_read_through_at_most_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(4):
        at_step(step, tmp_path / f"{step}.ckpt")
    os.link(tmp_path / "3.ckpt", tmp_path / "last.ckpt")
    (tmp_path / "last2.ckpt").symlink_to("3.ckpt")
    read: list[str] = []
    whole = zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: read.append(self.filename) or whole(self))
    assert newest_checkpoint(tmp_path) == tmp_path / "3.ckpt"
    assert [Path(name).name for name in read] == ["3.ckpt"]


def test_foreign_files_are_passed_over(tmp_path: Path) -> None:
    good = at_step(1, tmp_path / "good.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "gone.ckpt").symlink_to("nowhere")
    (tmp_path / "folder.ckpt").mkdir()
    torch.save({"w": torch.zeros(2)}, tmp_path / "tensors.ckpt")
    torch.save({"global_step": 9}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as archive:
        archive.writestr("a.txt", "x")
    with pytest.warns(UserWarning, match="passed over") as caught:
        assert newest_checkpoint(tmp_path) == good
    assert len(caught) == 6
    for name, reason in {
        "text": "it starts with b'hell'; expected a file written by torch.save",
        "other": "'data.pkl' is not in it",
        "folder": "is a folder, as sharded strategies write it",
        "old": "torch 1.6 or later",
    }.items():
        with pytest.raises(DataError, match=reason):
            IO.load_checkpoint(tmp_path / f"{name}.ckpt")
    with pytest.raises(FileNotFoundError, match=r"missing\.ckpt not found"):
        IO.load_checkpoint(tmp_path / "missing.ckpt")


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickled_classes_are_refused_and_named(tmp_path: Path, protocol: int) -> None:
    marker, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    torch.save({"global_step": 1, "x": Evil(marker)}, path, pickle_protocol=protocol)
    with pytest.raises(DataError, match=r"refused without executing it: it holds pickled posix.system;.*weights_only="):
        IO.load_checkpoint(path)
    assert read_outline(path).refused == ("posix.system",)
    assert newest_checkpoint(tmp_path) == path
    assert not marker.exists()
    torch.save({"global_step": 1, "where": Path("x")}, path)
    with pytest.raises(DataError, match=r"pathlib.*Path"):
        IO.load_checkpoint(path)
    assert IO.load_checkpoint(path, weights_only=False)["where"] == Path("x"), "said in so many words"


def test_the_safe_list_is_inside_torchs_own(tmp_path: Path) -> None:
    path = tmp_path / "all.ckpt"
    torch.save([], path)
    names = [name.rpartition(".") for name in [*sorted(SAFE_GLOBALS), "os.system"]]
    words = b"".join(b"c" + f"{module}\n{name}\n".encode() + b"a" for module, _, name in names)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, b"\x80\x02]" + words + b"." if name.endswith("data.pkl") else data)
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == ["os.system"]
    assert read_outline(path).refused == ("os.system",)


def test_the_order_of_the_system_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = at_step(1, tmp_path / "last.ckpt"), []
    sync, replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}"))
        size = 0 if name.is_dir() else name.stat().st_size
        calls.append(("fsync", "folder" if name == tmp_path else name.suffix, size))
        sync(handle)

    def rename(source: Path, target: Path) -> None:
        calls.append(("replace", Path(source).suffix, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    DurableCheckpointIO(keep_previous=True).save_checkpoint({"global_step": 2}, path)
    assert calls == [
        ("fsync", ".tmp", path.stat().st_size),
        ("replace", ".tmp", "last-previous.ckpt"),
        ("replace", ".tmp", "last.ckpt"),
        ("fsync", "folder", 0),
    ]
    calls.clear()
    IO.save_checkpoint({"global_step": 2}, tmp_path / "new" / "a.ckpt")
    assert [call[:2] for call in calls] == [
        ("fsync", "folder"),  # the new folder's name in its parent
        ("fsync", ".tmp"),
        ("replace", ".tmp"),
        ("fsync", ""),
    ]


def test_the_overwritten_file_stays_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeping, path = DurableCheckpointIO(keep_previous=True), tmp_path / "last.ckpt"
    for step in range(3):
        keeping.save_checkpoint({"global_step": step}, path)
    # As a kill between the two renames leaves it: both names are one file.
    previous_of(path).unlink()
    os.link(path, previous_of(path))
    keeping.save_checkpoint({"global_step": 3}, path)
    names = ["last-previous.ckpt", "last.ckpt"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert [IO.load_checkpoint(tmp_path / name)["global_step"] for name in names] == [2, 3]

    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    keeping.save_checkpoint({"global_step": 4}, path)
    assert [IO.load_checkpoint(tmp_path / name)["global_step"] for name in names] == [3, 4]
    keeping.remove_checkpoint(path)
    keeping.remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_call_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = at_step(1, tmp_path / "last.ckpt")
    old = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        at_step(2, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("limit", [100, 5_000, 300_000])
def test_a_write_that_the_kernel_refuses_leaves_the_old_file(tmp_path: Path, limit: int) -> None:
    path = at_step(1, tmp_path / "last.ckpt")
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError) as caught:
            IO.save_checkpoint({"global_step": 2, "w": torch.zeros(200_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_a_dead_process_of_this_machine_left_is_removed(tmp_path: Path) -> None:
    IO.save_checkpoint({}, tmp_path / "a.ckpt")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    from ds_lightning.checkpoints import _HOST

    stale = [f".durable.{_HOST}.{pid}.0123abcd.tmp" for pid in (dead.pid, os.getpid())]
    kept = [f".durable.{_HOST}.{os.getppid()}.0123abcd.tmp", f".durable.elsewhere.{dead.pid}.0123abcd.tmp"]
    kept += [".durable.mine.tmp", "notes.tmp"]
    for name in stale + kept:
        (tmp_path / name).touch()
    IO.save_checkpoint({}, tmp_path / "a.ckpt")
    assert {file.name for file in tmp_path.iterdir()} == {"a.ckpt", *kept}


def test_crc_sums_are_written_even_when_switched_off(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = at_step(1, tmp_path / "a.ckpt")
        assert torch.serialization.get_crc32_options() is False, "the user's setting is back"
    finally:
        torch.serialization.set_crc32_options(True)
    check_complete(path)


def test_urls_go_to_lightnings_writer(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/a.ckpt"
    IO.save_checkpoint({"global_step": 7}, url)
    assert IO.load_checkpoint(url)["global_step"] == 7
    IO.remove_checkpoint(url)
    with pytest.raises(FileNotFoundError):
        IO.load_checkpoint(url)
    with pytest.raises(TypeError, match="storage_options"):
        IO.save_checkpoint({}, tmp_path / "a.ckpt", storage_options={})


KILLED = """
import json, os, random, signal, sys, time, torch
from ds_lightning.checkpoints import DurableCheckpointIO
folder, chance, step = sys.argv[1], random.Random(int(sys.argv[2])), 0
path, io = folder + "/last.ckpt", DurableCheckpointIO(keep_previous=True)
for _ in range(8):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            step += 1
            io.save_checkpoint({"global_step": step, "w": torch.full((100_000,), step)}, path)
            os.write(tell, step.to_bytes(8, "little"))
    os.close(tell)
    acknowledged = os.read(told, 8)
    time.sleep(chance.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    while more := os.read(told, 8):
        acknowledged = more
    os.close(told)
    # Plain torch, and every value of the tensor: no word of ours about being whole.
    loaded = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".ckpt"):
            state = torch.load(f"{folder}/{name}", weights_only=True)
            assert bool((state["w"] == state["global_step"]).all()), name
            loaded[name] = state["global_step"]
    temporary = sum(name.endswith(".tmp") for name in os.listdir(folder))
    acknowledged = int.from_bytes(acknowledged, "little")
    print(json.dumps({"acknowledged": acknowledged, "loaded": loaded, "temporary": temporary}), flush=True)
    step = loaded["last.ckpt"]
io.save_checkpoint({"global_step": step + 1}, path)
"""


def test_eight_kills_never_leave_a_torn_file(tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED, str(tmp_path), "0"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == 8
    for kill in kills:
        # What was said to be saved is there; at most the save under way is there as well.
        assert kill["acknowledged"] <= kill["loaded"]["last.ckpt"] <= kill["acknowledged"] + 1
        assert kill["temporary"] <= 2
    steps = [kill["loaded"]["last.ckpt"] for kill in kills]
    assert steps == sorted(set(steps))
    assert sorted(os.listdir(tmp_path)) == ["last-previous.ckpt", "last.ckpt"], "the dead left nothing"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_checkpoint(tmp_path) == tmp_path / "last.ckpt"
