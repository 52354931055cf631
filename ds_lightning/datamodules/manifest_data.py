"""The rows of the manifests of one DataModule: decoded, numbered by class, and split."""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ds_lightning.errors import DataError

from .manifest_labels import class_names_of, held_by_name, held_out, label_tensor
from .manifest_reading import Row, read_manifest
from .manifest_schema import Schema
from .manifest_store import ManifestStore
from .manifest_values import Decoder, Tokenizer
from .manifest_watch import Arrivals
from .multimodal_batches import as_text


class Split(NamedTuple):
    """Some rows of the store, (N,) int64, and their labels, (N,) int64 or (N, classes) float32."""

    rows: Tensor
    labels: Tensor


class ManifestData:
    """Reads the manifests, and knows which of their rows can be used, for what.

    Args:
        schema: what the columns are.
        store: where the decoded rows are put.
        root: the folder that relative paths start from; None is each manifest's own.
        tokenizer: of a folder, so that it isn't read anew for each manifest.
        skip: leave out rows that can't be used, and do not raise.
    """

    def __init__(
        self, schema: Schema, store: ManifestStore, root: str | None, tokenizer: Tokenizer | None, skip: bool
    ) -> None:
        self.schema = schema
        self.store = store
        self.root = root
        self.tokenizer = tokenizer
        self.skip = skip
        self.class_names: list[str] = []
        self.skipped: list[tuple[int, str]] = []
        # What can't be used and is no row, such as a manifest that has come into a folder.
        self.elsewhere: list[str] = []
        # Where a row stands -> its number in the store: a row that is replaced by a new one keeps its place.
        self._places: dict[str, dict[str, int]] = {"train": {}}

    def read(self, split: str, path: str) -> None:
        """Decode a whole manifest."""
        self.take(split, path, read_manifest(path, self.schema))

    def take_arrivals(self, arrivals: Mapping[Path, Arrivals], broken: Mapping[str, str]) -> bool:
        """Decode what has come into a watched folder, and return whether there was anything."""
        self.elsewhere = list(broken.values())
        if self.elsewhere and not self.skip:
            raise DataError(self.elsewhere[0])
        for path, (rows, names) in arrivals.items():
            self.take("train", path, rows, names)
        return bool(arrivals)

    def agree(self) -> None:
        """Leave out what any process of a distributed run can't use, such as a file that came too late for one.

        Each decodes for itself. With other rows left out, they would take different numbers of steps, and wait for
        each other for ever.

        Raises:
            DataError: the processes have found different numbers of rows.
        """
        mine = [(len(part.rows), part.broken) for part in self.store.parts]
        all_of_them: list[list[tuple[int, dict[int, str]]]] = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(all_of_them, mine)
        if any([size for size, _ in theirs] != [size for size, _ in mine] for theirs in all_of_them):
            raise DataError(
                "the processes have read manifests of different lengths; expected the same files for all of them, that "
                "nobody writes to"
            )
        for theirs in all_of_them:
            for part, (_, broken) in zip(self.store.parts, theirs, strict=True):
                for row, reason in broken.items():
                    part.broken.setdefault(row, reason)

    def take(self, split: str, path: str | Path, rows: list[Row], names: list[str] | None = None) -> None:
        """Decode rows of a manifest.

        Args:
            split: train, val or test.
            path: of the manifest.
            rows: from `read_manifest`.
            names: of the rows; one that is there already is replaced. None names them by their position.
        """
        root = Path(path).parent if self.root is None else Path(self.root)
        decoder = Decoder(self.schema, root, self.tokenizer, name=path)
        first = len(self.store)
        self.store.add(rows, decoder, stop=not self.skip)
        names = [f"{path}:{number}" for number in range(len(rows))] if names is None else names
        self._places.setdefault(split, {}).update(zip(names, range(first, len(self.store)), strict=True))

    def splits(self, class_names: list[str], hold: tuple[float, int], *, by_name: bool) -> dict[str, Split]:
        """Return the rows of each split that can be used, and note the others in `skipped`.

        Args:
            class_names: all that may occur; empty takes those of the training manifest.
            hold: `val_fraction` and the seed, where there is no manifest for validation.
            by_name: whether the split follows from the names of the rows, and not from their number.

        Raises:
            DataError: no row of a split can be used, or one can't and `skip` is off.
        """
        self.class_names = class_names or class_names_of(
            names for row in self._places["train"].values() for names in self._label(row)
        )
        self.skipped = [(0, reason) for reason in self.elsewhere]
        found = {split: self._usable(split) for split in self._places}
        if self.skipped:
            total = sum(map(len, self._places.values()))
            warnings.warn(
                f"{len(self.skipped)} of {total} rows can't be used and are skipped (all in `skipped`), first: "
                f"{self.skipped[0][1]}",
                UserWarning,
                stacklevel=3,
            )
        splits = {}
        for split, usable in found.items():
            rows = torch.tensor(list(usable.values()), dtype=torch.int64)
            labels = [self.store.label(row) for row in usable.values()]
            splits[split] = Split(
                rows, label_tensor(labels, self.class_names, multilabel=self.schema.label.kind == "multilabel")
            )
        if "val" not in splits:
            whole = splits["train"]
            kept, held = held_by_name(list(found["train"]), *hold) if by_name else held_out(whole.labels, *hold)
            splits["train"], splits["val"] = (Split(whole.rows[part], whole.labels[part]) for part in (kept, held))
        return splits

    def texts(self) -> Iterator[str]:
        """Go through the texts of the training manifest."""
        for row in self._places["train"].values():
            if self.store.broken(row) is None:
                text = self.store.fetch(row).get("text")
                if text is not None:
                    yield as_text(text)

    def digest(self) -> str:
        """Return what tells these rows from others: the first 16 hexadecimal digits of a SHA-256."""
        total = hashlib.sha256()
        for split, places in self._places.items():
            total.update(split.encode())
            for row in places.values():
                entries = sorted(self.store.row(row).items(), key=lambda entry: entry[0])
                total.update(repr(entries).encode("utf-8", "surrogatepass"))
        return total.hexdigest()[:16]

    def _label(self, row: int) -> list[list[str]]:
        return [] if self.store.broken(row) is not None else [self.store.label(row)]

    def _usable(self, split: str) -> dict[str, int]:
        usable = {}
        known = set(self.class_names)
        for name, row in self._places[split].items():
            reason = self.store.broken(row)
            unknown = next((label for label in self.store.label(row) if label not in known), None)
            if reason is None and unknown is not None:
                reason = (
                    f"{self.store.where(row)}: the label is {unknown!r}, which is none of the classes of training; "
                    f"expected {_some(self.class_names)}"
                )
            if reason is None:
                usable[name] = row
            elif self.skip:
                self.skipped.append((self.store.line(row), reason))
            else:
                raise DataError(reason)
        if not usable:
            why = f"; the first reason: {self.skipped[0][1]}" if self.skipped else ""
            raise DataError(f"no row for {split} can be used{why}")
        return usable


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
