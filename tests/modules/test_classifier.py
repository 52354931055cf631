import math
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning.errors import ConfigError
from ds_lightning.modules import Classifier

CLASSES = 3
X = torch.randn(22, 1, 12, 12, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, CLASSES, (22,), generator=torch.Generator().manual_seed(2))


def loader(batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=batch_size)


def small(**kwargs: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier("resnet8", CLASSES, in_channels=1, network_options={"width": 4}, **kwargs)


def trainer(tmp_path: Any, **kwargs: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(**{"max_epochs": 1, "default_root_dir": tmp_path, "accelerator": "cpu", **quiet, **kwargs})


class Data(L.LightningDataModule):
    num_classes, class_names, input_shape = CLASSES, ["a", "b", "c"], (1, 12, 12)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def test_metrics_equal_scikit_learn_over_the_epoch(tmp_path: Any) -> None:
    model = small()
    (logged,) = trainer(tmp_path).validate(model, loader(), verbose=False)
    with torch.no_grad():
        logits = model.eval()(X)
    predicted = logits.argmax(1)
    assert logged["val/accuracy"] == pytest.approx((predicted == Y).float().mean().item())
    assert logged["val/f1"] == pytest.approx(f1_score(Y, predicted, average="macro"), abs=1e-6)
    assert logged["val/loss"] == pytest.approx(F.cross_entropy(logits, Y).item(), abs=1e-5)
    assert logged["val/calibration_error"] == pytest.approx(calibration_error(logits.softmax(1), Y), abs=1e-5)


def calibration_error(probabilities: Tensor, label: Tensor, bins: int = 15) -> float:
    confidence, predicted = probabilities.max(1)
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            gap = confidence[inside].mean() - (predicted == label)[inside].float().mean()
            total += inside.float().mean().item() * abs(gap.item())
    return total


def mixed_batch() -> dict[str, Tensor]:
    mix = torch.linspace(0, 1, len(X))
    return {"image": X, "label": Y, "label_mixed": Y.roll(1), "mix": mix}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_loss_and_accuracy_equal_a_loop(smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = small(label_smoothing=smoothing), mixed_batch()
    logged: dict[str, Tensor] = {}
    monkeypatch.setattr(model, "log", lambda name, value, **_: logged.update({name: value}))
    loss = model.training_step(batch, 0)
    with torch.no_grad():
        logits = model(X)
    losses, hits = [], []
    for row, a, b, share in zip(logits, batch["label"], batch["label_mixed"], batch["mix"], strict=True):
        target = share * one_hot(a, smoothing) + (1 - share) * one_hot(b, smoothing)
        losses.append(-(target * row.log_softmax(0)).sum())
        hits.append(share * (row.argmax() == a) + (1 - share) * (row.argmax() == b))
    torch.testing.assert_close(loss.detach(), torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logged["train/accuracy"], torch.stack(hits).mean(), rtol=1e-5, atol=1e-6)


def one_hot(label: Tensor, smoothing: float) -> Tensor:
    return F.one_hot(label, CLASSES) * (1 - smoothing) + smoothing / CLASSES


def test_unmixed_is_the_plain_loss_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    batch = {**mixed_batch(), "mix": torch.ones(len(X))}
    assert torch.equal(model.training_step(batch, 0), model.training_step((X, Y), 0))


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"image": X, "label": F.one_hot(Y, CLASSES).float()}, "Soft targets make accuracy wrong"),
        ({**mixed_batch(), "label_mixed": torch.rand(22)}, "label_mixed has the shape"),
        ({"image": X}, r"expected `label` among them"),
        ({"image": X, "audio": X, "label": Y}, "expected exactly one of"),
        ("no batch", "expected a dictionary of tensors"),
    ],
)
def test_a_wrong_batch_is_refused(batch: Any, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        small().training_step(batch, 0)


def test_what_is_not_given_comes_from_the_data_and_stays_in_the_checkpoint(tmp_path: Any) -> None:
    model = Classifier("resnet8", network_options={"width": 4}, lr_scheduler="cosine")
    run = trainer(tmp_path)
    run.fit(model, datamodule=Data())
    run.save_checkpoint(tmp_path / "c.ckpt")
    assert torch.load(tmp_path / "c.ckpt", weights_only=True)["hyper_parameters"]["num_classes"] == CLASSES
    again = Classifier.load_from_checkpoint(tmp_path / "c.ckpt", weights_only=True)
    torch.testing.assert_close(again.eval()(X), model.eval()(X))
    probabilities = torch.cat(trainer(tmp_path).predict(again, datamodule=Data()))
    torch.testing.assert_close(probabilities, again(X).softmax(1))


def test_a_users_network_and_loader(tmp_path: Any) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(144, CLASSES))
    model = Classifier(network, CLASSES, optimizer=partial(torch.optim.AdamW, lr=0.01))
    run = trainer(tmp_path, max_epochs=30)
    run.fit(model, loader())
    # 22 random points in 144 dimensions can be told apart by a plane.
    assert run.callback_metrics["train/accuracy"] == 1.0
    run.save_checkpoint(tmp_path / "c.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "c.ckpt", network=network, weights_only=True)
    assert again.num_classes == CLASSES


def test_a_subclass_overrides_the_loss_alone(tmp_path: Any) -> None:
    class Focal(Classifier):
        def loss(self, logits: Tensor, label: Tensor) -> Tensor:
            log_p = F.log_softmax(logits, 1).gather(1, label[:, None])[:, 0]
            return -((1 - log_p.exp()) ** 2) * log_p

    torch.manual_seed(0)
    model = Focal("resnet8", CLASSES, in_channels=1, network_options={"width": 4})
    (logged,) = trainer(tmp_path).validate(model, loader(), verbose=False)
    p = model.eval()(X).softmax(1)[torch.arange(len(Y)), Y]
    assert logged["val/loss"] == pytest.approx((-((1 - p) ** 2) * p.log()).mean().item(), abs=1e-5)


def test_cosine_ends_at_zero_with_accumulation(tmp_path: Any) -> None:
    model = small(lr_scheduler="cosine", optimizer=partial(torch.optim.SGD, lr=0.5))
    rates: list[float] = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, opt: Any) -> None:
            rates.append(opt.param_groups[0]["lr"])

    run = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=[Watch()])
    run.fit(model, loader())
    # 3 batches an epoch, 2 a step: 2 steps an epoch, 4 in all.
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 4)) for step in range(4)])
    assert model.optimizers().param_groups[0]["lr"] == pytest.approx(0.0)


def test_a_scheduler_by_epoch_and_one_that_watches(tmp_path: Any) -> None:
    from lightning.pytorch.cli import ReduceLROnPlateau

    model = small(
        optimizer=partial(torch.optim.SGD, lr=0.4),
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
    )
    trainer(tmp_path, max_epochs=2).fit(model, loader())
    assert model.optimizers().param_groups[0]["lr"] == pytest.approx(0.1)
    model = small(
        optimizer=partial(torch.optim.SGD, lr=0.0, momentum=0.9),
        lr_scheduler=partial(ReduceLROnPlateau, monitor="val/loss", patience=0, factor=0.5),
    )
    trainer(tmp_path, max_epochs=3).fit(model, loader(), loader())


class Pictures(L.pytorch.loggers.CSVLogger):
    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self.matrices: dict[str, tuple[Tensor, list[str]]] = {}

    def log_confusion_matrix(self, matrix: Tensor, class_names: list[str], stage: str) -> None:
        self.matrices[stage] = (matrix, class_names)


def test_the_confusion_matrix_of_the_last_epoch_reaches_the_logger(tmp_path: Any) -> None:
    logger, model = Pictures(tmp_path), small()
    run = trainer(tmp_path, max_epochs=2, logger=logger, log_every_n_steps=1)
    run.fit(model, datamodule=Data())
    run.test(model, datamodule=Data(), verbose=False)
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.long)
    for true, predicted in zip(Y, model.eval()(X).argmax(1), strict=True):
        expected[true, predicted] += 1
    for stage in ("val", "test"):
        matrix, names = logger.matrices[stage]
        assert matrix.tolist() == expected.tolist()
        assert names == ["a", "b", "c"]


def test_the_confusion_matrix_is_added_up_before_the_module_leaves_its_device(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, model = Pictures(tmp_path), small()
    run = trainer(tmp_path, max_epochs=1, logger=logger)
    known: list[list[str]] = []
    teardown = run.strategy.teardown

    def spied() -> None:
        known.append(list(logger.matrices))
        teardown()

    monkeypatch.setattr(run.strategy, "teardown", spied)
    run.fit(model, datamodule=Data())
    assert known == [["val"]]


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"num_classes": 1}, "num_classes is 1; expected at least 2"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1.0; expected a share in \[0, 1\)"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler is 'cosin'; expected 'cosine'"),
    ],
)
def test_wrong_arguments_are_named(kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Classifier("resnet8", **kwargs)


def test_nobody_tells_the_number_of_classes(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="num_classes is neither given nor known from the DataModule"):
        trainer(tmp_path).fit(Classifier("resnet8"), loader())


class Fixed(nn.Module):
    """Logits that are given."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[: len(x)]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_restricted_loss_is_that_of_a_smaller_head(smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    allowed = torch.tensor([[True, False, True, False]] * 2 + [[True] * 4] * 2 + [[False, True, True, True]] * 2)
    label = torch.tensor([0, 2, 1, 3, 3, 1])
    model = Classifier(Fixed(logits.clone()), 4, label_smoothing=smoothing)
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    loss = model.training_step({"image": torch.zeros(6, 1), "label": label, "allowed": allowed}, 0)
    loss.backward()

    total, mine = torch.zeros((), dtype=torch.float64), logits.clone().requires_grad_()
    for row in range(6):
        kept = allowed[row].nonzero()[:, 0]
        small = mine[row, kept][None]
        target = (kept == label[row]).nonzero()[:, 0]
        total = total + F.cross_entropy(small, target, label_smoothing=smoothing) / 6
    total.backward()
    assert torch.allclose(loss, total, rtol=1e-12)
    assert isinstance(model.network, Fixed)
    assert torch.allclose(model.network.logits.grad, mine.grad, rtol=1e-10, atol=1e-14)


def test_evaluation_and_prediction_keep_to_the_allowed_outputs(tmp_path: Any) -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0], [5.0, 0.0, 2.0], [1.0, 2.0, 9.0]])
    batch = {
        "image": torch.zeros(3, 1),
        "label": torch.tensor([1, 2, 1]),
        "allowed": torch.tensor([[False, True, True], [False, True, True], [True, True, False]]),
    }
    model, data = Classifier(Fixed(logits), 3, label_smoothing=0.1), DataLoader([batch], batch_size=None)
    (logged,) = trainer(tmp_path).validate(model, data, verbose=False)
    assert logged["val/accuracy"] == 1.0
    assert math.isfinite(logged["val/loss"])
    (probability,) = trainer(tmp_path).predict(model, data)
    assert torch.equal(probability == 0, ~batch["allowed"])
    assert probability.sum(1).tolist() == pytest.approx([1.0] * 3)


def test_smoothing_without_restriction_is_torchs() -> None:
    logits, label = torch.randn(7, 3), torch.randint(0, 3, (7,))
    expected = F.cross_entropy(logits, label, reduction="none", label_smoothing=0.2)
    assert torch.allclose(small(label_smoothing=0.2).loss(logits, label), expected, atol=1e-6)
