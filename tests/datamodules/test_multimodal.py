import warnings

import numpy as np
import pytest
import torch
from manifest_cases import write_wave
from multimodal_cases import CLASSES, SCHEMA, write_csv, write_rows

from ds_lightning.datamodules import MultimodalManifest
from ds_lightning.datamodules.manifest_reading import read_manifest
from ds_lightning.datamodules.manifest_schema import Schema
from ds_lightning.datamodules.manifest_values import Decoder
from ds_lightning.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "a")


def ready(path, **options):
    data = MultimodalManifest(str(path), **{"schema": SCHEMA, "batch_size": 5, "val_fraction": 0.25, **options})
    data.setup()
    return data


def same(one, other):
    assert set(one) == set(other)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0, msg=name)


def test_each_row_comes_with_what_it_has(manifest):
    data = ready(manifest, val_path=str(manifest), bucket=False)
    assert data.modalities == ("image", "text", "audio", "table")
    assert (data.num_classes, data.class_names, data.vocab_size) == (2, list(CLASSES), 30)
    assert data.input_shapes["image"] == (1, 4, 4)
    assert data.input_shapes["text"] == (5,)
    assert data.input_shapes["audio"][0] == 4
    assert data.input_shapes["table"] == (3,), "income is missing somewhere: an indicator follows"
    rows = read_manifest(manifest)
    columns = {name: column for name, column in SCHEMA["columns"].items() if name != "words"}
    decoder = Decoder(Schema.from_any({**SCHEMA, "columns": columns}), manifest.parent)
    spectra = torch.cat([decoder.decode(row)["audio"].flatten() for row in rows if row["clip"]])
    ages = torch.arange(24.0)
    incomes = torch.tensor([float(n * n) for n in range(24) if n % 6 != 1])
    words = ["one", "two", "three", "four"]
    n = 0
    for raw in data.val_dataloader():
        batch = data.on_after_batch_transfer(data.on_before_batch_transfer(raw, 0), 0)
        assert set(batch) == {"image", "text", "audio", "audio_mask", "table", "present", "label"}
        for at in range(len(batch["label"])):
            assert batch["present"][at].tolist() == [n % 7 != 3, True, n % 5 != 2, True]
            pixel = (n / 255 - 0.5) / 0.5 if n % 7 != 3 else 0.0
            torch.testing.assert_close(batch["image"][at], torch.full((1, 4, 4), pixel))
            ids = batch["text"][at]
            assert [data._text.tokenizer.words[i - 2] for i in ids if i] == words[: n % 4 + 1]
            mask = batch["audio_mask"][at]
            if n % 5 != 2:
                clip = decoder.decode(rows[n])["audio"]
                assert int(mask.sum()) == clip.shape[1]
                expected = (clip - spectra.mean()) / spectra.std(correction=0)
                torch.testing.assert_close(batch["audio"][at][:, mask], expected, atol=1e-4, rtol=1e-4)
            assert not batch["audio"][at][:, ~mask].any()
            income = 0.0 if n % 6 == 1 else (n * n - incomes.mean()) / incomes.std(correction=0)
            expected = torch.tensor([(n - ages.mean()) / ages.std(correction=0), income, float(n % 6 == 1)])
            torch.testing.assert_close(batch["table"][at], expected)
            assert CLASSES[batch["label"][at]] == rows[n]["y"]
            n += 1
    assert n == 24


def test_the_split_holds_each_class_and_is_the_same_for_a_seed(manifest):
    data = ready(manifest)
    held = torch.cat([batch["label"] for batch in data.val_dataloader()])
    assert held.bincount().tolist() == [3, 3]
    info = data.dataset_info()
    assert info["splits"] == {"train": 18, "val": 6, "test": 0}
    assert info["digest"] == ready(manifest).dataset_info()["digest"]
    for one, other in zip(data.val_dataloader(), ready(manifest).val_dataloader(), strict=True):
        same(one, other)
    assert not torch.equal(
        next(iter(data.val_dataloader()))["table"], next(iter(ready(manifest, seed=1).val_dataloader()))["table"]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_the_caches_give_the_same_batches(manifest, tmp_path, workers):
    folder = str(tmp_path / "cache")
    options = {"num_workers": workers, "seed": 3}
    kept = list(ready(manifest, **options).train_dataloader())
    stored = list(ready(manifest, cache=folder, **options).train_dataloader())
    inner = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(inner) == 1, "nothing half-written is left"
    again = list(ready(manifest, cache=folder, **options).train_dataloader())
    never = list(ready(manifest, cache="none", **options).train_dataloader())
    for batches in zip(kept, stored, again, never, strict=True):
        for other in batches[1:]:
            same(batches[0], other)


def test_the_cache_of_a_folder_is_not_decoded_again_and_sees_a_change(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a", count=8)
    calls = []
    whole = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda self, row: calls.append(row) or whole(self, row))
    for expected in (8, 0):
        calls.clear()
        ready(path, cache=str(tmp_path / "cache"))
        assert len(calls) == expected
    write_wave(tmp_path / "a" / "1.wav", np.zeros(3000))
    calls.clear()
    ready(path, cache=str(tmp_path / "cache"))
    assert len(calls) == 8


def test_like_lengths_come_together(manifest):
    def padding(data):
        batches = list(data.train_dataloader())
        assert sum(len(batch["label"]) for batch in batches) == 18
        return sum(int((~batch["audio_mask"][batch["present"][:, 2]]).sum()) for batch in batches)

    bucketed = sum(padding(ready(manifest, batch_size=3, seed=seed)) for seed in range(4))
    shuffled = sum(padding(ready(manifest, batch_size=3, seed=seed, bucket=False)) for seed in range(4))
    assert bucketed < 0.7 * shuffled


def test_what_is_broken_is_an_error_or_is_counted(tmp_path):
    path = write_rows(tmp_path / "a")
    (tmp_path / "a" / "4.png").write_bytes(b"no image")
    (tmp_path / "a" / "8.wav").write_bytes(b"")
    with pytest.raises(DataError, match=r"all.csv, line 6, column 'photo': .*4\.png"):
        ready(path)
    with pytest.warns(UserWarning, match=r"2 of 24 rows can't be used and are skipped.*line 6"):
        data = ready(path, on_error="skip", num_workers=2)
    assert [line for line, _ in data.skipped] == [6, 10]
    assert "8.wav" in data.skipped[1][1]
    assert data.dataset_info()["splits"] == {"train": 16, "val": 6, "test": 0}
    assert sum(len(batch["label"]) for batch in data.train_dataloader()) == 16


def test_an_unknown_class_and_an_empty_row(tmp_path):
    path = write_rows(tmp_path / "a")
    test = tmp_path / "a" / "test.csv"
    columns = dict.fromkeys(SCHEMA["columns"], "")
    write_csv(test, [{**columns, "age": "3", "y": "dog"}, {**columns, "y": "cat"}, {**columns, "age": "1", "y": "cat"}])
    with pytest.raises(DataError, match=r"line 3: all of photo, words, clip, age, income are empty"):
        ready(path, test_path=str(test))
    with pytest.warns(UserWarning, match=r"2 of 27 rows"):
        data = ready(path, test_path=str(test), on_error="skip")
    assert [line for line, _ in data.skipped] == [2, 3]
    assert "the label is 'dog', which is none of the classes of training; expected bird, cat" in data.skipped[0][1]
    (batch,) = data.test_dataloader()
    assert batch["present"].tolist() == [[False, False, False, True]]
    assert batch["audio"].shape == (1, 4, 1)


def test_several_labels(tmp_path):
    rows = [{"age": n, "y": ["", "a", "b|a", "c"][n % 4]} for n in range(16)]
    write_csv(tmp_path / "m.csv", rows)
    schema = {"columns": {"age": "table"}, "label": {"column": "y", "kind": "multilabel"}}
    data = ready(tmp_path / "m.csv", schema=schema, val_path=str(tmp_path / "m.csv"))
    labels = torch.cat([batch["label"] for batch in data.val_dataloader()])
    assert labels[:4].tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; expected raise or skip"),
        ({"mix": "cutmix"}, "mix is 'cutmix'; expected none or mixup"),
        ({"mix": "mixup", "mix_alpha": 0.0}, "mix_alpha is 0.0"),
        ({"watch_tolerance": -1.0}, "watch_tolerance is -1.0"),
        ({"schema": {"columns": {"age": "table"}, "label": "y"}, "transform": dict}, "no image column"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        MultimodalManifest("rows.csv", **{"schema": SCHEMA, **options})


def test_what_is_not_there(manifest):
    data = MultimodalManifest(str(manifest), SCHEMA)
    for ask in (data.train_dataloader, data.dataset_info, lambda: data.input_shapes):
        with pytest.raises(DataError, match=r"call setup\(\) first"):
            ask()
    data.setup()
    with pytest.raises(DataError, match=r"no rows for test; give test_path"):
        data.test_dataloader()
    with pytest.raises(DataError, match="too few for a batch of batch_size 32"):
        ready(manifest, batch_size=32, drop_last=True).train_dataloader()
    with pytest.raises(ConfigError, match=r"val_fraction is 0.01, which leaves 0 of 24"):
        ready(manifest, val_fraction=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready(manifest)
