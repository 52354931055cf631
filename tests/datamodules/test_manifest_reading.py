import csv
import itertools
import json
import warnings

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.datamodules.manifest_reading import read_manifest
from ds_lightning.datamodules.manifest_schema import Schema
from ds_lightning.errors import DataError

SCHEMA = Schema.from_any({"columns": {"photo": "image", "age": "table"}, "label": "y"})


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Entries with all signs that quoting is about; a row of one empty entry is a blank line to a CSV file.
_entries = st.lists(
    st.tuples(st.text("a,;\"' é\n\r|", max_size=6), st.text("b\t0", min_size=1, max_size=4)), min_size=1
)


@settings(max_examples=40, deadline=None)
@given(_entries)
def test_csv_as_the_csv_module_writes_it(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("csv") / "m.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("photo", "y"), *entries])
    rows = read_manifest(path)
    assert [(row["photo"], row["y"]) for row in rows] == entries
    assert all(later["line"] > row["line"] for row, later in itertools.pairwise(rows))


def test_the_number_of_a_row_is_the_line_where_it_starts(tmp_path):
    path = written(tmp_path, "m.csv", 'photo,y\n"a\nb",1\n\nc,2\n')
    assert [row["line"] for row in read_manifest(path)] == [2, 5]
    path = written(tmp_path, "m.jsonl", '{"y": 1}\n\n{"y": 2}\n')
    assert read_manifest(path) == [{"y": 1, "line": 1}, {"y": 2, "line": 3}]


def test_what_pandas_writes_in_three_formats_is_the_same_table(tmp_path):
    frame = pd.DataFrame({"photo": ["ä.png", None, "c.png"], "age": [1.5, None, 3.0], "y": [0, 1, 0]})
    frame.to_csv(tmp_path / "m.csv")  # with the index, whose column has no name
    frame.to_json(tmp_path / "m.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "m.parquet")
    read = [read_manifest(tmp_path / f"m.{kind}", SCHEMA) for kind in ("csv", "jsonl", "parquet")]
    assert [row["photo"] for row in read[0]] == ["ä.png", "", "c.png"]
    for rows in read[1:]:
        assert [row["photo"] for row in rows] == ["ä.png", None, "c.png"]
        assert [row["y"] for row in rows] == [0, 1, 0]
        assert rows[0]["age"] == 1.5
    assert [row["line"] for row in read[2]] == [1, 2, 3]
    assert "" not in read[0][0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode_with_and_without_a_mark(tmp_path, encoding):
    path = written(tmp_path, "m.csv", "photo,y\nü.png,日本\n".encode(encoding))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_manifest(path) == [{"photo": "ü.png", "y": "日本", "line": 2}]


def test_another_encoding_is_said_to_be_latin_1(tmp_path):
    path = written(tmp_path, "m.csv", "photo,y\nü.png,1\n".encode("latin-1"))
    with pytest.warns(UserWarning, match=r"m\.csv is not UTF-8 \(byte 8\), and is read as Latin-1"):
        assert read_manifest(path)[0]["photo"] == "ü.png"


def test_long_entries_and_the_limit_of_the_csv_module_stays_as_it_was(tmp_path):
    before = csv.field_size_limit()
    path = written(tmp_path, "m.csv", f"photo,y\n{'1' * 200_000},1\n")
    assert len(read_manifest(path)[0]["photo"]) == 200_000
    with pytest.raises(DataError):
        read_manifest(written(tmp_path, "n.csv", "a,a\n1,2\n"))
    assert csv.field_size_limit() == before


def test_json_separators_within_texts_do_not_end_a_line(tmp_path):
    path = written(tmp_path, "m.jsonl", json.dumps({"y": "a\u2028b\x85"}, ensure_ascii=False) + "\r\n")
    assert read_manifest(path) == [{"y": "a\u2028b\x85", "line": 1}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.xlsx", "", "of no known kind"),
        ("m.csv", None, "is not there"),
        ("m.csv", "", "no header"),
        ("m.csv", ",\n1,2\n", "no header"),
        ("m.csv", "photo,age,y\n", "no rows"),
        ("m.csv", "photo,age,y,age\n", "'age' twice"),
        ("m.csv", "photo,line,y\n", "a column 'line'"),
        ("m.csv", "photo,age,y\na,1,x\nb,2\n", "line 3 has 2 entries; expected 3"),
        ("m.csv", "photo,age,y\na,1,x,5\n", "line 2 has 4 entries"),
        ("m.csv", 'photo,age,y\na,1,x\n"b,2,y\nc,3,x\n', "from line 3 on"),
        ("m.csv", 'photo,age,y\n"a"b,1,x\n', "from line 2 on"),
        ("m.csv", "photo,age,y\na,\0,x\n", "line 2 has a NUL"),
        ("m.csv", "photos,age,y\na,1,x\n", "no column 'photo', which the schema names; did you mean 'photos'"),
        ("m.csv", "photo;age;y\na;1;x\n", "semicolons"),
        ("m.csv", b"\xff\xfep\x00h\x00o", "no UTF-16"),
        ("m.jsonl", "\n\n", "no rows"),
        ("m.jsonl", '{"photo": 1,\n', "line 1 is no JSON"),
        ("m.jsonl", '{"y": 1}\n[1]\n', "line 2 is a JSON list"),
        ("m.jsonl", '{"y": 1, "y": 2}\n', "the key 'y' is there twice"),
        ("m.jsonl", '{"line": 1}\n', "a key 'line'"),
        ("m.jsonl", '{"y": ' + "[" * 100_000 + "\n", "line 1 is no JSON"),
        ("m.jsonl", '{"y": ' + "1" * 10_000 + "}\n", "line 1 is no JSON"),
        ("m.jsonl", '{"photo": "a", "y": 1}\n{"y": 1}\n', "no column 'age'"),
        ("m.parquet", "", "as Parquet"),
        ("m.parquet", b"PAR1" + b"\x00" * 50 + b"PAR1", "as Parquet"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path, name, content, words):
    path = tmp_path / name if content is None else written(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read_manifest(path, SCHEMA)
    assert words in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_that_is_cut_short(tmp_path):
    pd.DataFrame({"y": range(100)}).to_parquet(tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for size in (4, 100, len(whole) - 5):
        with pytest.raises(DataError, match="as Parquet"):
            read_manifest(written(tmp_path, "m.parquet", whole[:size]))


def test_a_key_in_one_row_of_a_jsonl_file_is_enough(tmp_path):
    path = written(tmp_path, "m.jsonl", '{"photo": "a"}\n{"age": 1}\n{"y": 1}\n')
    assert len(read_manifest(path, SCHEMA)) == 3
