import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ds_lightning.callbacks import DynamicLayerLR
from ds_lightning.cli import main
from ds_lightning.datamodules import MNIST5k
from ds_lightning.errors import ConfigError
from ds_lightning.modules import Classifier
from ds_lightning.networks import count_macs
from ds_lightning.presets import list_presets
from ds_lightning.training import build, resolve, set_key

MODEL: dict[str, Any] = {
    "class_path": "Classifier",
    "init_args": {"network": "resnet8", "network_options": {"width": 4}},
}
QUIET: dict[str, Any] = {"trainer.logger": False, "trainer.enable_progress_bar": False, "trainer.accelerator": "cpu"}


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_files_add_up_and_callbacks_append(tmp_path: Path) -> None:
    mine = write(
        tmp_path / "mine.yaml", {"trainer": {"max_epochs": 3, "callbacks": [{"class_path": "LearningRateMonitor"}]}}
    )
    later = write(tmp_path / "later.yaml", {"trainer": {"max_epochs": 4}})
    config = resolve(["datamodules/mnist5k.yaml", mine, "callbacks/layer_lr.yaml", later], {"model": MODEL})
    names = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert names == ["LearningRateMonitor", "DynamicLayerLR"]
    assert config["trainer"]["max_epochs"] == 4
    assert config["data"]["class_path"].endswith("MNIST5k")
    assert config["trainer"]["logger"]["class_path"].endswith("MLflowTracker")


def test_overrides_reach_lists_and_classes() -> None:
    config = resolve(
        ["datamodules/mnist5k.yaml", "callbacks/layer_lr.yaml"],
        {
            "model": MODEL,
            "model.init_args.optimizer.init_args.lr": 0.123,
            "model.label_smoothing": 0.05,
            "trainer.callbacks.0.init_args.every": 7,
            "data.batch_size": 32,
            **QUIET,
        },
    )
    cli = build(config)
    assert isinstance(cli.model, Classifier)
    assert isinstance(cli.datamodule, MNIST5k)
    assert cli.model.label_smoothing == 0.05
    assert cli.datamodule.batch_size == 32
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, DynamicLayerLR)]
    assert callback.every == 7
    cli.model.num_classes, cli.model.in_channels = 10, 1
    cli.model.configure_model()
    optimizer: Any = cli.model.configure_optimizers()
    assert optimizer.param_groups[0]["lr"] == 0.123
    assert config["model"]["init_args"]["optimizer"]["init_args"]["nesterov"] is True, "the rest of the default stays"


def test_a_resolved_configuration_is_a_fixed_point(tmp_path: Path) -> None:
    config = resolve(["datamodules/mnist5k_mixed.yaml", "callbacks/layer_lr.yaml"], {"model": MODEL})
    assert resolve([write(tmp_path / "config.yaml", config)]) == config


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"model.init_args.widht": 3}, "widht"),
        ({"trainer.max_epoch": 3}, "max_epoch"),
        ({"trainer.callbacks.3.init_args.every": 7}, "trainer.callbacks is a list of 1; '3' is no position in it"),
        ({"optimiser.lr": 7}, "the configuration has no key 'optimiser'"),
        ({"trainer.max_epochs.more": 7}, "trainer.max_epochs is None, which has no key 'more'"),
        ({"trainer.max_epochs": "many"}, "max_epochs"),
        ({"data.batch_size": "many"}, "batch_size"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_names_it(overrides: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(["datamodules/mnist5k.yaml", "callbacks/layer_lr.yaml"], {"model": MODEL, **overrides})
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_set_key_changes_one_leaf() -> None:
    config = {"a": [{"class_path": "X", "init_args": {"b": 1}}], "c": {}}
    set_key(config, "a.0.b", 2)
    set_key(config, "c.new", 3)
    assert config == {"a": [{"class_path": "X", "init_args": {"b": 2}}], "c": {"new": 3}}


@pytest.mark.parametrize("name", [n for n in list_presets() if n.startswith(("datamodules/", "callbacks/"))])
def test_every_preset_goes_through_the_command_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--model", "Classifier", "--data", "MNIST5k", "--config", name, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"].endswith("Classifier")


def test_fit_test_and_predict_from_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    common = [
        "--data",
        "MNIST5k",
        "--data.train_size=256",
        "--config",
        "callbacks/layer_lr.yaml",
        "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu",
    ]
    fit = ["fit", "--model", "Classifier", "--model.network_options={width: 4}", "--trainer.max_epochs=1", *common]
    assert main(fit) == 0
    (checkpoint,) = (tmp_path / "mlruns" / "checkpoints").rglob("last.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    assert state["hyper_parameters"]["num_classes"] == 10
    again = Classifier.load_from_checkpoint(checkpoint, weights_only=True)
    assert again(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    for command in ("test", "predict"):
        assert (
            main(
                [
                    command,
                    "--model",
                    "Classifier",
                    "--model.network_options={width: 4}",
                    *common,
                    f"--ckpt_path={checkpoint}",
                    "--trainer.logger=false",
                ]
            )
            == 0
        )


@pytest.mark.parametrize(
    "scheduler",
    ["cosine", None, {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 3}}],
)
def test_a_scheduler_survives_resolving(scheduler: Any) -> None:
    model = {"class_path": "Classifier", "init_args": {"lr_scheduler": scheduler}}
    config = resolve(["datamodules/mnist5k.yaml"], {"model": model, **QUIET})
    resolved = config["model"]["init_args"]["lr_scheduler"]
    if isinstance(scheduler, dict):
        assert resolved["class_path"] == scheduler["class_path"]
        assert resolved["init_args"]["step_size"] == 3
    else:
        assert resolved == scheduler
    assert isinstance(build(config).model, Classifier)


def test_every_public_name_resolves_on_the_command_line() -> None:
    # In a process of its own: here the other tests have imported all of them.
    code = (
        "import sys, ds_lightning.training; loaded = set(sys.modules); "
        "import ds_lightning.callbacks as c, ds_lightning.datamodules as d, ds_lightning.modules as m; "
        "import lightning.pytorch as L; "
        "kinds = ((c, L.Callback), (d, L.LightningDataModule), (m, L.LightningModule)); "
        "found = [getattr(room, name) for room, _ in kinds for name in room.__all__]; "
        "print(*[x.__name__ for x in found if isinstance(x, type) and issubclass(x, tuple(k for _, k in kinds)) "
        "and x.__module__ not in loaded])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == []


def test_a_pruned_fit_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data", "MNIST5k", "--data.train_size=256"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.limit_val_batches=0"]
    model = ["--model", "Classifier", "--model.network_options={width: 16}"]
    pruning = ["--config", "callbacks/pruning.yaml", "--trainer.max_steps=12"]
    assert main(["fit", *model, *data, *pruning, *quiet]) == 0
    (checkpoint,) = (tmp_path / "mlruns" / "checkpoints").rglob("last.ckpt")
    again = Classifier.load_from_checkpoint(checkpoint)
    x = torch.zeros(1, 1, 28, 28)
    assert count_macs(again, x) < 0.51 * count_macs(Classifier("resnet8", 10, in_channels=1, image_size=28), x)
