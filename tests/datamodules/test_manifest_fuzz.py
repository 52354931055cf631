"""Manifests and files with damage at random: every row is a finite sample or one clear line."""

import csv
import json
import pathlib
import random
import warnings

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from manifest_cases import SCHEMA, good_files
from PIL import Image

from ds_lightning.datamodules.manifest_reading import read_manifest
from ds_lightning.datamodules.manifest_schema import Schema
from ds_lightning.datamodules.manifest_values import BrokenEntryError, Decoder
from ds_lightning.datamodules.text_vocabulary import Vocabulary
from ds_lightning.errors import DataError

_FILES = {"photo": ("a.png", "a.jpg"), "clip": ("a.wav", "a.flac"), "sensor": ("a.npy", "a.csv")}
_ODD = (
    "",
    " ",
    "nan",
    "1e999",
    "[[1, 2], [3]]",
    "[NaN, 1]",
    "[",
    ".",
    "a\0",
    "/dev/zero",
    "http://a/b.png",
    "x" * 5000,
)
_ODD_JSON = (None, 7, True, [], {"a": 1}, [[1, 2], [3, 4]], float("nan"), float("inf"), 10**400, "\ud800")


def damaged(rng, content):
    """Cut, changed in places, something put in, or nothing left."""
    kind = rng.randrange(4)
    place = rng.randrange(len(content))
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


def rows_of(rng, folder, good, number, odd):
    for _ in range(rng.randrange(1, 4)):
        row = {**good, **{column: rng.choice(names) for column, names in _FILES.items()}}
        for column in _FILES:
            if rng.random() < 0.3:
                name = f"broken{number}{column}{pathlib.Path(row[column]).suffix}"
                (folder / name).write_bytes(damaged(rng, (folder / row[column]).read_bytes()))
                row[column] = name
        for _ in range(rng.randrange(3)):
            row[rng.choice(list(row))] = rng.choice(odd)
        yield row


def write(rng, path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding=rng.choice(("utf-8", "utf-16", "latin-1"))) as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pd.DataFrame(rows).to_parquet(path)
    if rng.random() < 0.2:
        path.write_bytes(damaged(rng, path.read_bytes()))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_row_is_a_finite_sample_or_one_clear_line(tmp_path, kind):
    rng = random.Random(kind)
    good = good_files(tmp_path)
    del good["line"]
    Image.open(tmp_path / "a.png").save(tmp_path / "a.jpg")
    soundfile.write(tmp_path / "a.flac", np.sin(np.arange(2000) * 0.1), 8000)
    (tmp_path / "a.csv").write_text("".join(f"{step},{step}\n" for step in range(9)))
    schema = Schema.from_any(SCHEMA)
    path = tmp_path / f"manifest.{kind}"
    samples = 0
    skipped: list[tuple[str, str]] = []
    refused: list[str] = []
    for number in range(30):
        write(rng, path, list(rows_of(rng, tmp_path, good, number, _ODD + _ODD_JSON * (kind == "jsonl"))))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                rows = read_manifest(path, schema)
        except DataError as error:
            refused.append(str(error))
            continue
        decoder = Decoder(schema, tmp_path, Vocabulary(["a"]), path)
        for row in rows:
            try:
                sample, label = decoder.decode(row), decoder.label(row)
            except BrokenEntryError as error:
                skipped.append((f"manifest.{kind}, line {row['line']}, column ", str(error)))
                continue
            samples += 1
            assert len(label) == 1
            for name, tensor in sample.items():
                assert bool((torch.isfinite(tensor) | (tensor.isnan() if name == "table" else False)).all())
                assert tensor.numel() > 0
    assert min(samples, len(skipped), len(refused)) > 0
    assert all(start in text for start, text in skipped)
    assert all(f"manifest.{kind}" in text for text in refused)
    assert not [text for text in (*refused, *(text for _, text in skipped)) if "\n" in text]
