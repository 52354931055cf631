import inspect
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from ds_lightning.callbacks import DurableCheckpoint
from ds_lightning.checkpoints import DurableCheckpointIO, newest_checkpoint
from ds_lightning.cli import main
from ds_lightning.errors import ConfigError, DataError


class Boring(BoringModel):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


def trainer(callback: ModelCheckpoint, **kwargs: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 1, "limit_train_batches": 6, "limit_val_batches": 0, "accelerator": "cpu"}
    return L.Trainer(callbacks=[callback], **{**quiet, **options, **kwargs})


def steps(folder: Path) -> dict[str, int]:
    return {p.name: torch.load(p, weights_only=True)["global_step"] for p in sorted(folder.glob("*.ckpt"))}


def test_the_states_name_is_modelcheckpoints() -> None:
    def theirs(callback: DurableCheckpoint) -> str:
        return ModelCheckpoint.state_key.fget(callback)  # type: ignore[attr-defined,no-any-return]

    a, b = DurableCheckpoint(monitor="loss", every_n_train_steps=2), DurableCheckpoint(train_time_interval=timedelta(1))
    assert a.state_key == theirs(a) != b.state_key == theirs(b)
    a.monitor = "val"
    assert "'val'" in a.state_key
    assert a.state_key == theirs(a)


def test_it_saves_by_time(tmp_path: Path) -> None:
    every = DurableCheckpoint(tmp_path, filename="{step}", train_time_interval=timedelta(0), save_top_k=-1)
    trainer(every).fit(Boring())
    assert {f"step={k}.ckpt" for k in range(1, 7)} <= set(steps(tmp_path))


def test_the_arguments_are_those_of_modelcheckpoint() -> None:
    ours, theirs = (inspect.signature(kind).parameters for kind in (DurableCheckpoint, ModelCheckpoint))
    assert list(ours) == list(theirs)
    assert {name for name in ours if ours[name].default != theirs[name].default} == {"save_last"}
    assert DurableCheckpoint().save_last is True
    for name, value in {"dirpath": "/x", "monitor": "m", "mode": "max", "save_top_k": 3, "verbose": True}.items():
        assert getattr(DurableCheckpoint(**{"monitor": "m", name: value}), name) == value


def test_one_added_callback_leaves_the_last_two(tmp_path: Path) -> None:
    fit = trainer(DurableCheckpoint(tmp_path, every_n_train_steps=2))
    fit.fit(Boring())
    assert len(fit.checkpoint_callbacks) == 1, "in the place of Lightning's own"
    assert isinstance(fit.strategy.checkpoint_io, DurableCheckpointIO)
    assert steps(tmp_path) == {"epoch=0-step=6.ckpt": 6, "last-previous.ckpt": 4, "last.ckpt": 6}
    assert len(os.listdir(tmp_path)) == 3, "no temporary file"


def test_torn_files_are_refused_and_the_one_before_goes_on(tmp_path: Path) -> None:
    trainer(DurableCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=0)).fit(Boring())
    assert steps(tmp_path) == {"last-previous.ckpt": 4, "last.ckpt": 6}
    last = tmp_path / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"last\.ckpt is torn"):
        trainer(DurableCheckpoint(tmp_path)).fit(Boring(), ckpt_path=last)
    with pytest.warns(UserWarning, match="passed over: checkpoint .*last.ckpt is torn"):
        before = newest_checkpoint(tmp_path)
    again = trainer(DurableCheckpoint(tmp_path), max_epochs=2)
    again.fit(Boring(), ckpt_path=before)
    assert again.global_step == 12


def test_going_on_keeps_the_callbacks_state_and_overwrites_last(tmp_path: Path) -> None:
    trainer(DurableCheckpoint(tmp_path / "whole"), max_epochs=3).fit(Boring())
    trainer(DurableCheckpoint(tmp_path / "cut"), max_epochs=2).fit(Boring())
    fit = trainer(DurableCheckpoint(tmp_path / "cut"), max_epochs=3)
    fit.fit(Boring(), ckpt_path=tmp_path / "cut" / "last.ckpt")
    assert fit.global_step == 18
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole"), "last.ckpt went on, no last-v1.ckpt"
    cut, whole = (
        torch.load(tmp_path / name / "last.ckpt", weights_only=True)["callbacks"] for name in ("cut", "whole")
    )
    assert str(cut).replace("/cut", "/whole") == str(whole), "as if never interrupted"


def test_other_plugins_are_refused_unless_they_wrap_ours(tmp_path: Path) -> None:
    class Mine(TorchCheckpointIO):
        pass

    for plugin in (Mine(), AsyncCheckpointIO(Mine())):
        with pytest.raises(ConfigError, match=f"with {type(plugin).__name__}, which DurableCheckpoint can't make"):
            trainer(DurableCheckpoint(tmp_path), plugins=[plugin]).fit(Boring())
    ours = DurableCheckpointIO()
    fit = trainer(DurableCheckpoint(tmp_path / "plain"), plugins=[ours])
    fit.fit(Boring())
    assert fit.strategy.checkpoint_io is ours
    assert steps(tmp_path / "plain")["last.ckpt"] == 6


def test_asynchronous_writing_can_be_durable_too(tmp_path: Path) -> None:
    plugin = AsyncCheckpointIO(DurableCheckpointIO(keep_previous=True))
    trainer(DurableCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=0), plugins=[plugin]).fit(Boring())
    assert steps(tmp_path) == {"last-previous.ckpt": 4, "last.ckpt": 6}


def test_strategies_that_write_shards_are_left_alone(tmp_path: Path) -> None:
    class Sharded(SingleDeviceStrategy):
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            super().save_checkpoint(*args, **kwargs)

    fit = trainer(DurableCheckpoint(tmp_path), strategy=Sharded("cpu"))
    with pytest.warns(UserWarning, match="Sharded writes its checkpoints itself"):
        fit.fit(Boring())
    assert type(fit.strategy.checkpoint_io) is TorchCheckpointIO


def test_the_preset_runs_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--model", "lightning.pytorch.demos.boring_classes.BoringModel"]
    words += ["--config", "callbacks/durable_checkpoint.yaml", "--trainer.logger=false", "--trainer.max_epochs=2"]
    words += ["--trainer.limit_train_batches=3", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    assert main(words) == 0
    found = steps(tmp_path / "checkpoints")
    assert found == {"epoch=1-step=6.ckpt": 6, "last-previous.ckpt": 3, "last.ckpt": 6}


KILLED = """
import json, os, random, signal, sys, time, warnings
import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel
from ds_lightning.callbacks import DurableCheckpoint
from ds_lightning.checkpoints import newest_checkpoint
folder, chance = sys.argv[1], random.Random(int(sys.argv[2]))
warnings.simplefilter("ignore")

def fit(max_steps):
    callback = DurableCheckpoint(folder, every_n_train_steps=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=-1, max_steps=max_steps, limit_val_batches=0, callbacks=[callback], **quiet)
    trainer.fit(BoringModel(), ckpt_path=newest_checkpoint(folder))
    return trainer.global_step

def saved():
    last = folder + "/last.ckpt"
    return os.stat(last).st_mtime_ns if os.path.exists(last) else None

os.makedirs(folder, exist_ok=True)
for _ in range(3):
    before = saved()
    child = os.fork()
    if child == 0:
        fit(10**9)
    while saved() == before and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    warnings.simplefilter("error")
    found = newest_checkpoint(folder)  # a torn file would be a warning, hence an error
    warnings.simplefilter("ignore")
    import torch
    print(json.dumps([os.path.basename(found), torch.load(found, weights_only=True)["global_step"]]), flush=True)
last = torch.load(newest_checkpoint(folder), weights_only=True)["global_step"]
print(json.dumps(["end", fit(last + 3) - last]))
"""


def test_a_fit_killed_at_any_moment_goes_on(tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED, str(tmp_path / "checkpoints"), "0"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *kills, end = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(kills) == 3
    reached = [step for _, step in kills]
    assert reached == sorted(reached), "no step that was saved is lost"
    assert reached[-1] > reached[0] > 0
    assert end == ["end", 3]
    assert not list((tmp_path / "checkpoints").glob(".durable*")), "the dead left nothing"
