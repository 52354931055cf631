"""Manifests with damage at random, what must be noticed of it, and whether `MultimodalManifest` did."""

import csv
import io
import json
import random
import struct
import time
import warnings
import wave
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from time_limit import TooLong, time_limit

from ds_lightning.datamodules import MultimodalManifest
from ds_lightning.errors import ConfigError, DataError

Row = dict[str, Any]
SCHEMA = {
    "columns": {
        "photo": {"modality": "image", "size": 8},
        "words": {"modality": "text", "max_length": 6},
        "clip": {"modality": "audio", "sample_rate": 8000, "mels": 8, "max_seconds": 0.5},
        "sensor": {"modality": "series", "channels": 2, "length": 20},
        "age": {"modality": "table"},
        "income": {"modality": "table"},
    },
    "label": {"column": "y"},
}
KINDS = (
    "missing column",
    "empty cells",
    "wrong types",
    "truncated file",
    "0-length audio",
    "giant image",
    "mixed encodings",
    "damaged manifest",
)
SUFFIXES = (".csv", ".jsonl", ".parquet")
HANGS_AFTER = 20
_FILES = {"photo": ("a.png", "a.jpg"), "clip": ("a.wav", "a.flac"), "sensor": ("a.npy", "a.csv")}
_WRONG = {
    "photo": ("nowhere.png", ".", "/dev/zero", "http://a/b.png", "x" * 5000, "a.wav", "a.npy"),
    "clip": ("nowhere.wav", ".", "a.png", "a.npy", "x" * 300),
    "sensor": ("[[1, 2], [3]]", "[NaN, 1]", "[", "a.png", "[[1, 2], [3, 1e999]]", '["1", "2"]', "[[], []]"),
    "age": ("three", "1e999", "1_000", "0x10", "[1]", "3,5", "--"),
    "income": ("-inf", "ten", "1e39"),
    "y": ("", " "),
}
_WRONG_JSON: dict[str, tuple[Any, ...]] = {
    "photo": (7, True, [], {"a": 1}, 1.5),
    "words": (7, True, [], {"a": 1}),
    "clip": (7, [[1]], {}),
    "sensor": (7, True, {"a": 1}, [[1, 2], [3, float("nan")]], [[1, 2], [3, 10**400]], [[[1]], [[2]]], ["a", "b"]),
    "age": ([], {"a": 1}, float("inf"), 10**400, "\ud800"),
    "income": ([1], "\ud800"),
    "y": (None, [], {"a": 1}, 1.5, float("nan")),
}


@dataclass
class Broken:
    """A manifest that has been written.

    Args:
        path: of the file.
        kinds: what was done to it.
        rows: how many it had.
        suspects: the lines of rows that something was done to.
        must: the lines that can't be used.
        refused: whether the whole of it can't be used.
        whole: whether the file itself is as it was written.
        strange: whether it is in an encoding that is warned about.
    """

    path: Path
    kinds: list[str]
    rows: int = 0
    suspects: set[int] = field(default_factory=set)
    must: set[int] = field(default_factory=set)
    refused: bool = False
    whole: bool = True
    strange: bool = False


class Breaker:
    """Writes good files once, and from them one broken manifest after the other.

    Args:
        folder: is filled.
        seed: of the damage.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.seed = folder, seed
        _good_files(folder)
        rng = random.Random(seed)
        self.good = folder / "good.jsonl"
        self.good.write_text("\n".join(json.dumps(self._row(rng, number)) for number in range(4)))

    def manifest(self, number: int) -> Broken:
        """Write the manifest of a number; the kind of damage and of file go round."""
        rng = random.Random(f"{self.seed} {number}")
        suffix = SUFFIXES[number // len(KINDS) % len(SUFFIXES)]
        broken = Broken(self.folder / f"manifest{suffix}", [KINDS[number % len(KINDS)]])
        if rng.random() < 0.3:
            broken.kinds.append(rng.choice([kind for kind in KINDS if kind not in broken.kinds]))
        rows = [self._row(rng, at) for at in range(rng.randrange(3, 8))]
        broken.rows = len(rows)
        first = 2 if suffix == ".csv" else 1
        for kind in broken.kinds:
            self._damage(rng, kind, broken, rows, first, f"{number}")
        _write(rng, broken, rows)
        return broken

    def _row(self, rng: random.Random, at: int) -> Row:
        files = {column: rng.choice(names) for column, names in _FILES.items()}
        numbers = {"age": rng.choice(("3.5", "7", "")), "income": rng.choice(("1e3", "-2"))}
        return {**files, "words": "a small café", **numbers, "y": ("cat", "dog")[at % 2]}

    def _damage(self, rng: random.Random, kind: str, broken: Broken, rows: list[Row], first: int, tag: str) -> None:
        if kind == "missing column":
            name = rng.choice([*sorted(SCHEMA["columns"]), "y"])
            for row in rows:
                row.pop(name, None)
            broken.refused = True
            return
        if kind in ("mixed encodings", "damaged manifest"):
            return
        for at in rng.sample(range(len(rows)), rng.randrange(1, 3)):
            row, line = rows[at], at + first
            broken.suspects.add(line)
            if kind == "empty cells":
                for name in rng.sample(sorted(set(row) - {"y"}), rng.randrange(1, 7) % len(row)):
                    row[name] = rng.choice(("", " ", None if broken.path.suffix != ".csv" else ""))
            elif kind == "wrong types":
                table: dict[str, tuple[Any, ...]] = dict(_WRONG)
                if broken.path.suffix == ".jsonl" and rng.random() < 0.5:
                    table = _WRONG_JSON
                name = rng.choice(sorted(set(table) & set(row)))
                row[name] = rng.choice(table[name])
                broken.must.add(line)
            elif kind == "truncated file":
                name = rng.choice(sorted(set(_FILES) & set(row)))
                whole = self.folder / rng.choice(_FILES[name])
                row[name] = f"cut{tag}-{at}{whole.suffix}"
                (self.folder / row[name]).write_bytes(_cut(rng, whole.read_bytes()))
            elif kind == "0-length audio" and "clip" in row:
                row["clip"] = rng.choice(("empty.wav", "empty.flac", "no_frames.wav"))
                broken.must.add(line)
            elif kind == "giant image" and "photo" in row:
                row["photo"] = rng.choice(("giant.png", "claims.png"))
                broken.must.add(line)


def _good_files(folder: Path) -> None:
    import soundfile

    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(256, size=(8, 12, 3), dtype=np.uint8))
    picture.save(folder / "a.png")
    picture.save(folder / "a.jpg")
    sound = np.sin(np.arange(4000) * 0.3) * 0.5
    for name in ("a.wav", "a.flac"):
        soundfile.write(folder / name, sound, 8000)
    np.save(folder / "a.npy", generator.normal(size=(2, 30)))
    (folder / "a.csv").write_text("".join(f"{step},{step}\n" for step in range(9)))
    for name in ("empty.wav", "empty.flac"):
        (folder / name).write_bytes(b"")
    with wave.open(str(folder / "no_frames.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
    (folder / "giant.png").write_bytes(_grey(20_000, 20_000))
    (folder / "claims.png").write_bytes(_grey(2**31 - 1, 2**31 - 1, rows=3, columns=8))


def _grey(width: int, height: int, rows: int | None = None, columns: int | None = None) -> bytes:
    """A PNG of one bit a pixel; less data than its header says, where `rows` and `columns` are given."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    line = bytes(1 + ((columns or width) + 7) // 8)
    data = zlib.compress(line * (rows or height), 1)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _cut(rng: random.Random, content: bytes) -> bytes:
    """Cut, empty, with something put in, or changed in places near its start."""
    kind, place = rng.randrange(4), rng.randrange(len(content))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return b""
    if kind == 2:
        return content[:place] + rng.randbytes(20) + content[place:]
    changed = bytearray(content)
    for _ in range(3):
        changed[rng.randrange(min(len(content), 100))] = rng.choice((0, 1, 127, 255))
    return bytes(changed)


def _write(rng: random.Random, broken: Broken, rows: list[Row]) -> None:
    mixed, path = "mixed encodings" in broken.kinds, broken.path
    if path.suffix == ".parquet":
        names = list(dict.fromkeys(name for row in rows for name in row))
        content = io.BytesIO()
        columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
        if mixed and "words" in columns:
            # Bytes are no text to Parquet, whatever their encoding.
            columns["words"] = [None if text is None else text.encode("latin-1") for text in columns["words"]]
            there = [at for at, text in enumerate(columns["words"], 1) if text is not None]
            broken.suspects |= set(there)
            broken.must |= set(there)
        pq.write_table(pa.table(columns), content)
        raw = content.getvalue()
    elif path.suffix == ".jsonl":
        raw = _encoded(rng, broken, [json.dumps(row, ensure_ascii=not mixed) for row in rows], mixed)
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        raw = _encoded(rng, broken, text.getvalue().splitlines(), mixed)
    if "damaged manifest" in broken.kinds:
        raw, broken.whole = _cut(rng, raw), False
    path.write_bytes(raw)


def _encoded(rng: random.Random, broken: Broken, lines: list[str], mixed: bool) -> bytes:
    text = "\n".join(lines)
    encoding = rng.choice(("utf-16", "utf-8-sig", "latin-1", "each line")) if mixed else "utf-8"
    broken.strange = encoding in ("latin-1", "each line") and not text.isascii()
    if encoding == "latin-1":
        return text.encode("latin-1", "surrogatepass" if text.isascii() else "replace")
    if encoding != "each line":
        return text.encode(encoding, "surrogatepass")
    strange = [not line.isascii() for line in lines]
    last = max((at for at, odd in enumerate(strange) if odd), default=-1)
    return b"\n".join(
        line.encode("latin-1" if at == last else rng.choice(("utf-8", "latin-1")), "replace")
        for at, line in enumerate(lines)
    )


@dataclass(frozen=True)
class Verdict:
    """What came of a manifest.

    Args:
        outcome: `error`, `skipped`, `clean`, or `wrong`.
        message: the error's text, the first reason for skipping, or what is wrong.
        skipped: rows that were left out and counted.
        seconds: that it took.
    """

    outcome: str
    message: str
    skipped: int
    seconds: float


def judge(broken: Broken, good: Path, on_error: str) -> Verdict:
    """Read a broken manifest as a user does, with a good one for the validation, and look at what comes."""
    begin = time.monotonic()
    skipped = 0
    try:
        with time_limit(HANGS_AFTER), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = MultimodalManifest(str(broken.path), SCHEMA, str(good), batch_size=4, on_error=on_error)
            data.setup()
            seen = _finite(data)
            skipped = len(data.skipped)
        said = [str(warning.message) for warning in caught]
        wrong = _wrong(broken, data.skipped, seen, said)
        outcome = "wrong" if wrong else "skipped" if skipped else "clean"
        message = wrong or (data.skipped[0][1] if skipped else "")
    except (ConfigError, DataError) as error:
        outcome, message = "error", str(error)
        if "\n" in message or (broken.path.name not in message and good.name not in message):
            outcome, message = "wrong", f"no clear line: {message!r}"
        elif broken.whole and not broken.refused and not broken.suspects and not broken.strange:
            outcome, message = "wrong", f"nothing is broken, and it says {message!r}"
    except TooLong:
        outcome, message = "wrong", f"it hangs for more than {HANGS_AFTER} s"
    except Exception as error:
        outcome, message = "wrong", f"{type(error).__name__}: {error}"
    return Verdict(outcome, message, skipped, time.monotonic() - begin)


def _finite(data: MultimodalManifest) -> int:
    """Go through the batches; return the number of training samples, or raise where a number isn't finite."""
    seen = 0
    for loader, train in ((data.train_dataloader(), True), (data.val_dataloader(), False)):
        for batch in loader:
            seen += len(batch["label"]) if train else 0
            for name, value in data.on_after_batch_transfer(batch, 0).items():
                if not bool(torch.isfinite(value).all()) or value.numel() == 0:
                    raise ArithmeticError(f"{name} of a batch is empty or not finite")
            if not bool(batch["present"].any(dim=1).all()):
                raise ArithmeticError("a sample has nothing")
    return seen


def _wrong(broken: Broken, skipped: list[tuple[int, str]], seen: int, said: list[str]) -> str:
    """Say what went unnoticed, or was left out without a reason; empty where all is well."""
    # The other manifest's rows may go too, where the classes that they have are no longer there.
    mine = {line: reason for line, reason in skipped if broken.path.name in reason}
    if any("\n" in reason for _, reason in skipped):
        return "a reason has more than one line"
    if skipped and not any(f"{len(skipped)} of " in text and "skipped" in text for text in said):
        return f"{len(skipped)} rows are skipped without a warning that counts them"
    if not broken.whole:
        return ""
    if broken.refused:
        return "a column is missing, and nobody says so"
    if broken.must - set(mine):
        return f"lines {sorted(broken.must - set(mine))} can't be used, and are"
    if set(mine) - broken.suspects:
        return f"lines {sorted(set(mine) - broken.suspects)} are skipped, and nothing is wrong with them"
    if seen != broken.rows - len(mine):
        return f"{seen} samples come from {broken.rows} rows of which {len(mine)} are skipped"
    if broken.strange and not any("Latin-1" in text for text in said):
        return "the encoding is guessed without a warning"
    return ""
