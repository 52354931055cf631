import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ds_lightning.datamodules.episode_classes import split_classes
from ds_lightning.errors import ConfigError

SHARES = [(0.64, 0.16, 0.2), (0.5, 0.25, 0.25), (0.8, 0.0, 0.2), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.sampled_from(SHARES), st.integers(0, 5), st.booleans())
@settings(deadline=None, max_examples=60)
def test_each_class_is_in_one_split_and_groups_stay_together(group_numbers, shares, seed, grouped):
    names = [f"class {number}" for number in range(len(group_numbers))]
    groups = dict(zip(names, map(str, group_numbers), strict=True)) if grouped else None
    found = split_classes(names, shares, seed, groups)
    assert found == split_classes(names, shares, seed, groups)
    assert sorted(number for numbers in found.values() for number in numbers) == list(range(len(names)))
    for (split, numbers), share in zip(found.items(), shares, strict=True):
        assert numbers == sorted(numbers)
        if share == 0:
            assert numbers == [], split
    if grouped:
        held = [{group_numbers[number] for number in numbers} for numbers in found.values()]
        assert sum(map(len, held)) == len(set(group_numbers))
        wanted = sum(share > 0 for share in shares)
        assert sum(bool(groups) for groups in held) == min(wanted, len(set(group_numbers)))
    elif len(names) >= 30:
        for numbers, share in zip(found.values(), shares, strict=True):
            assert abs(len(numbers) - share * len(names)) <= 1


def test_the_seed_decides_and_groups_have_three_forms():
    names = [f"{letter}{number}" for letter in "abcdef" for number in range(5)]
    splits = (0.5, 0.25, 0.25)
    found = [split_classes(names, splits, seed)["train"] for seed in range(4)]
    assert len({tuple(numbers) for numbers in found}) == 4
    by_call = split_classes(names, splits, 0, lambda name: name[0])
    assert by_call == split_classes(names, splits, 0, {name: name[0] for name in names})
    assert by_call == split_classes(names, splits, 0, [name[0] for name in names])
    assert sorted(map(len, by_call.values())) in ([5, 10, 15], [10, 10, 10], [5, 5, 20])


def test_named_classes_and_the_rest():
    names = ["a1", "a2", "b1", "b2", "c1", "d1"]
    explicit = {"train": ["a1", 2], "val": None, "test": ["c1"]}
    found = split_classes(names, (0.5, 0.25, 0.25), 0, None, explicit)
    assert found == {"train": [0, 2], "val": [1, 3, 5], "test": [4]}
    # a2 and b2 share a group with a training class: they are nowhere.
    found = split_classes(names, (0.5, 0.25, 0.25), 0, lambda name: name[0], explicit)
    assert found == {"train": [0, 2], "val": [5], "test": [4]}
    # A folder may be called 1, and be class number 0.
    assert split_classes(["1", "0", "x"], (1, 0, 0), 0, None, {"train": ["1", "2"]})["train"] == [0, 2]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"splits": (0.5, 0.2, 0.2)}, r"splits is \(0.5, 0.2, 0.2\), which sums to 0.9; expected three shares"),
        ({"splits": (1.2, -0.1, -0.1)}, "expected three shares >= 0"),
        ({"splits": (0.5, 0.5)}, "expected three shares"),
        ({"explicit": {"train": ["z"]}}, "train_classes has 'z'; expected names of classes .*or 0 to 3"),
        ({"explicit": {"test": [4]}}, "test_classes has 4; expected"),
        ({"explicit": {"train": ["a1"], "test": [0]}}, "class 'a1' is in train_classes and in test_classes"),
        (
            {"explicit": {"val": ["a1"], "test": ["a2"]}, "groups": lambda name: name[0]},
            r"group 'a' \('a1' and 'a2'\) is in val_classes and in test_classes",
        ),
        ({"explicit": {"train": ["a1", 0]}}, "train_classes has the class 'a1' twice"),
        ({"groups": {"a1": "a"}}, "groups has no group for the class 'a2'"),
        ({"groups": ["a"]}, "groups is a list of 1; expected one group for each of 4 classes"),
    ],
)
def test_what_does_not_fit_is_named(options, problem):
    given = {"names": ["a1", "a2", "b1", "b2"], "splits": (0.5, 0.25, 0.25), "seed": 0, **options}
    with pytest.raises(ConfigError, match=problem):
        split_classes(**given)
