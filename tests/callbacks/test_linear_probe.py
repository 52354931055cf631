from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from probe_cases import CLASSES, Autoencoder, Labels, Owned, pictures, trainer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.utils.data import DataLoader

from ds_lightning.callbacks import LinearProbe
from ds_lightning.datamodules import ContrastiveViews, MNIST5k
from ds_lightning.errors import ConfigError, NoEffectWarning
from ds_lightning.modules import ContrastivePretraining


class Chance(pl.LightningDataModule):
    """Labels that have nothing to do with the images."""

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = [{**row, "label": torch.randint(CLASSES, (), generator=generator)} for row in pictures(600, 3)]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows[:300], batch_size=50)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows[300:], batch_size=50)


def table(model: Autoencoder, rows: list[dict[str, Tensor]]) -> tuple[Any, Any]:
    model.eval()
    with torch.no_grad():
        features = model.encoder(torch.stack([row["image"] for row in rows]) * 2 - 1)
    return features.numpy(), torch.stack([row["label"] for row in rows]).numpy()


def test_the_figures_are_those_of_scikit_learn(tmp_path: Path) -> None:
    data, model = Labels(300, 150, noise=2.0), Autoencoder()
    probe = LinearProbe(labels=(1.0,), knn=5, weight_decays=(0.01,))
    fit = trainer(tmp_path, probe, max_epochs=1)
    fit.fit(model, data)
    (x, label), (held, truth) = table(model, data.rows), table(model, data.held)
    mean, deviation = x.mean(0), x.std(0)
    judge = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-8, max_iter=5000).fit((x - mean) / deviation, label)
    expected = judge.score((held - mean) / deviation, truth)
    assert 0.4 < expected < 0.99
    # Float32 may see one sample on a border otherwise.
    assert float(fit.callback_metrics["probe/accuracy_100pct"]) == pytest.approx(expected, abs=0.01)

    def weight(distances: Any) -> Any:
        import numpy as np

        return np.exp((1 - distances) / 0.07)

    neighbours = KNeighborsClassifier(5, metric="cosine", algorithm="brute", weights=weight).fit(x, label)
    assert float(fit.callback_metrics["probe/knn"]) == pytest.approx(neighbours.score(held, truth), abs=0.01)


def test_training_ends_bit_equal_to_one_without_the_probe(tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [LinearProbe()]):
        torch.manual_seed(7)
        model = Autoencoder()
        trainer(tmp_path, *callbacks).fit(model, Labels())
        ends.append((model.state_dict(), torch.get_rng_state(), model))
    (plain, before, _), (probed, after, model) = ends
    assert all(torch.equal(plain[name], probed[name]) for name in plain)
    assert torch.equal(before, after)
    # All labelled samples in each of two epochs; none in the sanity check.
    assert model.asked == 2 * (60 + 30)
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_every_second_epoch_and_the_last_one_are_logged_and_can_be_monitored(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    best = ModelCheckpoint(tmp_path / "best", monitor="probe/accuracy_10pct", mode="max", every_n_epochs=2)
    model = Autoencoder()
    fit = trainer(
        tmp_path, LinearProbe(labels=(0.1, 1.0), every=2), best, max_epochs=3, logger=logger, enable_checkpointing=True
    )
    fit.fit(model, Labels())
    assert model.asked == 2 * 90
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    assert {"probe/accuracy_10pct", "probe/accuracy_100pct", "probe/knn"} <= set(names)
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    assert [row["epoch"] for row in rows if row["probe/knn"]] == ["1", "2"]
    assert float(best.best_model_score) >= 0.9
    saved = torch.load(best.best_model_path, weights_only=True)
    assert not any("Probe" in name for name in saved["callbacks"])


def test_a_resumed_fit_measures_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    def fit(epochs: int, start: Path | None = None) -> tuple[pl.Trainer, Autoencoder]:
        torch.manual_seed(3)
        model = Autoencoder()
        # Without dropout, and in order: the generators are another callback's business.
        model.encoder[3].p = 0.0
        data = Labels(noise=2.0)
        data.train_dataloader = data.val_dataloader  # type: ignore[method-assign]
        run = trainer(tmp_path, LinearProbe(labels=(0.2, 1.0)), max_epochs=epochs)
        run.fit(model, data, ckpt_path=start, weights_only=True)
        return run, model

    whole, _ = fit(3)
    first, _ = fit(2)
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = fit(3, tmp_path / "two.ckpt")
    names = {"probe/accuracy_20pct", "probe/accuracy_100pct", "probe/knn"}
    assert names <= set(whole.callback_metrics)
    for name in names:
        assert torch.equal(whole.callback_metrics[name], resumed.callback_metrics[name])


def test_data_of_its_own_any_module_and_no_validation(tmp_path: Path) -> None:
    found = {}
    for features in ("embed", "encoder", "encoder.2"):
        torch.manual_seed(0)
        model = Autoencoder()
        fit = trainer(tmp_path, LinearProbe(data=Owned(), features=features), max_epochs=1)
        fit.fit(model, DataLoader([{"image": row["image"]} for row in pictures(20, 5)], batch_size=10))
        found[features] = {name: float(value) for name, value in fit.callback_metrics.items() if "probe" in name}
        assert set(found[features]) == {
            *(f"probe/accuracy_{share}pct" for share in (1, 10, 100)),
            "probe/knn",
        }
        assert model.training
    # Dropout is off, so that all three are the same features.
    assert found["embed"] == found["encoder"] == found["encoder.2"]
    assert found["embed"]["probe/accuracy_100pct"] == 1.0


def test_views_of_our_data_and_our_pre_training(tmp_path: Path) -> None:
    data = ContrastiveViews(MNIST5k(train_size=200, val_fraction=0.02), batch_size=50, flip=False, color=0.4)
    model = ContrastivePretraining("resnet8", encoder_options={"width": 4})
    fit = trainer(tmp_path, LinearProbe(labels=(1.0,), knn=1), max_epochs=1, limit_train_batches=1)
    fit.fit(model, data)
    # The nearest neighbour by hand, of all samples without augmentation.
    base = MNIST5k(train_size=200, val_fraction=0.02)
    base.setup()
    train, held = (data.__getitems__(list(range(len(data)))) for data in (base.splits.train, base.splits.val))
    model.eval()
    with torch.no_grad():
        x, query = (torch.nn.functional.normalize(model.embed(base.normalize(part["image"]))) for part in (train, held))
    right = train["label"][(query @ x.T).argmax(dim=1)] == held["label"]
    assert float(fit.callback_metrics["probe/knn"]) == pytest.approx(float(right.float().mean()), abs=0.02)


def test_labels_without_a_meaning_give_chance(tmp_path: Path) -> None:
    # A leak of the validation labels would show here.
    fit = trainer(tmp_path, LinearProbe(data=Chance()), max_epochs=1)
    fit.fit(Autoencoder(), Labels())
    for name in ("probe/accuracy_10pct", "probe/accuracy_100pct", "probe/knn"):
        assert float(fit.callback_metrics[name]) == pytest.approx(1 / CLASSES, abs=0.12)


def test_validate_alone_maps_and_unlabelled_samples(tmp_path: Path) -> None:
    class Maps(Autoencoder):
        def embed(self, x: Tensor) -> Tensor:
            # Rows of the image as channels: the mean over places is the class.
            return x.transpose(1, 2)

    data = Labels(noise=0.0)
    for row in (*data.rows[:30], *data.held[:7]):
        row["label"] = torch.tensor(-1)
        row["image"].fill_(0.5)
    run = trainer(tmp_path, LinearProbe(labels=[1.0], knn=1))
    (found,) = run.validate(Maps(), data, verbose=False)
    assert found["probe/accuracy_100pct"] == found["probe/knn"] == 1.0


def test_mixed_precision_and_a_fast_run(tmp_path: Path) -> None:
    fit = trainer(tmp_path, LinearProbe(), fast_dev_run=1, precision="bf16-mixed")
    model = Autoencoder()
    fit.fit(model, Labels())
    assert "probe/accuracy_100pct" in fit.callback_metrics
    assert model.asked == 2 * 7


class Ranks(LinearProbe):
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        figures = {name: value.cpu() for name, value in trainer.callback_metrics.items() if "probe" in name}
        torch.save(figures, Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt")


class Still(Autoencoder):
    """Does not learn, so that one process and two have the same weights; and no more than its share is asked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
        self.decoder = torch.nn.Linear(4, 16)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_fit_end(self) -> None:
        if self.trainer.world_size == 2:
            # 9 and 5 batches of 7; the first of each goes through both ranks.
            assert self.asked == (5 * 7 + 3 * 7 - 3 - 5 if self.global_rank == 0 else 7 * 5 + 7 * 3)


def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    for folder, options in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        (tmp_path / folder).mkdir()
        trainer(tmp_path / folder, Ranks(labels=(0.1, 1.0)), max_epochs=1, **options).fit(Still(), Labels(noise=2.0))
    one = torch.load(tmp_path / "one" / "rank0.pt")
    assert len(one) == 3
    assert float(one["probe/accuracy_100pct"]) > 0.4
    for rank in (0, 1):
        two = torch.load(tmp_path / "two" / f"rank{rank}.pt")
        assert {name: float(value) for name, value in two.items()} == {k: float(v) for k, v in one.items()}


class Skips(Autoencoder):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Odd(Autoencoder):
    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def embed(self, x: Tensor) -> Tensor:
        return self.answer


def test_errors_name_the_thing(tmp_path: Path) -> None:
    for options, message in (
        ({"labels": [0.1, 1.5]}, r"labels is \[0.1, 1.5\]; expected shares in \(0, 1\]"),
        ({"every": 0}, "every is 0; expected an integer >= 1"),
        ({"knn": -1}, "knn is -1; expected an integer >= 0"),
        ({"labels": [], "knn": 0}, "nothing to measure"),
        ({"weight_decays": []}, r"weight_decays is \[\]; expected at least one"),
    ):
        with pytest.raises(ConfigError, match=message):
            LinearProbe(**options)
    with pytest.raises(ConfigError, match=r"LinearProbe needs labelled samples.*got NoneType.*give LinearProbe data="):
        trainer(tmp_path, LinearProbe()).fit(Autoencoder(), DataLoader(pictures(4, 0)))
    with pytest.raises(ConfigError, match=r"features from 'embed', which BoringModel does not have.*there are layer"):
        trainer(tmp_path, LinearProbe()).fit(BoringModel(), Labels())
    for odd, features, message in (
        (Skips(), "decoder", "features from 'decoder', which Skips does not run"),
        (Odd(torch.zeros(7, 2, 8)), "embed", r"'embed' gave \(7, 2, 8\); LinearProbe expected features \(7, D\)"),
        (Odd(torch.full((7, 2), torch.nan)), "embed", "'embed' gave NaN"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer(tmp_path, LinearProbe(features=features)).validate(odd, Labels(14, 7), verbose=False)
    with pytest.raises(ConfigError, match=r"class indices \(B,\) in `label`; the batch has none"):
        trainer(tmp_path, LinearProbe(data=Labels())).validate(Autoencoder(), Labels(), verbose=False)


def test_it_says_so_when_nothing_was_measured(tmp_path: Path) -> None:
    with pytest.warns(NoEffectWarning, match="LinearProbe measured nothing"):
        trainer(tmp_path, LinearProbe(), max_epochs=0).fit(Autoencoder(), Labels())
