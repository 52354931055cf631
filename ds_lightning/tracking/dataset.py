"""What a run was trained on: name, size and a digest of the data, for MLflow's "Datasets used"."""

import copy
import hashlib
import json
import random
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from ds_lightning.tracking.harmless import harmless

if TYPE_CHECKING:
    from ds_lightning.tracking.runs import Run

_BYTES_OF_AN_ARRAY = 65536
_ITEMS_OF_A_LIST = 64
_SAMPLES = 4
_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random)


class TrainingData:
    """Describe a Trainer's data once; its loader may not be there before the first step."""

    def __init__(self) -> None:
        self._trainer: weakref.ref[Trainer] | None = None

    @property
    def awaited(self) -> bool:
        """Whether there is a Trainer whose data wasn't seen yet."""
        return self._trainer is not None

    def expect(self, trainer: Trainer) -> None:
        """Look at the data of this Trainer, as soon as possible."""
        self._trainer = weakref.ref(trainer)

    def log(self, run: "Run") -> None:
        """Log the description to a run, the first time that there is one."""
        with harmless("dataset"):
            if (dataset := self.take()) is not None:
                run.dataset(dataset)

    def take(self) -> dict[str, Any] | None:
        """Return the description, the first time that there is one."""
        trainer = None if self._trainer is None else self._trainer()
        self._trainer = None
        if trainer is None:
            return None
        dataset = describe(trainer)
        if dataset is None and trainer.global_step == 0:
            self.expect(trainer)
        return dataset


def describe(trainer: Trainer) -> dict[str, Any] | None:
    """Describe the training data as the fields of an `mlflow.entities.Dataset`.

    Args:
        trainer: a Trainer in or before fit. `trainer.datamodule.dataset_info()` is asked when there is one:
            it returns name, source, digest and splits (name -> number of samples). Otherwise the dataset of
            the train dataloader is looked at.

    Returns:
        name, digest, source_type, source and profile; None as long as the loader isn't there.
    """
    info = getattr(trainer.datamodule, "dataset_info", None)  # type: ignore[attr-defined]
    if callable(info):
        return _entity(**info())
    loader = _train_loader(trainer)
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        return None
    inner = dataset
    while isinstance(inner, Subset):
        inner = inner.dataset
    size = _length(dataset)
    name = type(inner).__name__
    source = f"{type(inner).__module__}.{type(inner).__qualname__}"
    return _entity(name, source, digest(dataset), {} if size is None else {"train": size})


def digest(dataset: Any) -> str:
    """Fingerprint a dataset: 16 hexadecimal digits.

    Arrays and lists as long as the dataset that it holds are hashed (first and last 64 KiB of an array, first
    64 items of a list), so that no sample is drawn. A dataset that holds none is copied and asked for its
    first four samples, with the random number generators put back afterwards. What can be neither copied nor
    read, and iterable datasets, get the digest of class and length.

    Args:
        dataset: any dataset; it is not changed.
    """
    hashed = hashlib.sha256(f"{type(dataset).__qualname__} {_length(dataset)}".encode())
    if not _add_attributes(hashed, dataset, depth=3) and not isinstance(dataset, IterableDataset):
        try:
            samples = _first_samples(dataset)
        # The user's own code runs here; whatever it raises, training will tell.
        except Exception:
            samples = []
        for sample in samples:
            _add_value(hashed, sample)
    return hashed.hexdigest()[:16]


def _entity(name: str, source: Any, digest: str, splits: Mapping[str, int]) -> dict[str, Any]:
    text = str(source)
    kind: str
    place: dict[str, Any]
    if text.startswith(("http://", "https://")):
        kind, place = "http", {"url": text}
    elif "/" in text or "\\" in text:
        kind, place = "local", {"uri": text}
    else:
        kind, place = "code", {"tags": {"mlflow.source.name": text}}
    profile: dict[str, Any] = {"splits": dict(splits)}
    if "train" in splits:
        profile["num_rows"] = splits["train"]
    return {
        "name": name[:500],
        "digest": digest[:36],
        "source_type": kind,
        "source": json.dumps(place),
        "profile": json.dumps(profile),
    }


def _train_loader(trainer: Trainer) -> Any:
    """Return the loader that the Trainer has or was given: calling `train_dataloader()` may draw or build."""
    loader = trainer.train_dataloader
    if loader is None:
        loader = trainer.fit_loop._data_source.instance
    if isinstance(loader, Mapping):
        loader = next(iter(loader.values()), None)
    if isinstance(loader, list | tuple):
        loader = loader[0] if loader else None
    return loader if isinstance(loader, DataLoader) or isinstance(getattr(loader, "dataset", None), Dataset) else None


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    # Any error of the user's own __len__ means that there is no length to tell.
    except Exception:
        return None


def _add_attributes(hashed: Any, dataset: Any, depth: int) -> bool:
    if isinstance(dataset, Subset):
        _add_value(hashed, list(dataset.indices))
        return _add_attributes(hashed, dataset.dataset, depth)
    if isinstance(dataset, ConcatDataset):
        found_in = [_add_attributes(hashed, part, depth - 1) for part in dataset.datasets] if depth > 0 else []
        return any(found_in)
    found, size = False, _length(dataset)
    for name in sorted(vars(dataset)) if hasattr(dataset, "__dict__") else ():
        value = vars(dataset)[name]
        if size is not None and _holds_samples(value, size):
            hashed.update(name.encode())
            found = _add_value(hashed, value) or found
        elif isinstance(value, Dataset) and depth > 0:
            found = _add_attributes(hashed, value, depth - 1) or found
    return found


def _holds_samples(value: Any, size: int) -> bool:
    """Tell data from settings: a mean and a standard deviation are arrays too, but shorter than the dataset."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0 and len(value) >= max(size, 1)
    if isinstance(value, Mapping):
        return any(_holds_samples(item, size) for item in list(value.values())[:_ITEMS_OF_A_LIST])
    if isinstance(value, list | tuple):
        return len(value) >= max(size, 1) or any(_holds_samples(item, size) for item in value[:_ITEMS_OF_A_LIST])
    return False


def _add_value(hashed: Any, value: Any) -> bool:
    """Add a value's bytes; False when it holds nothing that stays the same from one process to the next."""
    if isinstance(value, Tensor):
        value = value.detach()
        if value.is_meta or value.layout is not torch.strided:
            return False
        flat = value.reshape(-1)
        count = max(1, _BYTES_OF_AN_ARRAY // max(1, flat.element_size()))
        ends = torch.cat([flat[:count], flat[max(count, len(flat) - count) :]]).cpu().contiguous()
        hashed.update(f"{value.dtype} {tuple(value.shape)}".encode())
        hashed.update(ends.view(torch.uint8).numpy().tobytes() if len(ends) else b"")
        return True
    if isinstance(value, np.ndarray) and value.dtype != object:
        flat_array = value.reshape(-1) if value.flags.c_contiguous else value.flat
        count = max(1, _BYTES_OF_AN_ARRAY // max(1, value.itemsize))
        hashed.update(f"{value.dtype} {value.shape}".encode())
        hashed.update(np.asarray(flat_array[:count]).tobytes())
        hashed.update(np.asarray(flat_array[max(count, value.size - count) :]).tobytes())
        return True
    if isinstance(value, Mapping):
        added = [_add_value(hashed, item) for item in value.values()]
        return any(added)
    if isinstance(value, list | tuple):
        hashed.update(str(len(value)).encode())
        added = [_add_value(hashed, item) for item in value[:_ITEMS_OF_A_LIST]]
        return any(added)
    if isinstance(value, str | bytes | int | float | bool | np.generic):
        hashed.update(repr(value).encode())
        return True
    return False


def _first_samples(dataset: Any) -> list[Any]:
    # A copy: a file that the dataset opens at its first sample must not be shared with forked workers. The
    # copy is shallow, because the data may fill the memory; only what may draw numbers is copied deeply.
    clone = copy.copy(dataset)
    for name, value in list(vars(clone).items()):
        if isinstance(value, torch.Generator):
            setattr(clone, name, value.clone_state())
        elif isinstance(value, _GENERATORS) or (callable(value) and not isinstance(value, type)):
            setattr(clone, name, copy.deepcopy(value))
    with _same_random_numbers():
        return [clone[index] for index in range(min(_SAMPLES, len(clone)))]


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Seed the global generators for the duration, and put them back."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda._initialized else []
    try:
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
