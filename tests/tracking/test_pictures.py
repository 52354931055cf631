import sys

import matplotlib.figure
import pytest
import torch

from ds_lightning.tracking.curves import Curves
from ds_lightning.tracking.pictures import confusion_files, confusion_matrix, learning_curves, png

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_confusion_matrix_shows_shares_of_the_true_class(classes):
    counts = torch.eye(classes) * 3 + torch.roll(torch.eye(classes), 1, dims=1)
    counts[-1] = 0
    figure = confusion_matrix(counts, [f"class {i}" for i in range(classes)], "val")
    axes = figure.axes[0]
    shown = axes.images[0].get_array()
    assert shown[0, 0] == pytest.approx(0.75)
    assert shown[-1].sum() == 0
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    total, hits = 4 * (classes - 1), 3 * (classes - 1)
    assert f"accuracy {hits / total:.1%} of {total}" in axes.get_title()
    # Numbers only where they can be read, and never more than 50 names at a side.
    assert (len(axes.texts) > 0) == (classes <= 20)
    assert len(axes.get_xticks()) <= 50
    assert png(figure).startswith(PNG)


def test_confusion_matrix_checks_its_shape():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and there are 2 class_names"):
        confusion_matrix(torch.zeros(2, 3), ["a", "b"])


def test_confusion_files():
    files = confusion_files(torch.tensor([[1, 2], [3, 4]]), ["a", "b"], "test")
    assert files["pictures/confusion_matrix_test.png"].startswith(PNG)
    expected = b'{"classes": ["a", "b"], "rows": "true class", "matrix": [[1, 2], [3, 4]]}'
    assert files["confusion_matrix_test.json"] == expected


def test_learning_curves_put_stages_into_one_panel():
    curves = Curves()
    for step in range(200):
        curves.add_rows([("train/loss_step", 1 / (step + 1), 0, step), ("system/cpu", 1.0, 0, step)])
    for step in (100, 199):
        curves.add_rows([("train/loss_epoch", 0.5, 0, step), ("val/loss", float("nan"), 0, step)])
        curves.add_rows([("val_acc", 0.5, 0, step), ("train_acc", 0.6, 0, step), ("epoch", 1.0, 0, step)])
    curves.add_rows([("test/loss", 0.4, 0, 199), ("lonely", 1.0, 0, 0)])
    figure = learning_curves(curves)
    panels = {axes.get_title(): {t.get_text() for t in axes.get_legend().get_texts()} for axes in figure.axes}
    assert panels == {
        "loss": {"train/loss_step", "train/loss_epoch", "val/loss", "test/loss"},
        "acc": {"val_acc", "train_acc"},
    }
    assert png(figure).startswith(PNG)


def test_nothing_to_draw():
    assert learning_curves(Curves()) is None


def test_pictures_leave_pyplot_alone():
    figure = matplotlib.figure.Figure()
    canvas = figure.canvas
    assert png(figure).startswith(PNG)
    assert figure.canvas is canvas
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
