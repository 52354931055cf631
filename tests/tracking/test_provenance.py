import importlib.metadata
import subprocess

import torch
from lightning.pytorch import LightningModule
from torch import nn

from ds_lightning.tracking.provenance import environment, git_tags, model_size, model_summary


def test_git(tmp_path):
    assert git_tags(tmp_path) == {}

    def git(*arguments):
        who = ["-c", "user.name=n", "-c", "user.email=e@x"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-m", "m")
    (tmp_path / "untracked").write_text("1")
    commit = git("rev-parse", "HEAD").strip()
    assert git_tags(tmp_path) == {"mlflow.source.git.commit": commit, "git.dirty": "false"}
    (tmp_path / "f").write_text("2")
    assert git_tags(tmp_path) == {"mlflow.source.git.commit": commit, "git.dirty": "true"}


def test_environment():
    found = environment()
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert found["packages"]["ds-lightning"]
    assert found["command"]


def test_lazy_layers_count_as_nothing_and_do_not_crash():
    class Lazy(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 2), nn.LazyLinear(4))
            self.net[0].bias.requires_grad_(False)

    assert model_size(Lazy()) == (8, 6)
    assert "LazyLinear" in model_summary(Lazy())


def test_the_summary_does_not_run_the_model():
    class Refuses(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 2)
            self.example_input_array = torch.zeros(1, 2)

        def forward(self, x):
            raise AssertionError("must not run")

    model = Refuses()
    assert "Linear" in model_summary(model)
    assert model.example_input_array is not None
