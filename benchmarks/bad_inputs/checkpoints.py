"""Bad checkpoints: cut, flipped, foreign and malicious files."""

import io
import os
import pickle
import random
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient

from ds_lightning.checkpoints import DurableCheckpointIO, newest_checkpoint
from ds_lightning.modules import Classifier

from .case import Case, Place

Damage = Callable[[bytes], bytes]


class Malicious:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch EXECUTED",)


def _content(good: bytes) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(io.BytesIO(good), weights_only=True)
    return content


def _saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _archive(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return file.getvalue()


def _flip(bits: list[float]) -> Damage:
    def damage(good: bytes) -> bytes:
        changed = bytearray(good)
        for place in bits:
            changed[int(place * len(good))] ^= 1 << int(place * 1e6) % 8
        return bytes(changed)

    return damage


def _without(key: str) -> Damage:
    return lambda good: _saved({name: value for name, value in _content(good).items() if name != key})


def _wider(good: bytes) -> bytes:
    content = _content(good)
    content["state_dict"] = {name: tensor.repeat_interleave(2, 0) if tensor.ndim else tensor for name, tensor in
                             content["state_dict"].items()}  # fmt: skip
    return _saved(content)


_WHOLE: dict[str, tuple[Damage, str]] = {
    "empty": (lambda good: b"", "bad.ckpt"),
    "text": (lambda good: b"not a checkpoint\n" * 100, "bad.ckpt"),
    "zeros": (lambda good: bytes(len(good)), "bad.ckpt"),
    "foreign zip": (lambda good: _archive({"readme.txt": b"hello"}), "bad.ckpt"),
    "compressed zip": (lambda good: _archive({"a/data.pkl": bytes(10**8)}, zipfile.ZIP_DEFLATED), "bad.ckpt"),
    "zip without version": (lambda good: _archive({"a/data.pkl": pickle.dumps({"global_step": 1})}), "bad.ckpt"),
    "bare pickle": (lambda good: pickle.dumps({"state_dict": {}}), "bad.ckpt"),
    "malicious bare pickle": (lambda good: pickle.dumps(Malicious()), "bad.ckpt"),
    "garbage after the end": (lambda good: good + b"x" * 100000, "bad.ckpt"),
}
# Whole files that `inspect` describes and a load refuses.
_LOADED: dict[str, tuple[Damage, str]] = {
    "malicious": (lambda good: _saved({**_content(good), "extra": Malicious()}), "bad.ckpt"),
    "malicious at the top": (lambda good: _saved(Malicious()), "bad.ckpt"),
    "a pickled class": (lambda good: _saved({**_content(good), "extra": Place}), "bad.ckpt"),
    "a list": (lambda good: _saved([1, 2]), "bad.ckpt"),
    "a tensor": (lambda good: _saved(torch.zeros(3)), "bad.ckpt"),
    "plain weights": (lambda good: _saved(_content(good)["state_dict"]), "bad.ckpt"),
    "no state_dict": (_without("state_dict"), "state_dict"),
    "another class": (lambda good: _saved({**_content(good), "state_dict": {"w": torch.zeros(2)}}), "bad.ckpt"),
    "another shape": (_wider, "bad.ckpt"),
}
_RESUMED: dict[str, tuple[Damage, str]] = {
    "no loops": (_without("loops"), "bad.ckpt"),
    "no optimizer_states": (_without("optimizer_states"), "bad.ckpt"),
    "no version": (_without("pytorch-lightning_version"), "bad.ckpt"),
    "two optimizers": (
        lambda good: _saved({**_content(good), "optimizer_states": _content(good)["optimizer_states"] * 2}),
        "bad.ckpt",
    ),
    "epoch is text": (lambda good: _saved({**_content(good), "epoch": "x", "loops": {"fit_loop": 3}}), "bad.ckpt"),
}


def _inspect(folder: Path) -> Any:
    return ["inspect", str(folder / "bad.ckpt")]


def _fit(folder: Path) -> Any:
    return ["fit", "--config=small.yaml", "--trainer.max_epochs=2", f"--ckpt_path={folder / 'bad.ckpt'}"]


def _validate(folder: Path) -> Any:
    return ["validate", "--config=small.yaml", "--trainer.logger=false", f"--ckpt_path={folder / 'bad.ckpt'}"]


def _load(folder: Path) -> Any:
    return lambda: DurableCheckpointIO().load_checkpoint(folder / "bad.ckpt")


def _case(door: str, what: str, damage: Damage, says: str, give: Callable[[Path], Any]) -> Case:
    def make(place: Place, folder: Path) -> Any:
        (folder / "bad.ckpt").write_bytes(damage(place.checkpoint.read_bytes()))
        return give(folder)

    return Case(f"checkpoints/{door} {what}", says, make)


def _from_checkpoint(what: str, damage: Damage, says: str) -> Case:
    def call(folder: Path) -> Any:
        return lambda: Classifier.load_from_checkpoint(folder / "bad.ckpt")

    return _case("load_from_checkpoint", what, damage, says, call)


def _resume(what: str, damage: Damage) -> Case:
    """A run left unfinished, whose only checkpoint is damaged."""

    def make(place: Place, folder: Path) -> Any:
        client = MlflowClient(f"sqlite:///{place.folder / 'mlruns' / 'mlflow.db'}")
        experiment = client.get_run(place.run_ids[0]).info.experiment_id
        run = client.create_run(experiment).info.run_id
        client.set_terminated(run, "KILLED")
        at = place.folder / "mlruns" / "checkpoints" / experiment / run / "checkpoints"
        at.mkdir(parents=True)
        (at / "last.ckpt").write_bytes(damage(place.checkpoint.read_bytes()))
        return ["fit", "--config=small.yaml", "--resume", run]

    return Case(f"checkpoints/resume {what}", "no whole checkpoint", make)


def _passed_over(what: str, damage: Damage) -> Case:
    """Two checkpoints of which the newer is damaged: the one before is used."""

    def make(place: Place, folder: Path) -> Any:
        shutil.copy(place.checkpoint, folder / "first.ckpt")
        newer = {**_content(place.checkpoint.read_bytes()), "global_step": 10**6}
        (folder / "second.ckpt").write_bytes(damage(_saved(newer)))

        def call() -> str | None:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = newest_checkpoint(folder)
            lines = [str(warning.message) for warning in said]
            if found != folder / "first.ckpt":
                return f"found {found}"
            if len(lines) != 1 or "second.ckpt" not in lines[0] or "\n" in lines[0]:
                return f"said {lines}"
            return None

        return call

    return Case(f"checkpoints/newest {what}", "", make, fine=True)


def _no_file(what: str, says: str, make: Callable[[Path], Any], door: str) -> Case:
    return Case(f"checkpoints/{door} {what}", says, lambda place, folder: make(folder))


def _a_folder(folder: Path) -> list[str]:
    (folder / "bad.ckpt").mkdir()
    return _inspect(folder)


def checkpoint_cases(chance: random.Random) -> list[Case]:
    """Return the bad checkpoints; cuts and flips are drawn from `chance`."""

    def cut() -> tuple[str, Damage]:
        share = chance.random()
        return f"cut at {share:.4f}", lambda good: good[: int(share * len(good))]

    def flip() -> tuple[str, Damage]:
        places = [chance.uniform(0.02, 0.98) for _ in range(3)]
        return f"flipped at {places[0]:.4f}", _flip(places)

    cases = []
    for what, (damage, says) in _WHOLE.items():
        if what != "garbage after the end":
            cases.append(_case("inspect", what, damage, says, _inspect))
        cases.append(_case("load", what, damage, says, _load))
    for what, (damage, says) in _LOADED.items():
        cases.append(_case("fit", what, damage, says, _fit))
        cases.append(_from_checkpoint(what, damage, says))
    for what, (damage, says) in _RESUMED.items():
        cases.append(_case("fit", what, damage, says, _fit))
    for _ in range(8):
        what, damage = cut()
        cases += [_case("inspect", what, damage, "bad.ckpt", _inspect), _case("load", what, damage, "bad.ckpt", _load)]
        cases.append(_passed_over(what, damage))
    for _ in range(6):
        what, damage = flip()
        cases += [_case("load", what, damage, "bad.ckpt", _load), _passed_over(what, damage)]
    for _ in range(2):
        for what, damage in (cut(), flip()):
            cases += [_case("fit", what, damage, "bad.ckpt", _fit), _from_checkpoint(what, damage, "bad.ckpt")]
            cases += [_case("validate", what, damage, "bad.ckpt", _validate), _resume(what, damage)]
    for what in ("empty", "text", "foreign zip", "malicious bare pickle"):
        cases.append(_passed_over(what, _WHOLE[what][0]))
        cases.append(_resume(what, _WHOLE[what][0]))
        cases.append(_from_checkpoint(what, _WHOLE[what][0], "bad.ckpt"))
    cases.append(_no_file("missing", "bad.ckpt", _inspect, "inspect"))
    cases.append(_no_file("folder", "bad.ckpt", _a_folder, "inspect"))
    return cases
