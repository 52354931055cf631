import json
import os
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from ds_lightning.checkpoint_reader import read_outline
from ds_lightning.cli import main
from ds_lightning.errors import DataError
from ds_lightning.inspection import inspect_checkpoint


class Known(BoringModel):
    def __init__(self, width: int = 4, names: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(*(nn.Linear(width, width) for _ in range(12)), nn.BatchNorm1d(width))
        self.tied = self.body[0].weight
        self.register_buffer("frozen", torch.zeros(3, 5, dtype=torch.bfloat16))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.layer.parameters(), lr=0.25)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Known, Path]:
    folder = tmp_path_factory.mktemp("fitted")
    model, quiet = Known(), {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_epochs=2, limit_train_batches=3, limit_val_batches=0, callbacks=[ModelCheckpoint(folder)], **quiet
    )
    trainer.fit(model)
    trainer.save_checkpoint(folder / "known.ckpt")
    return model, folder / "known.ckpt"


def test_the_figures_are_those_of_the_module(fitted: tuple[Known, Path]) -> None:
    model, path = fitted
    report = inspect_checkpoint(path)
    assert report["kind"] == "Lightning checkpoint"
    assert report["bytes"] == path.stat().st_size
    assert (report["epoch"], report["global_step"]) == (2, 6)
    assert report["lightning_version"] == L.__version__
    state = model.state_dict()
    assert report["tensors"] == [
        {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in state.items()
    ]
    once = [*model.parameters(), *model.buffers()]  # torch lists a tied parameter once, too
    assert report["values"] == sum(tensor.numel() for tensor in once) < sum(t.numel() for t in state.values())
    assert report["tensor_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in once)
    (optimizer,) = report["optimizers"]
    assert optimizer["state"] == ["step", "exp_avg", "exp_avg_sq"]
    assert optimizer["parameters_with_state"] == 2
    assert optimizer["tensor_bytes"] == 2 * 4 + 2 * 4 * (64 + 2)
    assert optimizer["groups"][0]["lr"] == 0.25 * 0.5**2
    assert optimizer["groups"][0]["parameters"] == 2
    assert report["lr_schedulers"][0]["last_epoch"] == 2
    (name,) = report["callbacks"]
    assert name.startswith("ModelCheckpoint")
    assert report["hyperparameters"] == {"hyper_parameters": {"width": 4, "names": ["a", "b"]}}
    assert report["loops"]["epochs"]["total"]["completed"] == 2
    assert report["loops"]["batches"]["total"]["processed"] == 6
    assert report["refused"] == []


def test_every_dtype_has_its_size(tmp_path: Path) -> None:
    names = (
        "bool uint8 int8 int16 uint16 float16 bfloat16 int32 uint32 float32 int64 uint64 float64 complex32 complex64"
    )
    names += " complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
    tensors = {name: torch.zeros(3, 2, dtype=getattr(torch, name)) for name in names.split()}
    torch.save(tensors, tmp_path / "a.pt")
    report = inspect_checkpoint(tmp_path / "a.pt")
    assert report["kind"] == "tensors without Lightning's bookkeeping"
    assert [(tensor["name"], tensor["dtype"]) for tensor in report["tensors"]] == [(name, name) for name in tensors]
    assert report["tensor_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert report["refused"] == []


def test_the_page_and_the_json(fitted: tuple[Known, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model, path = fitted
    count = len(model.state_dict())
    assert main(["inspect", str(path)]) == 0
    page = capsys.readouterr().out
    assert "Lightning checkpoint" in page
    assert "epoch 2, global step 6" in page
    assert f"and {count - 20} more (--all lists them)" in page
    assert "step, exp_avg, exp_avg_sq of 2 parameters" in page
    assert "it loads with weights_only=True" in page
    assert main(["inspect", "--all", str(path)]) == 0
    page = capsys.readouterr().out
    assert "--all" not in page
    assert all(f"  {name} " in page for name in model.state_dict())
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == inspect_checkpoint(path)


def test_neither_torch_nor_lightning_is_imported(fitted: tuple[Known, Path]) -> None:
    code = (
        f"import sys; from ds_lightning.cli import main; assert main(['inspect', {str(fitted[1])!r}]) == 0\n"
        "print([name for name in ('torch', 'lightning', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


class Listed(list):  # type: ignore[type-arg]
    pass


def replaced(path: Path, data: bytes) -> None:
    """Put another pickle into a file of torch's, with right CRC-32 sums."""
    torch.save([], path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in records.items():
            archive.writestr(name, data if name.endswith("data.pkl") else old)


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickled_classes_are_listed_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: int
) -> None:
    marker, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    module = nn.Linear(3, 2)
    content = {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": module.state_dict(),
        "hyper_parameters": {"evil": Evil(marker), "path": Path("x"), "list": Listed([1]), "net": module},
        "ordered": OrderedDict(a={1, 2}, b=1j, c=b"x"),
    }
    torch.save(content, path, pickle_protocol=protocol)
    assert main(["inspect", str(path)]) == 0
    page = capsys.readouterr().out
    assert not marker.exists()
    for name in ("posix.system", "pathlib.PosixPath", "torch.nn.modules.linear.Linear"):
        assert f"  ! {name}" in page
    assert f"  ! {Listed.__module__}.Listed" in page
    assert "    torch._utils._rebuild_tensor_v2" in page
    report = inspect_checkpoint(path)
    assert report["values"] == 8
    assert report["hyperparameters"]["hyper_parameters"]["evil"] == "<posix.system>"
    if protocol == 2:  # torch's own list knows no other
        assert set(report["refused"]) == set(torch.serialization.get_unsafe_globals_in_checkpoint(path))


@pytest.mark.parametrize(
    ("pickled", "names"),
    [
        # An object made of a class that only running getattr would give.
        (b"\x80\x02cbuiltins\ngetattr\ncposix\nsystem\nX\x01\0\0\0xR)\x81.", ["builtins.getattr", "posix.system"]),
        (b"(S'touch executed'\niposix\nsystem\n.", ["posix.system"]),
        (b"\x80\x02c__builtin__\neval\nX\x01\0\0\0x\x85R.", ["builtins.eval"]),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n]\x85R.", ["torch._utils._rebuild_tensor_v2"]),
        (b"\x80\x02}q\0h\0h\0s.", []),  # a dictionary as its own key
        (b"\x80\x02cposix\nsystem\n", ["posix.system"]),  # no end
        (b"\xff\xff", []),
    ],
)
def test_crafted_pickles_are_listed_as_far_as_they_go(tmp_path: Path, pickled: bytes, names: list[str]) -> None:
    path = tmp_path / "crafted.ckpt"
    replaced(path, pickled)
    assert list(read_outline(path).globals) == names
    assert main(["inspect", str(path)]) == 0
    assert main(["inspect", "--json", str(path)]) == 0
    assert os.listdir(tmp_path) == ["crafted.ckpt"]


def test_what_would_steer_the_terminal_or_never_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a\x1b[2Jb\nc": torch.zeros(2)}, tmp_path / "a.pt")
    assert main(["inspect", str(tmp_path / "a.pt")]) == 0
    assert "a?[2Jb?c" in capsys.readouterr().out
    loop: dict[str, Any] = {"pytorch-lightning_version": "2"}
    loop["hyper_parameters"] = loop
    torch.save(loop, tmp_path / "loop.pt")
    assert main(["inspect", str(tmp_path / "loop.pt")]) == 2
    assert "nests too deeply" in capsys.readouterr().err


def test_a_torn_missing_or_foreign_file_is_one_line_and_code_2(
    fitted: tuple[Known, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = fitted[1].read_bytes()
    (tmp_path / "torn.ckpt").write_bytes(whole[:-100])
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "empty.ckpt").touch()
    cases = {
        "torn.ckpt": "torn or damaged: its zip end record is missing",
        "empty.ckpt": "torn or damaged",
        "text.ckpt": "no checkpoint",
        "missing.ckpt": "not found",
        ".": "is a folder",
    }
    for name, reason in cases.items():
        assert main(["inspect", str(tmp_path / name)]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == 1
        assert said.err.startswith("ds-lightning inspect: ")
        assert reason in said.err
    with pytest.raises(DataError, match="torn"):
        inspect_checkpoint(tmp_path / "torn.ckpt")
