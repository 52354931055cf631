import optuna
import pytest

from ds_lightning.sweeps.pictures import best_so_far, history, importance, pareto
from ds_lightning.sweeps.spec import Objective


def study_of(function, directions, count=40):
    study = optuna.create_study(directions=directions, sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(count):
        trial = study.ask()
        x, y = trial.suggest_float("a.init_args.x", -1, 1), trial.suggest_float("b.y", -1, 1)
        study.tell(trial, function(x, y))
    return study


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_importance_finds_the_parameter_that_matters_in_both_directions(direction):
    sign = 1 if direction == "minimize" else -1
    study = study_of(lambda x, y: sign * x * x, [direction])
    figure = importance(study, [Objective("m", direction)])
    axes = figure.axes[0]
    shares = dict(zip([label.get_text() for label in axes.get_yticklabels()], axes.patches, strict=True))
    assert shares["a.x"].get_width() > 0.9
    assert shares["b.y"].get_width() < 0.1


@pytest.mark.parametrize(("function", "count"), [(lambda x, y: 1.0, 5), (lambda x, y: x, 1)])
def test_no_importance_where_none_can_be_told(function, count):
    assert importance(study_of(function, ["minimize"], count), [Objective("m", "minimize")]) is None


def test_history_runs_along_the_best():
    assert best_so_far([3, 4, 1, 2], "minimize") == [3, 3, 1, 1]
    assert best_so_far([3, 4, 1, 5], "maximize") == [3, 4, 4, 5]
    study = study_of(lambda x, y: x, ["maximize"], 6)
    points, best = history(study, [Objective("m", "maximize")]).axes[0].lines
    assert list(points.get_ydata()) == [trial.value for trial in study.trials]
    assert best.get_ydata()[-1] == study.best_value


def test_pareto_shows_dominated_and_front():
    study = study_of(lambda x, y: (x * x, (y - 0.5) ** 2), ["minimize", "minimize"])
    dominated, front = pareto(study, [Objective("a", "minimize"), Objective("b", "minimize")]).axes[0].lines
    every = [tuple(trial.values) for trial in study.trials]
    expected = {p for p in every if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in every)}
    assert set(zip(*front.get_data(), strict=True)) == expected
    assert set(zip(*dominated.get_data(), strict=True)) == set(every) - expected


def test_pareto_of_three_objectives_has_three_panels():
    objectives = [Objective(name, "minimize") for name in "abc"]
    study = study_of(lambda x, y: (x, y, x * y), ["minimize"] * 3, 4)
    assert len(pareto(study, objectives).axes) == 3
