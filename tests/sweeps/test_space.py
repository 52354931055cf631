import itertools

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.errors import ConfigError
from ds_lightning.sweeps import SearchSpace

LR = {"type": "float", "low": 1e-4, "high": 1.0, "log": True}


def every_assignment(entries):
    """All assignments of categorical entries by brute force: every combination, then what `when` removes."""
    keys = list(entries)
    found = set()
    for values in itertools.product(*(entries[key]["choices"] for key in keys)):
        chosen = dict(zip(keys, values, strict=True))
        for _ in keys:
            for key in keys:
                wanted = entries[key].get("when", {})
                if any(parent not in chosen or chosen[parent] not in allowed for parent, allowed in wanted.items()):
                    chosen.pop(key, None)
        found.add(frozenset(chosen.items()))
    return found


@st.composite
def trees(draw):
    """Categorical spaces in which a key may depend on earlier ones, listed in any order."""
    entries = {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        entry = {"type": "categorical", "choices": draw(st.sampled_from([[0], [0, 1], ["x", "y", "z"]]))}
        if entries and draw(st.booleans()):
            parent = draw(st.sampled_from(sorted(entries)))
            choices = entries[parent]["choices"]
            entry["when"] = {parent: draw(st.lists(st.sampled_from(choices), min_size=1, unique=True))}
        entries[name] = entry
    return {key: entries[key] for key in draw(st.permutations(sorted(entries)))}


@given(trees(), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_suggestions_are_among_all_assignments(entries, seed):
    space = SearchSpace.from_dict(entries)
    allowed = every_assignment(entries)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(5):
        trial = study.ask()
        chosen = space.suggest(trial)
        assert frozenset(chosen.items()) in allowed
        assert space.decode(trial.params) == chosen


@given(trees())
@settings(deadline=None, max_examples=40)
def test_assignments_cover_every_branch_and_every_choice(entries):
    tried = [frozenset(one.items()) for one in SearchSpace.from_dict(entries).assignments()]
    allowed = every_assignment(entries)
    assert set(tried) <= allowed
    assert {frozenset(dict(one)) for one in tried} == {frozenset(dict(one)) for one in allowed}
    assert set().union(*tried) == set().union(*allowed)


@given(st.integers(1, 50), st.integers(0, 50), st.integers(1, 7))
@settings(deadline=None, max_examples=30)
def test_integers_stay_on_their_grid(low, width, step):
    high = low + (width // step) * step
    space = SearchSpace.from_dict({"n": {"type": "int", "low": low, "high": high, "step": step}})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    grid = list(range(low, high + 1, step))
    assert all(space.suggest(study.ask())["n"] in grid for _ in range(5))
    assert space.grid() == {"n": grid}
    assert {one["n"] for one in space.assignments()} == {grid[0], grid[-1]}


def test_float_grid_has_every_step():
    grid = SearchSpace.from_dict({"x": {"type": "float", "low": 0.1, "high": 0.7, "step": 0.1}}).grid()
    assert grid["x"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])


def test_suggest_passes_optunas_arguments_through():
    trial = optuna.create_study().ask()
    space = SearchSpace.from_dict(
        {
            "lr": LR,
            "step": {"type": "float", "low": 0, "high": 1, "step": 0.25},
            "n": {"type": "int", "low": 1, "high": 64, "log": True},
            "c": {"type": "categorical", "choices": ["a", None, True, 2]},
        }
    )
    space.suggest(trial)
    assert trial.distributions == {
        "lr": optuna.distributions.FloatDistribution(1e-4, 1.0, log=True),
        "step": optuna.distributions.FloatDistribution(0, 1, step=0.25),
        "n": optuna.distributions.IntDistribution(1, 64, log=True),
        "c": optuna.distributions.CategoricalDistribution(("a", None, True, 2)),
    }


def test_structured_choices_come_back_as_they_were():
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    adam = {"class_path": "torch.optim.Adam", "init_args": {"betas": [0.9, 0.99]}}
    space = SearchSpace.from_dict(
        {
            "opt": {"type": "categorical", "choices": [sgd, adam]},
            "opt.lr": {**LR, "when": {"opt": adam}},
        }
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = []
    for _ in range(20):
        trial = study.ask()
        chosen = space.suggest(trial)
        assert space.decode(trial.params) == chosen
        assert ("opt.lr" in chosen) == (chosen["opt"] == adam)
        seen.append(chosen["opt"])
    assert sgd in seen
    assert adam in seen


def test_a_wide_integer_parent_is_not_enumerated():
    space = SearchSpace.from_dict(
        {
            "n": {"type": "int", "low": 0, "high": 10**12},
            "x": {**LR, "when": {"n": [5, 7]}},
        }
    )
    branches = list(space.assignments())
    assert {one["n"] for one in branches if "x" in one} == {5, 7}
    assert any("x" not in one for one in branches)


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([], "space must be a mapping"),
        ({}, "space is empty"),
        ({"a": 3}, "space: a must be a mapping"),
        ({3: LR}, "key 3 must be a string"),
        ({"a": {"low": 0}}, "type must be one of float, int, categorical, got None"),
        ({"a": {**LR, "type": "loguniform"}}, "type must be one of .* got 'loguniform'"),
        ({"a": {"type": "float", "lo": 0, "high": 1}}, "float takes no 'lo'; did you mean 'low'"),
        ({"a": {"type": "float", "low": 0}}, "float needs `high`"),
        ({"a": {"type": "float", "low": 2, "high": 1}}, "low must be at most high, got low 2.0 and high 1.0"),
        ({"a": {"type": "float", "low": "x", "high": 1}}, "low must be a finite number, got 'x'"),
        ({"a": {"type": "float", "low": 0, "high": float("inf")}}, "high must be a finite number, got inf"),
        ({"a": {"type": "int", "low": 0.5, "high": 1}}, "low must be an integer, got 0.5"),
        ({"a": {"type": "int", "low": True, "high": 1}}, "low must be an integer, got True"),
        ({"a": {**LR, "step": 0.1}}, "log and step exclude each other"),
        ({"a": {**LR, "low": 0}}, "log needs low above 0, got 0.0"),
        ({"a": {**LR, "log": "yes"}}, "log must be true or false"),
        ({"a": {"type": "int", "low": 0, "high": 4, "step": 0}}, "step must be above 0"),
        ({"a": {"type": "categorical"}}, "choices must be a list"),
        ({"a": {"type": "categorical", "choices": [1, 2, 1]}}, "choice 1 is there twice"),
        ({"a": {**LR, "when": {"b": 1}}}, "`when` names 'b', not in the space"),
        (
            {"aa": {**LR, "when": {"bb": 1}}, "bbb": {"type": "int", "low": 0, "high": 1}},
            "did you mean 'bbb'",
        ),
        ({"a": {**LR, "when": {"b": 0.5}}, "b": LR}, "a float has no single values"),
        ({"a": {**LR, "when": {"b": 9}}, "b": {"type": "int", "low": 0, "high": 3}}, "is never 9"),
        (
            {
                "a": {"type": "int", "low": 0, "high": 1, "when": {"b": 1}},
                "b": {"type": "int", "low": 0, "high": 1, "when": {"a": 1}},
            },
            "go in a circle: a -> b -> a",
        ),
        (
            {
                "a": {"type": "int", "low": 0, "high": 1},
                "b": {"type": "int", "low": 0, "high": 1, "when": {"a": 0}},
                "c": {**LR, "when": {"b": 1, "a": 1}},
            },
            "c can never exist: its conditions want a to be two things",
        ),
    ],
)
def test_a_wrong_space_is_one_clear_line(entries, text):
    with pytest.raises(ConfigError, match=text) as caught:
        SearchSpace.from_dict(entries)
    assert "\n" not in str(caught.value)


def test_true_and_one_are_two_choices():
    assert len(SearchSpace.from_dict({"a": {"type": "categorical", "choices": [1, True]}}).dimensions) == 1


@pytest.mark.parametrize("entry", [LR, {**LR, "log": False}])
def test_a_grid_needs_steps(entry):
    with pytest.raises(ConfigError, match="needs `step`"):
        SearchSpace.from_dict({"a": entry}).grid()


def test_a_grid_has_no_conditional_keys():
    entries = {"a": {"type": "int", "low": 0, "high": 1}, "b": {**LR, "when": {"a": 1}}}
    with pytest.raises(ConfigError, match="b has `when`"):
        SearchSpace.from_dict(entries).grid()
