import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.utils.data import DataLoader

from ds_lightning.callbacks import EpisodePictures
from ds_lightning.errors import ConfigError, NoEffectWarning

WAYS, SHOTS, QUERIES, TASKS = 3, 2, 4, 3


def episode(number: int, channels: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)

    def part(samples: int) -> dict[str, Tensor]:
        label = torch.arange(WAYS).repeat_interleave(samples)
        return {"image": torch.rand(len(label), channels, 6, 6, generator=generator), "label": label}

    return {"support": part(SHOTS), "query": part(QUERIES), "classes": torch.tensor([4, 0, 2])}


class Guess(pl.LightningModule):
    """Says class 0 after no step, and the truth but for the first query after two; any LightningModule will do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.asked: list[int] = []

    def predictions(self, batch: Any) -> Tensor:
        assert torch.is_grad_enabled()
        assert not batch["query"]["image"].is_inference()
        self.asked.append(len(batch["query"]["label"]))
        label = batch["query"]["label"].clone()
        first = torch.nn.functional.one_hot(torch.zeros_like(label), WAYS).float()
        label[:, 0] = 1
        return torch.stack([first, first, torch.nn.functional.one_hot(label, WAYS).float()]) + torch.rand(()) * 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for step in range(3):
            self.log(f"val/accuracy_after_{step}", 0.25 * (step + 1), batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/accuracy", 0.5, batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Figures(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.figures: dict[str, Any] = {}
        self.count = 0

    def log_figure(self, figure: Any, name: str) -> None:
        self.figures[name] = figure
        self.count += 1


def loader(tasks: int = 6, channels: int = 1) -> DataLoader[Any]:
    return DataLoader([episode(number, channels) for number in range(tasks)], batch_size=TASKS)


def trainer(logger: Any, callback: EpisodePictures, tmp_path: Any, **options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(
        **{"max_epochs": 2, "accelerator": "cpu", "default_root_dir": tmp_path, **quiet, **options},
        logger=logger,
        callbacks=[callback],
    )


def frames(axes: Any) -> list[str]:
    from matplotlib.colors import to_hex

    return [to_hex(patch.get_edgecolor()) for patch in axes.patches]


def test_a_fit_ends_with_the_last_validations_pictures(tmp_path: Any) -> None:
    logger, model = Figures(), Guess()
    trainer(logger, EpisodePictures(episodes=2), tmp_path).fit(model, loader(), loader())
    assert sorted(logger.figures) == ["adaptation_val", "episodes_val"]
    assert logger.count == 2
    # Once in each of two validations, of two tasks; the sanity check is no validation.
    assert model.asked == [2, 2]
    picture = logger.figures["episodes_val"]
    assert len(picture.axes) == 2
    for axes in picture.axes:
        colours = frames(axes)
        assert len(colours) == WAYS * QUERIES
        # One query of each task is said to be of class 1, whose name in the data is 0.
        assert colours.count("#d73027") == 1
        assert [text.get_text() for text in axes.texts] == ["0"]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["4", "0", "2"]
        assert axes.get_title() == f"accuracy of the query set {11 / 12:.2f}"
        assert len(axes.images) == WAYS * (SHOTS + QUERIES)
    (line,) = logger.figures["adaptation_val"].axes[0].lines
    assert line.get_xdata().tolist() == [0, 1, 2]
    assert line.get_ydata().tolist() == pytest.approx([0.25, 0.5, 0.75])


def test_fewer_samples_names_and_colours(tmp_path: Any) -> None:
    class Data(pl.LightningDataModule):
        class_names = ("zero", "one", "two", "three", "a name that is far too long")

        def test_dataloader(self) -> DataLoader[Any]:
            return loader(channels=3)

    logger = Figures()
    trainer(logger, EpisodePictures(episodes=1, shots=1, queries=3), tmp_path).test(Guess(), Data(), verbose=False)
    # No figure after each step was logged in the test.
    assert sorted(logger.figures) == ["episodes_test"]
    (axes,) = logger.figures["episodes_test"].axes
    assert len(axes.images) == WAYS * (1 + 3)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a name that is …", "zero", "two"]
    shown = axes.images[0].get_array()
    first = episode(0, 3)
    everything = torch.cat([first["support"]["image"], first["query"]["image"]])
    scaled = (first["support"]["image"][0] - everything.min()) / (everything.max() - everything.min())
    assert torch.allclose(torch.as_tensor(shown), scaled.permute(1, 2, 0), atol=1e-6)


def test_regression_is_drawn_as_curves(tmp_path: Any) -> None:
    class Line(Guess):
        def predictions(self, batch: Any) -> Tensor:
            target = batch["query"]["target"]
            return torch.stack([target * 0, target + 0.5])

    def wave(number: int) -> dict[str, Any]:
        x = torch.linspace(3, -3, 8)[:, None]
        return {name: {"table": x, "target": torch.sin(x + number)} for name in ("support", "query")}

    logger = Figures()
    data = DataLoader([wave(number) for number in range(2)], batch_size=2)
    trainer(logger, EpisodePictures(), tmp_path).validate(Line(), data, verbose=False)
    axes = logger.figures["episodes_val"].axes
    assert [part.get_title() for part in axes] == ["mean squared error 0.25"] * 2
    lines = {line.get_label(): line for line in axes[1].lines}
    assert set(lines) == {"truth", "before", "adapted", "support"}
    x = torch.linspace(-3, 3, 8)
    assert lines["adapted"].get_xdata() == pytest.approx(x.numpy())
    assert lines["adapted"].get_ydata() == pytest.approx((torch.sin(x + 1) + 0.5).numpy(), abs=1e-6)


def test_it_does_not_touch_the_generator(tmp_path: Any) -> None:
    class Random(Guess):
        def predictions(self, batch: Any) -> Tensor:
            torch.rand(10)
            return super().predictions(batch)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    trainer(Figures(), EpisodePictures(), tmp_path).validate(Random(), loader(), verbose=False)
    with_pictures = torch.get_rng_state()
    torch.set_rng_state(before)
    trainer(False, EpisodePictures(), tmp_path).validate(Random(), loader(), verbose=False)
    assert torch.equal(with_pictures, torch.get_rng_state())


def test_without_a_taker_nothing_is_predicted_and_it_says_so(tmp_path: Any) -> None:
    model = Guess()
    with pytest.warns(NoEffectWarning, match="EpisodePictures drew nothing"):
        trainer(False, EpisodePictures(), tmp_path).fit(model, loader(), loader())
    assert model.asked == []


def test_errors_name_the_thing(tmp_path: Any) -> None:
    for name in ("episodes", "shots", "queries"):
        with pytest.raises(ConfigError, match=f"{name} is 0; expected at least 1"):
            EpisodePictures(**{name: 0})
    with pytest.raises(ConfigError, match=r"needs a module with `predictions\(batch\)`.*BoringModel has none"):
        trainer(Figures(), EpisodePictures(), tmp_path).validate(BoringModel())


def test_pictures_can_be_written() -> None:
    from ds_lightning.callbacks._episode_picture import episode_grid, score_by_step

    (batch,) = loader(tasks=3)
    figure = episode_grid(batch, torch.zeros(3, WAYS * QUERIES, WAYS), None, 5, 10)
    figure.canvas.draw()
    pixels = torch.from_numpy(np.array(figure.canvas.buffer_rgba()))
    # Green frames of the class that all zeros give, red ones of the others.
    for colour in ((0x1A, 0x98, 0x50), (0xD7, 0x30, 0x27)):
        near = (pixels[..., :3].int() - torch.tensor(colour)).abs().amax(-1) < 12
        assert int(near.sum()) > 50
    drawn = score_by_step({0: 0.2, 100: 0.9, 10: 0.8}, "accuracy")
    drawn.canvas.draw()
    assert math.isclose(drawn.axes[0].lines[0].get_ydata()[-1], 0.9)
