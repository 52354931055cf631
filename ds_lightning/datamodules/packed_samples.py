"""Decoded samples, end to end in one tensor for each modality: in memory, or mapped from files."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_lightning.errors import DataError

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.uint8, torch.int64, torch.float16, torch.float32)
}
_INDEX = "index.json"


class PackedColumn:
    """One modality of all samples; where a sample has nothing, it has no elements.

    Args:
        values: all elements, end to end, (elements,); empty where only the sizes are kept.
        offsets: where each sample begins, and the end of the last one, (N + 1,) int64.
        lead: the leading sizes of a sample, whose last size follows from the number of its elements.
    """

    def __init__(self, values: Tensor, offsets: Tensor, lead: tuple[int, ...]) -> None:
        self.values = values
        self.offsets = offsets
        self.lead = lead

    @property
    def lengths(self) -> Tensor:
        """The last size of each sample, 0 where there is none, (N,) int64."""
        return self.offsets.diff() // math.prod(self.lead)

    def __getitem__(self, row: int) -> Tensor | None:
        start, end = self.offsets[row : row + 2].tolist()
        return self.values[start:end].view(*self.lead, -1) if end > start else None


class PackWriter:
    """Gathers decoded samples.

    Args:
        folder: where the elements are written; None keeps them in memory.
        keep: false keeps the sizes alone.
    """

    def __init__(self, folder: Path | None = None, *, keep: bool = True) -> None:
        self.folder = folder
        self.keep = keep
        self.count = 0
        self._parts: dict[str, list[Tensor]] = {}
        self._sizes: dict[str, list[int]] = {}
        self._forms: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}

    def add(self, sample: Mapping[str, Tensor]) -> None:
        """Append a sample, which may have nothing.

        Raises:
            DataError: a tensor of another type or shape than those before; only its last size may differ.
        """
        for name, value in sample.items():
            form = (value.dtype, tuple(value.shape[:-1]))
            expected = self._forms.setdefault(name, form)
            if form != expected:
                raise DataError(
                    f"{name} is {form[0]} of shape {(*form[1], 'any')}; expected {expected[0]} of shape "
                    f"{(*expected[1], 'any')} as before"
                )
            sizes = self._sizes.setdefault(name, [])
            sizes.extend([0] * (self.count - len(sizes)))
            sizes.append(value.numel())
            if self.keep:
                self._parts.setdefault(name, []).append(value.flatten())
        self.count += 1

    def extend(self, columns: Mapping[str, PackedColumn], count: int) -> None:
        """Append what another writer has gathered: `count` samples."""
        for name, column in columns.items():
            form = (column.values.dtype, column.lead)
            self._forms.setdefault(name, form)
            sizes = self._sizes.setdefault(name, [])
            sizes.extend([0] * (self.count - len(sizes)))
            sizes.extend(column.offsets.diff().tolist())
            if self.folder is not None:
                with (self.folder / f"{name}.bin").open("ab") as file:
                    file.write(column.values.numpy().tobytes())
            elif self.keep:
                # A copy: what a worker sends is in shared memory and keeps a file open.
                self._parts.setdefault(name, []).append(column.values.clone())
        self.count += count

    def finish(self) -> dict[str, PackedColumn]:
        """Return the columns that are in memory."""
        columns = {}
        for name, (dtype, lead) in self._forms.items():
            parts = self._parts.pop(name, [])
            values = torch.cat(parts) if parts else torch.empty(0, dtype=dtype)
            columns[name] = PackedColumn(values, _offsets(self._sizes[name], self.count), lead)
        return columns

    def write_index(self, extra: Mapping[str, Any]) -> None:
        """Write beside the elements what `read_pack` needs, and `extra` plain values."""
        assert self.folder is not None
        forms = {name: [str(dtype).removeprefix("torch."), *lead] for name, (dtype, lead) in self._forms.items()}
        index = {"forms": forms, "sizes": self._sizes, "count": self.count, **extra}
        (self.folder / _INDEX).write_text(json.dumps(index))


def read_pack(folder: Path) -> tuple[dict[str, PackedColumn], dict[str, Any]]:
    """Return the columns of a folder that a `PackWriter` has written, and all values of its index.

    Raises:
        DataError: the folder is not complete.
    """
    try:
        index = json.loads((folder / _INDEX).read_text())
        columns = {}
        for name, (kind, *lead) in index["forms"].items():
            offsets = _offsets(index["sizes"][name], index["count"])
            size, dtype = int(offsets[-1]), _DTYPES[kind]
            values = torch.empty(0, dtype=dtype)
            if size:
                values = torch.from_file(str(folder / f"{name}.bin"), shared=False, size=size, dtype=dtype)
            columns[name] = PackedColumn(values, offsets, tuple(lead))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"the cache {folder} is damaged ({reason}); remove it, and it is made anew") from error
    return columns, index


def is_pack(folder: Path) -> bool:
    """Whether there is a finished pack."""
    return (folder / _INDEX).is_file()


def _offsets(sizes: Iterable[int], count: int) -> Tensor:
    offsets = torch.zeros(count + 1, dtype=torch.int64)
    found = torch.tensor(list(sizes), dtype=torch.int64)
    offsets[1 : len(found) + 1] = found
    return offsets.cumsum(0)
