import pytest
import yaml
from manifest_cases import SCHEMA

from ds_lightning.datamodules.manifest_schema import Schema
from ds_lightning.errors import ConfigError


def with_column(entry, name="photo"):
    return {"columns": {name: entry}, "label": "y"}


def test_a_mapping_and_its_yaml_give_the_same_schema(tmp_path):
    path = tmp_path / "schema.yaml"
    path.write_text(yaml.safe_dump(SCHEMA, sort_keys=False))
    schema = Schema.from_any(path)
    assert schema == Schema.from_any(str(path)) == Schema.from_any(SCHEMA) == Schema.from_any(schema)
    assert schema.modalities == ("image", "text", "audio", "series", "table")
    assert schema.table_columns == ("age", "income")
    assert schema.wanted == ("photo", "words", "clip", "sensor", "age", "income", "y")
    assert (schema.columns["photo"].size, schema.columns["clip"].mels, schema.label.kind) == (8, 8, "class")
    assert schema.column_of("table").name == "age"


def test_the_order_of_the_modalities_is_that_of_the_columns():
    schema = Schema.from_any(
        {
            "columns": {"b": "table", "w": "text", "a": "table", "p": "image"},
            "label": {"column": "y", "kind": "multilabel"},
        }
    )
    assert schema.modalities == ("table", "text", "image")
    assert schema.table_columns == ("b", "a")
    with pytest.raises(ConfigError, match="no audio column; it has table, text, image"):
        schema.column_of("audio")


def test_one_mean_counts_for_every_channel():
    grey = Schema.from_any(with_column({"modality": "image", "channels": 1, "mean": 0.25})).columns["photo"]
    colours = Schema.from_any(with_column({"modality": "image", "std": [0.1, 0.2, 0.3]})).columns["photo"]
    assert (grey.mean, colours.mean, colours.std) == ((0.25,), (0.5, 0.5, 0.5), (0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ([], "the schema is"),
        ({"label": "y"}, "no key 'columns'"),
        ({"columns": {"a": "table"}}, "no key 'label'"),
        ({"colums": {}, "label": "y"}, "did you mean 'columns'"),
        ({"columns": {}, "label": "y"}, "no columns"),
        ({"columns": ["a"], "label": "y"}, "schema columns is"),
        ({"columns": {1: "table"}, "label": "y"}, "the key 1; expected a text"),
        (with_column("imgae"), "did you mean 'image'"),
        (with_column({"modality": ["image"]}), "expected image or text"),
        (with_column(None), "schema column 'photo' is None"),
        (with_column({"size": 8}), "no key 'modality'"),
        (with_column({"modalty": "image"}), "no key 'modality', but 'modalty'"),
        (with_column({"modality": "image", "sise": 8}), "did you mean 'size'"),
        (with_column({"modality": "table", "size": 8}), "unknown key 'size'"),
        (with_column({"modality": "image", "name": "x"}), "unknown key 'name'"),
        (with_column({"modality": "image", "size": "8"}), "size is '8'; expected an integer"),
        (with_column({"modality": "image", "size": True}), "size is True"),
        (with_column({"modality": "image", "size": 0}), "size is 0"),
        (with_column({"modality": "image", "channels": 4}), "channels is 4; expected 1 or 3"),
        (with_column({"modality": "image", "std": 0}), "std is 0"),
        (with_column({"modality": "image", "mean": [0.5, 0.5]}), "how many numbers mean has is 2; expected 3"),
        (with_column({"modality": "image", "mean": 127.5}), "expected a number from 0 to 1"),
        (with_column({"modality": "image", "augment": True}), "augment is True; expected a mapping"),
        (with_column({"modality": "image", "augment": {"flip": True}}), "unknown key 'flip'"),
        (with_column({"modality": "image", "augment": {"horizontal_flip": 1}}), "expected true or false"),
        (with_column({"modality": "text", "tokenizer": ""}), "tokenizer is ''"),
        (with_column({"modality": "text", "vocab_size": 2}), "vocab_size is 2"),
        (with_column({"modality": "audio", "max_seconds": float("nan")}), "max_seconds is nan"),
        (with_column({"modality": "audio", "sample_rate": 16.0}), "sample_rate is 16.0"),
        (
            with_column({"modality": "audio", "mels": 8, "spec_augment": {"frequency": 9}}),
            "spec_augment.frequency is 9",
        ),
        (with_column({"modality": "series", "channels": -1}), "channels is -1"),
        ({"columns": {"a": "image", "b": "image"}, "label": "y"}, "'a' and 'b' are both image"),
        ({"columns": {"y": "table"}, "label": "y"}, "among the inputs too"),
        ({"columns": {"a": "table"}, "label": {"kind": "class"}}, "no key 'column'"),
        ({"columns": {"a": "table"}, "label": {"column": "y", "kind": "multi-label"}}, "did you mean 'multilabel'"),
        ({"columns": {"a": "table"}, "label": {"column": "y", "separator": ""}}, "separator is ''"),
        ({"columns": {"a": "table"}, "label": {"column": 3}}, "column is 3"),
        ({"columns": {"a": "table"}, "label": 3}, "schema label is 3"),
        ({"columns": {"a": "table"}, "label": "y", "key": 3}, "schema key is 3"),
        ({"columns": {"line": "table"}, "label": "y"}, "a column 'line'"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(schema, words):
    with pytest.raises(ConfigError) as caught:
        Schema.from_any(schema)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "can't be read"),
        ("columns: {a: [", "no YAML in line 1"),
        ("label: y\nlabel: z\n", "twice (line 2)"),
        ("- a\n", "schema.yaml"),
        ("columns: !!python/name:os.system\n", "only plain values"),
    ],
)
def test_a_file_that_is_no_schema(tmp_path, text, words):
    path = tmp_path / "schema.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Schema.from_any(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
