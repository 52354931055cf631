"""The tables of benchmarks/layer_lr.py: steps to the targets and final accuracies beside the baseline's."""

import statistics
from collections.abc import Sequence
from typing import Any

from layer_lr_methods import Run
from layer_lr_networks import CLASSES, PARTS
from seed_spread import spread

SHARES = (0.6, 0.75, 0.9, 0.97)


def steps_to(target: float, steps: Sequence[int], curve: Sequence[float], chance: float) -> float | None:
    """Return the step at which the highest accuracy so far reaches a target above chance; None when it never does."""
    before, highest = 0, chance
    for step, accuracy in zip(steps, curve, strict=True):
        if accuracy >= target:
            return before + (step - before) * (target - highest) / (accuracy - highest)
        before, highest = step, max(highest, accuracy)
    return None


def mean_curve(found: dict[int, dict[str, Any]]) -> list[float]:
    return [statistics.fmean(at) for at in zip(*(result["curve"] for result in found.values()), strict=True)]


def fewer_steps(
    target: float, mine: dict[int, dict[str, Any]], plain: dict[int, dict[str, Any]], chance: float
) -> dict[str, Any]:
    """Compare the steps to a target, seed by seed."""
    steps = next(iter(plain.values()))["steps"]
    found, fewer, lacking, plain_lacking = [], 0, 0, 0
    for seed in sorted(mine.keys() & plain.keys()):
        ours, theirs = (steps_to(target, steps, rows[seed]["curve"], chance) for rows in (mine, plain))
        lacking, plain_lacking = lacking + (ours is None), plain_lacking + (theirs is None)
        fewer += ours is not None and (theirs is None or ours < theirs)
        found.append(100 * (1 - (steps[-1] if ours is None else ours) / (steps[-1] if theirs is None else theirs)))
    whole = [steps_to(target, steps, mean_curve(rows), chance) for rows in (mine, plain)]
    return {
        **spread(found, 1),
        "fewer_in": f"{fewer} of {len(found)}",
        "not_reached": {"method": lacking, "baseline": plain_lacking},
        "of_mean_curve": None if None in whole else round(100 * (1 - whole[0] / whole[1]), 1),  # type: ignore[operator]
    }


def table_row(
    row: dict[str, Any], plain: dict[int, dict[str, Any]], targets: Sequence[float], chance: float
) -> dict[str, Any]:
    """Summarize one method's trainings, and compare them to the baseline's."""
    seeds = row["seeds"]
    line = {key: row[key] for key in ("rate", "bracketed", "tuning")}
    if not seeds:
        return line
    first = next(iter(seeds.values()))
    line |= {
        "val": spread([result["curve"][-1] for result in seeds.values()]),
        "test": spread([result["test"] for result in seeds.values()]),
    }
    both = sorted(seeds.keys() & plain.keys())
    if seeds is not plain and both:
        line |= {
            "val_to_baseline": spread([seeds[seed]["curve"][-1] - plain[seed]["curve"][-1] for seed in both]),
            "test_to_baseline": spread([seeds[seed]["test"] - plain[seed]["test"] for seed in both]),
            "fewer_steps_percent": [fewer_steps(target, seeds, plain, chance) for target in targets],
        }
    line["multipliers"] = {
        when: {
            name: round(statistics.fmean(result["multipliers"][when][name] for result in seeds.values()), 3)
            for name in names
        }
        for when, names in first["multipliers"].items()
    }
    line["curve"] = [round(share, 4) for share in mean_curve(seeds)]
    line["seconds"] = statistics.median(result["seconds"] for result in seeds.values())
    return line


def report(base: Run, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Turn the trainings of one setting into its table."""
    chance = 1 / (len(PARTS[base.part]) if base.part else CLASSES[base.data])
    plain = found["baseline"]["seeds"]
    final = statistics.fmean(result["curve"][-1] for result in plain.values()) if plain else chance
    # A baseline that learned nothing has no targets.
    targets = [chance + share * (final - chance) for share in SHARES] if final > chance else []
    shown = ("network", "data", "part", "size", "optimizer", "steps", "batch_size", "warmup")
    return {
        "setting": {name: getattr(base, name) for name in shown},
        "chance": chance,
        "targets": [round(target, 4) for target in targets],
        "methods": {method: table_row(row, plain, targets, chance) for method, row in found.items()},
    }
