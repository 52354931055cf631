from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.colors import to_hex
from probe_cases import Autoencoder, Labels, Owned, trainer
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from ds_lightning.callbacks import EmbeddingMap
from ds_lightning.callbacks._embedding_picture import nearest, principal_plane
from ds_lightning.errors import ConfigError, NoEffectWarning


class Pictures(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.figures: dict[str, Any] = {}

    def log_figure(self, figure: Any, name: str) -> None:
        assert name not in self.figures
        figure.canvas.draw()
        self.figures[name] = figure


def test_the_plane_is_that_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 5, generator=generator) * torch.tensor([3.0, 1, 2, 0.5, 0.1]) + 4
    points, share = principal_plane(features)
    judge = PCA(2).fit(features.double().numpy())
    truth = torch.from_numpy(judge.transform(features.double().numpy()))
    assert torch.allclose(points.abs(), truth.abs(), atol=1e-8)
    assert share.tolist() == pytest.approx(judge.explained_variance_ratio_.tolist())
    # One feature has one direction; equal samples have none.
    line, one = principal_plane(torch.arange(4.0)[:, None])
    assert line[:, 1].tolist() == [0, 0, 0, 0]
    assert one.tolist() == [1, 0]
    assert principal_plane(torch.ones(3, 2))[0].abs().max() == 0


def test_neighbours_are_those_of_scikit_learn() -> None:
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    judge = NearestNeighbors(n_neighbors=4, metric="cosine").fit(features.numpy())
    assert nearest(features, 4).tolist() == judge.kneighbors(return_distance=False).tolist()


def test_a_fit_ends_with_a_map_and_neighbours(tmp_path: Path) -> None:
    logger, model, data = Pictures(), Autoencoder(), Labels()
    trainer(tmp_path, EmbeddingMap(samples=21, neighbours=4, queries=6), logger=logger).fit(model, data)
    assert sorted(logger.figures) == ["embedding_map", "nearest_neighbours"]
    # Three batches of 7 of the validation samples, once.
    assert model.asked == 21
    (axes,) = logger.figures["embedding_map"].axes
    assert [len(points.get_offsets()) for points in axes.collections] == [7, 7, 7]
    assert [points.get_label() for points in axes.collections] == ["first", "second", "third"]
    assert axes.get_title().startswith("21 samples, ")
    (grid,) = logger.figures["nearest_neighbours"].axes
    assert len(grid.images) == 6 * (1 + 4)
    assert [tick.get_text() for tick in grid.get_yticklabels()] == ["first"] * 2 + ["second"] * 2 + ["third"] * 2
    # The frames say what is true of the features.
    model.eval()
    with torch.no_grad():
        features = model.encoder(torch.stack([row["image"] for row in data.held[:21]]) * 2 - 1)
    label = torch.stack([row["label"] for row in data.held[:21]])
    same = label[nearest(features, 4)] == label[:, None]
    assert grid.get_title() == f"of the class of their sample, over all: {same.float().mean():.2f}"
    colours = [to_hex(patch.get_edgecolor()) for patch in grid.patches]
    assert len(colours) == 24
    assert set(colours) <= {"#1a9850", "#d73027"}
    if same.all():
        assert set(colours) == {"#1a9850"}


def test_tsne_keeps_neighbourhoods_and_training_is_not_touched(tmp_path: Path) -> None:
    logger = Pictures()
    ends = []
    for callbacks in ([], [EmbeddingMap("tsne", samples=30, data=Owned(noise=0.1))]):
        torch.manual_seed(4)
        model = Autoencoder()
        trainer(tmp_path, *callbacks, max_epochs=1, logger=logger).fit(model, Labels())
        ends.append((model.state_dict(), torch.get_rng_state()))
    assert all(torch.equal(ends[0][0][name], ends[1][0][name]) for name in ends[0][0])
    assert torch.equal(ends[0][1], ends[1][1])
    (axes,) = logger.figures["embedding_map"].axes
    assert axes.get_title() == "30 samples, t-SNE"
    points = torch.cat([torch.as_tensor(each.get_offsets().data) for each in axes.collections])
    kinds = torch.arange(3).repeat_interleave(10)
    near = torch.cdist(points, points).fill_diagonal_(torch.inf).argmin(dim=1)
    assert float((kinds[near] == kinds).float().mean()) > 0.8


def test_validate_alone_and_inputs_that_are_no_images(tmp_path: Path) -> None:
    class Flat(Labels):
        def plain(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"table": batch["image"].flatten(1), "label": batch["label"]}

    logger, model = Pictures(), Autoencoder()
    trainer(tmp_path, EmbeddingMap(), logger=logger).validate(model, Flat(), verbose=False)
    assert sorted(logger.figures) == ["embedding_map"]
    assert model.asked == 30


class Keeps(EmbeddingMap):
    def _figures(self, features: Any, label: Any, shown: Any, names: Any) -> Any:
        torch.save((features, label, shown), Path(self.root) / f"{self.ranks}.pt")
        return super()._figures(features, label, shown, names)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.root, self.ranks = trainer.default_root_dir, trainer.world_size
        if trainer.global_rank == 1:
            # Rank 1 need not have what rank 0 draws to.
            trainer.loggers = []


def test_two_ranks_draw_what_one_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Autoencoder()
    for options in ({}, {"devices": 2, "strategy": "ddp_fork"}):
        trainer(tmp_path, Keeps(samples=24), logger=Pictures(), **options).validate(model, Labels(), verbose=False)
    (one, label, shown), two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    assert len(one) == 24
    assert torch.allclose(two[0], one, atol=1e-6)
    assert torch.equal(two[1], label)
    assert torch.equal(two[2], shown)


def test_without_a_taker_it_draws_nothing_and_says_so(tmp_path: Path) -> None:
    model = Autoencoder()
    with pytest.warns(NoEffectWarning, match="EmbeddingMap drew nothing"):
        trainer(tmp_path, EmbeddingMap(), max_epochs=1).fit(model, Labels())
    assert model.asked == 0
    with pytest.warns(NoEffectWarning, match="2 labelled samples; expected at least 3"):
        trainer(tmp_path, EmbeddingMap(), logger=Pictures()).validate(model, Labels(held=2), verbose=False)


def test_errors_name_the_thing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kind is 'umap'; expected pca or tsne"):
        EmbeddingMap("umap")  # type: ignore[arg-type]
    for name, least in (("samples", 3), ("neighbours", 1), ("queries", 1)):
        with pytest.raises(ConfigError, match=f"{name} is 0; expected an integer >= {least}"):
            EmbeddingMap(**{name: 0})
    with pytest.raises(ConfigError, match="EmbeddingMap reads features from 'nothing', which Autoencoder does not"):
        trainer(tmp_path, EmbeddingMap(features="nothing")).fit(Autoencoder(), Labels())
