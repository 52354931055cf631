import os
import time

import pytest
import torch
from manifest_cases import write_wave
from multimodal_cases import CLASSES, SumsOfInputs, trainer, write_csv

from ds_lightning.datamodules import MultimodalManifest
from ds_lightning.datamodules.manifest_schema import Schema
from ds_lightning.datamodules.manifest_watch import FileMatch, FolderWatch
from ds_lightning.errors import ConfigError, DataError

CLIP = {"modality": "audio", "sample_rate": 8000, "mels": 4, "max_seconds": 0.2}
KEYED = {"columns": {"clip": CLIP, "age": "table"}, "label": "y", "key": "id"}


def settled(path, ago=60):
    """As if it had been written a while ago."""
    then = time.time() - ago
    os.utime(path, (then, then))
    return path


def rows_of(watch):
    return {name: row for rows, names in watch.look().values() for name, row in zip(names, rows, strict=True)}


def test_only_what_is_completely_written_is_taken(tmp_path):
    schema = Schema.from_any({"columns": {"age": "table"}, "label": "y"})
    watch = FolderWatch(str(tmp_path), schema, settle=0.2)
    for name in (".hidden.csv", "a.csv.part", "b.csv.tmp", "c.csv~"):
        (tmp_path / name).write_text("age,y\n1,cat\n")
        settled(tmp_path / name)
    growing = tmp_path / "new.csv"
    growing.write_text("age,y\n1,cat\n")
    assert watch.look() == {}
    time.sleep(0.1)
    with growing.open("a") as file:
        file.write("2,bird\n")
    time.sleep(0.15)
    assert watch.look() == {}, "it has grown since the last look, and is not old enough"
    time.sleep(0.25)
    found = rows_of(watch)
    assert {name: row["age"] for name, row in found.items()} == {"new.csv:2": "1", "new.csv:3": "2"}
    assert watch.look() == {}, "once"
    (tmp_path / "a.csv.part").rename(tmp_path / "a.csv")
    assert list(rows_of(watch)) == ["a.csv:2"]


def test_files_are_aligned_by_the_key_and_rows_of_a_key_are_one(tmp_path):
    watch = FolderWatch(str(tmp_path), Schema.from_any(KEYED))
    write_csv(tmp_path / "ages.csv", [{"id": "007", "age": 3}, {"id": "8", "age": 4}])
    write_csv(tmp_path / "labels.csv", [{"id": "007", "y": "cat"}])
    settled(tmp_path / "ages.csv")
    settled(tmp_path / "labels.csv")
    found = rows_of(watch)
    assert list(found) == ["007"]
    assert (found["007"]["age"], found["007"]["y"]) == ("3", "cat")
    assert watch.waiting == 1, "8 has no label yet"
    clip = settled(write_wave(tmp_path / "mic_007-left.wav", [0.1] * 800))
    settled(write_wave(tmp_path / "mic_1007.wav", [0.1] * 800))
    late = rows_of(watch)
    assert late == {"007": {**found["007"], "clip": str(clip.resolve())}}
    settled(write_wave(tmp_path / "x-007.wav", [0.1] * 800))
    assert rows_of(watch) == {}
    assert "key '007' stands in the names of mic_007-left.wav and x-007.wav" in watch.broken["007"]


@pytest.mark.parametrize(("seconds", "expected"), [(10.4, "cam_10.250.png"), (11.9, "b-12.png"), (14.0, None)])
def test_files_are_aligned_by_the_nearest_time(tmp_path, seconds, expected):
    files = {tmp_path / "cam_10.250.png": 0.0, tmp_path / "b-12.png": 0.0, tmp_path / "nothing.png": 900.0}
    match = FileMatch(files, tolerance=1.0)
    found = match.by_time(seconds)
    assert (None if found is None else found.name) == expected
    assert match.by_time(900.9).name == "nothing.png", "no number: its time of change"


def test_a_row_waits_for_the_file_that_it_names(tmp_path):
    watch = FolderWatch(str(tmp_path), Schema.from_any({"columns": {"clip": CLIP}, "label": "y"}))
    write_csv(tmp_path / "a.csv", [{"clip": "sub/1.wav", "y": "cat"}])
    settled(tmp_path / "a.csv")
    assert watch.look() == {}
    assert watch.waiting == 1
    (tmp_path / "sub").mkdir()
    settled(write_wave(tmp_path / "sub" / "1.wav", [0.1] * 800))
    assert list(rows_of(watch)) == ["a.csv:2"]
    assert watch.waiting == 0


def add(folder, first, count):
    rows = [{"id": f"k{n}", "age": n, "y": CLASSES[n % 2]} for n in range(first, first + count)]
    write_csv(folder / f"part{first}.csv", rows)
    settled(folder / f"part{first}.csv")
    for n in range(first, first + count, 2):
        settled(write_wave(folder / f"k{n}.wav", [0.1] * (300 + n)))


class Filling(SumsOfInputs):
    """Puts rows into the folder at the end of the first epoch."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.epochs = []

    def training_step(self, batch, batch_idx):
        self.epochs.append((self.current_epoch, len(batch["label"])))
        return self.layer(torch.nn.functional.pad(batch["table"], (0, 3))).square().mean()

    def on_train_epoch_end(self):
        if self.current_epoch == 0:
            add(self.folder, 100, 20)


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_that_come_while_one_trains_are_trained_on_and_none_changes_sides(tmp_path, workers):
    add(tmp_path, 0, 20)
    data = MultimodalManifest(str(tmp_path), KEYED, watch=True, val_fraction=0.3, batch_size=4, num_workers=workers)
    data.setup()
    before = {name: set(part.rows.tolist()) for name, part in data._splits.items()}
    assert len(before["train"]) + len(before["val"]) == 20
    trainer(max_epochs=2, reload_dataloaders_every_n_epochs=1).fit(model := Filling(tmp_path), data)
    after = {name: set(part.rows.tolist()) for name, part in data._splits.items()}
    assert len(after["train"]) + len(after["val"]) == 40
    assert before["train"] <= after["train"]
    assert before["val"] <= after["val"]
    for epoch, rows in ((0, before["train"]), (1, after["train"])):
        assert sum(size for e, size in model.epochs if e == epoch) == len(rows)


def test_what_watch_needs_and_what_it_refuses(tmp_path):
    with pytest.raises(ConfigError, match="with watch expected a folder"):
        MultimodalManifest(str(tmp_path / "rows.csv"), KEYED, watch=True).setup()
    with pytest.raises(DataError, match="no row for train"):
        MultimodalManifest(str(tmp_path), KEYED, watch=True).setup()
    add(tmp_path, 0, 20)
    with pytest.raises(ConfigError, match="reload_dataloaders_every_n_epochs=1"):
        trainer(max_epochs=1).fit(Filling(tmp_path), MultimodalManifest(str(tmp_path), KEYED, watch=True))
    settled(tmp_path / "part0.csv").with_name("bad.csv").write_text("id,id\n1,2\n")
    settled(tmp_path / "bad.csv")
    with pytest.raises(DataError, match=r"bad\.csv"):
        MultimodalManifest(str(tmp_path), KEYED, watch=True).setup()
    data = MultimodalManifest(str(tmp_path), KEYED, watch=True, on_error="skip")
    with pytest.warns(UserWarning, match="1 of 20 rows"):
        data.setup()
    assert "bad.csv" in data.skipped[0][1]
