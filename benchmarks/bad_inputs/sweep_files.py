"""Bad sweep files."""

import copy
from pathlib import Path
from typing import Any

import yaml

from .case import Case, Place

_BASE: dict[str, Any] = {
    "base": {"config": ["small.yaml"], "overrides": {"trainer.limit_val_batches": 1}},
    "space": {"model.label_smoothing": {"type": "float", "low": 0.0, "high": 0.1}},
    "objective": {"metric": "val/loss", "direction": "minimize"},
    "trials": 1,
}
_FLOAT = {"type": "float", "low": 0.0, "high": 0.1}
_SPACES: dict[str, tuple[Any, str]] = {
    "min above max": ({"model.label_smoothing": {**_FLOAT, "low": 0.5}}, "label_smoothing"),
    "no low": ({"model.label_smoothing": {"type": "float", "high": 0.1}}, "low"),
    "log from 0": ({"model.label_smoothing": {**_FLOAT, "log": True}}, "log"),
    "log and step": ({"model.label_smoothing": {**_FLOAT, "low": 0.01, "log": True, "step": 0.1}}, "step"),
    "step 0": ({"model.label_smoothing": {**_FLOAT, "step": 0}}, "step"),
    "no number": ({"model.label_smoothing": {**_FLOAT, "high": "much"}}, "high"),
    "infinite": ({"model.label_smoothing": {**_FLOAT, "high": float("inf")}}, "high"),
    "unknown type": ({"model.label_smoothing": {**_FLOAT, "type": "flaot"}}, "flaot"),
    "unknown argument": ({"model.label_smoothing": {**_FLOAT, "hihg": 1}}, "hihg"),
    "no choices": ({"model.network": {"type": "categorical", "choices": []}}, "choices"),
    "a choice twice": ({"model.network": {"type": "categorical", "choices": ["a", "a"]}}, "twice"),
    "choices is text": ({"model.network": {"type": "categorical", "choices": "resnet8"}}, "choices"),
    "unknown key": ({"model.smoothing": _FLOAT}, "smoothing"),
    "unknown group": ({"modle.label_smoothing": _FLOAT}, "modle"),
    "out of the module's range": ({"model.label_smoothing": {**_FLOAT, "low": 2.0, "high": 3.0}}, "label_smoothing"),
    "a float for an int": ({"data.batch_size": {"type": "float", "low": 0.5, "high": 1.5}}, "batch_size"),
    "an int with fractions": ({"data.batch_size": {"type": "int", "low": 0.5, "high": 8}}, "low"),
    "a list": ([1, 2], "space"),
    "empty": ({}, "space"),
    "an entry is text": ({"model.label_smoothing": "float"}, "label_smoothing"),
    "when in a circle": (
        {"a": {"type": "int", "low": 0, "high": 1, "when": {"b": 1}}, "b": {"type": "int", "low": 0, "high": 1}}
        | {"b": {"type": "int", "low": 0, "high": 1, "when": {"a": 1}}},
        "circle",
    ),
    "when of nothing": ({"model.label_smoothing": {**_FLOAT, "when": {"x": 1}}}, "when"),
    "a number as key": ({3: _FLOAT}, "3"),
    "a billion steps": ({"data.batch_size": {"type": "int", "low": 1, "high": 10**30}}, "batch_size"),
}
_KEYS: list[tuple[str, Any, str]] = [
    ("objective", {"metric": "val/loss"}, "direction"),
    ("objective", {"metric": "val/loss", "direction": "down"}, "down"),
    ("objective", {"metric": 3, "direction": "minimize"}, "metric"),
    ("objective", [], "objective"),
    ("objective", {"metric": "val/los", "direction": "minimize"}, "val/los"),
    ("objective", [{"metric": "val/loss", "direction": "minimize"}] * 2, "twice"),
    ("sampler", "tpee", "tpee"),
    ("sampler", {"name": "tpe", "n_startup": 3}, "n_startup"),
    ("sampler", {"name": "tpe", "n_startup_trials": "x"}, "n_startup_trials"),
    ("sampler", {"seed": 3}, "name"),
    ("sampler", "grid", "grid"),
    ("pruner", "medain", "medain"),
    ("pruner", {"name": "percentile", "percentile": 400}, "percentile"),
    ("pruner", {"name": "hyperband", "reduction_factor": 0}, "reduction_factor"),
    ("pruner", [1], "pruner"),
    *(("trials", value, "trials") for value in (0, -1, 1.5, "many", True)),
    *(("timeout", value, "timeout") for value in (0, -3, "long")),
    *(("max_retries", value, "max_retries") for value in (-1, "x")),
    *(("name", value, "name") for value in ("a/b", "", 3)),
    ("storage", "nonsense://x", "nonsense"),
    ("storage", "sqlite:////proc/nothing/x.db", "/proc/nothing"),
    ("storage", "/proc/nothing/x.journal", "/proc/nothing"),
    ("storage", 3, "storage"),
    ("experiment", 3, "experiment"),
    ("surprise", 3, "surprise"),
    ("base", {"config": ["nowhere.yaml"]}, "nowhere.yaml"),
    ("base", {"config": 3}, "config"),
    ("base", {"config": ["small.yaml"], "overrides": {"trainer.max_epoch": 3}}, "max_epoch"),
    ("base", {"config": ["small.yaml"], "overrides": {"model.label_smoothing": 0.1}}, "label_smoothing"),
    ("base", {"config": ["small.yaml"], "override": {}}, "override"),
    ("base", {"config": []}, "model"),
]
_TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "sweep"),
    "broken": (b"base: {config: [\n", "bad.yaml"),
    "binary": (bytes(range(256)), "bad.yaml"),
    "not UTF-8": ("name: h\xe9\n".encode("latin-1"), "bad.yaml"),
    "a list": (b"- base\n", "sweep file"),
    "key twice": (b"trials: 1\ntrials: 2\n", "twice"),
    "a list as key": (b"? [a, b]\n: 1\n", "bad.yaml"),
    "deep": (b"base: " + b"[" * 20000 + b"]" * 20000, "bad.yaml"),
    "Python tag": (b"base: !!python/object/apply:os.system ['touch EXECUTED']\n", "bad.yaml"),
    "endless alias": (b"base: &b {config: [*b]}\nspace: {}\nobjective: {}\n", "alias"),
}
_WORDS: dict[str, tuple[list[str], str]] = {
    "no file": (["sweep"], "FILE"),
    "missing file": (["sweep", "nowhere.yaml"], "nowhere.yaml"),
    "a folder": (["sweep", "mlruns"], "mlruns"),
    "trials 0": (["sweep", "sweep.yaml", "--trials=0"], "trials"),
    "trials text": (["sweep", "sweep.yaml", "--trials=x"], "--trials"),
    "workers 0": (["sweep", "sweep.yaml", "--workers=0"], "workers"),
    "timeout below 0": (["sweep", "sweep.yaml", "--timeout=-1"], "timeout"),
    "unknown study": (["sweep", "sweep.yaml", "--study=nope/../../x"], "nope"),
    "unknown option": (["sweep", "sweep.yaml", "--trails=3"], "--trails"),
    "store is a file": (["sweep", "sweep.yaml", "--store=small.yaml"], "small.yaml"),
}


def _bomb() -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for number in range(1, 12):
        lines.append(f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]")
    return "\n".join([*lines, "base: {config: *a11}", "space: {}", "objective: {}"]).encode()


def _file(name: str, text: bytes, says: str) -> Case:
    def make(_: Place, folder: Path) -> list[str]:
        (folder / "bad.yaml").write_bytes(text)
        (folder / "small.yaml").write_text(Path("small.yaml").read_text())
        return ["sweep", str(folder / "bad.yaml")]

    return Case(f"sweeps/{name}", says, make)


def _key(name: str, key: str, value: Any, says: str) -> Case:
    content = copy.deepcopy(_BASE)
    content[key] = value
    return _file(name, yaml.safe_dump(content).encode(), says)


def sweep_cases() -> list[Case]:
    """Return the bad sweep files."""
    cases = [_key(f"space {name}", "space", space, says) for name, (space, says) in _SPACES.items()]
    cases += [_key(f"{key}={value!r}", key, value, says) for key, value, says in _KEYS]
    cases += [_file(f"file {name}", text, says) for name, (text, says) in _TEXTS.items()]
    cases.append(_file("file bomb", _bomb(), "aliases"))
    for name, (words, says) in _WORDS.items():
        cases.append(Case(f"sweeps/words {name}", says, lambda place, folder, words=words: list(words)))
    return cases
