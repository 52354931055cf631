import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml

from ds_lightning.allowlist import allow_packages, allowed_packages, split_allowed
from ds_lightning.cli import main
from ds_lightning.errors import ConfigError
from ds_lightning.sweeps import Sweep
from ds_lightning.training import build, resolve

TOUCH = {"args": ["touch", "marker"]}
POPEN = {"class_path": "subprocess.Popen", "init_args": TOUCH}
LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"


def optimizer(path: str, **arguments: Any) -> dict[str, Any]:
    init = {"optimizer": {"class_path": path, "init_args": arguments}}
    return {"model": {"class_path": "Classifier", "init_args": init}}


def callback(entry: Any) -> dict[str, Any]:
    return {"trainer": {"callbacks": [entry]}}


MALICIOUS = {
    "a class": ({"model": POPEN}, "model", "subprocess.Popen"),
    "data": ({"data": POPEN}, "data", "subprocess.Popen"),
    "a callback": (callback(POPEN), "trainer.callbacks", "subprocess.Popen"),
    "appended": ({"trainer": {"callbacks+": [POPEN]}}, "trainer.callbacks", "subprocess.Popen"),
    "a logger": ({"trainer": {"logger": POPEN}}, "trainer.logger", "subprocess.Popen"),
    "nested": (optimizer("os.system", command="touch marker"), "model", "os.system"),
    "a builtin": (optimizer("builtins.exec", source="open('marker', 'w')"), "model", "builtins.exec"),
    "attribute walk": (optimizer("torch.os.system", command="touch marker"), "model", "posix.system"),
    "our own imports": (optimizer("ds_lightning.cli.os.system", command="touch marker"), "model", "posix.system"),
    "a callable": (
        callback({"class_path": LAMBDA, "init_args": {"on_fit_start": "os.system"}}),
        "trainer.callbacks",
        "os.system",
    ),
    "runs a command": (optimizer("torch.utils.collect_env.run", command="touch marker"), "model", None),
    "loads code": (optimizer("torch.hub.load", repo_or_dir="x", model="y"), "model", "torch.hub.load"),
    "unpickles": (optimizer("torch.load", f="x"), "model", "torch.load"),
    "a module that writes when imported": ({"model": {"class_path": "evil_at_import.Net"}}, "model", None),
    "the parser": (optimizer("jsonargparse.set_parsing_settings"), "model", "jsonargparse.set_parsing_settings"),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_at_import.py").write_text("open('marker', 'w')\n")
    return tmp_path


@pytest.mark.parametrize(("content", "key", "path"), MALICIOUS.values(), ids=MALICIOUS)
def test_nothing_foreign_runs(
    content: dict[str, Any], key: str, path: str | None, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "bad.yaml").write_text(yaml.safe_dump(content))
    words = ["fit", "--model", "Classifier", "--data", "MNIST5k", "--config", "bad.yaml", "--trainer.fast_dev_run=true"]
    assert main(words) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "Seed set" not in line]
    assert len(said) == 1
    assert f"{key}: class path '{path or ''}" in said[0]
    assert "add --allow " in said[0]
    assert not (here / "marker").exists()
    assert "evil_at_import" not in sys.modules


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "evil_at_import.Net"],
        ["--model=evil_at_import.Net"],
        ["--model.help", "evil_at_import.Net"],
        ["--model.help=evil_at_import.Net"],
        ["--model", "{class_path: evil_at_import.Net}"],
        ["--model.class_path=evil_at_import.Net"],
        ["--trainer.logger=evil_at_import.Net"],
        ["--trainer.callbacks+=evil_at_import.Net"],
        ["--trainer.callbacks.help=evil_at_import.Net"],
    ],
)
def test_words_are_held_to_it_too(words: list[str], here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *words]) == 2
    assert "class path 'evil_at_import.Net'" in capfd.readouterr().err
    assert not (here / "marker").exists()


def test_a_resolved_configuration_is_held_to_it() -> None:
    for run in (lambda: build({"model": POPEN}), lambda: resolve([], {"model": POPEN})):
        with pytest.raises(ConfigError, match=r"class path 'subprocess.Popen' .* add --allow subprocess"):
            run()
    assert not Path("marker").exists()


@pytest.mark.parametrize("where", ["base", "space"])
def test_a_sweep_is_held_to_it(where: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    evil: Any = {"class_path": "evil_at_import.Net"}
    content: dict[str, Any] = {
        "base": {"overrides": {"model": {"class_path": "Classifier"}, "data": {"class_path": "MNIST5k"}}},
        "space": {"model.label_smoothing": {"type": "float", "low": 0, "high": 0.1}},
        "objective": {"metric": "val/loss", "direction": "minimize"},
        "trials": 1,
    }
    if where == "base":
        content["base"]["overrides"]["model"] = evil
    else:
        choices = [{"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}, evil]
        content["space"] = {"model.optimizer": {"type": "categorical", "choices": choices}}
    (here / "sweep.yaml").write_text(yaml.safe_dump(content))
    assert main(["sweep", "sweep.yaml", "--trials", "1", "--store", "runs"]) == 2
    assert "class path 'evil_at_import.Net'" in capfd.readouterr().err
    assert not (here / "marker").exists()
    with pytest.raises(ConfigError, match="add --allow evil_at_import"):
        Sweep.from_yaml("sweep.yaml", "runs").run()


NET = """
import lightning as L

class Net(L.LightningModule):
    def __init__(self, size: int = 4):
        super().__init__()
"""


def test_a_package_is_allowed_by_name(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("guest_one", "guest_two", "guest_other"):
        (here / f"{name}.py").write_text(NET)
    words = ["fit", "--allow", "guest_one", "--allow=guest_two", "--print_config"]
    assert main([*words, "--model", "guest_one.Net", "--model.size=3"]) == 0
    printed = yaml.safe_load(capfd.readouterr().out)
    assert printed["model"] == {"class_path": "guest_one.Net", "init_args": {"size": 3}}
    assert "allow" not in printed
    assert main([*words, "--model", "guest_two.Net"]) == 0
    assert main([*words, "--model", "guest_other.Net"]) == 2
    assert "add --allow guest_other" in capfd.readouterr().err
    assert {"guest_one", "guest_two"} <= set(allowed_packages())


def test_a_file_can_not_allow_itself(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "bad.yaml").write_text(yaml.safe_dump({"allow": ["subprocess"], "model": POPEN}))
    assert main(["fit", "--config", "bad.yaml"]) == 2
    assert not (here / "marker").exists()


@pytest.mark.parametrize(
    "path",
    [
        "torch.optim.AdamW",
        "torch.nn.functional.relu",
        "torchvision.ops.MLP",
        "torchmetrics.MeanMetric",
        "timm.create_model",
        "albumentations.HorizontalFlip",
        "lightning.pytorch.callbacks.LearningRateMonitor",
    ],
)
def test_the_usual_packages_are_allowed(path: str) -> None:
    allow_packages()
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--call", type=type if path.rsplit(".")[-1][0].isupper() else Callable)
    assert callable(parser.parse_args([f"--call={path}"]).call)


def test_split_allowed() -> None:
    words = ["fit", "--allow", "a", "--model=x", "--allow=b.c"]
    assert split_allowed(words) == (["fit", "--model=x"], ["a", "b.c"])
    with pytest.raises(ConfigError, match="--allow needs the name of a package"):
        split_allowed(["fit", "--allow"])
    with pytest.raises(ConfigError, match="needs the name"):
        split_allowed(["--allow", "--model=x"])


@pytest.mark.parametrize("name", ["", "a-b", "*", "a b", "../x", "jsonargparse", "a..b"])
def test_what_is_no_package_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected a package's name, such as my_module"):
        allow_packages([name])
