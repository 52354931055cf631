"""What came of the multipliers, in one line."""

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ._scaled_steps import ScaledSteps

UNCHANGED = 0.01


def summary(scaled: Sequence[ScaledSteps], module: nn.Module) -> str | None:
    """Name the smallest and the largest multiplier, and compare convolutions with fully connected layers."""
    multipliers = {name: m for one in scaled for name, m in one.unfaded.items()}
    if not multipliers:
        return None
    low, high = min(multipliers, key=multipliers.__getitem__), max(multipliers, key=multipliers.__getitem__)
    before = " before fading" if any(one.rule.fade for one in scaled) else ""
    text = (
        f"DynamicLayerLR: {len(multipliers)} layers, multipliers{before} from {multipliers[low]:.3g} ({low}) to "
        f"{multipliers[high]:.3g} ({high})"
    )
    ratio = convolutions_to_linear(multipliers, module)
    return text if ratio is None else f"{text}; convolutions have {ratio:.2f} times the mean of fully connected layers"


def convolutions_to_linear(multipliers: Mapping[str, float], module: nn.Module) -> float | None:
    """Return the mean multiplier of convolutions over that of linear layers; None where either kind is missing."""
    parts = {name.replace("_orig_mod.", ""): part for name, part in module.named_modules()}
    found: dict[type[nn.Module], list[float]] = {_ConvNd: [], nn.Linear: []}
    for name, m in multipliers.items():
        for kind, values in found.items():
            if isinstance(parts.get(name), kind):
                values.append(m)
    convolutions, linear = found.values()
    if not convolutions or not linear:
        return None
    return (sum(convolutions) / len(convolutions)) / (sum(linear) / len(linear))


def no_effect(scaled: Sequence[ScaledSteps], trainer: pl.Trainer) -> str | None:
    """Say why the callback changed nothing; None when it did."""
    if not scaled:
        return "no optimizer holds a weight with two or more dimensions that include and exclude let through"
    rule, steps = scaled[0].rule, max(one.steps for one in scaled)
    article = rule.name == "article"
    if rule.vectors != 1 and steps:
        return None
    relative = not article and rule.reference == "mean"
    if relative and all(len(one.layers) == 1 for one in scaled):
        return "there is one layer, and multipliers are relative to the mean over the layers"
    if relative and all(len(set(one.groups)) == 1 for one in scaled):
        return "all layers are in one group, and multipliers are relative to the mean over the groups"
    if article and steps > rule.every:
        changed, readings = max((one.changed, one.readings) for one in scaled)
        if 2 * changed > readings:
            return None
        low, high = min(one.smallest for one in scaled), max(one.largest for one in scaled)
        return (
            f"rule='article' gave scales from {low:.7f} to {high:.7f} over {steps} optimizer steps, more than "
            f"{UNCHANGED:.0%} from 1 after {changed} of {readings} readings; use rule='variance' or 'trust'"
        )
    if max(one.largest_change for one in scaled) > UNCHANGED:
        return None
    if any(one.idle for one in scaled):
        return (
            "the scales of norm layers differ between channels, as after training, and in fine-tuning the default rule "
            "scales nothing with SGD: remove the callback, or name a rule"
        )
    if steps == 0 and trainer.global_step > 0:
        return "the optimizer's step hooks never ran; it replaces torch.optim.Optimizer.step"
    if steps <= rule.first_change:
        return f"multipliers first change after {rule.first_change} optimizer steps, and there were {steps}"
    text = f"every multiplier stayed within {UNCHANGED:.0%} of 1 for {steps} optimizer steps"
    if not rule.spare:
        return text
    kind = type(scaled[0].optimizer).__name__
    if rule.reference == "start":
        return f"{text}; no layer stands before a norm, and then the default rule scales none with {kind}: name a rule"
    free, layers = sum(int(one.statistics.scale_free().sum()) for one in scaled), sum(len(one.layers) for one in scaled)
    return (
        f"{text}; {free} of {layers} layers stand before a norm layer, and with {kind} the default rule leaves these "
        "alone: remove the callback, or name a rule"
    )
