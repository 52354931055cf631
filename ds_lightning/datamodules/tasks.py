"""A stream of tasks that one fit goes through, with a memory of the earlier ones."""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ds_lightning.errors import ConfigError, DataError
from ds_lightning.functional.seeds import derived_seed

from .image_data import Batch, ImageData, as_it_is
from .rehearsal import RehearsalSampler, reservoir
from .streams import next_epoch
from .task_kinds import check_kind, check_list, make_tasks, sources
from .task_samples import TaskSamples, TaskTable
from .task_shifts import DOMAINS


class TaskStream(L.LightningDataModule):
    """Train on one task after the other in one fit; each has `epochs_per_task` epochs.

    Batches are those of the DataModule that the tasks are made from, and `task` (B,) int64; with `labels="known"`
    also `allowed` (B, num_classes) bool. `validate`, and the validation in a fit, look at the current task, `test`
    at all of them; `task_dataloader` gives any. Mixing and crops are the DataModule's, also for samples of the memory.
    A fit that is not `tasks * epochs_per_task` epochs long is refused. Lightning makes the loaders anew at each epoch,
    because tasks differ in size (`reload_dataloaders_every_n_epochs` is set to 1 during a fit): with workers they
    start anew, too. `Trainer.estimated_stepping_batches` takes every task for as long as the first.

    The memory holds no tensors: what a reservoir of `memory_size` samples keeps, and what a step draws from it,
    follow from the seed, the task and the epoch. So nothing of it is in a checkpoint, ranks draw different shares,
    and `ExactResume` goes on inside an epoch. Its samples are read from the data again (arXiv 1902.10486).

    Args:
        data: the DataModule that the tasks are made from; or a list, one DataModule or folder (see `ImageFolder`) a
            task, where classes of one name are one class.
        kind: `permuted` (each task has an order of the pixels of its own; task 0 leaves it), `rotated` (each task is
            turned by `angle` more), `split` (the classes are shared out), `domain` (the same classes under blur,
            noise, another light), `list` (a list as `data`). None: `list` for a list, else `permuted`.
        tasks: how many, >= 1; None is 5, or as many as the list or `shifts` has.
        epochs_per_task: epochs before the next task, >= 1.
        labels: for `split` and `list`. `class`: the class's number. `domain`: its place among the classes of its
            task, so all tasks share those outputs (for pairs of digits: odd or even). `known`: the class's number,
            and batches say in `allowed` which outputs their task has.
        angle: for `rotated`: degrees from one task to the next.
        shifts: for `domain`: names among clear, blur, noise, contrast, bright, dark, pixelate, invert; None takes
            them in this order.
        severity: for `domain`: how strong the shifts are, > 0; 1 is plain to see.
        memory_size: the most samples of earlier tasks that are kept for rehearsal, >= 0; 0 is off.
        memory_batch_size: how many of them are added to each training batch, >= 1; None adds `batch_size`. Never more
            than the memory holds.
        allow_other_length: accept a fit that ends before the last task, or trains the last one for longer.
        seed: of permutations, noise, order and memory.

    Raises:
        ConfigError: an argument out of its range, or a combination that can't work; from `setup()` in a fit also
            a wrong `max_epochs`.
        DataError: from `setup()`: a task without samples, or images of different shapes.

    Example:
        >>> from ds_lightning.datamodules import MNIST5k
        >>> stream = TaskStream(MNIST5k(), kind="split", tasks=5, labels="domain", memory_size=200)
        >>> stream.setup()
        >>> stream.num_classes, stream.task_names
        (2, ['0-1', '2-3', '4-5', '6-7', '8-9'])
    """

    def __init__(
        self,
        data: ImageData | list[ImageData | str],
        kind: Literal["permuted", "rotated", "split", "domain", "list"] | None = None,
        tasks: int | None = None,
        epochs_per_task: int = 1,
        labels: Literal["class", "domain", "known"] = "class",
        angle: float = 30.0,
        shifts: list[str] | None = None,
        severity: float = 1.0,
        memory_size: int = 0,
        memory_batch_size: int | None = None,
        allow_other_length: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("epochs_per_task", epochs_per_task, 1), ("memory_size", memory_size, 0)):
            if value < least:
                raise ConfigError(f"{name} is {value}; expected an integer >= {least}")
        if memory_batch_size is not None and memory_batch_size < 1:
            raise ConfigError(f"memory_batch_size is {memory_batch_size}; expected an integer >= 1, or null")
        self.data = sources(data, seed)
        kind = kind or ("list" if isinstance(data, Sequence) else "permuted")
        if tasks is None:
            tasks = len(self.data) if kind == "list" else len(shifts) if kind == "domain" and shifts else 5
        shifts = list(DOMAINS if shifts is None else shifts)
        self._options: dict[str, Any] = {"labels": labels, "angle": angle, "shifts": shifts, "severity": severity}
        check_list(data, kind, tasks)
        check_kind(self.data, kind, tasks, **self._options)
        self.save_hyperparameters(ignore=["data"])
        self.kind = kind
        self.num_tasks = tasks
        self.epochs_per_task = epochs_per_task
        self.memory_size = memory_size
        self.memory_batch_size = memory_batch_size
        self.allow_other_length = allow_other_length
        self.seed = seed
        self.class_names: list[str] = []
        self._made: TaskTable | None = None
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._reload: int | None = None

    @property
    def num_classes(self) -> int:
        """The number of outputs that a model needs."""
        return len(self.class_names)

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks, fit for names of metrics; there after `setup()`."""
        return [task.name for task in self._table.tasks]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images; there after `setup()`."""
        return self.data[0].input_shape

    @property
    def current_task(self) -> int:
        """The number of the task that the trainer is at."""
        return 0 if self.trainer is None else self.task_of_epoch(self.trainer.current_epoch)

    def task_of_epoch(self, epoch: int) -> int:
        """Return the number of the task of an epoch >= 0; all later epochs have the last one."""
        return min(epoch // self.epochs_per_task, self.num_tasks - 1)

    def dataset_info(self) -> dict[str, Any]:
        """Return `name`, `source`, `digest` and the sizes of the `splits`, for the tracking of a run."""
        sizes = {split: sum(map(len, rows)) for split, rows in self._table.rows.items()}
        found = [module.dataset_info() for module in self.data]
        settings = (self.kind, self.task_names, self._options, self.seed)
        digest = hashlib.sha256(repr(([info["digest"] for info in found], settings)).encode()).hexdigest()[:16]
        return {
            "name": f"TaskStream-{self.kind}-" + "-".join(dict.fromkeys(info["name"] for info in found)),
            "source": ", ".join(dict.fromkeys(info["source"] for info in found)),
            "digest": digest,
            "splits": sizes,
        }

    def prepare_data(self) -> None:
        """Let the DataModules fetch what they need."""
        for module in self.data:
            module.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Read the data, make the tasks, and check that the fit has time for all of them."""
        if stage == "fit" and self.trainer is not None:
            self._check_length(self.trainer)
            trainer: Any = self.trainer
            self._reload, trainer.reload_dataloaders_every_n_epochs = trainer.reload_dataloaders_every_n_epochs, 1
        for module in self.data:
            module.trainer = self.trainer
            module.setup(stage)
        if self._made is not None:
            return
        tasks, names = make_tasks(self.data, self.kind, self.num_tasks, seed=self.seed, **self._options)
        self._made, self.class_names = TaskTable(self.data, tasks), names

    def teardown(self, stage: str) -> None:
        """Leave the trainer as it was."""
        for module in self.data:
            module.teardown(stage)
        if self._reload is not None and self.trainer is not None:
            trainer: Any = self.trainer
            trainer.reload_dataloaders_every_n_epochs, self._reload = self._reload, None

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment (training), normalise, and mix (training), on the batch's device; `task_dataloader` did so."""
        if batch["image"].is_floating_point():
            return batch
        training = self.trainer is not None and self.trainer.training
        module = self._source(self.current_task)
        image = batch["image"]
        if training and module.augment is not None:
            image = module.augment(image)
        scale, shift = self._normalization(image.device)
        task = batch["task"]
        batch = {**batch, "image": image.to(torch.float32, copy=True).mul_(scale[task]).add_(shift[task])}
        if training and module.mixer is not None:
            batch = module.mixer(batch, inplace=True)
        if self.trainer is not None:
            batch["image"] = self.trainer.precision_plugin.convert_input(batch["image"])
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the counters of the random streams of the DataModules."""
        return {"data": [module.state_dict() for module in self.data]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        states = state_dict["data"]
        if len(states) != len(self.data):
            raise ConfigError(
                f"the checkpoint has {len(states)} DataModules, this stream {len(self.data)}; expected as many"
            )
        for module, state in zip(self.data, states, strict=True):
            module.load_state_dict(state)

    def train_dataloader(self) -> DataLoader[Any]:
        """The current task's training samples, shuffled, with some of the memory in each batch."""
        task = 0 if self.trainer is None else self.task_of_epoch(next_epoch(self.trainer))
        module = self._source(task)
        samples = TaskSamples([self._table.part(number, "train") for number in range(task + 1)])
        cells = {id(part.data): part.data.transform.epoch for part in samples.parts if part.data.transform is not None}
        sampler = RehearsalSampler(
            samples.span(task),
            reservoir([len(part.rows) for part in samples.parts[:-1]], self.memory_size, self.seed),
            batch_size=module.batch_size,
            memory_batch_size=self.memory_batch_size or module.batch_size,
            seed=self.seed,
            epoch_cells=list(cells.values()),
            **module._replicas(),
        )
        if self.trainer is not None:
            sampler.set_epoch(next_epoch(self.trainer))
        return self._loader(samples, module, sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """The current task's validation samples, in order."""
        task = self.current_task
        return self._loader(TaskSamples([self._table.part(task, "val")]), self._source(task))

    def test_dataloader(self) -> DataLoader[Any]:
        """All tasks' test samples, one task after the other, in order."""
        parts = [self._table.part(number, "test") for number in range(self.num_tasks)]
        return self._loader(TaskSamples(parts), self.data[0])

    def predict_dataloader(self) -> DataLoader[Any]:
        """All tasks' test samples, in order."""
        return self.test_dataloader()

    def task_dataloader(self, task: int, split: str) -> DataLoader[Any]:
        """Return the samples of one task, in order, without memory and without anything random.

        Its images are float32 and normalised already, so batches are ready for the model, in a Trainer or not. In a
        distributed run every process gets all samples.

        Args:
            task: 0 to num_tasks - 1.
            split: train, val or test.
        """
        part = self._table.part(task, split, ready=True)
        return self._loader(TaskSamples([part]), self._source(task))

    def _loader(
        self, samples: TaskSamples, module: ImageData, sampler: RehearsalSampler | None = None
    ) -> DataLoader[Any]:
        return DataLoader(
            samples,
            batch_size=module.batch_size + (0 if sampler is None else sampler.memory_batch_size),
            sampler=sampler,
            num_workers=module.num_workers,
            collate_fn=as_it_is,
            drop_last=sampler is not None and module.drop_last,
            pin_memory=module.pin_memory,
            # Or the loader would take a number from the global generator, and dropout would depend on it.
            generator=torch.Generator().manual_seed(derived_seed(self.seed, "loader")),
        )

    @property
    def _table(self) -> TaskTable:
        if self._made is None:
            raise DataError("TaskStream has no data yet; call prepare_data() and setup() first")
        return self._made

    def _source(self, task: int) -> ImageData:
        return self.data[self._table.tasks[task].source]

    def _normalization(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # By task, because the DataModules of a list may differ.
        if device not in self._tables:
            pairs = [self._source(task).scale_and_shift() for task in range(self.num_tasks)]
            scale, shift = (torch.stack(values).to(device) for values in zip(*pairs, strict=True))
            self._tables[device] = (scale, shift)
        return self._tables[device]

    def _check_length(self, trainer: L.Trainer) -> None:
        needed, given = self.num_tasks * self.epochs_per_task, trainer.max_epochs
        if given == needed or self.allow_other_length or getattr(trainer, "fast_dev_run", False):
            return
        problem = "the last task would be trained for longer"
        if given is not None and 0 <= given < needed:
            problem = f"the fit would end in task {self.task_of_epoch(max(given - 1, 0))} of 0 to {self.num_tasks - 1}"
        raise ConfigError(
            f"max_epochs is {given}, so {problem}; expected {self.num_tasks} tasks * {self.epochs_per_task} "
            f"epochs_per_task = {needed}: set max_epochs, or allow_other_length=true"
        )
