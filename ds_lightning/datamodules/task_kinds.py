"""Which tasks a stream has: their names, their classes, and what changes from one to the next."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_lightning.errors import ConfigError, DataError
from ds_lightning.functional.seeds import derived_seed

from .image_data import ImageData
from .image_folder import ImageFolder
from .task_shifts import DOMAINS, PixelPermutation, Rotation, Shift, domain_shift

KINDS = ("permuted", "rotated", "split", "domain", "list")
LABELS = ("class", "domain", "known")


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Args:
        name: fit for the name of a metric.
        source: which DataModule has the images.
        labels: label of the DataModule -> label of the stream, int64; -1 for a class that the task lacks.
        shift: changes the images; None leaves them.
        allowed: outputs that the task permits, (num_classes,) bool; None says nothing about it.
    """

    name: str
    source: int
    labels: Tensor
    shift: Shift | None = None
    allowed: Tensor | None = None


def sources(data: Any, seed: int) -> list[ImageData]:
    """Return the DataModules that `data` names: one, or a list of DataModules and folders.

    Args:
        data: as the user gave it.
        seed: of the folders' DataModules.

    Raises:
        ConfigError: anything else.
    """
    several = isinstance(data, Sequence) and not isinstance(data, str)
    found: list[ImageData] = []
    for number, entry in enumerate(data if several else [data]):
        if several and isinstance(entry, str):
            found.append(ImageFolder(entry, seed=seed))
        elif isinstance(entry, ImageData):
            found.append(entry)
        else:
            raise ConfigError(
                f"data{f'[{number}]' if several else ''} is a {type(entry).__name__}; expected an image DataModule "
                "such as MNIST5k, or a list of DataModules and folders"
            )
    return found


def make_tasks(
    data: Sequence[ImageData],
    kind: str,
    tasks: int,
    *,
    labels: str,
    angle: float,
    shifts: Sequence[str],
    severity: float,
    seed: int,
) -> tuple[list[Task], list[str]]:
    """Return the tasks of any kind, and the names of the stream's classes; the arguments are `TaskStream`'s."""
    if kind == "list":
        return listed_tasks(data, labels)
    if kind == "split":
        return split_tasks(data[0], tasks, labels)
    return shifted_tasks(data[0], kind, tasks, angle=angle, shifts=shifts, severity=severity, seed=seed)


def shifted_tasks(
    data: ImageData, kind: str, tasks: int, *, angle: float, shifts: Sequence[str], severity: float, seed: int
) -> tuple[list[Task], list[str]]:
    """Return tasks of the same classes under other pixel orders, angles or domains, and the classes' names.

    Args:
        data: after its setup.
        kind: permuted, rotated or domain.
        tasks: how many.
        angle: between one task and the next, in degrees.
        shifts: names of `DOMAINS`, one a task.
        severity: of the shifts, > 0.
        seed: of permutations and noise.
    """
    channels, height, width = data.input_shape
    made: list[Task] = []
    for number in range(tasks):
        shift: Shift | None = None
        if kind == "permuted":
            name = f"permutation_{number}"
            if number > 0:
                shift = PixelPermutation(height, width, derived_seed(seed, "permutation", number))
        elif kind == "rotated":
            name = f"rotated_{number * angle:g}"
            if number > 0:
                shift = Rotation(height, width, number * angle)
        else:
            name = shifts[number]
            shift = domain_shift(name, (channels, height, width), severity, derived_seed(seed, "domain", number))
        made.append(Task(name, 0, torch.arange(data.num_classes), shift))
    return made, list(data.class_names)


def split_tasks(data: ImageData, tasks: int, labels: str) -> tuple[list[Task], list[str]]:
    """Return tasks of different classes, in their order, and the names of the stream's classes.

    Args:
        data: after its setup.
        tasks: how many; the first ones get one class more when they don't come out even.
        labels: one of `LABELS`.

    Raises:
        ConfigError: more tasks than the classes are enough for.
    """
    least = 1 if labels == "class" else 2
    if tasks * least > data.num_classes:
        raise ConfigError(
            f"tasks is {tasks}; with labels={labels} a task has at least {least} of the {data.num_classes} classes: "
            f"expected at most {data.num_classes // least}"
        )
    groups = [group.tolist() for group in torch.arange(data.num_classes).tensor_split(tasks)]
    names = ["-".join(data.class_names[number] for number in group) for group in groups]
    return _labelled(names, [0] * tasks, groups, list(groups), list(data.class_names), labels)


def listed_tasks(data: Sequence[ImageData], labels: str) -> tuple[list[Task], list[str]]:
    """Return a task for each DataModule; classes of one name are one class.

    Args:
        data: after their setup.
        labels: one of `LABELS`.

    Raises:
        DataError: images of different shapes.
    """
    for number, module in enumerate(data):
        if tuple(module.input_shape) != tuple(data[0].input_shape):
            raise DataError(
                f"the images of task {number} are {tuple(module.input_shape)}, those of task 0 "
                f"{tuple(data[0].input_shape)}; expected one shape: set image_size, or resize them"
            )
    everything = list(dict.fromkeys(name for module in data for name in module.class_names))
    numbers = {name: number for number, name in enumerate(everything)}
    groups = [[numbers[name] for name in module.class_names] for module in data]
    names = [Path(module.source).name if hasattr(module, "data_dir") else type(module).__name__ for module in data]
    own = [list(range(len(group))) for group in groups]
    return _labelled(names, list(range(len(data))), groups, own, everything, labels)


def _labelled(
    names: list[str],
    sources: list[int],
    groups: list[list[int]],
    own: list[list[int]],
    everything: list[str],
    labels: str,
) -> tuple[list[Task], list[str]]:
    tasks: list[Task] = []
    for name, source, group, originals in zip(_distinct(names), sources, groups, own, strict=True):
        target = torch.full((len(everything),), -1)
        target[originals] = torch.arange(len(group)) if labels == "domain" else torch.tensor(group)
        allowed = None
        if labels == "known":
            allowed = torch.zeros(len(everything), dtype=torch.bool)
            allowed[group] = True
        tasks.append(Task(name, source, target, allowed=allowed))
    if labels == "domain":
        most = max(len(group) for group in groups)
        everything = [
            " / ".join(dict.fromkeys(everything[group[place]] for group in groups if place < len(group)))
            for place in range(most)
        ]
    return tasks, everything


def _distinct(names: list[str]) -> list[str]:
    plain = [re.sub(r"[^\w.-]+", "_", name) for name in names]
    return [name if plain.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(plain)]


def check_list(data: Any, kind: str, tasks: int) -> None:
    """Raise a ConfigError when a list and the kind or number of tasks do not fit."""
    several = isinstance(data, Sequence)
    if several != (kind == "list") or (several and len(data) == 0):
        entries = f"a list of {len(data)}" if several else "one DataModule"
        raise ConfigError(
            f"kind is {kind!r} and data is {entries}; kind=list takes a list of at least one, no other does"
        )
    if several and tasks != len(data):
        raise ConfigError(f"tasks is {tasks}, but data lists {len(data)}; leave it out")


def check_kind(
    data: Sequence[ImageData],
    kind: str,
    tasks: int,
    *,
    labels: str,
    angle: float,
    shifts: Sequence[str],
    severity: float,
) -> None:
    """Raise a ConfigError that names the argument which does not fit the kind of stream."""
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
    if labels not in LABELS:
        raise ConfigError(f"labels is {labels!r}; expected one of {', '.join(LABELS)}")
    if tasks < 1:
        raise ConfigError(f"tasks is {tasks}; expected an integer >= 1")
    if labels != "class" and kind not in ("split", "list"):
        raise ConfigError(f"labels is {labels!r}, but all tasks of kind {kind} have the same classes; leave it out")
    unknown = [name for name in shifts if name not in DOMAINS]
    if unknown or len(set(shifts)) != len(shifts):
        raise ConfigError(f"shifts is {list(shifts)}; expected different names of {', '.join(DOMAINS)}")
    if kind == "domain" and tasks > len(shifts):
        raise ConfigError(f"tasks is {tasks}; expected at most one a shift: {len(shifts)} ({', '.join(shifts)})")
    if not severity > 0:
        raise ConfigError(f"severity is {severity}; expected a number > 0")
    turns = {round(number * angle % 360, 6) for number in range(tasks)}
    if kind == "rotated" and len(turns) < tasks:
        raise ConfigError(f"angle is {angle}, so that {tasks} tasks have {len(turns)} different angles; choose another")
    for module in data:
        if labels == "known" and module.mixer is not None:
            raise ConfigError(
                "labels=known can't go with mixup_alpha or cutmix_alpha: a mixed image may have a partner whose class "
                "its task does not allow; set both to 0"
            )
        augment = module.augment
        if augment is not None and (kind == "permuted" or (kind == "rotated" and augment.horizontal_flip)):
            raise ConfigError(
                f"kind={kind} can't go with crop_padding or horizontal_flip: they would work on the changed image; "
                "leave them out"
            )
