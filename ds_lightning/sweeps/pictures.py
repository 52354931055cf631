"""The pictures of a study: history, importance of the parameters, Pareto front."""

import warnings
from collections.abc import Sequence
from functools import partial

import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from ds_lightning.sweeps.spec import Objective


def complete_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that ended with a value, by number."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def best_so_far(values: Sequence[float], direction: str) -> list[float]:
    """Return the running best.

    Example:
        >>> best_so_far([3.0, 1.0, 2.0], "minimize")
        [3.0, 1.0, 1.0]
    """
    better = min if direction == "minimize" else max
    best: list[float] = []
    for value in values:
        best.append(value if not best else better(best[-1], value))
    return best


def history(study: optuna.Study, objectives: Sequence[Objective]) -> Figure:
    """Draw every complete trial's value, and the best so far, one panel an objective."""
    trials = complete_trials(study)
    figure, panels = _panels(len(objectives))
    numbers = [trial.number for trial in trials]
    for index, (panel, objective) in enumerate(zip(panels, objectives, strict=True)):
        values = [trial.values[index] for trial in trials]
        panel.plot(numbers, values, "o", color="C0", label="trial")
        panel.step(numbers, best_so_far(values, objective.direction), where="post", color="C1", label="best")
        panel.set(xlabel="trial", ylabel=objective.metric)
        panel.legend()
    return figure


def importance(study: optuna.Study, objectives: Sequence[Objective]) -> Figure | None:
    """Draw how much each parameter explains of the objective (Optuna's PED-ANOVA), one panel an objective.

    Returns:
        The figure; None when it can't be said: fewer than 2 complete trials, fewer than 2 parameters that all
        of them have, or values that are all equal.
    """
    trials = complete_trials(study)
    shared = set.intersection(*(set(trial.params) for trial in trials)) if trials else set()
    distinct = [len({trial.values[index] for trial in trials}) for index in range(len(objectives))]
    if len(trials) < 2 or len(shared) < 2 or min(distinct) < 2:
        return None
    figure, panels = _panels(len(objectives))
    for index, (panel, objective) in enumerate(zip(panels, objectives, strict=True)):
        target = partial(_cost, index=index, direction=objective.direction)
        with warnings.catch_warnings():
            # It says that low values are taken for good ones; `_cost` sees to that.
            warnings.simplefilter("ignore", UserWarning)
            shares = optuna.importance.get_param_importances(study, target=target)
        names = list(reversed(shares))
        panel.barh(range(len(names)), [shares[name] for name in names], color="C0")
        panel.set_yticks(range(len(names)), [_short(name) for name in names])
        panel.set(xlabel=f"importance for {objective.metric}", xlim=(0, 1))
    return figure


def pareto(study: optuna.Study, objectives: Sequence[Objective]) -> Figure:
    """Draw the trials over two objectives, those of the Pareto front in colour; a panel each pair."""
    trials = complete_trials(study)
    front = {trial.number for trial in study.best_trials}
    pairs = [(x, y) for x in range(len(objectives)) for y in range(x + 1, len(objectives))]
    figure, panels = _panels(len(pairs))
    for panel, (x, y) in zip(panels, pairs, strict=True):
        for colour, label, inside in (("0.7", "dominated", False), ("C1", "Pareto front", True)):
            chosen = [trial for trial in trials if (trial.number in front) == inside]
            panel.plot(
                [trial.values[x] for trial in chosen],
                [trial.values[y] for trial in chosen],
                "o",
                color=colour,
                label=label,
            )
        for trial in trials:
            if trial.number in front:
                at = (trial.values[x], trial.values[y])
                panel.annotate(str(trial.number), at, textcoords="offset points", xytext=(4, 4))
        panel.set(xlabel=objectives[x].metric, ylabel=objectives[y].metric)
        panel.legend()
    return figure


def _cost(trial: FrozenTrial, index: int, direction: str) -> float:
    return float(trial.values[index]) * (1 if direction == "minimize" else -1)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(6.4 * count, 4.0), layout="constrained")
    return figure, [figure.add_subplot(1, count, index + 1) for index in range(count)]


def _short(key: str) -> str:
    parts = [part for part in key.split(".") if part != "init_args"]
    return ".".join(parts[-2:])
