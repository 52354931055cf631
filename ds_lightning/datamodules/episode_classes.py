"""Which classes are for training, validation and testing: never one in two, nor two of one group."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ds_lightning.errors import ConfigError
from ds_lightning.functional.seeds import derived_seed

Groups = Mapping[str, str] | Sequence[str] | Callable[[str], str]
SPLITS = ("train", "val", "test")


def check_splits(splits: Sequence[float]) -> None:
    """Refuse shares that are not three numbers >= 0 that sum to 1.

    Raises:
        ConfigError: says what they are.
    """
    if len(splits) != 3 or not all(share >= 0 for share in splits) or not math.isclose(sum(splits), 1, abs_tol=1e-6):
        raise ConfigError(
            f"splits is {tuple(splits)}, which sums to {sum(splits):g}; expected three shares >= 0 of the classes "
            "for train, val and test that sum to 1"
        )


def split_classes(
    names: Sequence[str],
    splits: Sequence[float],
    seed: int,
    groups: Groups | None = None,
    explicit: Mapping[str, Sequence[str | int] | None] | None = None,
) -> dict[str, list[int]]:
    """Give each class to train, val or test, whole groups at a time.

    The groups are put in a random order, which is cut in three where the shares of the classes come closest to
    `splits`; a share above 0 gets one group at least, as long as there are enough.

    Args:
        names: of the classes, all different.
        splits: shares of train, val and test, >= 0, with sum 1.
        seed: of the order.
        groups: the group of each class; None makes each class a group.
        explicit: `train`, `val`, `test` -> names or numbers of its classes, or None. The classes that no list names
            go to the splits without a list, in their shares; but those of a group that a list names are left out.

    Returns:
        `train`, `val`, `test` -> sorted numbers of its classes.

    Raises:
        ConfigError: an unknown class, a class or group in two lists, or groups that do not fit the classes.

    Example:
        >>> found = split_classes(["a1", "a2", "b1", "c1"], (0.5, 0.25, 0.25), seed=0, groups=lambda name: name[0])
        >>> sorted(map(len, found.values()))
        [1, 1, 2]
    """
    check_splits(splits)
    group_of = _groups(names, groups)
    wanted = {split: (explicit or {}).get(split) for split in SPLITS}
    chosen = {split: _numbers(entries, names, split) for split, entries in wanted.items() if entries is not None}
    _check_disjoint(chosen, names, group_of)
    taken = {group_of[number] for numbers in chosen.values() for number in numbers}
    free = [number for number in range(len(names)) if group_of[number] not in taken]
    open_shares = {split: share for split, share in zip(SPLITS, splits, strict=True) if split not in chosen and share}
    return {**{split: [] for split in SPLITS}, **chosen, **_cut(free, group_of, open_shares, seed)}


def _groups(names: Sequence[str], groups: Groups | None) -> list[str]:
    if groups is None:
        return [str(number) for number in range(len(names))]
    if isinstance(groups, Mapping):
        absent = [name for name in names if name not in groups]
        if absent:
            raise ConfigError(f"groups has no group for the class {absent[0]!r}; expected one for each class")
        return [str(groups[name]) for name in names]
    if callable(groups):
        return [str(groups(name)) for name in names]
    if isinstance(groups, str) or len(groups) != len(names):
        raise ConfigError(
            f"groups is a {type(groups).__name__} of {len(groups)}; expected one group for each of {len(names)} classes"
        )
    return [str(group) for group in groups]


def _numbers(entries: Sequence[str | int], names: Sequence[str], split: str) -> list[int]:
    argument = f"{split}_classes"
    known: dict[Any, int] = {name: number for number, name in enumerate(names)}
    found: list[int] = []
    for entry in entries:
        # Folders may have numbers for names; a command line gives numbers as text.
        number = known.get(entry, int(entry) if str(entry).isdecimal() else entry) if isinstance(entry, str) else entry
        if not isinstance(number, int) or not 0 <= number < len(names):
            few = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise ConfigError(f"{argument} has {entry!r}; expected names of classes ({few}) or 0 to {len(names) - 1}")
        found.append(number)
    if len(set(found)) < len(found):
        twice = next(number for number in found if found.count(number) > 1)
        raise ConfigError(f"{argument} has the class {names[twice]!r} twice; expected each once")
    return sorted(found)


def _check_disjoint(chosen: Mapping[str, Sequence[int]], names: Sequence[str], group_of: Sequence[str]) -> None:
    owner: dict[str, tuple[str, int]] = {}
    for split, numbers in chosen.items():
        for number in numbers:
            other, first = owner.setdefault(group_of[number], (split, number))
            if other == split:
                continue
            what = f"class {names[number]!r} is"
            if first != number:
                what = f"group {group_of[number]!r} ({names[first]!r} and {names[number]!r}) is"
            raise ConfigError(f"{what} in {other}_classes and in {split}_classes; expected it in one of them")


def _cut(free: Sequence[int], group_of: Sequence[str], shares: Mapping[str, float], seed: int) -> dict[str, list[int]]:
    if not shares:
        return {}
    members: dict[str, list[int]] = {}
    for number in free:
        members.setdefault(group_of[number], []).append(number)
    generator = torch.Generator().manual_seed(derived_seed(seed, "classes"))
    groups = list(members.values())
    groups = [groups[place] for place in torch.randperm(len(groups), generator=generator).tolist()]
    sizes = torch.tensor([0, *map(len, groups)], dtype=torch.float64).cumsum(0)
    found: dict[str, list[int]] = {}
    start, target, left = 0, 0.0, len(shares)
    for split, share in shares.items():
        left -= 1
        target += share / sum(shares.values()) * len(free)
        # Leave a group for each of the later splits, and take one.
        last = max(len(groups) - left, start)
        first = min(start + 1, last)
        end = last if left == 0 else first + int((sizes[first : last + 1] - target).abs().argmin())
        found[split] = sorted(number for group in groups[start:end] for number in group)
        start = end
    return found
