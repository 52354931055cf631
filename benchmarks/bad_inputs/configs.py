"""Bad configuration files and words for `fit` and `validate`."""

import copy
from pathlib import Path
from typing import Any

import yaml

from .case import Case, Place

_BASE: dict[str, Any] = {
    "model": {"class_path": "Classifier", "init_args": {"network_options": {"width": 2}}},
    "data": {"class_path": "MNIST5k", "init_args": {"batch_size": 20, "train_size": 40}},
    "trainer": {
        **{"accelerator": "cpu", "logger": False, "fast_dev_run": True, "enable_progress_bar": False},
        **{"enable_model_summary": False},
    },
}
_NAN, _INFINITE = float("nan"), float("inf")
_MODEL: list[tuple[str, Any]] = [
    *(("num_classes", value) for value in (1, 0, -3, "ten")),
    *(("in_channels", value) for value in (0, -1, 2.5)),
    *(("image_size", value) for value in (0, -5, "big")),
    *(("label_smoothing", value) for value in (1.0, -0.1, _NAN, "much")),
    *(("network", value) for value in ("resnet9", "", "elsewhere/resnet18", "torchvision/", "timm/none", "../x")),
    *(("network_options", value) for value in ({"width": 0}, {"widht": 4}, [1], {"norm": "layer"}, {"width": "a"})),
    *(("lr_scheduler", value) for value in ("cosin", 3, {"class_path": "torch.optim.lr_scheduler.Nothing"})),
    ("optimizer", {"class_path": "torch.optim.Nothing"}),
    ("optimizer", {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentun": 0.9}}),
]
_DATA: list[tuple[str, Any]] = [
    *(("batch_size", value) for value in (0, -1, 2.5, "many")),
    *(("num_workers", value) for value in (-1, "two")),
    *(("val_fraction", value) for value in (0.0, 1.0, _NAN, -1.0)),
    *(("train_size", value) for value in (0, 5, 10**9, "all")),
    *(("mixup_alpha", value) for value in (-1.0, _NAN, _INFINITE)),
    *(("cutmix_alpha", value) for value in (-0.5, _NAN)),
    *(("mix_probability", value) for value in (2.0, -0.1, _NAN)),
    *(("crop_padding", value) for value in (-1, "wide")),
    ("seed", "lucky"),
    ("transform", {"class_path": "albumentations.Normalize"}),
    ("transform", {"class_path": "albumentations.Nothing"}),
]
_FOLDER: list[tuple[str, Any]] = [
    *(("image_size", value) for value in (0, -8)),
    ("mean", [0.5]),
    ("std", [0.0, 1.0, 1.0]),
    ("std", [_NAN, 1.0, 1.0]),
    ("data_dir", "nowhere"),
]
_TRAINER: list[tuple[str, Any]] = [
    *(("max_epochs", value) for value in ("x", -5)),
    *(("accelerator", value) for value in ("tpuu", 3)),
    *(("devices", value) for value in (0, "all")),
    *(("precision", value) for value in ("17", 5)),
    *(("callbacks", value) for value in ("text", [42], [{"class_path": "Nope"}], [{"init_args": {}}])),
    ("strategy", "ddpp"),
    ("accumulate_grad_batches", 0),
    ("max_time", "soon"),
    ("num_nodes", 0),
    ("fast_dev_run", -1),
    ("gradient_clip_algorithm", "cut"),
    ("max_epoch", 3),
    ("logger", {"class_path": "MLflowTraker"}),
    ("plugins", "nothing"),
]
_CALLBACKS: list[tuple[str, str, Any]] = [
    *(("DynamicLayerLR", "alpha", value) for value in (0.0, -1.0, _NAN)),
    *(("DynamicLayerLR", "bounds", value) for value in ([2.0, 3.0], [1.0], [0.0, 2.0], "wide", [0.5, _NAN])),
    *(("DynamicLayerLR", "every", value) for value in (0, 1.5)),
    *(("DynamicLayerLR", "ema", value) for value in (1.0, -0.1, _NAN)),
    *(("DynamicLayerLR", "warmup", value) for value in (-1, "long")),
    *(("DynamicLayerLR", "include", value) for value in ("conv", ["nothing.like.this"])),
    *(("DynamicLayerLR", "exclude", value) for value in ("conv", 3)),
    *(("FiniteGuard", "max_consecutive", value) for value in (0, "x")),
    *(("FiniteGuard", "max_total", value) for value in (0, -1)),
    *(("ExactResume", "seed", value) for value in (-1, "x")),
    *(("Preemption", "signals", value) for value in (["SIGKILL"], ["SIGNOPE"], "SIGTERM", [9])),
    *(("DurableCheckpoint", name, value) for name, value in (("save_top_k", -2), ("mode", "mid"), ("every", 3))),
    *(("DurableCheckpoint", "every_n_train_steps", value) for value in (-1, "x")),
]
_TRACKER: list[tuple[str, Any, str]] = [
    ("experiment", "", "experiment"),
    *(("flush_timeout", value, "flush_timeout") for value in (0.0, -1.0, _NAN, "x")),
    ("store", "file:///tmp/x", "file:"),
    ("store", "nonsense://x", "nonsense"),
    ("store", "http://127.0.0.1:9", "127.0.0.1:9"),
    ("run_id", "no-such-run", "no-such-run"),
    ("tags", [1], "tags"),
]


def _bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for number in range(1, 12):
        lines.append(f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]")
    return "\n".join([*lines, "trainer: {callbacks: *a11}"])


_TEXTS: dict[str, tuple[bytes, str]] = {
    "broken": (b"model: {class_path: [\n", "bad.yaml"),
    "tabs": (b"trainer:\n\tmax_epochs: 1\n", "bad.yaml"),
    "empty": (b"", "bad.yaml"),
    "only a comment": (b"# nothing\n", "bad.yaml"),
    "binary": (bytes(range(256)) * 8, "bad.yaml"),
    "not UTF-8": ("trainer: {max_epochs: 1}  # h\xe9\n".encode("latin-1"), "bad.yaml"),
    "UTF-16": ("trainer: {max_epochs: x}\n".encode("utf-16"), "bad.yaml"),
    "a list": (b"- trainer\n- model\n", "bad.yaml"),
    "a number": (b"42\n", "bad.yaml"),
    "a text": (b"just words\n", "bad.yaml"),
    "key twice": (b"trainer: {max_epochs: 1}\ntrainer: {max_epochs: 2}\n", "trainer"),
    "nested key twice": (b"trainer:\n  max_epochs: 1\n  max_epochs: 2\n", "max_epochs"),
    "deep": (b"trainer: " + b"[" * 20000 + b"]" * 20000, "bad.yaml"),
    "deep mapping": (b"trainer: " + b"{a: " * 3000 + b"1" + b"}" * 3000, "bad.yaml"),
    "bomb": (_bomb().encode(), "bad.yaml"),
    "endless alias": (b"trainer: &t {callbacks: [*t]}\n", "bad.yaml"),
    "Python tag": (b"trainer: !!python/object/apply:os.system ['touch EXECUTED']\n", "bad.yaml"),
    "unknown tag": (b"trainer: !mine {max_epochs: 1}\n", "bad.yaml"),
    "missing alias": (b"trainer: *nowhere\n", "bad.yaml"),
    "two documents": (b"trainer: {max_epochs: 1}\n---\ntrainer: {max_epochs: 2}\n", "bad.yaml"),
    "NUL": (b"trainer: {max_epochs: 1\x00}\n", "bad.yaml"),
    "unknown key": (b"trainr: {max_epochs: 1}\n", "trainr"),
    "model is a list": (b"model: [1, 2]\n", "model"),
    "model is null": (b"model: null\n", "model"),
    "no class": (b"model: {class_path: Classifer}\n", "Classifer"),
    "no module": (b"model: {class_path: nowhere.at.All}\n", "nowhere.at.All"),
    "no module of ours": (b"model: {class_path: ds_lightning.modules.All}\n", "ds_lightning.modules.All"),
    "a callback as model": (b"model: {class_path: FiniteGuard}\n", "FiniteGuard"),
    "outside": (b"model: {class_path: os.system, init_args: {command: 'touch EXECUTED'}}\n", "os.system"),
    "outside subprocess": (b"trainer: {callbacks: [{class_path: subprocess.Popen}]}\n", "subprocess.Popen"),
    "through torch": (b"model: {class_path: torch.os.system}\n", "posix.system"),
    "torch.hub": (b"model: {class_path: torch.hub.load}\n", "torch.hub.load"),
    "builtins": (b"data: {class_path: builtins.eval}\n", "builtins.eval"),
    "seed": (b"seed_everything: much\n", "seed_everything"),
    "seed below 0": (b"seed_everything: -4\n", "seed_everything"),
    "huge seed": (b"seed_everything: 99999999999999999999\n", "seed_everything"),
    "allow in a file": (b"allow: [os]\n", "allow"),
    "safeguards": (b"safeguards: maybe\n", "safeguards"),
    "checkpoint nowhere": (b"ckpt_path: nowhere.ckpt\n", "nowhere.ckpt"),
}
_WORDS: dict[str, tuple[list[str], str]] = {
    "nothing": (["fit"], "model"),
    "missing file": (["fit", "--config=nowhere.yaml"], "nowhere.yaml"),
    "missing preset": (["fit", "--config=callbacks/layer_rl.yaml"], "layer_rl.yaml"),
    "no value": (["fit", "--config"], "--config"),
    "a folder": (["fit", "--config=mlruns"], "mlruns"),
    "resume and checkpoint": (["fit", "--resume", "--ckpt_path=x.ckpt"], "--ckpt_path"),
    "resume an unknown run": (["fit", "--resume", "abc"], "abc"),
    "resume in an unknown experiment": (["fit", "--resume", "--trainer.logger.experiment=none"], "none"),
    "allow nothing": (["fit", "--allow"], "--allow"),
    "allow no name": (["fit", "--allow", "3x"], "3x"),
    "unknown option": (["fit", "--model=Classifier", "--modle.x=3"], "--modle.x"),
    "stray word": (["fit", "--model=Classifier", "word"], "word"),
    "help of no class": (["fit", "--model.help=Nope"], "Nope"),
    "print_config of what": (["fit", "--print_config=loud", "--model=Classifier"], "print_config"),
    "print_config of a bad value": (
        ["fit", "--model=Classifier", "--trainer.max_epochs=x", "--print_config"],
        "max_ep",
    ),
    "print_config of no class": (["fit", "--model=Nope", "--print_config"], "Nope"),
    "unknown command": (["fitt"], "fitt"),
    "preset of no name": (["presets", "callbacks/nothing.yaml"], "nothing.yaml"),
    "validate nothing": (["validate"], "model"),
    "validate a missing file": (["validate", "--config=nowhere.yaml"], "nowhere.yaml"),
    "validate no checkpoint": (["validate", "--config=small.yaml", "--ckpt_path=gone.ckpt"], "gone.ckpt"),
    "validate a bad value": (["validate", "--config=small.yaml", "--data.batch_size=0"], "batch_size"),
    "validate with resume": (["validate", "--config=small.yaml", "--resume"], "--resume"),
    "test a bad key": (["test", "--config=small.yaml", "--trainer.max=3"], "max"),
    "predict without data": (["predict", "--model=Classifier", "--trainer.logger=false"], "ata"),
}


def _config(name: str, says: str, path: str, value: Any, base: dict[str, Any] = _BASE) -> Case:
    content = copy.deepcopy(base)
    node = content
    *parents, last = path.split(".")
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value

    def make(_: Place, folder: Path) -> list[str]:
        (folder / "bad.yaml").write_text(yaml.safe_dump(content))
        return ["fit", f"--config={folder / 'bad.yaml'}"]

    return Case(f"configs/{name}={value!r}", says, make)


def _file(name: str, text: bytes, says: str) -> Case:
    def make(_: Place, folder: Path) -> list[str]:
        (folder / "bad.yaml").write_bytes(text)
        # The files that are whole but incomplete come alone, the others after a good one.
        alone = name in ("empty", "only a comment", "model is null")
        (folder / "base.yaml").write_text(yaml.safe_dump(_BASE))
        return ["fit", *([] if alone else [f"--config={folder / 'base.yaml'}"]), f"--config={folder / 'bad.yaml'}"]

    return Case(f"configs/file {name}", says, make)


def _words(name: str, words: list[str], says: str) -> Case:
    return Case(f"configs/words {name}", says, lambda place, folder: list(words))


def config_cases() -> list[Case]:
    """Return the bad configurations."""
    folder = {**_BASE, "data": {"class_path": "ImageFolder", "init_args": {"data_dir": "."}}}
    tracked = {**_BASE, "trainer": {**_BASE["trainer"], "fast_dev_run": False, "max_steps": 1, "limit_val_batches": 0}}
    cases = [_file(name, text, says) for name, (text, says) in _TEXTS.items()]
    cases += [_words(name, words, says) for name, (words, says) in _WORDS.items()]
    cases += [_config(f"Classifier.{name}", name, f"model.init_args.{name}", value) for name, value in _MODEL]
    cases += [_config(f"MNIST5k.{name}", name, f"data.init_args.{name}", value) for name, value in _DATA]
    for name, value in _FOLDER:
        says = value if name == "data_dir" else name
        cases.append(_config(f"ImageFolder.{name}", says, f"data.init_args.{name}", value, folder))
    for name, value in _TRAINER:
        says = {"logger": "MLflowTraker", "max_time": "duration"}.get(name, name)
        cases.append(_config(f"trainer.{name}", says, f"trainer.{name}", value))
    for kind, name, value in _CALLBACKS:
        entry = {"class_path": kind, "init_args": {name: value}}
        cases.append(_config(f"{kind}.{name}", name, "trainer.callbacks", [entry]))
        cases[-1] = Case(f"configs/{kind}.{name}={value!r}", name, cases[-1].make)
    for name, value, says in _TRACKER:
        entry = {"class_path": "MLflowTracker", "init_args": {name: value}}
        case = _config(name, says, "trainer.logger", entry, tracked)
        cases.append(Case(f"configs/MLflowTracker.{name}={value!r}", says, case.make))
    return cases
