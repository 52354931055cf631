import datetime
import os
import pickle
from decimal import Decimal

import numpy as np
import pytest
import torch
from manifest_cases import SCHEMA, good_files
from PIL import Image
from torch.utils.data import DataLoader

from ds_lightning.datamodules.manifest_schema import Schema
from ds_lightning.datamodules.manifest_values import BrokenEntryError, Decoder
from ds_lightning.datamodules.text_vocabulary import Vocabulary
from ds_lightning.errors import ConfigError, DataError


@pytest.fixture
def row(tmp_path):
    return good_files(tmp_path)


WORDS = Vocabulary(["a", "cat"])
COLUMN_OF = {"image": "photo", "text": "words", "audio": "clip", "series": "sensor", "table": "age"}


def decoder(folder, schema=SCHEMA, tokenizer=WORDS):
    return Decoder(Schema.from_any(schema), folder, tokenizer, "pets.csv")


def test_one_row_of_every_modality(tmp_path, row):
    sample = decoder(tmp_path).decode(row)
    assert list(sample) == ["image", "text", "audio", "series", "table"]
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert torch.equal(sample["image"], torch.from_numpy(pixels[:, 2:10].copy()).permute(2, 0, 1))
    assert sample["text"].tolist() == [2, 1, 3]
    assert (sample["audio"].shape, sample["audio"].dtype) == ((8, 51), torch.float32)
    np.testing.assert_array_equal(sample["series"], np.load(tmp_path / "a.npy")[:, :20].astype(np.float32))
    assert sample["table"][0] == 3.5
    assert sample["table"][1].isnan()


def test_decoding_twice_and_after_pickling_gives_the_same(tmp_path, row):
    first = decoder(tmp_path)
    for other in (first, pickle.loads(pickle.dumps(first))):
        for name, tensor in other.decode(row).items():
            torch.testing.assert_close(tensor, first.decode(row)[name], atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("nothing", ["", "  ", None, float("nan"), ...])
def test_absent_entries_give_no_key(tmp_path, row, nothing):
    whole = decoder(tmp_path).decode(row)
    for column, name in (
        ("photo", "image"),
        ("words", "text"),
        ("clip", "audio"),
        ("sensor", "series"),
        ("age", "table"),
    ):
        less = {key: value for key, value in row.items() if key != column}
        sample = decoder(tmp_path).decode(less if nothing is ... else {**less, column: nothing})
        assert list(sample) == [key for key in whole if key != name]


def test_a_grey_image_keeps_its_values_and_a_tall_one_its_centre(tmp_path, row):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    schema = {"columns": {"photo": {"modality": "image", "size": 8, "channels": 1}}, "label": "y"}
    assert torch.equal(decoder(tmp_path, schema).decode({"photo": "grey.png"})["image"], torch.from_numpy(grey)[None])
    tall = np.zeros((400, 100, 3), np.uint8)
    tall[140:260] = 200
    Image.fromarray(tall).save(tmp_path / "tall.png")
    image = decoder(tmp_path).decode({"photo": "tall.png"})["image"]
    assert image.shape == (3, 8, 8)
    assert bool((image == 200).all())


def test_numbers_of_every_kind(tmp_path):
    schema = {"columns": {"age": "table"}, "label": "y"}
    for value, wanted in (("1e3", 1000), (" -2 ", -2), (3, 3), (0.5, 0.5), (True, 1), (Decimal("1.25"), 1.25), (0, 0)):
        assert decoder(tmp_path, schema).decode({"age": value})["table"].tolist() == [wanted]


def test_text_in_files(tmp_path):
    schema = {"columns": {"words": {"modality": "text", "file": True}}, "label": "y"}
    (tmp_path / "a.txt").write_bytes("\ufeffa cät".encode())
    (tmp_path / "b.txt").write_bytes("a cät".encode("latin-1"))
    assert decoder(tmp_path, schema).text({"words": "a.txt"}) == "a cät"
    with pytest.raises(BrokenEntryError, match="not UTF-8"):
        decoder(tmp_path, schema).text({"words": "b.txt"})


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("photo", "none.png", "not to be had (No such file"),
        ("photo", "a\0.png", "not to be had"),
        ("photo", "x" * 5000, "not to be had"),
        ("photo", ".", "no regular file"),
        ("photo", "pipe.png", "no regular file"),
        ("photo", 7, "7 is no path"),
        ("photo", b"\x89PNG", "is no path"),
        ("photo", "a.wav", "can't be read"),
        ("photo", "cut.png", "can't be read"),
        ("photo", "giant.pgm", "is a giant"),
        ("photo", "large.pgm", "is a giant"),
        ("words", 7, "7 is no text"),
        ("words", ["a"], "is no text"),
        ("clip", "a.png", "audio"),
        ("clip", "huge.wav", "too large"),
        ("sensor", "a.png", "expected .npy or .csv"),
        ("sensor", [[1], [None]], "holds None"),
        ("sensor", "[[[[", "Expecting value"),
        ("age", "old", "'old' is no number"),
        ("age", "1,5", "is no number"),
        ("age", "1_000", "is no number"),
        ("age", "nan", "no finite number"),
        ("age", float("inf"), "no finite number"),
        ("age", 1e39, "no finite number"),
        ("age", 10**400, "is no number"),
        ("age", [1], "is no number"),
        ("age", datetime.date(2020, 1, 1), "is no number"),
    ],
)
def test_what_is_wrong_is_named_with_its_line_and_column(tmp_path, row, column, value, words):
    import soundfile

    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    (tmp_path / "giant.pgm").write_bytes(b"P5 20000 20000 255\n")
    (tmp_path / "large.pgm").write_bytes(b"P5 10000 10000 255\n")
    soundfile.write(tmp_path / "huge.wav", np.full(100, 1e30, np.float32), 8000, subtype="FLOAT")
    with pytest.raises(BrokenEntryError) as caught:
        decoder(tmp_path).decode({**row, column: value})
    text = str(caught.value)
    assert text.startswith(f"pets.csv, line 2, column {column!r}: ")
    assert words in text
    assert "\n" not in text
    assert isinstance(caught.value, DataError)


def test_labels_of_one_class(tmp_path):
    schema = {"columns": {"age": "table"}, "label": "y"}
    for value, wanted in ((" cat ", "cat"), (3, "3"), (3.0, "3"), (False, "False")):
        assert decoder(tmp_path, schema).label({"y": value}) == (wanted,)
    for value, words in (("", "no label"), (None, "no label"), (2.5, "2.5 is no name"), ([1], "is no name")):
        with pytest.raises(BrokenEntryError, match=words):
            decoder(tmp_path, schema).label({"y": value, "line": 4})


def test_labels_of_any_number_of_classes(tmp_path):
    schema = {"columns": {"age": "table"}, "label": {"column": "y", "kind": "multilabel"}}
    cases = (
        ("a|b", "ab"),
        ("a", "a"),
        (" a | ", "a"),
        ("", ""),
        (None, ""),
        ([], ""),
        (["b", "b"], "b"),
        ([1, 2.0], "12"),
    )
    for value, wanted in (*cases, ('["a", "b"]', "ab")):
        assert decoder(tmp_path, schema).label({"y": value}) == tuple(wanted)
    with pytest.raises(BrokenEntryError, match="None is no name"):
        decoder(tmp_path, schema).label({"y": [None]})


def test_texts_need_a_tokenizer_and_a_folder_must_hold_a_tokenizer(tmp_path):
    schema = {"columns": {"words": "text"}, "label": "y"}
    plain = decoder(tmp_path, schema, None)
    assert plain.text({"words": "a b"}) == "a b"
    with pytest.raises(ConfigError, match="no tokenizer"):
        plain.decode({"words": "a b"})
    with pytest.raises(ConfigError, match=r"tokenizer 'wrod' has no tokenizer\.json; expected word, char"):
        Decoder(
            Schema.from_any({"columns": {"words": {"modality": "text", "tokenizer": "wrod"}}, "label": "y"}), tmp_path
        )


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows, decode):
        self.rows, self.decode = rows, decode

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.decode.decode(self.rows[index])


def test_the_message_is_one_line_also_from_a_worker(tmp_path):
    rows = [{"age": "old", "line": 9}]
    data = _Rows(rows, decoder(tmp_path, {"columns": {"age": "table"}, "label": "y"}))
    with pytest.raises(BrokenEntryError) as caught:
        next(iter(DataLoader(data, num_workers=1)))
    assert str(caught.value).startswith("pets.csv, line 9, column 'age': 'old' is no number")
    assert "\n" not in str(caught.value)
