import enum
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name

from ds_lightning.tracking.params import Params, clean_name, flatten, plain


@dataclass
class Size:
    width: int
    height: int


def test_flatten():
    params = {
        "a": {"b": {"c": 1}},
        "n": Namespace(x=2),
        "s": Size(3, 4),
        "empty": {},
        "list": [1, 2],
        "calls": [{"class_path": "EWC"}, {"class_path": "Prune", "init_args": {"to": 0.5}}],
        "none": None,
    }
    assert flatten(params) == {
        "a.b.c": 1,
        "n.x": 2,
        "s.width": 3,
        "s.height": 4,
        "empty": "{}",
        "list": [1, 2],
        "calls.0.class_path": "EWC",
        "calls.1.class_path": "Prune",
        "calls.1.init_args.to": 0.5,
        "none": None,
    }


@given(st.text(max_size=300))
@settings(deadline=None, max_examples=200)
def test_mlflow_takes_every_cleaned_name(name):
    cleaned = clean_name(name)
    _validate_metric_name(cleaned)
    assert 0 < len(cleaned) <= 250


@pytest.mark.parametrize("name", ["val/loss", "a.b-c d_e:f", "train/loss/x"])
def test_good_names_stay(name):
    assert clean_name(name) == name


def test_a_parameter_is_logged_once_and_its_change_becomes_a_tag():
    params = Params({"lr": "0.1"})
    assert params.add({"lr": 0.2, "width": 3}) == ([("width", "3")], {"changed.lr": "0.2"})
    assert params.add({"lr": 0.1, "width": 3}) == ([], {})


def test_a_long_value_is_cut_with_a_warning():
    with pytest.warns(RuntimeWarning, match="'text' has 7,000 characters"):
        new, _ = Params().add({"text": "x" * 7000, "short": "y" * 6000})
    assert [len(value) for _, value in new] == [6000, 6000]


def test_plain_is_yaml():
    class Colour(enum.StrEnum):
        RED = "red"

    value = {"p": Path("/tmp/x"), "c": Size, "e": Colour.RED, "s": Size(1, 2), "t": (1, None, True), "f": 1.5}
    read = yaml.safe_load(yaml.safe_dump(plain(value)))
    assert read == {
        "p": "/tmp/x",
        "c": f"{__name__}.Size",
        "e": "red",
        "s": {"width": 1, "height": 2},
        "t": [1, None, True],
        "f": 1.5,
    }
