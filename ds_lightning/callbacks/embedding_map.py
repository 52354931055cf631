"""What lies near what in an embedding, as pictures."""

from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from ds_lightning.errors import ConfigError, NoEffectWarning
from ds_lightning.functional.probes import label_subset
from ds_lightning.functional.seeds import derived_seed

from ._figures import figure_writers
from ._frozen_features import LabelledSource, feature_reader

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class EmbeddingMap(pl.Callback):
    """Show validation samples as points of a plane, coloured by class, and images with their nearest neighbours.

    **When it acts.** When the fit ends, and when `trainer.validate` ends.

    **What it changes.** Nothing: the module goes to eval mode and back, and the generators stay as they were.

    **What it logs.** Two pictures to every logger that has `log_figure`: `embedding_map`, the plane of the largest
    variance (`pca`, with its share) or t-SNE's; and, of images, `nearest_neighbours`: a row for each query with the
    nearest other samples by cosine, framed green where the class is the same and red where it is not. Its title
    has the share of same-class neighbours over all samples.

    **Checkpoint.** Nothing is kept.

    **Limits.** Samples come in the loader's order, from its beginning. A t-SNE map keeps neighbourhoods, not distances.
    Loggers without `log_figure` get nothing.

    **Cost.** The forward pass of `samples` samples, a second for the pictures, and for t-SNE of 1,000 samples about
    three seconds more.

    Args:
        kind: `pca`, or `tsne` from scikit-learn.
        samples: the most samples, at least 3.
        neighbours: shown of each query, at least 1.
        queries: rows of the picture of neighbours, spread over the classes, at least 1.
        data: a DataModule with labels in its validation batches. None takes `labelled_loaders()` of the trainer's, as
            `ContrastiveViews` has.
        features: a method of the module, called with the input, which gives (B, D); or a submodule, such as
            `network.pool`, whose output is taken while the module runs.
        seed: of t-SNE and the choice of the queries.

    Raises:
        ConfigError: an argument out of its range; at the start no labelled samples or no such features.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[EmbeddingMap(samples=500)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        kind: Literal["pca", "tsne"] = "pca",
        samples: int = 1000,
        neighbours: int = 5,
        queries: int = 10,
        data: pl.LightningDataModule | None = None,
        features: str = "embed",
        seed: int = 0,
    ) -> None:
        if kind not in ("pca", "tsne"):
            raise ConfigError(f"kind is {kind!r}; expected pca or tsne")
        for name, value, least in (("samples", samples, 3), ("neighbours", neighbours, 1), ("queries", queries, 1)):
            if value < least:
                raise ConfigError(f"{name} is {value}; expected an integer >= {least}")
        self.kind = kind
        self.samples = samples
        self.neighbours = neighbours
        self.queries = queries
        self.features = features
        self.seed = seed
        self._source = LabelledSource("EmbeddingMap", data)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the data."""
        if stage in ("fit", "validate"):
            self._source.setup(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a module without the features, now that it is built."""
        feature_reader(pl_module, self.features, "EmbeddingMap")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw when this is no part of a fit."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, while the module is still on its device."""
        self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        writers = figure_writers(trainer)
        # The features are read together, and the other ranks may have other loggers.
        if not trainer.strategy.broadcast(bool(writers), src=0):
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                rank_zero_warn("EmbeddingMap drew nothing: no logger has `log_figure`", category=NoEffectWarning)
            return
        _, loader = self._source.loaders(trainer)
        found = self._source.read(trainer, module, loader, self.features, show=self.samples)
        if not trainer.is_global_zero:
            return
        # Outside of inference mode they were made: nothing here may be one of its tensors.
        features, label = found.features.cpu(), found.label.cpu()
        if len(features) < 3:
            rank_zero_warn(
                f"EmbeddingMap drew nothing: {len(features)} labelled samples; expected at least 3",
                category=NoEffectWarning,
            )
            return
        if not bool(features.isfinite().all()):
            rank_zero_warn(f"EmbeddingMap drew nothing: {self.features!r} gave NaN or infinite features")
            return
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        for name, figure in self._figures(features, label, found.shown, names).items():
            for log_figure in writers:
                log_figure(figure, name)

    def _figures(self, features: Any, label: Any, shown: Any, names: Any) -> "dict[str, Figure]":
        from ._embedding_picture import class_map, nearest, neighbour_grid, principal_plane, tsne_plane

        if self.kind == "pca":
            points, share = principal_plane(features)
            title = f"{len(features)} samples, {100 * float(share.sum()):.0f}% of the variance"
        else:
            points, title = tsne_plane(features, self.seed), f"{len(features)} samples, t-SNE"
        figures = {"embedding_map": class_map(points, label, names, title)}
        if shown is not None and shown.dim() == 4:
            neighbours = nearest(features, min(self.neighbours, len(features) - 1))
            share_of_all = min(1.0, self.queries / len(features))
            spread = label_subset(label, share_of_all, derived_seed(self.seed, "queries"))
            rows = spread[label[spread].argsort(stable=True)][: self.queries].tolist()
            figures["nearest_neighbours"] = neighbour_grid(shown, label, neighbours, rows, names)
        return figures
