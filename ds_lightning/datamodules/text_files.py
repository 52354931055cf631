"""Texts from files, with a vocabulary of their own."""

import hashlib
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ds_lightning.errors import ConfigError, DataError
from ds_lightning.functional.seeds import derived_seed

from .loaders import batch_loader, training_order
from .streams import stratified_order
from .text_reading import Column, TextsRead, read_texts
from .text_vocabulary import UNKNOWN, Level, Vocabulary, check_words, most_common, read_vocabulary
from .token_texts import TokenTexts


class TextFiles(L.LightningDataModule):
    r"""Texts from CSV, TSV, JSONL or plain text files, as token ids: small, and without a download.

    Batches are `{"text": int64 (B, L), "label": int64 (B,)}`: L is the longest text of the batch, 0 is padding at the
    end, 1 an unknown word. The vocabulary holds the most common words of the whole file `train` (also of the texts that
    are held out or left out by `train_size`, so it is the same for any seed and any number of labels). It is in the
    checkpoint: a resume, a test and a prediction from a checkpoint read texts with the checkpoint's. To fine-tune on
    another file than the pre-training's, give the checkpoint as `vocabulary`.

    After `setup()` there are `class_names` (those of `train`, sorted), `num_classes`, `vocabulary` and
    `dataset_info()`. `vocab_size` is what a model needs. `predict` reads the test texts. The order follows from the
    seed and the epoch.

    Args:
        train: path of the training texts: `.csv`, `.tsv`, `.jsonl`, or `.txt` with a label and a text on each line (see
            `read_texts`).
        val: path of the validation texts; None holds out `val_fraction` of the training texts, by class.
        test: path of the test texts.
        text_column: the name of the text's column or key; a number counts columns from 0 in a file without a header.
        label_column: that of the label; None reads no labels.
        batch_size: texts a batch and process, >= 1.
        max_length: tokens of a text that are kept, >= 1.
        vocab_size: ids that may occur, with padding and unknown, >= 3; rarer words are unknown.
        level: `word` (runs of letters and digits, and each other sign) or `char`.
        lower: ignore case.
        vocabulary: a checkpoint that was trained with `TextFiles`, or a file with one word a line, to take the words
            from; None counts them.
        val_fraction: in (0, 1); plays no part with `val`.
        train_size: train on so many texts only, each class in its share; None takes all.
        seed: of the split and the order.
        num_workers: processes that load; 0 is the fastest.
        drop_last: leave out the last training batch when it isn't full.
        pin_memory: load into page-locked memory, which a copy to a GPU needs to run beside the training.

    Raises:
        ConfigError: an argument out of its range.
        DataError: from `setup()`: a file that is not there or can't be read, or a label that `train` lacks.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp(), "texts.txt")
        >>> _ = path.write_text("good what a fine film\nbad what a bore\n" * 10)
        >>> data = TextFiles(str(path), batch_size=2)
        >>> data.setup()
        >>> data.class_names, next(iter(data.val_dataloader()))["text"].shape
        (['bad', 'good'], torch.Size([2, 4]))
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        text_column: Column = "text",
        label_column: Column | None = "label",
        batch_size: int = 64,
        max_length: int = 64,
        vocab_size: int = 20000,
        level: Level = "word",
        lower: bool = True,
        vocabulary: str | None = None,
        val_fraction: float = 0.1,
        train_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_length", max_length, 1),
            ("vocab_size", vocab_size, 3),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ConfigError(f"{name} is {value}; expected an integer >= {least}")
        if train_size is not None and train_size < 1:
            raise ConfigError(f"train_size is {train_size}; expected an integer >= 1, or null for all texts")
        if not 0 < val_fraction < 1:
            raise ConfigError(f"val_fraction is {val_fraction}; expected a number in (0, 1)")
        if level not in ("word", "char"):
            raise ConfigError(f"level is {level!r}; expected word or char")
        self.save_hyperparameters()
        self.paths = {"train": train, "val": val, "test": test}
        self.text_column = text_column
        self.label_column = label_column
        self.batch_size = batch_size
        self.max_length = max_length
        self.vocab_size = vocab_size
        self.level: Level = level
        self.lower = lower
        self.vocabulary_path = vocabulary
        self.val_fraction = val_fraction
        self.train_size = train_size
        self.seed = seed
        self.num_workers = num_workers
        self.drop_last = drop_last
        self.pin_memory = pin_memory
        self.class_names: list[str] = []
        self._vocabulary: Vocabulary | None = None
        self._splits: dict[str, TokenTexts] = {}

    @property
    def num_classes(self) -> int:
        """The number of classes; there after `setup()`."""
        return len(self.class_names)

    @property
    def vocabulary(self) -> Vocabulary:
        """The words and their numbers; there after `setup()`."""
        if self._vocabulary is None:
            raise DataError("TextFiles has no vocabulary yet; call setup() first")
        return self._vocabulary

    @property
    def splits(self) -> dict[str, TokenTexts]:
        """The data sets `train`, `val` and, where there is one, `test`; there after `setup()`."""
        if not self._splits:
            raise DataError("TextFiles has no data yet; call setup() first")
        return self._splits

    def dataset_info(self) -> dict[str, Any]:
        """Return `name`, `source`, `digest` and the sizes of the `splits`, for the tracking of a run."""
        total = hashlib.sha256()
        paths = [path for path in self.paths.values() if path is not None]
        for path in paths:
            total.update(Path(path).read_bytes())
        sizes = {split: len(self.splits.get(split, ())) for split in self.paths}
        return {
            "name": type(self).__name__,
            "source": ", ".join(paths),
            "digest": total.hexdigest()[:16],
            "splits": sizes,
        }

    def setup(self, stage: str | None = None) -> None:
        """Read the files, count the words, and split."""
        if self._splits:
            return
        read = {
            split: read_texts(path, self.text_column, self.label_column)
            for split, path in self.paths.items()
            if path is not None
        }
        found = read["train"]
        self.class_names = sorted(set(found.labels or ()), key=_by_number)
        if self._vocabulary is None:
            self._vocabulary = self._words(found.texts)
        labels = {split: self._numbers(split, part) for split, part in read.items()}
        kept, held = self._split(labels["train"], len(found.texts), hold_out="val" not in read)
        splits = {"train": self._part(found.texts, labels["train"], kept)}
        splits["val"] = self._part(found.texts, labels["train"], held)
        for split in ("val", "test"):
            if split in read:
                splits[split] = self._part(read[split].texts, labels[split], None)
        self._splits = splits

    def state_dict(self) -> dict[str, Any]:
        """Return the vocabulary and how a text becomes tokens."""
        words = self.vocabulary
        return {"vocabulary": list(words.words), "level": words.level, "lower": words.lower}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read the texts with the vocabulary of `state_dict`."""
        for name, value in (("level", self.level), ("lower", self.lower)):
            if state_dict[name] != value:
                raise ConfigError(
                    f"{name} is {value!r}, and the checkpoint was trained with {state_dict[name]!r}; expected the same"
                )
        words = list(state_dict["vocabulary"])
        check_words(words, self.vocab_size)
        if self._vocabulary is not None and self._vocabulary.words == words:
            return
        self._vocabulary = Vocabulary(words, self.level, self.lower)
        for part in self._splits.values():
            part.encode(self._vocabulary)

    def train_dataloader(self) -> DataLoader[Any]:
        """The shuffled training texts; each process of a distributed run gets its share."""
        data = self.splits["train"]
        return self._loader(data, sampler=training_order(data, self.trainer, self.seed), drop_last=self.drop_last)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation texts, in order."""
        return self._loader(self.splits["val"])

    def test_dataloader(self) -> DataLoader[Any]:
        """The test texts, in order."""
        if "test" not in self.splits:
            raise DataError("TextFiles has no test texts; give test a file, or use `validate`")
        return self._loader(self.splits["test"])

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test texts, in order."""
        return self.test_dataloader()

    def _loader(self, data: TokenTexts, **options: Any) -> DataLoader[Any]:
        return batch_loader(
            data,
            self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            **options,
        )

    def _words(self, texts: list[str]) -> Vocabulary:
        if self.vocabulary_path is not None:
            words = read_vocabulary(self.vocabulary_path)
            check_words(words, self.vocab_size)
        else:
            words = most_common(texts, self.vocab_size - UNKNOWN - 1, self.level, self.lower)
        return Vocabulary(words, self.level, self.lower)

    def _numbers(self, split: str, part: TextsRead) -> Tensor | None:
        if part.labels is None:
            return None
        numbers = {name: number for number, name in enumerate(self.class_names)}
        unknown = sorted(set(part.labels) - set(numbers))
        if unknown:
            raise DataError(
                f"{self.paths[split]} has the label {unknown[0]!r}, which the training texts lack; expected one of "
                f"{', '.join(self.class_names)}"
            )
        return torch.tensor([numbers[label] for label in part.labels])

    def _split(self, labels: Tensor | None, texts: int, hold_out: bool) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "split"))
        order = stratified_order(torch.zeros(texts, dtype=torch.int64) if labels is None else labels, generator)
        held = round(self.val_fraction * texts) if hold_out else 0
        if hold_out and not 0 < held < texts:
            raise ConfigError(
                f"val_fraction is {self.val_fraction}, which leaves {held} of {texts} texts for validation; choose one "
                "that leaves some for both validation and training"
            )
        least = max(1, self.num_classes)
        if self.train_size is not None and not least <= self.train_size <= texts - held:
            raise ConfigError(f"train_size is {self.train_size}; expected {least} to {texts - held} texts")
        return order[held:][: self.train_size], order[:held]

    def _part(self, texts: list[str], labels: Tensor | None, rows: Tensor | None) -> TokenTexts:
        if rows is not None:
            texts = [texts[row] for row in rows.tolist()]
            labels = None if labels is None else labels[rows]
        return TokenTexts(texts, labels, self.vocabulary, self.max_length)


def _by_number(name: str) -> tuple[int, int, str]:
    """Sort classes that are numbers by their value, before all others."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)
