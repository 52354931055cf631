"""Series of numbers from `.npy` and `.csv` files and from lists."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def read_series(source: Path | str | list[Any], channels: int, length: int) -> Tensor:
    """Read a series and keep its first `length` steps.

    Args:
        source: a path of an `.npy` file of shape (channels, T), or (T,) with one channel; a path of a `.csv` file with
            a step on each line and a column for each channel, with or without a header; or a list, or its JSON: one of
            numbers with one channel, otherwise a list of numbers for each channel.
        channels: that the series must have.
        length: steps that are kept, >= 1.

    Returns:
        (channels, T) float32, 1 <= T <= length, all finite.

    Raises:
        ValueError: another shape, no steps, or what is no finite number.

    Example:
        >>> read_series("[[1, 2, 3], [4, 5, 6]]", channels=2, length=2)
        tensor([[1., 2.],
                [4., 5.]])
    """
    if isinstance(source, Path):
        values, what = _from_file(source, channels, length), f"series {str(source)!r}"
    else:
        what = "the series"
        values = _from_list(json.loads(source) if isinstance(source, str) else source)
    if values.ndim == 1 and channels == 1:
        values = values[None]
    if values.ndim != 2 or values.shape[0] != channels:
        turned = " (transpose it?)" if values.ndim == 2 and values.shape[1] == channels else ""
        raise ValueError(f"{what} has the shape {tuple(values.shape)}; expected ({channels}, steps){turned}")
    if values.shape[1] == 0:
        raise ValueError(f"{what} has no steps; expected one at least, or nothing where it is missing")
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{what} holds {values.dtype}; expected numbers")
    with np.errstate(over="ignore"):
        numbers = torch.from_numpy(values[:, :length].astype(np.float32))
    if not bool(numbers.isfinite().all()):
        step = int((~numbers.isfinite()).any(0).nonzero()[0])
        raise ValueError(f"{what} has a number that is NaN, infinite or too large at step {step}; expected finite ones")
    return numbers


def _from_list(values: Any) -> NDArray[Any]:
    if not isinstance(values, list):
        raise ValueError(f"the series is a {type(values).__name__}; expected a list of numbers")
    parts = values if values and all(isinstance(part, list) for part in values) else [values]
    for part in parts:
        for value in part:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"the series holds {value!r:.60}; expected numbers in one list for each channel")
    if len({len(part) for part in parts}) > 1:
        raise ValueError("the channels of the series have different lengths; expected the same")
    return np.array(values, dtype=np.float64)


def _from_file(path: Path, channels: int, length: int) -> NDArray[Any]:
    kind = path.suffix.lower()
    if kind == ".npy":
        # Mapped: only the steps that are kept are read.
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a damaged header raises nearly anything
            raise ValueError(f"series {str(path)!r} can't be read ({' '.join(str(error).split())})") from error
        if not isinstance(array, np.ndarray):
            raise ValueError(f"series {str(path)!r} is an archive; expected one array")
        return array
    if kind == ".csv":
        return _from_csv(path, channels, length)
    raise ValueError(f"series {str(path)!r} is of no known kind; expected .npy or .csv, or a list in the manifest")


def _from_csv(path: Path, channels: int, length: int) -> NDArray[Any]:
    steps: list[list[float]] = []
    header = False
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        for row in filter(None, reader):
            if len(steps) == length:
                break
            where = f"series {str(path)!r}, line {reader.line_num}"
            if len(row) != channels:
                raise ValueError(f"{where} has {len(row)} columns; expected {channels}, one for each channel")
            try:
                steps.append([float(value) for value in row])
            except ValueError as error:
                if steps or header or any(map(_is_number, row)):
                    raise ValueError(f"{where} holds {', '.join(row)!r:.60}; expected numbers") from error
                header = True
    return np.array(steps, dtype=np.float64).reshape(-1, channels).T


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
