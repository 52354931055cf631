"""A checkpoint that a Python script has saved, given to the command line."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from ds_lightning.cli import main
from ds_lightning.datamodules import MNIST5k, MultimodalManifest
from ds_lightning.modules import Classifier, MultimodalFusion

QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
SCHEMA = {"columns": {"words": "text", "age": "table"}, "label": "kind"}
WORDS = [f"--trainer.{name}=false" for name in QUIET] + ["--trainer.accelerator=cpu"]


def fitted(model: pl.LightningModule, data: pl.LightningDataModule, path: Path) -> pl.Trainer:
    torch.manual_seed(0)
    trainer = pl.Trainer(max_steps=2, limit_val_batches=1, enable_checkpointing=False, accelerator="cpu", **QUIET)
    trainer.fit(model, data)
    trainer.save_checkpoint(path)
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("script")
    (folder / "pets.csv").write_text("words,age,kind\n" + "it barks,3,dog\nit purrs,,cat\nwho is it,9,cow\n" * 10)
    (folder / "schema.yaml").write_text("columns: {words: text, age: table}\nlabel: kind\n")
    # What no default would give.
    fitted(Classifier("resnet8", network_options={"width": 4}), MNIST5k(), folder / "classifier.ckpt")
    data = MultimodalManifest(str(folder / "pets.csv"), SCHEMA, batch_size=4)
    fusion = MultimodalFusion({"text": None, "table": None}, width=16, heads=2, fusion="cross")
    trainer = fitted(fusion, data, folder / "fusion.ckpt")
    trainer.limit_val_batches = 1.0
    torch.save(trainer.validate(fusion, data, verbose=False)[0], folder / "expected.pt")
    return folder


def fusion_words(folder: Path, checkpoint: str, encoders: str) -> list[str]:
    data = ["--data=MultimodalManifest", f"--data.path={folder}/pets.csv", f"--data.schema={folder}/schema.yaml"]
    model = ["--model=MultimodalFusion", f"--model.encoders={encoders}"]
    return [*model, *data, "--data.batch_size=4", f"--ckpt_path={folder}/{checkpoint}", *WORDS]


def test_it_is_validated_as_in_the_script(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", *fusion_words(folder, "fusion.ckpt", "{text: null, table: null}")]) == 0
    table = capsys.readouterr().out
    expected = torch.load(folder / "expected.pt", weights_only=True)
    assert len(expected) > 5
    for name, value in expected.items():
        (line,) = [line for line in table.splitlines() if f" {name} " in line]
        assert float(line.split("│")[2]) == pytest.approx(value, rel=1e-5), name


def test_a_fit_goes_on_from_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model=Classifier", "--data=MNIST5k", f"--ckpt_path={folder}/classifier.ckpt", *WORDS]
    words += ["--trainer.max_steps=3", "--trainer.limit_val_batches=1", "--trainer.enable_checkpointing=false"]
    assert main(["fit", *words]) == 0
    assert main(["test", *words[:3], *WORDS, "--trainer.limit_test_batches=1"]) == 0
    assert "test/accuracy" in capsys.readouterr().out


def test_another_class_is_one_line_that_says_what_to_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", *fusion_words(folder, "classifier.ckpt", "{text: null}")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "classifier.ckpt don't fit: " in line
    assert "MultimodalFusion" in line
    assert line.endswith("give --model the class that it was saved from")
