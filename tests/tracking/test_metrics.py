import math
import time

import numpy as np
import pytest
import torch

from ds_lightning.tracking.metrics import MetricRows


def test_numbers_of_all_kinds():
    before = int(time.time() * 1000)
    rows = MetricRows().rows(
        {"a": 1.5, "b": torch.tensor(2.5), "c": np.float32(0.5), "d": True, "e": torch.tensor([3]), "f": 7}, 4
    )
    assert [(key, value, step) for key, value, _, step in rows] == [
        ("a", 1.5, 4),
        ("b", 2.5, 4),
        ("c", 0.5, 4),
        ("d", 1.0, 4),
        ("e", 3.0, 4),
        ("f", 7.0, 4),
    ]
    assert all(before <= timestamp <= time.time() * 1000 for _, _, timestamp, _ in rows)
    assert math.isnan(MetricRows().rows({"x": float("nan")}, None)[0][1])
    assert MetricRows().rows({"x": 1.0}, None)[0][3] == 0


def test_a_name_is_cleaned_with_one_warning():
    converter = MetricRows()
    with pytest.warns(RuntimeWarning, match="'val/acc@5' is logged as 'val/acc5'") as caught:
        keys = [converter.rows({"val/acc@5": 1.0}, step)[0][0] for step in range(3)]
    assert keys == ["val/acc5"] * 3
    assert len(caught) == 1


def test_two_names_never_become_one():
    converter = MetricRows()
    with pytest.warns(RuntimeWarning):
        keys = [row[0] for row in converter.rows({"acc@5": 1.0, "acc#5": 2.0, "acc5": 3.0}, 0)]
    assert keys == ["acc5", "acc5_2", "acc5_3"]


def test_what_is_no_number_is_left_out_with_one_warning():
    converter = MetricRows()
    metrics = {"text": "high", "many": torch.ones(2), "good": 1.0}
    with pytest.warns(RuntimeWarning, match="is a str|is a Tensor") as caught:
        rows = converter.rows(metrics, 0) + converter.rows(metrics, 1)
    assert [row[0] for row in rows] == ["good", "good"]
    assert len(caught) == 2


def test_prefix():
    assert MetricRows("fold1").rows({"loss": 1.0}, 0)[0][0] == "fold1-loss"
