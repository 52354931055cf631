"""A pruning plan as JSON: equal lists of indices once, consecutive indices as ranges."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ds_lightning.errors import DataError

Shapes = dict[str, tuple[int, ...]]
Kept = dict[str, dict[int, tuple[int, ...]]]
Attributes = dict[str, dict[str, int | tuple[int, ...]]]

_VERSION = 1


def as_json(shapes: Shapes, kept: Kept, attributes: Attributes) -> dict[str, Any]:
    """Return the description: version, lists of indices, `[shape, {dimension: number of the list}]`, attributes."""
    numbers: dict[tuple[int, ...], int] = {}
    tensors = {
        name: [list(shape), {str(d): numbers.setdefault(i, len(numbers)) for d, i in kept[name].items()}]
        for name, shape in shapes.items()
    }
    listed = {
        path: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        for path, values in attributes.items()
    }
    return {"version": _VERSION, "indices": [_ranges(i) for i in numbers], "tensors": tensors, "attributes": listed}


def from_json_types(data: Mapping[str, Any]) -> tuple[Shapes, Kept, Attributes]:
    """Return shapes, kept indices and attributes of a description.

    Raises:
        DataError: when it is none, a broken one, or of a newer version.
    """
    version = data.get("version") if isinstance(data, Mapping) else None
    if not _is_size(version):
        raise DataError("this is no pruning plan: it has no version; expected what PruningPlan.to_dict returns")
    if version != _VERSION:
        raise DataError(f"the pruning plan has version {version}; expected {_VERSION}; update ds-lightning to read it")
    try:
        shapes: Shapes = {}
        for name, (shape, _) in data["tensors"].items():
            if not isinstance(name, str) or not all(map(_is_size, shape)):
                raise ValueError(f"shape {shape} of {name}")
            shapes[name] = tuple(shape)
        # A range must not fill the memory before its bounds are checked.
        highest = max((size for shape in shapes.values() for size in shape), default=0)
        indices = [_indices(ranges, highest) for ranges in data["indices"]]
        numbered = dict(enumerate(indices))
        kept = {
            name: {int(d): numbered[number] for d, number in dims.items()}
            for name, (_, dims) in data["tensors"].items()
        }
        attributes = {
            str(path): {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            for path, values in data["attributes"].items()
        }
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"the pruning plan is broken ({error}); expected what PruningPlan.to_dict returns") from error
    return shapes, kept, attributes


def _ranges(indices: tuple[int, ...]) -> list[int]:
    """Return start and end (exclusive) of each run of consecutive indices, one after the other."""
    gaps = [bound for i, after in pairwise(indices) if after != i + 1 for bound in (i + 1, after)]
    return [indices[0], *gaps, indices[-1] + 1]


def _indices(ranges: list[int], highest: int) -> tuple[int, ...]:
    if len(ranges) % 2 or not all(map(_is_size, ranges)) or sorted(ranges) != ranges or ranges[-1] > highest:
        raise ValueError(f"ranges {ranges[:8]}")
    return tuple(i for start, end in zip(ranges[::2], ranges[1::2], strict=True) for i in range(start, end))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
