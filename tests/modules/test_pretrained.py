from functools import partial
from pathlib import Path
from typing import Any

import contrastive_cases as cases
import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ds_lightning.cli import main
from ds_lightning.errors import ConfigError, DataError
from ds_lightning.modules import Classifier, ContrastivePretraining
from ds_lightning.networks import backbone

CLASSES = 3
LABELS = torch.arange(cases.SAMPLES) % CLASSES
IMAGES = cases.PATTERNS
SGD = partial(torch.optim.SGD, lr=0.01)


class Labelled(L.LightningDataModule):
    num_classes, input_shape, vocab_size = CLASSES, (1, cases.SIZE, cases.SIZE), 30

    def __init__(self, modality: str = "image") -> None:
        super().__init__()
        self.inputs = IMAGES if modality == "image" else cases.SENTENCES
        self.modality = modality

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.inputs, LABELS), batch_size=16)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {self.modality: batch[0], "label": batch[1]}


def pretrained(tmp_path: Path, encoder: Any = "resnet8", **options: Any) -> Path:
    """Write a checkpoint after one step."""
    torch.manual_seed(5)
    data = cases.Viewed(
        cases.ImagesAndTexts()
        if isinstance(encoder, dict)
        else cases.Views("text" if encoder in ("text", "bag") else "image")
    )
    model = ContrastivePretraining(encoder, projector=(8,), **options)
    run = cases.trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(model, data)
    run.save_checkpoint(tmp_path / "pre.ckpt")
    return tmp_path / "pre.ckpt"


def encoder_of(path: Path, **options: Any) -> nn.Module:
    return ContrastivePretraining.load_from_checkpoint(path, weights_only=True, **options).eval()


def fit(tmp_path: Path, model: Classifier, data: Any = None, ckpt: Any = None, **options: Any) -> L.Trainer:
    run = cases.trainer(tmp_path, **{"limit_val_batches": 0, **options})
    run.fit(model, data or Labelled(), ckpt_path=ckpt)
    return run


@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        ("resnet8", {"encoder_options": {"width": 4}}),
        ("resnet14", {"encoder_options": {"width": 4, "norm": "batch"}}),
        ("conv4", {"encoder_options": {"width": 8}}),
        ("timm/resnet10t", {}),
        ("torchvision/mobilenet_v3_small", {}),
        ("text", {"encoder_options": {"width": 16, "depth": 1}}),
        ("bag", {"encoder_options": {"width": 16}}),
    ],
)
def test_a_classifier_starts_from_the_encoder(tmp_path: Path, encoder: str, options: Any) -> None:
    path = pretrained(tmp_path, encoder, **options)
    modality = "text" if encoder in ("text", "bag") else "image"
    model = Classifier(encoder=str(path), optimizer=partial(torch.optim.SGD, lr=0.0), freeze_encoder=True)
    fit(tmp_path, model, Labelled(modality))
    features = encoder_of(path).embed(IMAGES if modality == "image" else cases.SENTENCES)
    head = [layer for layer in model.network.modules() if isinstance(layer, nn.Linear)][-1]
    x = IMAGES if modality == "image" else cases.SENTENCES
    assert torch.allclose(model.eval()(x), head(features), atol=1e-4)
    assert model.hparams["network"] == encoder


def test_fine_tuning_moves_all_and_freezing_the_head_alone(tmp_path: Path) -> None:
    path = pretrained(tmp_path, "resnet8", encoder_options={"width": 4, "norm": "batch"})
    for freeze in (False, True):
        model = Classifier(encoder=str(path), freeze_encoder=freeze, optimizer=SGD)
        fit(tmp_path, model, max_epochs=2, limit_val_batches=1)
        start = encoder_of(path).encoder.state_dict()
        moved = {
            name
            for name, value in model.network.state_dict().items()
            if not torch.equal(value, start.get(name, torch.zeros(())))
        }
        weights = {name for name, _ in model.network.named_parameters()}
        if freeze:
            # Not even BatchNorm's statistics.
            assert moved == {"head.weight", "head.bias"}
            assert len(model.optimizers().param_groups[0]["params"]) == 2
            assert not model.network.features.training
            assert model.network.head.training
        else:
            assert weights <= moved
            assert any("running_mean" in name for name in moved)


def test_a_frozen_encoder_makes_it_logistic_regression_on_the_features(tmp_path: Path) -> None:
    path = pretrained(tmp_path, encoder_options={"width": 8})
    model = Classifier(num_classes=CLASSES, encoder=str(path), freeze_encoder=True, optimizer=SGD)
    model(IMAGES)
    features, head = encoder_of(path).embed(IMAGES).detach(), nn.Linear(32, CLASSES)
    head.load_state_dict(model.network.head.state_dict())
    fit(tmp_path, model, max_epochs=2)
    optimizer = SGD(head.parameters())
    for _ in range(2):
        for part in (slice(0, 16), slice(16, 32)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features[part]), LABELS[part]).backward()
            optimizer.step()
    assert torch.allclose(model.network.head.weight, head.weight, atol=1e-5)


def test_resume_and_loading_need_no_encoder(tmp_path: Path) -> None:
    path = pretrained(tmp_path, "resnet14", encoder_options={"width": 4})

    def run(epochs: int, ckpt: Any = None, encoder: Path = path) -> Classifier:
        torch.manual_seed(3)
        model = Classifier(encoder=str(encoder), optimizer=SGD)
        fit(tmp_path, model, ckpt=ckpt, max_epochs=epochs).save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    whole = run(3)
    run(1)
    resumed = run(3, tmp_path / "1.ckpt")
    other = tmp_path / "other"
    other.mkdir()
    # By then the name belongs to another network.
    changed = run(3, tmp_path / "1.ckpt", pretrained(other, "resnet8", encoder_options={"width": 4}))
    path.unlink()
    gone = run(3, tmp_path / "1.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "3.ckpt", weights_only=True)
    for name, value in whole.state_dict().items():
        for model in (resumed, changed, gone, loaded):
            assert torch.equal(model.state_dict()[name], value), name
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    # A new training of what was loaded goes on from it.
    loaded._optimizer = partial(torch.optim.SGD, lr=0.0)
    fit(tmp_path, loaded)
    assert torch.equal(loaded.network.head.weight, before["network.head.weight"])
    with pytest.raises(DataError, match=r"encoder .*pre.ckpt: there is no such file; expected a checkpoint of Contr"):
        run(1)


def test_one_of_two_encoders_and_a_module(tmp_path: Path) -> None:
    options = {"image": {"width": 4}, "text": {"width": 16, "dropout": 0.0}}
    path = pretrained(tmp_path, {"image": "resnet8", "text": "bag"}, encoder_options=options)
    model = Classifier(num_classes=CLASSES, encoder=str(path), encoder_modality="text").eval()
    features = encoder_of(path).embed(cases.SENTENCES, "text")
    assert torch.allclose(model(cases.SENTENCES), model.network.head(features), atol=1e-5)
    with pytest.raises(ConfigError, match="has encoders of image, text; say which one as encoder_modality, not 'audi"):
        Classifier(num_classes=CLASSES, encoder=str(path), encoder_modality="audio")(IMAGES)

    def network(classes: int) -> nn.Module:
        return backbone("resnet8", num_classes=classes, in_channels=1, width=4)

    folder = tmp_path / "module"
    folder.mkdir()
    path = pretrained(folder, network(0))
    model = Classifier(network(CLASSES), CLASSES, encoder=str(path)).eval()
    assert torch.allclose(model(IMAGES), model.network.head(encoder_of(path, encoder=network(0)).embed(IMAGES)))
    with pytest.raises(ConfigError, match="was given as a module; give that network, with a head, too"):
        Classifier(num_classes=CLASSES, encoder=str(path))(IMAGES)


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    path = str(pretrained(tmp_path, "resnet14", encoder_options={"width": 4}))
    with pytest.raises(ConfigError, match=r"network is 'resnet20', and encoder .* is a 'resnet14'; give the same"):
        Classifier("resnet20", CLASSES, encoder=path)(IMAGES)
    with pytest.raises(ConfigError, match=r"features.0.weight is \(4, 3, 3, 3\) here and \(4, 1, 3, 3\) in the check"):
        Classifier(num_classes=CLASSES, in_channels=3, encoder=path)(IMAGES)
    with pytest.raises(ConfigError, match=r"num_batches_tracked is \(\) here and nothing in the checkpoint"):
        Classifier(backbone("resnet8", num_classes=CLASSES, in_channels=1, width=4), CLASSES, encoder=path)(IMAGES)
    run = cases.trainer(tmp_path)
    model = Classifier("resnet8", CLASSES, in_channels=1, network_options={"width": 4})
    run.fit(model, Labelled())
    run.save_checkpoint(tmp_path / "classes.ckpt")
    with pytest.raises(DataError, match="has no pre-trained encoder; expected a checkpoint of ContrastivePretraining"):
        Classifier(num_classes=CLASSES, encoder=str(tmp_path / "classes.ckpt"))(IMAGES)
    (tmp_path / "torn.ckpt").write_bytes(Path(path).read_bytes()[:-500])
    with pytest.raises(DataError, match=r"torn\.ckpt"):
        Classifier(num_classes=CLASSES, encoder=str(tmp_path / "torn.ckpt"))(IMAGES)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = pretrained(tmp_path, "resnet14", encoder_options={"width": 4})
    words = [
        *("fit", "--model=Classifier", f"--model.encoder={path}", "--data=MNIST5k", "--trainer.accelerator=cpu"),
        *("--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.logger=false"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--safeguards=false"),
    ]
    kept = ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path}"]
    assert main([*words, "--trainer.max_epochs=1", *kept, "--trainer.callbacks.filename=fine"]) == 0
    hparams = torch.load(tmp_path / "fine.ckpt", weights_only=True)["hyper_parameters"]
    assert (hparams["network"], hparams["encoder"]) == ("resnet14", None)
    path.unlink()
    assert main([*words, "--trainer.max_epochs=2", f"--ckpt_path={tmp_path / 'fine.ckpt'}"]) == 0
    assert main([*words, "--trainer.max_epochs=1"]) != 0
