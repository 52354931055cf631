from functools import partial

import numpy as np
import pytest
import torch
from layer_lr_cases import LAYERS, RULE, Recorder, User, images, trainer_of
from test_layer_lr import Memory
from torch.optim import SGD

from ds_lightning.callbacks import DynamicLayerLR
from ds_lightning.callbacks._layer_history import MAX_COLUMNS, LayerHistory
from ds_lightning.callbacks._layer_picture import multiplier_map

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(GPU available|does not have many workers|`LeafSpec`|litlogger|num_workers|log_every_n_steps).*"
)


class Album(Memory):
    def __init__(self) -> None:
        super().__init__()
        self.figures = {}

    def log_figure(self, figure, name):
        self.figures[name] = figure


def test_a_fit_ends_with_its_picture():
    album, recorder = Album(), Recorder()
    trainer_of(DynamicLayerLR(**RULE), recorder, logger=album).fit(User(partial(SGD, lr=0.05)), images())
    (figure,) = album.figures.values()
    assert list(album.figures) == ["layer_lr/multipliers"]
    axes = figure.axes[0]
    (mesh,) = axes.collections
    used = recorder.multipliers[:: RULE["every"]]  # those of the steps that read
    expected = np.array([[row[name] for row in used] for name in LAYERS])
    np.testing.assert_allclose(mesh.get_array().reshape(expected.shape), expected, rtol=1e-6)
    assert mesh.norm(1.0) == pytest.approx(0.5)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(LAYERS)
    assert mesh.get_coordinates()[0, :, 0].tolist() == [*range(0, 30, 4), 32]
    figure.canvas.draw()


def test_a_resumed_fit_has_the_whole_picture(tmp_path):
    half = trainer_of(DynamicLayerLR(**RULE), epochs=3)
    half.fit(User(), images())
    half.save_checkpoint(tmp_path / "half.ckpt")
    whole, resumed = Album(), Album()
    trainer_of(DynamicLayerLR(**RULE), epochs=6, logger=whole).fit(User(), images())
    trainer_of(DynamicLayerLR(**RULE), epochs=6, logger=resumed).fit(User(), images(), ckpt_path=tmp_path / "half.ckpt")
    drawn = [album.figures["layer_lr/multipliers"].axes[0].collections[0].get_array() for album in (whole, resumed)]
    assert drawn[0].shape == (3, 9)
    assert np.array_equal(*drawn)


def test_history_is_thinned_evenly_across_a_resume():
    history = LayerHistory()
    for reading in range(3000):
        if reading == 1234:
            history = LayerHistory(**history.state_dict())
        history.add(10 * reading, {"a": 1.0 + reading})
        assert len(history.steps) <= MAX_COLUMNS
    assert history.steps == list(range(0, 30000, 10 * history.stride))
    assert history.values[:, 0].tolist() == [1.0 + step / 10 for step in history.steps]
    assert len(history.steps) > MAX_COLUMNS / 2


def test_layers_that_come_and_go_have_gaps():
    history = LayerHistory()
    history.add(0, {"a": 1.0, "b": 2.0})
    history.add(10, {"c": 0.5, "a": 3.0})
    expected = torch.tensor([[1.0, 2.0, float("nan")], [3.0, float("nan"), 0.5]])
    torch.testing.assert_close(history.values, expected, equal_nan=True)
    multiplier_map(history).canvas.draw()


def test_many_layers_and_no_change_can_be_drawn():
    history = LayerHistory()
    for step in (0, 10):
        history.add(step, {f"layer{i}": 1.0 for i in range(150)})
    figure = multiplier_map(history)
    figure.canvas.draw()
    assert len(figure.axes[0].get_yticklabels()) == 50
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["0.95", "0.98", "1.00", "1.02", "1.05"]
