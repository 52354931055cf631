import csv
import json

import pytest

from ds_lightning.datamodules.text_reading import read_texts
from ds_lightning.errors import DataError


def written(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_csv_quotes_and_line_breaks_as_the_csv_module_writes_them(tmp_path):
    rows = [('a, "b"', "x", 1), ("two\nlines", "y", 2), ("", "x", 3)]
    path = tmp_path / "texts.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("sentence", "kind", "id"), *rows])
    texts, labels = read_texts(path, "sentence", "kind")
    assert texts == [row[0] for row in rows]
    assert labels == ["x", "y", "x"]
    assert read_texts(path, "kind", None) == (["x", "y", "x"], None)


def test_tsv_with_and_without_a_header_quotes_nothing(tmp_path):
    body = 'an "open quote\t1\nit\'s "fine"\t0\n'
    wanted = (['an "open quote', 'it\'s "fine"'], ["1", "0"])
    assert read_texts(written(tmp_path, "a.tsv", "\ufefftext\tlabel\n" + body)) == wanted
    assert read_texts(written(tmp_path, "b.tsv", body), 0, 1) == wanted


def test_jsonl_and_labels_that_are_numbers(tmp_path):
    lines = [json.dumps({"text": "häuser", "label": 0}), "", json.dumps({"text": "b", "label": "good"})]
    assert read_texts(written(tmp_path, "a.jsonl", "\n".join(lines))) == (["häuser", "b"], ["0", "good"])


def test_lines_with_a_label_in_front(tmp_path):
    path = written(tmp_path, "a.txt", "good what a film\n\nvery bad\tso it goes\nbad \n")
    assert read_texts(path) == (["what a film", "so it goes", ""], ["good", "very bad", "bad"])
    assert read_texts(path, label_column=None).texts == ["good what a film", "very bad\tso it goes", "bad"]


def test_a_long_field_is_read_and_the_limit_stays(tmp_path):
    before = csv.field_size_limit()
    path = written(tmp_path, "a.csv", "text,label\n" + "x" * 200_000 + ",1\n")
    assert len(read_texts(path).texts[0]) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.md", "", {}, r"a.md is no text file that is known; expected a name that ends with .csv, .tsv"),
        ("a.csv", "sentence,label\nb,1\n", {}, "has no column 'text'; its first line has sentence, label"),
        ("a.csv", "", {}, "has no column 'text'; its first line has nothing"),
        ("a.csv", "text,label\n", {}, "has no texts"),
        ("a.csv", "text,label\nb\n", {}, "line 2 has 1 columns; expected 2"),
        ("a.csv", "text,label\nb,\n", {}, "line 2 has no label; give each row one, or set label_column to null"),
        ("a.tsv", "b\t1\n", {"text_column": 0}, "the column 'label' of .* expected two names, or two numbers"),
        ("a.jsonl", '{"text": "b"}', {}, "line 1 has no key 'label'; it has text"),
        ("a.jsonl", "[1]", {}, "line 1 has no key 'text'; it has list"),
        ("a.jsonl", "{", {}, "line 1 is no JSON"),
        ("a.jsonl", '{"text": 3, "label": 1}', {}, "line 1: the text is 3; expected a string"),
        ("a.txt", b"good \xff\n", {}, r"is not UTF-8 \(byte 5\)"),
    ],
)
def test_what_can_not_be_read_is_named(tmp_path, name, text, options, message):
    with pytest.raises(DataError, match=message):
        read_texts(written(tmp_path, name, text), **options)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"absent.csv is not there; expected a file of texts"):
        read_texts(tmp_path / "absent.csv")
