"""Samples of several modalities from one manifest."""

import math
from typing import Any, Literal, TypeVar

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

from ds_lightning.errors import ConfigError, DataError

from .manifest_columns import AudioColumn, Column, ImageColumn, TextColumn
from .manifest_data import ManifestData, Split
from .manifest_loaders import ManifestLoaders, replicas_of
from .manifest_schema import Schema
from .manifest_statistics import Statistics
from .manifest_store import ManifestStore
from .manifest_text import ManifestText
from .manifest_values import Decoder, Tokenizer
from .manifest_watch import FolderWatch
from .multimodal_batches import Batch, sample_shapes
from .multimodal_device import DeviceStep
from .spec_augment import SpecAugment
from .transforms import Transform

_STATISTICS_OF = 1000
_NO_DATA = "MultimodalManifest has no data yet; call setup() first"
_Kind = TypeVar("_Kind", bound=Column)


class MultimodalManifest(L.LightningDataModule):
    r"""Images, texts, audio, series and tables from a manifest: CSV, JSONL or Parquet, one row a sample.

    Batches have a key for each modality of the schema: `image` (B, C, H, W), normalised; `text` (B, L) token ids;
    `audio` (B, mels, T) log-mel, standardised; `series` (B, channels, T) and `table` (B, F), standardised; with
    `audio_mask` and `series_mask` (B, T) bool, true for real frames; `present` (B, modalities) bool, in the order of
    `modalities`: what is absent is all zeros and must not be read; `label` (B,) int64, or (B, classes) float32 in
    multi-label. A missing number of a table is the training mean, and a column at the end says that it is missing.

    `setup` decodes every row once, so that what is broken is known before training; `num_workers` help. For several
    processes give `cache` a folder that they all see. Vocabulary and class names are those of the training manifest;
    mean and deviation are of up to 1,000 training rows. They are in the checkpoint, with the counters of mixing and
    augmentation. The order follows from the seed and the epoch. Images are normalised, augmented and mixed on the
    device, with a Trainer.

    After `setup()` there are `modalities`, `class_names`, `num_classes`, `vocab_size`, `input_shapes`, `skipped` and
    `dataset_info()`. `predict` reads the test rows.

    Args:
        path: the training manifest; with `watch` a folder.
        schema: the modality and sizes of each column, and the label: a mapping, or the path of a YAML file (see
            `Schema.from_any`).
        val_path: the validation manifest; None holds out `val_fraction` of the training rows, by class.
        test_path: the test manifest.
        root: the folder that relative paths start from; None is the manifest's own.
        val_fraction: in (0, 1); plays no part with `val_path`.
        batch_size: samples a batch and process, >= 1.
        num_workers: processes that load.
        bucket: put samples of like length into a batch.
        cache: `memory`; `none`, which decodes in each epoch anew; or a folder, which the next run uses again.
        on_error: `raise` an entry that can't be used, or `skip` its row, with a warning that counts and the list
            `skipped`.
        mix: `none` or `mixup` (see `MultimodalMixer`).
        mix_alpha: of MixUp's Beta(alpha, alpha), > 0.
        transform: for training images: takes `image=` (H, W, C) uint8 and returns `{"image": ...}`, uint8 of the same
            size, such as albumentations' Compose.
        watch: `path` is a folder that fills: at each reload of the loaders, rows and files that have come since are
            taken up (see `FolderWatch`). Needs `Trainer(reload_dataloaders_every_n_epochs=1)`. Rows are split by the
            hash of their names, so that none changes sides. A resumed fit sees what is there by then.
        watch_tolerance: with the schema's `time`: the greatest distance of a file from its row, in seconds, >= 0.
        seed: of the split, the order, the augmentation and the mixing.
        drop_last: leave out the last training batch when it isn't full.
        pin_memory: load into page-locked memory.

    Raises:
        ConfigError: an argument out of its range, or a schema that can't be.
        DataError: from `setup()`: a manifest that can't be read, or an entry that can't be used.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp(), "pets.csv")
        >>> _ = path.write_text("words,age,kind\n" + "it barks,3,dog\nit purrs,,cat\n" * 10)
        >>> data = MultimodalManifest(
        ...     str(path), {"columns": {"words": "text", "age": "table"}, "label": "kind"}, batch_size=4
        ... )
        >>> data.setup()
        >>> data.modalities, data.class_names, next(iter(data.train_dataloader()))["text"].shape
        (('text', 'table'), ['cat', 'dog'], torch.Size([4, 2]))
    """

    def __init__(
        self,
        path: str,
        schema: dict[str, Any] | str,
        val_path: str | None = None,
        test_path: str | None = None,
        root: str | None = None,
        val_fraction: float = 0.1,
        batch_size: int = 32,
        num_workers: int = 0,
        bucket: bool = True,
        cache: str = "memory",
        on_error: Literal["raise", "skip"] = "raise",
        mix: Literal["none", "mixup"] = "none",
        mix_alpha: float = 0.2,
        transform: Transform | None = None,
        watch: bool = False,
        watch_tolerance: float = 1.0,
        seed: int = 0,
        drop_last: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise ConfigError(f"{name} is {value}; expected an integer >= {least}")
        if not 0 < val_fraction < 1:
            raise ConfigError(f"val_fraction is {val_fraction}; expected a number in (0, 1)")
        if not 0 <= watch_tolerance < math.inf:
            raise ConfigError(f"watch_tolerance is {watch_tolerance}; expected seconds >= 0")
        for name, word, words in (("on_error", on_error, ("raise", "skip")), ("mix", mix, ("none", "mixup"))):
            if word not in words:
                raise ConfigError(f"{name} is {word!r}; expected {' or '.join(words)}")
        if not 0 < mix_alpha < math.inf:
            raise ConfigError(f"mix_alpha is {mix_alpha}; expected a number > 0")
        self.schema = Schema.from_any(schema)
        if transform is not None and "image" not in self.schema.modalities:
            raise ConfigError("transform is for images, and the schema has no image column; leave it out")
        # A callable would make the checkpoint need pickle.
        self.save_hyperparameters(ignore=["transform"])
        self.paths = {"train": path, "val": val_path, "test": test_path}
        self.root = root
        self.val_fraction = val_fraction
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.bucket = bucket
        self.cache = cache
        self.on_error = on_error
        self.transform = transform
        self.watch = watch
        self.watch_tolerance = watch_tolerance
        self.seed = seed
        self.drop_last = drop_last
        self.pin_memory = pin_memory
        self.modalities = self.schema.modalities
        self.class_names: list[str] = []
        image = _column(self.schema, ImageColumn)
        place = self.modalities.index("image") if image else 0
        self.device_step = DeviceStep(image, place, mix_alpha if mix == "mixup" else 0.0, seed)
        audio = _column(self.schema, AudioColumn)
        self.spec_augment = SpecAugment(**audio.spec_augment) if audio and audio.spec_augment else None
        text = _column(self.schema, TextColumn)
        # Made here for what it refuses; it has the tokenizer of the folder that the schema may name.
        tokenizer = Decoder(self.schema, ".").tokenizer
        self._text = None if text is None else ManifestText(text, tokenizer)
        self._statistics: Statistics | None = None
        self._data: ManifestData | None = None
        self._splits: dict[str, Split] = {}
        self._watcher: FolderWatch | None = None

    @property
    def num_classes(self) -> int:
        """The number of classes; there after `setup()`."""
        return len(self.class_names)

    @property
    def vocab_size(self) -> int:
        """The number of token ids that a model of the texts needs."""
        if self._text is None:
            raise DataError("the schema has no text column, so there is no vocab_size")
        return self._text.vocab_size

    @property
    def data(self) -> ManifestData:
        """The decoded rows; there after `setup()`."""
        if self._data is None:
            raise DataError(_NO_DATA)
        return self._data

    @property
    def skipped(self) -> list[tuple[int, str]]:
        """The line and the reason of each row that can't be used; there after `setup()`, with on_error skip."""
        return self.data.skipped

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of a sample of each modality, with the longest audio and series; there after `setup()`."""
        if self._statistics is None:
            raise DataError(_NO_DATA)
        return sample_shapes(self.schema, self.data.store, self._statistics)

    def dataset_info(self) -> dict[str, Any]:
        """Return `name`, `source`, `digest` and the sizes of the `splits`, for the tracking of a run."""
        return {
            "name": f"MultimodalManifest-{'-'.join(self.modalities)}",
            "source": ", ".join(path for path in self.paths.values() if path is not None),
            "digest": self.data.digest(),
            "splits": {split: len(self._splits[split].rows) if split in self._splits else 0 for split in self.paths},
        }

    def setup(self, stage: str | None = None) -> None:
        """Read and decode all rows once, and tell the random streams which process this is."""
        if self._data is None:
            tokenizer = None if self._text is None else self._text.tokenizer
            store = ManifestStore(self.cache, self.num_workers)
            data = ManifestData(self.schema, store, self.root, tokenizer, skip=self.on_error == "skip")
            for split, path in self.paths.items():
                if split == "train" and self.watch:
                    assert path is not None
                    data.root = path if self.root is None else self.root
                    self._watcher = FolderWatch(path, self.schema, self.watch_tolerance, root=self.root)
                    self._look(data, self._watcher)
                elif path is not None:
                    data.read(split, path)
            self._data = data
            self._agree()
            self._arrange()
        self.device_step.set_rank(replicas_of(self.trainer)["rank"])

    @property
    def vocabulary(self) -> Tokenizer | None:
        """What turns texts into numbers, and back where it has `decode`; None without texts, or before `setup`."""
        return None if self._text is None else self._text.tokenizer

    def state_dict(self) -> dict[str, Any]:
        """Return the class names, the vocabulary, what standardises, and the counters of the random streams."""
        state: dict[str, Any] = {"class_names": list(self.class_names)}
        if self._text is not None and self._text.words is not None:
            state["vocabulary"] = list(self._text.words)
        if self._statistics is not None:
            state["statistics"] = self._statistics.state_dict()
        return state | self.device_step.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read the rows as those of `state_dict` were; a random stream that it doesn't know starts anew."""
        self.class_names = list(state_dict["class_names"])
        if self._text is not None and "vocabulary" in state_dict:
            self._text.use(list(state_dict["vocabulary"]))
        if "statistics" in state_dict:
            self._statistics = Statistics.from_state(state_dict["statistics"])
        self.device_step.load_state_dict(state_dict)
        if self._data is not None:
            self._arrange()

    def train_dataloader(self) -> DataLoader[Any]:
        """The shuffled training rows; each process of a distributed run gets its share."""
        if self._watcher is not None:
            self._look_again()
        return self._loaders("train").training(
            self._splits["train"],
            self.trainer,
            bucket=self.bucket,
            drop_last=self.drop_last,
            transform=self.transform,
            spec_augment=self.spec_augment,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation rows, in order."""
        return self._loaders("val").in_order(self._splits["val"])

    def test_dataloader(self) -> DataLoader[Any]:
        """The test rows, in order."""
        return self._loaders("test").in_order(self._splits["test"])

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test rows, in order."""
        return self.test_dataloader()

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Draw who is mixed with whom (training)."""
        return self.device_step.before(batch) if self._training else batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment images (training), normalise them, and mix (training), on the batch's device."""
        batch = self.device_step.after(batch, training=self._training)
        if self.trainer is not None and "image" in batch:
            # Lightning converts a batch to the run's precision before it is here, while images are uint8.
            batch["image"] = self.trainer.precision_plugin.convert_input(batch["image"])
        return batch

    @property
    def _training(self) -> bool:
        return self.trainer is not None and self.trainer.training

    def _agree(self) -> None:
        if self.trainer is not None and self.trainer.world_size > 1 and torch.distributed.is_initialized():
            self.data.agree()

    def _arrange(self) -> None:
        """Split the rows, and count and measure what the state doesn't have."""
        data = self.data
        hold = (self.val_fraction, self.seed)
        self._splits = data.splits(self.class_names, hold, by_name=self.watch)
        self.class_names = data.class_names
        if self._text is not None and self._text.tokenizer is None:
            self._text.count(data.texts())
        if self._statistics is None:
            rows = self._splits["train"].rows
            # The order of the split is random already, or that of arrival.
            self._statistics = Statistics.of(map(data.store.fetch, rows[:_STATISTICS_OF].tolist()))

    def _look(self, data: ManifestData, watcher: FolderWatch) -> bool:
        """Take up what has come; the first process looks, for all."""
        found = (watcher.look(), watcher.broken) if self.trainer is None or self.trainer.is_global_zero else None
        if self.trainer is not None:
            found = self.trainer.strategy.broadcast(found)
        assert found is not None
        return data.take_arrivals(*found)

    def _look_again(self) -> None:
        assert self._watcher is not None
        if self.trainer is not None and not getattr(self.trainer, "reload_dataloaders_every_n_epochs", 0):
            raise ConfigError(
                "watch needs Trainer(reload_dataloaders_every_n_epochs=1), or what comes would never be looked for"
            )
        if self._look(self.data, self._watcher):
            self._agree()
            self._arrange()

    def _loaders(self, split: str) -> ManifestLoaders:
        """Return what makes the loaders, with the sizes of now, for a split that is there."""
        data = self.data
        if split not in self._splits:
            raise DataError(f"there are no rows for {split}; give {split}_path")
        assert self._statistics is not None
        sizes = (self.batch_size, self.num_workers, self.seed, self.pin_memory)
        return ManifestLoaders(self.schema, data.store, self._statistics, self._text, *sizes)


def _column(schema: Schema, kind: type[_Kind]) -> _Kind | None:
    return next((column for column in schema.columns.values() if isinstance(column, kind)), None)
