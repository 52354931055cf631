"""Bad stores and spools of the tracker, and bad studies of sweeps."""

import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_lightning.errors import ConfigError
from ds_lightning.tracking.replaying import replay
from ds_lightning.tracking.spool import calls_file, metrics_file, runs_waiting

from .case import Case, Place

_ROW = {"key": "train/loss", "value": 0.5, "timestamp": 1700000000000, "step": 3}
_TAGS = {"kind": "tags", "items": [["a", "b"]]}


def _lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _spooled(what: str, metrics: bytes, calls: bytes = b"", mark: bytes | None = None, run: str = "") -> Case:
    """A spool with what no tracker wrote: said in one line for the run, and kept or counted, never a traceback."""

    def make(place: Place, folder: Path) -> Any:
        store = folder / "store"
        shutil.copytree(place.folder / "mlruns", store)
        name = run or place.run_ids[0]
        (store / "spool").mkdir(exist_ok=True)
        if metrics:
            metrics_file(store / "spool", name).write_bytes(metrics)
        if calls:
            calls_file(store / "spool", name).write_bytes(calls)
        if mark is not None:
            path = metrics_file(store / "spool", name)
            path.with_name(path.name + ".sent").write_bytes(mark)

        def call() -> str | None:
            results = replay(store)
            kept = bool(runs_waiting(store / "spool")) or bool(list((store / "spool").glob("*.refused.jsonl")))
            said = [line for result in results for line in [result.left, *result.notices] if line]
            if not said or any("\n" in line for line in said):
                return f"said {said}"
            if any(word in line for line in said for word in ("KeyError", "TypeError", "AttributeError", "Unicode")):
                return f"speaks of Python's inside: {said}"
            # Sent what was whole, or kept what was not.
            return None if kept or any("left out" in line for line in said) else f"dropped in silence: {said}"

        return call

    return Case(f"stores/spool {what}", "", make, fine=True)


def _harmless(what: str, fill: Callable[[Path], Any]) -> Case:
    """A spool folder without anything of ours: nothing is sent, nothing is removed."""

    def make(place: Place, folder: Path) -> Any:
        store = folder / "store"
        shutil.copytree(place.folder / "mlruns", store)
        spool = store / "spool"
        shutil.rmtree(spool, ignore_errors=True)
        fill(spool)
        before = sorted(path.name for path in spool.glob("*")) if spool.is_dir() else []

        def call() -> str | None:
            results = replay(store)
            after = sorted(path.name for path in spool.glob("*")) if spool.is_dir() else []
            return None if not results and before == after else f"{results}, {before} -> {after}"

        return call

    return Case(f"stores/spool {what}", "", make, fine=True)


def _foreign(spool: Path) -> None:
    spool.mkdir()
    (spool / "notes.txt").write_text("hello")
    (spool / "data.json").write_text("{}")


def _store(what: str, words: list[str], change: Callable[[Path], Any]) -> Case:
    """A store in a state that can't be used, given to a command as STORE."""

    def make(place: Place, folder: Path) -> list[str]:
        store = folder / "store"
        shutil.copytree(place.folder / "mlruns", store)
        change(store)
        return [word.replace("STORE", str(store)) for word in words]

    return Case(f"stores/{words[0]} {what}", "store", make)


def _overwrite(share: float, length: int = 4096) -> Callable[[Path], None]:
    def change(store: Path) -> None:
        content = bytearray((store / "mlflow.db").read_bytes())
        at = int(share * len(content)) // 4096 * 4096
        content[at : at + length] = b"\xa5" * length
        (store / "mlflow.db").write_bytes(content)

    return change


def _instead(content: bytes) -> Callable[[Path], Any]:
    return lambda store: (store / "mlflow.db").write_bytes(content)


def _a_file(store: Path) -> None:
    shutil.rmtree(store)
    store.write_text("not a folder")


def _database_folder(store: Path) -> None:
    (store / "mlflow.db").unlink()
    (store / "mlflow.db").mkdir()


def _foreign_database(store: Path) -> None:
    (store / "mlflow.db").unlink()
    with sqlite3.connect(store / "mlflow.db") as database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        database.execute("INSERT INTO alembic_version VALUES ('from_the_future')")


def _cut(share: float) -> Callable[[Path], None]:
    def change(store: Path) -> None:
        content = (store / "mlflow.db").read_bytes()
        (store / "mlflow.db").write_bytes(content[: int(share * len(content))])

    return change


def _journal(what: str, damage: Callable[[bytes], bytes]) -> Case:
    """A study's journal that is damaged, and gone on with."""

    def make(place: Place, folder: Path) -> list[str]:
        assert place.journal is not None
        good = place.journal.read_bytes().replace(place.journal.stem.encode(), folder.name.encode())
        place.journal.with_stem(folder.name).write_bytes(damage(good))
        return ["sweep", "sweep.yaml", f"--study={folder.name}"]

    return Case(f"stores/study {what}", "study", make)


def _unreachable(_: Place, folder: Path) -> Any:
    def call() -> None:
        left = [result.left for result in replay("http://127.0.0.1:9")]
        raise ConfigError(left[0] or "")

    spool = Path("mlruns/spool").resolve()
    spool.mkdir(exist_ok=True)
    metrics_file(spool, "unreachable").write_bytes(_lines(_ROW))
    return call


_FIT = ["fit", "--config=small.yaml", "--trainer.logger.store=STORE"]
_SWEEP = ["sweep", "sweep.yaml", "--store=STORE"]
_REPLAY = ["tracking", "replay", "--store=STORE"]
_RESUME = ["fit", "--config=small.yaml", "--resume", "--trainer.logger.store=STORE"]


def store_cases(chance: random.Random) -> list[Case]:
    """Return the bad stores, spools and studies."""
    row, tags = _lines(_ROW), _lines(_TAGS)
    cases = [
        _spooled(f"metrics cut at {at}", row + row[:at]) for at in sorted(chance.sample(range(2, len(row) - 2), 4))
    ]
    cases += [_spooled(f"calls cut at {at}", b"", tags + tags[:at]) for at in (3, 20)]
    cases += [
        _spooled("binary", bytes(range(256)) * 4),
        _spooled("not UTF-8", b'{"key": "\xff\xfe"}\n'),
        _spooled("a list", _lines([1, 2])),
        _spooled("a number", _lines(3)),
        _spooled("a foreign object", _lines({"hello": "world"})),
        _spooled("a missing field", _lines({**_ROW, "step": 1}, {"key": "x", "value": 1.0})),
        _spooled("value is text", _lines({**_ROW, "value": "much"})),
        _spooled("step is text", _lines({**_ROW, "step": "x"})),
        _spooled("step is null", _lines({**_ROW, "step": None})),
        _spooled("key is a list", _lines({**_ROW, "key": [1]})),
        _spooled("huge step", _lines({**_ROW, "step": 10**30})),
        _spooled("deep", b"[" * 5000 + b"]" * 5000 + b"\n"),
        _spooled("call of no kind", b"", _lines({"hello": 1})),
        _spooled("call of an unknown kind", b"", _lines({"kind": "explode"})),
        _spooled("call without its fields", b"", _lines({"kind": "tags"})),
        _spooled("call is a list", b"", _lines([1])),
        _spooled("tags is text", b"", _lines({"kind": "tags", "items": "x"})),
        _spooled("mark is text", row + row[:9], mark=b"many"),
        _spooled("mark is behind the end", row + row[:9], mark=b"99999999"),
        _spooled("mark below 0", row + row[:9], mark=b"-5"),
        _spooled("mark is empty", row + row[:9], mark=b""),
        _spooled("mark inside a line", row + row, mark=b"7"),
        _spooled("of an unknown run", row, run="0" * 32),
        _spooled("of a run with an odd name", row, run="not a run"),
        _harmless("empty folder", lambda spool: spool.mkdir()),
        _harmless("no folder", lambda spool: None),
        _harmless("foreign files", _foreign),
        _harmless("is a file", lambda spool: spool.write_text("hello")),
        Case("stores/spool for a server that is away", "127.0.0.1:9", _unreachable),
    ]
    for words in (_FIT, _SWEEP):
        cases.append(_store("in a file", words, _a_file))
        cases.append(_store("text as database", words, _instead(b"not a database, " * 400)))
    cases.append(_store("in a file", _REPLAY, _a_file))
    cases += [
        _store("database is a folder", _FIT, _database_folder),
        _store("database of the future", _FIT, _foreign_database),
        _store("database without its first page", _FIT, _overwrite(0.0)),
        *(_store(f"database cut at {share:.3f}", _FIT, _cut(share)) for share in (0.01, chance.uniform(0.1, 0.5))),
        _store("resume, text as database", _RESUME, _instead(b"x" * 5000)),
        _store("resume, in a file", _RESUME, _a_file),
        _store("plain files", [*_REPLAY[:2], "--store=file:STORE"], lambda store: None),
    ]
    cases += [
        _journal("text", lambda good: b"hello\n" * 5),
        _journal("binary", lambda good: bytes(range(256)) * 10 + b"\n"),
        _journal("a line cut in the middle", lambda good: good.replace(b'"', b"", 1)),
        _journal("without its first line", lambda good: good.split(b"\n", 1)[1]),
        _journal("a list", lambda good: b"[1, 2]\n"),
        _journal("flipped", lambda good: b"\xff" + good[1:]),
    ]
    return cases
